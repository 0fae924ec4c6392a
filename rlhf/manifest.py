"""What a finished run, or a checkpoint, says about itself: typed, checked on reading, written last.

A manifest is one JSON file. It lists every immutable file with size and sha256 and ends with a
digest of itself, so that any changed byte is found. Paths inside it cannot leave the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import rlhf
from rlhf.errors import RegistryError

SCHEMA = 3
MANIFEST = "manifest.json"
CARD = "card.json"  # of a reward model; see card.py
# Immutable, beside all of model/.
TOP_FILES = ("config.yaml", "metrics.jsonl", "samples.jsonl", "samples_log.jsonl", CARD)
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "deepspeed")
STEP = re.compile(r"step-([0-9]{1,12})")

VERDICTS = ("go", "caution", "no-go")  # of report cards
OPTIONAL = {"optional": True}  # a field that manifests may lack, and that is left out where empty

M = TypeVar("M")

# ---------------------------------------------------------------- what is recorded


@dataclass(frozen=True)
class Parent:
    """A run that this one started from; `digest` is the sha256 of its manifest.json."""

    role: str  # "policy", "reward_model"
    reference: str
    digest: str


@dataclass(frozen=True)
class BaseModel:
    """The model at the root of the line of work."""

    name: str  # hub name or path
    revision: str | None
    fingerprint: str  # of the weights


@dataclass(frozen=True)
class TokenizerFacts:
    """What must be equal between policy and reward model."""

    tokenizer_hash: str
    template_hash: str
    pad_id: int
    eos_id: int
    bos_id: int | None = None


@dataclass(frozen=True)
class Method:
    """How weights were trained; `adapter_chain`: the runs whose adapters lie under this one."""

    name: str
    adapter_chain: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Method:
        """From a dict with at least a name; what is not a field here becomes a setting."""
        known, rest = _split(cls, given)
        return read_typed(
            cls,
            {"adapter_chain": []} | known | {"settings": rest | known.get("settings", {})},
            "method",
        )


@dataclass(frozen=True)
class DataFacts:
    """One split of the data as it was used."""

    source: str
    split: str
    fingerprint: str
    rows: int
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows


@dataclass(frozen=True)
class Environment:
    """Where it ran, and on what."""

    world_size: int
    zero_stage: int
    dtype: str
    device: str
    seed: int
    libraries: dict[str, str]
    other: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Environment:
        """From a dict; library versions are looked up when absent, what is no field is `other`."""
        known, rest = _split(cls, given)
        known["other"] = rest | known.get("other", {})
        known.setdefault("libraries", library_versions())
        return read_typed(cls, known, "environment")


@dataclass(frozen=True)
class Phase:
    """The cost of one part of a run."""

    seconds: float
    peak_memory_gb: float | None = None


@dataclass(frozen=True)
class CardFacts:
    """What the report card of a reward model comes to: one of VERDICTS, and why."""

    verdict: str
    reasons: list[str]


@dataclass(frozen=True)
class FileFacts:
    """Size in bytes, and sha256 of the content."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`manifest.json` of a finished run."""

    schema: int
    reference: str
    created: str  # UTC, ISO 8601; of the first start, however often it was resumed
    finished: str
    package_version: str
    git_commit: str | None
    command: list[str]
    config: dict[str, Any]  # every setting, flat dotted keys
    config_hash: str  # of the settings that can change results
    parents: list[Parent]
    base: BaseModel
    tokenizer: TokenizerFacts
    method: Method
    data: list[DataFacts]
    metrics: dict[str, float | None]  # None: not a finite number
    golden: dict[str, Any]
    environment: Environment
    phases: dict[str, Phase]
    model_is: str  # what model/ holds: "best" or "last"
    stopped: str | None  # why a run-time guard ended it early; None: it ran to its end
    files: dict[str, FileFacts]
    warnings: list[str] = field(default_factory=list, metadata=OPTIONAL)  # noticed on the way
    card: CardFacts | None = field(default=None, metadata=OPTIONAL)  # of a reward model
    self_digest: str = ""

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the data, by split."""
        return {part.split: part.fingerprint for part in self.data}


@dataclass(frozen=True)
class CheckpointManifest:
    """`manifest.json` of a checkpoint: what a resume must agree with."""

    schema: int
    reference: str
    step: int
    best: bool
    created: str  # of the run
    saved: str
    config: dict[str, Any]
    config_hash: str
    parents: list[Parent]
    fingerprints: dict[str, str]  # of the data, by split
    files: dict[str, FileFacts]
    self_digest: str = ""


def _split(kind: Any, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`given` in two: the fields of the dataclass `kind`, and the rest."""
    fields = {f.name for f in dataclasses.fields(kind)}
    values = plain(given)
    known = {name: values.pop(name) for name in list(values) if name in fields}
    return known, values


def finite(value: Any) -> float | None:
    """A metric as JSON can hold it; nan and infinities become None."""
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else None


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def git_commit() -> str | None:
    """The commit of this checkout, with -dirty where files differ; None outside git."""
    home = Path(rlhf.__file__).resolve().parent.parent
    if not (home / ".git").exists():
        return None
    command = ["git", "-C", str(home), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def library_versions() -> dict[str, str]:
    """Versions of what is installed of the libraries that results depend on."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


# ---------------------------------------------------------------- to and from text


def seal(manifest: Manifest | CheckpointManifest) -> str:
    """The text of a manifest; `self_digest` is the sha256 of that text with the digest left out."""
    fields = plain(manifest) | {"self_digest": ""}
    for name in _optional(type(manifest)):  # type: ignore[arg-type]
        if not fields[name]:
            del fields[name]
    text = json.dumps(fields, indent=1, allow_nan=False) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps(fields | {"self_digest": digest}, indent=1, allow_nan=False) + "\n"


def unseal(kind: type[M], text: bytes, where: str) -> M:
    """Read a manifest; `where` names the file in errors.

    Raises:
        RegistryError: not JSON, another schema, a missing, unknown or wrongly typed field, or a
            digest that does not fit the text.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RegistryError(f"{where}: not a whole JSON file ({error}).") from error
    if not isinstance(fields, dict):
        raise RegistryError(f"{where}: expected an object, found {type(fields).__name__}.")
    if (schema := fields.get("schema")) != SCHEMA or isinstance(schema, bool):
        raise RegistryError(
            f"{where}: schema: found {schema!r}, but this version of rlhf reads {SCHEMA}. "
            "Install the version that wrote it."
        )
    manifest = read_typed(kind, fields, where)
    if isinstance(manifest, Manifest) and manifest.model_is not in ("best", "last"):
        found = repr(manifest.model_is)
        raise RegistryError(f"{where}: model_is: expected best or last, found {found}.")
    if isinstance(manifest, Manifest) and manifest.card and manifest.card.verdict not in VERDICTS:
        found = repr(manifest.card.verdict)
        raise RegistryError(f"{where}: card.verdict: expected go, caution or no-go, found {found}.")
    digest = fields["self_digest"]
    if not digest or hashlib.sha256(text.replace(digest.encode(), b"", 1)).hexdigest() != digest:
        raise RegistryError(f"{where}: self_digest: the file was changed after it was written.")
    return manifest


def read_typed(kind: Any, value: Any, where: str) -> Any:
    """`value`, from JSON, as `kind`: a dataclass or the annotation of one of its fields."""
    try:
        return _reader(kind)(value)
    except _Unfit as unfit:
        place = "".join(reversed(unfit.place))
        if place.startswith(".") and where.endswith(MANIFEST):  # a field of the file itself
            place = f": {place[1:]}"
        raise RegistryError(f"{where}{place}: {unfit}") from None


class _Unfit(Exception):
    """A value of another type; `place` is collected on the way out, innermost part first."""

    def __init__(self, message: str, *place: str) -> None:
        super().__init__(message)
        self.place = list(place)


@functools.cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """What reads values of `kind`; made once, because `rlhf ls` reads a thousand manifests."""
    if kind is Any:
        return _as_it_is
    if dataclasses.is_dataclass(kind):
        return functools.partial(_read_dataclass, kind, _field_readers(kind))
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:  # T | None, the only union in use
        read = _reader(arguments[0])
        return lambda value: None if value is None else read(value)
    if origin is list:
        return functools.partial(_read_list, _reader(arguments[0]))
    if origin is dict:
        return functools.partial(_read_dict, _reader(arguments[1]))
    return functools.partial(_read_plain, (int, float) if kind is float else (kind,))


def _as_it_is(value: Any) -> Any:
    return value


def _read_plain(kinds: tuple[type, ...], value: Any) -> Any:
    if type(value) in kinds:
        return value
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        name = kinds[0].__name__ if len(kinds) == 1 else "number"
        raise _Unfit(f"expected {name}, found {value!r}.")
    return value


def _read_list(read: Callable[[Any], Any], value: Any) -> list[Any]:
    _read_plain((list,), value)
    out: list[Any] = []
    try:
        for item in value:
            out.append(read(item))
    except _Unfit as unfit:
        unfit.place.append(f"[{len(out)}]")
        raise
    return out


def _read_dict(read: Callable[[Any], Any], value: Any) -> dict[str, Any]:
    _read_plain((dict,), value)
    if read is _as_it_is:
        return dict(value)
    out = {}
    key = ""
    try:
        for key, item in value.items():
            out[key] = read(item)
    except _Unfit as unfit:
        unfit.place.append(f".{key}")
        raise
    return out


def _read_dataclass(kind: Any, readers: dict[str, Callable[[Any], Any]], value: Any) -> Any:
    if not isinstance(value, dict):
        raise _Unfit(f"expected an object, found {value!r}.")
    if value.keys() != readers.keys():
        for name in readers:
            if name not in value and name not in _optional(kind):
                raise _Unfit("missing.", f".{name}")
        for name in (name for name in value if name not in readers):
            raise _Unfit(f"no such field in schema {SCHEMA}.", f".{name}")
    out = {}
    name = ""
    try:
        for name, read in readers.items():
            if name in value:
                out[name] = read(value[name])
    except _Unfit as unfit:
        unfit.place.append(f".{name}")
        raise
    return kind(**out)


@functools.cache
def _optional(kind: Any) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(kind) if f.metadata.get("optional"))


def _field_readers(kind: Any) -> dict[str, Callable[[Any], Any]]:
    return {name: _reader(hint) for name, hint in typing.get_type_hints(kind).items()}


def plain(value: Any) -> Any:
    """`value` as JSON holds it, so that settings compare equal before and after writing."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item") and callable(value.item):  # a scalar of numpy or torch
        value = value.item()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config as one level of dotted keys, with values as JSON holds them."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            out.update(flat(value, f"{name}."))
        else:
            out[name] = plain(value)
    return out


# ---------------------------------------------------------------- files


def check_file_name(name: str, where: str) -> None:
    """Refuse a name in a manifest that is not a plain path below its folder."""
    parts = name.split("/")
    if not name or "\\" in name or "\0" in name or any(p in ("", ".", "..") for p in parts):
        raise RegistryError(f"{where}: files.{name}: must be a path inside the run.")


def check_run_file(name: str, where: str) -> None:
    """Refuse what a published run may not list; what others load is never a pickle."""
    check_file_name(name, where)
    if name not in TOP_FILES and not name.startswith("model/"):
        raise RegistryError(f"{where}: files.{name}: only {', '.join(TOP_FILES)} and model/.")
    if name.lower().endswith(PICKLES):
        raise RegistryError(
            f"{where}: files.{name}: a pickle can run code when it is loaded. model/ holds "
            "safetensors and JSON: save with safe_serialization, and leave out training_args.bin."
        )


def run_files(folder: Path) -> list[str]:
    """The immutable files of a run that are there, as paths below `folder`."""
    top = [name for name in TOP_FILES if os.path.lexists(folder / name)]
    return top + [f"model/{name}" for name in list_files(folder / "model")]


def list_files(folder: Path) -> list[str]:
    """Every file below `folder`, sorted; a linked folder counts as a file."""
    names = []
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        names += [Path(parent, name).relative_to(folder).as_posix() for name in files + links]
    return sorted(names)


def file_problems(
    folder: Path, listed: dict[str, FileFacts], present: list[str], *, contents: bool
) -> list[str]:
    """How the files in `folder` differ from a manifest; `contents` also hashes them."""
    problems = []
    root = os.path.realpath(folder)
    for name, facts in listed.items():
        path = folder / name
        try:
            if os.path.realpath(path) != os.path.join(root, name):
                problems.append(f"{name}: is a link, or lies behind one")
            elif not path.is_file():
                problems.append(f"{name}: missing")
            elif (size := path.stat().st_size) != facts.size:
                problems.append(f"{name}: has {size} bytes, not {facts.size}")
            elif contents and sha256(path) != facts.sha256:
                problems.append(f"{name}: sha256 differs from the manifest's")
        except OSError as error:
            problems.append(f"{name}: cannot be read ({error.strerror})")
    return problems + [f"{name}: not in the manifest" for name in present if name not in listed]


def sha256(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settle(path: Path) -> FileFacts:
    """Force a file to the disk and measure it."""
    if path.is_symlink():
        raise RegistryError(f"{path}: is a link. Copy the file into the run: links break.")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return FileFacts(size=os.fstat(file.fileno()).st_size, sha256=digest)


def sync_folder(folder: Path) -> None:
    """Force the names in `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_last(path: Path, text: str) -> None:
    """Write a file so that it is either whole or not there, whenever the machine stops."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


# ---------------------------------------------------------------- checkpoints


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with a sound manifest; `digest` is the sha256 of that file."""

    step: int
    path: Path
    manifest: CheckpointManifest
    digest: str


def step_name(step: int) -> str:
    """The folder, and the part of a reference, of a checkpoint."""
    return f"step-{step:06d}"


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and check the manifest of a checkpoint; its files are not looked at."""
    file = path / MANIFEST
    try:
        text = file.read_bytes()
    except OSError as error:
        raise RegistryError(f"{file}: cannot be read: {error.strerror}.") from error
    manifest = unseal(CheckpointManifest, text, str(file))
    for name in manifest.files:
        check_file_name(name, str(file))
    run = path.parent.parent
    place = f"{run.parent.name}/{run.name}@{path.name}"
    if manifest.reference != place or step_name(manifest.step) != path.name:
        raise RegistryError(f"{file}: reference: it belongs to {manifest.reference}, not {place}.")
    return Checkpoint(manifest.step, path, manifest, hashlib.sha256(text).hexdigest())


def checkpoint_folders(folder: Path) -> list[Path]:
    """The folders of checkpoints, by step."""
    if not folder.is_dir():
        return []
    named = [(STEP.fullmatch(path.name), path) for path in folder.iterdir()]
    return [path for _, path in sorted((int(name[1]), path) for name, path in named if name)]


def checkpoint_problems(checkpoint: Checkpoint, *, contents: bool) -> list[str]:
    """How the files of a checkpoint differ from its manifest."""
    present = [name for name in list_files(checkpoint.path) if name != MANIFEST]
    problems = file_problems(checkpoint.path, checkpoint.manifest.files, present, contents=contents)
    return [f"checkpoints/{checkpoint.path.name}/{problem}" for problem in problems]
