"""The parts of a published model, by the names people know them by, read without torch.

`model/tensors.json` keeps the part and the sha256 of every tensor. When a file, or what the model
says, is not what it was, this tells which part is off: head, adapter, base, tokenizer, template.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from rlhf.errors import RegistryError
from rlhf.manifest import write_last

FILE = "tensors.json"
BASE = "base"  # folder of the weights under an adapter that cannot be merged
HEAD = "score."  # how transformers names the scalar head
GOLDEN = "golden.safetensors"  # tensors beside the weights that are none

_FILES = {  # in the order they are asked
    "adapter": ("adapter/*",),
    "template": ("chat_template*",),
    "tokenizer": (
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab*",
        "merges*",
    ),
    "golden values": ("golden*",),
    "weights": ("*.safetensors", "*.safetensors.index.json", FILE),
    "model settings": ("config.json", "generation_config.json"),
}


def of_file(name: str) -> str:
    """The part that a file of a run belongs to; its own name where it belongs to none.

    Args:
        name: path below the run, as in a manifest: "model/tokenizer.json".
    """
    inside = name.removeprefix("model/")
    for part, patterns in _FILES.items():
        if inside != name and any(PurePosixPath(inside).match(pattern) for pattern in patterns):
            return part
    return name


def of_tensor(name: str, adapted: Iterable[str]) -> str:
    """ "head", "adapter" (a layer that an adapter was merged into) or "base"."""
    if name.startswith(HEAD) or (name.startswith("adapter/") and f".{HEAD}" in name):
        return "head"
    if name.startswith("adapter/"):
        return "adapter"
    return "adapter" if name.rpartition(".")[0] in adapted else "base"


def tensors(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, sha256 of type, shape and bytes) of each tensor in the weights of `folder`.

    The tensors of its adapter, which are merged into the weights too, are named "adapter/...".

    Raises:
        ValueError: a file is not whole safetensors; the message names it.
    """
    for path in sorted([*folder.glob("*.safetensors"), *(folder / BASE).glob("*.safetensors")]):
        if path.name != GOLDEN:
            yield from _tensors(path)
    for path in sorted((folder / "adapter").glob("*.safetensors")):
        for name, digest in _tensors(path):
            yield f"adapter/{name}", digest


def _tensors(path: Path) -> Iterator[tuple[str, str]]:
    # 8 bytes: length of the header; the header: JSON; the rest: bytes at the header's offsets.
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                begin, end = about["data_offsets"]
                digest = hashlib.sha256(f"{about['dtype']} {about['shape']}".encode())
                file.seek(8 + length + begin)
                while begin < end:
                    if not (chunk := file.read(min(end - begin, 1 << 24))):
                        raise ValueError("it is cut short")
                    digest.update(chunk)
                    begin += len(chunk)
                yield name, digest.hexdigest()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name}: not whole safetensors ({error})") from error


def refuse_empty(folder: Path) -> None:
    """Read back what was just written: a tensor without a value is none that was trained.

    Raises:
        RegistryError: weights that ZeRO-3 had split were saved without being gathered.
    """
    paths = [
        path for part in (".", BASE, "adapter") for path in folder.glob(f"{part}/*.safetensors")
    ]
    empty = []
    for path in sorted(paths):
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        empty += [name for name, about in header.items() if 0 in about["shape"]]
    if empty:
        raise RegistryError(
            f"{folder}: {len(empty)} of the tensors that were written are empty ({empty[0]}, ...): "
            "weights split over the processes were saved without being gathered. Nothing is "
            "published. Use engine=zero2, and report this."
        )


def record(folder: Path, adapted: Iterable[str] = ()) -> None:
    """Write tensors.json beside the weights in `folder`.

    Args:
        adapted: names of the layers that an adapter was merged into.
    """
    adapted = set(adapted)
    known = {
        name: {"part": of_tensor(name, adapted), "sha256": digest}
        for name, digest in tensors(folder)
    }
    write_last(folder / FILE, json.dumps(known, indent=0, sort_keys=True) + "\n")


def changed(folder: Path) -> list[str]:
    """What differs from tensors.json, one phrase a part: "head (score.weight)"; [] if nothing."""
    try:
        known = json.loads((folder / FILE).read_text())
        pairs = {name: (about["part"], about["sha256"]) for name, about in known.items()}
        now = dict(tensors(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"weights ({error})"]
    off = defaultdict(list)
    for name in sorted(pairs.keys() | now.keys()):
        part, digest = pairs.get(name, ("base", None))
        if now.get(name) != digest:
            off[part].append(name)
    return [
        f"{part} ({', '.join(names[:2])}{f' and {len(names) - 2} more' if names[2:] else ''})"
        for part, names in sorted(off.items())
    ]
