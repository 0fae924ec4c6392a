"""`rlhf ...`: what is printed where, and the exit codes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.text import Text
from test_registry import (
    CONFIG,
    facts,
    fill,
    flip,
    interrupted,
    no_waiting_for_the_disk,
    published,
    save,
    snapshot,
)

import rlhf
from rlhf import card, cleanup, cli, tables
from rlhf.pairwise import Pair
from rlhf.registry import Registry
from rlhf.run import open_run

__all__ = ["no_waiting_for_the_disk"]  # a fixture


class Result:
    """What a command printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("RLHF_RUNS", str(tmp_path / "runs"))
    return Registry(tmp_path / "runs")


@pytest.fixture
def rlhf_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["rlhf", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    return run


def test_version(rlhf_command):
    result = rlhf_command("--version")
    assert (result.code, result.out, result.err) == (0, f"rlhf {rlhf.__version__}\n", "")


def test_help_shows_every_word_of_every_option():
    # typer reads help as rich's markup, in which [a word] is a colour and vanishes
    for name, command in typer.main.get_command(cli.app).commands.items():
        for parameter in command.params:
            text = parameter.help or ""
            assert Text.from_markup(text).plain == text, (name, parameter.name)


def test_ls_of_nothing(rlhf_command, registry: Registry):
    result = rlhf_command("ls")
    assert result.code == 0
    assert f"No runs in {registry.runs_dir}" in result.out
    assert "No ppo runs in" in rlhf_command("ls", "--stage", "ppo").out
    assert rlhf_command("ls", "--json").out == "[]\n"
    assert not registry.runs_dir.exists()


def test_ls_shows_state_parents_and_the_numbers_that_matter(rlhf_command, registry: Registry):
    sft = published(registry, metrics={"eval/loss": 1.23456, "train/loss": 7.5})
    published(registry, "rm/tiny", {"policy": sft}, metrics={"eval/accuracy": float("nan")})
    published(registry, "sft/zz")
    with open_run(registry, "ppo", "tiny", CONFIG, {}) as run:
        run.metrics_path.write_text("{}")
    before = snapshot(registry.runs_dir)
    result = rlhf_command("ls")
    header, _, *rows = result.out.splitlines()
    assert header.split() == [
        *("run", "state", "finished", "from", "method"),
        *("eval/loss", "eval/accuracy", "eval/gold"),
    ]
    assert [row.split()[:2] for row in rows] == [
        ["sft/tiny", "finished"],
        ["sft/zz", "finished"],
        ["rm/tiny", "finished"],
        ["ppo/tiny", "unfinished"],
    ]
    assert rows[0].split()[-2:] == ["lora", "1.235"]
    assert rows[2].split()[-2:] == ["sft/tiny", "lora"]
    assert result.err == ""
    assert snapshot(registry.runs_dir) == before
    only = rlhf_command("ls", "--stage", "rm").out
    assert "rm/tiny" in only
    assert "sft/zz" not in only


def test_an_unfinished_run_shows_where_it_could_go_on(rlhf_command, registry: Registry):
    interrupted(registry, 10, 20)
    assert "unfinished at step-000020" in rlhf_command("ls").out


def test_ls_never_cuts_a_name_off_a_terminal(rlhf_command, registry: Registry):
    name = "sft/" + "x" * 120
    published(registry, name)
    assert name in rlhf_command("ls").out


def test_ls_json_is_for_scripts(rlhf_command, registry: Registry):
    made = published(registry, metrics={"eval/loss": float("nan")})
    bad = published(registry, "sft/bad")
    (bad.path / "manifest.json").write_text("{")
    rows = json.loads(rlhf_command("ls", "--json").out)
    assert [(row["reference"], row["state"]) for row in rows] == [
        ("sft/bad", "damaged"),
        ("sft/tiny", "finished"),
    ]
    assert rows[0]["manifest"] is None
    assert "not a whole JSON" in rows[0]["problem"]
    assert rows[1]["manifest"]["metrics"] == {"eval/loss": None}
    assert rows[1]["manifest"]["files"]["config.yaml"]["size"] == len("seed: 0\n")
    assert (rows[1]["stage"], rows[1]["run_name"]) == ("sft", "tiny")
    assert rows[1]["path"] == str(made.path)


def test_ls_names_damage_and_still_lists_the_rest(rlhf_command, registry: Registry):
    published(registry)
    (published(registry, "sft/bad").path / "manifest.json").write_text("{")
    result = rlhf_command("ls")
    assert "sft/tiny" in result.out
    assert "damaged" in result.out
    assert "sft/bad/manifest.json: not a whole JSON" in result.err


def test_ls_refuses_another_stage(rlhf_command, registry: Registry):
    result = rlhf_command("ls", "--stage", "dpo")
    assert (result.code, result.out) == (2, "")
    assert result.err == "refused: stage 'dpo': there is sft, rm, ppo.\n"


def test_runs_dir_wins_over_the_environment(rlhf_command, registry: Registry, tmp_path: Path):
    published(registry)
    published(Registry(tmp_path / "other"), "sft/elsewhere")
    result = rlhf_command("ls", "--runs-dir", str(tmp_path / "other"))
    assert "sft/elsewhere" in result.out
    assert "sft/tiny" not in result.out
    assert rlhf_command("show", "sft/elsewhere").code == 2
    assert rlhf_command("show", "sft/elsewhere", "--runs-dir", str(tmp_path / "other")).code == 0
    assert rlhf_command("verify", "--all", "--runs-dir", str(tmp_path / "other")).out == (
        "sft/elsewhere: sound\n"
    )


def test_show_prints_what_a_run_recorded(rlhf_command, registry: Registry):
    sft = published(registry)
    made = published(registry, "rm/tiny", {"policy": sft})
    result = rlhf_command("show", "rm/tiny")
    assert (result.code, result.err) == (0, "")
    for part in (
        "rm/tiny",
        f"policy sft/tiny (manifest {sft.digest[:12]})",
        "tiny-base (base-1)",
        "tokenizer-1",
        "template-1",
        "pad 0 eos 2 bos 1",
        "lora rank=16, on sft/tiny",
        "file=model/golden.json tolerance=0.0001",
        "seed 0, 1 x cpu, ZeRO 2, fp32",
        "train 12.5 s 0.50 GB",
        "eval/loss   1.25",
        "10 empty answer",
        "model/model.safetensors",
        made.manifest.files["model/model.safetensors"].sha256,
        made.manifest.config_hash[:12],
        made.digest,
        str(made.path),
    ):
        assert part in result.out


def test_show_prints_the_report_card(rlhf_command, registry: Registry):
    sft = published(registry)
    pairs = [Pair(m, 0.0, 9, 7) for m in [1.0] * 6 + [-1.0] * 2]
    made = card.make(pairs, split="test")
    with open_run(registry, "rm", "tiny", CONFIG, {"policy": sft}) as run:
        fill(run)
        made.write(run.path)
        run.publish(**facts(card=made.facts))
    assert registry.verify("rm/tiny") == []
    out = rlhf_command("show", "rm/tiny").out
    assert made.verdict == "no-go"
    assert "report card" in out
    for reason in made.reasons:
        assert f"- {reason}" in out
    row = next(line for line in out.splitlines() if line.startswith("accuracy (test)"))
    assert row.split()[2:4] == ["8", "0.750"]
    assert "calibration error" in out
    flip(registry.resolve("rm/tiny").path / "card.json", 0)
    assert registry.verify("rm/tiny") == ["card.json: sha256 differs from the manifest's"]


def test_show_prints_what_a_run_was_warned_of(rlhf_command, registry: Registry):
    published(registry, warnings=["variety (step 15): variety collapses", "length (step 20): long"])
    out = rlhf_command("show", "sft/tiny").out
    assert "warnings          variety (step 15): variety collapses\n" in out
    assert "\n                  length (step 20): long\n" in out


def test_show_prints_brackets_as_they_are(rlhf_command, registry: Registry):
    published(registry, metrics={"[red]": 1.0, ":smile:": 2.0})
    out = rlhf_command("show", "sft/tiny").out
    assert "[red]" in out
    assert ":smile:" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "sft/none"], "Finished sft runs: sft/tiny. `make sft RUN=none` makes it."),
        (["verify", "sft/none"], "`make sft RUN=none`"),
        (["show", "ppo/half"], "ppo/half: unfinished"),
        (["show", "../sft/tiny"], "'../sft/tiny': not a reference"),
        (["show", "sft/a/b"], "[A-Za-z0-9._=+,-]"),
        (["verify"], "name one run (rlhf verify sft/tiny), or give --all"),
        (["verify", "sft/tiny", "--all"], "name one run"),
    ],
)
def test_refusals_are_one_message_on_stderr_and_exit_code_2(
    rlhf_command, registry: Registry, arguments: list[str], message: str
):
    published(registry)
    with open_run(registry, "ppo", "half", CONFIG, {}) as run:
        run.metrics_path.write_text("{}")
    result = rlhf_command(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("refused: ")
    assert message in result.err
    assert "Traceback" not in result.err


def test_verify_says_what_is_sound_and_what_is_not(rlhf_command, registry: Registry):
    sft = published(registry)
    published(registry, "rm/tiny", {"policy": sft})
    with open_run(registry, "ppo", "half", CONFIG, {}) as run:
        run.metrics_path.write_text("{}")
    result = rlhf_command("verify", "--all")
    assert (result.code, result.err) == (0, "")
    assert result.out == "sft/tiny: sound\nrm/tiny: sound\n"
    assert rlhf_command("verify", "sft/tiny").out == "sft/tiny: sound\n"

    flip(sft.model_dir / "model.safetensors", 3)
    result = rlhf_command("verify", "--all")
    assert result.code == 2
    assert "sft/tiny: damaged\n  model/model.safetensors: sha256 differs" in result.out
    assert "rm/tiny: sound" in result.out
    assert result.err == "refused: 1 of 2 runs are not what was published.\n"
    assert rlhf_command("verify", "sft/tiny").code == 2
    assert rlhf_command("verify", "rm/tiny").code == 0


def test_verify_finds_a_broken_manifest(rlhf_command, registry: Registry):
    flip(published(registry).path / "manifest.json", 200)
    for arguments in (["verify", "sft/tiny"], ["verify", "--all"]):
        result = rlhf_command(*arguments)
        assert result.code == 2
        assert "sft/tiny/manifest.json" in result.out


def test_verify_all_of_nothing(rlhf_command, registry: Registry):
    assert rlhf_command("verify", "--all").out == f"No finished runs in {registry.runs_dir}.\n"


# ---------------------------------------------------------------- tables


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Print as on a terminal of so many columns."""

    def narrow(columns: int) -> None:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", str(columns))

    return narrow


def test_table_folds_on_a_terminal_and_loses_nothing(terminal, capsys):
    words = " ".join(["a b"] * 10)
    rows = [("run", words, "x" * 30), ("second", "", "y")]
    tables.print_table(("name", "words", "long"), rows)
    assert capsys.readouterr().out.splitlines() == [
        f"name     {'words':<39}   long",
        "─" * (6 + 3 + 39 + 3 + 30),
        f"run      {words}   {'x' * 30}",
        f"second   {'':<39}   y",
    ]
    terminal(40)
    tables.print_table(("name", "words", "long"), rows)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 40
    assert sum(line.count("b") for line in lines) == 10
    assert sum(line.count("x") for line in lines) == 30
    tables.print_table(("name", "words"), [("sft/a-long-name-to-copy", words)])
    assert "sft/a-long-name-to-copy   a b" in capsys.readouterr().out


def test_table_spells_out_what_would_steer_a_terminal(capsys):
    tables.print_table(("a", "b"), [("\x1b[2J", "two\nlines")])
    assert capsys.readouterr().out.splitlines()[2:] == ["\\x1b[2J   two", "          lines"]


def test_an_output_that_knows_no_lines_gets_plain_ones(registry: Registry):
    published(registry)
    for command in (["ls"], ["lineage", "sft/tiny"]):
        done = subprocess.run(
            [sys.executable, "-m", "rlhf.cli", *command],
            env=os.environ | {"PYTHONIOENCODING": "ascii"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "---" in done.stdout or "`-- sft/tiny" in done.stdout


# ---------------------------------------------------------------- lineage, diff


def test_lineage_is_a_tree_from_the_base_down(rlhf_command, registry: Registry):
    sft = published(registry)
    rm = published(registry, "rm/tiny", {"policy": sft}, metrics={"eval/accuracy": 0.875})
    published(registry, "ppo/tiny", {"policy": sft, "reward_model": rm})
    before = snapshot(registry.runs_dir)
    result = rlhf_command("lineage", "ppo/tiny")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines() == [
        "base model tiny-base (base-1)",
        "└── sft/tiny",
        "    │   method   lora rank=16, on sft/tiny",
        "    │   data     data/tiny, train: 90 rows",
        "    │   metrics  eval/loss 1.25, eval/gold 0.5",
        "    ├── rm/tiny",
        "    │   │   from     policy sft/tiny",
        "    │   │   method   lora rank=16, on sft/tiny",
        "    │   │   data     data/tiny, train: 90 rows",
        "    │   │   metrics  eval/accuracy 0.875",
        "    │   └── ppo/tiny",
        "    │           from     policy sft/tiny, reward_model rm/tiny",
        "    │           method   lora rank=16, on sft/tiny",
        "    │           data     data/tiny, train: 90 rows",
        "    │           metrics  eval/loss 1.25, eval/gold 0.5",
        "    └── ppo/tiny (above)",
        "",
        "used by no run",
    ]
    assert snapshot(registry.runs_dir) == before
    assert rlhf_command("lineage", "rm/tiny").out.endswith(
        "\nused by\n  ppo/tiny as reward_model\n"
    )


def test_lineage_marks_in_words_what_is_no_longer_so(rlhf_command, registry: Registry):
    sft = published(registry)
    rm = published(registry, "rm/tiny", {"policy": sft})
    published(registry, "ppo/tiny", {"policy": sft, "reward_model": rm})
    published(registry, config=CONFIG | {"seed": 1}, overwrite=True)
    out = rlhf_command("lineage", "ppo/tiny").out
    assert "sft/tiny  (changed since rm/tiny started from it; changed since ppo/tiny started" in out
    assert "from     policy sft/tiny (changed), reward_model rm/tiny\n" in out
    assert "rm/tiny as policy, which was another then" in rlhf_command("lineage", "sft/tiny").out

    flip(rm.path / "manifest.json", 200)
    (registry.runs_dir / "sft" / "tiny" / "manifest.json").unlink()
    out = rlhf_command("lineage", "ppo/tiny").out
    assert "── sft/tiny  (unfinished)" in out
    assert "── rm/tiny  (damaged)" in out
    assert "rm/tiny/manifest.json" in out
    assert "cannot be read, and might use it: rm/tiny" in out
    refused = rlhf_command("lineage", "rm/tiny")
    assert (refused.code, refused.out) == (2, "")


def test_lineage_of_names_in_a_circle_shows_each_once(rlhf_command, registry: Registry):
    first = published(registry, "ppo/a")
    second = published(registry, "ppo/b", {"policy": first})
    published(registry, "ppo/a", {"policy": second}, overwrite=True)
    lines = rlhf_command("lineage", "ppo/a").out.splitlines()
    assert [line.strip("└─ ") for line in lines if "── " in line] == [
        "ppo/b",
        "ppo/a  (changed since ppo/b started from it)",
        "ppo/b (above)",
    ]


def test_lineage_json(rlhf_command, registry: Registry):
    sft = published(registry)
    rm = published(registry, "rm/tiny", {"policy": sft})
    found = json.loads(rlhf_command("lineage", "rm/tiny", "--json").out)
    assert [run["reference"] for run in found["runs"]] == ["sft/tiny", "rm/tiny"]
    assert found["runs"][1]["parents"] == [
        {
            "role": "policy",
            "reference": "sft/tiny",
            "digest": sft.digest,
            "state": "sound",
            "problem": None,
        }
    ]
    assert found["runs"][0]["data"][0]["rows"] == 90
    assert (found["used_by"], found["unreadable"]) == ([], [])
    found = json.loads(rlhf_command("lineage", "sft/tiny", "--json").out)
    assert [(user["reference"], user["stale"]) for user in found["used_by"]] == [
        (rm.reference, False)
    ]


def test_diff_says_the_same_plainly(rlhf_command, registry: Registry):
    published(registry)
    published(registry, "sft/b", config=CONFIG | {"run": "b"})
    out = rlhf_command("diff", "sft/tiny", "sft/tiny").out
    assert out.startswith("sft/tiny and sft/tiny are the same in all that can change results.\n")
    for part in ("config", "parents", "data", "environment", "metrics"):
        assert f"{part}: the same\n" in out
    out = rlhf_command("diff", "sft/tiny", "sft/b").out
    assert "are the same in all that can change results" in out
    assert "run      tiny       b       no change of results\n" in out


def test_diff_shows_what_differs(rlhf_command, registry: Registry):
    published(registry)
    config = CONFIG | {"seed": 3, "run": "b"}
    published(registry, "sft/b", config=config, metrics={"eval/loss": 1.0, "eval/accuracy": 0.5})
    result = rlhf_command("diff", "sft/tiny", "sft/b")
    assert (result.code, result.err) == (0, "")
    rows = [line.split() for line in result.out.splitlines()]
    assert ["seed", "0", "3"] in rows
    assert ["run", "tiny", "b", "no", "change", "of", "results"] in rows
    assert ["eval/loss", "1.25", "1", "-0.25"] in rows
    assert ["eval/gold", "0.5"] in rows
    assert "the same in all" not in result.out
    found = json.loads(rlhf_command("diff", "sft/tiny", "sft/b", "--json").out)
    assert found["same"] is False
    assert found["config"][0] == {"name": "seed", "left": 0, "right": 3, "matters": True}
    assert found["metrics"][0] == {
        "name": "eval/loss",
        "left": 1.25,
        "right": 1.0,
        "change": -0.25,
    }
    assert rlhf_command("diff", "sft/tiny", "sft/none").code == 2


# ---------------------------------------------------------------- gc, rm


def test_gc_shows_each_thing_and_the_sum_and_a_dry_run_removes_nothing(
    rlhf_command, registry: Registry
):
    with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
        fill(run)
        for step in (10, 20, 30):
            save(run, step, keep=9)
    published(registry, "sft/done")
    with open_run(registry, "sft", "dead", CONFIG, {}) as run:
        run.metrics_path.write_text("{}")
    size = sum(p.stat().st_size for p in (registry.runs_dir / "sft/dead").rglob("*") if p.is_file())
    before = snapshot(registry.runs_dir)
    dry = rlhf_command("gc", "--dry-run")
    assert (dry.code, dry.err) == (0, "")
    assert snapshot(registry.runs_dir) == before
    last = f"1 thing, {size:,} bytes\n"
    assert dry.out.endswith(f"--dry-run: nothing was removed; it would be {last}")
    done = rlhf_command("gc")
    assert done.code == 0
    assert done.out.endswith(f"\nremoved: {last}")
    for out in (dry.out, done.out):
        assert ["sft/dead", "unfinished", "run", f"{size:,}"] == next(
            line.split()[:4] for line in out.splitlines() if line.startswith("sft/dead")
        )
        assert "could go on from step-000030; --unfinished" in out
    assert [run.reference for run in registry.runs()] == ["sft/done", "sft/tiny"]
    assert rlhf_command("gc").out.endswith("removed: nothing\n")
    assert "sft/tiny" in rlhf_command("gc", "--unfinished").out
    assert [run.reference for run in registry.runs()] == ["sft/done"]


def test_gc_of_runs_moved_aside(rlhf_command, registry: Registry):
    published(registry)
    published(registry, config=CONFIG | {"seed": 1}, overwrite=True)
    out = rlhf_command("gc").out
    assert ".replaced/sft-tiny-1" in out
    assert "overwrite=true moved it; --replaced" in out
    assert "1 thing" in rlhf_command("gc", "--replaced").out
    assert list((registry.runs_dir / ".replaced").iterdir()) == []


def test_gc_counts_only_what_went(
    rlhf_command, registry: Registry, monkeypatch: pytest.MonkeyPatch
):
    with open_run(registry, "sft", "dead", CONFIG, {}) as run:
        run.metrics_path.write_text("{}")
    monkeypatch.setattr(cleanup, "discard", lambda registry, items: items)
    out = rlhf_command("gc").out
    assert out.startswith("kept ")
    assert "sft/dead" in out
    assert out.endswith("removed: nothing\n")


def test_gc_says_which_run_stands_in_the_way(rlhf_command, registry: Registry):
    (published(registry).path / "manifest.json").write_text("{")
    with open_run(registry, "sft", "dead", CONFIG, {}) as run:
        run.metrics_path.write_text("{}")
    result = rlhf_command("gc")
    assert result.code == 0
    assert "sft/tiny might have started from it" in result.out
    assert result.err.startswith("sft/tiny: what it started from cannot be read")
    assert "rlhf rm sft/tiny" in result.err
    assert (registry.runs_dir / "sft/dead").is_dir()


def test_gc_of_nothing_makes_nothing(rlhf_command, registry: Registry):
    assert rlhf_command("gc").out == "removed: nothing\n"
    assert not registry.runs_dir.exists()


def test_rm(rlhf_command, registry: Registry):
    sft = published(registry)
    published(registry, "rm/tiny", {"policy": sft})
    refused = rlhf_command("rm", "sft/tiny")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith("refused: sft/tiny: not removed")
    assert "rm/tiny (finished): policy sft/tiny" in refused.err
    before = snapshot(registry.runs_dir / "rm")
    dry = rlhf_command("rm", "rm/tiny", "--dry-run")
    assert dry.code == 0
    assert dry.out.startswith("--dry-run: nothing was removed; it would be rm/tiny, ")
    assert snapshot(registry.runs_dir / "rm") == before
    assert rlhf_command("rm", "rm/tiny").out.startswith("removed: rm/tiny, ")
    assert rlhf_command("rm", "sft/tiny").code == 0
    assert registry.runs() == []
    assert "no such run" in rlhf_command("rm", "sft/tiny").err


def test_unknown_command_is_refused(rlhf_command):
    assert rlhf_command("train").code == 2


def test_as_a_process_it_answers_at_once_and_without_traceback(registry: Registry):
    published(registry)
    command = [sys.executable, "-m", "rlhf.cli"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    listed = subprocess.run([*command, "ls"], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (listed.returncode, listed.stderr) == (0, "")
    assert "sft/tiny" in listed.stdout
    # CPU seconds, whatever else runs: 0.4. Importing torch alone takes more than 2.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5
    refused = subprocess.run([*command, "show", "x"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
