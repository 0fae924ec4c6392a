"""Means and whitening over the positions that count.

Every mask is bool and True means *counts*. A padded position may hold anything, nan and inf
included: it is replaced before it is used, so it reaches neither a result nor a gradient.
(Multiplying by the mask would not do: 0 * nan is nan.)
"""

import torch
from torch import Tensor

from rlhf.errors import ShapeError


def expect_same_shape(**tensors: Tensor) -> None:
    """Refuses tensors that broadcasting would otherwise stretch in silence.

    Raises:
        ShapeError: the shapes differ; the message names each one.
    """
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ShapeError(f"{shapes}: these must have one shape.")


def expect_bool(**masks: Tensor) -> None:
    """Refuses 0/1 numbers as masks: with them `~mask` and indexing mean something else.

    Raises:
        ShapeError: a mask's dtype is not bool.
    """
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise ShapeError(
                f"{name} is {mask.dtype}: a mask must be bool, True on positions that count. "
                f"Pass {name}.bool() if 1 means that here."
            )


def at_least_fp32(x: Tensor) -> Tensor:
    """x for sums and exponentials: bf16, fp16, bool and integers become fp32, fp64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def keep(x: Tensor, mask: Tensor) -> Tensor:
    """x (at least fp32) where the mask is True, else 0 with no gradient, whatever x holds there."""
    return torch.where(mask, at_least_fp32(x), 0.0)


def masked_mean(x: Tensor, mask: Tensor, *, count: Tensor | float | None = None) -> Tensor:
    """Mean of x over the True positions: sum(x * mask) / count.

    With `count=None` an all-False mask gives 0 with zero gradient, so that a rank or a micro-batch
    that happens to hold no token adds nothing (and still takes part in the backward pass).

    Args:
        x: any shape.
        mask: bool, shape of x.
        count: divide by this instead of by the True positions here. Given the count over all
            micro-batches and ranks, the results of the parts add up to the mean of the whole.
            (Where gradients are averaged over ranks, not summed, that is count / world size.)

    Returns:
        0-dim, at least fp32.

    Raises:
        ShapeError: shapes differ, the mask is not bool, or count is a non-scalar tensor or a
            number that is not above 0.
    """
    expect_same_shape(x=x, mask=mask)
    expect_bool(mask=mask)
    total = keep(x, mask).sum()
    if count is None:
        return total / mask.sum().clamp(min=1)
    if isinstance(count, Tensor):
        if count.ndim != 0:
            raise ShapeError(f"count {list(count.shape)}: must be one number, a 0-dim tensor.")
    elif not count > 0:
        raise ShapeError(f"count={count}: must be above 0, the number of positions that count.")
    return (total / count).to(total.dtype)


def masked_whiten(
    x: Tensor,
    mask: Tensor,
    *,
    subtract_mean: bool,
    mean: Tensor | None = None,
    var: Tensor | None = None,
) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the True positions (Huang et al. 2024, "N+").

    The variance is the population's (divided by n, not n - 1), so the moments of several ranks
    are sums over a global count:
    `mean = all_reduce(masked_mean(x, mask, count=n))`, then
    `var = all_reduce(masked_mean((x - mean) ** 2, mask, count=n))`.

    Args:
        x: any shape; for PPO advantages [B, R], or rewards [B, R].
        mask: bool, shape of x.
        subtract_mean: True centres on 0 (advantages); False only rescales and keeps the mean
            (rewards, whose sign carries meaning).
        mean, var: 0-dim moments over all ranks; both or neither. By default those of x here.

    Returns:
        Shape of x, at least fp32, 0 where the mask is False (everywhere, if nothing is True).

    Raises:
        ShapeError: shapes differ, the mask is not bool, or only one of mean and var is given.
    """
    expect_same_shape(x=x, mask=mask)
    expect_bool(mask=mask)
    if (mean is None) != (var is None):
        raise ShapeError(
            "masked_whiten got one of mean and var: a global mean with a local variance would "
            "depend on the number of ranks. Give both or neither."
        )
    x = keep(x, mask)
    if mean is None or var is None:
        mean = masked_mean(x, mask)
        mean = mean + masked_mean(x - mean, mask)  # again: equal x must come out as exactly 0
        var = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(var + 1e-8)
    if not subtract_mean:
        whitened = whitened + mean
    return keep(whitened, mask)
