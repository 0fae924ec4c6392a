"""Versions of outside libraries: what is allowed, what was tested, and the lock they stand in."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from rlhf import libraries
from rlhf.config import PROJECT
from rlhf.errors import ConfigError

LOCK_NAME = "requirements.lock"
LOCK = (PROJECT / LOCK_NAME).read_text()
PINS = [line for line in LOCK.splitlines() if re.match(r"[a-z]", line)]


def test_the_lock_names_no_index_no_link_and_no_path():
    """So that it installs from wherever a machine takes its packages."""
    for line in filter(None, LOCK.splitlines()):
        assert re.fullmatch(
            r"# first: torch==[\d.]+|"  # the version alone: builds for CPU and CUDA differ
            r"[a-z0-9.-]+==[\w.]+( ; [\w .'<>=!()]+)? \\|"
            r"    --hash=sha256:[0-9a-f]{64}( \\)?|"
            r"    # via [\w ,.()\[\]-]+|"
            r"#.*",
            line,
        ), line
        assert not re.search(r"://|--(?!hash)|file:|\s/|@ |find-links|index", line), line


def test_every_pin_has_hashes_and_none_is_torch_or_of_cuda():
    blocks = re.split(r"^(?=[a-z])", LOCK, flags=re.M)[1:]
    assert len(blocks) == len(PINS) > 80
    for block in blocks:
        assert "--hash=sha256:" in block, block[:60]
    names = {Requirement(pin.rstrip(" \\")).name for pin in PINS}
    for name in names:
        assert name not in ("torch", "triton", "pip"), name
        assert not name.startswith(("nvidia-", "cuda-")), name


def test_the_lock_holds_what_pyproject_asks_for_within_its_bounds():
    """`make lock` after a change there."""
    tested = libraries.tested()
    needs = libraries.needed() | libraries.needed("dev") | libraries.needed("dashboard")
    for name, bounds in needs.items():
        assert libraries.within(tested[name], bounds), (name, tested[name], bounds)


def test_what_is_installed_is_what_the_lock_says():
    """After `make setup`; the tests of other versions say which those are."""
    wrong = {}
    for name in libraries.needed():
        needs, tested = libraries.needed()[name], libraries.tested()[name]
        standing = libraries.standing(libraries.installed(name), needs, tested)
        if standing != libraries.TESTED:
            wrong[name] = standing
    if wrong and not (Path(sys.prefix) / ".ready-locked").exists():
        pytest.skip(f"not installed by `make setup`: {wrong}")
    assert wrong == {}


@pytest.mark.parametrize(
    ("version", "bounds", "tested", "standing"),
    [
        ("2.13.0+cpu", ">=2.11,<2.14", "2.13.0", "tested"),
        ("2.13.0+cu130", ">=2.11,<2.14", "2.13.0", "tested"),
        ("2.13.1", ">=2.11,<2.14", "2.13.0", "newer than tested"),
        ("2.9.1", ">=2.11,<2.14", "2.13.0", "older than allowed"),  # not compared as a string
        ("2.12.1", ">=2.11,<2.14", "2.13.0", "older than tested"),
        ("2.14.0", ">=2.11,<2.14", "2.13.0", "newer than allowed"),
        ("5.9.0", ">=5.20.2,<6", "5.24.0", "older than allowed"),
        ("6.0.0", ">=5.20.2,<6", "5.24.0", "newer than allowed"),
        ("5.100.0", ">=5.20.2,<6", "5.24.0", "newer than tested"),
        ("0.50.2", ">=0.50,<1", None, ""),
        (None, ">=0.50,<1", None, "missing"),
        ("unknown", ">=0.50,<1", "0.50", "no version"),
    ],
)
def test_how_a_version_stands(version, bounds, tested, standing):
    assert libraries.standing(version, bounds, tested) == standing


@pytest.mark.parametrize(
    ("version", "standing"),
    [
        ("3.11.7", "tested"),
        ("3.13.0", "tested"),
        ("3.10.14", "older than allowed"),
        ("3.14.0", "newer than allowed"),
    ],
)
def test_every_patch_of_a_tested_python_is_tested(version, standing):
    assert libraries.standing_of_python(version, libraries.needed_python()) == standing


def test_markers_choose_the_pin_of_this_python(monkeypatch):
    text = (
        "# first: torch==2.13.0\n"
        "numpy==2.4.6 ; python_full_version < '3.0' \\\n    --hash=sha256:00\n"
        "numpy==2.5.5 ; python_full_version >= '3.0' \\\n    --hash=sha256:00\n"
        "# torch==1.0\n"
    )
    monkeypatch.setattr(libraries, "_lock", lambda: text)
    assert libraries.tested.__wrapped__() == {"torch": "2.13.0", "numpy": "2.5.5"}


def test_make_setup_takes_the_pythons_that_were_tested():
    makefile = (PROJECT / "Makefile").read_text()
    (named,) = re.findall(r"v\[:2\] in \((.*?)\) or", makefile)
    found = re.findall(r"\((\d), (\d+)\)", named)
    assert tuple(f"{major}.{minor}" for major, minor in found) == libraries.tested_pythons()
    for minor in libraries.tested_pythons():
        assert libraries.within(f"{minor}.0", libraries.needed_python())


def test_a_checkout_that_was_not_installed_says_so(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    with pytest.raises(ConfigError, match=r"rlhf: it is not installed.*make setup"):
        libraries.needed()
