"""A stage at work and its W&B run, written offline and read back: unbroken, stopped, guarded."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from small_line import SMALL, run_stage
from wandb_files import inside, items, parts, rows

import rlhf
from rlhf.metrics import find
from rlhf.registry import Registry
from rlhf.tracking import Tracker

PPO = [
    *SMALL["ppo"],
    "ppo.steps=5",
    "ppo.eval_every=2",
    "ppo.save_every=2",
    "evaluation.samples=3",
    "tracking.mode=offline",
    "tracking.tags=[mine]",
]
EVALUATIONS = [2, 4, 5]  # every second step, and the last


@pytest.fixture(autouse=True, scope="module")
def nobodys_account(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A home without a key, and no W&B setting of the person who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [*os.environ]:
            if name.startswith(("WANDB_", "XDG_")) or name == "NETRC":
                patch.delenv(name)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        yield
        sys.modules["wandb"].teardown()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sft/tiny, rm/tiny and ppo/tiny, never stopped; PPO is tracked."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for stage in ("sft", "rm"):
            given = (f"runs_dir={folder}", "tracking=off", *SMALL[stage])
            assert run_stage(patch, stage, *given) == 0
        assert run_stage(patch, "ppo", f"runs_dir={folder}", *PPO) == 0
    return folder


def in_metrics_jsonl(folder: Path) -> dict[int, dict[str, float]]:
    """Step -> numbers; "nan" and the like as numbers."""
    out: dict[int, dict[str, float]] = {}
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        step = line.pop("step")
        out.setdefault(step, {}).update({k: float(v) for k, v in line.items()})
    return out


def in_wandb(folder: Path) -> dict[int, dict[str, float]]:
    """The same of all parts of the W&B run, each number of a step once."""
    out: dict[int, dict[str, float]] = {}
    for part in parts(folder):
        for row in rows(part):
            there = out.setdefault(row.pop("_step"), {})
            assert not there.keys() & row.keys(), "a number of a step twice"
            there |= {k: float(v) for k, v in row.items()}
    return out


def by_seed(numbers: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    """Without what a clock or a machine decides."""
    return {
        step: {k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))}
        for step, row in numbers.items()
    }


def ids(folder: Path) -> set[str]:
    return {r.run.run_id for part in parts(folder) for r in part if r.HasField("run")}


def exits(folder: Path) -> list[int]:
    return [r.exit.exit_code for part in parts(folder) for r in part if r.HasField("exit")]


def test_wandb_holds_every_metric_of_every_step_once(runs):
    found = in_wandb(runs / "ppo/tiny")
    assert found == in_metrics_jsonl(runs / "ppo/tiny")
    assert sorted(found) == [1, 2, 3, 4, 5]
    assert len(found[4]) > 30
    assert [row["episode"] for row in found.values()] == [8, 16, 24, 32, 40]
    assert exits(runs / "ppo/tiny") == [0]


def test_the_run_says_what_it_is(runs):
    (part,) = parts(runs / "ppo/tiny")
    run = next(r.run for r in part if r.HasField("run"))
    assert (run.display_name, run.run_group, run.job_type) == ("ppo/tiny", "tiny", "ppo")
    assert sorted(run.tags) == ["lora", "mine", "ppo", "zero2"]
    config = items(run.config.update)
    assert config["code"]["version"] == rlhf.__version__
    assert config["ppo"]["kl_coef"] == 0.1
    kept = Registry(runs).resolve("ppo/tiny").manifest
    assert config["code"]["git_commit"] == kept.git_commit
    summary: dict[str, Any] = {}
    for record in part:
        summary |= items(record.summary.update)
    for name in ("eval/score", "eval/kl", "eval/gold"):  # of what was published, not of the last
        assert summary[name] == kept.metrics[name]


def test_distributions_are_those_of_the_step(runs):
    (part,) = parts(runs / "ppo/tiny")
    history = [r.history.item for r in part if r.HasField("history")]
    shown = {items(row)["_step"]: row for row in history if inside(row, "histogram/scores")}
    assert list(shown) == EVALUATIONS
    numbers = in_metrics_jsonl(runs / "ppo/tiny")
    for step, row in shown.items():
        lengths = inside(row, "histogram/lengths")
        tokens = round(numbers[step]["response/length"] * 8)
        assert sum(lengths["values"]) == sum(inside(row, "histogram/scores")["values"]) == 8
        assert lengths["bins"][0] <= numbers[step]["response/length"] <= lengths["bins"][-1]
        assert sum(inside(row, "histogram/advantages")["values"]) == tokens
        ratios = inside(row, "histogram/ratios")
        assert sum(ratios["values"]) == 2 * tokens  # two epochs
        centres = [(a + b) / 2 for a, b in zip(ratios["bins"], ratios["bins"][1:], strict=False)]
        mean = sum(c * n for c, n in zip(centres, ratios["values"], strict=True)) / (2 * tokens)
        width = ratios["bins"][1] - ratios["bins"][0]
        assert mean == pytest.approx(numbers[step]["policy/ratio"], abs=width)


def test_samples_of_every_evaluation_are_kept(runs):
    text = (runs / "ppo/tiny/samples_log.jsonl").read_text(encoding="utf-8")
    kept = [json.loads(line) for line in text.splitlines()]
    assert [row["step"] for row in kept] == [step for step in EVALUATIONS for _ in range(3)]
    assert {row["prompt"] for row in kept[:3]} == {row["prompt"] for row in kept[3:6]}
    assert kept[0]["sft"] == kept[3]["sft"]
    assert all(1 <= row["ppo_length"] <= 12 and math.isfinite(row["ppo_kl"]) for row in kept)
    published = (runs / "ppo/tiny/samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(published[0]).keys() | {"step", "ppo_kl", "ppo_length"} == kept[0].keys()
    assert "samples_log.jsonl" in Registry(runs).resolve("ppo/tiny").manifest.files
    assert Registry(runs).verify("ppo/tiny") == []


def test_the_published_model_is_an_artifact_with_its_lineage(runs):
    made = Registry(runs).resolve("ppo/tiny")
    (part,) = parts(runs / "ppo/tiny")
    found = [r.artifact for r in part if r.HasField("artifact") and r.artifact.type == "model"]
    (model,) = found
    assert model.name == "ppo-tiny"
    about = json.loads(model.metadata)
    assert about["manifest_sha256"] == made.digest
    assert [(p["role"], p["reference"], p["digest"]) for p in about["parents"]] == [
        (p.role, p.reference, p.digest) for p in made.manifest.parents
    ]
    contents = {entry.path: entry for entry in model.manifest.contents}
    assert not contents.pop("manifest.json").ref
    assert contents.keys() == {n for n in made.manifest.files if n.startswith("model/")}
    for name, entry in contents.items():
        assert entry.ref == (made.path / name).absolute().as_uri()  # where it lies, not the file


def test_upload_puts_the_files_into_the_artifact(runs, monkeypatch):
    given = [*PPO, "ppo.steps=1", "run_name=sent", "tracking.upload=true"]
    assert run_stage(monkeypatch, "ppo", f"runs_dir={runs}", *given) == 0
    (part,) = parts(runs / "ppo/sent")
    (model,) = [r.artifact for r in part if r.HasField("artifact") and r.artifact.type == "model"]
    for entry in model.manifest.contents:
        assert not entry.ref
        assert Path(entry.local_path) == (runs / "ppo/sent" / entry.path).absolute(), "no copy"


def test_online_the_parents_are_used(runs, monkeypatch):
    """W&B knows an artifact by its content: what PPO used is what SFT and RM logged."""
    from rlhf.wandb_run import WandbRows

    used, logged = [], []

    class Online:
        def use_artifact(self, artifact: Any) -> None:
            used.append((artifact.name, artifact.digest))

        def log_artifact(self, artifact: Any, aliases: list[str]) -> None:
            logged.append((artifact.name, artifact.digest))

    def publish(name: str, *parents: str) -> None:
        at_work = WandbRows(runs / "nowhere", resume=False)
        at_work._run, at_work._online = Online(), True
        at_work.publish(registry.resolve(name), [registry.resolve(each) for each in parents])

    registry = Registry(runs)
    publish("sft/tiny")
    publish("rm/tiny", "sft/tiny")
    publish("ppo/tiny", "sft/tiny", "rm/tiny")
    assert [name for name, _ in logged] == ["sft-tiny", "rm-tiny", "ppo-tiny"]
    assert used == [logged[0], logged[0], logged[1]]


def test_a_run_that_was_stopped_goes_on_in_the_same_wandb_run(runs, monkeypatch):
    log = Tracker.log

    def log_and_ask(self: Tracker, metrics: Any, *, step: int) -> None:
        log(self, metrics, step=step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", log_and_ask)
        assert run_stage(patch, "ppo", f"runs_dir={runs}", *PPO, "run_name=stopped") == 143
    assert run_stage(monkeypatch, "ppo", f"runs_dir={runs}", *PPO, "run_name=stopped") == 0
    folder = runs / "ppo/stopped"
    assert in_wandb(folder) == in_metrics_jsonl(folder)
    assert by_seed(in_wandb(folder)) == by_seed(in_wandb(runs / "ppo/tiny"))
    assert len(parts(folder)) == 2
    assert len(ids(folder)) == 1
    assert exits(folder) == [1, 0]
    for name in ("samples_log.jsonl", "samples.jsonl"):
        assert (folder / name).read_bytes() == (runs / "ppo/tiny" / name).read_bytes()


def test_steps_that_are_done_again_after_a_crash_are_there_once(runs, monkeypatch):
    """It dies in step 4, after the evaluation; the checkpoint is of step 2."""
    log = Tracker.log

    def log_or_die(self: Tracker, metrics: Any, *, step: int) -> None:
        if step == 4:
            raise RuntimeError("the machine")
        log(self, metrics, step=step)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", log_or_die)
        patch.setattr(sys, "argv", ["ppo", f"runs_dir={runs}", *PPO, "run_name=crashed"])
        with pytest.raises(RuntimeError, match="the machine"):
            run_stage(patch, "ppo", f"runs_dir={runs}", *PPO, "run_name=crashed")
    assert run_stage(monkeypatch, "ppo", f"runs_dir={runs}", *PPO, "run_name=crashed") == 0
    folder = runs / "ppo/crashed"
    assert by_seed(in_wandb(folder)) == by_seed(in_metrics_jsonl(folder))
    assert by_seed(in_wandb(folder)) == by_seed(in_wandb(runs / "ppo/tiny"))
    assert len(ids(folder)) == 1
    kept = (folder / "samples_log.jsonl").read_bytes()
    assert kept == (runs / "ppo/tiny/samples_log.jsonl").read_bytes()


@pytest.mark.slow
def test_overwrite_is_another_wandb_run(runs, monkeypatch):
    given = [f"runs_dir={runs}", *PPO, "ppo.steps=1", "run_name=again"]
    assert run_stage(monkeypatch, "ppo", *given) == 0
    before = ids(runs / "ppo/again")
    assert run_stage(monkeypatch, "ppo", *given, "overwrite=true") == 0
    assert ids(runs / "ppo/again").isdisjoint(before)


@pytest.mark.parametrize("patience", [1, 3])
def test_a_guard_that_stops_ppo_is_an_alert(runs, monkeypatch, patience):
    """With patience 3 a best step was published before; with 1 there is none."""
    name = f"guarded{patience}"
    rule = ["stop.ratio=1.000001", f"stop.patience={patience}", f"run_name={name}"]
    assert run_stage(monkeypatch, "ppo", f"runs_dir={runs}", *PPO, *rule) == 3
    (part,) = parts(runs / "ppo" / name)
    (alert,) = [r.alert for r in part if r.HasField("alert")]
    assert alert.title == f"ppo/{name}: stopped"
    assert "ratio explosion" in alert.text
    assert "Likely causes" in alert.text
    assert exits(runs / "ppo" / name) == [3]
    assert (runs / "ppo" / name / "manifest.json").exists() is (patience == 3)


def test_every_number_that_was_logged_is_in_the_list(runs):
    names = {name for row in in_metrics_jsonl(runs / "ppo/tiny").values() for name in row}
    assert all(map(find, names)), names
