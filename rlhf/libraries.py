"""Outside libraries: the versions that are allowed, that were tested, and that are here.

The bounds are those that the package was installed with, from `pyproject.toml`;
`requirements.lock` holds the versions that the tests ran with.
Nothing here imports one of them.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from rlhf.config import PROJECT
from rlhf.errors import ConfigError

LOCK = "requirements.lock"
PINNED = re.compile(r"^(?:# first: )?([a-z0-9.-]+==[^ \\]+)( ; [^\\]+)?")  # a line of the lock

TESTED = "tested"
NEWER = "newer than tested"
OLDER = "older than tested"
TOO_OLD = "older than allowed"
TOO_NEW = "newer than allowed"
MISSING = "missing"
UNKNOWN = "no version"


def _requirements() -> list[Requirement]:
    """Those of the package; an extra's are marked by it."""
    try:
        return list(map(Requirement, importlib.metadata.requires("rlhf") or ()))
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(
            "rlhf: it is not installed, so the bounds of its libraries are not known. Run `make "
            "setup`, or `pip install -e .` in the checkout."
        ) from error


def needed(extra: str | None = None) -> dict[str, str]:
    """Library -> the versions that are allowed, always or with one of the extras."""
    wanted = [one for one in _requirements() if _extra_of(one) == extra]
    return {one.name: _in_order(one.specifier) for one in wanted}


def _in_order(bounds: SpecifierSet) -> str:
    return ",".join(sorted(map(str, bounds), reverse=True))


def needed_python() -> str:
    """The versions of Python that are allowed."""
    return _in_order(SpecifierSet(importlib.metadata.metadata("rlhf")["Requires-Python"]))


def _extra_of(requirement: Requirement) -> str | None:
    found = re.search(r"extra == [\"']([^\"']+)", str(requirement.marker or ""))
    return found.group(1) if found else None


@cache
def tested() -> Mapping[str, str]:
    """Library -> the version that the tests ran with on this Python; empty without a lock."""
    found = {}
    for line in _lock().splitlines():
        if pin := PINNED.match(line):
            one = Requirement("".join(part or "" for part in pin.groups()))
            if one.marker is None or one.marker.evaluate():
                found[one.name] = next(iter(one.specifier)).version
    return found


def _lock() -> str:
    """The text of the lock; empty where there is none."""
    path = PROJECT / LOCK
    return path.read_text(encoding="utf-8") if path.is_file() else ""


@cache
def tested_pythons() -> tuple[str, ...]:
    """The versions of Python that the classifiers name: those that the tests ran with."""
    named = importlib.metadata.metadata("rlhf").get_all("Classifier") or []
    return tuple(re.findall(r"Python :: (\d+\.\d+)", "\n".join(named)))


def installed(library: str) -> str | None:
    """The version of a library that is installed, without importing it."""
    if library == "python":
        return platform.python_version()
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def within(version: str, bounds: str) -> bool:
    """Whether a version lies in bounds such as ">=2.11,<2.14". Pre-releases and builds count."""
    return SpecifierSet(bounds).contains(version, prereleases=True)


def standing(version: str | None, bounds: str, tested: str | None) -> str:
    """How a version stands to the bounds, and to the one that was tested.

    Returns:
        TESTED, NEWER or OLDER within the bounds (empty where nothing was tested); TOO_OLD or
        TOO_NEW; MISSING, or UNKNOWN for a text that is no version.
    """
    if version is None:
        return MISSING
    try:
        here = Version(Version(version).public)  # 2.13.0+cpu and +cu130 are 2.13.0
    except InvalidVersion:
        return UNKNOWN
    if not within(version, bounds):
        lowest = [Version(one.version) for one in SpecifierSet(bounds) if one.operator == ">="]
        return TOO_OLD if lowest and here < max(lowest) else TOO_NEW
    if tested is None:
        return ""
    if here == Version(tested):
        return TESTED
    return NEWER if here > Version(tested) else OLDER


def standing_of_python(version: str, bounds: str) -> str:
    """As `standing`, for Python: of a minor release all patches count as tested."""
    minor = ".".join(version.split(".")[:2])
    if not within(version, bounds) or minor in tested_pythons():
        return standing(version, bounds, version)
    return standing(minor, bounds, max(tested_pythons(), key=Version))


# ---------------------------------------------------------------- what has changed in one


def named(library: str) -> str:
    """A library with its version: "transformers 5.24.0"."""
    return f"{library} {installed(library) or '(version unknown)'}"


def lacking(owner: object, *names: str) -> Iterator[str]:
    """A line where a module or class of an outside library is without some of these names.

    "a|b" stands for either name.
    """
    missing = [one for one in names if not any(hasattr(owner, name) for name in one.split("|"))]
    if missing:
        yield f"{_of(owner)} has no {_listed(missing)}"


def refusing(function: object, *arguments: str) -> Iterator[str]:
    """A line where a function of an outside library no longer takes some of these arguments.

    "a|b" stands for either name. It has to name them: what goes into `**kwargs` may be dropped.
    """
    import inspect

    taken = inspect.signature(function).parameters  # type: ignore[arg-type]
    missing = [one for one in arguments if not any(name in taken for name in one.split("|"))]
    if missing:
        yield f"{_of(function)} takes no {_listed(missing)}"


def unmentioned(owner: Any, *words: str) -> Iterator[str]:
    """A line where the files of a class, and of what it inherits, are without some of these words.

    For fields that are made as an object works, and for keys and texts: they are in no signature.
    """
    import inspect

    files = {inspect.getsourcefile(one) for one in getattr(owner, "__mro__", (owner, object))[:-1]}
    code = "".join(Path(file).read_text(encoding="utf-8") for file in files if file)
    missing = [word for word in words if not re.search(rf"\b{re.escape(word)}\b", code)]
    if missing:
        yield f"{_of(owner)} no longer mentions {', '.join(missing)}"


def _listed(names: list[str]) -> str:
    return ", ".join(names).replace("|", " or ")


def _of(thing: object) -> str:
    """Where something comes from, and what it is called."""
    module = str(getattr(thing, "__module__", None) or getattr(thing, "__name__", ""))
    name = getattr(thing, "__qualname__", getattr(thing, "__name__", str(thing)))
    return f"{named(module.split('.')[0])}: {name}"
