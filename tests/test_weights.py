"""Methods that train the model's own weights: which have a gradient, and what is refused."""

from __future__ import annotations

import pytest
import torch
from rounding import TINY
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf import models
from rlhf.errors import ConfigError
from rlhf.methods.settings import BitFitConfig, FreezeConfig


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50)).eval()


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("layers", [1, 2])
def test_freeze_trains_the_last_layers_and_the_final_norm(tiny_model, layers):
    names = trained(models.trainable(tiny_model(), FreezeConfig(layers=layers)))
    numbers = {name.split(".")[2] for name in names if ".layers." in name}
    assert numbers == {str(n) for n in range(2 - layers, 2)}
    assert {name for name in names if ".layers." not in name} == {"model.norm.weight"}
    names = trained(models.trainable(gpt2(), FreezeConfig(layers=layers)))
    rest = {name for name in names if ".h." not in name}
    assert rest == {"transformer.ln_f.weight", "transformer.ln_f.bias"}


def test_freeze_refuses_more_layers_than_there_are(tiny_model):
    with pytest.raises(ConfigError, match=r"method\.layers=3: the model has 2 layers"):
        models.trainable(tiny_model(), FreezeConfig(layers=3))


def test_bitfit_trains_biases_and_nothing_else(tiny_model):
    for model in (tiny_model(), gpt2()):
        names = trained(models.trainable(model, BitFitConfig()))
        assert names == {n for n, _ in model.named_parameters() if n.endswith("bias")} != set()


def test_bitfit_without_biases_is_refused_with_the_way_out(tiny_model):
    plain = tiny_model(attention_bias=False, mlp_bias=False)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM has no biases.*add_biases=true"):
        models.trainable(plain, BitFitConfig())


@torch.no_grad()
def test_added_biases_are_zero_and_a_plain_load_keeps_them(tiny_model, tiny_tokenizer, tmp_path):
    """Biases that the settings do not know of are dropped by a plain load without a word."""
    plain = tiny_model(attention_bias=False, mlp_bias=False)
    ids = torch.arange(20, 30)[None]
    before = plain(ids).logits
    model = models.trainable(plain, BitFitConfig(add_biases=True))
    assert_close(model(ids).logits, before, rtol=0, atol=TINY)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter += 0.1 * torch.randn(parameter.shape)
    after = model(ids).logits
    assert float((after - before).abs().max()) > 0.1
    models.publish(model, tiny_tokenizer, tmp_path)
    again = models.load_causal(tmp_path, tiny_tokenizer, dtype=torch.float32, attn="eager")
    assert torch.equal(again(ids).logits, after)


def test_biases_that_settings_cannot_tell_are_refused():
    with pytest.raises(ConfigError, match=r"method\.add_biases=true: .* a plain load would drop"):
        models.trainable(gpt2(), BitFitConfig(add_biases=True))
