"""One stage's run from opening to publishing: what is written, what is shown, and by whom."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf import checkpointing, ranks
from rlhf.checkpointing import Best
from rlhf.config import (
    DataConfig,
    EngineConfig,
    ModelConfig,
    SFTStage,
    TemplateConfig,
    TrackingConfig,
)
from rlhf.data import Split
from rlhf.errors import RegistryError, StoppedByGuard
from rlhf.manifest import BaseModel
from rlhf.methods.settings import LoraConfig
from rlhf.registry import Registry
from rlhf.stage_run import StageRun, open_run, peak_memory_gb

FACTS = {"tokenizer_hash": "t-1", "template_hash": "c-1", "pad_id": 0, "eos_id": 2, "bos_id": 1}
SAMPLES = [{"prompt": f"question {n}", "sft": "Grüße", "ppo": "b"} for n in range(7)]


@pytest.fixture
def cfg(tmp_path: Path) -> SFTStage:
    return SFTStage(
        run_name="tiny",
        runs_dir=str(tmp_path / "runs"),
        template=TemplateConfig("chat"),
        data=DataConfig("rows.jsonl"),
        method=LoraConfig(rank=4),
        engine=EngineConfig(zero_stage=1),
        tracking=TrackingConfig(mode="off"),
        model=ModelConfig("base"),
        seed=3,
    )


def splits() -> dict[str, Split]:
    rows = [{"prompt": [{"role": "user", "content": str(n)}]} for n in range(5)]
    dropped = Counter({"bad row": 2})
    return {
        "train": Split("train", "train.jsonl", "data-1", rows, dropped),
        "validation": Split("validation", "validation.jsonl", "data-2", rows[:2]),
    }


def write_model(text: str, folder: Path) -> None:
    if ranks.is_main():
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_text(text)


class NoCheckpoints:
    """Of a run that starts, and of as many processes as the environment says."""

    def __init__(self, *_: object, total: int, **__: object) -> None:
        self.total, self.step, self.best = total, 0, Best()
        self.stopped, self.model_is = None, "last"

    def track(self, **objects: object) -> None:
        assert list(objects) == ["run"]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "Checkpoints", NoCheckpoints)
    monkeypatch.setattr(StageRun, "_expect_one_folder", lambda run: None)


def begin(run: StageRun) -> None:
    """Training begins, of a model with 10 of 1,010 parameters to train."""
    trained, frozen = torch.nn.Linear(10, 1, bias=False), torch.nn.Linear(1000, 1, bias=False)
    run.begin(torch.nn.ModuleList([trained, frozen.requires_grad_(False)]), steps=2, save_every=10)


def work(run: StageRun) -> None:
    """A stage in small: everything that a recipe asks of its run."""
    with run.phase("load"):
        pass
    begin(run)
    for step in (1, 2):
        with run.timed("time/update"):
            pass
        run.log({"train/loss": 1.0 / step}, step=step, tokens=100)
        run.checkpoints.step = step
    metrics = {"eval/loss": 0.5, "eval/ceiling": 0.9}
    run.log_final(metrics)
    run.show_samples(SAMPLES)
    with run.phase("publish"):
        write_model("weights", run.model_dir)
    finish(run, metrics)


def finish(run: StageRun, metrics: dict[str, float]) -> None:
    run.finish(
        base=BaseModel("base", None, "base-1"),
        tokenizer=FACTS,
        metrics=metrics,
        golden={},
        where={"dtype": "float32", "device": "cpu"},
        summary=[("held-out loss", "0.500")],
    )


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def finished(cfg: SFTStage, capfd: Any) -> Path:
    """The folder of a run that is done."""
    with open_run(cfg, splits()) as run:
        work(run)
    capfd.readouterr()
    return run.path


# ---------------------------------------------------------------- a run that is published


def test_what_a_stage_publishes_is_accepted_as_a_parent(cfg, finished):
    published = Registry(cfg.runs_dir).resolve("sft/tiny")
    assert published.model_dir == finished / "model"
    assert (published.model_dir / "model.safetensors").read_text() == "weights"
    assert Registry(cfg.runs_dir).verify("sft/tiny") == []


def test_the_manifest_tells_how_the_run_was_made(finished):
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["method"]["name"] == "lora"
    assert "4" in json.dumps(manifest["method"])  # its rank
    train, validation = manifest["data"]
    assert (train["rows"], train["dropped"]) == (5, {"bad row": 2})
    assert (validation["split"], validation["rows"]) == ("validation", 2)
    assert manifest["environment"]["seed"] == 3
    assert manifest["environment"]["zero_stage"] == 1
    assert manifest["metrics"] == {"eval/loss": 0.5, "eval/ceiling": 0.9}
    assert set(manifest["phases"]) == {"load", "publish", "total"}
    assert all(0.01 < phase["peak_memory_gb"] < 16 for phase in manifest["phases"].values())


def test_the_config_beside_it_can_be_read_back(finished):
    from omegaconf import OmegaConf

    read = OmegaConf.load(finished / "config.yaml")
    assert (read.run_name, read.method.rank, read.engine.zero_stage) == ("tiny", 4, 1)


def test_a_child_names_its_parent_in_the_adapter_chain(cfg, finished, tmp_path):
    sft = Registry(cfg.runs_dir).resolve("sft/tiny")
    cfg.run_name = "child"
    with open_run(cfg, splits(), {"policy": sft}) as run:
        work(run)
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["method"]["adapter_chain"] == ["sft/tiny"]
    assert [parent["role"] for parent in manifest["parents"]] == ["policy"]


def test_the_closing_table_goes_to_stdout_with_numbers_cost_and_place(cfg, capfd):
    with open_run(cfg, splits()) as run:
        work(run)
    out, err = capfd.readouterr()
    assert "held-out loss" in out
    assert "peak memory" in out
    assert str(run.path).replace("\n", "")[-12:] in out
    assert "5 rows (2 dropped: bad row)" in err
    assert "training 10 of 1,010 parameters, method=lora" in err


# ---------------------------------------------------------------- numbers


def test_numbers_reach_metrics_jsonl_and_unknown_names_do_not(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/loss"] for line in lines[:2]] == [1.0, 0.5]
    assert lines[-1]["eval/loss"] == 0.5
    assert not any("eval/ceiling" in line for line in lines)


class Recorder:
    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []
        self.names: set[str] = set()

    def log(self, numbers: dict[str, float], *, step: int) -> None:
        self.lines.append(numbers)
        self.names |= numbers.keys()

    def summary(self, numbers: dict[str, float]) -> None:
        self.last = numbers


def test_seconds_add_up_within_a_step_and_start_anew_in_the_next(cfg, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("rlhf.stage_run.time.perf_counter", lambda: now[0])

    def spend(run: StageRun, name: str, seconds: float) -> None:
        with run.timed(name):
            now[0] += seconds

    tracker: Any = Recorder()
    with open_run(cfg, splits()) as run:
        run.tracker = tracker
        spend(run, "time/rollout", 2.0)
        spend(run, "time/update", 1.0)
        spend(run, "time/update", 1.0)
        now[0] += 6.0  # not in any block
        run.log({"train/loss": 1.0}, step=1, tokens=40)
        spend(run, "time/update", 5.0)
        run.log({}, step=2, tokens=40)
    first, second = tracker.lines
    assert (first["time/rollout"], first["time/update"], first["time/total"]) == (2.0, 2.0, 10.0)
    assert first["perf/tokens_per_second"] == 10.0
    assert first["train/loss"] == 1.0
    assert "time/rollout" not in second
    assert (second["time/update"], second["perf/tokens_per_second"]) == (5.0, 8.0)


def test_the_last_numbers_are_the_ones_that_dashboards_know(cfg):
    tracker: Any = Recorder()
    with open_run(cfg, splits()) as run:
        begin(run)
        run.checkpoints.step, run.tracker = 9, tracker
        run.log_final({"eval/gold": 0.7, "eval/ceiling": 0.9})
    assert tracker.lines == [{"eval/gold": 0.7}]
    assert tracker.last == {"eval/gold": 0.7}


def test_a_curve_is_not_given_the_number_of_an_earlier_better_step(cfg):
    tracker: Any = Recorder()
    with open_run(cfg, splits()) as run:
        begin(run)
        run.checkpoints.step, run.tracker = 9, tracker
        tracker.log({"eval/loss": 0.9}, step=9)
        run.log_final({"eval/loss": 0.5, "eval/gold": 0.7})
    assert tracker.lines == [{"eval/loss": 0.9}, {"eval/gold": 0.7}]
    assert tracker.last == {"eval/loss": 0.5, "eval/gold": 0.7}


def test_peak_memory_is_in_gigabytes():
    assert 0.01 < peak_memory_gb() < 16  # megabytes would be more, terabytes less


# ---------------------------------------------------------------- samples


def test_all_samples_are_kept_and_a_few_are_shown(finished, cfg, capfd):
    lines = (finished / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == SAMPLES
    assert "Grüße" in lines[0]  # readable as it stands
    cfg.run_name, cfg.evaluation.samples = "few", 2
    with open_run(cfg, splits()) as run:
        run.show_samples(SAMPLES)
    shown = "".join(capfd.readouterr())
    assert "question 1" in shown
    assert "question 2" not in shown


def test_no_samples_make_no_file(cfg):
    with open_run(cfg, splits()) as run:
        run.show_samples([])
        assert not (run.path / "samples.jsonl").exists()


# ---------------------------------------------------------------- again, and halfway


def test_a_finished_run_says_so_and_touches_nothing(cfg, finished, capfd):
    before = contents(Path(cfg.runs_dir))
    with open_run(cfg, splits()) as run:
        assert run.finished
    assert contents(Path(cfg.runs_dir)) == before
    out, err = capfd.readouterr()
    assert out == ""
    said = " ".join(err.split())
    assert "sft/tiny is finished with this config: nothing to do" in said
    assert "overwrite=true" in said
    assert "run_name=" in said
    assert "published:" in said


def test_another_config_under_the_same_name_is_refused(cfg, finished):
    before = contents(finished)
    cfg.seed = 4
    with pytest.raises(RegistryError, match="seed"), open_run(cfg, splits()):
        raise AssertionError("opened")
    assert contents(finished) == before


def test_overwrite_runs_again(cfg, finished):
    cfg.overwrite = True
    with open_run(cfg, splits()) as run:
        assert not run.finished
        assert not (finished / "manifest.json").exists()
        work(run)
    assert Registry(cfg.runs_dir).verify("sft/tiny") == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_breaks_off_is_not_published_and_can_be_started_again(cfg, error):
    def fail(run: StageRun) -> None:
        write_model("half of it", run.model_dir)
        raise error

    with pytest.raises(error), open_run(cfg, splits()) as run:
        fail(run)
    with pytest.raises(RegistryError, match="sft/tiny"):
        Registry(cfg.runs_dir).resolve("sft/tiny")
    with open_run(cfg, splits()) as run:
        assert not run.finished
        work(run)
    model = Registry(cfg.runs_dir).resolve("sft/tiny").model_dir / "model.safetensors"
    assert model.read_text() == "weights"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "somewhere"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["system", "library"],
)
def test_a_full_disk_is_named_wherever_it_shows(cfg, error):
    with pytest.raises(RegistryError) as caught, open_run(cfg, splits()):
        raise error
    assert "sft/tiny: its files are not written: " in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert "the same command goes on" in str(caught.value)


def test_any_disk_that_is_full_is_named_whatever_a_library_says(cfg, monkeypatch):
    monkeypatch.setattr("rlhf.run.free_bytes", lambda path: 0)
    with pytest.raises(RegistryError, match="No space left"), open_run(cfg, splits()):
        raise RuntimeError("[enforce fail at inline_container.cc:664] unexpected pos 64 vs 0")


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file", "rows"), KeyError("x")])
def test_other_errors_stay_what_they_are(cfg, error):
    with pytest.raises(type(error)), open_run(cfg, splits()):
        raise error


# ---------------------------------------------------------------- the report


def test_a_report_is_left_beside_the_manifest(cfg, finished):
    html = (finished / "report.html").read_text(encoding="utf-8")
    assert "train/loss" in html
    assert ">finished<" in html
    assert Registry(cfg.runs_dir).verify("sft/tiny") == []


def test_a_run_is_as_good_without_a_report(cfg, monkeypatch, capfd):
    def fail(*given: object) -> None:
        raise RuntimeError("a plot too many")

    monkeypatch.setattr("rlhf.report.page.build", fail)
    with open_run(cfg, splits()) as run:
        work(run)
    assert Registry(cfg.runs_dir).resolve("sft/tiny").manifest.metrics["eval/loss"] == 0.5
    assert not (run.path / "report.html").exists()
    assert "no report.html (a plot too many)" in "".join(capfd.readouterr())


def test_a_run_that_a_guard_stopped_early_leaves_a_report_of_what_led_to_it(cfg):
    def stop() -> None:
        begin(run)
        for step in (1, 2):
            run.log({"train/loss": float(step)}, step=step, tokens=1)
        raise StoppedByGuard("too much")

    with pytest.raises(StoppedByGuard), open_run(cfg, splits()) as run:
        stop()
    html = (run.path / "report.html").read_text(encoding="utf-8")
    assert "train/loss" in html
    assert ">unfinished<" in html


# ---------------------------------------------------------------- several processes


def test_every_process_but_the_main_one_writes_and_prints_nothing(cfg, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with open_run(cfg, splits()) as run:
        assert not run.finished
        begin(run)
        assert run.tracker is None
        with run.console.progress("sft", 2) as pace:
            pace.advance()
        work(run)
    assert capfd.readouterr() == ("", "")
    assert not Path(cfg.runs_dir).exists()


def test_every_process_leaves_a_finished_run(cfg, finished, monkeypatch, capfd):
    # One that went on alone would wait for the main process, which has left.
    monkeypatch.setenv("RANK", "1")
    before = contents(finished)
    with open_run(cfg, splits()) as run:
        assert run.finished
    cfg.overwrite = True
    with open_run(cfg, splits()) as run:
        assert not run.finished
    assert capfd.readouterr() == ("", "")
    assert contents(finished) == before


def test_the_main_process_of_two_writes_the_world_size(cfg, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with open_run(cfg, splits()) as run:
        work(run)
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["environment"]["world_size"] == 2


def test_a_file_that_cannot_be_written_whole_is_as_it_was(cfg, monkeypatch):
    with open_run(cfg, splits()) as run:
        run.write("course.json", "old")

        def full(number: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as disk:
            disk.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left"):
                run.write("course.json", "new")
        assert (run.path / "course.json").read_text() == "old"
