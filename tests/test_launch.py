"""From a command line to an exit code: refusals, sweeps, several processes, signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf import interrupts, launch
from rlhf.config import PROJECT, RUN_NAME
from rlhf.errors import ConfigError, DataError, RegistryError, ShapeError, StoppedByGuard
from rlhf.ranks import (
    LAUNCHED,
    PARENT,
    adopt_launcher,
    first_host,
    rows_per_pass,
    slurm_port,
)

EMPTY_ANSWER = (
    '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]}'
)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder, and this process's signals and variables as they were afterwards."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    slurm = [name for name in os.environ if name.startswith("SLURM_")]
    for name in ("HYDRA_FULL_ERROR", "OMP_WAIT_POLICY", "NPROC", PARENT, *LAUNCHED, *slurm):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def composed() -> Any:
    """The ppo stage as it is: composing costs a quarter of a second, so it is done once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ppo.py"])
        return launch.compose("ppo")


@pytest.fixture
def run(composed: Any) -> Callable[..., int]:
    """`run(main, "ppo.steps=3")`: the exit code of a ppo stage whose recipe is `main`."""

    def one(main: Callable[[Any], None], *arguments: str) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["ppo.py", *arguments])
            if not arguments:
                patch.setattr(launch, "compose", lambda name: composed)
            return launch._run("ppo", main)

    return one


def never(cfg: object) -> None:
    raise AssertionError("the recipe was reached")


def nothing(cfg: object) -> None:
    pass


# ---------------------------------------------------------------- the real command, from outside


def stage_command(name: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROJECT / "stages" / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | env,
        check=False,
    )


def expect_refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    """Exit code 2, one message, no traceback, nothing written."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("refused: ")
    assert done.stderr.count("refused:") == 1
    assert "Traceback" not in done.stderr
    assert "Error:" not in done.stderr
    assert re.search(message, done.stderr), done.stderr
    left = [str(path) for path in Path().rglob("*") if not path.name.startswith("given")]
    assert left == []


@pytest.mark.parametrize(
    ("stage", "arguments", "message"),
    [
        ("ppo", ["ppo.kl_coeff=0.1"], r"ppo\.kl_coeff: .* Did you mean ppo\.kl_coef"),
        ("rm", ["++train.epoch=1"], r"train\.epoch: .* Did you mean train\.epochs"),
        ("sft", ["train.epochs=many"], r"train\.epochs: Value 'many'"),
        ("sft", ["experiment=none"], r"data\.path, model\.path: not set"),
        ("ppo", ["run_name=a/b"], r"run_name='a/b': cannot name a run"),
        ("ppo", ["ppo.kl_coef=[1"], r"given: ppo\.kl_coef=\[1"),
        ("ppo", ["-m", "ppo.kl_coef=[1,2"], r"-m: .* Given: ppo\.kl_coef=\[1,2"),
        ("rm", ["run=nobody"], r"sft/nobody: no such run .* `make sft RUN=nobody` makes it"),
        ("ppo", [], r"sft/tiny"),
        ("sft", ["data.path=given-nothing"], r"data\.path=given-nothing: no data there"),
        (
            "sft",
            ["data.path=given-rows.jsonl", "data.gold=given.py:gold"],
            r"data\.gold=given\.py:gold: no file given\.py",
        ),
        ("sft", ["data.path=given.jsonl"], r"given\.jsonl:1: messages ends with an empty assist"),
        (
            "sft",
            ["data.path=given-rows.jsonl", "runs_dir=given.jsonl"],
            r"runs_dir=given\.jsonl: cannot be written",
        ),  # a file where a folder should be
    ],
)
def test_bad_input_is_refused_with_one_message_and_leaves_nothing(stage, arguments, message):
    Path("given.jsonl").write_text(EMPTY_ANSWER)
    rows = [EMPTY_ANSWER.replace("Hi", f"Hi {n}").replace('""', '"Yes."') for n in range(50)]
    Path("given-rows.jsonl").write_text("\n".join(rows))
    expect_refused(stage_command(stage, *arguments), message)
    assert Path("given.jsonl").read_text() == EMPTY_ANSWER


def test_a_refused_command_for_several_processes_speaks_once():
    done = stage_command("ppo", "ppo.steps=0", NPROC="2")
    expect_refused(done, r"ppo\.steps=0: must be a number above 0")


def test_a_sweep_of_what_is_refused_starts_every_child_and_returns_2():
    done = stage_command("ppo", "-m", "engine=zero3,zero3_offload", "ppo.steps=3")
    assert done.returncode == 2
    assert done.stderr.count("refused: [zero3-adapter]") == 2
    assert "run_name='${run}-engine=zero3_offload'" in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir() == []


# ---------------------------------------------------------------- exit codes


def test_a_recipe_that_ends_is_0_and_sees_a_plain_checked_config(run):
    seen = []
    assert run(seen.append, "ppo.steps=3") == 0
    assert seen[0].ppo.steps == 3
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert os.listdir() == []


def test_a_waiting_policy_that_is_set_stays(run, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert run(nothing) == 0
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.parametrize("kind", [ConfigError, DataError, RegistryError, ShapeError])
def test_what_is_refused_is_2_and_its_message_alone(run, capsys, kind):
    def main(cfg: object) -> None:
        raise kind("a setting: why. What to do.")

    assert run(main) == 2
    assert capsys.readouterr() == ("", "refused: a setting: why. What to do.\n")


def test_a_run_time_guard_is_3(run, capsys):
    def main(cfg: object) -> None:
        raise StoppedByGuard("the loss is not a number")

    assert run(main) == 3
    assert "stopped: the loss is not a number" in capsys.readouterr().err


def test_an_interrupt_is_130(run, capsys):
    # A shell that started this test run in the background has it ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def main(cfg: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    try:
        assert run(main) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "The same command goes on from the last checkpoint" in capsys.readouterr().err


def test_termination_is_143_and_leaves_with_blocks_in_order(run, capsys):
    left = []

    def main(cfg: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except Exception:  # what a library might do
            left.append("caught")
        finally:
            left.append("in order")

    assert run(main) == 143
    assert left == ["in order"]
    assert "The same command goes on from the last checkpoint" in capsys.readouterr().err


def test_a_crash_stays_a_crash(run):
    def main(cfg: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main)


def test_the_decorated_recipe_ends_the_process_with_its_code(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ppo.py", "ppo.steps=0"])
    with pytest.raises(SystemExit) as caught:
        launch.stage("ppo")(never)()
    assert caught.value.code == 2


def test_a_guard_speaks_before_the_recipe_starts(run, capsys):
    assert run(never, "engine=zero3") == 2
    assert "[zero3-adapter]" in capsys.readouterr().err


def test_showing_the_config_runs_nothing(run, capsys):
    assert run(never, "--cfg", "job", "ppo.steps=17") == 0
    assert "steps: 17" in capsys.readouterr().out
    assert os.listdir() == []


# ---------------------------------------------------------------- who speaks, of several ranks


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[float]]:
    """`as_rank(1)`: this process is rank 1 of 2; how long it waited for another one to speak.

    While it waits its launcher tells it to end (`told`), or rank 0 fails.
    """

    def be(rank: int, *, told: bool = False, failed: bool = False) -> list[float]:
        values = (str(rank), str(rank), "2", "127.0.0.1", "29500")
        for name, value in zip(LAUNCHED, values, strict=True):
            monkeypatch.setenv(name, value)
        waits: list[float] = []

        def wait(seconds: float) -> bool:
            waits.append(seconds)
            if told:
                raise interrupts.Terminated
            return failed

        monkeypatch.setattr(launch.lifeline.main_failed, "wait", wait)
        return waits

    return be


def test_what_every_rank_refuses_rank_0_says(run, capsys, as_rank):
    for why in ("told", "failed"):
        waits = as_rank(1, **{why: True})
        assert run(never, "ppo.steps=0") == 2
        assert waits == [launch.PATIENCE]
        assert capsys.readouterr() == ("", "")
    waits = as_rank(0, told=True)
    assert run(never, "ppo.steps=0") == 2
    assert waits == []
    assert capsys.readouterr().err.startswith("refused: ppo.steps=0")


@pytest.mark.parametrize(("error", "code"), [(ConfigError("mine."), 2), (StoppedByGuard("it."), 3)])
def test_what_one_rank_alone_finds_out_is_not_lost(run, capsys, as_rank, error, code):
    def main(cfg: object) -> None:
        raise error

    as_rank(1)
    assert run(main) == code
    said = capsys.readouterr().err
    assert re.fullmatch(rf"\[rank 1 of 2 on \S+\] \w+: {error}\n", said), said


@pytest.mark.parametrize("where", ["world_size", "is_main"])
def test_a_rank_that_is_told_again_while_it_leaves_shows_no_traceback(
    composed, capsys, as_rank, monkeypatch, where
):
    """The launcher hands a Ctrl-C on to a rank that had it from the terminal and is on its way."""

    def main(cfg: object) -> None:
        inner = getattr(launch.ranks, where)
        told = iter([True])

        def and_told_again() -> object:
            if next(told, False):
                os.kill(os.getpid(), signal.SIGTERM)
            return inner()

        monkeypatch.setattr(launch.ranks, where, and_told_again)
        raise KeyboardInterrupt

    as_rank(1)
    monkeypatch.setattr(sys, "argv", ["ppo.py"])
    monkeypatch.setattr(launch, "compose", lambda name: composed)
    with pytest.raises(SystemExit) as ended:
        launch.stage("ppo")(main)()
    assert ended.value.code == (130 if where == "world_size" else 143)
    assert capsys.readouterr().err == ""


def test_a_crash_of_another_rank_is_shown_unless_rank_0_crashed_too(run, as_rank):
    def main(cfg: object) -> None:
        raise ZeroDivisionError

    as_rank(1)
    with pytest.raises(ZeroDivisionError):
        run(main)
    as_rank(1, told=True)
    assert run(main) == 1


GLOO = (
    "[/a/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:9: Connection reset by peer. This "
    "is typically caused by a remote worker hanging."
)


def test_a_rank_that_lost_another_says_so_without_a_traceback(run, capsys, as_rank, monkeypatch):
    def main(cfg: object) -> None:
        raise RuntimeError(GLOO)

    as_rank(0)
    assert run(main) == 1
    said = capsys.readouterr().err
    reason = "Read error [127.0.0.1]:9: Connection reset by peer"
    start = f"\nlost: another process has ended or is out of reach ({reason}). What it said stands"
    assert said.startswith(start)
    assert "The same command goes on from the last checkpoint" in said
    as_rank(1, told=True)
    assert run(main) == 1
    monkeypatch.setenv(PARENT, "1")  # the one that started it says which one was lost
    as_rank(0, told=True)
    assert run(main) == 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["[enforce fail at /a/gloo/transport/tcp/pair.cc:4] x", "gloo"])
def test_a_mistake_in_a_collective_call_stays_a_crash(run, as_rank, text):
    def main(cfg: object) -> None:
        raise RuntimeError(text)

    as_rank(0)
    with pytest.raises(RuntimeError):
        run(main)


def test_only_rank_0_says_that_it_was_interrupted(run, capsys, as_rank):
    def main(cfg: object) -> None:
        raise KeyboardInterrupt

    waits = as_rank(1)
    assert run(main) == 130
    assert (capsys.readouterr().err, waits) == ("", [])


# ---------------------------------------------------------------- launchers

TORCHRUN = dict(zip(LAUNCHED, ("1", "1", "2", "node-a", "29500"), strict=True))
SRUN = {
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


@pytest.mark.parametrize(
    "environment",
    [{}, TORCHRUN, {"WORLD_SIZE": "1"}, {"RANK": "0"}, {"SLURM_NTASKS": "1"}, TORCHRUN | SRUN],
)
def test_what_is_complete_is_left_as_it_is(environment):
    given = dict(environment)
    adopt_launcher(1, given)
    assert given == environment


def test_the_tasks_of_srun_find_each_other():
    given = dict(SRUN)
    adopt_launcher(1, given)
    assert {name: given[name] for name in LAUNCHED} == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(15000 + 31 * 71 + 2),
    }
    given = SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4711"}
    adopt_launcher(1, given)
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("10.0.0.1", "4711")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a1", "a1"),
        ("a1,b2", "a1"),
        ("gpu[007-009,12],b", "gpu007"),
        ("n[3,5]-ib", "n3-ib"),
        ("rack-2-n[10-11]", "rack-2-n10"),
        ("", ""),
    ],
)
def test_the_first_machine_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_ports_of_a_job_are_below_those_that_are_given_out():
    ports = [slurm_port(job, step) for job in (1, 71, 99_999_999) for step in range(20)]
    assert len(set(ports)) == len(ports)
    assert all(15000 <= port < 30000 for port in ports)


@pytest.mark.parametrize(
    ("processes", "environment", "message"),
    [
        (1, {"WORLD_SIZE": "2"}, r"WORLD_SIZE=2, but RANK is not set: .* torchrun"),
        (1, TORCHRUN | {"MASTER_ADDR": ""}, r"WORLD_SIZE=2, but MASTER_ADDR not set: the 2 proc"),
        (1, {"RANK": "0", "WORLD_SIZE": "2"}, r"LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"),
        (1, TORCHRUN | {"RANK": "2"}, r"RANK=2 with WORLD_SIZE=2: ranks count from 0"),
        (1, TORCHRUN | {"RANK": "x"}, r"RANK=x: it is a number"),
        (2, TORCHRUN, r"NPROC=2 with RANK=1: .* Leave NPROC out"),
        (1, {"SLURM_NTASKS": "4"}, r"SLURM_NTASKS=4, but .* `srun python \.\.\.`"),
        (2, SRUN, r"NPROC=2 with SLURM_STEP_NUM_TASKS=4: .* Leave NPROC out"),
        (1, SRUN | {"SLURM_STEP_NODELIST": ""}, r"WORLD_SIZE=4, but MASTER_ADDR not set"),
    ],
)
def test_a_launch_that_cannot_work_is_refused(processes, environment, message):
    with pytest.raises(ConfigError, match=message):
        adopt_launcher(processes, dict(environment))


def test_nproc_in_an_allocation_is_what_was_asked_for():
    adopt_launcher(2, given := {"SLURM_NTASKS": "4"})
    assert given == {"SLURM_NTASKS": "4"}
    adopt_launcher(2, given := SRUN | {"SLURM_STEP_NUM_TASKS": "1"})
    assert "RANK" not in given


def test_a_stage_is_not_started_twice_over(run, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert run(never) == 2
    assert "SLURM_NTASKS=4, but this process was not started by srun" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--local_rank=1", "--local-rank=0"])
def test_an_old_launchers_flag_is_no_override(run, flag):
    seen = []
    assert run(seen.append, flag, "ppo.steps=3") == 0
    assert seen[0].ppo.steps == 3
    assert flag not in sys.argv


def test_ranks_do_not_sweep(run, capsys, as_rank):
    as_rank(0)
    assert run(never, "-m", "seed=1,2") == 2
    assert "-m with WORLD_SIZE=2: every rank would sweep by itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "at_most", "size"),
    [(16, 16, 16), (8, 16, 8), (16, 6, 4), (12, 8, 6), (17, 16, 1), (17, 17, 17), (5, 1, 1)],
)
def test_a_forward_pass_is_the_largest_part_that_divides_the_rows(rows, at_most, size):
    assert rows_per_pass(rows, at_most) == size


# ---------------------------------------------------------------- several processes


def test_nproc_starts_ranks_and_returns_their_code(run, monkeypatch):
    asked = []
    monkeypatch.setattr(launch, "start_ranks", lambda count: asked.append(count) or 7)
    monkeypatch.setenv("NPROC", "4")
    assert run(never) == 7
    assert run(never, "ppo.steps=0") == 2  # refused before a rank is started
    assert asked == [4]
    monkeypatch.setenv("RANK", "0")  # this is a rank already
    assert run(never) == 2
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("NPROC", "1")
    assert run(nothing) == 0
    assert asked == [4]


@pytest.mark.parametrize("value", ["two", "0", "-1", "1.5"])
def test_an_nproc_that_counts_nothing_is_refused(run, capsys, monkeypatch, value):
    monkeypatch.setenv("NPROC", value)
    assert run(never) == 2
    assert f"NPROC={value}: it is the number of processes" in capsys.readouterr().err


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """`ranks(code)`: two ranks of a script; `rank`, and a folder `out`, are at hand in it."""

    def start(code: str) -> int:
        script = tmp_path / "script.py"
        script.write_text(
            "import os, pathlib, signal, sys, time\n"
            f"out = pathlib.Path({str(tmp_path)!r})\n"
            "rank = int(os.environ['RANK'])\n"
            "(out / f'new{rank}').write_text(str(os.getpid()))\n"
            "(out / f'new{rank}').rename(out / f'pid{rank}')\n"  # there all at once
            "def wait_for(name):\n"
            "    while not (out / name).exists():\n"
            "        time.sleep(0.01)\n" + code
        )
        monkeypatch.setattr(sys, "argv", [str(script), "ppo.steps=3", "run=a b"])
        return launch.start_ranks(2)

    return start


def gone(tmp_path: Path, rank: int) -> bool:
    try:
        os.kill(int((tmp_path / f"pid{rank}").read_text()), 0)
    except ProcessLookupError:
        return True
    return False


def test_ranks_get_their_place_and_the_same_command(ranks, tmp_path):
    code = (
        "import json\n"
        "names = ['RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR',\n"
        "         'MASTER_PORT', 'NPROC', 'RLHF_PARENT']\n"
        "found = {name: os.environ[name] for name in names} | {'arguments': sys.argv[1:]}\n"
        "(out / f'{rank}.json').write_text(json.dumps(found))\n"
    )
    assert ranks(code) == 0
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert (first.pop("RANK"), second.pop("RANK")) == ("0", "1")
    assert (first.pop("LOCAL_RANK"), second.pop("LOCAL_RANK")) == ("0", "1")
    assert first == second
    assert 1024 < int(first.pop("MASTER_PORT")) < 65536
    assert first == {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "NPROC": "1",  # a rank starts none
        "RLHF_PARENT": str(os.getpid()),
        "arguments": ["ppo.steps=3", "run=a b"],
    }


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_ends_the_other_and_gives_its_code(ranks, tmp_path, monkeypatch, failing):
    monkeypatch.setattr(launch, "GRACE", 50.0)  # it ends by the signal, not by being killed
    other = 1 - failing
    start = time.monotonic()
    code = f"if rank == {failing}:\n    wait_for('pid{other}')\n    sys.exit(3)\ntime.sleep(60)\n"
    assert ranks(code) == 3
    assert time.monotonic() - start < 30
    assert gone(tmp_path, other)


def test_a_rank_that_hears_no_signal_is_killed_in_the_end(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 0.3)
    code = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "(out / f'deaf{rank}').touch()\n"
        "wait_for('deaf0')\n"
        "if rank == 1:\n"
        "    sys.exit(5)\n"
        "time.sleep(60)\n"
    )
    assert ranks(code) == 5
    assert gone(tmp_path, 0)


def test_a_rank_that_was_killed_counts_as_failed_and_is_named(ranks, capfd, monkeypatch):
    # The other one ends too, with 1, as one left alone does; the parent sees both at once.
    clock = SimpleNamespace(sleep=lambda _: time.sleep(2), monotonic=time.monotonic)
    monkeypatch.setattr(launch, "time", clock)
    code = (
        "if rank == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "wait_for('pid1')\n"
        "stat = pathlib.Path('/proc') / (out / 'pid1').read_text() / 'stat'\n"
        "while stat.exists() and ') Z' not in stat.read_text():\n    time.sleep(0.01)\n"
        "sys.exit(1)\n"
    )
    assert ranks(code) == 128 + 9
    said = capfd.readouterr().err
    assert said.startswith(
        "\nlost: rank 1 of 2 was ended by SIGKILL (the kernel does that when mem"
    )
    assert "nothing was published. The same command goes on" in said


def test_an_interrupted_parent_takes_its_ranks_along(ranks, tmp_path, monkeypatch):
    def interrupt(seconds: float) -> None:
        while not (tmp_path / "pid0").exists() or not (tmp_path / "pid1").exists():
            os.sched_yield()
        raise KeyboardInterrupt

    clock = SimpleNamespace(sleep=interrupt, monotonic=time.monotonic)
    monkeypatch.setattr(launch, "time", clock)
    with pytest.raises(KeyboardInterrupt):
        ranks("time.sleep(60)\n")
    assert gone(tmp_path, 0)
    assert gone(tmp_path, 1)


# ---------------------------------------------------------------- sweeps


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[Any]]]:
    """`sweep("-m", "seed=1,2")`: the code, and the config that each child would compose.

    With `codes`, which the children are to return: the code, and the children's arguments.
    """

    def one(*arguments: str, codes: tuple[int, ...] = ()) -> tuple[int, list[Any]]:
        children: list[list[str]] = []
        left = iter(codes)

        def call(command: list[str]) -> int:
            children.append(command)
            return next(left, 0)

        monkeypatch.setattr(launch.subprocess, "call", call)
        monkeypatch.setattr(sys, "argv", ["stages/ppo.py", *arguments])
        code = launch._run("ppo", never)
        if codes:
            return code, children
        composed = []
        for command in children:
            assert command[:2] == [sys.executable, "stages/ppo.py"]
            monkeypatch.setattr(sys, "argv", command[1:])
            composed.append(launch.compose("ppo"))
        return code, composed

    return one


def test_a_sweep_is_one_run_per_combination_with_a_name_of_its_own(sweep):
    code, runs = sweep("-m", "ppo.kl_coef=0,0.1", "seed=1,2", "run=a", "ppo.steps=3")
    assert code == 0
    assert {run.run_name: (run.ppo.kl_coef, run.seed) for run in runs} == {
        "a-kl_coef=0,seed=1": (0.0, 1),
        "a-kl_coef=0,seed=2": (0.0, 2),
        "a-kl_coef=0.1,seed=1": (0.1, 1),
        "a-kl_coef=0.1,seed=2": (0.1, 2),
    }
    assert all((run.run, run.policy_from, run.ppo.steps) == ("a", "sft/a", 3) for run in runs)


def test_choices_of_a_group_and_ranges_can_be_swept(sweep):
    _, runs = sweep("--multirun", "engine=zero1,zero2")
    assert [(run.run_name, run.engine.zero_stage) for run in runs] == [
        ("tiny-engine=zero1", 1),
        ("tiny-engine=zero2", 2),
    ]
    _, runs = sweep("-m", "seed=range(0,3)")
    assert [run.seed for run in runs] == [0, 1, 2]


def test_a_sweep_over_lines_of_work_takes_the_parents_along(sweep):
    _, runs = sweep("-m", "run=a,b")
    assert [(run.run_name, run.rm_from) for run in runs] == [
        ("a-run=a", "rm/a"),
        ("b-run=b", "rm/b"),
    ]


@pytest.mark.parametrize("given", ["run_name=kl", "++run_name=kl", "run_name='kl'"])
def test_a_given_run_name_heads_the_names_of_a_sweep(sweep, given):
    _, runs = sweep("-m", given, "seed=1,2")
    assert [run.run_name for run in runs] == ["kl-seed=1", "kl-seed=2"]


def test_no_run_name_is_the_line_of_work(sweep):
    _, runs = sweep("-m", "run_name=null", "seed=1,2")
    assert [run.run_name for run in runs] == ["tiny-seed=1", "tiny-seed=2"]


def test_odd_characters_reach_the_child_and_not_the_folder(sweep):
    _, runs = sweep("-m", "data.path='/a b/(c)','/d,e'", "method.targets='q_proj,v_proj'")
    assert [run.data.path for run in runs] == ["/a b/(c)", "/d,e"]
    assert [run.method.targets for run in runs] == ["q_proj,v_proj"] * 2
    assert len({run.run_name for run in runs}) == 2
    assert all(RUN_NAME.fullmatch(run.run_name) for run in runs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m"], "nothing to sweep"),
        (["-m", "ppo.steps=3"], "nothing to sweep. Give a setting several values"),
        (["-m", "run_name=a,b"], "-m run_name: cannot be swept"),
        (["-m", "data.path='/a b','/a_b'"], "two of the runs would have one name"),
        (["-m", "seed=1,1"], "two of the runs would have one name"),
        (["-m", "ppo.kl_coef=interval(0,1)"], "Can only enumerate"),
        (["-m", "ppo.kl_coef=[1,2"], r"-m: .* Given: ppo.kl_coef=\[1,2"),
        (["-m", "--cfg", "job", "seed=1,2"], "-m: "),
    ],
)
def test_a_sweep_that_cannot_work_is_refused_before_any_child(sweep, capsys, arguments, message):
    code, runs = sweep(*arguments)
    assert (code, runs) == (2, [])
    assert re.search(message, capsys.readouterr().err)


def test_a_sweep_goes_on_after_a_failed_run_and_returns_its_code(sweep):
    code, children = sweep("-m", "seed=1,2,3", codes=(0, 3, 1))
    assert (code, len(children)) == (3, 3)


@pytest.mark.parametrize("code", [130, 143])
def test_a_sweep_stops_when_a_run_was_interrupted(sweep, code):
    returned, children = sweep("-m", "seed=1,2,3", codes=(0, code, 0))
    assert (returned, len(children)) == (code, 2)
