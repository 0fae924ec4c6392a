"""`rlhf sync`: upload to W&B what was tracked offline, by W&B's own command.

A run that was interrupted has one folder for each process that wrote it, with the same id; W&B
appends them to one another, so they go in the order in which they were written.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from rlhf import locks, wandb_run
from rlhf.errors import ConfigError, RegistryError
from rlhf.registry import Registry, RunInfo

COMMAND = [sys.executable, "-m", "wandb", "sync"]
REACH_SECONDS = 10.0
NAME = re.compile(r"(offline-)?run-(?P<second>\d+_\d+)-[^-]+(-(?P<number>\d+))?")


@dataclass(frozen=True)
class Part:
    """What one process tracked of a run.

    Attributes:
        reference: the run.
        folder: W&B's, in the run's folder.
        state: "to upload", "uploaded" (W&B left its mark), "replaced" (a later process went on
            online and sent these numbers, too), or "at work" (a process writes the run).
    """

    reference: str
    folder: Path
    state: str


def choose(registry: Registry, references: Sequence[str]) -> list[RunInfo]:
    """The runs that are meant, finished or not; all of them where none is named.

    Raises:
        RegistryError: there is none of that name.
    """
    runs = {run.reference: run for run in registry.runs()}
    for name in references:
        if name not in runs:
            known = ", ".join(runs) or "none"
            raise RegistryError(f"{name}: no such run in {registry.runs_dir}; there are: {known}.")
    return [runs[name] for name in dict.fromkeys(references or runs)]


def parts(registry: Registry, runs: Sequence[RunInfo]) -> list[Part]:
    """What was tracked offline of some runs, the oldest part of each first."""
    found = []
    for run in runs:
        busy = locks.holder(registry.runs_dir, run.reference) is not None
        folders = sorted(filter(_named, (run.path / "wandb").glob("offline-run-*")), key=_when)
        for folder in folders:
            state = "at work" if busy else _state(folder)
            found.append(Part(run.reference, folder, state))
    return found


def _named(folder: Path) -> re.Match[str] | None:
    """Its second and number; None where a folder has no name of W&B's, such as a copy."""
    return NAME.fullmatch(folder.name)


def _when(folder: Path) -> tuple[str, int]:
    """When it began: its second, and its number where that second saw several.

    W&B names it `offline-run-20260102_030405-<id>`, and `...-<id>-1` beside such a one.
    """
    found = _named(folder)
    assert found is not None
    return found["second"], int(found["number"] or 0)


def _state(folder: Path) -> str:
    if any(folder.glob("*.wandb.synced")):
        return "uploaded"
    name = folder.name.removeprefix("offline-").split("-")[2]  # the id
    online = filter(_named, folder.parent.glob(f"run-*-{name}*"))
    later = [_when(one) for one in online]
    return "replaced" if any(when > _when(folder) for when in later) else "to upload"


def upload(found: Sequence[Part], say: Callable[[str], None]) -> None:
    """Upload what is to upload, in order; a run whose part fails waits with the rest of it.

    Args:
        found: as `parts` gives them.
        say: gets a line for each part.

    Raises:
        ConfigError: no W&B key, or its server cannot be reached.
        RegistryError: some were not uploaded.
    """
    waiting = [part for part in found if part.state == "to upload"]
    if not waiting:
        return
    url, key = wandb_run.account()
    if key is None:
        raise ConfigError(
            "sync: no W&B key at hand. Set WANDB_API_KEY or run `wandb login`, and give the same "
            "command again; what was tracked stays in the runs until then."
        )
    _expect_reachable(url)
    failed: list[str] = []
    for part in waiting:
        if part.reference in failed:
            say(f"{part.reference}: {part.folder.name} waits for the part before it")
            continue
        env = os.environ | {"WANDB_ERROR_REPORTING": "false"}
        env |= {"WANDB_API_KEY": key} if key else {}
        subprocess.run([*COMMAND, str(part.folder)], env=env, check=False)
        if _state(part.folder) == "uploaded":  # it exits 0 whatever happens
            say(f"{part.reference}: {part.folder.name} uploaded")
        else:
            failed.append(part.reference)
            say(f"{part.reference}: {part.folder.name} not uploaded")
    if failed:
        raise RegistryError(
            f"sync: not uploaded: {', '.join(failed)}. W&B says why above; the same command goes "
            "on with what is left."
        )


def _expect_reachable(url: str) -> None:
    """W&B's command tries for minutes where there is no network."""
    if any(name in os.environ for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY")):
        return  # the proxy's business
    address = urlsplit(url)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), REACH_SECONDS).close()
    except OSError as error:
        raise ConfigError(
            f"sync: {url} cannot be reached ({error.strerror or error}). Give the same command "
            "where there is a network; a runs folder may be copied there."
        ) from error
