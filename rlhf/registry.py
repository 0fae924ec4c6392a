"""Runs are the registry: references, manifests, lineage, and who may write where.

A run is the folder `runs/<stage>/<run_name>/`; `<stage>/<run_name>[@checkpoint]` is its reference.
It is finished when it has a manifest.json, which is written last. Reading makes nothing on disk;
writing happens under a lock that the operating system gives back when a process dies.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from rlhf import parts
from rlhf.errors import ConfigError, RegistryError
from rlhf.manifest import (
    MANIFEST,
    STEP,
    Checkpoint,
    Manifest,
    Parent,
    check_run_file,
    checkpoint_folders,
    checkpoint_problems,
    file_problems,
    load_checkpoint,
    run_files,
    step_name,
    unseal,
)

STAGES = ("sft", "rm", "ppo")
# Beside the stages, in the folder of runs:
REPLACED = ".replaced"  # what overwrite=true moved aside
INCOMING = ".incoming"  # what an import has unpacked and not yet let in
TRASH = ".trash"  # what is being deleted

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+,-]{0,119}")
_NAME_RULE = (
    "a run name is made of [A-Za-z0-9._=+,-], starts with a letter, a digit or _, "
    "has no '..' and at most 120 characters"
)


def default_runs_dir() -> str:
    """The folder of runs where no setting names one."""
    return os.environ.get("RLHF_RUNS") or "runs"


# ---------------------------------------------------------------- references


@dataclass(frozen=True)
class Reference:
    """`<stage>/<run_name>[@checkpoint]`; checkpoint is best, last, step-000040, or None: model/."""

    stage: str
    run_name: str
    checkpoint: str | None = None

    def __str__(self) -> str:
        return f"{self.stage}/{self.run_name}" + (f"@{self.checkpoint}" if self.checkpoint else "")


def parse_reference(text: str) -> Reference:
    """Read a reference.

    Raises:
        RegistryError: another shape, another stage, or a name that could leave the registry.
    """
    shape = "<stage>/<run_name>, or with @best, @last or @step-40"
    stage, slash, rest = text.partition("/")
    run_name, at, checkpoint = rest.partition("@")
    if not slash or stage not in STAGES:
        raise RegistryError(
            f"{text!r}: not a reference. Write {shape}, where stage is one of {', '.join(STAGES)}."
        )
    if not _is_run_name(run_name):
        raise RegistryError(f"{text!r}: not a reference ({shape}): {_NAME_RULE}.")
    if not at:
        return Reference(stage, run_name)
    if step := STEP.fullmatch(checkpoint):
        checkpoint = step_name(int(step.group(1)))
    elif checkpoint not in ("best", "last"):
        raise RegistryError(f"{text!r}: @{checkpoint} is no checkpoint. Write {shape}.")
    return Reference(stage, run_name, checkpoint)


def check_run_name(name: str) -> str:
    """`name`, if it can name a folder.

    Raises:
        ConfigError: it cannot.
    """
    if not _is_run_name(name):
        raise ConfigError(f"run_name={name}: it becomes a folder, and {_NAME_RULE}.")
    return name


def _is_run_name(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and ".." not in name


# ---------------------------------------------------------------- what is there


@dataclass(frozen=True)
class Published:
    """A finished run, or one of its checkpoints, whose manifest has been checked.

    Attributes:
        reference: as a child records it.
        path: folder of the run.
        model_dir: what to load: whole weights, or an adapter where `under` is set.
        under: the folder or name of the weights that `model_dir/adapter` goes on; None where
            model_dir holds whole weights. A checkpoint has it, and what cannot be merged.
        digest: sha256 of the run's manifest.json (of the checkpoint's, where one is meant).
    """

    reference: str
    stage: str
    run_name: str
    path: Path
    model_dir: Path
    manifest: Manifest
    digest: str
    under: str | None = None

    @property
    def tokenizer_dir(self) -> Path:
        """Tokenizer and template, which a checkpoint shares with its run."""
        return self.path / "model"

    @property
    def is_checkpoint(self) -> bool:
        """Not what the run's golden values were recorded of."""
        return self.model_dir != self.tokenizer_dir


@dataclass(frozen=True)
class RunInfo:
    """A line of `rlhf ls`; state is "finished", "unfinished" or "damaged": see `problem`."""

    reference: str
    stage: str
    run_name: str
    path: Path
    state: str
    manifest: Manifest | None = None
    problem: str | None = None


class Registry:
    """All runs below one folder."""

    def __init__(self, runs_dir: str | Path) -> None:
        self.runs_dir = Path(runs_dir).expanduser()

    # ------------------------------------------------------------ reading

    def runs(self, stage: str | None = None) -> list[RunInfo]:
        """Every run, finished or not, by stage and name; reads manifests and nothing else."""
        found = []
        for each in STAGES if stage is None else (check_stage(stage),):
            found += [self._info(each, name) for name in self._run_names(each)]
        return found

    def resolve(self, reference: str, *, contents: bool = False) -> Published:
        """The finished run that `reference` names: manifest sound, every file there at its size.

        Args:
            contents: hash every file as well, as a stage does before it loads one.

        Raises:
            RegistryError: missing, unfinished or damaged; names the parts that are off.
        """
        wanted = parse_reference(reference)
        path = self.folder(wanted.stage, wanted.run_name)
        manifest, digest = self.load(wanted)
        problems = file_problems(path, manifest.files, run_files(path), contents=contents)
        _refuse_damage(str(wanted), problems, path / "model")
        run = Published(
            reference=f"{wanted.stage}/{wanted.run_name}",
            stage=wanted.stage,
            run_name=wanted.run_name,
            path=path,
            model_dir=path / "model",
            manifest=manifest,
            digest=digest,
            under=str(path / "model" / parts.BASE)
            if (path / "model" / parts.BASE).is_dir()
            else None,
        )
        if wanted.checkpoint in (None, manifest.model_is):
            return run
        checkpoint = self._checkpoint(wanted, manifest)
        _refuse_damage(str(wanted), checkpoint_problems(checkpoint, contents=contents))
        model_dir = checkpoint.path / "model"
        if not model_dir.is_dir():
            raise RegistryError(
                f"{wanted}: holds what a resume needs, and no model/ to load. Use {run.reference}."
            )
        return dataclasses.replace(
            run,
            reference=checkpoint.manifest.reference,
            model_dir=model_dir,
            digest=checkpoint.digest,
            under=self._under(manifest) if (model_dir / "adapter").is_dir() else None,
        )

    def _under(self, manifest: Manifest) -> str:
        """Where the weights lie that a run's adapter was trained on."""
        parents = {parent.role: parent.reference for parent in manifest.parents}
        if "policy" not in parents:
            return manifest.base.name
        below = self.resolve(parents["policy"])
        if below.under is not None and not below.is_checkpoint:
            return below.under  # whose adapter this one goes on with
        if below.under is not None:
            raise RegistryError(
                f"{manifest.reference}: its checkpoints are adapters on {below.reference}, which "
                f"is an adapter itself. Use {manifest.reference}: its model/ holds whole weights."
            )
        return str(below.model_dir)

    def verify(self, reference: str) -> list[str]:
        """Everything that is wrong with a finished run; [] when it is sound. Hashes every file.

        Raises:
            RegistryError: there is no such run, or it is unfinished.
        """
        wanted = parse_reference(reference)
        path = self.folder(wanted.stage, wanted.run_name)
        try:
            manifest, _ = self.load(wanted)
        except Absent:
            raise
        except RegistryError as error:
            return [str(error)]
        problems = file_problems(path, manifest.files, run_files(path), contents=True)
        if wanted.checkpoint not in (None, manifest.model_is):
            checkpoint = self._checkpoint(wanted, manifest)
            problems += checkpoint_problems(checkpoint, contents=True)
        return problems + [p for parent in manifest.parents for p in self._parent_problems(parent)]

    def _parent_problems(self, parent: Parent) -> list[str]:
        name = f"parent {parent.role} {parent.reference}"
        try:
            now = self.resolve(parent.reference)
        except RegistryError as error:
            return [f"{name}: {error}"]
        if now.digest != parent.digest:
            return [
                f"{name}: is not what this run started from "
                f"(manifest {parent.digest[:12]} -> {now.digest[:12]})"
            ]
        return []

    def _run_names(self, stage: str) -> list[str]:
        try:
            with os.scandir(self.runs_dir / stage) as entries:
                return sorted(e.name for e in entries if e.is_dir() and _is_run_name(e.name))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise RegistryError(
                f"runs_dir={self.runs_dir}: cannot be read: {error.strerror}. Set runs_dir= (or "
                "RLHF_RUNS) to a folder that can."
            ) from error

    def _info(self, stage: str, run_name: str) -> RunInfo:
        path = self.runs_dir / stage / run_name
        info = RunInfo(f"{stage}/{run_name}", stage, run_name, path, "unfinished")
        try:
            manifest, _ = self.load(Reference(stage, run_name))
        except Absent:
            return info
        except RegistryError as error:
            return dataclasses.replace(info, state="damaged", problem=str(error))
        return dataclasses.replace(info, state="finished", manifest=manifest)

    def folder(self, stage: str, run_name: str) -> Path:
        path = self.runs_dir / stage / run_name
        if os.path.realpath(path) != os.path.join(os.path.realpath(self.runs_dir), stage, run_name):
            raise RegistryError(
                f"{path}: leads out of the registry through a link. Move the run into "
                f"{self.runs_dir}, or set runs_dir= to where it is."
            )
        return path

    def load(self, wanted: Reference) -> tuple[Manifest, str]:
        """A run's manifest, checked, and the sha256 of its file."""
        file = self.folder(wanted.stage, wanted.run_name) / MANIFEST
        try:
            if file.is_symlink():
                raise RegistryError(f"{file}: is a link. Copy the whole run instead.")
            text = file.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise self._absent(wanted) from None
        except OSError as error:
            raise RegistryError(f"{file}: cannot be read: {error.strerror}.") from error
        manifest = unseal(Manifest, text, str(file))
        if manifest.reference != f"{wanted.stage}/{wanted.run_name}":
            raise RegistryError(
                f"{file}: reference: it is the manifest of {manifest.reference}. "
                "A run cannot be renamed by moving its folder."
            )
        for name in manifest.files:
            check_run_file(name, str(file))
        return manifest, hashlib.sha256(text).hexdigest()

    def _absent(self, wanted: Reference) -> RegistryError:
        """The error for a run that cannot be used; tells what can."""
        name = f"{wanted.stage}/{wanted.run_name}"
        make = f"make {wanted.stage} RUN={wanted.run_name}"
        if (self.runs_dir / wanted.stage / wanted.run_name).is_dir():
            return Absent(
                f"{name}: unfinished: it has no {MANIFEST}, so it is still running or was "
                f"interrupted. The command that started it goes on with it, e.g. `{make}`."
            )
        there = [f"{wanted.stage}/{n}" for n in self._run_names(wanted.stage)]
        finished = [r for r in there if (self.runs_dir / r / MANIFEST).exists()]
        listed = ", ".join(finished[:20]) or "none"
        if len(finished) > 20:
            listed += f" and {len(finished) - 20} more (rlhf ls --stage {wanted.stage})"
        return Absent(
            f"{name}: no such run in {self.runs_dir}. Finished {wanted.stage} runs: {listed}. "
            f"`{make}` makes it."
        )

    # ------------------------------------------------------------ checkpoints

    def checkpoints(self, stage: str, run_name: str) -> list[Checkpoint]:
        """The checkpoints of a run by step.

        Raises:
            RegistryError: one has a damaged manifest.
        """
        folder = self.folder(stage, run_name) / "checkpoints"
        return [load_checkpoint(path) for path in checkpoint_folders(folder)]

    def _checkpoint(self, wanted: Reference, manifest: Manifest) -> Checkpoint:
        """The checkpoint of a finished run that a reference names."""
        run = f"{wanted.stage}/{wanted.run_name}"
        named = self.folder(wanted.stage, wanted.run_name) / "checkpoints" / str(wanted.checkpoint)
        if named.is_dir():  # whatever became of the others
            return load_checkpoint(named)
        found = self.checkpoints(wanted.stage, wanted.run_name)
        if wanted.checkpoint == "best":
            chosen = [c for c in found if c.manifest.best][-1:]
        elif wanted.checkpoint == "last":
            chosen = found[-1:]
        else:
            chosen = [c for c in found if step_name(c.step) == wanted.checkpoint]
        if not chosen:
            names = {manifest.model_is} | {"last" for _ in found[-1:]}
            names |= {"best" for c in found if c.manifest.best}
            listed = [run, *(f"{run}@{name}" for name in sorted(names))]
            listed += [f"{run}@{step_name(c.step)}" for c in found]
            raise RegistryError(f"{wanted}: no such checkpoint. There are: {', '.join(listed)}.")
        return chosen[0]


class Absent(RegistryError):
    """Missing or unfinished, in contrast to damaged."""


def check_stage(stage: str) -> str:
    if stage not in STAGES:
        raise RegistryError(f"stage {stage!r}: there is {', '.join(STAGES)}.")
    return stage


def _refuse_damage(name: str, problems: list[str], model_dir: Path | None = None) -> None:
    if not problems:
        return
    listed = "\n  ".join(problems[:10])
    off = {parts.of_file(problem.split(": ")[0]): None for problem in problems}
    if "weights" in off and model_dir is not None:  # which of them
        del off["weights"]
        off |= dict.fromkeys(parts.changed(model_dir) or ["weights"])
    raise RegistryError(
        f"{name}: damaged, or changed after it was published: {', '.join(off)}:\n  {listed}\n"
        "Restore these files, or make the run again with overwrite=true."
    )
