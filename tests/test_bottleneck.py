"""Bottlenecks: where they are put, what they compute, and that they say nothing at first."""

from __future__ import annotations

import math

import pytest
import slow_llama
import torch
from rounding import TINY
from test_models import ROWS, padded, perturb
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from rlhf import models
from rlhf.errors import ConfigError
from rlhf.methods import bottleneck
from rlhf.methods.settings import BottleneckConfig

ROW = ROWS[1]
SMALL = {"vocab_size": 290, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
LLAMA_LIKE = SMALL | {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
MODELS = {  # its config, and the ends of the names of the projections of attention and MLP
    "llama": (LlamaConfig(**LLAMA_LIKE), "self_attn.o_proj", "mlp.down_proj"),
    "mistral": (MistralConfig(**LLAMA_LIKE), "self_attn.o_proj", "mlp.down_proj"),
    "qwen2": (Qwen2Config(**LLAMA_LIKE), "self_attn.o_proj", "mlp.down_proj"),
    "qwen3": (Qwen3Config(**LLAMA_LIKE), "self_attn.o_proj", "mlp.down_proj"),
    "gpt2": (
        GPT2Config(vocab_size=290, n_embd=32, n_layer=2, n_head=4),
        "attn.c_proj",
        "mlp.c_proj",
    ),
    "gpt-neox": (
        GPTNeoXConfig(**SMALL, intermediate_size=64),
        "attention.dense",
        "mlp.dense_4h_to_h",
    ),
    "falcon": (FalconConfig(**SMALL), "self_attention.dense", "mlp.dense_4h_to_h"),
    "bloom": (
        BloomConfig(vocab_size=290, hidden_size=32, n_layer=2, n_head=4),
        "self_attention.dense",
        "mlp.dense_4h_to_h",
    ),
}

ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: (torch.exp(2 * x) - 1) / (torch.exp(2 * x) + 1),
}


def by_hand(weights, at, activation="gelu"):
    """Of (layer, y): y + up(act(down(y))), with the weights found at `at` in each layer."""

    def after(layer, y):
        found = {
            name.split(f"layers.{layer}.{at}.bottleneck_")[1]: weight.double()
            for name, weight in weights.items()
            if f"layers.{layer}.{at}.bottleneck_" in name
        }
        inner = y @ found["down.default.weight"].T + found["down.default.bias"]
        inner = ACTIVATIONS[activation](inner)
        return y + inner @ found["up.default.weight"].T + found["up.default.bias"]

    return after


def build(kind):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MODELS[kind][0]).eval()


def test_the_slow_llama_is_llama(tiny_model):
    """Else it would prove nothing below."""
    model = tiny_model()
    with torch.no_grad():
        fast = model(torch.tensor([ROW])).logits[0]
    assert_close(slow_llama.logits(model, ROW).float(), fast, rtol=0, atol=TINY)


@pytest.mark.parametrize("name", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@torch.no_grad()
def test_what_it_computes(tiny_model, name, activation):
    """The whole model, written out: houlsby after both sublayers, pfeiffer after the MLP."""
    cfg = BottleneckConfig(name=name, size=5, activation=activation)
    model = perturb(bottleneck.attach(tiny_model(), cfg, head=False), std=0.3)
    weights = dict(model.named_parameters())
    changes = {"after_mlp": by_hand(weights, "mlp.down_proj", activation)}
    if name == "houlsby":
        changes["after_attention"] = by_hand(weights, "self_attn.o_proj", activation)
    expected = slow_llama.logits(tiny_model(), ROW, **changes)
    plain = slow_llama.logits(tiny_model(), ROW)
    assert float((expected - plain).abs().max()) > 0.1
    fast = model.double()(torch.tensor([ROW])).logits[0]
    assert_close(fast, expected, rtol=0, atol=TINY)  # rotary angles stay in fp32


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["houlsby", "pfeiffer"])
@torch.no_grad()
def test_it_is_put_after_the_output_projections_and_says_nothing_at_first(kind, name):
    ids, mask, _ = padded(left=2)
    given = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
    expected = build(kind)(**given).logits
    model = bottleneck.attach(build(kind), BottleneckConfig(name=name, size=4), head=False).eval()
    assert torch.equal(model(**given).logits, expected)
    places = {
        n.split(".bottleneck_")[0].removeprefix("base_model.model.")
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    ends = MODELS[kind][1:] if name == "houlsby" else MODELS[kind][2:]
    plain = {n for n, _ in build(kind).named_modules()}
    assert places == {n for n in plain for end in ends if n.endswith(f".{end}")}
    assert len(places) == 2 * len(ends)
    perturb(model)
    changed = model(**given).logits
    assert float((changed - expected).abs().max()) > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(**given).logits, expected)


@torch.no_grad()
def test_it_says_nothing_at_first_in_bf16_either(tiny_model):
    plain, model = (tiny_model().to(torch.bfloat16) for _ in range(2))
    model = bottleneck.attach(model, BottleneckConfig(), head=False).eval()
    ids = torch.tensor([ROW])
    assert torch.equal(model(ids).logits, plain(ids).logits)


@torch.no_grad()
def test_gpt2_computes_it_too():
    """Its projections are no nn.Linear. Each layer's output, from what the projection said."""
    model = bottleneck.attach(build("gpt2"), BottleneckConfig(size=5), head=False)
    perturb(model, std=0.3)
    layers = [m for m in model.modules() if isinstance(m, bottleneck.BottleneckLayer)]
    assert len(layers) == 4
    for layer in layers:
        seen = []
        layer.base_layer.register_forward_hook(lambda _, x, y, seen=seen: seen.append(y))
        layer.register_forward_hook(lambda _, x, y, seen=seen: seen.append(y))
        model(torch.tensor([ROW]))
        before, after = seen
        weights = {n: p for n, p in layer.named_parameters() if "bottleneck_" in n}
        weights = {f"layers.0.at.{name}": p for name, p in weights.items()}
        expected = by_hand(weights, "at")(0, before.double())
        assert_close(after.double(), expected, rtol=0, atol=TINY)
        assert float((after - before).abs().max()) > 0.01


@torch.no_grad()
def test_two_active_adapters_come_one_after_the_other(tiny_model):
    model = perturb(bottleneck.attach(tiny_model(), BottleneckConfig(size=4), head=False))
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    perturb(model, seed=1)
    layer = next(m for m in model.modules() if isinstance(m, bottleneck.BottleneckLayer))
    x = torch.randn(1, 3, 32)
    y = layer.base_layer(x)
    for name in ("default", "second"):
        down, up = layer.bottleneck_down[name], layer.bottleneck_up[name]
        y = y + up(ACTIVATIONS["gelu"](down(y)))
    assert_close(layer(x), y, rtol=0, atol=TINY)


def test_a_model_in_which_no_projection_is_found_is_refused():
    config = OPTConfig(
        vocab_size=290, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config)
    for name in ("houlsby", "pfeiffer"):
        with pytest.raises(ConfigError, match=rf"method\.name={name}: .*fc2") as error:
            bottleneck.attach(model, BottleneckConfig(name=name), head=False)
        assert "self_attn.out_proj" in str(error.value)
        assert "method=lora" in str(error.value)
    assert not any("bottleneck" in name for name, _ in model.named_modules())


def test_a_model_whose_mlps_are_mixtures_is_refused():
    """One layer of two has `down_proj`: the other would silently go without."""
    config = Qwen3MoeConfig(
        **LLAMA_LIKE, moe_intermediate_size=16, num_experts=4, mlp_only_layers=[0]
    )
    model = AutoModelForCausalLM.from_config(config)
    assert sum(name.endswith("mlp.down_proj") for name, _ in model.named_modules()) == 1
    with pytest.raises(ConfigError, match=r"method\.name=pfeiffer"):
        bottleneck.attach(model, BottleneckConfig(name="pfeiffer"), head=False)


def test_a_gpt2_with_a_head(tmp_path, tiny_tokenizer):
    """Its head is saved with the adapter, and a causal adapter fits it."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tiny_tokenizer), n_embd=32, n_layer=2, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    cfg = BottleneckConfig(size=4)
    causal = models.load_causal(tmp_path / "base", tiny_tokenizer, dtype=torch.float32)
    perturb(bottleneck.attach(causal, cfg, head=False)).save_pretrained(tmp_path / "adapter")
    scalar = models.load_scalar(tmp_path / "base", tiny_tokenizer, dtype=torch.float32)
    model = bottleneck.load(scalar, tmp_path / "adapter", head=True, trained=True).eval()
    ids, mask, _ = padded(left=1, right=2)
    with torch.no_grad():
        scores = models.scores(model, ids, mask)
        for row, tokens in enumerate(ROWS):
            hidden = causal.transformer(torch.tensor([tokens])).last_hidden_state[0, -1]
            assert_close(scores[row], hidden @ scalar.score.weight[0], rtol=0, atol=TINY)
