"""The package as others install it: from a wheel, far from any checkout."""

from __future__ import annotations

import email
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from rlhf import libraries
from rlhf.config import PROJECT

SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", libraries.LOCK)
FOLDERS = ("rlhf", "conf", "stages", "data/tiny")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in the environment of `make setup`, without a network, from a copy."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        shutil.copy(PROJECT / name, source)
    for name in FOLDERS:
        shutil.copytree(PROJECT / name, source / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """An environment with the wheel and with the libraries of this one: its folder of commands."""
    folder = wheel.parent / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    places = {"base": str(folder), "platbase": str(folder)}
    own = sysconfig.get_path("purelib", "venv", vars=places)
    libraries_here = dict.fromkeys(map(sysconfig.get_path, ("purelib", "platlib")))
    Path(own, "libraries.pth").write_text("\n".join(libraries_here) + "\n")
    python = str(folder / "bin/python")
    pip("--python", python, "install", "--no-deps", "--no-index", str(wheel))
    return folder / "bin"


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def run(installed: Path, folder: Path, *command: str) -> tuple[int, str, str]:
    """A command of that environment in an empty folder: exit code, stdout, stderr."""
    done = subprocess.run(
        [str(installed / command[0]), *command[1:]],
        capture_output=True,
        text=True,
        cwd=folder,
        env={n: x for n, x in os.environ.items() if n != "PYTHONPATH"} | {"COLUMNS": "200"},
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_all_that_lies_beside_the_package_travels_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        assert opened.read(f"rlhf/{libraries.LOCK}") == (PROJECT / libraries.LOCK).read_bytes()
    listed = subprocess.run(
        ["git", "ls-files", *FOLDERS], cwd=PROJECT, capture_output=True, text=True, check=False
    ).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    missing = {f"rlhf/{name.removeprefix('rlhf/')}" for name in listed} - names
    assert missing == set()
    assert not [name for name in names if "__pycache__" in name]


def test_a_wheel_says_what_it_needs(wheel, monkeypatch):
    """The bounds, those of extras apart, and the pythons: as this checkout was installed."""
    expected = (libraries.needed(), libraries.needed("qlora"), libraries.needed_python())
    pythons = libraries.tested_pythons()
    with zipfile.ZipFile(wheel) as opened:
        (named,) = [n for n in opened.namelist() if n.endswith(".dist-info/METADATA")]
        said = email.message_from_bytes(opened.read(named))
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: said)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: said.get_all("Requires-Dist"))
    found = (libraries.needed(), libraries.needed("qlora"), libraries.needed_python())
    assert found == expected
    assert libraries.tested_pythons.__wrapped__() == pythons


def test_commands_work_far_from_a_checkout(installed, tmp_path):
    code, out, err = run(installed, tmp_path, "rlhf", "doctor")
    assert "Traceback" not in err
    assert code == 0, out
    line = next(line for line in out.splitlines() if line.startswith("transformers "))
    assert libraries.tested()["transformers"] in line
    for command in (["rlhf"], ["python", "-m", "rlhf"]):
        code, out, err = run(installed, tmp_path, *command, "ls")
        assert (code, err) == (0, "")
        assert out.startswith("No runs in runs.")
    code, _, err = run(installed, tmp_path, "python", "-m", "rlhf", "show", "sft/none")
    assert (code, err.startswith("refused: sft/none: ")) == (2, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["engine=zero3"], "refused: [zero3-adapter] "),
        (["method=lorra"], "refused: method=lorra: no such choice. Choose one of: adalora, "),
        (["train.learning_rat=1"], "Did you mean train.learning_rate?"),
        (["data.path=nowhere"], "refused: data.path=nowhere: "),
    ],
)
def test_a_stage_refuses_there_as_here(installed, tmp_path, given, said):
    """Composed from the conf/ in the wheel; the built-in model and data are there too."""
    stage = ["python", "-m", "rlhf.stages.sft"]
    code, out, err = run(installed, tmp_path, *stage, "tracking=off", *given)
    assert (code, out) == (2, "")
    assert said in " ".join(err.split())
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
