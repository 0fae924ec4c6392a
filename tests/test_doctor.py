"""`rlhf doctor`: what it says of this machine and of a broken one; docs/guards.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf import cli, compatibility, doctor, guards, libraries, threads
from rlhf.config import PROJECT
from rlhf.guards import Device


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same machine for every test: no GPU, no W&B key, runs in a folder that is not there."""
    monkeypatch.setattr(guards, "device", lambda: Device("CPU", gpus=0, bf16=False, fp16=False))
    monkeypatch.setenv("RLHF_RUNS", str(tmp_path / "deep" / "runs"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", *threads.SETTINGS):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def rlhf_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rlhf", "doctor", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`installed(trl="1.12.0", peft=None)`: other versions than there are; None is missing."""

    def pretend(**versions: str | None) -> None:
        found = libraries.installed
        monkeypatch.setattr(
            libraries, "installed", lambda name: versions[name] if name in versions else found(name)
        )

    return pretend


def test_a_sound_machine(rlhf_doctor, tmp_path):
    code, out, err = rlhf_doctor()
    assert (code, err) == (0, "")
    assert out.endswith(
        "Sound: nothing here would stop every run. Why each rule: docs/guards.md.\n"
    )
    assert "than allowed" not in out
    lines = [line.split() for line in out.splitlines()]
    for name, bounds in libraries.needed().items():
        here = [name, libraries.installed(name), bounds, libraries.tested()[name]]
        assert here in [line[:4] for line in lines]
    python = ["python", sys.version.split()[0], ">=3.11,<3.14", "3.11,", "3.12,", "3.13", "tested"]
    assert python in lines
    for text in (
        "CPU (no CUDA device is seen): fp32; bf16 works and is slow",
        f"one for each 10M parameters on a CPU, 1 to {threads.usable_cores()}; OMP_WAIT_POLICY=",
        f"{tmp_path / 'deep' / 'runs'}: ",
        "GB free, can be written",
        "no key at hand: offline",
    ):
        assert text in out
    for rule in guards.RULES:
        assert any(line and line[0] == rule.name for line in lines), rule.name
    assert os.listdir(tmp_path) == []


def test_json_has_the_same_and_nothing_beside_it(rlhf_doctor):
    code, out, err = rlhf_doctor("--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert set(found) == {"problems", "notes", "libraries", "machine", "rules"}
    assert found["problems"] == []
    (trl,) = [one for one in found["libraries"] if one["name"] == "trl"]
    assert trl["installed"] == libraries.installed("trl")
    assert (trl["needs"], trl["tested"]) == (">=1.13,<2", libraries.tested()["trl"])
    assert trl["fits"] is True
    assert [rule["name"] for rule in found["rules"]] == [rule.name for rule in guards.RULES]
    (rule,) = [rule for rule in found["rules"] if rule["name"] == "zero3-adapter"]
    assert rule["way_out"] == "engine=zero2"
    assert rule["issues"][0] == "huggingface/peft#1328"


def test_a_library_outside_its_bounds_or_missing_is_2(rlhf_doctor, installed):
    installed(deepspeed="0.19.3", trl="1.9.2", peft=None)
    code, out, err = rlhf_doctor()
    assert code == 2
    assert err == (
        "refused: [library-bounds] trl 1.9.2 (>=1.13,<2 is needed), peft missing (>=0.21,<1 is "
        "needed), deepspeed 0.19.3 (>=0.19.8,<1 is needed). Run `pip install 'trl>=1.13,<2' "
        "'peft>=0.21,<1' 'deepspeed>=0.19.8,<1'`.\n"
    )
    assert "Sound" not in out
    rows = [line.split() for line in out.splitlines()]
    assert ["peft", "missing", ">=0.21,<1", libraries.tested()["peft"], "missing"] in rows
    assert ["trl", "1.9.2"] in [row[:2] for row in rows if row[-3:] == ["older", "than", "allowed"]]
    code, out, err = rlhf_doctor("--json")
    assert code == 2
    found = json.loads(out)
    assert [one["name"] for one in found["libraries"] if not one["fits"]] == [
        "trl",
        "peft",
        "deepspeed",
    ]
    assert len(found["problems"]) == 1


def test_the_same_versions_are_what_a_guard_refuses(rlhf_doctor, installed):
    installed(torch="2.14.0")
    assert list(guards.facts().outside) == ["torch"]
    assert rlhf_doctor()[0] == 2


def test_what_is_newer_than_tested_is_named_with_what_it_touches(rlhf_doctor, installed):
    """It is allowed: nothing is refused, and stages run."""
    installed(transformers="5.99.0", peft="0.21.0")
    code, out, err = rlhf_doctor()
    assert (code, err) == (0, "")
    tested = libraries.tested()["transformers"]
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert rows["peft"].endswith("older than tested")
    assert rows["torch"].endswith("  tested")
    (note,) = [line for line in out.splitlines() if "5.99.0 is newer" in line]
    assert note.startswith(f"transformers 5.99.0 is newer than tested ({tested}); it touches: ")
    for feature in ("SFT and reward models", "prefix_tuning", "PPO and evaluation: sampling"):
        assert feature in note
    assert "win rates" not in note
    found = json.loads(rlhf_doctor("--json")[1])
    assert found["notes"][0] == note


def test_what_has_changed_in_a_library_is_2_and_one_line(rlhf_doctor, monkeypatch):
    line = "trl 1.16.0: SFTTrainer has no evaluate (rlhf/supervised.py: SFT and reward models)"
    monkeypatch.setattr(compatibility, "changed", lambda: [line])
    code, _, err = rlhf_doctor()
    assert code == 2
    tested = libraries.tested()["trl"]
    assert err == (
        f"refused: [library-changed] {line}. Run `pip install 'trl=={tested}'`, which was tested.\n"
    )


def test_another_python_needs_another_environment(rlhf_doctor, monkeypatch):
    monkeypatch.setattr("platform.python_version", lambda: "3.10.14")
    code, _, err = rlhf_doctor()
    assert code == 2
    assert "python 3.10.14 (>=3.11,<3.14 is needed). Make an environment with that python." in err


def test_a_torch_that_cannot_be_imported_is_2(rlhf_doctor, monkeypatch):
    def broken() -> Device:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(guards, "device", broken)
    code, out, err = rlhf_doctor()
    assert code == 2
    assert "device         not known: libcudart.so.13" in out
    assert err.startswith("refused: torch cannot be used: libcudart.so.13")


def test_a_folder_that_cannot_be_written_is_2(rlhf_doctor, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "runs", Path("/proc/runs")):
        code, out, err = rlhf_doctor("--runs-dir", str(folder))
        assert code == 2, folder
        assert f"{folder}: cannot be written: " in out
        assert err.startswith(f"refused: runs_dir={folder}: cannot be written: ")
        assert "RLHF_RUNS" in err
    assert rlhf_doctor("--runs-dir", str(tmp_path))[0] == 0
    assert sorted(os.listdir(tmp_path)) == ["file"]


def test_gpus_and_what_they_compute_in(rlhf_doctor, monkeypatch):
    for device, text in (
        (Device("NVIDIA H200", 8, bf16=True, fp16=True), "8 x NVIDIA H200: fp32, bf16, fp16\n"),
        (Device("Tesla T4", 1, bf16=False, fp16=True), "1 x Tesla T4: fp32, fp16\n"),
    ):
        monkeypatch.setattr(guards, "device", lambda device=device: device)
        assert text in rlhf_doctor()[1]


def test_threads_and_wandb(rlhf_doctor, monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("WANDB_API_KEY", "secret-of-mine")
    out = rlhf_doctor()[1]
    assert "OMP_NUM_THREADS=1; " in out
    assert "a key is at hand: online" in out
    assert "secret" not in out
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret-of-mine\n")
    assert "a key is at hand: online" in rlhf_doctor()[1]
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "WANDB_MODE=offline" in rlhf_doctor()[1]


def test_the_real_command_prints_nothing_beside_its_json(tmp_path):
    """It imports every library that it looks at, and libraries like to talk."""
    done = subprocess.run(
        [sys.executable, "-m", "rlhf.cli", "doctor", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["machine"]["device"]


def test_docs_guards_md_is_what_the_tables_give(rlhf_doctor):
    code, out, err = rlhf_doctor("--markdown")
    assert (code, err) == (0, "")
    written = (PROJECT / "docs" / "guards.md").read_text()
    assert written == out, "run: rlhf doctor --markdown > docs/guards.md"
    assert out == doctor.as_markdown()
    for rule in guards.RULES:
        assert f"## {rule.name}\n" in out
        assert all(issue in out for issue in rule.issues)
