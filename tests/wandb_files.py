"""What W&B wrote offline, read back.

W&B's offline file is a LevelDB log after a 7-byte header: blocks of 32 KiB with pieces of records,
each under checksum (4 bytes), size (2), kind (1: whole, 2-4: first, middle, last). A run that was
interrupted has several such files, each in a folder named by its second and the id of the run.
"""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

from rlhf.metrics import find


def parse_records(raw: bytes) -> list[Any]:
    """The records of a file, as protobuf messages; what is still being written is left out."""
    from wandb.proto.wandb_internal_pb2 import Record

    assert raw[:4] in (b"", b":W&B")
    found, pending, at = [], b"", 7
    while at + 7 <= len(raw):
        room = -at % 32768
        if 0 < room < 7:  # too small for a header: zeros up to the next block
            at += room
            continue
        size, kind = struct.unpack_from("<4xHB", raw, at)
        if at + 7 + size > len(raw):
            break
        pending += raw[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            found.append(Record.FromString(pending))
            pending = b""
    return found


def parts(folder: Path, *, ended: bool = True) -> list[list[Any]]:
    """The records of each part of the run below `folder`, the oldest first.

    wandb's own process writes the file and may be some milliseconds behind `finish`: wait for the
    record of its end, unless the part was killed (`ended` False: only the last one is waited for).
    """
    folders = sorted(folder.glob("wandb/offline-run-*"))  # by time, id, and number in a second
    paths = [path for one in folders for path in one.glob("*.wandb")]
    give_up = time.monotonic() + 20
    while True:
        found = [parse_records(path.read_bytes()) for path in paths]
        waiting = found if ended else found[-1:]
        if all(any(r.HasField("exit") for r in part) for part in waiting):
            return found
        if time.monotonic() > give_up:
            return found
        time.sleep(0.01)


def records(folder: Path) -> list[Any]:
    """The records of a run that one process wrote."""
    (found,) = parts(folder)
    return found


def items(messages: Any) -> dict[str, Any]:
    """key -> value of W&B's (key or nested_key, JSON text) pairs."""
    return {
        "/".join(m.nested_key) if m.nested_key else m.key: json.loads(m.value_json)
        for m in messages
    }


def inside(messages: Any, key: str) -> dict[str, Any]:
    """What W&B has under a key that is no number: a histogram or a table."""
    nested = [m for m in messages if len(m.nested_key) == 2 and m.nested_key[0] == key]
    return {m.nested_key[1]: json.loads(m.value_json) for m in nested}


def rows(found: list[Any]) -> list[dict[str, Any]]:
    """The rows of some records: metrics with their `_step`."""
    every = [items(r.history.item) for r in found if r.HasField("history")]
    return [{k: v for k, v in row.items() if find(k) or k == "_step"} for row in every]
