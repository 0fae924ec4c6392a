"""Methods that train the model's own weights: all of them, the last layers, or biases."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf.errors import ConfigError
from rlhf.methods.settings import BitFitConfig, FreezeConfig, FullConfig, MethodConfig

# The switches by which a model's settings say that it has biases, and the layers they speak of.
BIASED = {
    "attention_bias": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp_bias": ("gate_proj", "up_proj", "down_proj"),
}


def attach(model: PreTrainedModel, cfg: MethodConfig, *, head: bool) -> PreTrainedModel:
    """`model`, of whose weights only those of the method have a gradient.

    Args:
        cfg: of method full, freeze or bitfit.
        head: the model ends in a scalar head (`score`), which is trained with each of them.

    Raises:
        ConfigError: fewer layers than `method.layers`, or no bias to train.
    """
    model.requires_grad_(isinstance(cfg, FullConfig))
    if isinstance(cfg, FreezeConfig):
        _last_layers(model, cfg)
    if isinstance(cfg, BitFitConfig):
        _biases(model, cfg)
    if head:
        model.score.requires_grad_(True)
    return model


def _decoder(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The model without its head, and its layers."""
    inner: Any = getattr(model, model.base_model_prefix)
    count = model.config.get_text_config().num_hidden_layers
    for module in inner.children():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return inner, module
    raise ConfigError(
        f"method.name=freeze: {type(model).__name__} has no list of {count} layers, so the last "
        "ones are not known. Use method=lora."
    )


def _last_layers(model: PreTrainedModel, cfg: FreezeConfig) -> None:
    inner, layers = _decoder(model)
    if cfg.layers > len(layers):
        raise ConfigError(
            f"method.layers={cfg.layers}: the model has {len(layers)} layers. Choose fewer, or "
            "method=full."
        )
    for layer in layers[-cfg.layers :]:
        layer.requires_grad_(True)
    after = False  # the final norm, under whatever name, comes after the layers
    for module in inner.children():
        if after and "norm" in type(module).__name__.lower():
            module.requires_grad_(True)
        after = after or module is layers


def _biases(model: PreTrainedModel, cfg: BitFitConfig) -> None:
    if cfg.add_biases:
        _add_biases(model)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    if not biases:
        addable = [name for name in BIASED if hasattr(model.config, name)]
        ways = (
            "Use method.add_biases=true, which gives it biases of zero, or another method."
            if addable
            else "Use method=ia3, which is about as small, or method=lora."
        )
        raise ConfigError(
            f"method.name=bitfit: {type(model).__name__} has no biases, and BitFit trains nothing "
            f"else. {ways}"
        )
    for bias in biases:
        bias.requires_grad_(True)


def _add_biases(model: PreTrainedModel) -> None:
    """Zero biases where the model's settings can say that it has them.

    So that plain transformers loads what is published; a bias that the settings do not know of
    is dropped there without a word.
    """
    known = {name: layers for name, layers in BIASED.items() if hasattr(model.config, name)}
    if not known:
        raise ConfigError(
            f"method.add_biases=true: the settings of {type(model).__name__} cannot say that it "
            "has biases, so a plain load would drop them. Use method=ia3 or method=lora."
        )
    wanted = {layer for layers in known.values() for layer in layers}
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear) and name.rpartition(".")[2] in wanted
        if linear and module.bias is None:
            like: Any = module.weight
            zeros = torch.zeros(len(like), dtype=like.dtype, device=like.device)
            module.bias = nn.Parameter(zeros, requires_grad=False)
    for name in known:
        setattr(model.config, name, True)
