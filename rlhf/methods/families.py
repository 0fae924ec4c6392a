"""Which file builds which method: the one door to the families.

A family is imported when its method is used: some are slow to import, or need more libraries.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

import peft
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.methods import lora
from rlhf.methods.settings import (
    FAMILIES,
    AdaLoraConfig,
    BitFitConfig,
    BottleneckConfig,
    FreezeConfig,
    FullConfig,
    LoraConfig,
    MethodConfig,
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
    UniPELTConfig,
)
from rlhf.methods.table import METHODS

T = TypeVar("T", bound=nn.Module)

_FILES: dict[type[MethodConfig], str] = {
    FullConfig: "weights",
    FreezeConfig: "weights",
    BitFitConfig: "weights",
    PrefixConfig: "soft",
    PromptConfig: "soft",
    PTuningConfig: "soft",
    BottleneckConfig: "bottleneck",
    UniPELTConfig: "unipelt",
}  # the others: lora

_SOFT = "prompt.safetensors"  # beside the adapter: all that is trained of a soft prompt


def _file(kind: type[MethodConfig]) -> Any:
    return importlib.import_module(f"rlhf.methods.{_FILES.get(kind, 'lora')}")


def attach(
    model: PreTrainedModel,
    cfg: MethodConfig,
    *,
    head: bool,
    tokenizer: PreTrainedTokenizerBase | None = None,
    steps: int | None = None,
    tokens: Collection[int] = (),
) -> nn.Module:
    """Make a model ready to train by a method.

    Args:
        cfg: the `method` settings.
        head: the model ends in a scalar head (`score`), which is trained in full.
        tokenizer: for prompt_tuning that begins as a text.
        steps: optimizer steps there will be, for adalora.
        tokens: ids that the base never saw, whose rows of embedding and head are trained too; the
            method's row in the table says that it can.

    Raises:
        ConfigError: the method cannot be used on this model.
    """
    more: dict[str, Any] = {}
    if isinstance(cfg, PromptConfig):
        more["tokenizer"] = tokenizer
    if isinstance(cfg, AdaLoraConfig):
        more["steps"] = steps
    if isinstance(cfg, LoraConfig):
        more["tokens"] = tokens
    return _made_by(cfg.name, _file(type(cfg)).attach(model, cfg, head=head, **more))


def load(
    model: PreTrainedModel, folder: Path, name: str, *, head: bool, trained: bool
) -> peft.PeftModel:
    """Put an adapter that cannot be merged back on its base.

    Args:
        model: the base, with a scalar head where `head`.
        folder: as `save` wrote it; one written without a head leaves the head as it is.
        name: the method that made it.
        trained: to go on with, rather than frozen.
    """
    kind = next(kind for kind, names in FAMILIES.items() if name in names)
    return _made_by(name, _file(kind).load(model, folder, head=head, trained=trained))


def _made_by(name: str, model: T) -> T:
    """`model`, which knows from now on which method made it."""
    model.made_by = name  # type: ignore[assignment]
    return model


def save(model: peft.PeftModel, folder: Path, adapter: str) -> None:
    """Write one adapter, and of a soft prompt what makes it, which peft leaves out."""
    lora.save(model, folder, adapter)
    if _is_soft(model, adapter):
        save_file(_file(PromptConfig).state(model), folder / _SOFT)


def restore(model: peft.PeftModel, folder: Path, adapter: str) -> None:
    """Put back, in place, what `save` wrote of this model."""
    if _is_soft(model, adapter):
        _file(PromptConfig).restore(model, load_file(folder / _SOFT))
    else:
        lora.restore(model, folder)


def _is_soft(model: peft.PeftModel, adapter: str) -> bool:
    return isinstance(model.peft_config[adapter], peft.PromptLearningConfig)


def go_on(model: peft.PeftModel, adapter: str) -> peft.PeftModel:
    """Train an adapter that was loaded frozen, and its head."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(adapter in name.split("."))
    return model


def mergeable(model: peft.PeftModel) -> bool:
    """Whether the adapter that `attach` or `load` put on it can be folded into the base."""
    return METHODS[str(model.made_by)].mergeable


def kept_apart(name: str) -> bool:
    """Whether what the method trained stays an adapter beside its base when it is published."""
    return METHODS[name].adapter and not METHODS[name].mergeable
