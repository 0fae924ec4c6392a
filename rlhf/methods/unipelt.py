"""UniPELT: LoRA, a prefix and a bottleneck in every layer, each behind a gate (Mao et al. 2022).

Each gate is sigmoid(w h + b), one number for each token. The paper's gates are pooled over the
text; a decoder's may not be, because they would read tokens that come later.

    LoRA on queries and values   q(h) + gate(h) * alpha/rank * B A h      h: the layer's input, as
    prefix in attention          keys gate(h) * K, values gate(h) * V        normed for attention
    bottleneck after the MLP     y + gate(y) * up(gelu(down(y)))          y: what the MLP says

Every token attends to the whole prefix, which has no position, beside the text that it may see.
Queries and values have a gate each, beside alpha/rank, in whose place the paper puts the gate.
B and `up` are zero at first. The prefix, whose keys and values are trained themselves, is not: the
model starts as another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.models.llama.modeling_llama import eager_attention_forward

from rlhf import libraries
from rlhf.errors import ConfigError
from rlhf.methods import own
from rlhf.methods.settings import UniPELTConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # `model_type`: their attention is built alike
_ATTENTION = {"eager": eager_attention_forward, "sdpa": AttentionInterface()["sdpa"]}
_NAME = "unipelt_{}"  # what transformers calls an attention of these that knows of prefixes

Prefix = tuple[Tensor, Tensor, Tensor]  # gate [B, T, 1], keys and values [key-value heads, P, d]


def changed() -> Iterator[str]:
    """What the gated prefix relies on in transformers, and is not there: lines."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    asked = ("module", "query", "key", "value", "attention_mask")
    for attention in _ATTENTION.values():
        yield from libraries.refusing(attention, *asked)
    # The prefix is handed over by a keyword that the attention does not know, and passes on.
    yield from libraries.refusing(LlamaAttention.forward, "hidden_states", "kwargs")
    yield from libraries.unmentioned(LlamaAttention, "k_proj", "head_dim", "_attn_implementation")
    yield from libraries.lacking(PreTrainedModel, "set_attn_implementation")


def attach(model: PreTrainedModel, cfg: UniPELTConfig, *, head: bool) -> peft.PeftModel:
    """Freeze `model` and add the three parts to every layer.

    Args:
        head: the model ends in a scalar head (`score`), which is then trained in full.

    Raises:
        ConfigError: the model is of another family, or its attention is computed otherwise.
    """
    adapter = UniPELTAdapter(
        task_type=own.task(head=head),
        target_modules=["self_attn", "q_proj", "v_proj", "down_proj"],
        rank=cfg.rank,
        alpha=cfg.alpha,
        tokens=cfg.tokens,
        size=cfg.size,
    )
    return peft.get_peft_model(model, adapter)


def load(
    model: PreTrainedModel, folder: str | Path, *, head: bool, trained: bool
) -> peft.PeftModel:
    """Put a saved adapter on `model`; see `own.load`."""
    return own.load(model, folder, own.OwnType.UNIPELT, head=head, trained=trained)


@dataclass
class UniPELTAdapter(own.OwnConfig):
    """What adapter_config.json says of the method."""

    rank: int = 8
    alpha: float = 16.0
    tokens: int = 10
    size: int = 48

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = own.OwnType.UNIPELT


# ---------------------------------------------------------------- the three parts


class GatedLayer(own.OwnLayer):
    """One of the three parts."""

    unipelt_gate: Any  # adapter -> nn.Linear

    def gate(self, adapter: str, h: Tensor) -> Tensor:
        """How much of the part each token takes: [B, T, H] -> [B, T, 1], in (0, 1)."""
        linear = self.unipelt_gate[adapter]
        return torch.sigmoid(linear(h.to(linear.weight.dtype)))


class GatedLora(GatedLayer):
    """A projection of the attention, and its low-rank update."""

    adapter_layer_names = ("unipelt_gate", "unipelt_down", "unipelt_up")
    other_param_names = ("unipelt_scale",)
    unipelt_down: Any
    unipelt_up: Any

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.unipelt_scale: dict[str, float] = {}

    def add(self, adapter: str, config: UniPELTAdapter) -> None:
        base = self.base_layer
        down, up = own.pair(base.in_features, config.rank, base.out_features, bias=False)
        self.unipelt_down[adapter], self.unipelt_up[adapter] = down, up
        self.unipelt_gate[adapter] = nn.Linear(base.in_features, 1)
        self.unipelt_scale[adapter] = config.alpha / config.rank
        self.settle(adapter, base.weight)

    def forward(self, h: Tensor) -> Tensor:
        y = self.base_layer(h)
        for name in self.running():
            down, up = self.unipelt_down[name], self.unipelt_up[name]
            update = self.unipelt_scale[name] * up(down(h.to(down.weight.dtype)))
            y = y + (self.gate(name, h) * update).to(y.dtype)
        return y


class GatedBottleneck(GatedLayer):
    """The output projection of the MLP, and the bottleneck after it."""

    adapter_layer_names = ("unipelt_gate", "unipelt_down", "unipelt_up")
    unipelt_down: Any
    unipelt_up: Any

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer: Any = base_layer

    def add(self, adapter: str, config: UniPELTAdapter) -> None:
        base = self.base_layer
        down, up = own.pair(base.out_features, config.size, base.out_features, bias=True)
        self.unipelt_down[adapter], self.unipelt_up[adapter] = down, up
        self.unipelt_gate[adapter] = nn.Linear(base.out_features, 1)
        self.settle(adapter, base.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        for name in self.running():
            down, up = self.unipelt_down[name], self.unipelt_up[name]
            change = up(F.gelu(down(y.to(down.weight.dtype))))
            y = y + (self.gate(name, y) * change).to(y.dtype)
        return y


class GatedPrefix(GatedLayer):
    """The prefix of one attention. It is a part of that module, and hands it the prefix as one more
    argument each time it runs, so that nothing is kept from one forward pass to the next."""

    adapter_layer_names = ("unipelt_gate", "unipelt_keys", "unipelt_values")
    unipelt_keys: Any  # adapter -> nn.Embedding
    unipelt_values: Any
    attention: Any
    name = "gated_prefix"  # in the attention module, and among its arguments

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "attention", attention)  # which this is a part of, not it of this
        self.hook = attention.register_forward_pre_hook(self.hand_over, with_kwargs=True)

    def get_base_layer(self) -> nn.Module:
        return self.attention.k_proj

    def add(self, adapter: str, config: UniPELTAdapter) -> None:
        projection = self.attention.k_proj  # [hidden] -> [key-value heads * d]
        self.unipelt_gate[adapter] = nn.Linear(projection.in_features, 1)
        for vectors in (self.unipelt_keys, self.unipelt_values):
            vectors[adapter] = nn.Embedding(config.tokens, projection.out_features)
            nn.init.normal_(vectors[adapter].weight, std=0.02)
        self.settle(adapter, projection.weight)

    def hand_over(self, attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Called before the attention is, with what it will be called with."""
        if names := self.running():
            h = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            kwargs = kwargs | {self.name: self.of(names, h)}
        return args, kwargs

    def of(self, adapters: list[str], h: Tensor) -> Prefix:
        """The prefix of the one active adapter, for the tokens h [B, T, H]."""
        if len(adapters) > 1:
            raise ValueError(f"one adapter of unipelt can be active at a time, not {adapters}")
        shape = (-1, self.attention.head_dim)
        keys, values = (
            vectors[adapters[0]].weight.unflatten(1, shape).transpose(0, 1).to(h.dtype)
            for vectors in (self.unipelt_keys, self.unipelt_values)
        )
        return self.gate(adapters[0], h).to(h.dtype), keys, values


class UniPELTModel(own.OwnTuner):
    """Puts the three parts into every layer, and an attention that knows of prefixes."""

    prefix = "unipelt_"
    tuner_layer_cls = GatedLayer

    def make(self, target: nn.Module, name: str) -> own.OwnLayer:
        return GatedBottleneck(target) if name == "down_proj" else GatedLora(target)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        _give_attention(model)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        *more: Any,
        **named: Any,
    ) -> None:
        if target_name != "self_attn":
            super()._create_and_replace(
                peft_config, adapter_name, target, target_name, *more, **named
            )
            return
        if not hasattr(target, GatedPrefix.name):
            target.add_module(GatedPrefix.name, GatedPrefix(target))
        getattr(target, GatedPrefix.name).add(adapter_name, peft_config)

    def unload(self) -> nn.Module:
        """The base as it was."""
        for part in [m for m in self.model.modules() if isinstance(m, GatedPrefix)]:
            part.hook.remove()
            delattr(part.attention, part.name)
        attention = self.model.config._attn_implementation
        self.model.set_attn_implementation(attention.removeprefix(_NAME.format("")))
        return super().unload()


# ---------------------------------------------------------------- attention with a prefix


def _give_attention(model: Any) -> None:
    """The attention that was chosen at load, which from now on takes a prefix too.

    Raises:
        ConfigError: the model is of another family, or its attention is computed otherwise.
    """
    kind, attention = model.config.model_type, model.config._attn_implementation
    if kind not in FAMILIES:
        raise ConfigError(
            f"method.name=unipelt: this model is of type {kind}, and the prefix fits the attention "
            f"of {', '.join(FAMILIES)} only. Use method=lora or method=houlsby."
        )
    if attention in map(_NAME.format, _ATTENTION):
        return
    if attention not in _ATTENTION:
        raise ConfigError(
            f"model.attn={attention}: method.name=unipelt adds a prefix to the attention, which is "
            f"known for {', '.join(_ATTENTION)} only. Set model.attn to one of them."
        )
    model.set_attn_implementation(_NAME.format(attention))


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attention: Callable[..., tuple[Tensor, Tensor | None]],
    gated_prefix: Prefix | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`attention` over prefix and text; over the text alone, as it is, where there is no prefix.

    A prefix token has the score gate * q k and adds gate * v, where the gate is that of the asking
    token. So queries become [q, gate * q], keys and values [0, k] in the prefix and [k, 0] in the
    text: one softmax over both, and sums that come out apart, of which the second is gated. It
    costs what heads of twice the size would.

    Args:
        query: [B, heads, T, d].
        key, value: [B, key-value heads, S, d], of the text so far.
        attention_mask: [B, 1, T, S], bool (True: seen) or added to the scores; None: causal.
        attention: one of transformers' own.
        gated_prefix: see `GatedPrefix.of`.

    Returns:
        [B, T, heads, d], and attention weights [B, heads, T, P + S] or None.
    """
    if gated_prefix is None:
        return attention(module, query, key, value, attention_mask, **options)
    gate, keys, values = gated_prefix
    wide = torch.cat([query, gate[:, None] * query], dim=-1)
    mask = _seeing_prefix(attention_mask, query.shape[2], key.shape[2], keys.shape[1], key.device)
    both, weights = attention(
        module, wide, _after(keys, key), _after(values, value), mask, **options
    )
    text, prefix = both.chunk(2, dim=-1)
    return text + gate[:, :, None] * prefix, weights


def _after(prefix: Tensor, text: Tensor) -> Tensor:
    """[heads, P, d] and [B, heads, S, d] as [B, heads, P + S, 2 d], in separate halves."""
    size = text.shape[-1]
    shared = F.pad(prefix, (size, 0)).expand(len(text), -1, -1, -1)
    return torch.cat([shared, F.pad(text, (0, size))], dim=2)


def _seeing_prefix(
    mask: Tensor | None, T: int, S: int, P: int, device: torch.device
) -> Tensor | None:
    """The mask [B, 1, T, P + S] in which every token sees the prefix.

    Without a mask sdpa lets one token see all, and several what came before, counted from the left.
    """
    if mask is None:
        if T == 1:
            return None
        mask = torch.ones(1, 1, T, S, dtype=torch.bool, device=device).tril()
    return F.pad(mask, (P, 0), value=mask.dtype == torch.bool)


for _name, _attention in _ATTENTION.items():
    AttentionInterface.register(_NAME.format(_name), partial(attend, attention=_attention))
    AttentionMaskInterface.register(_NAME.format(_name), AttentionMaskInterface()[_name])

own.register(own.OwnType.UNIPELT, UniPELTAdapter, UniPELTModel)
