"""Golden values: what a run's model said of fixed inputs when it was published, in memory.

A child recomputes them after loading, so that a lost head or a dropped adapter is found before
anything is trained on it. The inputs are token ids: a swapped tokenizer is found by its hash.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf import engine, models
from rlhf.errors import RegistryError
from rlhf.models import Roles
from rlhf.ranks import is_main
from rlhf.registry import Published
from rlhf.rollout import pad_left
from rlhf.session import Session

FILE = "model/golden.safetensors"
ROWS = 8
# Largest difference that rounding explains. A merge is exact up to rounding: in fp32 it was
# measured below 1e-5 on logits of size 10; bf16 keeps 8 bits.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}


@torch.no_grad()
def write_logits(
    policy: nn.Module, sequences: list[list[int]], pad_id: int, session: Session, dtype: torch.dtype
) -> dict[str, Any]:
    """Store logits [n, V] at the last token of a few sequences; returns facts for the manifest."""
    return _write(_last_logits(policy, sequences[:ROWS], pad_id), sequences, pad_id, session, dtype)


@torch.no_grad()
def write_scores(
    reward_model: nn.Module,
    sequences: list[list[int]],
    pad_id: int,
    session: Session,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Store scores [n] of a few sequences; returns facts for the manifest."""
    return _write(
        _scores(reward_model, sequences[:ROWS], pad_id), sequences, pad_id, session, dtype
    )


@torch.no_grad()
def check_logits(policy: nn.Module, parent: Published) -> float:
    """Recompute a parent's golden logits with the loaded model; the largest difference.

    Raises:
        RegistryError: it is beyond the tolerance.
    """
    stored, sequences, pad_id = _read(parent)
    return _compare(parent, stored, _last_logits(policy, sequences, pad_id))


@torch.no_grad()
def check_scores(reward_model: nn.Module, parent: Published) -> float:
    """Recompute a parent's golden scores with the loaded model; the largest difference.

    Raises:
        RegistryError: it is beyond the tolerance.
    """
    stored, sequences, pad_id = _read(parent)
    return _compare(parent, stored, _scores(reward_model, sequences, pad_id))


def check_roles(roles: Roles, sft: Published, rm: Published) -> str:
    """What PPO starts from is what the parents published; says so in one line.

    Raises:
        RegistryError: the reference or the reward model says something else.
    """
    logits, scores = check_logits(roles.reference, sft), check_scores(roles.reward_model, rm)
    return (
        f"reference = {sft.reference} (golden logits differ by {logits:.1e} at most), reward model "
        f"= {rm.reference} (golden scores: {scores:.1e})"
    )


def _last_logits(policy: nn.Module, sequences: list[list[int]], pad_id: int) -> Tensor:
    ids, mask = pad_left(sequences, pad_id, engine.device())
    out = policy(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=models.positions(mask),
        use_cache=False,
        logits_to_keep=1,
    )
    return out.logits[:, -1].float().cpu()


def _scores(reward_model: nn.Module, sequences: list[list[int]], pad_id: int) -> Tensor:
    return models.scores(reward_model, *pad_left(sequences, pad_id, engine.device())).cpu()


def _write(
    values: Tensor, sequences: list[list[int]], pad_id: int, session: Session, dtype: torch.dtype
) -> dict[str, Any]:
    ids, mask = pad_left(sequences[:ROWS], pad_id, torch.device("cpu"))
    if is_main():
        tensors = {"values": values.contiguous(), "ids": ids, "mask": mask.to(torch.uint8)}
        save_file(tensors, session.path / FILE)
    return {"file": FILE, "tolerance": TOLERANCE[dtype], "pad_id": pad_id}


def _read(parent: Published) -> tuple[Tensor, list[list[int]], int]:
    stored = load_file(parent.path / parent.manifest.golden["file"])
    rows = zip(stored["ids"], stored["mask"].bool(), strict=True)
    sequences = [ids[mask].tolist() for ids, mask in rows]
    return stored["values"], sequences, int(parent.manifest.golden["pad_id"])


def _compare(parent: Published, stored: Tensor, now: Tensor) -> float:
    difference = float((stored - now).abs().max())
    tolerance = float(parent.manifest.golden["tolerance"])
    if not difference <= tolerance:
        raise RegistryError(
            f"{parent.reference}: loaded from {parent.model_dir}, it does not say what it said "
            f"when it was published: off by {difference:.3g} (at most {tolerance:g}). The weights, "
            "an adapter or the head changed on the way, or this dtype is too coarse. `rlhf verify "
            f"{parent.reference}` compares the files."
        )
    return difference
