"""LoRA where its output is largest (Zhou et al. 2024, LoRA-drop); elsewhere layers share one.

A first, short training on a sample of the rows shows how much each layer's adapter comes to say.
Training then starts anew, from the adapter as it was drawn, by the plan that was found. Files hold
each layer's own copy of what is shared, so an adapter loads like any other; whoever trains it on
must share again first, by the same plan.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from rlhf.methods.settings import ADAPTER, LoraDropConfig
from rlhf.state import read_state

FILE = "lora_drop.json"  # beside the adapter's weights

Plan = dict[str, list[str]]  # "kept": layers; "<kind> <shape>": layers that share one adapter
Row = dict[str, list[int]]


@dataclass
class Sharing:
    """The plan of a run, once it has one."""

    plan: Plan | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"plan": self.plan}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.plan = read_state(Sharing, state, self).plan


# rows -> (sum of losses, how many there are, mask [B, T] of the real tokens of the forward pass)
Loss = Callable[[list[Row]], tuple[Tensor, int, Tensor]]


def choose(
    model: peft.PeftModel,
    cfg: LoraDropConfig,
    rows: list[Row],
    loss: Loss,
    *,
    batch_size: int,
    micro_batch_size: int,
    learning_rate: float,
    max_grad_norm: float,
    seed: int,
) -> Plan:
    """Train on a sample, measure, and put the adapter back as it was.

    Every process does the whole of it, on the same rows; the generators are left as they were.

    Args:
        model: with a fresh adapter, on the device to train on.
        loss: runs the model.

    Returns:
        The plan, for `apply`.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    devices = [model.device.index or 0] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        count = max(1, round(cfg.sample * len(rows)))
        sample = [rows[i] for i in torch.randperm(len(rows))[:count].tolist()]
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
        model.train()
        for batch in _batches(sample, batch_size, cfg.sample_steps):
            _step(trained, optimizer, batch, loss, micro_batch_size, max_grad_norm)
    found = importance(model, sample, loss, micro_batch_size=micro_batch_size)
    optimizer.zero_grad()
    with torch.no_grad():
        for parameter, value in zip(trained, before, strict=True):
            parameter.copy_(value)
    return plan(model, found, threshold=cfg.threshold)


def _batches(rows: list[Row], size: int, steps: int) -> Iterator[list[Row]]:
    """So many batches, each row once before any comes again."""
    left: list[int] = []
    for _ in range(steps):
        if len(left) < size:
            left += torch.randperm(len(rows)).tolist()
        taken, left = left[:size], left[size:]
        yield [rows[i] for i in taken]


def _step(
    trained: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    batch: list[Row],
    loss: Loss,
    micro: int,
    max_grad_norm: float,
) -> None:
    optimizer.zero_grad()
    total = 0
    for start in range(0, len(batch), micro):
        value, count, _ = loss(batch[start : start + micro])
        value.backward()
        total += count
    for parameter in trained:
        if parameter.grad is not None:
            parameter.grad /= total
    torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
    optimizer.step()


@torch.no_grad()
def importance(
    model: peft.PeftModel, rows: list[Row], loss: Loss, *, micro_batch_size: int
) -> dict[str, float]:
    """Layer -> sum over all real tokens of ||scale * B A x||^2. The model is left in training."""
    sums: dict[str, float] = defaultdict(float)
    said: dict[str, Tensor] = {}  # [B, T], of the last forward pass
    model.eval()
    with _listening(model, said):
        for start in range(0, len(rows), micro_batch_size):
            _, _, mask = loss(rows[start : start + micro_batch_size])
            for name, squares in said.items():
                sums[name] += float((squares * mask).sum(dtype=torch.float64))
    model.train()
    return dict(sums)


@contextlib.contextmanager
def _listening(model: peft.PeftModel, said: dict[str, Tensor]) -> Iterator[None]:
    """While the block runs, each forward pass leaves the squared length of what LoRA adds."""

    def listen(name: str, layer: Any) -> Any:
        def hook(_: Any, given: tuple[Tensor, ...], __: Any) -> None:
            a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            added = layer.scaling[ADAPTER] * b(a(given[0].to(a.weight.dtype)))
            said[name] = added.float().square().sum(-1)

        return layer.register_forward_hook(hook)

    hooks = [listen(name, layer) for name, layer in _layers(model).items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def plan(model: peft.PeftModel, found: dict[str, float], *, threshold: float) -> Plan:
    """Of each kind of layer, those of the largest importance that together have `threshold` of it.

    Args:
        found: layer -> importance.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    layers = _layers(model)
    for name in found:
        layer = layers[name]
        kinds[f"{name.rpartition('.')[2]} {layer.in_features}x{layer.out_features}"].append(name)
    out: Plan = {"kept": []}
    for kind, names in kinds.items():
        names.sort(key=lambda name: -found[name])
        wanted = threshold * math.fsum(found[name] for name in names)
        sums = [math.fsum(found[name] for name in names[:count]) for count in range(len(names))]
        kept = len(names) if threshold == 1 else sum(before < wanted for before in sums)
        out["kept"] += names[:kept]
        if names[kept:]:
            out[kind] = sorted(names[kept:], key=list(found).index)
    return out


def apply(model: peft.PeftModel, chosen: Plan) -> None:
    """Let the layers of a plan share: all have the A and the B of the first of them.

    Before an optimizer is made of the model's weights, and before weights are loaded.
    """
    layers = _layers(model)
    for kind, names in chosen.items():
        for name in names[1:] if kind != "kept" else ():
            layers[name].lora_A[ADAPTER] = layers[names[0]].lora_A[ADAPTER]
            layers[name].lora_B[ADAPTER] = layers[names[0]].lora_B[ADAPTER]
    model.lora_drop_plan = chosen  # type: ignore[assignment]


def write(model: peft.PeftModel, folder: Path) -> None:
    """The plan, where the model has one, beside its adapter."""
    if (chosen := getattr(model, "lora_drop_plan", None)) is not None:
        (folder / FILE).write_text(json.dumps(chosen, indent=1) + "\n", encoding="utf-8")


def _layers(model: peft.PeftModel) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A
    }
