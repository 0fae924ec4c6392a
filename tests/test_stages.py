"""The three stages, end to end and a few steps long, on the built-in tiny world."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from small_line import SMALL, numbers, run_line, run_stage

from rlhf import threads


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def line(tmp_path_factory, module_patch) -> Path:
    """A finished line of work, whose stages chose how many threads they compute with."""
    import torch

    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for name in threads.SETTINGS:
            patch.delenv(name, raising=False)
        codes, before = {}, torch.get_num_threads()
        for stage, sizes in SMALL.items():
            torch.set_num_threads(2)
            given = [f"runs_dir={runs}", "tracking=off", *sizes]
            codes[stage] = run_stage(module_patch, stage, *given)
    torch.set_num_threads(before)
    assert codes == {"sft": 0, "rm": 0, "ppo": 0}
    return runs


@pytest.fixture(scope="module")
def full_line(tmp_path_factory, module_patch) -> Path:
    """Another, of full fine-tuning."""
    runs = tmp_path_factory.mktemp("full")
    assert run_line(module_patch, runs, "method=full") == {"sft": 0, "rm": 0, "ppo": 0}
    return runs


def test_every_run_is_published_and_sound(line):
    from rlhf.registry import Registry

    registry = Registry(line)
    for stage in SMALL:
        assert registry.verify(f"{stage}/tiny") == []
    ppo = registry.resolve("ppo/tiny").manifest
    assert [parent.reference for parent in ppo.parents] == ["sft/tiny", "rm/tiny"]
    assert ppo.base == registry.resolve("sft/tiny").manifest.base
    assert ppo.metrics["eval/kl"] is not None


@pytest.mark.parametrize("stage", SMALL)
def test_a_small_model_computes_with_one_thread_and_the_log_says_so(line, stage):
    from rlhf.registry import Registry

    manifest = Registry(line).resolve(f"{stage}/tiny").manifest
    assert manifest.environment.other["threads"] == 1
    said = [
        text
        for text in (line / stage / "tiny/log.txt").read_text().splitlines()
        if "threads: " in text
    ]
    assert len(said) == 1
    parameters = "1.7M" if stage == "ppo" else "1.2M"  # with the adapters of all roles
    cores = threads.usable_cores()
    assert f" threads: 1 of {cores} cores ({parameters} parameters, cpu; " in said[0]


def test_the_reward_model_has_a_report_card_and_ppo_says_so(line):
    from rlhf import card
    from rlhf.registry import Registry

    rm = Registry(line).resolve("rm/tiny")
    assert "card.json" in rm.manifest.files
    made = card.read(rm.path)
    assert made.facts == rm.manifest.card
    assert (made.split, made.pairs) == ("test", 40)
    assert made.accuracy.value == rm.manifest.metrics["eval/accuracy"]
    assert made.baselines["longer"].value == rm.manifest.metrics["eval/accuracy_longer"]
    assert made.calibration.ece == rm.manifest.metrics["eval/ece"]
    assert made.calibration.brier == rm.manifest.metrics["eval/brier"]
    assert len(made.probes) == 6
    assert numbers(line, "rm")[-1]["eval/ece"] == made.calibration.ece
    said = (line / "ppo/tiny/log.txt").read_text()
    assert f"reward model rm/tiny: {made.verdict.upper()}" in said
    for reason in made.reasons:
        assert reason in said
    for stage in ("sft", "ppo"):
        assert Registry(line).resolve(f"{stage}/tiny").manifest.card is None


def test_a_second_reward_model_is_compared_with_the_first(line, monkeypatch, capfd):
    from rlhf import card

    given = [f"runs_dir={line}", "tracking=off", *SMALL["rm"], "card.probe_pairs=0"]
    assert run_stage(monkeypatch, "rm", *given, "run_name=twin") == 0
    assert "card.agree_with=[rm/tiny]" in " ".join(capfd.readouterr().err.split())
    lines = [numbers(line, "rm", name) for name in ("twin", "tiny")]
    assert sum("train/loss" in row or "eval/loss" in row for row in lines[0]) >= 2
    for twin, first in zip(*lines, strict=True):  # which was probed, and says more
        assert twin == {name: first[name] for name in twin}
    more = ["run_name=seeds", "seed=1", "card.agree_with=[rm/twin,rm/tiny]"]
    assert run_stage(monkeypatch, "rm", *given, *more) == 0
    found = card.read(line / "rm/seeds").agreement
    assert [(one.reference, one.pairs) for one in found] == [("rm/twin", 40), ("rm/tiny", 40)]
    assert found[0].value == found[1].value > 0.5  # twins
    assert "agreement with rm/twin" in capfd.readouterr().out


def test_without_a_card_there_is_none_and_ppo_says_so(line, monkeypatch):
    given = [f"runs_dir={line}", "tracking=off"]
    off = [*SMALL["rm"], "run_name=bare", "card.enabled=false"]
    assert run_stage(monkeypatch, "rm", *given, *off) == 0
    assert not (line / "rm/bare/card.json").exists()
    more = [*SMALL["ppo"], "ppo.steps=1", "run_name=bare", "rm_from=rm/bare"]
    assert run_stage(monkeypatch, "ppo", *given, *more) == 0
    assert "rm/bare: it has no report card" in (line / "ppo/bare/log.txt").read_text()


def test_the_same_seed_gives_the_same_numbers(line, monkeypatch):
    """Of the reward model: see the twins above."""
    for stage in ("sft", "ppo"):
        given = [f"runs_dir={line}", "tracking=off", *SMALL[stage], "run_name=again"]
        assert run_stage(monkeypatch, stage, *given) == 0
        assert numbers(line, stage, "again") == numbers(line, stage)
        assert len(numbers(line, stage)) >= 2


def test_another_seed_gives_other_numbers(line, monkeypatch):
    code = run_stage(
        monkeypatch,
        "ppo",
        f"runs_dir={line}",
        "tracking=off",
        *SMALL["ppo"],
        "seed=1",
        "run_name=other",
    )
    assert code == 0
    assert numbers(line, "ppo", "other") != numbers(line, "ppo")


@pytest.mark.parametrize("ends", ["stopped", pytest.param("last", marks=pytest.mark.slow)])
def test_the_numbers_that_are_published_are_those_of_the_published_step(line, monkeypatch, ends):
    """The first step is the best; the others, or a guard in the third, come after it."""
    from rlhf import monitor, ppo
    from rlhf.errors import StoppedByGuard
    from rlhf.registry import Registry

    found = iter([1.0, 0.0, 0.0])
    monkeypatch.setattr(ppo, "worth", lambda *a: next(found))
    check = monitor.StoppingRules.check

    def stop(self, stats, *, step):
        check(self, stats, step=step)
        if (ends, step) == ("stopped", 3):
            raise StoppedByGuard("as the test wants it")

    monkeypatch.setattr(monitor.StoppingRules, "check", stop)
    given = [f"runs_dir={line}", "tracking=off", *SMALL["ppo"], f"run_name=first-{ends}"]
    given += ["ppo.steps=3", "ppo.eval_every=1", "ppo.learning_rate=1e-3"]
    assert run_stage(monkeypatch, "ppo", *given) == (3 if ends == "stopped" else 0)
    made = Registry(line).resolve(f"ppo/first-{ends}").manifest
    logged = {}
    for row in numbers(line, "ppo", f"first-{ends}"):
        logged.setdefault(row.pop("step"), {}).update(row)
    clocked = ("time/", "perf/", "proof/")
    of_the_run = {n: x for n, x in made.metrics.items() if not n.startswith(clocked)}
    assert of_the_run == pytest.approx({n: logged[1][n] for n in of_the_run})
    assert of_the_run["objective/kl"] != pytest.approx(logged[2]["objective/kl"])
    assert {"episode", "objective/scores", "loss/policy", "eval/kl"} <= of_the_run.keys()


LONG = "Tell me all about it. " * 60


def test_rows_beyond_the_models_positions_are_refused(tmp_path, monkeypatch, capfd):
    """Not trained on in silence: the built-in base has positions for 512 tokens."""
    turns = [{"role": "user", "content": LONG}, {"role": "assistant", "content": LONG}]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    given = [f"runs_dir={tmp_path}", "tracking=off", f"data.path={tmp_path}"]
    given += ["data.max_prompt_tokens=999", "data.max_response_tokens=999", "train.batch_size=1"]
    assert run_stage(monkeypatch, "sft", *given) == 2
    said = capfd.readouterr().err
    assert "tokens, but the model has positions for 512. Lower data.max_prompt_tokens or" in said


ZERO3 = ["engine=zero3", "engine.partition_threshold=0", "engine.allow_zero3_adapters=true"]


@pytest.mark.parametrize("method", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_zero3_publishes_what_zero2_does(line, full_line, tmp_path, monkeypatch, method):
    """Every weight is split, so what is saved without being gathered would be empty."""
    from safetensors.torch import load_file

    codes = run_line(monkeypatch, tmp_path, f"method={method}", *ZERO3)
    assert codes == {"sft": 0, "rm": 0, "ppo": 0}
    lines = [line if method == "lora" else full_line, tmp_path]
    for stage in SMALL:
        for two, three in zip(*(numbers(runs, stage) for runs in lines), strict=True):
            two.pop("proof/ratio", None)  # rounding alone
            assert {k: three[k] for k in two} == pytest.approx(two, rel=1e-2, abs=1e-4), stage
        weights = [load_file(runs / stage / "tiny/model/model.safetensors") for runs in lines]
        for name, tensor in weights[0].items():  # Adam makes whole steps of rounding here and there
            assert float((weights[1][name] - tensor).abs().mean()) < 1e-5, f"{stage}: {name}"


@pytest.mark.parametrize("method", ["full", "lora"])
def test_without_gathering_nothing_is_published(tmp_path, monkeypatch, method, capfd):
    """What was written is read back: this is how other programs lose an adapter, with exit 0."""
    from rlhf import engine

    monkeypatch.setattr(engine, "gathered", lambda module, write=False: nullcontext())
    given = [f"runs_dir={tmp_path}", "tracking=off", f"method={method}", *ZERO3, *SMALL["sft"]]
    assert run_stage(monkeypatch, "sft", *given, "evaluation.prompts=0") == 2
    assert "of the tensors that were written are empty" in " ".join(capfd.readouterr().err.split())
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize("stage", list(SMALL))
def test_a_setting_that_deepspeed_does_not_take_is_refused_before_a_weight_is_loaded(
    line, monkeypatch, capfd, stage
):
    given = [f"runs_dir={line}", "tracking=off", "run_name=refused", *SMALL[stage]]
    given += ["engine.deepspeed.zero_optimization.reduce_buket_size=9"]
    assert run_stage(monkeypatch, stage, *given) == 2
    said = capfd.readouterr().err
    assert "refused: engine.deepspeed.zero_optimization.reduce_buket_size=9: DeepSpeed has" in said
    assert "training" not in said
    assert "Traceback" not in said


def test_a_finished_run_is_left_alone(line, monkeypatch, capfd):
    before = snapshot(line / "ppo" / "tiny")
    fixed = [f"runs_dir={line}", "tracking=off", *SMALL["ppo"]]
    assert run_stage(monkeypatch, "ppo", *fixed) == 0
    assert "ppo/tiny is finished" in capfd.readouterr().err
    assert snapshot(line / "ppo" / "tiny") == before


def test_another_config_under_a_finished_name_is_refused(line, monkeypatch, capfd):
    before = snapshot(line / "ppo" / "tiny")
    fixed = [f"runs_dir={line}", "tracking=off", *SMALL["ppo"]]
    assert run_stage(monkeypatch, "ppo", *fixed, "ppo.kl_coef=0.3") == 2
    said = capfd.readouterr().err
    assert "ppo.kl_coef: 0.1 -> 0.3" in said
    assert "run_name=" in said
    assert "overwrite=true" in said
    assert snapshot(line / "ppo" / "tiny") == before


def test_a_missing_parent_names_the_command_that_makes_it(tmp_path, monkeypatch, capfd):
    code = run_stage(monkeypatch, "rm", f"runs_dir={tmp_path}", "run=fresh", "tracking=off")
    assert code == 2
    said = capfd.readouterr().err
    assert "sft/fresh" in said
    assert "make sft RUN=fresh" in said
    assert list(tmp_path.iterdir()) == []


def test_a_row_with_an_empty_answer_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, capfd
):
    data = tmp_path / "data"
    data.mkdir()
    good = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    bad = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " "}]}
    (data / "train.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
    (data / "validation.jsonl").write_text(json.dumps(good) + "\n")
    runs = tmp_path / "runs"
    overrides = [f"runs_dir={runs}", f"data.path={data}", "tracking=off"]
    assert run_stage(monkeypatch, "sft", *overrides) == 2
    said = capfd.readouterr().err
    assert f"{data}/train.jsonl:2: messages ends with an empty assistant turn" in said
    assert not runs.exists()


def test_a_runs_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch, capfd):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert run_stage(monkeypatch, "sft", f"runs_dir={blocked}/runs", "tracking=off") == 2
    assert "runs_dir=" in capfd.readouterr().err


def test_samples_hold_both_answers_with_score_and_gold(line):
    rows = [json.loads(row) for row in (line / "ppo/tiny/samples.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    for row in rows:
        assert row["prompt"]
        for who in ("sft", "ppo"):
            assert isinstance(row[who], str)
            assert isinstance(row[f"{who}_score"], float)
            assert 0 <= row[f"{who}_gold"] <= 1


def test_full_fine_tuning_publishes_no_adapter(line, full_line):
    assert (line / "ppo/tiny/model/adapter").exists()
    assert not (full_line / "ppo/tiny/model/adapter").exists()


PLAIN = """
import sys, torch
from pathlib import Path
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
runs = Path(sys.argv[1])

def golden(stage):
    stored = load_file(runs / stage / "tiny/model/golden.safetensors")
    ids, mask = stored["ids"], stored["mask"].long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return stored["values"], dict(input_ids=ids, attention_mask=mask, position_ids=positions)

def off(stage, model):
    values, inputs = golden(stage)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    now = logits.squeeze(-1) if logits.dim() == 2 else logits[:, -1]
    return float((now - values).abs().max())

for stage in ("sft", "ppo"):
    print(off(stage, AutoModelForCausalLM.from_pretrained(runs / stage / "tiny/model")))
print(off("rm", AutoModelForSequenceClassification.from_pretrained(runs / "rm/tiny/model")))
base = AutoModelForCausalLM.from_pretrained(runs / "sft/tiny/model")
print(off("ppo", PeftModel.from_pretrained(base, runs / "ppo/tiny/model/adapter")))
torch.manual_seed(1)  # another head than the one that was trained
base = AutoModelForSequenceClassification.from_pretrained(runs / "sft/tiny/model", num_labels=1)
print(off("rm", PeftModel.from_pretrained(base, runs / "rm/tiny/model/adapter")))
"""


def test_plain_transformers_and_peft_load_what_was_published(line):
    """The values are those of the model in memory before it was merged and saved."""
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(line)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=True,
    )
    differences = [float(value) for value in done.stdout.split()]
    assert len(differences) == 5
    assert max(differences) < 1e-4
