"""What the README promises, tried as a newcomer would: a fresh clone, nothing inherited.

`make test-readme`: it installs everything anew from the package index, which takes minutes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.config import PROJECT

# What libraries and compilers say of themselves, which is no business of a user's.
NOISE = re.compile(
    r"warning|deprecat|traceback|/usr/bin/ld|cannot find -l|\bgcc\b|\bg\+\+|ninja|\[INFO\]|"
    r"real_accelerator|FutureWarning|it/s\]",
    re.IGNORECASE,
)
# So few steps that it ends soon; all else is as the README has it.
SHORT = {
    "SFT_ARGS": "train.max_steps=2 data.max_rows=64",
    "RM_ARGS": "train.max_steps=2 data.max_rows=64",
    "PPO_ARGS": "ppo.steps=2 ppo.batch_size=16 data.max_rows=32",
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fresh") / "rlhf"
    subprocess.run(["git", "clone", "--quiet", str(PROJECT), str(folder)], check=True)
    return folder


def make(clone: Path, *targets: str, **dials: str) -> str:
    """What `make` prints there, with nothing in its environment but a path and a home."""
    python = Path(os.path.realpath(sys.executable)).parent
    home = clone.parent / "home"
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        ["make", *targets, *(f"{name}={value}" for name, value in dials.items())],
        cwd=clone,
        env={"PATH": f"{python}:/usr/bin:/bin", "HOME": str(home), "LANG": "C.UTF-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.mark.readme
def test_the_two_commands_of_the_readme(clone):
    """And nothing is left behind that git would see."""
    readme = (PROJECT / "README.md").read_text()
    assert "```\nmake setup\nmake sft rm ppo\n```" in readme
    make(clone, "setup")
    assert make(clone, "setup") == "make: Nothing to be done for 'setup'.\n"
    out = make(clone, "sft", "rm", "ppo", **SHORT)
    for stage in ("sft", "rm", "ppo"):
        assert re.search(rf"^published: .*runs/{stage}/tiny$", out, re.MULTILINE), out
    noisy = [line for line in out.splitlines() if NOISE.search(line)]
    assert noisy == []
    left = subprocess.run(
        ["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True
    )
    assert left.stdout == ""
