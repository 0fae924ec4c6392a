"""Models made elsewhere: what fits is published as any run is, what does not is refused by name."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from rounding import TINY
from safetensors.torch import load_file, save_file
from small_line import run_stage
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from rlhf import cli, golden, models, text
from rlhf.adopt import adopt
from rlhf.config import CONF, DataConfig, PPOStage, SamplingConfig, TemplateConfig
from rlhf.contract import Reading, check_pair
from rlhf.errors import ConfigError, RegistryError
from rlhf.registry import Registry

REVERSED = (  # a chat template, and not the one of the tiny tokenizer
    "{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def registry(tmp_path) -> Registry:
    return Registry(tmp_path / "runs")


@pytest.fixture
def rm_dir(tmp_path, tiny_model_dir, tiny_tokenizer) -> Path:
    """A reward model "trained from" the model in `tiny_model_dir`: a head, and moved weights."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "tiny-rm")
    tiny_tokenizer.save_pretrained(tmp_path / "tiny-rm")
    return tmp_path / "tiny-rm"


@pytest.fixture
def sft(registry, tiny_model_dir):
    return adopt(registry, tiny_model_dir, stage="sft", run_name="a").run


def edit_json(file: Path, **values) -> None:
    about = json.loads(file.read_text())
    about = {k: v for k, v in (about | values).items() if v is not None}
    file.write_text(json.dumps(about))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused(registry, folder, match, *, stage="sft", error=ConfigError, **options):
    """`adopt` refuses, says so, and leaves nothing on the disk."""
    before = sorted(registry.runs_dir.rglob("*"))
    with pytest.raises(error, match=match):
        adopt(registry, folder, stage=stage, run_name="new", **options)
    assert sorted(registry.runs_dir.rglob("*")) == before


def command(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["rlhf", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def reading(cfg: PPOStage) -> Reading:
    return Reading(cfg.data.max_prompt_tokens, cfg.sampling.max_new_tokens, cfg.allow_foreign_rm)


def settings(**options) -> PPOStage:
    return PPOStage(run_name="a", data=DataConfig("rows.jsonl", max_prompt_tokens=64), **options)


# ---------------------------------------------------------------- what fits


def test_sft_and_rm_are_published_as_any_run_is(registry, sft, rm_dir, tiny_model_dir):
    rm = adopt(registry, rm_dir, stage="rm", run_name="a", parent="sft/a").run
    check_pair(sft, rm, reading(settings()))
    assert registry.verify("sft/a") == registry.verify("rm/a") == []
    assert sft.manifest.base.name == str(tiny_model_dir)
    assert rm.manifest.base == sft.manifest.base
    assert [(p.role, p.reference, p.digest) for p in rm.manifest.parents] == [
        ("policy", "sft/a", sft.digest)
    ]
    assert sft.manifest.method.name == "full"
    assert sft.manifest.data == []
    assert sft.manifest.config["adopted_from"] == str(tiny_model_dir)
    assert sft.manifest.config["template.name"] == "chat"
    assert rm.manifest.config["template.name"] == "inherit"
    for run, folder in ((sft, tiny_model_dir), (rm, rm_dir)):
        ours = load_file(run.model_dir / "model.safetensors")
        theirs = load_file(folder / "model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_golden_values_are_those_of_plain_transformers(registry, sft, tiny_model_dir, rm_dir):
    """Each row alone, without padding, by the class that config.json names."""
    rm = adopt(registry, rm_dir, stage="rm", run_name="a", parent="sft/a").run
    policy = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    reward_model = LlamaForSequenceClassification.from_pretrained(rm_dir)
    for run, model in ((sft, policy), (rm, reward_model)):
        stored = load_file(run.path / run.manifest.golden["file"])
        assert len(stored["ids"]) == 8
        for row, mask, value in zip(stored["ids"], stored["mask"], stored["values"], strict=True):
            with torch.no_grad():
                logits = model(input_ids=row[mask.bool()][None]).logits
            now = logits[0, 0] if run is rm else logits[0, -1]
            torch.testing.assert_close(now, value, rtol=0, atol=TINY)
        assert stored["values"].std() > 0.01
        ends = stored["ids"][:, -1] == run.manifest.tokenizer.eos_id
        assert ends.all() if run is rm else not ends.any()  # scores are of whole answers


def test_golden_values_hold_in_a_fresh_load_and_find_another_model(registry, sft, rm_dir):
    rm = adopt(registry, rm_dir, stage="rm", run_name="a", parent="sft/a").run
    tokenizer = text.load_parent_tokenizer(sft, template=TemplateConfig("inherit"))
    policy = models.load_causal(sft.model_dir, tokenizer, dtype=torch.float32).eval()
    reward_model = models.load_scalar(rm.model_dir, tokenizer, dtype=torch.float32).eval()
    assert golden.check_logits(policy, sft) <= TINY
    assert golden.check_scores(reward_model, rm) <= TINY
    with torch.no_grad():
        reward_model.score.weight += 0.1
    with pytest.raises(RegistryError, match="rm/a: loaded from"):
        golden.check_scores(reward_model, rm)


def test_the_plain_template_is_the_one_of_conf(registry, tiny_model_dir):
    """bos, prompt and newline, answer, eos: each part tokenized on its own."""
    run = adopt(registry, tiny_model_dir, stage="sft", run_name="p", template="plain").run
    tokenizer = text.load_parent_tokenizer(run, template=TemplateConfig("inherit"))
    renderer = text.Renderer(tokenizer)
    asked = [{"role": "user", "content": "Tell me"}]
    bare = {"add_special_tokens": False}
    prompt = tokenizer("Tell me\n", **bare)["input_ids"]
    answer = tokenizer(" a happy fox", **bare)["input_ids"]
    assert renderer.prompt(asked) == [tokenizer.bos_token_id, *prompt]
    assert renderer.response(asked, " a happy fox") == [*answer, tokenizer.eos_token_id]
    assert (CONF / "template" / "plain.yaml").is_file()
    assert run.manifest.config["template.name"] == "plain"


def test_a_template_may_come_from_a_file(registry, tiny_model_dir, tmp_path):
    (tmp_path / "mine.jinja").write_text(REVERSED)
    run = adopt(
        registry, tiny_model_dir, stage="sft", run_name="f", template=str(tmp_path / "mine.jinja")
    ).run
    tokenizer = text.load_parent_tokenizer(run, template=TemplateConfig("inherit"))
    assert tokenizer.chat_template == REVERSED


def test_a_folder_of_links_and_shards_as_a_hub_cache_has_it(
    registry, tiny_model, tiny_tokenizer, tmp_path
):
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    tiny_model().save_pretrained(blobs, max_shard_size="30KB")
    tiny_tokenizer.save_pretrained(blobs)
    assert len(list(blobs.glob("*.safetensors"))) > 1
    folder.mkdir()
    for file in blobs.iterdir():
        (folder / file.name).symlink_to(file)
    run = adopt(registry, folder, stage="sft", run_name="a").run
    shutil.rmtree(blobs)
    assert registry.verify("sft/a") == []
    assert not any(path.is_symlink() for path in run.path.rglob("*"))


def test_the_copy_has_the_special_ids_of_its_tokenizer(registry, rm_dir, tiny_tokenizer):
    """Plain transformers pads by config.json, which in a folder from elsewhere may have no pad."""
    edit_json(rm_dir / "config.json", pad_token_id=None, eos_token_id=7)
    run = adopt(registry, rm_dir, stage="rm", run_name="a").run
    about = json.loads((run.model_dir / "config.json").read_text())
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        assert (
            about[name]
            == getattr(tiny_tokenizer, name)
            == getattr(run.manifest.tokenizer, f"{name[:3]}_id")
        )


def test_a_half_precision_folder_stays_so_and_children_in_fp32_find_its_values(
    registry, tiny_model, tiny_tokenizer, tmp_path
):
    folder = tmp_path / "half"
    tiny_model().to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    run = adopt(registry, folder, stage="sft", run_name="a", dtype="fp32").run
    stored = load_file(run.model_dir / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert run.manifest.golden["tolerance"] == golden.TOLERANCE[torch.float32]
    model = models.load_causal(run.model_dir, tiny_tokenizer, dtype=torch.float32).eval()
    assert golden.check_logits(model, run) <= TINY


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)], ids=str
)
def test_dtype_names_what_children_compute_in(
    registry, tiny_model_dir, tiny_tokenizer, name, dtype
):
    run = adopt(registry, tiny_model_dir, stage="sft", run_name="a", dtype=name).run
    stored = load_file(run.model_dir / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert run.manifest.golden["tolerance"] == golden.TOLERANCE[dtype]
    assert run.manifest.environment.dtype == str(dtype).removeprefix("torch.")
    model = models.load_causal(run.model_dir, tiny_tokenizer, dtype=dtype).eval()
    assert golden.check_logits(model, run) == 0


def test_without_a_parent_a_reward_model_is_foreign(registry, sft, rm_dir):
    rm = adopt(registry, rm_dir, stage="rm", run_name="foreign").run
    with pytest.raises(RegistryError, match="differ in:\n  base model"):
        check_pair(sft, rm, reading(settings()))
    check_pair(sft, rm, reading(settings(allow_foreign_rm=True)))


def test_limits_given_are_those_that_ppo_keeps(registry, sft, rm_dir):
    limits = {"max_prompt_tokens": 64, "max_response_tokens": 12}
    rm = adopt(registry, rm_dir, stage="rm", run_name="a", parent="sft/a", **limits).run
    check_pair(sft, rm, reading(settings(sampling=SamplingConfig(max_new_tokens=12))))
    with pytest.raises(ConfigError, match=r"sampling\.max_new_tokens=13.*max_response_tokens=12"):
        check_pair(sft, rm, reading(settings(sampling=SamplingConfig(max_new_tokens=13))))


# ---------------------------------------------------------------- the command


def test_the_command_says_what_it_did_and_does_it_once(
    registry, tiny_model_dir, tmp_path, monkeypatch, capsys
):
    where = ("--runs-dir", registry.runs_dir)
    line = ("adopt", tiny_model_dir, "--stage", "sft", "--run-name", "a", *where)
    assert command(monkeypatch, *line) == 0
    assert "sft/a: adopted\n" in capsys.readouterr().out
    manifest = (registry.runs_dir / "sft/a/manifest.json").read_bytes()
    copy = shutil.copytree(tiny_model_dir, tmp_path / "copy")  # the same bytes elsewhere
    line = ("adopt", copy, "--stage", "sft", "--run-name", "a", *where)
    assert command(monkeypatch, *line) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (registry.runs_dir / "sft/a/manifest.json").read_bytes() == manifest
    assert command(monkeypatch, "show", "sft/a", *where) == 0
    assert command(monkeypatch, "verify", "sft/a", *where) == 0
    assert command(monkeypatch, "ls", *where) == 0
    capsys.readouterr()
    assert command(monkeypatch, *line[:-3], "other", *where, "--parent", "sft/a") == 2
    assert "refused: --parent=sft/a: an SFT run starts" in capsys.readouterr().err


def test_another_model_under_a_finished_name_is_refused(registry, sft, tiny_model_dir):
    edit_tensors(tiny_model_dir, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(RegistryError, match=r"sft/a is finished.*\n  adopted_sha256.*\n.*rlhf rm"):
        adopt(registry, tiny_model_dir, stage="sft", run_name="a")
    assert registry.resolve("sft/a").digest == sft.digest


def test_the_name_of_a_trained_run_is_refused(registry, publish_run, tiny_model_dir):
    publish_run(registry.runs_dir, "sft")
    with pytest.raises(RegistryError, match=r"sft/tiny is finished.*\n  it was trained here"):
        adopt(registry, tiny_model_dir, stage="sft", run_name="tiny")


# ---------------------------------------------------------------- refused: settings


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"stage": "ppo"}, "--stage=ppo: cannot be adopted. Choose sft"),
        ({"parent": "sft/a"}, "--parent=sft/a: an SFT run starts a line"),
        ({"stage": "rm", "parent": "rm/a"}, "--parent=rm/a: .* run of stage sft or ppo"),
        ({"max_prompt_tokens": 0}, "--max-prompt-tokens=0: it counts tokens"),
        ({"template": "inherit"}, "--template=inherit: there is no run to inherit from"),
        ({"template": "nowhere"}, "--template=nowhere: cannot be read.*none of: chat, .*plain"),
        ({"dtype": "fp64"}, "engine.dtype=fp64: no such choice"),
    ],
)
def test_settings_that_cannot_work_are_refused(registry, tiny_model_dir, rm_dir, options, match):
    folder = rm_dir if options.get("stage") == "rm" else tiny_model_dir
    refused(registry, folder, match, **options)


def test_a_name_that_is_no_folder_is_refused(registry, tiny_model_dir):
    with pytest.raises(ConfigError, match="run_name=a/b: it becomes a folder"):
        adopt(registry, tiny_model_dir, stage="sft", run_name="a/b")


def test_a_missing_parent_lists_what_there_is(registry, rm_dir):
    match = "sft/no: no such run .*Finished sft runs: none"
    refused(registry, rm_dir, match, stage="rm", parent="sft/no", error=RegistryError)


# ---------------------------------------------------------------- refused: the folder


def test_no_folder_there(registry, tmp_path):
    refused(registry, tmp_path / "org/name", "no folder there.*hf download")


def test_no_config_there(registry, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(registry, tmp_path / "empty", r"config\.json: cannot be read")
    (tmp_path / "empty/config.json").write_text("[]")
    refused(registry, tmp_path / "empty", r"config\.json: not a JSON object")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_its_own(registry, tiny_model_dir, file):
    edit_json(tiny_model_dir / file, auto_map={"AutoConfig": "mine.Config"})
    refused(registry, tiny_model_dir, rf"{file} has auto_map: .*trust_remote_code")


def test_an_adapter(registry, tiny_model_dir):
    (tiny_model_dir / "adapter_config.json").write_text("{}")
    refused(registry, tiny_model_dir, "an adapter .*merge_and_unload")


def test_packed_weights(registry, tiny_model_dir):
    edit_json(tiny_model_dir / "config.json", quantization_config={"bits": 4})
    refused(registry, tiny_model_dir, "quantization_config.*cannot be trained")


def test_a_classifier_as_sft(registry, rm_dir):
    refused(registry, rm_dir, "LlamaForSequenceClassification: a classifier scores texts")


def test_a_language_model_as_rm(registry, tiny_model_dir):
    refused(
        registry,
        tiny_model_dir,
        "LlamaForCausalLM: a language model, without a scalar head",
        stage="rm",
    )


@pytest.mark.parametrize(("labels", "said"), [({"0": "a", "1": "b", "2": "c"}, 3), (None, 2)])
def test_a_classifier_with_several_labels(registry, rm_dir, labels, said):
    edit_json(rm_dir / "config.json", id2label=labels)
    refused(registry, rm_dir, f"with {said} labels: a reward model has one", stage="rm")


@pytest.mark.parametrize("names", [None, ["T5ForConditionalGeneration"]])
def test_another_architecture(registry, tiny_model_dir, names):
    edit_json(tiny_model_dir / "config.json", architectures=names)
    refused(registry, tiny_model_dir, "neither a causal language model")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_alone(registry, tiny_model_dir, name):
    torch.save(load_file(tiny_model_dir / "model.safetensors"), tiny_model_dir / name)
    (tiny_model_dir / "model.safetensors").unlink()
    refused(registry, tiny_model_dir, rf"pickles \({name}\).*run code.*save_pretrained")


def test_no_weights(registry, tiny_model_dir):
    (tiny_model_dir / "model.safetensors").rename(tiny_model_dir / "consolidated.safetensors")
    refused(registry, tiny_model_dir, "no weights: neither model.safetensors nor")


def test_a_missing_shard(registry, tiny_model, tiny_tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path / "m", max_shard_size="30KB")
    tiny_tokenizer.save_pretrained(tmp_path / "m")
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    shard.unlink()
    shard.symlink_to(tmp_path / "gone")
    refused(registry, tmp_path / "m", f"lists {shard.name}: not there")


def test_weights_cut_short(registry, tiny_model_dir, rm_dir):
    for folder, stage in ((tiny_model_dir, "sft"), (rm_dir, "rm")):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        refused(registry, folder, "could be loaded|not whole safetensors", stage=stage)


def test_a_missing_head_would_be_random(registry, rm_dir):
    edit_tensors(rm_dir, lambda tensors: tensors.pop("score.weight"))
    refused(registry, rm_dir, r"no score\.weight, so the head is missing: .*random", stage="rm")


def test_a_head_under_another_name(registry, tiny_tokenizer, tmp_path):
    config = BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=32,
        num_labels=1,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    tiny_tokenizer.save_pretrained(tmp_path / "bert")
    match = r"no score\.weight.*classifier\.bias, classifier\.weight.*under that name"
    refused(registry, tmp_path / "bert", match, stage="rm")


def test_a_missing_weight_would_be_random(registry, tiny_model_dir):
    edit_tensors(tiny_model_dir, lambda tensors: tensors.pop("lm_head.weight"))
    refused(registry, tiny_model_dir, r"would be random: lm_head\.weight \(1 in all\)")


def test_a_weight_too_many_would_be_dropped(registry, rm_dir):
    edit_tensors(rm_dir, lambda tensors: tensors.update({"score.bias": torch.ones(1)}))
    refused(registry, rm_dir, r"would be dropped: score\.bias", stage="rm")


def test_scores_that_are_read_otherwise(registry, rm_dir, monkeypatch):
    """As of a class that adds to its head, which would be lost here."""
    forward = LlamaForSequenceClassification.forward

    def doubled(self, *given, **named):
        out = forward(self, *given, **named)
        out.logits = 2 * out.logits
        return out

    monkeypatch.setattr(LlamaForSequenceClassification, "forward", doubled)
    with pytest.raises(ConfigError, match="gives scores that differ by"):
        adopt(registry, rm_dir, stage="rm", run_name="a")
    assert not (registry.runs_dir / "rm").exists()


# ---------------------------------------------------------------- refused: the text


def test_without_a_chat_template_one_must_be_named(registry, tiny_model_dir):
    (tiny_model_dir / "chat_template.jinja").unlink()
    for given in (None, "chat"):
        refused(registry, tiny_model_dir, "no chat template. --template plain", template=given)


def test_a_template_that_fails(registry, tiny_model_dir, tmp_path):
    (tmp_path / "bad.jinja").write_text("{{ raise_exception('no') }}")
    bad = str(tmp_path / "bad.jinja")
    refused(registry, tiny_model_dir, r"--template=bad\.jinja: it does not render", template=bad)
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}{{ loop.length }}{% endfor %}")
    refused(registry, tiny_model_dir, "does not start with the text", template=bad)


def test_a_template_of_tokens_that_the_model_lacks(registry, tiny_model_dir):
    match = r"--template=chatml: <\|im_start\|>, <\|im_end\|>: the tokenizer in .* has no such"
    refused(registry, tiny_model_dir, match, template="chatml")


def test_no_tokenizer(registry, tiny_model_dir):
    for file in tiny_model_dir.glob("tokenizer*"):
        file.unlink()
    refused(registry, tiny_model_dir, "no tokenizer could be loaded")


def test_a_tokenizer_of_another_model(registry, tiny_model_dir, new_tokenizer):
    new_tokenizer.add_tokens([f"<extra-{i}>" for i in range(9)])
    new_tokenizer.save_pretrained(tiny_model_dir)
    refused(registry, tiny_model_dir, "tokens but the model has embeddings for")


def test_a_reward_model_with_another_tokenizer_than_its_parent(
    registry, sft, rm_dir, new_tokenizer
):
    vocabulary = json.loads((rm_dir / "tokenizer.json").read_text())
    ids = vocabulary["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (rm_dir / "tokenizer.json").write_text(json.dumps(vocabulary))
    match = "sft/a differ in:\n  tokenizer: .* and .*\nThe reward model is given the token ids"
    refused(registry, rm_dir, match, stage="rm", parent="sft/a", error=RegistryError)


def test_a_reward_model_with_another_template_than_its_parent(registry, sft, rm_dir):
    match = "sft/a differ in:\n  template: .* and .*\nThe"
    options = {"stage": "rm", "parent": "sft/a", "error": RegistryError}
    refused(registry, rm_dir, match, template="plain", **options)
    (rm_dir / "chat_template.jinja").write_text(REVERSED)
    refused(registry, rm_dir, match, **options)
    rm = adopt(registry, rm_dir, stage="rm", run_name="a", parent="sft/a", template="inherit").run
    check_pair(sft, rm, reading(settings()))


def test_a_reward_model_without_a_template_inherits_its_parents(registry, sft, rm_dir):
    (rm_dir / "chat_template.jinja").unlink()
    rm = adopt(registry, rm_dir, stage="rm", run_name="a", parent="sft/a").run
    check_pair(sft, rm, reading(settings()))


def test_a_parent_that_it_cannot_come_from(registry, tiny_model, tiny_tokenizer, tmp_path, rm_dir):
    tiny_model(num_hidden_layers=3).save_pretrained(tmp_path / "deep")
    tiny_tokenizer.save_pretrained(tmp_path / "deep")
    adopt(registry, tmp_path / "deep", stage="sft", run_name="deep")
    match = "--parent=sft/deep: .* cannot have been .*\n  num_hidden_layers: 2 and 3\n"
    refused(registry, rm_dir, match, stage="rm", parent="sft/deep", error=RegistryError)


# ---------------------------------------------------------------- half-way


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no"), OSError(28, "full")])
@pytest.mark.parametrize("place", ["publish", "write_logits", "check_logits"])
def test_what_ends_half_way_leaves_no_run(registry, tiny_model_dir, monkeypatch, error, place):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(models if place == "publish" else golden, place, fail)
    shown = RegistryError if isinstance(error, OSError) else type(error)
    with pytest.raises(shown):
        adopt(registry, tiny_model_dir, stage="sft", run_name="a")
    assert not (registry.runs_dir / "sft").exists()
    monkeypatch.undo()
    assert adopt(registry, tiny_model_dir, stage="sft", run_name="a").new


def test_a_copy_that_says_something_else_is_not_kept(registry, tiny_model_dir, monkeypatch):
    publish = models.publish

    def spoilt(model, tokenizer, folder):
        publish(model, tokenizer, folder)
        edit_tensors(folder, lambda tensors: tensors["lm_head.weight"][5].add_(1))

    monkeypatch.setattr(models, "publish", spoilt)
    with pytest.raises(RegistryError, match="does not say what it said"):
        adopt(registry, tiny_model_dir, stage="sft", run_name="a")
    assert not (registry.runs_dir / "sft").exists()


# ---------------------------------------------------------------- what starts from it


def write_rows(folder: Path, row) -> Path:
    folder.mkdir()
    for split, count in (("train", 16), ("validation", 4)):
        lines = [json.dumps(row(i)) for i in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_ppo_starts_from_both(registry, sft, rm_dir, tmp_path, monkeypatch, capfd):
    adopt(registry, rm_dir, stage="rm", run_name="a", parent="sft/a")
    data = write_rows(tmp_path / "prompts", lambda i: {"prompt": f"Tell me {i}"})
    small = ["ppo.steps=2", "ppo.batch_size=8", "ppo.micro_batch_size=4", "ppo.epochs=1"]
    small += ["sampling.max_new_tokens=8", "evaluation.prompts=4", "experiment=none"]
    fixed = [f"runs_dir={registry.runs_dir}", "run=a", "tracking=off", f"data.path={data}"]
    assert run_stage(monkeypatch, "ppo", *fixed, *small, "method=full") == 0
    said = capfd.readouterr().err
    assert "reference = sft/a (golden logits" in said
    assert "|KL(policy, reference)| <= " in said
    assert registry.verify("ppo/a") == []
    made = registry.resolve("ppo/a").manifest
    assert made.base == sft.manifest.base
    assert [parent.reference for parent in made.parents] == ["sft/a", "rm/a"]


def test_rm_starts_from_an_adopted_sft(registry, sft, tmp_path, monkeypatch):
    pair = {"chosen": "a happy friend", "rejected": "a fox"}
    data = write_rows(tmp_path / "pairs", lambda i: {"prompt": f"Tell me {i}", **pair})
    fixed = [f"runs_dir={registry.runs_dir}", "run=a", "tracking=off", f"data.path={data}"]
    small = ["train.max_steps=2", "train.batch_size=8", "train.micro_batch_size=4"]
    assert run_stage(monkeypatch, "rm", *fixed, *small, "experiment=none") == 0
    rm = registry.resolve("rm/a")
    check_pair(sft, rm, reading(settings()))
