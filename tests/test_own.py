"""Tuners of ours: peft saves, loads, switches and disables them, and nothing else is trained."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import peft
import pytest
import torch
from covering import pairwise
from peft.tuners.tuners_utils import BaseTunerLayer
from rounding import TINY
from safetensors.torch import save_file
from test_models import CLOSE, EOS, PAD, PADDINGS, PROMPTS, RESPONSES, ROWS, padded, perturb
from test_supervised import (
    demonstrations,
    preferences,
    train,
    train_rm,
    train_sft,
)
from torch.testing import assert_close
from transformers import GenerationConfig

from rlhf import models, rollout
from rlhf.config import EngineConfig, SamplingConfig
from rlhf.errors import ConfigError
from rlhf.methods import bottleneck, own, unipelt
from rlhf.methods.settings import BottleneckConfig, UniPELTConfig

pytestmark = pytest.mark.usefixtures("process_group")


METHODS = {
    "houlsby": (bottleneck, BottleneckConfig(name="houlsby", size=8)),
    "pfeiffer": (bottleneck, BottleneckConfig(name="pfeiffer", size=8)),
    "unipelt": (unipelt, UniPELTConfig(rank=4, tokens=5, size=8)),
}
every_method = pytest.mark.parametrize("method", METHODS)
every_attention = pytest.mark.parametrize("attn", ["eager", "sdpa"])


@pytest.fixture
def folder(tmp_path, tiny_model, tiny_tokenizer):
    """Of a base model."""
    tiny_model(initializer_range=0.1).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def causal(folder, tiny_tokenizer):
    """A factory of language models, all alike."""

    def make(attn="sdpa", dtype=torch.float32):
        return models.load_causal(folder, tiny_tokenizer, dtype=dtype, attn=attn).eval()

    return make


@pytest.fixture
def scalar(folder, tiny_tokenizer):
    """A factory of models with a head, which depends on `seed`."""

    def make(seed=5):
        torch.manual_seed(seed)
        return models.load_scalar(folder, tiny_tokenizer, dtype=torch.float32).eval()

    return make


def attach(model, method, *, head=False, seed=0, std=0.1):
    """`model` with an adapter that has been trained, as far as these tests care."""
    module, cfg = METHODS[method]
    torch.manual_seed(seed)
    return perturb(module.attach(model, cfg, head=head), seed=seed, std=std)


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# forward passes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "attn", "padding"), pairwise(METHODS, ["eager", "sdpa"], range(len(PADDINGS)))
)
@torch.no_grad()
def test_logits_are_those_of_each_row_alone(causal, method, attn, padding):
    model = attach(causal(attn), method)
    ids, mask, R = padded(**PADDINGS[padding].values[0])
    logits = models.response_logits(model, ids, mask, R)
    for row, (p, r) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        plain = model(torch.tensor([p + r])).logits[0]
        assert_close(logits[row, : len(r)], plain[len(p) - 1 : -1], **CLOSE)


@every_method
@pytest.mark.parametrize("padding", PADDINGS)
@torch.no_grad()
def test_values_and_scores_are_those_of_each_row_alone(scalar, method, padding):
    model = attach(scalar(), method, head=True)
    ids, mask, _ = padded(**padding)
    hidden, scores = models.hidden_states(model, ids, mask), models.scores(model, ids, mask)
    with model.disable_adapter():
        assert float((models.hidden_states(model, ids, mask) - hidden)[mask].abs().max()) > 0.01
    inner = model.get_base_model()
    for row, tokens in enumerate(ROWS):
        alone = inner.model(torch.tensor([tokens])).last_hidden_state[0]  # [T, H]
        assert_close(hidden[row, mask[row]], alone, **CLOSE)
        assert_close(scores[row], inner.score(alone)[-1, 0], **CLOSE)


@every_method
@every_attention
@torch.no_grad()
def test_the_cache_changes_nothing(causal, method, attn):
    """Greedy answers to prompts padded on the left, against one whole pass per token and row."""
    model = attach(causal(attn), method)
    ids, mask = rollout.pad_left(PROMPTS, PAD, torch.device("cpu"))
    out = model.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        generation_config=GenerationConfig(
            max_new_tokens=6, do_sample=False, pad_token_id=PAD, eos_token_id=EOS, use_cache=True
        ),
        output_logits=True,
        return_dict_in_generate=True,
    )
    for row, prompt in enumerate(PROMPTS):
        tokens = list(prompt)
        for step in range(6):
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
            assert_close(out.logits[step][row], logits, **CLOSE)
            tokens.append(int(logits.argmax()))
            if tokens[-1] == EOS:
                break
        assert out.sequences[row, ids.shape[1] :].tolist()[: step + 1] == tokens[len(prompt) :]


@every_method
@torch.no_grad()
def test_what_is_sampled_is_what_is_trained_on(causal, method):
    """The ratio of PPO is 1 before the first update."""
    model = attach(causal("sdpa"), method)
    batch = rollout.sample(
        model,
        PROMPTS,
        keys=[0, 1, 2],
        seed=0,
        cfg=SamplingConfig(max_new_tokens=8),
        pad_id=PAD,
        eos_id=EOS,
        device=torch.device("cpu"),
    )
    logits = models.response_logits(model, batch.ids, batch.mask, batch.responses.shape[1])
    logprobs = logits.log_softmax(-1).gather(-1, batch.responses[..., None]).squeeze(-1)
    kept = batch.response_mask
    assert_close(logprobs[kept], batch.old_logprobs[kept], **CLOSE)


@every_method
@every_attention
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_disabled_is_the_base_bit_for_bit(causal, method, attn, dtype):
    """It is the reference. Padded or not: sdpa is called with and without a mask."""
    base = causal(attn, dtype)
    model = attach(causal(attn, dtype), method)
    ids, mask, _ = padded(left=2)
    for given in ({"input_ids": ids, "attention_mask": mask.long()}, {"input_ids": ids[:, 6:]}):
        expected = base(**given).logits
        before = model(**given).logits
        assert float((before - expected).abs().max()) > 0.05
        with model.disable_adapter():
            assert torch.equal(model(**given).logits, expected)
        assert torch.equal(model(**given).logits, before)


@every_method
@torch.no_grad()
def test_a_base_in_bf16(causal, method):
    """The adapter stays in fp32 beside it; what comes out is bf16, and near fp32."""
    model, fine = attach(causal("sdpa", torch.bfloat16), method), attach(causal("sdpa"), method)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    ids, mask, R = padded()
    logits, near = (models.response_logits(m, ids, mask, R) for m in (model, fine))
    assert logits.dtype == torch.bfloat16
    rounding = models.response_logits(causal("sdpa", torch.bfloat16), ids, mask, R) - (
        models.response_logits(causal("sdpa"), ids, mask, R)
    )
    real = mask[:, -R:]
    assert float((logits - near)[real].abs().max()) < 3 * float(rounding[real].abs().max())
    model.generate(input_ids=ids, attention_mask=mask.long(), max_new_tokens=2)


@every_method
@torch.no_grad()
def test_the_model_can_change_its_type(causal, method):
    """DeepSpeed casts base and adapter alike."""
    model = attach(causal("sdpa"), method)
    ids, mask, R = padded()
    expected = models.response_logits(model, ids, mask, R)
    double = models.response_logits(copy.deepcopy(model).to(torch.float64), ids, mask, R)
    assert double.dtype == torch.float64
    assert_close(double.float(), expected, **CLOSE)
    half = models.response_logits(model.to(torch.bfloat16), ids, mask, R)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert bool(half.isfinite().all())
    fine = attach(causal("sdpa", torch.float64), method)
    assert {p.dtype for p in fine.parameters()} == {torch.float64}


# adapters ----------------------------------------------------------------------------------------


@every_method
@torch.no_grad()
def test_a_copy_is_a_model_of_its_own(causal, method):
    """`models.publish` copies; a hook that still belonged to the original would show here."""
    model = attach(causal(), method)
    ids, mask, R = padded()
    before = models.response_logits(model, ids, mask, R)
    copied = copy.deepcopy(model)
    assert torch.equal(models.response_logits(copied, ids, mask, R), before)
    perturb(copied, seed=1)
    changed = models.response_logits(copied, ids, mask, R)
    assert float((changed - before).abs().max()) > 0.05
    assert torch.equal(models.response_logits(model, ids, mask, R), before)
    for p in model.parameters():
        p.zero_()
    assert torch.equal(models.response_logits(copied, ids, mask, R), changed)
    with model.disable_adapter():
        assert torch.equal(models.response_logits(copied, ids, mask, R), changed)


@every_method
@torch.no_grad()
def test_it_can_be_taken_off_again(causal, method):
    """Off a copy, so that the base is published without it; the original keeps it."""
    model = attach(causal(), method)
    ids, mask, R = padded()
    before = models.response_logits(model, ids, mask, R)
    plain, base = copy.deepcopy(model).unload(), causal()
    assert {n: type(m) for n, m in plain.named_modules()} == {
        n: type(m) for n, m in base.named_modules()
    }
    assert not any(module._forward_pre_hooks for module in plain.modules())
    assert plain.config._attn_implementation == "sdpa"
    for name, weight in base.state_dict().items():
        assert torch.equal(plain.state_dict()[name], weight)
    for given in ({"input_ids": ids, "attention_mask": mask.long()}, {"input_ids": ids[:, 6:]}):
        assert torch.equal(plain(**given).logits, base(**given).logits)
    assert torch.equal(models.response_logits(model, ids, mask, R), before)


@every_method
@torch.no_grad()
def test_several_adapters_on_one_model(causal, method):
    """Each alone is what it is in company, whichever was active before."""
    ids, mask, R = padded()
    alone = {
        name: models.response_logits(attach(causal(), method, seed=seed), ids, mask, R)
        for seed, name in enumerate(["default", "critic"])
    }
    model = attach(causal(), method)
    before = trained_names(model)
    torch.manual_seed(1)
    model.add_adapter("critic", copy.deepcopy(model.peft_config["default"]))
    assert trained_names(model) == before, "of the one that is active"
    model.set_adapter("critic")
    assert trained_names(model) == {n.replace(".default", ".critic") for n in before}
    perturb(model, seed=1)
    for name in ("critic", "default", "critic"):
        model.set_adapter(name)
        assert torch.equal(models.response_logits(model, ids, mask, R), alone[name]), name
    with model.disable_adapter():
        assert torch.equal(
            models.response_logits(model, ids, mask, R),
            models.response_logits(causal(), ids, mask, R),
        )
    model.delete_adapter("critic")
    model.set_adapter("default")
    assert torch.equal(models.response_logits(model, ids, mask, R), alone["default"])


@every_method
def test_the_backbone_of_several_roles_switches_it(causal, method):
    """What `models.Backbone` and `SharedRole` ask of an adapter."""
    model = attach(causal(), method)
    ids, mask, R = padded()
    with torch.no_grad():
        on = models.response_logits(model, ids, mask, R)
        off = models.response_logits(causal(), ids, mask, R)
    backbone = models.Backbone(model)
    policy, reference = models.SharedRole(backbone, "default"), models.SharedRole(backbone, None)
    assert len(list(policy.parameters())) == len(trained_names(model))
    with torch.no_grad():
        for role, expected in ((reference, off), (policy, on), (reference, off), (policy, on)):
            assert torch.equal(models.response_logits(role, ids, mask, R), expected)
    models.response_logits(policy, ids, mask, R).sum().backward()
    assert all(p.grad is not None for p in policy.parameters())


@every_method
def test_nothing_is_kept_between_passes(causal, method):
    """Two forward passes, then their two backward passes: gradients as one at a time gives them."""
    first, second = torch.tensor([ROWS[0]]), torch.tensor([ROWS[1]])
    model, other = attach(causal(), method), attach(causal(), method, seed=1)

    def gradients(model):
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    model(first).logits.square().mean().backward()
    expected = gradients(model)
    model.zero_grad()
    loss = model(first).logits.square().mean()
    with torch.no_grad():
        model(second)
        with model.disable_adapter():
            model(second)
    other(second).logits.square().mean().backward()
    loss.backward()
    assert float(expected.abs().max()) > 1e-3
    assert_close(gradients(model), expected, rtol=0, atol=0)


@every_method
def test_merging_is_refused(causal, method):
    model = attach(causal(), method)
    layer = next(m for m in model.modules() if isinstance(m, BaseTunerLayer))
    for merge in (model.merge_adapter, model.merge_and_unload, layer.merge):
        with pytest.raises(ValueError, match="side by side"):
            merge()
    ids, mask, R = padded()
    again = attach(causal(), method)
    one, other = (models.response_logits(m, ids, mask, R) for m in (model, again))
    assert torch.equal(one, other), "a refusal changes nothing"


# training ----------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("head", [False, True])
def test_only_adapter_and_head_are_trained(causal, scalar, method, head):
    module, cfg = METHODS[method]
    torch.manual_seed(0)
    model = module.attach(scalar() if head else causal(), cfg, head=head)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids, mask, _ = padded()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(12):
        if head:
            loss = (
                (models.scores(model, ids, mask) - torch.tensor([1.0, -1.0, 2.0])).square().mean()
            )
        else:
            labels = ids.masked_fill(~mask, -100)
            loss = model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss
        loss.backward()
        for name, p in model.named_parameters():
            assert (p.grad is not None) == p.requires_grad, name
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    prefix = own.PEFT_TYPE_TO_PREFIX_MAPPING[model.peft_config["default"].peft_type]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    expected = {n for n in start if f".{prefix}" in n} | {
        n for n in start if head and "score" in n and ".default." in n
    }
    assert changed == expected, changed ^ expected


@every_method
def test_sft_under_zero_2(causal, tiny_tokenizer, method):
    module, cfg = METHODS[method]
    torch.manual_seed(0)
    model = module.attach(causal(), cfg, head=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    metrics, *_ = train(
        train_sft, model, tiny_tokenizer, demonstrations(), max_steps=4, learning_rate=1e-2
    )
    assert metrics["eval/loss"] < metrics["start/eval/loss"] - 0.1
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == trained_names(model)


@every_method
def test_sft_in_bf16(causal, tiny_tokenizer, method):
    """Base, adapter and engine in bf16, as on a GPU."""
    module, cfg = METHODS[method]
    torch.manual_seed(0)
    model = module.attach(causal("sdpa", torch.bfloat16), cfg, head=False)
    engine_cfg = EngineConfig(zero_stage=2, dtype="bf16")
    metrics, *_ = train(
        train_sft,
        model,
        tiny_tokenizer,
        demonstrations(),
        max_steps=4,
        learning_rate=1e-2,
        engine_cfg=engine_cfg,
    )
    assert metrics["eval/loss"] < metrics["start/eval/loss"] - 0.1


@every_method
def test_a_reward_model_under_zero_2(scalar, tiny_tokenizer, method):
    module, cfg = METHODS[method]
    torch.manual_seed(0)
    model = module.attach(scalar(), cfg, head=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    metrics, *_ = train(
        train_rm, model, tiny_tokenizer, preferences(), max_steps=4, learning_rate=1e-2
    )
    assert metrics["eval/loss"] < metrics["start/eval/loss"] - 0.02
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == trained_names(model)


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer"])
def test_activations_may_be_computed_again(causal, method):
    ids, mask, _ = padded()
    found = []
    for checkpointing in (False, True):
        model = attach(causal(), method).train()
        models.recompute(model, EngineConfig(zero_stage=2, checkpointing=checkpointing))
        labels = ids.masked_fill(~mask, -100)
        model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert model.get_base_model().is_gradient_checkpointing
    assert_close(found[1], found[0], rtol=0, atol=1e-7)


# saving and loading ------------------------------------------------------------------------------

READ = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import peft
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from rlhf.methods import bottleneck, unipelt

work, ids = Path(sys.argv[1]), torch.tensor([{row}])
expected = load_file(work / "expected.safetensors")
seen = {{}}
for name in expected:
    method = bottleneck if name.startswith("houlsby") else unipelt
    head = name.endswith("scalar")
    kind = AutoModelForSequenceClassification if head else AutoModelForCausalLM
    more = {{"num_labels": 1}} if head else {{}}
    for way in ("peft", "ours"):
        torch.manual_seed(77)  # another head than the saved one
        base = kind.from_pretrained(work / "base", **more)
        base.config.pad_token_id = 0
        if way == "peft":
            model = peft.PeftModel.from_pretrained(base, work / name)
        else:
            model = method.load(base, work / name, head=head, trained=False)
        with torch.no_grad():
            off = (model(ids).logits - expected[name]).abs().max()
        seen[name + " by " + way] = float(off)
print(json.dumps(seen))
"""


def test_a_fresh_process_gets_the_adapters_that_were_in_memory(tmp_path, causal, scalar, folder):
    expected = {}
    for method in ("houlsby", "unipelt"):
        for kind, make in (("causal", causal), ("scalar", scalar)):
            name = f"{method} {kind}"
            model = attach(make(), method, head=kind == "scalar")
            model.save_pretrained(tmp_path / name, selected_adapters=["default"])
            with torch.no_grad():
                expected[name] = model(torch.tensor([ROWS[0]])).logits.contiguous()
    save_file(expected, tmp_path / "expected.safetensors")
    script = READ.format(row=ROWS[0])
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert set(seen) == {f"{name} by {way}" for name in expected for way in ("peft", "ours")}
    assert max(seen.values()) <= TINY  # without the adapter it is 0.05 and more


@pytest.fixture
def saved(tmp_path, causal, scalar):
    """A factory: (model, folder) of a trained adapter."""

    def make(method, *, head):
        model = attach(scalar() if head else causal(), method, head=head)
        model.save_pretrained(tmp_path / "adapter", selected_adapters=["default"])
        return model, tmp_path / "adapter"

    return make


@every_method
@pytest.mark.parametrize("trained", [True, False])
def test_a_causal_adapter_on_a_model_with_a_head(saved, scalar, method, trained):
    """A reward model begins with the policy's adapter and a head of its own."""
    model, folder = saved(method, head=False)
    base = scalar(seed=8)
    score = base.score.weight.detach().clone()
    out = METHODS[method][0].load(base, folder, head=True, trained=trained)
    ids, mask, _ = padded()
    with torch.no_grad():
        hidden = models.hidden_states(out, ids, mask)
        assert_close(hidden[mask], models.hidden_states(model, ids, mask)[mask], rtol=0, atol=0)
        assert torch.equal(models.token_values(out, ids, mask), (hidden @ score.T).squeeze(-1))
    assert isinstance(out, peft.PeftModelForSequenceClassification)
    names = trained_names(out)
    if not trained:
        assert names == set()
        assert not any(module.training for module in out.modules())
        return
    assert {n for n in names if "score" not in n} == trained_names(model)
    assert len([n for n in names if "score" in n]) == 1
    models.scores(out, ids, mask).sum().backward()
    for name, p in out.named_parameters():
        assert (p.grad is not None) == (name in names), name


@every_method
def test_an_adapter_with_a_head_brings_it(saved, scalar, method):
    model, folder = saved(method, head=True)
    out = METHODS[method][0].load(scalar(seed=8), folder, head=True, trained=True)
    ids, mask, _ = padded()
    with torch.no_grad():
        assert torch.equal(models.scores(out, ids, mask), models.scores(model, ids, mask))
    assert trained_names(out) == trained_names(model)


@every_method
def test_an_adapter_with_a_head_on_a_language_model(saved, causal, method):
    """A reward model's adapter on the backbone that all roles share: the head stays behind."""
    model, folder = saved(method, head=True)
    out = METHODS[method][0].load(causal(), folder, head=False, trained=True)
    assert isinstance(out, peft.PeftModelForCausalLM)
    ids, mask, _ = padded()
    with torch.no_grad():
        one, other = (models.hidden_states(m, ids, mask)[mask] for m in (out, model))
    assert torch.equal(one, other)
    assert trained_names(out) == {n for n in trained_names(model) if "score" not in n}


@every_method
def test_what_a_checkpoint_holds_is_put_back(causal, tmp_path, method):
    model = attach(causal(), method)
    ids, mask, R = padded()
    with torch.no_grad():
        before = models.response_logits(model, ids, mask, R)
        models.save_trained(model, tmp_path / "step")
        perturb(model, seed=3)
        models.load_trained(model, tmp_path / "step")
        assert torch.equal(models.response_logits(model, ids, mask, R), before)


def test_an_adapter_that_does_not_belong_is_refused(saved, causal, tiny_model):
    _, folder = saved("houlsby", head=False)
    with pytest.raises(ConfigError, match=r"holds an adapter of peft type RLHF_BOTTLENECK"):
        unipelt.load(causal(), folder, head=False, trained=False)
    deeper = tiny_model(num_hidden_layers=3, initializer_range=0.1)
    with pytest.raises(ConfigError, match=r"does not fit this model: 8 weights .*layers\.2\.mlp"):
        bottleneck.load(deeper, folder, head=False, trained=False)


def test_peft_knows_ours_beside_its_own():
    """The one place where we reach into peft: should it look a method up otherwise, this tells."""
    for kind, module, config, tuner in (
        ("RLHF_BOTTLENECK", bottleneck, "BottleneckAdapter", "BottleneckModel"),
        ("RLHF_UNIPELT", unipelt, "UniPELTAdapter", "UniPELTModel"),
    ):
        before = dict(peft.PEFT_TYPE_TO_TUNER_MAPPING)
        own.register(own.OwnType(kind), getattr(module, config), getattr(module, tuner))
        assert before == peft.PEFT_TYPE_TO_TUNER_MAPPING, "as often as one likes"
        assert kind not in list(peft.PeftType)
        found = peft.get_peft_config({"peft_type": kind})
        assert type(found) is getattr(module, config)
        assert json.dumps(found.to_dict()["peft_type"]) == f'"{kind}"'
        assert found.peft_type.value == kind
    assert peft.get_peft_config({"peft_type": "LORA"}) == peft.LoraConfig()
