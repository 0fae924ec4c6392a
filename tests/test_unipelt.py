"""UniPELT: the arithmetic of its three gated parts, and a prefix that every token sees."""

from __future__ import annotations

import json

import pytest
import slow_llama
import torch
from rounding import TINY
from test_bottleneck import ACTIVATIONS, build
from test_models import CLOSE, EOS, PAD, PADDINGS, PROMPTS, RESPONSES, ROWS, padded, perturb
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
)

from rlhf import models, rollout
from rlhf.errors import ConfigError
from rlhf.methods import unipelt
from rlhf.methods.settings import UniPELTConfig

ROW = ROWS[1]
CFG = UniPELTConfig(rank=3, alpha=12.0, tokens=4, size=5)
LLAMA_LIKE = {"vocab_size": 290, "hidden_size": 32, "intermediate_size": 64} | {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
WINDOWS = {  # models in which a token sees the last three alone, in one layer or in both
    "mistral": MistralConfig(**LLAMA_LIKE, sliding_window=3),
    "qwen2": Qwen2Config(
        **LLAMA_LIKE, use_sliding_window=True, sliding_window=3, max_window_layers=1
    ),
}


def attach(model, cfg=CFG, *, head=False, seed=0, std=0.3):
    torch.manual_seed(seed)
    return perturb(unipelt.attach(model, cfg, head=head), seed=seed, std=std)


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def by_hand(model, cfg=CFG):
    """What `slow_llama` adds: every part from its weights, with a gate for each token."""
    weights = {name: p.detach().double() for name, p in model.named_parameters()}

    def part(layer, at):
        start = f"base_model.model.model.layers.{layer}.{at}.unipelt_"
        return {n.removeprefix(start): w for n, w in weights.items() if n.startswith(start)}

    def gate(found, h):
        return sigmoid(h @ found["gate.default.weight"].T + found["gate.default.bias"])

    def lora(at):
        def update(layer, h):
            found = part(layer, at)
            a, b = found["down.default.weight"], found["up.default.weight"]
            assert a.shape == (cfg.rank, 32)
            return gate(found, h) * (cfg.alpha / cfg.rank) * (h @ a.T @ b.T)

        return update

    def prefix(layer, h):
        found = part(layer, "self_attn.gated_prefix")
        assert len(found["keys.default.weight"]) == cfg.tokens
        g = gate(found, h)
        return g * found["keys.default.weight"], g * found["values.default.weight"]

    def after_mlp(layer, y):
        found = part(layer, "mlp.down_proj")
        inner = y @ found["down.default.weight"].T + found["down.default.bias"]
        change = ACTIVATIONS["gelu"](inner) @ found["up.default.weight"].T
        return y + gate(found, y) * (change + found["up.default.bias"])

    return {
        "query_update": lora("self_attn.q_proj"),
        "value_update": lora("self_attn.v_proj"),
        "prefix": prefix,
        "after_mlp": after_mlp,
    }


# the definition ----------------------------------------------------------------------------------


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@torch.no_grad()
def test_what_it_computes(tiny_model, attn):
    """The whole model, written out, with two heads of queries for each of keys and values."""
    model = attach(tiny_model(attn_implementation=attn))
    changes = by_hand(model)
    expected = slow_llama.logits(tiny_model(), ROW, **changes)
    for name in changes:  # each part shows
        without = slow_llama.logits(
            tiny_model(), ROW, **{n: c for n, c in changes.items() if n != name}
        )
        assert float((expected - without).abs().max()) > 0.05, name
    fine = model.double()(torch.tensor([ROW])).logits[0]
    assert_close(fine, expected, rtol=0, atol=TINY)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@torch.no_grad()
def test_the_prefix_lies_within_every_window(attn):
    """Mistral sees the last three tokens, and the prefix."""
    torch.manual_seed(0)
    config = WINDOWS["mistral"]
    plain = AutoModelForCausalLM.from_config(config, attn_implementation=attn).eval()
    windowed = slow_llama.logits(plain, ROW, window=3)
    assert float((windowed - slow_llama.logits(plain, ROW)).abs().max()) > 0.05
    assert_close(plain(torch.tensor([ROW])).logits[0].double(), windowed, rtol=0, atol=TINY)
    torch.manual_seed(0)
    model = attach(AutoModelForCausalLM.from_config(config, attn_implementation=attn).eval())
    expected = slow_llama.logits(plain, ROW, window=3, **by_hand(model))
    assert_close(model.double()(torch.tensor([ROW])).logits[0], expected, rtol=0, atol=TINY)


@torch.no_grad()
def test_no_token_reads_a_later_one(tiny_model):
    """A gate that is pooled over the text, as the paper's, would."""
    model = attach(tiny_model())
    other = [*ROW[:-3], 50, 51, 52]
    one, two = (model(torch.tensor([row])).logits[0] for row in (ROW, other))
    assert_close(one[:-3], two[:-3], **CLOSE)
    assert float((one[-3:] - two[-3:]).abs().max()) > 0.1


@torch.no_grad()
def test_at_first_the_prefix_alone_is_there(tiny_model):
    model = unipelt.attach(tiny_model(), CFG, head=False).eval()
    changes = by_hand(model)
    expected = slow_llama.logits(tiny_model(), ROW, prefix=changes["prefix"])
    fast = model.double()(torch.tensor([ROW])).logits[0]
    assert_close(fast, expected, rtol=0, atol=TINY)


# every family, padding and cache -----------------------------------------------------------------


def make(kind, attn):
    if kind in WINDOWS:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(WINDOWS[kind], attn_implementation=attn).eval()
    model = build(kind)
    model.set_attn_implementation(attn)
    return model


families = pytest.mark.parametrize("kind", ["llama", "qwen3", *WINDOWS])


@families
@pytest.mark.parametrize("padding", PADDINGS)
@torch.no_grad()
def test_padding_does_not_matter(kind, padding):
    ids, mask, R = padded(**padding)
    found = []
    for attn in ("eager", "sdpa"):
        model = attach(make(kind, attn))
        logits = models.response_logits(model, ids, mask, R)
        for row, (p, r) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            plain = model(torch.tensor([p + r])).logits[0, len(p) - 1 : -1]
            assert_close(logits[row, : len(r)], plain, **CLOSE)
        found.append(logits[mask[:, -R:]])
    assert_close(*found, **CLOSE)


@families
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@torch.no_grad()
def test_the_cache_changes_nothing(kind, attn):
    """One row (sdpa then goes without a mask) and several, padded on the left."""
    model = attach(make(kind, attn))
    for prompts in (PROMPTS[1:2], PROMPTS):
        ids, mask = rollout.pad_left(prompts, PAD, torch.device("cpu"))
        out = model.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            generation_config=GenerationConfig(
                max_new_tokens=5, do_sample=False, pad_token_id=PAD, use_cache=True
            ),
            output_logits=True,
            return_dict_in_generate=True,
        )
        for row, prompt in enumerate(prompts):
            answer = out.sequences[row, ids.shape[1] :].tolist()
            for step in range(5):
                tokens = torch.tensor([prompt + answer[:step]])
                alone = model(tokens, use_cache=False).logits[0, -1]
                assert_close(out.logits[step][row], alone, **CLOSE)


@families
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@torch.no_grad()
def test_disabled_is_the_base_bit_for_bit(kind, attn):
    """Under the attention that was chosen at load, with and without a mask, with and without a
    cache."""
    base, model = make(kind, attn), attach(make(kind, attn))
    ids, mask, _ = padded(left=2)
    with model.disable_adapter():
        for given in (
            {"input_ids": ids, "attention_mask": mask.long()},
            {"input_ids": ids[:, 6:]},
            {"input_ids": ids[:, 6:], "use_cache": False},
        ):
            assert torch.equal(model(**given).logits, base(**given).logits)
        cached, plain = model(ids[:1, 6:]), base(ids[:1, 6:])
        step = {"input_ids": torch.tensor([[9]])}
        one = model(**step, past_key_values=cached.past_key_values).logits
        assert torch.equal(one, base(**step, past_key_values=plain.past_key_values).logits)


@torch.no_grad()
def test_a_cache_of_fixed_size(tiny_model):
    """Its keys are longer than the text, and its mask is another."""
    model = attach(tiny_model(attn_implementation="sdpa"))
    given = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD, "eos_token_id": EOS}
    ids, mask = rollout.pad_left(PROMPTS, PAD, torch.device("cpu"))
    for rows in (slice(0, 3), slice(1, 2)):
        fixed, growing = (
            model.generate(
                input_ids=ids[rows],
                attention_mask=mask[rows].long(),
                generation_config=GenerationConfig(**given, **more),
            )
            for more in ({"cache_implementation": "static", "disable_compile": True}, {})
        )
        assert torch.equal(fixed, growing)


# attention ---------------------------------------------------------------------------------------


def test_the_attention_chosen_at_load_is_the_one_that_runs(tiny_model, monkeypatch):
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(args[0].shape[-1])
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    for attn, expected in (("eager", []), ("sdpa", [16, 16])):  # queries of two halves of 8
        calls.clear()
        attach(tiny_model(attn_implementation=attn))(torch.tensor([ROW]))
        assert calls == expected


@torch.no_grad()
def test_another_model_with_the_same_settings_is_left_alone(tiny_model):
    """The attention is named in the config, which two models may have in common."""
    one, other = tiny_model(), tiny_model()
    other.config = one.config
    for module in other.modules():
        if hasattr(module, "config"):
            module.config = one.config
    expected = other(torch.tensor([ROW])).logits
    attach(one)
    assert other.config._attn_implementation == "unipelt_eager"
    assert torch.equal(other(torch.tensor([ROW])).logits, expected)


def test_what_is_written_names_no_attention_of_ours(tiny_model, tmp_path):
    """Else plain transformers could not load the base that is published."""
    model = attach(tiny_model())
    model.config.save_pretrained(tmp_path)
    assert "unipelt" not in (tmp_path / "config.json").read_text()
    model.save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (written["peft_type"], written["tokens"]) == ("RLHF_UNIPELT", 4)


def test_other_families_are_refused():
    gpt2 = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=290, n_embd=32, n_layer=2, n_head=4)
    )
    for model in (gpt2, build("gpt-neox")):
        assert isinstance(model, PreTrainedModel)
        with pytest.raises(ConfigError, match=r"method\.name=unipelt: this model is of type gpt"):
            unipelt.attach(model, CFG, head=False)
        assert not any("unipelt" in name for name, _ in model.named_parameters())


def test_other_attentions_are_refused(tiny_model):
    model = tiny_model()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ConfigError, match=r"model\.attn=flex_attention: .*eager, sdpa"):
        unipelt.attach(model, CFG, head=False)


def test_two_prefixes_at_once_are_refused(tiny_model):
    model = attach(tiny_model())
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="one adapter of unipelt"):
        model(torch.tensor([ROW]))


def test_gradients_reach_every_part(tiny_model):
    """Through the gates too, in an adapter that has left its start."""
    model = attach(tiny_model())
    model(torch.tensor([ROW])).logits.square().mean().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert float(p.grad.abs().max()) > 1e-6, name
