"""Models: outputs free of padding, adapters that start as nothing, folders that others can load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from rounding import TINY
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from rlhf import models
from rlhf.config import EngineConfig, ModelConfig
from rlhf.errors import ConfigError
from rlhf.methods.settings import FullConfig, LoraConfig
from rlhf.roles import load_roles
from rlhf.text import tokenizer_facts

PAD, EOS = 0, 2
CLOSE = {"rtol": 0, "atol": TINY}
PROMPTS = [[1, 9], [1, 20, 21, 22, 23, 24], [1, 7, 8, 30]]
RESPONSES = [[11, 12, 13, 14, EOS], [15, EOS], [16, 17, 18, 19]]
ROWS = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]


def padded(prompts=PROMPTS, responses=RESPONSES, *, left=0, right=0, fill=PAD):
    """ids, mask [B, P + R]: prompts padded on the left, responses on the right, and more of it."""
    P = max(map(len, prompts)) + left
    R = max(map(len, responses)) + right
    ids, mask = [], []
    for p, r in zip(prompts, responses, strict=True):
        ids.append([fill] * (P - len(p)) + p + r + [fill] * (R - len(r)))
        mask.append([False] * (P - len(p)) + [True] * len(p + r) + [False] * (R - len(r)))
    return torch.tensor(ids), torch.tensor(mask), R


def alone(row):
    return torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool)


@pytest.fixture
def saved(tmp_path, tiny_model, tiny_tokenizer):
    """A factory: folder of `tiny_model(...)`, with the tokenizer."""

    def save(name="base", **settings):
        tiny_model(**settings).save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def causal(saved, tiny_tokenizer):
    return models.load_causal(saved(), tiny_tokenizer, dtype=torch.float32)


@pytest.fixture
def scalar(saved, tiny_tokenizer):
    torch.manual_seed(5)
    return models.load_scalar(saved(), tiny_tokenizer, dtype=torch.float32).eval()


def perturb(model, seed=0, std=0.1):
    """Training, as far as these tests care: every trained weight moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += std * torch.randn(parameter.shape, generator=generator)
    return model.eval()


# forward passes ----------------------------------------------------------------------------------

PADDINGS = [
    pytest.param({}, id="tight"),
    pytest.param({"left": 3}, id="left"),
    pytest.param({"right": 4}, id="right"),
    pytest.param({"left": 2, "right": 1, "fill": 13}, id="filled-with-a-word"),
]


def test_positions_count_real_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]).bool()
    assert models.positions(mask)[0, 2:5].tolist() == [0, 1, 2]
    assert models.positions(mask)[1].tolist() == [0, 1, 2, 3, 4, 5]
    assert int(models.positions(mask).min()) == 0  # an index, on padding too


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@torch.no_grad()
def test_response_logits_are_those_of_each_row_alone(saved, tiny_tokenizer, attn, padding):
    model = models.load_causal(saved(), tiny_tokenizer, dtype=torch.float32, attn=attn)
    assert model.config._attn_implementation == attn
    ids, mask, R = padded(**padding)
    logits = models.response_logits(model, ids, mask, R)
    assert logits.shape == (3, R, model.config.vocab_size)
    for row, (p, r) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        plain = model(torch.tensor([p + r])).logits[0]  # no mask, no positions, no padding
        assert_close(logits[row, : len(r)], plain[len(p) - 1 : -1], **CLOSE)


@pytest.mark.parametrize("padding", PADDINGS)
@torch.no_grad()
def test_values_and_scores_are_those_of_each_row_alone(scalar, padding):
    ids, mask, _ = padded(**padding)
    values, scores = models.token_values(scalar, ids, mask), models.scores(scalar, ids, mask)
    assert values.shape == ids.shape
    assert scores.shape == (3,)
    for row, tokens in enumerate(ROWS):
        hidden = scalar.model(torch.tensor([tokens])).last_hidden_state[0]  # [T, H]
        by_hand = hidden @ scalar.score.weight[0]
        assert_close(values[row, mask[row]], by_hand, **CLOSE)
        assert_close(scores[row], by_hand[-1], **CLOSE)


@pytest.fixture
def by_place(tmp_path, tiny_tokenizer):
    """Folder of a GPT-2: where a token stands is an input of its own. (Llama's rotary positions
    only know distances, so that padding on the left shows less.)"""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tiny_tokenizer),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.3,
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.mark.parametrize("padding", PADDINGS)
@torch.no_grad()
def test_tokens_stand_where_they_would_without_padding(by_place, tiny_tokenizer, padding):
    causal = models.load_causal(by_place, tiny_tokenizer, dtype=torch.float32)
    scalar = models.load_scalar(by_place, tiny_tokenizer, dtype=torch.float32).eval()
    ids, mask, R = padded(**padding)
    logits = models.response_logits(causal, ids, mask, R)
    values = models.token_values(scalar, ids, mask)
    for row, (p, r) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        tokens = torch.tensor([p + r])
        assert_close(logits[row, : len(r)], causal(tokens).logits[0, len(p) - 1 : -1], **CLOSE)
        hidden = scalar.transformer(tokens).last_hidden_state[0]
        assert_close(values[row, mask[row]], hidden @ scalar.score.weight[0], **CLOSE)


@torch.no_grad()
def test_values_and_scores_are_fp32_whatever_the_model_is(scalar):
    ids, mask, _ = padded()
    scalar.to(torch.bfloat16)
    assert models.token_values(scalar, ids, mask).dtype == torch.float32
    assert models.scores(scalar, ids, mask).dtype == torch.float32


@torch.no_grad()
def test_score_reads_the_eos_and_not_a_pad(scalar):
    """Two rows that differ in the EOS alone score differently; what is on the pads is not read."""
    ids, mask, _ = padded(right=3)
    scores = models.scores(scalar, ids, mask)
    other_end, other_pads = ids.clone(), ids.masked_fill(~mask, 40)
    other_end[ids == EOS] = 41
    difference = (models.scores(scalar, other_end, mask) - scores).abs()
    assert bool((difference[:2] > 1e-2).all())  # the rows that end by EOS
    assert float(difference[2]) < 1e-6
    assert_close(models.scores(scalar, other_pads, mask), scores, **CLOSE)


@torch.no_grad()
def test_neighbours_do_not_matter(scalar, causal):
    ids, mask, R = padded()
    order = torch.tensor([2, 0])
    assert_close(
        models.scores(scalar, ids[order], mask[order]),
        models.scores(scalar, ids, mask)[order],
        **CLOSE,
    )
    assert_close(
        models.response_logits(causal, ids[order], mask[order], R)[mask[order][:, -R:]],
        models.response_logits(causal, ids, mask, R)[order][mask[order][:, -R:]],
        **CLOSE,
    )


# methods -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [False, True])
def test_fresh_lora_changes_nothing_and_freezes_the_base(saved, tiny_tokenizer, head):
    folder = saved()
    ids, mask, R = padded()

    def load():
        torch.manual_seed(3)
        family = models.load_scalar if head else models.load_causal
        return family(folder, tiny_tokenizer, dtype=torch.float32)

    def outputs(model):
        if head:
            return models.token_values(model, ids, mask)
        return models.response_logits(model, ids, mask, R)

    with torch.no_grad():
        before = outputs(load().eval())
        model = models.trainable(load(), LoraConfig(rank=4), head=head)
        assert torch.equal(outputs(model), before)

    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or ".score." in name for name in trained)
    assert any(".score." in name for name in trained) == head
    # rank * (in + out) per linear layer: q, o 32+32; k, v 32+16; gate, up, down 32+64; 2 layers.
    adapters = 2 * 4 * (2 * 64 + 2 * 48 + 3 * 96)
    weights = sum(p.numel() for p in load().parameters())
    new = adapters + 32 * head  # the head that is trained is a copy of the one that was there
    assert models.count_parameters(model) == (new, weights + new)

    outputs(model.train()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name


def test_full_trains_everything(causal):
    model = models.trainable(causal, FullConfig())
    trained, total = models.count_parameters(model)
    assert trained == total == sum(p.numel() for p in model.parameters())
    ids, mask, R = padded()
    models.response_logits(model, ids, mask, R).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("method", [FullConfig(), LoraConfig(rank=4)], ids=["full", "lora"])
@torch.no_grad()
def test_a_model_with_dropout_trains_without(saved, tiny_tokenizer, method):
    """Llama's attention dropout is a number and no module; both kinds are switched off."""
    folder = saved(attention_dropout=0.5)
    model = models.load_causal(folder, tiny_tokenizer, dtype=torch.float32)
    model.model.layers[0].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.5))
    ids, mask, R = padded()
    quiet = models.response_logits(model.eval(), ids, mask, R)
    assert not torch.equal(models.response_logits(model.train(), ids, mask, R), quiet)
    model = models.trainable(model, method).train()
    assert torch.equal(models.response_logits(model, ids, mask, R), quiet)


def test_lora_dropout_is_kept_for_sft(causal):
    model = models.trainable(causal, LoraConfig(rank=4, dropout=0.25))
    assert {m.p for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout)} == {0.25}


def test_targets_that_match_nothing_are_refused(causal):
    with pytest.raises(ConfigError, match=r"method\.targets=qproj,vproj: .*q_proj"):
        models.trainable(causal, LoraConfig(targets="qproj,vproj"))


def test_targets_by_name(causal):
    model = models.trainable(causal, LoraConfig(targets="q_proj,v_proj"))
    adapted = {n.split(".")[-4] for n, p in model.named_parameters() if "lora_A" in n}
    assert adapted == {"q_proj", "v_proj"}
    assert models.count_parameters(model)[0] == 2 * 16 * (64 + 48)


# loading -----------------------------------------------------------------------------------------


def test_no_model_is_refused(tmp_path, tiny_tokenizer, tiny_model_dir):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=r"model\.path=.*no model could be loaded"):
            models.load_causal(path, tiny_tokenizer, dtype=torch.float32)
    (tiny_model_dir / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.path=.*no model could be loaded"):
        models.load_causal(tiny_model_dir, tiny_tokenizer, dtype=torch.float32)


def test_cut_off_weights_are_refused(tiny_model_dir, tiny_tokenizer):
    weights = tiny_model_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"model\.path=.*no model could be loaded"):
        models.load_causal(tiny_model_dir, tiny_tokenizer, dtype=torch.float32)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_missing_weights_are_refused_rather_than_random(tiny_model_dir, tiny_tokenizer, name):
    file = tiny_model_dir / "model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"1 weights are missing and would be random: {name}"):
        models.load_causal(tiny_model_dir, tiny_tokenizer, dtype=torch.float32)
    if name != "lm_head.weight":  # which a reward model does not have
        with pytest.raises(ConfigError, match="missing and would be random"):
            models.load_scalar(tiny_model_dir, tiny_tokenizer, dtype=torch.float32)


def test_a_tied_head_is_not_missing(saved, tiny_tokenizer):
    folder = saved("tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    models.load_causal(folder, tiny_tokenizer, dtype=torch.float32)


def test_a_tokenizer_larger_than_the_embeddings_is_refused(saved, tiny_tokenizer):
    folder = saved(vocab_size=len(tiny_tokenizer) - 1)
    with pytest.raises(ConfigError, match=f"{len(tiny_tokenizer)} tokens but the model has"):
        models.load_causal(folder, tiny_tokenizer, dtype=torch.float32)


def test_special_ids_are_the_tokenizers(saved, tiny_tokenizer):
    folder = saved(pad_token_id=None, bos_token_id=77, eos_token_id=[55, 56])
    for family in (models.load_causal, models.load_scalar):
        config = family(folder, tiny_tokenizer, dtype=torch.float32).config
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, EOS)


def test_dtype_setting(saved, tiny_tokenizer):
    folder = str(saved())
    dtypes = {"auto": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for setting, expected in dtypes.items():
        cfg = ModelConfig(path=folder, dtype=setting)
        model = models.load_base(cfg, tiny_tokenizer, dtype=torch.float32)
        assert {p.dtype for p in model.parameters()} == {expected}


def test_new_head_has_the_stated_width(saved, tiny_tokenizer):
    folder = saved(hidden_size=1024, intermediate_size=16, num_hidden_layers=1)
    torch.manual_seed(0)
    head = models.load_scalar(folder, tiny_tokenizer, dtype=torch.float32).score.weight
    assert head.shape == (1, 1024)
    # Five standard errors of a standard deviation: 5 / sqrt(2 * 1024).
    assert abs(float(head.detach().std()) * 1025**0.5 - 1) < 5 / 2048**0.5


def test_roles_start_equal_and_apart(tmp_path, saved, tiny_tokenizer):
    sft = SimpleNamespace(reference="sft/t", model_dir=saved(), under=None, digest="sft")
    torch.manual_seed(1)
    reward_model = models.load_scalar(sft.model_dir, tiny_tokenizer, dtype=torch.float32)
    models.publish(perturb(reward_model), tiny_tokenizer, tmp_path / "rm")
    foreign = SimpleNamespace(parents=[])
    rm = SimpleNamespace(reference="rm/t", model_dir=tmp_path / "rm", under=None, manifest=foreign)
    for method in (LoraConfig(rank=4), FullConfig()):
        roles = load_roles(sft, rm, tiny_tokenizer, method, EngineConfig())
        ids, mask, R = padded()
        with torch.no_grad():
            of_policy, of_reference = (
                models.response_logits(m, ids, mask, R) for m in (roles.policy, roles.reference)
            )
            of_critic, of_rm, of_parent = (
                models.token_values(m, ids, mask)
                for m in (roles.critic, roles.reward_model, reward_model)
            )
        assert torch.equal(of_policy, of_reference)
        assert torch.equal(of_critic, of_rm)
        assert_close(of_rm, of_parent, **CLOSE)
        assert not any(p.requires_grad for p in roles.reference.parameters())
        assert not any(p.requires_grad for p in roles.reward_model.parameters())
        assert not roles.reference.training
        assert not roles.reward_model.training
        trained = {n for n, p in roles.critic.named_parameters() if p.requires_grad}
        assert any("score" in name for name in trained)
        storages = [{p.data_ptr() for p in m.parameters()} for m in vars(roles).values()]
        assert len(set.union(*storages)) == sum(map(len, storages))


# publishing --------------------------------------------------------------------------------------

# Plain transformers and peft, in a process that never saw this package, with other random numbers.
READ = """
import json, sys, torch
from pathlib import Path
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
torch.set_num_threads(1)
torch.manual_seed(987)
work = Path(sys.argv[1])
stored = load_file(work / "expected.safetensors")
ids, mask = stored["ids"], stored["mask"]

def difference(name, model):
    model.eval()
    with torch.no_grad():
        now = model(input_ids=ids, attention_mask=mask).logits  # padded on the right
    if name.startswith("scalar"):
        now = now.squeeze(-1)
    else:
        now = now[mask.bool()]
    return float((now - stored[name]).abs().max())

def load(name, folder):
    if name.startswith("scalar"):
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    return AutoModelForCausalLM.from_pretrained(folder)

parents = {"lora": "base", "tied": "tied-base", "scalar-lora": "full/model"}
out = {}
for name in ("lora", "full", "tied", "scalar-lora", "scalar-full"):
    out[name] = difference(name, load(name, work / name / "model"))
    if name in parents:
        adapter = str(work / name / "model" / "adapter")
        model = PeftModel.from_pretrained(load(name, work / parents[name]), adapter)
        out[name + " by peft"] = difference(name, model)
from rlhf.models import fingerprint
out["fingerprint"] = fingerprint(load("full", work / "full" / "model"))
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder of published models, the models in memory, what a reader saw; see `reader`."""
    return SimpleNamespace(folder=tmp_path_factory.mktemp("published"), models={}, seen=None)


@pytest.fixture
def reader(published, tiny_model, tiny_tokenizer):
    """Publishes five models and reads them in one fresh process, once for this module."""
    work = published.folder
    if published.models:
        assert published.seen is not None, "the reader failed: see the first test"
        return published
    foreign_ids = {"pad_token_id": None, "bos_token_id": 77, "eos_token_id": [55, 56]}
    for name, tied in (("base", False), ("tied-base", True)):
        base = tiny_model(tie_word_embeddings=tied, **foreign_ids)
        base.generation_config = GenerationConfig(repetition_penalty=3.0, do_sample=True, top_k=2)
        base.save_pretrained(work / name)

    lora, full = LoraConfig(rank=4, alpha=12.0), FullConfig()
    plan = {
        "lora": (models.load_causal, "base", lora),
        "full": (models.load_causal, "base", full),
        "tied": (models.load_causal, "tied-base", lora),
        "scalar-lora": (models.load_scalar, "full/model", lora),  # as a reward model starts
        "scalar-full": (models.load_scalar, "full/model", full),
    }
    ids, mask, _ = padded([[], [], []], ROWS)
    expected = {"ids": ids, "mask": mask.long()}
    for seed, (name, (family, parent, method)) in enumerate(plan.items()):
        torch.manual_seed(seed)
        model = family(work / parent, tiny_tokenizer, dtype=torch.float32)
        model = models.trainable(model, method, head=family is models.load_scalar)
        published.models[name] = perturb(model, seed)
        with torch.no_grad():
            if family is models.load_scalar:
                expected[name] = models.scores(model, ids, mask)
            else:
                rows = [model(torch.tensor([row])).logits[0] for row in ROWS]
                expected[name] = torch.cat(rows)
        before = {n: p.clone() for n, p in model.named_parameters()}
        (work / name / "model").mkdir(parents=True)
        models.publish(model, tiny_tokenizer, work / name / "model")
        for n, p in model.named_parameters():  # a stage goes on with it
            assert torch.equal(p, before[n]), f"publishing {name} changed {n}"
    save_file({n: t.contiguous() for n, t in expected.items()}, work / "expected.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", READ, str(work)],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    published.seen = json.loads(done.stdout.splitlines()[-1])
    return published


@pytest.mark.parametrize("name", ["lora", "full", "tied", "scalar-lora", "scalar-full"])
def test_a_fresh_process_gets_the_model_that_was_in_memory(reader, name):
    seen = reader.seen
    assert seen[name] <= TINY
    assert (name + " by peft" in seen) == ("full" not in name)
    if "full" not in name:
        assert seen[name + " by peft"] <= TINY


def test_the_head_survives(reader, tiny_tokenizer):
    """A head of another seed is there when the folder is loaded, and is replaced."""
    for name in ("scalar-lora", "scalar-full"):
        parameters = dict(reader.models[name].named_parameters())
        head = next(p for n, p in parameters.items() if "score" in n and p.requires_grad)
        for seed in (0, 1):
            torch.manual_seed(seed)
            model = models.load_scalar(
                reader.folder / name / "model", tiny_tokenizer, dtype=torch.float32
            )
            assert torch.equal(model.score.weight, head)
        _, report = AutoModelForSequenceClassification.from_pretrained(
            reader.folder / name / "model", output_loading_info=True
        )
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]


def test_special_ids_and_tokenizer_are_published(reader, tiny_tokenizer):
    for name in reader.models:
        folder = reader.folder / name / "model"
        config = AutoConfig.from_pretrained(folder)
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, EOS)
        again = AutoTokenizer.from_pretrained(folder)
        assert tokenizer_facts(again) == tokenizer_facts(tiny_tokenizer)
        if not name.startswith("scalar"):
            raw = json.loads((folder / "generation_config.json").read_text())
            raw.pop("transformers_version")
            raw.pop("_from_model_config", None)
            assert raw == {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS}


def test_no_pickle_is_published(reader):
    for name in reader.models:
        for file in (reader.folder / name / "model").rglob("*"):
            assert file.is_dir() or file.suffix in (".safetensors", ".json", ".jinja"), file
            assert file.is_dir() or file.read_bytes()[:2] not in (b"PK", b"\x80\x02"), file


# fingerprint -------------------------------------------------------------------------------------


def test_fingerprint_does_not_depend_on_the_process(reader):
    assert reader.seen["fingerprint"] == models.fingerprint(reader.models["full"])


def test_fingerprint_changes_with_one_weight(tiny_model):
    model, same, other = tiny_model(seed=0), tiny_model(seed=0), tiny_model(seed=1)
    before = models.fingerprint(model)
    assert models.fingerprint(same) == before
    assert models.fingerprint(other) != before
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[15, 31] += 1e-6
    assert models.fingerprint(model) != before


def test_fingerprint_tells_shapes_and_names_apart():
    def of(**tensors):
        module = torch.nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return models.fingerprint(module)

    assert of(a=torch.zeros(2, 3)) != of(a=torch.zeros(3, 2))
    assert of(a=torch.zeros(2), b=torch.ones(2)) != of(a=torch.ones(2), b=torch.zeros(2))
    assert of(a=torch.zeros(2)) != of(b=torch.zeros(2))
    assert of(a=torch.zeros(0)) != of(a=torch.zeros(1))
