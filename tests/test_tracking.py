"""Tracking: one list of names, and the same numbers in metrics.jsonl, on the console and in W&B.

W&B talks to a local socket that answers nobody, so that a stray connection is seen, not sent.
"""

import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from wandb_files import inside, items, parts, records, rows

from rlhf import tracking, wandb_run
from rlhf.errors import ConfigError, StoppedByGuard
from rlhf.metrics import HEADLINES, METRICS, headlines
from rlhf.tracking import Tracker
from rlhf.wandb_run import find_key

KEY = "0123456789abcdef" * 3
# "Metrics" in DESIGN.md, word for word.
DESIGN = """
    episode train/loss train/learning_rate train/grad_norm eval/loss eval/accuracy eval/margin
    eval/ece objective/kl objective/kl_coef objective/scores objective/rlhf_reward
    objective/entropy policy/approxkl policy/clipfrac policy/ratio policy/grad_norm loss/policy
    loss/value val/clipfrac val/explained_variance val/grad_norm response/length
    response/eos_rate response/distinct eval/gold eval/win_rate time/rollout time/score
    time/update perf/tokens_per_second perf/peak_memory_gb
"""


class Wire:
    """A port on this machine that hangs up on every caller and counts them."""

    def __init__(self):
        self.calls = 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self):
        with contextlib.suppress(OSError):  # closed at the end of the tests
            while True:
                caller, _ = self.server.accept()
                self.calls += 1
                caller.close()


class Listener:
    """Stands where the console stands and keeps what it is shown."""

    def __init__(self):
        self.notes, self.shown = [], []

    def note(self, text):
        self.notes.append(text)

    def metrics(self, stage, step, total, metrics):
        self.shown.append((stage, step, total, dict(metrics)))


@pytest.fixture(scope="module")
def wire(tmp_path_factory):
    wire = Wire()
    yield wire
    wire.server.close()


@pytest.fixture(autouse=True, scope="module")
def no_key_at_hand(tmp_path_factory, wire):
    """A home without a key, and no W&B setting of the person who runs the tests."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [*os.environ]:
            if name.startswith(("WANDB_", "XDG_")) or name == "NETRC":
                patch.delenv(name)
        patch.setenv("HOME", str(home))
        patch.setenv("WANDB_BASE_URL", wire.url)
        patch.setenv("WANDB_ERROR_REPORTING", "")  # so that the patch puts it back
        patch.delenv("WANDB_ERROR_REPORTING")
        patch.chdir(home)
        yield
        if "wandb" in sys.modules:
            sys.modules["wandb"].teardown()


@pytest.fixture
def forget_key():
    """wandb remembers a key it was given for as long as its session lasts."""
    yield
    sys.modules["wandb"].teardown()


def tracker(folder: Path, **changes) -> Tracker:
    given = {
        "stage": "sft",
        "run": "tiny",
        "run_name": "tiny-lr1",
        "config": {"seed": 0, "train": {"learning_rate": 0.001}},
        "metrics_path": folder / "metrics.jsonl",
        "directory": folder,
        "project": "rlhf-test",
        "entity": None,
        "mode": "off",
        "console": None,
    }
    return Tracker(**given | changes)


def lines(folder: Path) -> list[dict]:
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def history(folder: Path) -> list[dict]:
    return rows(records(folder))


# -- the list


def test_every_metric_of_the_design_is_in_the_list_and_documented():
    names = DESIGN.split()
    assert len(names) == 32
    assert not set(names) - set(METRICS)
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.unit
        assert len(metric.meaning) > 10


# -- metrics.jsonl


def test_lines_are_the_same_bytes_whatever_the_order_of_the_dict(tmp_path):
    numbers = {"eval/loss": 2.5, "episode": 64, "train/loss": 0.1 + 0.2}
    for name, order in (("a", list(numbers)), ("b", list(numbers)[::-1])):
        with tracker(tmp_path / name) as t:
            t.log({key: numbers[key] for key in order}, step=0)
            t.log({"objective/kl": 1e-7}, step=1)
    expected = (
        b'{"step": 0, "episode": 64, "train/loss": 0.30000000000000004, "eval/loss": 2.5}\n'
        b'{"step": 1, "objective/kl": 1e-07}\n'
    )
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == expected
    assert (tmp_path / "b/metrics.jsonl").read_bytes() == expected


def test_nan_and_infinity_are_valid_json(tmp_path):
    with tracker(tmp_path) as t:
        t.log({"train/loss": math.nan, "eval/loss": math.inf, "eval/margin": -math.inf}, step=0)
    assert lines(tmp_path) == [
        {"step": 0, "train/loss": "nan", "eval/loss": "inf", "eval/margin": "-inf"}
    ]


def test_array_scalars_keep_every_digit(tmp_path):
    with tracker(tmp_path) as t:
        t.log({"train/loss": np.float32(0.1), "episode": np.int64(2**60 + 1)}, step=0)
    assert lines(tmp_path) == [
        {"step": 0, "episode": 1152921504606846977, "train/loss": 0.10000000149011612}
    ]


def test_each_line_is_on_disk_before_the_next(tmp_path):
    t = tracker(tmp_path)
    t.log({"train/loss": 1.0}, step=0)
    assert lines(tmp_path) == [{"step": 0, "train/loss": 1.0}]
    t.close()


def test_unknown_name_is_refused_with_the_nearest_and_writes_nothing(tmp_path):
    with tracker(tmp_path) as t:
        with pytest.raises(KeyError, match=r"'policy/aprox_kl'.*did you mean policy/approxkl"):
            t.log({"train/loss": 1.0, "policy/aprox_kl": 0.1}, step=0)
        with pytest.raises(KeyError, match=r"'xyzzy'.*see METRICS"):
            t.summary({"xyzzy": 0.1})
        with pytest.raises(KeyError, match="eval/gold_extra"):  # exact names, no prefixes
            t.log({"eval/gold_extra": 0.1}, step=0)
    assert lines(tmp_path) == []


def test_steps_never_go_back(tmp_path):
    with tracker(tmp_path) as t:
        t.log({"train/loss": 1.0}, step=5)
        t.log({"eval/loss": 1.0}, step=5)
        with pytest.raises(ValueError, match="step=4 comes after step 5"):
            t.log({"train/loss": 1.0}, step=4)
    with pytest.raises(ValueError, match="after close"):
        t.log({"train/loss": 1.0}, step=6)
    assert [line["step"] for line in lines(tmp_path)] == [5, 5]


def test_a_new_run_replaces_the_file_and_append_keeps_its_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "train/loss": 3.0}\n{"step": 1, "train/lo')  # killed mid-line
    with tracker(tmp_path, append=True) as t:
        t.log({"train/loss": 2.0}, step=1)
    assert lines(tmp_path) == [{"step": 0, "train/loss": 3.0}, {"step": 1, "train/loss": 2.0}]
    with tracker(tmp_path) as t:
        t.log({"train/loss": 9.0}, step=0)
    assert lines(tmp_path) == [{"step": 0, "train/loss": 9.0}]


def test_a_rewound_run_has_the_bytes_of_an_unbroken_one(tmp_path):
    def go(folder, steps, **how):
        with tracker(tmp_path / folder, **how) as t:
            if how:
                t.rewind(4)  # lines, when the checkpoint was written
            for step in steps:
                t.log({"train/loss": 1 / (step + 1)}, step=step)

    go("unbroken", range(8))
    go("broken", range(6))
    go("broken", range(4, 8), append=True)
    unbroken, broken = (tmp_path / name / "metrics.jsonl" for name in ("unbroken", "broken"))
    assert broken.read_bytes() == unbroken.read_bytes()


def test_console_is_shown_the_same_numbers(tmp_path):
    console = Listener()
    with tracker(tmp_path, console=console, total=9) as t:
        t.log({"eval/loss": math.inf, "train/loss": 1 / 3}, step=2)
    assert console.shown == [("sft", 2, 9, {"train/loss": 1 / 3, "eval/loss": math.inf})]


# -- W&B


def test_offline_file_has_the_same_numbers_and_names(tmp_path, capfd, caplog, wire):
    caplog.set_level("INFO")  # a stage may show the root logger's lines
    calls = wire.calls
    console = Listener()
    with tracker(tmp_path, mode="offline", console=console) as t:
        assert sys.modules["wandb"].run is None  # not offered to other libraries
        for step in range(150):  # more than one block of the file
            t.log({"train/loss": 1 / (step + 3), "episode": step * 8}, step=step)
        t.log({"eval/loss": 0.1 + 0.2}, step=149)
        t.log({"train/grad_norm": math.nan}, step=160)
        t.summary({"eval/gold": 0.75})

    expected: dict[int, dict] = {}
    for line in lines(tmp_path):
        expected.setdefault(line["step"], {}).update(line)
    found = history(tmp_path)
    assert len(found) == 151
    for row in found:
        wanted = expected[row.pop("_step")]
        wanted.pop("step")
        if "train/grad_norm" in row:
            assert str(row.pop("train/grad_norm")).lower() == wanted.pop("train/grad_norm")
        assert row == wanted

    found = records(tmp_path)
    run = next(r.run for r in found if r.HasField("run"))
    assert (run.project, run.run_group, run.job_type) == ("rlhf-test", "tiny", "sft")
    assert run.display_name == "sft/tiny-lr1"
    config = items(run.config.update)
    assert config["seed"] == 0
    assert config["train"] == {"learning_rate": 0.001}
    summary = {}
    for r in found:
        summary |= items(r.summary.update)
    assert summary["eval/gold"] == 0.75
    assert [r.exit.exit_code for r in found if r.HasField("exit")] == [0]

    assert capfd.readouterr() == ("", "")  # wandb is silent; the console says it in one line
    assert not caplog.records
    (note,) = console.notes
    assert note == "[sft] tracking: offline; upload later: rlhf sync sft/tiny-lr1"
    assert wire.calls == calls


def test_an_exception_in_the_block_closes_both_and_marks_the_run_as_failed(tmp_path):
    def interrupted():
        with tracker(tmp_path, mode="offline") as t:
            t.log({"train/loss": 1.0}, step=0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert lines(tmp_path) == [{"step": 0, "train/loss": 1.0}]
    assert history(tmp_path) == [{"_step": 0, "train/loss": 1.0}]
    assert [r.exit.exit_code for r in records(tmp_path) if r.HasField("exit")] == [1]


def test_close_twice_is_close_once(tmp_path):
    t = tracker(tmp_path, mode="offline")
    t.close(exit_code=3)
    t.close()
    assert [r.exit.exit_code for r in records(tmp_path) if r.HasField("exit")] == [3]


def test_auto_without_a_key_is_offline(tmp_path, wire):
    calls = wire.calls
    console = Listener()
    tracker(tmp_path, mode="auto", console=console).close()
    assert records(tmp_path)
    assert "offline (no W&B key at hand)" in console.notes[0]
    assert wire.calls == calls


def test_auto_with_a_key_tries_online_and_falls_back(
    tmp_path, monkeypatch, capfd, wire, forget_key
):
    calls = wire.calls
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb_run, "START_TIMEOUT_SECONDS", 1.0)
    console = Listener()
    began = time.monotonic()
    with tracker(tmp_path, mode="auto", console=console) as t:
        t.log({"train/loss": 1.0}, step=0)
    assert time.monotonic() - began < 45  # wandb by itself would try for 90 s
    assert wire.calls > calls  # it did call; so the other tests' silence means something
    assert "offline (W&B did not start: " in console.notes[0]
    assert any("offline-run" in str(path) for path in tmp_path.glob("wandb/*"))
    # Nothing was sent online: `rlhf sync` must not take an earlier part for replaced.
    assert not list(tmp_path.glob("wandb/run-*"))
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ConfigError, match=r"tracking\.mode=online: W&B did not start.*offline"):
        tracker(tmp_path / "online", mode="online")
    assert not (tmp_path / "online/metrics.jsonl").exists()
    leaks = [p for p in tmp_path.rglob("*") if p.is_file() and KEY in p.read_text("latin-1")]
    assert leaks == []


def test_online_without_a_key_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"WANDB_API_KEY.*wandb login.*tracking\.mode=offline"):
        tracker(tmp_path, mode="online")
    assert not (tmp_path / "metrics.jsonl").exists()


def test_unknown_mode_is_refused_with_the_choices(tmp_path):
    with pytest.raises(ConfigError, match=r"'loud'.*auto, online, offline, off"):
        tracker(tmp_path, mode="loud")


def test_auto_obeys_the_mode_that_wandb_was_told(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker(tmp_path / "off", mode="auto").close()
    assert not (tmp_path / "off/wandb").exists()
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker(tmp_path / "offline", mode="auto").close()
    assert records(tmp_path / "offline")


def test_without_the_package_auto_is_off_and_the_rest_refuse(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    console = Listener()
    with tracker(tmp_path, mode="auto", console=console) as t:
        t.log({"train/loss": 1.0}, step=0)
    assert console.notes == ["[sft] tracking: off (wandb is not installed)"]
    assert len(lines(tmp_path)) == 1
    for mode in ("online", "offline"):
        with pytest.raises(ConfigError, match=f"mode={mode}.*pip install wandb.*tracking=off"):
            tracker(tmp_path, mode=mode)


class Broken:
    """A W&B run whose service died."""

    def __getattr__(self, name):
        def fail(*args, **kwargs):
            raise ConnectionError("service died")

        return fail


def test_wandb_failing_midway_does_not_end_the_run(tmp_path):
    console = Listener()
    with tracker(tmp_path, mode="offline", console=console) as t:
        t._wandb._run.finish()
        t._wandb._run = Broken()
        for step in range(3):
            t.log({"train/loss": 1.0 / (step + 1)}, step=step)
        t.histograms({"histogram/scores": [1.0]}, step=2)
        t.samples([{"prompt": "p"}], step=2)
        t.summary({"train/loss": 1.0})
        t.stop("a guard")
    assert len(lines(tmp_path)) == 3
    assert len((tmp_path / "samples_log.jsonl").read_text().splitlines()) == 1
    (_, note) = console.notes
    assert "service died" in note


def test_what_the_numbers_do_not_need_may_fail_alone(tmp_path, monkeypatch):
    console = Listener()
    with tracker(tmp_path, mode="offline", console=console) as t:
        monkeypatch.setattr(t._wandb, "publish", Broken().publish)
        t.log({"train/loss": 1.0}, step=1)
        t.publish(None, [])
    assert "W&B did not take it (service died)" in console.notes[1]
    assert history(tmp_path) == [{"_step": 1, "train/loss": 1.0}]


# -- a run that goes on


def merged(folder: Path, **how) -> dict[int, dict]:
    """Step -> numbers of all parts; a number that is there twice is an error."""
    out: dict[int, dict] = {}
    for part in parts(folder, **how):
        for row in rows(part):
            there = out.setdefault(row.pop("_step"), {})
            assert not there.keys() & row.keys()
            there |= row
    return out


def logged(folder: Path) -> dict[int, dict]:
    out: dict[int, dict] = {}
    for line in lines(folder):
        out.setdefault(line.pop("step"), {}).update(line)
    return out


def ids(folder: Path) -> list[str]:
    return [next(r.run.run_id for r in part if r.HasField("run")) for part in parts(folder)]


def test_an_interrupted_run_goes_on_as_the_same_run(tmp_path):
    """Stopped in step 5, whose checkpoint is of step 3; the times of what is done again differ."""

    def go(steps, **how):
        with tracker(tmp_path, mode="offline", **how) as t:
            if how:
                t.rewind(3, step=3)
            for step in steps:
                t.log({"train/loss": 1 / step, "episode": 8 * step}, step=step)

    go([1, 2, 3, 4, 5])
    go([4, 5, 6, 7], append=True)
    assert merged(tmp_path) == logged(tmp_path)
    assert [sorted(row["_step"] for row in rows(part)) for part in parts(tmp_path)] == [
        [1, 2, 3, 4, 5],
        [6, 7],
    ]
    first, second = ids(tmp_path)
    assert first == second


def test_a_run_that_goes_on_within_the_second_keeps_its_first_part(tmp_path):
    """W&B names a folder by the second and the id, and would write over what is there."""
    tracker(tmp_path / "warm", mode="offline").close()
    time.sleep(1.02 - time.time() % 1)
    for step, how in ((1, {}), (2, {"append": True})):
        with tracker(tmp_path, mode="offline", **how) as t:
            t.log({"train/loss": 1 / step}, step=step)
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
    assert merged(tmp_path) == logged(tmp_path)


def test_numbers_of_a_step_that_came_after_the_interruption_are_sent_too(tmp_path):
    with tracker(tmp_path, mode="offline") as t:
        t.log({"train/loss": 0.5}, step=7)
    with tracker(tmp_path, mode="offline", append=True) as t:
        t.rewind(1, step=7)
        t.log({"eval/gold": 0.25}, step=7)
    assert merged(tmp_path) == logged(tmp_path) == {7: {"train/loss": 0.5, "eval/gold": 0.25}}


def test_a_killed_process_leaves_no_gap_and_no_number_twice(tmp_path):
    """Killed in step 4: its row was not sent, and the checkpoint at step 4 says it need not be
    done again."""
    code = """
import os, sys, signal, time
from pathlib import Path
from test_tracking import tracker
folder = Path(sys.argv[1])
t = tracker(folder, mode="offline")
for step in (1, 2, 3, 4):
    t.log({"train/loss": 1 / step}, step=step)
(path,) = folder.glob("wandb/offline-run-*/*.wandb")
from wandb_files import parse_records
for _ in range(6000):
    if sum(r.HasField("history") for r in parse_records(path.read_bytes())) >= 3:
        break
    time.sleep(0.01)
else:
    sys.exit("wandb has not written three rows in a minute")
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(tracking.__file__).parents[1]
    env = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    env["PYTHONPATH"] = f"{root}:{root / 'tests'}"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env)
    assert done.returncode == -9
    with tracker(tmp_path, mode="offline", append=True) as t:
        t.rewind(4, step=4)
        t.log({"train/loss": 0.2}, step=5)
    assert merged(tmp_path, ended=False) == logged(tmp_path)
    assert sorted(logged(tmp_path)) == [1, 2, 3, 4, 5]


def test_what_was_tracked_by_nobody_is_sent_when_the_run_goes_on(tmp_path):
    with tracker(tmp_path, mode="off") as t:
        t.log({"train/loss": math.inf}, step=1)
        t.log({"train/loss": 2.0}, step=2)
    with tracker(tmp_path, mode="offline", append=True) as t:
        t.rewind(2, step=2)
        t.log({"train/loss": 1.0}, step=3)
    found = merged(tmp_path)
    assert str(found[1]["train/loss"]).lower() in ("inf", "infinity")
    assert found[2] == {"train/loss": 2.0}
    assert found[3] == {"train/loss": 1.0}


def test_online_the_server_says_what_it_has(tmp_path, monkeypatch, forget_key):
    """The server knows steps up to 2; what lies in the folder says 3."""
    import wandb

    asked, sent = {}, []

    class Server:
        starting_step, url, summary = 3, "http://run", {}

        def define_metric(self, *args, **kwargs):
            pass

        def log(self, row, *, step, commit):
            assert commit
            sent.append((step, dict(row)))

        def finish(self, exit_code):
            sent.append(("exit", exit_code))

    with tracker(tmp_path, mode="offline") as t:
        for step in (1, 2, 3):
            t.log({"train/loss": 1 / step}, step=step)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb, "init", lambda **given: asked.update(given) or Server())
    with tracker(tmp_path, mode="online", append=True) as t:
        t.rewind(3, step=3)
        t.log({"train/loss": 0.25}, step=4)
    assert asked["resume"] == "allow"
    assert [asked["id"]] == ids(tmp_path)
    assert sent == [
        (3, {"step": 3, "train/loss": 1 / 3}),
        (4, {"step": 4, "train/loss": 0.25}),
        ("exit", 0),
    ]


# -- axes, tags, histograms, samples, alerts


def test_a_term_of_the_reward_is_a_metric_whatever_its_name(tmp_path):
    with tracker(tmp_path) as t:
        t.log({"objective/kl": 1.0, "objective/scores/brief": 0.5, "objective/scores": 2.0}, step=1)
        for name in ("objective/scores/", "objective/scoresx", "eval/scores/brief"):
            with pytest.raises(KeyError, match=name):
                t.log({name: 1.0}, step=1)
    assert list(lines(tmp_path)[0]) == [
        *("step", "objective/kl", "objective/scores", "objective/scores/brief")
    ]


def test_headlines_show_the_kl_of_the_published_policy():
    """That of the rollouts, sampled before the update, stands in where nothing was held out."""
    ppo = {"eval/gold": 0.6, "eval/score": 2.0, "eval/kl": 42.6, "objective/kl": 14.6}
    assert headlines(ppo) == ["eval/gold", "eval/score", "eval/kl"]
    assert headlines({"objective/kl": 14.6}) == ["objective/kl"]
    assert headlines({"eval/loss": 1.0}, ppo, {"objective/kl": 1.0}) == [
        *("eval/loss", "eval/gold", "eval/score", "eval/kl", "objective/kl")
    ]
    assert headlines({}) == []
    assert {*HEADLINES} <= METRICS.keys()


def test_every_metric_has_the_step_as_its_axis(tmp_path):
    with tracker(tmp_path, mode="offline", tags=["ppo", "lora", "ppo", "x" * 99]) as t:
        t.log({"objective/kl": 1.0}, step=3)
    found = records(tmp_path)
    axes = {r.metric.glob_name or r.metric.name: r.metric for r in found if r.HasField("metric")}
    assert axes["step"].options.hidden
    for name in METRICS:
        key = name if "/" not in name else name.split("/")[0] + "/*"
        assert axes[key].step_metric == "step", name
    (row,) = [items(r.history.item) for r in found if r.HasField("history")]
    assert row["step"] == row["_step"] == 3
    run = next(r.run for r in found if r.HasField("run"))
    assert list(run.tags) == ["ppo", "lora", "x" * 64]


def test_histograms_are_part_of_the_row_of_their_step(tmp_path):
    values = {"histogram/scores": [0.0, 1.0, 1.0, math.nan], "histogram/ratios": []}
    with tracker(tmp_path, mode="offline") as t:
        t.histograms(values, step=5)
        t.log({"train/loss": 1.0}, step=5)
        with pytest.raises(KeyError, match="histogram/score"):
            t.histograms({"histogram/score": [1.0]}, step=5)
    (row,) = [r.history.item for r in records(tmp_path) if r.HasField("history")]
    assert items(row)["_step"] == 5
    assert items(row)["train/loss"] == 1.0
    shown = inside(row, "histogram/scores")
    assert (shown["_type"], sum(shown["values"])) == ("histogram", 3)
    assert (shown["bins"][0], shown["bins"][-1]) == (0.0, 1.0)
    assert shown["values"][-1] == 2
    assert not inside(row, "histogram/ratios")
    assert lines(tmp_path) == [{"step": 5, "train/loss": 1.0}]


def answers(step: int) -> list[dict]:
    """Two prompts of an evaluation."""
    return [
        {"prompt": f"p{n}", "sft": "old", "ppo": f"at {step} \ud800", "ppo_score": step + n / 2}
        for n in range(2)
    ]


def tables(folder: Path) -> list[list]:
    """The tables of all parts in the order they were logged, each as W&B wrote it."""
    every = [r.history.item for part in parts(folder) for r in part if r.HasField("history")]
    out = []
    for entry in [found for row in every if (found := inside(row, "samples"))]:
        (path,) = folder.glob(f"wandb/offline-run-*/files/{entry['path']}")
        out.append(json.loads(path.read_text()))
        assert out[-1]["columns"] == list(tracking.SAMPLE_COLUMNS)
    return [[tuple(row[:2]) for row in table["data"]] for table in out]


def test_the_table_of_samples_grows_and_is_whole_at_the_end(tmp_path):
    steps = (10, 20, 30, 40, 50)
    with tracker(tmp_path, mode="offline") as t:
        for step in steps:
            t.samples(answers(step), step=step)
            t.log({"eval/score": 1.0}, step=step)
        t.summary({"eval/score": 0.5})
    kept = [json.loads(line) for line in (tmp_path / "samples_log.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in kept] == [
        (step, prompt) for step in steps for prompt in ("p0", "p1")
    ]
    assert kept[3] == {"step": 20, **answers(20)[1]}
    whole = [(row["step"], row["prompt"]) for row in kept]
    assert tables(tmp_path) == [whole[:2], whole[:4], whole[:8], whole], "after 1, 2, 4; the end"
    assert not (Path.home() / ".local/share/wandb").exists()  # W&B's copies lie in the run


def test_what_a_resumed_run_shows_first_is_not_cut_off(tmp_path):
    """W&B commits a row once: distributions and numbers of the first step leave together."""
    with tracker(tmp_path, mode="offline") as t:
        t.log({"train/loss": 1.0}, step=1)
    with tracker(tmp_path, mode="offline", append=True) as t:
        t.rewind(1, step=1)
        t.samples(answers(2), step=2)
        t.histograms({"histogram/scores": [1.0]}, step=2)
        t.log({"train/loss": 0.5}, step=2)
    assert merged(tmp_path) == logged(tmp_path)
    assert len(tables(tmp_path)) == 1


def test_samples_of_steps_that_are_done_again_are_there_once(tmp_path):
    def go(steps, **how):
        with tracker(tmp_path, mode="offline", **how) as t:
            if how:
                t.rewind(2, step=20)
            for step in steps:
                t.samples(answers(step), step=step)
                t.log({"eval/score": 1.0}, step=step)

    go([10, 20, 30])
    go([30, 40], append=True)
    kept = [json.loads(line) for line in (tmp_path / "samples_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in kept] == [10, 10, 20, 20, 30, 30, 40, 40]
    assert [step for step, _ in tables(tmp_path)[-1]] == [10, 10, 20, 20, 30, 30, 40, 40]


def test_a_score_that_is_no_number_does_not_end_the_run(tmp_path):
    with tracker(tmp_path, mode="offline") as t:
        t.samples([{"prompt": "p", "ppo_score": math.nan}, {"prompt": "q", "ppo_score": 1}], step=1)
        t.log({"eval/score": 1.0}, step=1)
    first = (tmp_path / "samples_log.jsonl").read_text().splitlines()[0]
    assert json.loads(first) == {"step": 1, "prompt": "p", "ppo_score": "nan"}
    assert len(tables(tmp_path)) == 1


def test_a_table_is_no_longer_than_wandb_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "TABLE_ROWS", 3)
    with tracker(tmp_path, mode="offline") as t:
        for step in (1, 2):
            t.samples(answers(step), step=step)
            t.log({"eval/score": 1.0}, step=step)
    assert tables(tmp_path)[-1] == [(1, "p1"), (2, "p0"), (2, "p1")]


def test_a_guard_that_stops_the_run_is_an_alert(tmp_path):
    def stopped():
        with tracker(tmp_path / "raised", mode="offline") as t:
            t.log({"objective/kl": 99.0}, step=1)
            raise StoppedByGuard("KL over budget: 99 nats")

    with pytest.raises(StoppedByGuard):
        stopped()
    with tracker(tmp_path / "published", mode="offline") as t:
        t.stop("KL over budget: 99 nats")
    for name in ("raised", "published"):
        found = records(tmp_path / name)
        (alert,) = [r.alert for r in found if r.HasField("alert")]
        assert (alert.title, alert.level) == ("sft/tiny-lr1: stopped", "ERROR")
        assert alert.text == "KL over budget: 99 nats"
        assert [r.exit.exit_code for r in found if r.HasField("exit")] == [3]


def test_wandb_is_not_to_report_home_unless_the_user_says_so(tmp_path, monkeypatch):
    # unset, wandb 0.31 looks up its makers' host even when offline
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    tracker(tmp_path / "a", mode="offline").close()
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "true")
    tracker(tmp_path / "b", mode="offline").close()
    assert os.environ["WANDB_ERROR_REPORTING"] == "true"


# -- the key


def test_key_comes_from_the_environment_then_settings_then_netrc(tmp_path, monkeypatch):
    url = "https://wandb.example.org"
    netrc = tmp_path / "netrc"
    netrc.write_text(
        "machine other.example.org login user password not-this-one\n"
        "machine wandb.example.org login user password from-netrc\n"
        "default login anonymous password nor-this-one\n"
    )
    assert find_key(url) is None
    monkeypatch.setenv("NETRC", str(netrc))
    assert find_key(url) == "from-netrc"
    assert find_key("https://elsewhere.example.org") is None
    assert find_key(url, configured="from-settings") == "from-settings"
    monkeypatch.setenv("WANDB_API_KEY", "from-env")
    assert find_key(url, configured="from-settings") == "from-env"


def test_a_key_of_nobody_is_told(monkeypatch):
    monkeypatch.setattr("wandb.Api", lambda: SimpleNamespace(default_entity=None))
    with pytest.raises(ConfigError, match=r"no default entity.*--entity"):
        wandb_run.default_entity("")


@pytest.mark.parametrize("machine", ["api.wandb.ai", "api.forge.coreweave.com"])
def test_a_key_under_either_name_of_wandb_counts(tmp_path, monkeypatch, machine):
    home = tmp_path
    (home / ".netrc").write_text(f"machine {machine} login user password {KEY}\n")
    monkeypatch.setenv("HOME", str(home))
    assert find_key("https://api.wandb.ai") == KEY
    assert find_key("https://api.forge.coreweave.com") == KEY


def test_a_broken_netrc_is_no_key(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine\n???")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert find_key("https://api.wandb.ai") is None


# -- imports


def run_python(code: str, *args: str) -> str:
    root = Path(tracking.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_needs_neither_torch_nor_wandb():
    code = "import sys, rlhf.tracking, rlhf.console; print({'torch', 'wandb'} & {*sys.modules})"
    assert run_python(code) == "set()"


def test_off_never_imports_wandb(tmp_path):
    code = """
import sys
from pathlib import Path
from rlhf.tracking import Tracker
folder = Path(sys.argv[1])
with Tracker(stage="rm", run="tiny", run_name="tiny", config={}, directory=folder,
             metrics_path=folder / "metrics.jsonl", project="p", entity=None, mode="off",
             console=None) as tracker:
    tracker.log({"eval/accuracy": 0.5}, step=0)
    tracker.summary({"eval/accuracy": 0.5})
print({"torch", "wandb"} & {*sys.modules})
"""
    assert run_python(code, str(tmp_path)) == "set()"
    assert lines(tmp_path) == [{"step": 0, "eval/accuracy": 0.5}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
