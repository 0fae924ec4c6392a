"""A run that one number of processes began and another one ends is the run that was never stopped.

One launch ends a stage and begins the next one, under every engine, since loading libraries costs
more than the few steps that are compared.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
from pathlib import Path

import pytest
from launching import start_ranks
from small_line import ROOT, numbers, run_stage
from test_matrix import SIZES, worst

STAGES = list(SIZES)
ENGINES = {"full": (0, 1, 2, 3), "lora": (0, 2, 3)}
STOP = {"sft": 2, "rm": 2, "ppo": 2}


def work(folder: Path, method: str, ends: str, begins: str, *engines: str) -> None:
    """One process: goes on with the stage `ends`, then begins `begins` and is stopped in it."""
    from rlhf import engine
    from rlhf.tracking import Tracker

    log = Tracker.log
    stop: list[int] = []

    def log_and_stop(self: Tracker, metrics, *, step: int) -> None:
        log(self, metrics, step=step)
        if step in stop:
            stop.clear()
            os.kill(os.getpid(), signal.SIGTERM)

    Tracker.log = log_and_stop
    for zero in engines or ENGINES[method]:
        for stage in (ends, begins):
            if stage == "-":
                continue
            # TRL logs a step after it has looked at the signals: it stops at the next one.
            stop[:] = [STOP[stage] - (stage != "ppo")] if stage == begins else []
            given = [f"runs_dir={folder}/zero{zero}", "tracking=off", f"method={method}"]
            given += [f"engine=zero{zero}", "engine.partition_threshold=0", *SIZES[stage]]
            given += ["engine.allow_zero3_adapters=true"]
            sys.argv = [f"stages/{stage}.py", *given]
            with contextlib.suppress(SystemExit):
                runpy.run_path(str(ROOT / "stages" / f"{stage}.py"), run_name="__main__")
            engine.barrier()
            finished = (folder / f"zero{zero}" / stage / "tiny/manifest.json").exists()
            assert finished is (stage == ends), (stage, zero)
            assert not list((folder / f"zero{zero}" / stage).rglob("*.tmp"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[str, Path]:
    """method -> line of work by one process, ZeRO-2."""
    place = tmp_path_factory.mktemp("unbroken")
    for method in ENGINES:
        for stage in STAGES:
            given = ["tracking=off", f"runs_dir={place / method}", f"method={method}"]
            code = os.spawnv(
                os.P_WAIT,
                sys.executable,
                [sys.executable, str(ROOT / "stages" / f"{stage}.py"), *given, *SIZES[stage]],
            )
            assert code == 0
    return {method: place / method for method in ENGINES}


@pytest.fixture(scope="module", params=[(2, 1), (1, 2)], ids=["two, one", "one, two"])
def broken(request, tmp_path_factory) -> dict[str, Path]:
    """method -> folder with a line under each engine: each stage begun by one, ended by another."""
    place = tmp_path_factory.mktemp(f"broken{request.param[0]}")
    for method in ENGINES:
        turns = zip(["-", *STAGES], [*STAGES, "-"], strict=True)
        for turn, (ends, begins) in enumerate(turns):
            processes = request.param[turn % 2]
            said = start_ranks(processes, __file__, str(place / method), method, ends, begins)
            sharded = sum(zero > 0 for zero in ENGINES[method])
            assert said[0].count("converting it for") == (0 if ends == "-" else sharded)
    return {method: place / method for method in ENGINES}


CASES = [(method, zero) for method, engines in ENGINES.items() for zero in engines]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "zero"), CASES)
def test_a_run_goes_on_with_another_number_of_processes(unbroken, broken, method, zero, capsys):
    names = {
        "sft": ("train/loss", "train/grad_norm", "eval/loss"),
        "rm": ("train/loss", "train/grad_norm", "train/accuracy", "eval/loss"),
        "ppo": ("loss/policy", "loss/value", "policy/grad_norm", "objective/scores"),
    }
    for stage in STAGES:
        expected = numbers(unbroken[method], stage)
        found = numbers(broken[method] / f"zero{zero}", stage)
        off = worst(expected, found, names[stage])
        with capsys.disabled():
            print(f"\n{stage} {method} zero{zero}: {off:.1e}")
        assert off < 1e-4


def test_one_process_ends_what_two_began(tmp_path, monkeypatch, capfd):
    """The quick part of the above: adapters, by the Trainer, ZeRO-2."""
    start_ranks(2, __file__, str(tmp_path), "lora", "-", "sft", "2")
    fixed = ["tracking=off", "engine=zero2", *SIZES["sft"]]
    engine_options = ["engine.partition_threshold=0", "engine.allow_zero3_adapters=true"]
    here = [f"runs_dir={tmp_path / 'zero2'}", *fixed, *engine_options]
    assert run_stage(monkeypatch, "sft", *here) == 0
    said = " ".join(capfd.readouterr().err.split())
    assert "goes on from its checkpoint at step 2" in said
    assert "made by 2 processes, each with a part of the optimizer's state" in said
    assert not list(tmp_path.rglob("*.tmp"))
    assert run_stage(monkeypatch, "sft", f"runs_dir={tmp_path / 'alone'}", *fixed) == 0
    expected, found = (numbers(tmp_path / name, "sft") for name in ("alone", "zero2"))
    assert worst(expected, found, ("train/loss", "train/grad_norm", "eval/loss")) < 1e-4


if __name__ == "__main__":
    work(Path(sys.argv[1]), *sys.argv[2:])
