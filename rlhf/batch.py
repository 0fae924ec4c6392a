"""What is known of a rollout, step by step: sampled, judged, ready to learn from.

Each record has all of its fields from the start, and adds to the one before. Notation: B sequences,
R response. Masks: True counts; numbers are 0 on padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf import engine
from rlhf.ranks import world_size
from rlhf.rollout import Rollout


@dataclass(frozen=True)
class Judged(Rollout):
    """A rollout with the verdicts of reward, reference and critic.

    Attributes:
        scores: [B] what the answers are worth, penalties included.
        ref_logprobs: [B, R] nats, under the frozen reference, over all tokens.
        kl: [B, R] nats, per-token k1 estimate of KL(policy, reference).
        old_values: [B, R] the critic's estimate before each token is emitted; None without one.
    """

    scores: Tensor
    ref_logprobs: Tensor
    kl: Tensor
    old_values: Tensor | None


@dataclass(frozen=True)
class Batch(Judged):
    """What an update learns from.

    Attributes:
        advantages: [B, R].
        returns: [B, R], what the critic is to estimate.
    """

    advantages: Tensor
    returns: Tensor


def of_all_ranks(batch: Batch, *, per_prompt: int) -> Batch:
    """The rows of every process in the order of one process, so that minibatches are the same.

    Args:
        batch: this process's part; see `rollout.share`.
        per_prompt: consecutive rows that answer one prompt.
    """
    if world_size() == 1:
        return batch
    parts = engine.gather_objects({name: x.cpu() for name, x in batch.tensors().items()})
    whole: dict[str, Tensor | None] = {"old_values": None}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if tensors[0].dim() == 2:
            width = max(tensor.shape[1] for tensor in tensors)
            tensors = [_widened(name, tensor, width) for tensor in tensors]
        turns = [tensor.unflatten(0, (-1, per_prompt)) for tensor in tensors]  # prompts by turns
        whole[name] = torch.stack(turns, dim=1).flatten(0, 2).to(batch.prompts.device)
    return Batch(**whole)  # type: ignore[arg-type]


def _widened(name: str, tensor: Tensor, width: int) -> Tensor:
    """With more padding, on the side where the field has it; masks are 0 there."""
    more = width - tensor.shape[1]
    sides = (more, 0) if name.startswith("prompt") else (0, more)
    return nn.functional.pad(tensor, sides, value=-torch.inf if name == "floors" else 0)
