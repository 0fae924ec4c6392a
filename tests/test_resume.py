"""A stage that is stopped goes on where it was, and ends as if it had never been stopped."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_line import ROOT, SMALL, numbers, run_stage
from typer.testing import CliRunner

from rlhf import cli
from rlhf import state as state_module
from rlhf.checkpointing import Checkpoints
from rlhf.config import TemplateConfig
from rlhf.errors import RegistryError
from rlhf.manifest import step_name
from rlhf.registry import Registry
from rlhf.stage_run import StageRun
from rlhf.state import FILE
from rlhf.tracking import Tracker

DATA = {stage: given[0] for stage, given in SMALL.items()}  # few rows are held out
ROWS = ["train.max_steps=7", "train.epochs=3", "data.max_rows=48", "train.eval_every=5"]
SIZES = {  # three batches are an epoch; checkpoints only at a new best, at a stop, and at the end
    "sft": [DATA["sft"], *ROWS, "train.save_every=100", "evaluation.prompts=0"],
    "rm": [DATA["rm"], *ROWS, "train.save_every=100", "card.probe_pairs=8"],
    "ppo": [
        *SMALL["ppo"],
        "ppo.steps=4",
        "ppo.save_every=100",
        "ppo.eval_every=3",
        "ppo.kl_target=0.01",  # the price of KL moves from step to step
        "ppo.kl_horizon=20",
    ],
}
LAST = {"sft": 7, "rm": 7, "ppo": 4}
TRACKED = {
    "sft": ["run", "best", "trainer", "course", "evaluations"],
    "rm": ["run", "best", "trainer", "course", "evaluations"],
    "ppo": ["run", "best", "learner", "kl", "stopping", "course"],
}
# (asked at the log line of, stops after): TRL logs a step after it has looked at the signals.
STOPS = {
    "sft": ((1, 2), (3, 4), (5, 6)),
    "rm": ((1, 2), (3, 4), (5, 6)),
    "ppo": ((1, 1), (2, 2), (3, 3)),
}


def run(patch: pytest.MonkeyPatch, runs: Path, stage: str, *overrides: str) -> int:
    return run_stage(patch, stage, f"runs_dir={runs}", "tracking=off", *SIZES[stage], *overrides)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished line of work, never stopped."""
    runs = tmp_path_factory.mktemp("unbroken")
    save = Checkpoints.save

    def watching(checkpoints: Checkpoints) -> None:
        save(checkpoints)
        if checkpoints.step < checkpoints.total:
            return
        tracked, there = checkpoints.tracked, stateful()
        assert untracked(there, tracked, older) == []
        for name, one in tracked.items():  # it would be found
            others = {other: tracked[other] for other in tracked if other != name}
            assert untracked(there, others, older) == [type(one).__name__]
        seen.append(sorted(tracked))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", watching)
        for stage, names in TRACKED.items():
            older, seen = stateful(), []
            assert run(patch, runs, stage) == 0
            assert seen[-1] == sorted(names)
    return runs


def untracked(there: list[object], tracked: dict[str, object], older: list[object]) -> list[str]:
    """What of all that keeps a state was made since `older`, and is in no checkpoint."""
    known = {id(one) for one in (*tracked.values(), *older)}
    return [type(one).__name__ for one in there if id(one) not in known]


def stateful() -> list[object]:
    """Every object of ours that keeps a state; torch's modules are parts of such objects."""
    gc.collect()
    return [
        one
        for one in gc.get_objects()
        if str(type(one).__module__).startswith("rlhf.")
        and not isinstance(one, torch.nn.Module)
        and hasattr(type(one), "load_state_dict")
    ]


def state(runs: Path, stage: str, name: str) -> dict[str, Any]:
    """Of every tracked object, in the checkpoint of a run's last step; seconds left out."""
    folder = runs / stage / name / "checkpoints" / step_name(LAST[stage])
    found = json.loads((folder / FILE).read_text())["objects"]
    assert found["run"].pop("seconds")
    for one in found.values():
        for key, value in one.items():
            if isinstance(value, dict) and "in folder" in value:
                one[key] = files(folder / value["in folder"])
    return found


def files(folder: Path) -> dict[str, Any]:
    """What is in the files of a folder, by name."""

    def settings(path: Path) -> Any:
        found = json.loads(path.read_text())
        if isinstance(found, dict) and "target_modules" in found:  # a set: each process has its own
            found["target_modules"] = sorted(found["target_modules"])  # order
        return found

    read = {".safetensors": load_file, ".json": settings}
    read[".pt"] = read[".pth"] = lambda path: torch.load(path, weights_only=False)
    return {
        str(path.relative_to(folder)): read[path.suffix](path)
        for path in sorted(folder.rglob("*"))
        if path.suffix in read and path.name != "trainer_state.json"  # it has a clock in it
    }


def assert_equal(one: Any, other: Any, where: str) -> None:
    """To the bit, through dicts, lists and tensors."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for n, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}[{n}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, int | float | str | bool | None):
        assert one == other or one != one, where


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """A factory: from now on SIGTERM comes when a step's numbers are logged; which are listed."""
    log = Tracker.log

    def arm(place: int) -> list[int]:
        seen: list[int] = []

        def log_and_kill(self: Tracker, metrics: Any, *, step: int) -> None:
            log(self, metrics, step=step)
            if step == place and step not in seen:
                os.kill(os.getpid(), signal.SIGTERM)
            seen.append(step)

        monkeypatch.setattr(Tracker, "log", log_and_kill)
        return seen

    return arm


def weights(runs: Path, stage: str, name: str) -> dict[str, torch.Tensor]:
    out = {}
    for path in (runs / stage / name / "model").rglob("*.safetensors"):
        out |= {f"{path.name}/{key}": tensor for key, tensor in load_file(path).items()}
    return out


@pytest.mark.parametrize("stage", list(SIZES))
def test_a_stage_stopped_three_times_ends_as_the_unbroken_one(
    unbroken, stage, monkeypatch, stop_at, capfd
):
    before = 0
    for asked, place in STOPS[stage]:
        seen = stop_at(asked)
        assert run(monkeypatch, unbroken, stage, "run_name=broken") == 143
        said = " ".join(capfd.readouterr().err.split())
        assert f"asked to stop: checkpoint at step {place}" in said
        assert f"goes on from its checkpoint at step {before}" in said or before == 0
        assert set(range(before + 1, place + 1)) <= set(seen)
        assert min(seen) >= before, "not from zero"
        assert not (unbroken / stage / "broken" / "manifest.json").exists()
        before = place
    seen = stop_at(-1)
    assert run(monkeypatch, unbroken, stage, "run_name=broken") == 0
    assert min(seen) == before + 1
    assert numbers(unbroken, stage, "broken") == numbers(unbroken, stage)
    broken = weights(unbroken, stage, "broken")
    for name, tensor in weights(unbroken, stage, "tiny").items():
        assert torch.equal(broken[name], tensor), name
    assert_equal(state(unbroken, stage, "broken"), state(unbroken, stage, "tiny"), stage)
    registry = Registry(unbroken)
    assert registry.verify(f"{stage}/broken") == []
    ours, theirs = (registry.resolve(f"{stage}/{n}").manifest for n in ("broken", "tiny"))
    assert ours.metrics == pytest.approx(theirs.metrics, nan_ok=True)
    assert ours.model_is == theirs.model_is == "best"


@pytest.mark.parametrize("stage", list(SIZES))
def test_a_stage_stopped_after_its_last_step_does_not_train_again(
    unbroken, stage, monkeypatch, stop_at, capfd
):
    def stopped(self: StageRun, *args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(StageRun, "publish", stopped)
        assert run(patch, unbroken, stage, "run_name=late") == 143
    seen = stop_at(-1)
    assert run(monkeypatch, unbroken, stage, "run_name=late") == 0
    assert f"goes on from its checkpoint at step {LAST[stage]}" in capfd.readouterr().err
    assert set(seen) <= {LAST[stage]}
    assert numbers(unbroken, stage, "late") == numbers(unbroken, stage)
    late = weights(unbroken, stage, "late")
    for name, tensor in weights(unbroken, stage, "tiny").items():
        assert torch.equal(late[name], tensor), name


def test_the_price_of_kl_has_moved(unbroken):
    """Or the tests above could not tell whether it is kept."""
    prices = [line["objective/kl_coef"] for line in numbers(unbroken, "ppo")]
    assert len(set(prices)) > 2


def test_a_second_signal_stops_at_once_and_the_earlier_checkpoint_is_used(
    unbroken, monkeypatch, capfd
):
    """As with a killed process: what came after the checkpoint is done again."""
    log = Tracker.log

    def log_and_kill_twice(self: Tracker, metrics: Any, *, step: int) -> None:
        log(self, metrics, step=step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    overrides = ["run_name=twice", "ppo.save_every=2"]
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", log_and_kill_twice)
        assert run(patch, unbroken, "ppo", *overrides) == 143
    folders = sorted(p.name for p in (unbroken / "ppo/twice/checkpoints").iterdir())
    assert folders == ["step-000002"]
    assert run(monkeypatch, unbroken, "ppo", *overrides) == 0
    assert "goes on from its checkpoint at step 2" in capfd.readouterr().err
    assert numbers(unbroken, "ppo", "twice") == numbers(unbroken, "ppo")


def test_another_config_is_refused_while_half_way(unbroken, monkeypatch, stop_at, capfd):
    stop_at(2)
    assert run(monkeypatch, unbroken, "ppo", "run_name=half") == 143
    capfd.readouterr()
    assert run(monkeypatch, unbroken, "ppo", "run_name=half", "ppo.kl_coef=0.3") == 2
    said = capfd.readouterr().err
    assert "ppo/half was interrupted at step 2 with another config" in said
    assert "ppo.kl_coef: 0.1 -> 0.3" in said
    assert (unbroken / "ppo/half/checkpoints/step-000002/manifest.json").exists()


# ---------------------------------------------------------------- best, last, and steps


@pytest.fixture(scope="module")
def diverged(unbroken: Path) -> Path:
    """sft/wild: its held-out loss is lowest in the middle."""
    with pytest.MonkeyPatch.context() as patch:
        more = ["train.schedule=constant", "train.learning_rate=0.02", "keep_checkpoints=9"]
        wild = ["run_name=wild", *more, "train.eval_every=1", "train.save_every=1"]
        assert run(patch, unbroken, "sft", *wild) == 0
    return unbroken


def held_out_losses(runs: Path, name: str) -> dict[int, float]:
    lines = numbers(runs, "sft", name)
    found = {int(line["step"]): float(line["eval/loss"]) for line in lines if "eval/loss" in line}
    return {step: loss for step, loss in found.items() if step > 0}


def test_the_lowest_held_out_loss_is_published(diverged, capfd):
    losses = held_out_losses(diverged, "wild")
    lowest = min(losses.values())
    assert lowest < losses[7], "the last is the best: nothing could be told apart"
    manifest = Registry(diverged).resolve("sft/wild").manifest
    assert manifest.model_is == "best"
    assert manifest.metrics["eval/loss"] == lowest


def loss_of(published: Any) -> float:
    """Held-out loss of what a reference names, by the definition."""
    from rlhf import data, models, text
    from rlhf.config import DataConfig
    from rlhf.losses import logprobs_of

    cfg = DataConfig(
        DATA["sft"].removeprefix("data.path="), max_prompt_tokens=64, max_response_tokens=80
    )
    tokenizer = text.load_parent_tokenizer(published, template=TemplateConfig("inherit"))
    rows = text.Renderer(tokenizer).sft(data.load("sft", cfg)["validation"], cfg)
    model = models.load_parent(models.load_causal, published, tokenizer, torch.float32).eval()
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logprobs = logprobs_of(model(ids).logits[:, :-1], ids[:, 1:])[0]
        mask = torch.tensor(row["completion_mask"][1:]).bool()
        total, count = total - float(logprobs[mask].sum()), count + int(mask.sum())
    return total / count


def test_each_checkpoint_loads_as_it_was_evaluated(diverged):
    """An adapter on the base it was trained on, in a child as in the run."""
    registry, losses = Registry(diverged), held_out_losses(diverged, "wild")
    best = min(losses, key=lambda step: losses[step])
    for reference, step in (
        ("sft/wild", best),
        ("sft/wild@best", best),
        ("sft/wild@last", 7),
        ("sft/wild@step-2", 2),
    ):
        found = loss_of(registry.resolve(reference, contents=True))
        assert found == pytest.approx(losses[step], abs=2e-4), reference


def test_a_reward_model_may_start_from_a_checkpoint(diverged, monkeypatch, capfd):
    overrides = ["run_name=early", "policy_from=sft/wild@step-2", "train.max_steps=1"]
    assert run(monkeypatch, diverged, "rm", *overrides) == 0
    said = " ".join(capfd.readouterr().err.split())
    assert "sft/wild@step-000002: a checkpoint, without golden values" in said
    (parent,) = Registry(diverged).resolve("rm/early").manifest.parents
    assert parent.reference == "sft/wild@step-000002"


def test_ppo_publishes_the_best_within_the_kl_budget(unbroken, monkeypatch):
    given = ["seed=1", "ppo.eval_every=1", "data.gold=null"]
    assert run(monkeypatch, unbroken, "ppo", "run_name=free", *given) == 0
    lines = numbers(unbroken, "ppo", "free")
    best = max(lines, key=lambda line: line["eval/score"])
    manifest = Registry(unbroken).resolve("ppo/free").manifest
    assert manifest.model_is == "best"
    assert manifest.metrics["eval/score"] == pytest.approx(best["eval/score"], abs=1e-4)

    budget = best["eval/kl"] - 1e-3  # which the best one is beyond
    allowed = [line for line in lines if line["eval/kl"] <= budget]
    expected = max(allowed, key=lambda line: line["eval/score"]) if allowed else lines[-1]
    assert budget > 0, "pick another seed"
    given += [f"ppo.kl_budget={budget}", "stop.patience=9"]  # it is not to stop
    assert run(monkeypatch, unbroken, "ppo", "run_name=budget", *given) == 0
    manifest = Registry(unbroken).resolve("ppo/budget").manifest
    assert manifest.model_is == ("best" if allowed else "last")
    assert manifest.metrics["eval/score"] == pytest.approx(expected["eval/score"], abs=1e-4)


# ---------------------------------------------------------------- stopped by a guard


def cli_text(runs: Path, *arguments: str) -> str:
    return CliRunner().invoke(cli.app, [*arguments, "--runs-dir", str(runs)]).stdout


def test_a_stopped_run_publishes_its_best_and_says_why(unbroken, monkeypatch, capfd):
    """stop.ratio is so low that every update breaks it, and three in a row stop the run."""
    rule = ["stop.ratio=1.000001", "stop.patience=3", "ppo.eval_every=1"]
    assert run(monkeypatch, unbroken, "ppo", "run_name=halted", *rule) == 3
    said = capfd.readouterr().err
    assert "stopped: ratio explosion: one update changes a token's probability by a factor" in said
    assert "Likely causes:" in said
    assert "stopped by a guard: publishing the best, step-00000" in said
    manifest = Registry(unbroken).resolve("ppo/halted", contents=True).manifest
    assert manifest.model_is == "best"
    assert "ratio explosion" in (manifest.stopped or "")
    lines = numbers(unbroken, "ppo", "halted")
    assert [line["step"] for line in lines] == [1, 2]
    best = max(lines, key=lambda line: line["eval/gold"])
    assert manifest.metrics["eval/gold"] == pytest.approx(best["eval/gold"], abs=1e-4)
    dump = unbroken / "ppo/halted/stopped/step-000003"
    assert {path.name for path in dump.iterdir()} == {"why.txt", "batch.jsonl", "steps.jsonl"}

    assert run(monkeypatch, unbroken, "ppo", "run_name=halted", *rule) == 3, "nothing to do"
    said = capfd.readouterr().err
    assert "is finished with this config: nothing to do" in said
    assert "stopped: ratio explosion" in said
    assert cli_text(unbroken, "show", "ppo/halted").count("ratio explosion") == 1
    assert "stopped" in cli_text(unbroken, "ls")


def test_a_run_without_a_best_step_publishes_nothing(unbroken, monkeypatch, capfd):
    rule = ["stop.ratio=1.000001", "stop.patience=1", "ppo.eval_every=1", "run_name=none"]
    assert run(monkeypatch, unbroken, "ppo", *rule) == 3
    said = capfd.readouterr().err
    assert "stopped: ratio explosion" in said
    with pytest.raises(RegistryError, match="unfinished"):
        Registry(unbroken).resolve("ppo/none")
    assert (unbroken / "ppo/none/stopped").is_dir()


def test_the_watch_goes_on_where_it_was(unbroken, monkeypatch, stop_at, capfd):
    """Interrupted after the second strike: the third one stops it."""
    rule = ["stop.ratio=1.000001", "stop.patience=3", "ppo.eval_every=1", "run_name=again"]
    stop_at(2)
    assert run(monkeypatch, unbroken, "ppo", *rule) == 143
    assert run(monkeypatch, unbroken, "ppo", *rule) == 3
    assert "for 3 steps" in (Registry(unbroken).resolve("ppo/again").manifest.stopped or "")


def test_ptx_mixes_in_the_rows_of_sft(unbroken, monkeypatch, capfd):
    given = ["ppo.ptx_coef=0.5", "ppo.steps=2", "run_name=ptx"]
    assert run(monkeypatch, unbroken, "ppo", *given) == 0
    lines = numbers(unbroken, "ppo", "ptx")
    assert all(line["loss/ptx"] > 0 for line in lines)
    facts = {part.split: part for part in Registry(unbroken).resolve("ppo/ptx").manifest.data}
    assert facts["ptx"].source == DATA["sft"].removeprefix("data.path=") + "/train.jsonl"
    assert facts["ptx"].rows > 100


def test_the_proofs_are_printed_and_logged(unbroken, monkeypatch, capfd):
    assert run(monkeypatch, unbroken, "ppo", "ppo.steps=1", "run_name=proved") == 0
    said = " ".join(capfd.readouterr().err.split())
    for proof in (
        "text: padding '<pad>' is not the end",
        "the policy read '",
        "(golden logits differ by",
        "before the first update: |KL(policy, reference)| <= ",
        "after the first update: reference, rm/tiny unmoved, in reach of no gradient",
    ):
        assert proof in said, proof
    (line,) = numbers(unbroken, "ppo", "proved")
    assert 0 <= line["proof/kl"] <= 1e-5
    assert 0 < line["proof/ratio"] <= 1e-4
    log = (unbroken / "ppo/proved/log.txt").read_text()
    assert "after the first update: reference, rm/tiny unmoved" in log


def test_a_checkpoint_of_an_earlier_version_is_refused_before_anything_is_loaded(
    unbroken, monkeypatch, stop_at, capfd
):
    def earlier(checkpoint: Path) -> None:
        raise RegistryError(f"{checkpoint}: of version 1")

    stop_at(2)
    assert run(monkeypatch, unbroken, "ppo", "run_name=earlier") == 143
    monkeypatch.setattr(state_module, "read_file", earlier)
    monkeypatch.setattr(StageRun, "loading", None)
    capfd.readouterr()
    assert run(monkeypatch, unbroken, "ppo", "run_name=earlier") == 2
    said = capfd.readouterr().err
    assert "refused: " in said
    assert "ppo/earlier/checkpoints/step-000002: of version 1" in said
    assert (unbroken / "ppo/earlier/checkpoints/step-000002/manifest.json").exists()


# two processes -----------------------------------------------------------------------------------


def start_two(runs: Path, stage: str, name: str) -> subprocess.Popen[str]:
    """A stage as a user starts it, on two processes."""
    command = [sys.executable, f"stages/{stage}.py", f"runs_dir={runs}", "tracking=off"]
    return subprocess.Popen(
        [*command, *SIZES[stage], "run=tiny", f"run_name={name}"],
        cwd=ROOT,
        env=os.environ | {"NPROC": "2"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def unbroken_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("two")
    for stage in SIZES:
        process = start_two(runs, stage, "tiny")
        assert process.wait() == 0, process.communicate()[1]
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("stage", list(SIZES))
def test_two_processes_that_were_stopped_end_bit_for_bit_as_unbroken_ones(unbroken_two, stage):
    process = start_two(unbroken_two, stage, "broken")
    log = unbroken_two / stage / "broken" / "metrics.jsonl"
    while process.poll() is None:
        steps = log.read_text().splitlines() if log.exists() else []
        if steps and steps[-1].endswith("}") and json.loads(steps[-1])["step"] >= 1:
            process.terminate()
            break
        time.sleep(0.02)
    said = process.communicate()[1]
    assert process.returncode == 143, said
    assert "asked to stop: checkpoint at step" in said
    process = start_two(unbroken_two, stage, "broken")
    said = process.communicate()[1]
    assert process.returncode == 0, said
    assert "goes on from its checkpoint at step" in said
    assert numbers(unbroken_two, stage, "broken") == numbers(unbroken_two, stage)
    broken = weights(unbroken_two, stage, "broken")
    whole = weights(unbroken_two, stage, "tiny")
    assert broken.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(broken[name], tensor), name
    assert_equal(state(unbroken_two, stage, "broken"), state(unbroken_two, stage, "tiny"), stage)
