"""How far rounding alone may move what a model says: where the tests take their bounds from.

A rounding moves a number by the share u = eps / 2 at most. Roundings are as often up as down, so
n of them on the way to a number move it by about sqrt(n) u and not by n u: Higham and Mary 2019,
"A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41(5), which puts
lambda sqrt(n) u in the place of gamma_n = n u / (1 - n u) (Higham 2002, "Accuracy and Stability of
Numerical Algorithms", eq. 3.5); it is left with a chance of at most 2 exp(-lambda^2 / 2).

On the way through a transformer there are five products a layer, one after the other (to queries,
with keys, with values, to the residual stream, and through the MLP), and one for the head. The sum
of a product is as long as the model is wide. Where numbers have 16 bits it is kept in 32 bits, and
what is rounded is the weight, what comes in and what goes out. Which kernel, thread or instruction
set takes which part of a sum decides which roundings there are, but not how many.
"""

from __future__ import annotations

import math

import torch

LAMBDA = 6  # 2 exp(-18) = 3e-8 for a number; tests compare up to 10^4 of them


def bound(
    dtype: torch.dtype, *, layers: int, width: int, scale: float | torch.Tensor, rounded: int = 2
) -> float:
    """The largest difference that rounding explains.

    Args:
        dtype: the coarsest of what is compared.
        layers: of the transformer that said it.
        width: the longest sum in it, such as intermediate_size.
        scale: what a number is like: the root of the mean of squares of a tensor, if it is one.
        rounded: how many of the two that are compared were rounded in `dtype`.
    """
    if isinstance(scale, torch.Tensor):
        scale = float(scale.double().square().mean().sqrt())
    products = 5 * layers + 1
    each = width if torch.finfo(dtype).bits >= 32 else 3
    unit = torch.finfo(dtype).eps / 2
    return LAMBDA * math.sqrt(rounded * products * each) * unit * scale


# Of what the random two-layer model in conftest.py says, and others as small as that: logits up to
# 5, and log-probabilities, hidden states, scores and values, which are not larger.
TINY = bound(torch.float32, layers=2, width=64, scale=5.0)
