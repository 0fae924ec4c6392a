"""Tokens that a base never saw: found, given rows, learnt in embedding and head, and nothing else.

The stages run on the project's own base, which knows its own chat tokens and none of ChatML.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import peft
import pytest
import torch
import yaml
from rounding import TINY
from safetensors.torch import load_file
from small_line import SMALL, numbers, run_stage
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from rlhf import models, supervised, text
from rlhf.checkpointing import Checkpoints
from rlhf.config import CONF, PROJECT, EngineConfig, TemplateConfig, TrainConfig
from rlhf.console import Console
from rlhf.errors import ConfigError
from rlhf.methods import families, tokens
from rlhf.methods.settings import METHOD_SETTINGS, LoraConfig
from rlhf.methods.table import METHODS
from rlhf.registry import Registry
from rlhf.run import open_run
from rlhf.tracking import Tracker

pytestmark = pytest.mark.usefixtures("process_group")

CHATML = TemplateConfig(
    **{
        name: value
        for name, value in yaml.safe_load((CONF / "template/chatml.yaml").read_text()).items()
        if name != "defaults"
    }
)
START, END = "<|im_start|>", "<|im_end|>"
LEARN = [name for name, row in METHODS.items() if row.new_tokens]
LORAS = [name for name in LEARN if METHODS[name].adapter]
SETTINGS = {
    "qlora": {"quantization": "nf4"},
    "adalora": {"every": 2},
    "lora_drop": {"sample_steps": 2, "sample": 1.0, "threshold": 0.7},
    "plora": {"phases": 2},
    "relora": {"phases": 2},
}


def user(content):
    return {"role": "user", "content": content}


# ---------------------------------------------------------------- the tokenizer


def test_a_tokenizer_gets_the_tokens_it_lacks_and_keeps_its_own(new_tokenizer):
    size, own = len(new_tokenizer), new_tokenizer.all_special_tokens
    assert text.add_tokens(new_tokenizer, CHATML) == [START, END]
    assert len(new_tokenizer) == size + 2
    assert new_tokenizer.all_special_tokens == [*own, START, END]
    ids = new_tokenizer(f"Tell{START} me", add_special_tokens=False)["input_ids"]
    assert ids[1] == size
    assert new_tokenizer.decode(ids, skip_special_tokens=True) == "Tell me"
    assert text.add_tokens(new_tokenizer, CHATML) == []
    assert len(new_tokenizer) == size + 2


def test_a_word_of_the_vocabulary_becomes_a_token_of_its_own_and_is_not_new(new_tokenizer):
    word = new_tokenizer.convert_ids_to_tokens(270)
    assert word not in new_tokenizer.all_special_tokens
    template = TemplateConfig("own", "", tokens=[word])
    assert text.add_tokens(new_tokenizer, template) == []
    assert new_tokenizer.all_special_tokens[-1] == word
    assert new_tokenizer.convert_tokens_to_ids(word) == 270


def test_an_empty_text_is_no_token():
    with pytest.raises(ConfigError, match=r"template\.tokens=\[''\]: an empty text"):
        TemplateConfig("own", tokens=[""])


@pytest.fixture
def chatml(new_tokenizer):
    """A renderer with ChatML, of a tokenizer that had none of it."""
    text.add_tokens(new_tokenizer, CHATML)
    new_tokenizer.chat_template = CHATML.chat_template
    return text.Renderer(new_tokenizer)


def test_chatml_to_the_letter_but_for_the_end_of_an_answer(chatml):
    turns = [{"role": "system", "content": "Be brief."}, user("Tell me"), user("More")]
    before = "<bos><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nTell me<|im_end|>\n"
    told = before + "<|im_start|>assistant\nA fox.<eos>\n<|im_start|>user\nMore<|im_end|>\n"

    def read(ids):
        return chatml.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    assert read(chatml.prompt(turns[:2])) == before + "<|im_start|>assistant\n"
    turns.insert(2, {"role": "assistant", "content": "A fox."})
    assert read(chatml.prompt(turns)) == told + "<|im_start|>assistant\n"
    assert read(chatml.response(turns, "Yes.")) == "Yes.<eos>"


def test_where_the_end_of_a_turn_is_the_end_of_an_answer_it_is_there_once(chatml):
    chatml.tokenizer.eos_token = END
    answer = chatml.response([user("Tell me")], "A fox.")
    assert answer.count(chatml.eos_id) == 1
    turns = [user("Tell me"), {"role": "assistant", "content": "A fox."}, user("More")]
    assert chatml.prompt(turns).count(chatml.eos_id) == 3


def test_the_special_tokens_in_rows_are_named_however_the_template_makes_them(
    tiny_tokenizer, chatml
):
    """The tiny tokenizer's template says '<' + role + '>', so no search in it finds a token."""
    own = text.Renderer(tiny_tokenizer)
    rows = [own.prompt([user("Tell me")]) + own.response([user("Tell me")], "A fox.")]
    assert text.written(tiny_tokenizer, rows) == ["<user>", "<assistant>"]
    rows = [chatml.prompt([user("Tell me")]) + chatml.response([user("Tell me")], "A fox.")]
    assert text.written(chatml.tokenizer, rows) == [START, END]
    chatml.tokenizer.eos_token = END
    assert text.written(chatml.tokenizer, rows) == ["<eos>", START, END]


# ---------------------------------------------------------------- what was never seen


def names(tokenizer):
    return [str(token) for token in tokenizer.added_tokens_decoder.values()]


@pytest.mark.parametrize("tied", [True, False])
def test_random_weights_look_seen(tiny_model, tiny_tokenizer, tied):
    model = tiny_model(tie_word_embeddings=tied)
    assert tokens.unseen(model, tiny_tokenizer, names(tiny_tokenizer)[1:]) == []


def test_a_model_that_knows_its_chat_tokens_has_none():
    """Real weights: what its pre-training never had is the padding, which no row of SFT has."""
    path = PROJECT / "data/tiny/base"
    tokenizer = text.load_tokenizer(str(path), template=TemplateConfig("chat"))
    model = models.load_causal(path, tokenizer, dtype=torch.float32)
    special = names(tokenizer)
    assert set(special) == {"<pad>", "<bos>", "<eos>", "<user>", "<assistant>"}
    assert tokens.unseen(model, tokenizer, special) == [tokenizer.pad_token_id]


def test_rows_that_look_untrained(tiny_model, tiny_tokenizer):
    model = tiny_model()
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[3] *= 1e-3  # weight decay without a gradient
        weight[4] = weight[5] * 1.01  # the same gradients as another's
    ids = tokens.unseen(model, tiny_tokenizer, ["<user>", "<system>", "<assistant>", "<eos>"])
    assert ids == [3, 4, 5]
    assert tokens.unseen(model, tiny_tokenizer, ["<eos>"]) == []


def test_what_was_added_is_new_also_where_there_is_a_row(tiny_model, new_tokenizer):
    """Many models have more rows than tokens; those are random, and look like any other."""
    wide = tiny_model(vocab_size=len(new_tokenizer) + 8)
    size = len(new_tokenizer)
    added = text.add_tokens(new_tokenizer, CHATML)
    assert tokens.unseen(wide, new_tokenizer, [START, "<user>"], added=added) == [size, size + 1]
    assert tokens.unseen(wide, new_tokenizer, [START, "<user>"]) == []
    assert tokens.unseen(tiny_model(), new_tokenizer, [START, "<user>"]) == [size]


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_that_never_occurs_is_found_after_training(tiny_model, tiny_tokenizer, tied):
    """From random weights, on rows without the tokens 4 and 5: what the criterion is made for."""
    model = tiny_model(
        vocab_size=40,
        num_hidden_layers=1,
        initializer_range=0.02,
        tie_word_embeddings=tied,
        attention_bias=False,
        mlp_bias=False,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=3.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(600):
        batch = torch.randint(6, 40, (8, 8), generator=generator)
        batch[:, 0], batch[:, 4] = 1, 3
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    special = ["<system>", "<user>", "<assistant>", "<bos>"]  # 3, 4, 5, 1
    assert tokens.unseen(model, tiny_tokenizer, special) == [4, 5]


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_lie_near_the_mean_and_no_other_changes(tiny_model, new_tokenizer, tied):
    model = tiny_model(tie_word_embeddings=tied)
    size = len(new_tokenizer)
    old = [m.weight.detach().clone() for m in ends(model)]
    text.add_tokens(new_tokenizer, CHATML)
    torch.manual_seed(0)
    tokens.grow(model, new_tokenizer)
    for before, module in zip(old, ends(model), strict=True):
        assert module.weight.shape[0] == size + 2 == model.config.vocab_size
        assert torch.equal(module.weight[:size], before)
        assert_close(module.weight[size:].mean(0), before.mean(0), rtol=0, atol=1e-3)
    assert model.config.pad_token_id == new_tokenizer.pad_token_id
    assert (ends(model)[0].weight is ends(model)[1].weight) == tied
    again = tiny_model(tie_word_embeddings=tied)
    torch.manual_seed(0)
    tokens.grow(again, new_tokenizer)
    assert torch.equal(ends(again)[0].weight, ends(model)[0].weight)


def test_a_matrix_with_rows_to_spare_is_left_as_it_is(tiny_model, new_tokenizer):
    model = tiny_model(vocab_size=len(new_tokenizer) + 8)
    text.add_tokens(new_tokenizer, CHATML)
    before = [module.weight.detach().clone() for module in ends(model)]
    tokens.grow(model, new_tokenizer)
    for was, module in zip(before, ends(model), strict=True):
        assert torch.equal(module.weight, was)  # with the rows that no token has


def test_only_what_was_added_may_have_no_row(tiny_model_dir, new_tokenizer):
    added = text.add_tokens(new_tokenizer, CHATML)
    load = models.load_causal
    model = load(tiny_model_dir, new_tokenizer, dtype=torch.float32, added=added)
    assert model.config.vocab_size == len(new_tokenizer) - 2  # not yet
    for known in ([], [START]):
        with pytest.raises(ConfigError, match="do not belong together"):
            load(tiny_model_dir, new_tokenizer, dtype=torch.float32, added=known)


# ---------------------------------------------------------------- learnt

TURNS = ["Tell me", "a fox", "the kite", "was happy", "is a friend", "and me", "the fox", "a kite"]
ENGINE = EngineConfig(zero_stage=0, dtype="fp32")


def ends(model):
    """Embedding and head."""
    return model.get_input_embeddings(), model.get_output_embeddings()


def rows_of(renderer):
    out = []
    for asked, said in zip(TURNS, reversed(TURNS), strict=True):
        prompt, answer = renderer.prompt([user(asked)]), renderer.response([user(asked)], said)
        mask = [0] * len(prompt) + [1] * len(answer)
        out.append({"input_ids": prompt + answer, "completion_mask": mask})
    return out


def method_of(name):
    settings = {"rank": 2} if METHODS[name].adapter else {}
    return METHOD_SETTINGS[name](name=name, **settings | SETTINGS.get(name, {}))


def train(policy, renderer, method, engine_cfg=ENGINE, steps=4):
    cfg = TrainConfig(
        learning_rate=1e-3 if method.name == "lora_plus" else 1e-2,
        max_steps=steps,
        batch_size=8,
        micro_batch_size=8,
        warmup=0.0,
        schedule="constant",
        eval_every=steps,
    )
    with TemporaryDirectory() as runs, open_run(Registry(runs), "sft", "t", {}, {}) as run:
        keeper = Checkpoints(
            run,
            run.checkpoints_dir,
            Console(quiet=True),
            stage="sft",
            total=steps,
            every=10**6,
            keep=1,
        )
        return supervised.train_sft(
            policy,
            renderer.tokenizer,
            rows_of(renderer),
            rows_of(renderer),
            cfg=cfg,
            engine_cfg=engine_cfg,
            seed=0,
            checkpoints=keeper,
            method=method,
        )


# Each method on one kind of weights, lora on both: how rows are trained knows no method.
TIED = [("lora", False), *((name, number % 2 == 0) for number, name in enumerate(LORAS))]
each_method_tied_or_not = pytest.mark.parametrize(("name", "tied"), TIED)


@pytest.fixture
def policy_on(tiny_model, chatml, tmp_path):
    """A factory: (base folder, new ids, a model with all that the stage of SFT does to it)."""

    def make(name, tied, dtype=torch.float32):
        if name == "qlora":
            pytest.importorskip("bitsandbytes")
        folder = tmp_path / f"base-{tied}"
        tiny_model(tie_word_embeddings=tied, initializer_range=0.1).save_pretrained(folder)
        method, added = method_of(name), [START, END]
        torch.manual_seed(0)
        base = models.load_causal(folder, chatml.tokenizer, dtype=dtype, method=method, added=added)
        new = tokens.unseen(base, chatml.tokenizer, [START, END], added=added)
        tokens.grow(base, chatml.tokenizer)
        policy = models.trainable(base, method, tokenizer=chatml.tokenizer, steps=4, tokens=new)
        return folder, new, policy

    return make


def matrices(model):
    """Embedding and head as the model uses them."""
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return [module.weight.detach().float().clone() for module in ends(inner)]


def logits(model, renderer):
    ids = torch.tensor([rows_of(renderer)[0]["input_ids"]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits.float()


@each_method_tied_or_not
def test_only_the_rows_of_new_tokens_move_and_the_published_model_has_them(
    policy_on, chatml, tmp_path, name, tied
):
    folder, new, policy = policy_on(name, tied)
    before = matrices(policy)
    found = train(policy, chatml, method_of(name))
    assert found["eval/loss"] < found["start/eval/loss"]
    for old, now in zip(before, matrices(policy), strict=True):
        moved = (old != now).any(1).nonzero().flatten().tolist()
        assert moved == new == [len(old) - 2, len(old) - 1]

    models.publish(policy, chatml.tokenizer, tmp_path / "model")
    published = models.load_causal(tmp_path / "model", chatml.tokenizer, dtype=torch.float32)
    bits = name == "qlora"
    assert_close(
        logits(published, chatml), logits(policy, chatml), rtol=0, atol=0.1 if bits else TINY
    )
    assert (ends(published)[0].weight is ends(published)[1].weight) == tied
    assert published.config.tie_word_embeddings == tied
    sizes = {len(chatml.tokenizer), published.config.vocab_size}
    assert sizes == {len(module.weight) for module in ends(published)} == {before[0].shape[0]}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert torch.equal(logits(plain, chatml), logits(published, chatml))

    # The adapter has the new rows of the matrices and no other, so it is as small as it should be.
    weights = load_file(tmp_path / "model/adapter/adapter_model.safetensors")
    rows = {n: w for n, w in weights.items() if "lora_" not in n}
    assert [tuple(w.shape) for w in rows.values()] == [(2, 32)] * (1 if tied else 2), rows.keys()
    assert tokens.trained_in(tmp_path / "model/adapter") == new

    # A checkpoint's adapter, on the base as it came.
    run = SimpleNamespace(
        reference="sft/t@step-4",
        stage="sft",
        run_name="t",
        model_dir=tmp_path / "model",
        under=str(folder),
        is_checkpoint=True,
        manifest=SimpleNamespace(
            method=SimpleNamespace(name=name, settings=dataclasses.asdict(method_of(name))),
            parents=[],
            base=SimpleNamespace(
                name=str(folder), fingerprint=fingerprint_of(folder, name, chatml)
            ),
        ),
    )
    torch.manual_seed(7)  # other rows would be drawn now
    again = models.load_parent(models.load_causal, run, chatml.tokenizer, torch.float32)
    assert_close(logits(again, chatml), logits(published, chatml), rtol=0, atol=TINY)


def fingerprint_of(folder, name, renderer):
    """Of the base as it comes, in the bits that the method trains on."""
    base = models.load_causal(
        folder, renderer.tokenizer, dtype=torch.float32, method=method_of(name), added=[START, END]
    )
    return models.fingerprint(base)


@each_method_tied_or_not
def test_a_checkpoint_puts_the_rows_back(policy_on, chatml, tmp_path, name, tied):
    _, _, policy = policy_on(name, tied)
    train(policy, chatml, method_of(name), steps=3)
    models.save_trained(policy, tmp_path / "own")
    kept, rows = logits(policy, chatml), matrices(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.5)
    assert not torch.equal(logits(policy, chatml), kept)
    models.load_trained(policy, tmp_path / "own")
    assert torch.equal(logits(policy, chatml), kept)
    for was, now in zip(rows, matrices(policy), strict=True):
        assert torch.equal(was, now)


def test_full_fine_tuning_learns_them_too(policy_on, chatml, tmp_path):
    for tied in (True, False):
        _, new, policy = policy_on("full", tied)
        before = matrices(policy)
        train(policy, chatml, method_of("full"))
        for old, now in zip(before, matrices(policy), strict=True):
            assert (old != now).any(1)[new].all()
        folder = tmp_path / f"model-{tied}"
        models.publish(policy, chatml.tokenizer, folder)
        published = models.load_causal(folder, chatml.tokenizer, dtype=torch.float32)
        assert_close(logits(published, chatml), logits(policy, chatml), rtol=0, atol=TINY)


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_every_zero_stage_that_is_allowed_moves_the_same_rows(policy_on, chatml, zero_stage):
    _, new, policy = policy_on("lora", False)
    before = matrices(policy)
    train(policy, chatml, method_of("lora"), EngineConfig(zero_stage=zero_stage, dtype="fp32"))
    moved = [
        (old != now).any(1).nonzero().flatten().tolist()
        for old, now in zip(before, matrices(policy), strict=True)
    ]
    assert moved == [new, new]


def test_a_base_in_bf16_learns_them(policy_on, chatml, tmp_path):
    _, new, policy = policy_on("lora", True, dtype=torch.bfloat16)
    before = matrices(policy)
    train(policy, chatml, method_of("lora"), EngineConfig(zero_stage=2, dtype="bf16"))
    moved = (before[0] != matrices(policy)[0]).any(1).nonzero().flatten().tolist()
    assert moved == new
    models.publish(policy, chatml.tokenizer, tmp_path / "model")
    published = models.load_causal(tmp_path / "model", chatml.tokenizer, dtype=torch.bfloat16)
    assert torch.equal(matrices(published)[0][new], matrices(policy)[0][new].bfloat16().float())


def test_activations_can_be_recomputed(policy_on, chatml):
    _, new, policy = policy_on("lora", True)
    before = matrices(policy)
    train(policy, chatml, method_of("lora"), EngineConfig(dtype="fp32", checkpointing=True))
    moved = (before[0] != matrices(policy)[0]).any(1).nonzero().flatten().tolist()
    assert moved == new


def test_without_the_mend_the_loss_of_trl_fails(policy_on, chatml, monkeypatch):
    """Or the mend could be left out."""
    monkeypatch.setattr(tokens, "mend", lambda model: None)
    _, _, policy = policy_on("lora", True)
    with pytest.raises(AttributeError, match="bias"):
        train(policy, chatml, method_of("lora"))


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_token_can_be_said(policy_on, tied):
    """Its row of the head is trained: without it, it stays one of many, however long one trains."""
    _, new, policy = policy_on("lora", tied)
    ids = torch.tensor([[1, 10, 11, new[0], 12, new[1], 13, new[0], 2]])
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], 1e-2)
    for _ in range(100):
        loss = policy(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    said = policy(input_ids=ids).logits[0].softmax(-1)
    assert min(said[place, ids[0, place + 1]] for place in (2, 4, 6)) > 0.5


def test_the_layers_are_recorded_as_what_an_adapter_changed(policy_on, chatml, tmp_path):
    for tied in (True, False):
        _, _, policy = policy_on("lora", tied)
        folder = tmp_path / f"model-{tied}"
        models.publish(policy, chatml.tokenizer, folder)
        parts = {n: v["part"] for n, v in json.loads((folder / "tensors.json").read_text()).items()}
        assert parts["model.embed_tokens.weight"] == "adapter"
        assert parts.get("lm_head.weight") == (None if tied else "adapter")
        assert parts["model.norm.weight"] == "base"


def test_without_new_tokens_an_adapter_is_what_it_was(tiny_model_dir, tiny_tokenizer, tmp_path):
    base = models.load_causal(tiny_model_dir, tiny_tokenizer, dtype=torch.float32)
    policy = models.trainable(base, LoraConfig(rank=2), tokens=[])
    kinds = {type(module).__name__ for module in policy.modules()}
    assert not any("Token" in kind for kind in kinds)
    families.save(policy, tmp_path / "adapter", "default")
    assert tokens.trained_in(tmp_path / "adapter") == []


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("name", [name for name in METHODS if name not in LEARN])
def test_a_method_that_cannot_learn_them_is_refused_with_the_ways_out(chatml, name):
    new = chatml.tokenizer.convert_tokens_to_ids([START, END])
    match = rf"method={name}: .*<\|im_start\|>, <\|im_end\|>.*method=lora or method=full.*plain"
    with pytest.raises(ConfigError, match=match):
        tokens.check(new, chatml.tokenizer, METHOD_SETTINGS[name](name=name), ENGINE)


@pytest.mark.parametrize("name", LEARN)
def test_the_others_say_what_is_trained(chatml, name):
    new = chatml.tokenizer.convert_tokens_to_ids([START, END])
    for stage in (0, 1, 2):
        said = tokens.check(new, chatml.tokenizer, method_of(name), EngineConfig(zero_stage=stage))
        assert said.startswith("new tokens: <|im_start|>, <|im_end|>: their embeddings and head")
    engine_cfg = EngineConfig(zero_stage=3, allow_zero3_adapters=True)
    if name == "full":
        tokens.check(new, chatml.tokenizer, method_of(name), engine_cfg)
        return
    with pytest.raises(ConfigError, match=r"zero_stage=3 with method=.*peft#2946.*engine=zero2"):
        tokens.check(new, chatml.tokenizer, method_of(name), engine_cfg)


def test_a_head_with_biases_is_refused(tiny_model):
    model = tiny_model()
    model.lm_head.bias = nn.Parameter(torch.zeros(len(model.lm_head.weight)))
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM .*no plain matrix.*method=full"):
        tokens.layers(model, [3])


# ---------------------------------------------------------------- the stages

FIXED = ["tracking=off"]
SFT = [
    *SMALL["sft"],
    "template=chatml",
    "train.save_every=2",
    "train.eval_every=2",
    "keep_checkpoints=9",
]


def stage(patch, runs, name, *overrides):
    return run_stage(patch, name, f"runs_dir={runs}", *FIXED, *overrides)


@pytest.fixture(scope="module")
def line(tmp_path_factory, module_patch) -> Path:
    """All three stages, in ChatML."""
    runs = tmp_path_factory.mktemp("runs")
    assert stage(module_patch, runs, "sft", *SFT) == 0
    assert stage(module_patch, runs, "rm", *SMALL["rm"]) == 0
    assert stage(module_patch, runs, "ppo", *SMALL["ppo"]) == 0
    return runs


def test_a_line_in_chatml_on_a_base_without_it(line):
    base = PROJECT / "data/tiny/base"
    came = AutoModelForCausalLM.from_pretrained(base)
    registry = Registry(line)
    sft = registry.resolve("sft/tiny")
    log = (line / "sft/tiny/log.txt").read_text()
    assert "new tokens: <|im_start|>, <|im_end|>: their embeddings and head rows" in log
    assert sft.manifest.base.fingerprint == models.fingerprint(came)
    facts = sft.manifest.tokenizer
    size = came.config.vocab_size + 2
    for name in ("sft", "rm", "ppo"):
        run = registry.resolve(f"{name}/tiny")
        assert registry.verify(f"{name}/tiny") == []
        assert run.manifest.tokenizer == facts
        tokenizer = text.load_parent_tokenizer(run, template=TemplateConfig("inherit"))
        assert len(tokenizer) == size
        load = models.load_scalar if name == "rm" else models.load_causal
        model = models.load_parent(load, run, tokenizer, torch.float32)
        assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == size
        assert model.config.tie_word_embeddings == came.config.tie_word_embeddings
    assert not (line / "rm/tiny/log.txt").read_text().count("new tokens")
    assert "new tokens" not in (line / "ppo/tiny/log.txt").read_text()


def test_a_checkpoint_is_a_parent_like_what_was_published(line):
    """Its adapter on the base as it came, which is given rows first; and with a scalar head."""
    registry, heads, found = Registry(line), [], []
    for reference in ("sft/tiny", "sft/tiny@step-3"):
        run = registry.resolve(reference)
        assert run.is_checkpoint == ("@" in reference)
        tokenizer = text.load_parent_tokenizer(run, template=TemplateConfig("inherit"))
        model = models.load_parent(models.load_causal, run, tokenizer, torch.float32)
        found.append(logits(model, text.Renderer(tokenizer)))
        torch.manual_seed(0)
        heads.append(models.load_parent(models.load_scalar, run, tokenizer, torch.float32))
    assert_close(found[1], found[0], rtol=0, atol=TINY)
    ids = torch.tensor([[1280, 20, 1281, 30]])
    states = [models.hidden_states(model.eval(), ids, torch.ones_like(ids)) for model in heads]
    assert_close(states[1], states[0], rtol=0, atol=TINY)


@pytest.mark.slow
def test_a_stopped_run_ends_as_the_unbroken_one(line, monkeypatch, capfd):
    log = Tracker.log

    def log_and_kill(self, metrics, *, step):
        log(self, metrics, step=step)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", log_and_kill)
        assert stage(patch, line, "sft", *SFT, "run_name=broken") == 143
    assert stage(monkeypatch, line, "sft", *SFT, "run_name=broken") == 0
    said = " ".join(capfd.readouterr().err.split())
    assert "goes on from its checkpoint at step 2" in said
    assert numbers(line, "sft", "broken") == numbers(line, "sft")
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        broken, whole = (load_file(line / "sft" / n / "model" / file) for n in ("broken", "tiny"))
        for name, tensor in whole.items():
            assert_close(broken[name], tensor, rtol=0, atol=1e-6, msg=name)
    assert any("trainable_tokens" in name for name in broken)


def test_a_chat_model_is_left_alone(line, monkeypatch, capfd):
    assert stage(monkeypatch, line, "sft", *SMALL["sft"], "run_name=chat") == 0
    assert "new tokens" not in capfd.readouterr().err
    adapter = line / "sft/chat/model/adapter"
    assert tokens.trained_in(adapter) == []
    assert all("lora_" in name for name in load_file(adapter / "adapter_model.safetensors"))
    tokenizer = text.load_parent_tokenizer(
        Registry(line).resolve("sft/chat"), template=TemplateConfig("inherit")
    )
    assert len(tokenizer) == 1280


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["method=ia3"], "method=ia3: the template writes <|im_start|>, <|im_end|>, which"),
        (["method=freeze"], "method=freeze: the template writes"),
        (
            ["engine=zero3", "engine.allow_zero3_adapters=true"],
            "engine.zero_stage=3 with method=lora: the template writes",
        ),
    ],
)
def test_the_stage_refuses_before_it_trains(tmp_path, monkeypatch, capfd, given, message):
    assert stage(monkeypatch, tmp_path, "sft", *SFT, *given) == 2
    assert message in capfd.readouterr().err
    assert not list(tmp_path.rglob("model.safetensors"))
