"""PPO-ptx: the loss of supervised fine-tuning mixed into PPO's updates, so that what SFT taught
stays (Ouyang et al. 2022, eq. 2; they mix in pretraining text at a coefficient of 27.8).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf import engine, models
from rlhf.config import DataConfig
from rlhf.data import PromptStream, Split
from rlhf.losses import logprobs_of
from rlhf.masking import masked_mean
from rlhf.ranks import rank, rows_per_pass, world_size
from rlhf.rollout import pad_left
from rlhf.text import Renderer


@dataclass(frozen=True)
class Shown:
    """A micro-batch of demonstrations.

    Attributes:
        ids: [B, T] prompt, answer and EOS, padded on the left.
        mask: [B, T] bool, True on real tokens.
        answer_mask: [B, T] bool, True on tokens of the answer and its EOS.
        count: 0-dim, answer tokens of the whole minibatch, over all processes.
    """

    ids: Tensor
    mask: Tensor
    answer_mask: Tensor
    count: Tensor


class Demonstrations:
    """Rows of SFT in an order that depends on the seed alone, so that a resumed run goes on there.

    Args:
        rows: {"input_ids", "completion_mask"}, as `text.Renderer.sft` gives them.
        seed: of the order.
        pad_id: of the tokenizer.
        micro_batch_size: rows per forward pass, at most.
    """

    def __init__(
        self, rows: list[dict[str, list[int]]], *, seed: int, pad_id: int, micro_batch_size: int
    ) -> None:
        self._rows, self._pad_id, self._size = rows, pad_id, micro_batch_size
        self._stream = PromptStream([row["input_ids"] for row in rows], seed)

    def parts(self, turn: int, size: int) -> Iterator[Shown]:
        """This process's micro-batches of one optimizer step.

        Args:
            turn: 1, 2, ...: of all optimizer steps of the run.
            size: rows on this process.
        """
        places = self._stream.places(turn, size * world_size())[rank() :: world_size()]
        rows, device = [self._rows[place] for place in places], engine.device()
        own = torch.tensor(sum(sum(row["completion_mask"]) for row in rows), device=device)
        count = engine.sum_over_ranks(own)
        width = rows_per_pass(size, self._size)
        for start in range(0, size, width):
            part = rows[start : start + width]
            ids, mask = pad_left([row["input_ids"] for row in part], self._pad_id, device)
            answer, _ = pad_left([row["completion_mask"] for row in part], 0, device)
            yield Shown(ids, mask, answer.bool(), count)


def load(
    splits: Mapping[str, Split],
    renderer: Renderer,
    cfg: DataConfig,
    *,
    seed: int,
    micro_batch_size: int,
) -> Demonstrations | None:
    """What `ppo.ptx_coef` mixes in; None without it. `splits`: see `data.demonstrations`."""
    if "ptx" not in splits:
        return None
    return Demonstrations(
        renderer.sft(splits["ptx"], cfg),
        seed=seed,
        pad_id=renderer.pad_id,
        micro_batch_size=micro_batch_size,
    )


def loss(policy: nn.Module, shown: Shown) -> Tensor:
    """-mean log p(answer token | what is before it), in nats: the loss of SFT.

    The mean is over the tokens of the whole minibatch, so micro-batches add up to it.
    """
    logits = models.response_logits(policy, shown.ids, shown.mask, shown.ids.shape[1] - 1)
    logprobs = logprobs_of(logits, shown.ids[:, 1:])
    return -masked_mean(logprobs, shown.answer_mask[:, 1:], count=shown.count)
