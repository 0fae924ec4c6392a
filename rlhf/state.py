"""What an interrupted run goes on with: `state_dict()` and `load_state_dict(state)`, as in torch.

A state holds JSON values, and things with `save(folder)`, such as weights with their optimizer:
each gets a folder of its own in a checkpoint, and comes back as the path of that folder. Whatever
has a state is registered once, by `Checkpoints.track`. No torch.

`state.json` in a checkpoint holds them: {"version", "world_size", "objects": name -> state}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from rlhf.errors import RegistryError
from rlhf.manifest import read_typed

T = TypeVar("T")

FILE = "state.json"
VERSION = 2  # of that file; 1 had no version in it
WAYS_OUT = (
    "Finish the run with the program that began it, or start it again: overwrite=true moves it "
    "aside, run_name=... makes another."
)


@runtime_checkable
class Saves(Protocol):
    """Something too large for JSON."""

    def save(self, folder: Path) -> None:
        """Write it to `folder`, which need not exist; every process calls it."""


class Stateful(Protocol):
    """What a resumed run goes on with. The JSON values of rank 0 are those of all processes."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes, but for paths in the place of what `Saves`."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the object that gave `state`.

        Raises:
            RegistryError: a key is missing, unknown, or holds a value of another type.
        """


def read_state(kind: type[T], state: Mapping[str, Any], owner: object) -> T:
    """`state` as the dataclass `kind`, which names its keys and their types.

    Raises:
        RegistryError: a key is missing, unknown, or holds a value of another type.
    """
    read: T = read_typed(kind, dict(state), f"state of {type(owner).__name__}")
    return read


def read_file(checkpoint: Path) -> dict[str, Any]:
    """What `state.json` in the folder of a checkpoint holds.

    Raises:
        RegistryError: another version of this program wrote it.
    """
    found: dict[str, Any] = json.loads((checkpoint / FILE).read_text(encoding="utf-8"))
    if (version := found.get("version", 1)) != VERSION:
        raise RegistryError(
            f"{checkpoint}: its {FILE} is of version {version}, and this program reads version "
            f"{VERSION}: a resumed run would not be the one that was interrupted. {WAYS_OUT}"
        )
    return found
