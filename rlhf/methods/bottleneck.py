"""Bottleneck adapters: y + up(act(down(y))) after sublayers.

After attention and after the MLP (houlsby: Houlsby et al. 2019), or after the MLP alone (pfeiffer:
Pfeiffer et al. 2021). `up` is zero at first, so the model starts as it was, bit for bit. The norms
of the model stay frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.errors import ConfigError
from rlhf.methods import own
from rlhf.methods.settings import BottleneckConfig

# Ends of the names of the two output projections, in each kind of model: attention's and the MLP's.
_KINDS = (
    ("self_attn.o_proj", "mlp.down_proj"),  # Llama, Mistral, Qwen
    ("attn.c_proj", "mlp.c_proj"),  # GPT-2
    ("attention.dense", "mlp.dense_4h_to_h"),  # GPT-NeoX
    ("self_attention.dense", "mlp.dense_4h_to_h"),  # Falcon, BLOOM
)


def attach(model: PreTrainedModel, cfg: BottleneckConfig, *, head: bool) -> peft.PeftModel:
    """Freeze `model` and add bottlenecks whose output is zero at first.

    Args:
        head: the model ends in a scalar head (`score`), which is then trained in full.

    Raises:
        ConfigError: the output projections of the model are not found.
    """
    adapter = BottleneckAdapter(
        task_type=own.task(head=head),
        target_modules=_targets(model, cfg.name),
        size=cfg.size,
        activation=cfg.activation,
    )
    return peft.get_peft_model(model, adapter)


def load(
    model: PreTrainedModel, folder: str | Path, *, head: bool, trained: bool
) -> peft.PeftModel:
    """Put a saved adapter of houlsby or pfeiffer on `model`; see `own.load`."""
    return own.load(model, folder, own.OwnType.BOTTLENECK, head=head, trained=trained)


def _targets(model: PreTrainedModel, method: str) -> list[str]:
    layers = model.config.get_text_config().num_hidden_layers
    linear = [n for n, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    for kind in _KINDS:
        if all(sum(name.endswith(f".{end}") for name in linear) == layers for end in kind):
            return list(kind if method == "houlsby" else kind[1:])
    known = "; ".join(" and ".join(kind) for kind in _KINDS)
    found = sorted({".".join(name.split(".")[-2:]) for name in linear})
    raise ConfigError(
        f"method.name={method}: bottlenecks are put after the output projections of attention and "
        f"MLP, one of each in every layer ({known}), and this model has none that are called so. "
        f"Its linear layers: {', '.join(found)}. Use method=lora."
    )


@dataclass
class BottleneckAdapter(own.OwnConfig):
    """What adapter_config.json says of the method."""

    size: int = 64
    activation: str = "gelu"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = own.OwnType.BOTTLENECK


class BottleneckLayer(own.OwnLayer):
    """An output projection, and after it the bottlenecks of the active adapters."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_activation",)
    bottleneck_down: Any  # adapter -> nn.Linear
    bottleneck_up: Any

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.bottleneck_activation: dict[str, str] = {}

    def add(self, adapter: str, config: BottleneckAdapter) -> None:
        base = self.base_layer
        width = base.nf if isinstance(base, Conv1D) else base.out_features
        down, up = own.pair(width, config.size, width, bias=True)
        self.bottleneck_down[adapter], self.bottleneck_up[adapter] = down, up
        self.bottleneck_activation[adapter] = config.activation
        self.settle(adapter, base.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)  # [B, T, H]
        for name in self.running():
            down, up = self.bottleneck_down[name], self.bottleneck_up[name]
            act = own.ACTIVATIONS[self.bottleneck_activation[name]]
            y = y + up(act(down(y.to(down.weight.dtype)))).to(y.dtype)
        return y


class BottleneckModel(own.OwnTuner):
    """Puts bottlenecks after the projections named in the adapter's config."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def make(self, target: nn.Module, name: str) -> BottleneckLayer:
        return BottleneckLayer(target)


own.register(own.OwnType.BOTTLENECK, BottleneckAdapter, BottleneckModel)
