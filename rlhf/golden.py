"""Golden values: what a run's model said of fixed inputs when it was published, in memory.

A child recomputes them after loading, so that a lost head or a dropped adapter is found before
anything is trained on it. The inputs are token ids: a swapped tokenizer is found by its hash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf import models, parts
from rlhf.errors import RegistryError, StoppedByGuard
from rlhf.ranks import is_main
from rlhf.registry import Published
from rlhf.roles import Roles
from rlhf.rollout import pad_left

ROWS = 8
# Largest difference that rounding explains. A merge is exact up to rounding: in fp32 it was
# measured below 1e-5 on logits of size 10; bf16 keeps 8 bits, fp16 11.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.25 / 8}


@torch.no_grad()
def write_logits(
    policy: nn.Module, sequences: list[list[int]], pad_id: int, folder: Path, dtype: torch.dtype
) -> dict[str, Any]:
    """Store logits [n, V] and hidden states [n, H] at the last token of a few sequences.

    Args:
        policy: in memory, as it was trained; adapters not merged.
        sequences: token ids; the first 8 are taken.
        folder: the run's model/.

    Returns:
        Facts for the manifest.

    Raises:
        StoppedByGuard: one of them is not finite.
    """
    rows = sequences[:ROWS]
    values = {
        "values": _last_logits(policy, rows, pad_id),
        "hidden": _last_hidden(policy, rows, pad_id),
    }
    return _write(values, rows, pad_id, folder, dtype)


@torch.no_grad()
def write_scores(
    reward_model: nn.Module,
    sequences: list[list[int]],
    pad_id: int,
    folder: Path,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Store scores [n] of a few sequences, prompt and answer; see `write_logits`."""
    rows = sequences[:ROWS]
    return _write({"values": _scores(reward_model, rows, pad_id)}, rows, pad_id, folder, dtype)


@torch.no_grad()
def check_logits(policy: nn.Module, parent: Published) -> float:
    """Recompute a parent's golden logits with the loaded model; the largest difference.

    Raises:
        RegistryError: it is beyond the tolerance.
    """
    stored, sequences, pad_id = _read(parent)
    return _compare(parent, stored["values"], _last_logits(policy, sequences, pad_id))


@torch.no_grad()
def check_backbone(model: nn.Module, parent: Published) -> float:
    """The same for a model without its language head: hidden states, relative to the largest.

    Raises:
        RegistryError: they differ by more than the tolerance.
    """
    stored, sequences, pad_id = _read(parent)
    scale = float(stored["hidden"].abs().max())
    return _compare(
        parent, stored["hidden"] / scale, _last_hidden(model, sequences, pad_id) / scale
    )


@torch.no_grad()
def check_scores(reward_model: nn.Module, parent: Published) -> float:
    """Recompute a parent's golden scores with the loaded model; the largest difference.

    Raises:
        RegistryError: it is beyond the tolerance.
    """
    stored, sequences, pad_id = _read(parent)
    return _compare(parent, stored["values"], _scores(reward_model, sequences, pad_id))


def check_start(model: nn.Module, sft: Published) -> str:
    """What a reward model starts from is what its parent published; says so in one line.

    Raises:
        RegistryError: it is not.
    """
    if sft.is_checkpoint:
        return _no_golden(sft)
    return (
        f"start = {sft.reference} (golden hidden states: {check_backbone(model, sft):.1e} at most)"
    )


def check_roles(
    roles: Roles, reward_models: Mapping[str, nn.Module], sft: Published, rms: Sequence[Published]
) -> str:
    """What PPO starts from is what the parents published; says so in one line.

    Args:
        reward_models: reference -> model, for each of `rms`.

    Raises:
        RegistryError: the reference or a reward model says something else.
    """
    said = []
    if sft.is_checkpoint:
        said.append(_no_golden(sft))
    else:
        logits = check_logits(roles.reference, sft)
        said.append(f"reference = {sft.reference} (golden logits differ by {logits:.1e} at most)")
    for rm in rms:
        if rm.is_checkpoint:
            said.append(_no_golden(rm))
        else:
            scores = check_scores(reward_models[rm.reference], rm)
            said.append(f"reward model = {rm.reference} (golden scores: {scores:.1e})")
    return ", ".join(said)


def _no_golden(parent: Published) -> str:
    return f"{parent.reference}: a checkpoint, without golden values; its files were verified"


def _last_hidden(model: nn.Module, sequences: list[list[int]], pad_id: int) -> Tensor:
    ids, mask = pad_left(sequences, pad_id, _device(model))
    return models.hidden_states(model, ids, mask)[:, -1].float().cpu()


def _last_logits(policy: nn.Module, sequences: list[list[int]], pad_id: int) -> Tensor:
    ids, mask = pad_left(sequences, pad_id, _device(policy))
    out = policy(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=models.positions(mask),
        use_cache=False,
        logits_to_keep=1,
    )
    return out.logits[:, -1].float().cpu()


def _scores(reward_model: nn.Module, sequences: list[list[int]], pad_id: int) -> Tensor:
    return models.scores(reward_model, *pad_left(sequences, pad_id, _device(reward_model))).cpu()


def _device(model: nn.Module) -> torch.device:
    return model.device  # type: ignore[return-value]


def _write(
    values: dict[str, Tensor],
    sequences: list[list[int]],
    pad_id: int,
    folder: Path,
    dtype: torch.dtype,
) -> dict[str, Any]:
    ids, mask = pad_left(sequences, pad_id, torch.device("cpu"))
    if not all(bool(value.isfinite().all()) for value in values.values()):
        raise StoppedByGuard(
            f"{folder}: the model that would be published says nan or infinities of the first "
            f"{len(sequences)} held-out rows, which nobody who loads it could compare. Nothing is "
            "published. Training diverged, or it overflows in engine.dtype: lower the learning "
            "rate, or use engine.dtype=fp32."
        )
    if is_main():
        tensors = {name: value.contiguous() for name, value in values.items()}
        save_file(tensors | {"ids": ids, "mask": mask.to(torch.uint8)}, folder / parts.GOLDEN)
    return {"file": f"model/{parts.GOLDEN}", "tolerance": TOLERANCE[dtype], "pad_id": pad_id}


def _read(parent: Published) -> tuple[dict[str, Tensor], list[list[int]], int]:
    stored = load_file(parent.path / parent.manifest.golden["file"])
    rows = zip(stored["ids"], stored["mask"].bool(), strict=True)
    sequences = [ids[mask].tolist() for ids, mask in rows]
    return stored, sequences, int(parent.manifest.golden["pad_id"])


def _compare(parent: Published, stored: Tensor, now: Tensor) -> float:
    same = stored.shape == now.shape
    difference = float((stored - now).abs().max()) if same else float("nan")
    tolerance = float(parent.manifest.golden["tolerance"])
    if not difference <= tolerance:
        off = ", ".join(parts.changed(parent.model_dir))
        raise RegistryError(
            f"{parent.reference}: loaded from {parent.model_dir}, it does not say what it said "
            f"when it was published: off by {difference:.3g} (at most {tolerance:g}). "
            + (
                f"What changed on disk: {off}. Restore it, or train {parent.reference} again."
                if off
                else "Its tensors are those that were published, so it is read otherwise here: "
                "another dtype, another version of a library, or golden values of another run."
            )
        )
    return difference
