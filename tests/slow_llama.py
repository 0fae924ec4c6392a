"""Llama written out slowly, one row, one head and one query at a time: what tests expect.

Adapters come in as functions of (layer, tensor), so that a test writes their arithmetic by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

Change = Callable[[int, Tensor], Tensor]
Prefix = Callable[[int, Tensor], tuple[Tensor, Tensor]]


def _same(_: int, x: Tensor) -> Tensor:
    return x


def _none(_: int, x: Tensor) -> Tensor:
    return torch.zeros((), dtype=x.dtype)


@torch.no_grad()
def logits(
    model: PreTrainedModel,
    ids: list[int],
    *,
    after_attention: Change = _same,
    after_mlp: Change = _same,
    query_update: Change = _none,
    value_update: Change = _none,
    prefix: Prefix | None = None,
    window: int | None = None,
) -> Tensor:
    """Logits [T, V] of one row, in fp64.

    Args:
        model: a plain Llama or Mistral, whose weights are read and whose forward is not run.
        after_attention, after_mlp: of (layer, [T, H]) that a sublayer says.
        query_update, value_update: of (layer, [T, H] normed), added to the projections.
        prefix: of (layer, [H] the normed input of one token): keys and values [P, kv heads * d].
        window: a token sees so many, itself included; None: all before it.
    """
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    cfg = model.config
    heads, groups = cfg.num_attention_heads, cfg.num_attention_heads // cfg.num_key_value_heads
    d = getattr(cfg, "head_dim", None) or cfg.hidden_size // heads

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def norm(name: str, x: Tensor) -> Tensor:
        size = (x.square().mean(-1, keepdim=True) + cfg.rms_norm_eps).sqrt()
        return x / size * weights[f"{name}.weight"]

    def turned(x: Tensor, place: int) -> Tensor:  # rotary positions: pairs (i, i + d/2)
        out = x.clone()
        for i in range(d // 2):
            angle = place * cfg.rope_parameters["rope_theta"] ** (-2 * i / d)
            a, b = x[i], x[i + d // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + d // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    h = weights["model.embed_tokens.weight"][ids]
    for layer in range(cfg.num_hidden_layers):
        at = f"model.layers.{layer}"
        x = norm(f"{at}.input_layernorm", h)
        q = linear(f"{at}.self_attn.q_proj", x) + query_update(layer, x)
        k = linear(f"{at}.self_attn.k_proj", x)
        v = linear(f"{at}.self_attn.v_proj", x) + value_update(layer, x)
        said = torch.zeros(len(ids), heads * d, dtype=torch.float64)
        for t in range(len(ids)):
            first = 0 if window is None else max(0, t - window + 1)
            for head in range(heads):
                own = slice(head * d, (head + 1) * d)
                shared = slice(head // groups * d, (head // groups + 1) * d)
                asked = turned(q[t, own], t)
                keys = [turned(k[s, shared], s) for s in range(first, t + 1)]
                values = [v[s, shared] for s in range(first, t + 1)]
                if prefix is not None:
                    more_keys, more_values = prefix(layer, x[t])
                    keys += list(more_keys[:, shared])
                    values += list(more_values[:, shared])
                scores = torch.stack([asked @ key for key in keys]) / math.sqrt(d)
                said[t, own] = torch.softmax(scores, 0) @ torch.stack(values)
        h = h + after_attention(layer, linear(f"{at}.self_attn.o_proj", said))
        x = norm(f"{at}.post_attention_layernorm", h)
        gate = linear(f"{at}.mlp.gate_proj", x)
        inner = gate * torch.sigmoid(gate) * linear(f"{at}.mlp.up_proj", x)
        h = h + after_mlp(layer, linear(f"{at}.mlp.down_proj", inner))
    return linear("lm_head", norm("model.norm", h))
