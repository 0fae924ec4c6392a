"""Tuners of ours that peft treats as its own: saved, loaded, switched, disabled and trained alike.

peft finds the classes of a method by its type, in three dictionaries of `peft.mapping`. Its own
types are members of an enum of strings; ours are members of another, found by the same strings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import peft
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from rlhf import libraries
from rlhf.errors import ConfigError
from rlhf.methods.settings import ADAPTER
from rlhf.parts import HEAD

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": F.tanh,
}


def changed() -> Iterator[str]:
    """What tuners of ours rely on in peft, and is not there: lines."""
    yield from libraries.refusing(
        BaseTuner._create_and_replace,
        *("peft_config", "adapter_name", "target", "target_name", "parent", "current_key"),
    )
    yield from libraries.lacking(BaseTuner, "_replace_module", "_prepare_model", "unload")
    yield from libraries.lacking(
        BaseTunerLayer,
        *("adapter_layer_names", "other_param_names", "active_adapters", "disable_adapters"),
        *("enable_adapters", "set_adapter", "get_base_layer"),
    )
    fields = ("_disable_adapters", "_active_adapter", "merged_adapters")
    yield from libraries.unmentioned(BaseTunerLayer, *fields)
    yield from libraries.unmentioned(BaseTuner, "prefix", "tuner_layer_cls")


class OwnType(StrEnum):
    """What `peft_type` says in the adapter_config.json of our methods."""

    BOTTLENECK = "RLHF_BOTTLENECK"
    UNIPELT = "RLHF_UNIPELT"


@dataclass
class OwnConfig(peft.PeftConfig):
    """What every adapter of ours keeps in adapter_config.json.

    Attributes:
        target_modules: ends of the names of the modules that it is put on.
        modules_to_save: trained in full beside it; peft fills in the head.
    """

    target_modules: list[str] | None = None
    modules_to_save: list[str] | None = None


def register(kind: OwnType, config: type[OwnConfig], tuner: type[OwnTuner]) -> None:
    """Tell peft of a method, after which it loads what the method saved; as often as one likes."""
    entries: tuple[tuple[dict[Any, Any], Any], ...] = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, config),
        (PEFT_TYPE_TO_TUNER_MAPPING, tuner),
        (PEFT_TYPE_TO_PREFIX_MAPPING, tuner.prefix),
    )
    for mapping, entry in entries:
        mapping[kind] = entry


def pair(inputs: int, size: int, outputs: int, *, bias: bool) -> tuple[nn.Linear, nn.Linear]:
    """(down, up): linear layers [inputs] -> [size] -> [outputs], the second of which is zero."""
    down, up = nn.Linear(inputs, size, bias=bias), nn.Linear(size, outputs, bias=bias)
    for parameter in up.parameters():
        nn.init.zeros_(parameter)
    return down, up


def task(*, head: bool) -> peft.TaskType:
    """SEQ_CLS has `score` trained in full and saved with the adapter."""
    return peft.TaskType.SEQ_CLS if head else peft.TaskType.CAUSAL_LM


# ---------------------------------------------------------------- tuner and layers


class OwnLayer(nn.Module, BaseTunerLayer):
    """What stands in the place of a module, or beside it, with one set of weights per adapter.

    A subclass names its dictionaries of weights in `adapter_layer_names`, and fills them in `add`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._disable_adapters, self._active_adapter = False, ADAPTER
        self.merged_adapters = []
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ModuleDict())

    def add(self, adapter: str, config: Any) -> None:
        """Make the weights of a new adapter."""
        raise NotImplementedError

    def settle(self, adapter: str, like: Tensor) -> None:
        """Put the weights of a new adapter where `like` is, in its type."""
        for name in self.adapter_layer_names:
            part = getattr(self, name)[adapter].to(like.device)
            if like.dtype.is_floating_point:  # not those of a base in 4 bits
                part.to(like.dtype)

    def running(self) -> list[str]:
        """The adapters that take part in this forward pass."""
        if self.disable_adapters:
            return []
        here = getattr(self, self.adapter_layer_names[0])
        return [name for name in self.active_adapters if name in here]

    def merge(self, *_: Any, **__: Any) -> None:
        raise ValueError(UNMERGEABLE)

    def unmerge(self) -> None:
        """Nothing was merged."""


UNMERGEABLE = (
    "bottlenecks and gates depend on the text, so they cannot be folded into the weights of the "
    "base. Keep the base and the adapter side by side."
)


class OwnTuner(BaseTuner):
    """Puts layers of ours into a model."""

    def make(self, target: nn.Module, name: str) -> OwnLayer:
        """The layer that takes the place of the module `target`, called `name` in its parent."""
        raise NotImplementedError

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, OwnLayer):
            target.add(adapter_name, peft_config)
            return
        layer = self.make(target, target_name)
        layer.add(adapter_name, peft_config)
        self._replace_module(parent, target_name, layer, target)


# ---------------------------------------------------------------- loading


def load(
    model: PreTrainedModel, folder: str | Path, kind: OwnType, *, head: bool, trained: bool
) -> peft.PeftModel:
    """Put a saved adapter on `model`, which may have a head where the saved one had none.

    Args:
        folder: as `save_pretrained` wrote it, on a language model or on a model with a head.
        kind: of the adapter.
        head: `model` ends in a scalar head. It is the saved one where there is one, and otherwise
            stays as `model` has it; a saved head is left out where `model` has none.
        trained: adapter and head go on being trained; otherwise all is frozen.

    Raises:
        ConfigError: the folder holds another method's adapter, or one of another model.
    """
    config: Any = peft.PeftConfig.from_pretrained(str(folder))
    if config.peft_type != kind:
        raise ConfigError(
            f"{folder}: holds an adapter of peft type {config.peft_type}, not {kind.value}. Load "
            "it with the method that it was trained by."
        )
    config.task_type, config.modules_to_save = task(head=head), None
    config.inference_mode, config.base_model_name_or_path = not trained, None
    weights = load_file(Path(folder) / "adapter_model.safetensors")
    heads = {name for name in weights if f".{HEAD}" in name}
    if not head:
        weights = {name: weight for name, weight in weights.items() if name not in heads}
    elif not heads:
        score: Any = model.score
        weights |= {f"base_model.model.{HEAD}{n}": w for n, w in score.state_dict().items()}
    out = peft.get_peft_model(model, config)
    _fill(out, weights, folder)
    return out if trained else out.requires_grad_(False).eval()


def _fill(model: peft.PeftModel, weights: dict[str, Tensor], folder: str | Path) -> None:
    """Every weight of the adapter is given a value, and every value goes somewhere."""
    wanted = peft.get_peft_model_state_dict(
        model, adapter_name=ADAPTER, save_embedding_layers=False
    )
    shapes, given = ({n: w.shape for n, w in found.items()} for found in (wanted, weights))
    off = {name for name in shapes | given if shapes.get(name) != given.get(name)}
    if off:
        raise ConfigError(
            f"{folder}: the adapter does not fit this model: {len(off)} weights differ in name or "
            f"shape, {min(off)} for one. Load it on the base it was trained on."
        )
    peft.set_peft_model_state_dict(model, weights, adapter_name=ADAPTER)
