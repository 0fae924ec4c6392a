"""Runs are the registry: references, manifests, lineage, and who may write where.

A run is the folder `runs/<stage>/<run_name>/`; `<stage>/<run_name>[@checkpoint]` is its reference.
It is finished when it has a manifest.json, which is written last. Reading makes nothing on disk;
writing happens under a lock that the operating system gives back when a process dies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rlhf
from rlhf.errors import ConfigError, RegistryError
from rlhf.manifest import (
    MANIFEST,
    SCHEMA,
    STEP,
    BaseModel,
    Checkpoint,
    CheckpointManifest,
    DataFacts,
    Environment,
    FileFacts,
    Manifest,
    Method,
    Parent,
    Phase,
    TokenizerFacts,
    check_run_file,
    checkpoint_folders,
    checkpoint_problems,
    file_problems,
    finite,
    git_commit,
    list_files,
    load_checkpoint,
    now,
    plain,
    run_files,
    seal,
    settle,
    step_name,
    sync_folder,
    unseal,
    write_last,
)

STAGES = ("sft", "rm", "ppo")
# Settings that cannot change results, by their first part: they name folders, people and screens.
NO_RESULT = {"run", "run_name", "runs_dir", "overwrite", "tracking", "console", "progress"}
NO_RESULT |= {"processes", "num_processes", "nproc"}

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


# ---------------------------------------------------------------- settings


def result_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that can change results, as flat dotted keys."""
    return {k: v for k, v in _flat(config).items() if k.split(".")[0] not in NO_RESULT}


def config_hash(config: Mapping[str, Any]) -> str:
    """sha256 of the settings that can change results, whatever their order."""
    text = json.dumps(result_keys(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{name}."))
        else:
            flat[name] = plain(value)
    return flat


@dataclass(frozen=True)
class Plan:
    """What a command asks for: its settings and the runs it starts from."""

    config: dict[str, Any]
    parents: list[Parent]

    def differences(self, made: Manifest | CheckpointManifest) -> list[str]:
        """One line for each thing that `made` was made with and this plan is not."""
        old, new = result_keys(made.config), result_keys(self.config)
        lines = []
        for key in sorted(old | new):
            before, after = (json.dumps(c[key]) if key in c else "(not set)" for c in (old, new))
            if before != after:
                lines.append(f"{key}: {_bare(before)} -> {_bare(after)}")
        was, now = ({p.role: p for p in parents} for parents in (made.parents, self.parents))
        for role in sorted(was | now):
            lines += _parent_difference(role, was.get(role), now.get(role))
        return lines


def _bare(text: str) -> str:
    return text[1:-1] if text.startswith('"') else text


def _parent_difference(role: str, was: Parent | None, now: Parent | None) -> list[str]:
    if was and now and was.reference == now.reference:
        if was.digest == now.digest:
            return []
        return [
            f"parent {role}: {now.reference} is not what it was: this run is stale "
            f"(manifest {was.digest[:12]} -> {now.digest[:12]})"
        ]
    names = (parent.reference if parent else "(none)" for parent in (was, now))
    return [f"parent {role}: {' -> '.join(names)}"]


# ---------------------------------------------------------------- what is there


@dataclass(frozen=True)
class Published:
    """A finished run, or one of its checkpoints, whose manifest has been checked.

    Attributes:
        reference: as a child records it.
        path: folder of the run.
        model_dir: what to load.
        digest: sha256 of the run's manifest.json (of the checkpoint's, where one is meant).
    """

    reference: str
    stage: str
    run_name: str
    path: Path
    model_dir: Path
    manifest: Manifest
    digest: str


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
        for each in STAGES if stage is None else (_check_stage(stage),):
            found += [self._info(each, name) for name in self._run_names(each)]
        return found

    def resolve(self, reference: str) -> Published:
        """The finished run that `reference` names: manifest sound, every file there at its size.

        Contents are not hashed here; `verify` does that.

        Raises:
            RegistryError: missing, unfinished or damaged.
        """
        wanted = parse_reference(reference)
        path = self._folder(wanted.stage, wanted.run_name)
        manifest, digest = self._load(wanted)
        _refuse_damage(
            str(wanted), file_problems(path, manifest.files, run_files(path), contents=False)
        )
        run = Published(
            reference=f"{wanted.stage}/{wanted.run_name}",
            stage=wanted.stage,
            run_name=wanted.run_name,
            path=path,
            model_dir=path / "model",
            manifest=manifest,
            digest=digest,
        )
        if wanted.checkpoint in (None, manifest.model_is):
            return run
        checkpoint = self._checkpoint(wanted, manifest)
        _refuse_damage(str(wanted), checkpoint_problems(checkpoint, contents=False))
        if not (checkpoint.path / "model").is_dir():
            raise RegistryError(
                f"{wanted}: holds what a resume needs, and no model/ to load. Use {run.reference}."
            )
        return dataclasses.replace(
            run,
            reference=checkpoint.manifest.reference,
            model_dir=checkpoint.path / "model",
            digest=checkpoint.digest,
        )

    def verify(self, reference: str) -> list[str]:
        """Everything that is wrong with a finished run; [] when it is sound. Hashes every file.

        Raises:
            RegistryError: there is no such run, or it is unfinished.
        """
        wanted = parse_reference(reference)
        path = self._folder(wanted.stage, wanted.run_name)
        try:
            manifest, _ = self._load(wanted)
        except _Absent:
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
            manifest, _ = self._load(Reference(stage, run_name))
        except _Absent:
            return info
        except RegistryError as error:
            return dataclasses.replace(info, state="damaged", problem=str(error))
        return dataclasses.replace(info, state="finished", manifest=manifest)

    def _folder(self, stage: str, run_name: str) -> Path:
        path = self.runs_dir / stage / run_name
        if os.path.realpath(path) != os.path.join(os.path.realpath(self.runs_dir), stage, run_name):
            raise RegistryError(
                f"{path}: leads out of the registry through a link. Move the run into "
                f"{self.runs_dir}, or set runs_dir= to where it is."
            )
        return path

    def _load(self, wanted: Reference) -> tuple[Manifest, str]:
        """A run's manifest, checked, and the sha256 of its file."""
        file = self._folder(wanted.stage, wanted.run_name) / MANIFEST
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
            return _Absent(
                f"{name}: unfinished: it has no {MANIFEST}, so it is still running or was "
                f"interrupted. The command that started it goes on with it, e.g. `{make}`."
            )
        there = [f"{wanted.stage}/{n}" for n in self._run_names(wanted.stage)]
        finished = [r for r in there if (self.runs_dir / r / MANIFEST).exists()]
        listed = ", ".join(finished[:20]) or "none"
        if len(finished) > 20:
            listed += f" and {len(finished) - 20} more (rlhf ls --stage {wanted.stage})"
        return _Absent(
            f"{name}: no such run in {self.runs_dir}. Finished {wanted.stage} runs: {listed}. "
            f"`{make}` makes it."
        )

    # ------------------------------------------------------------ checkpoints

    def _checkpoints(self, stage: str, run_name: str) -> list[Checkpoint]:
        """The checkpoints of a run by step.

        Raises:
            RegistryError: one has a damaged manifest.
        """
        folder = self._folder(stage, run_name) / "checkpoints"
        return [load_checkpoint(path) for path in checkpoint_folders(folder)]

    def _checkpoint(self, wanted: Reference, manifest: Manifest) -> Checkpoint:
        """The checkpoint of a finished run that a reference names."""
        run = f"{wanted.stage}/{wanted.run_name}"
        found = self._checkpoints(wanted.stage, wanted.run_name)
        if wanted.checkpoint == "best":
            chosen = [c for c in found if c.manifest.best][-1:]
        elif wanted.checkpoint == "last":
            chosen = found[-1:]
        else:
            chosen = [c for c in found if step_name(c.step) == wanted.checkpoint]
        if not chosen:
            listed = [run, f"{run}@{manifest.model_is}"]
            listed += [f"{run}@{step_name(c.step)}" for c in found]
            raise RegistryError(f"{wanted}: no such checkpoint. There are: {', '.join(listed)}.")
        return chosen[0]

    # ------------------------------------------------------------ writing

    def open(
        self,
        stage: str,
        run_name: str,
        config: Mapping[str, Any],
        parents: Mapping[str, Published],
        *,
        config_text: str | None = None,
        overwrite: bool = False,
        command: list[str] | None = None,
    ) -> Run:
        """Start, resume or recognise a run; one process only, rank 0 where there are several.

        Args:
            config: every setting, nested or flat; what cannot change results is ignored when
                settings are compared.
            parents: role -> the run it is played by.
            config_text: what config.yaml will hold; `config` as JSON (which is YAML) without it.
            overwrite: move what is there aside and start anew.
            command: the command line to record; this process's without it.

        Returns:
            a Run whose state is "new", "resume" (from `latest`) or "finished" (touch nothing).

        Raises:
            ConfigError: the name cannot name a run.
            RegistryError: it is finished or half-way with other settings, damaged, locked, or the
                folder cannot be written.
        """
        _check_stage(stage)
        check_run_name(run_name)
        plan = Plan(_flat(config), [Parent(r, p.reference, p.digest) for r, p in parents.items()])
        run = Run(self, stage, run_name, plan, command or list(sys.argv))
        self._folder(stage, run_name)
        if not overwrite and self._is_finished(run):
            return run
        try:
            run._lock()
            if not overwrite and self._is_finished(run):  # published while we came in
                run.close()
            else:
                run._enter(config_text, overwrite=overwrite)
        except OSError as error:
            run.close()
            raise RegistryError(
                f"runs_dir={self.runs_dir}: cannot be written: {error.filename or run.path}: "
                f"{error.strerror}. Set runs_dir= (or RLHF_RUNS) to a folder that can."
            ) from error
        except BaseException:
            run.close()
            raise
        return run

    def _is_finished(self, run: Run) -> bool:
        """True where `run` is finished and is what its plan asks for; reads only."""
        try:
            manifest, _ = self._load(Reference(run.stage, run.run_name))
        except _Absent:
            return False
        except RegistryError as error:
            raise RegistryError(f"{error} {_ways_out(self.runs_dir)}") from error
        if differences := run.plan.differences(manifest):
            what = f"{run.reference} is finished"
            raise RegistryError(_refusal(what, differences, self.runs_dir))
        run.state = "finished"
        run.published = self.resolve(run.reference)
        return True


class _Absent(RegistryError):
    """Missing or unfinished, in contrast to damaged."""


def _check_stage(stage: str) -> str:
    if stage not in STAGES:
        raise RegistryError(f"stage {stage!r}: there is {', '.join(STAGES)}.")
    return stage


def _refuse_damage(name: str, problems: list[str]) -> None:
    if problems:
        listed = "\n  ".join(problems[:10])
        raise RegistryError(
            f"{name}: damaged:\n  {listed}\nRestore these files, or make the run again with "
            "overwrite=true."
        )


def _ways_out(runs_dir: Path) -> str:
    return (
        "Ways out: run_name=... starts another run beside it; overwrite=true moves it to "
        f"{runs_dir / '.replaced'} and starts anew."
    )


def _refusal(what: str, differences: list[str], runs_dir: Path) -> str:
    listed = "\n  ".join(differences)
    return f"{what} with another config:\n  {listed}\n{_ways_out(runs_dir)}"


# ---------------------------------------------------------------- a run that is being written


class Run:
    """One run in the hands of one process; `Registry.open` makes it.

    Attributes:
        state: "new", "resume" or "finished".
        latest: the newest complete checkpoint, when resuming.
        published: the run as others see it, when finished and after `publish`.
        notes: what was moved aside or skipped on the way in, to be shown.
    """

    def __init__(
        self, registry: Registry, stage: str, run_name: str, plan: Plan, command: list[str]
    ) -> None:
        self.registry = registry
        self.stage = stage
        self.run_name = run_name
        self.plan = plan
        self.command = command
        self.reference = f"{stage}/{run_name}"
        self.path = registry.runs_dir / stage / run_name
        self.model_dir = self.path / "model"
        self.metrics_path = self.path / "metrics.jsonl"
        self.samples_path = self.path / "samples.jsonl"
        self.log_path = self.path / "log.txt"
        self.checkpoints_dir = self.path / "checkpoints"
        self.state = "new"
        self.latest: Checkpoint | None = None
        self.published: Published | None = None
        self.notes: list[str] = []
        self.created = now()
        self._descriptor: int | None = None
        self._fresh = False  # this process made the folder

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock; a new run that wrote nothing leaves no folder behind."""
        if self._descriptor is None or self._descriptor not in _LOCKS:
            return
        if self._fresh and self.published is None:
            self._remove_if_nothing_was_written()
        _LOCKS.discard(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = None

    def publish(
        self,
        *,
        base: BaseModel,
        tokenizer: TokenizerFacts,
        method: Mapping[str, Any],
        data: list[DataFacts],
        metrics: Mapping[str, float],
        golden: Mapping[str, Any],
        environment: Mapping[str, Any],
        phases: Mapping[str, Mapping[str, Any]],
        model_is: str = "last",
    ) -> Manifest:
        """Finish the run: hash every immutable file, then write manifest.json, last and atomically.

        Args:
            method: name, adapter_chain (references, oldest first); what else is there becomes
                its settings.
            golden: what a child recomputes after loading: a file of this run and a tolerance.
            environment: world_size, zero_stage, dtype, device, seed; libraries are looked up
                when absent; what else is there is kept as `other`.
            phases: name -> seconds, peak_memory_gb.
            model_is: "best" or "last", what model/ holds.

        Raises:
            RegistryError: a fact is missing, a file may not be published, or the disk refuses.
        """
        if self._descriptor is None:
            raise RegistryError(f"{self.reference}: is {self.state} and not open for writing.")
        try:
            files = self._settle_files()
            if golden.get("file", "config.yaml") not in files:
                raise RegistryError(
                    f"{self.reference}: golden.file={golden['file']}: is not one of the files that "
                    "are published and hashed. Write it to model/."
                )
            manifest = Manifest(
                schema=SCHEMA,
                reference=self.reference,
                created=self.created,
                finished=now(),
                package_version=rlhf.__version__,
                git_commit=git_commit(),
                command=self.command,
                config=self.plan.config,
                config_hash=config_hash(self.plan.config),
                parents=self.plan.parents,
                base=base,
                tokenizer=tokenizer,
                method=Method.of(method),
                data=list(data),
                metrics={name: finite(value) for name, value in metrics.items()},
                golden=plain(golden),
                environment=Environment.of(environment),
                phases={name: Phase(**plain(phase)) for name, phase in phases.items()},
                model_is=model_is,
                files=files,
            )
            text = seal(manifest)
            unseal(Manifest, text.encode(), str(self.path / MANIFEST))  # our own rules hold
            write_last(self.path / MANIFEST, text)
        except OSError as error:
            raise RegistryError(
                f"{self.reference}: not published: {error.filename or self.path}: "
                f"{error.strerror}. What was written stays: put this right, and the same "
                "command goes on from the last checkpoint."
            ) from error
        self.published = self.registry.resolve(self.reference)
        self.state = "finished"
        return self.published.manifest

    @contextlib.contextmanager
    def checkpoint(self, step: int, *, best: bool = False, keep: int = 2) -> Iterator[Path]:
        """A folder to write a checkpoint into; complete, under its name, once the block ends well.

        The newest `keep` stay, and the last one saved with best=True.
        """
        if self._descriptor is None:
            raise RegistryError(f"{self.reference}: is {self.state} and not open for writing.")
        name = step_name(step)
        scratch = self.checkpoints_dir / f".{name}.tmp"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            yield scratch
            manifest = CheckpointManifest(
                schema=SCHEMA,
                reference=f"{self.reference}@{name}",
                step=step,
                best=best,
                created=self.created,
                saved=now(),
                config=self.plan.config,
                config_hash=config_hash(self.plan.config),
                parents=self.plan.parents,
                files={file: settle(scratch / file) for file in list_files(scratch)},
            )
            for folder, _, _ in os.walk(scratch):
                sync_folder(Path(folder))
            write_last(scratch / MANIFEST, seal(manifest))
            shutil.rmtree(self.checkpoints_dir / name, ignore_errors=True)  # a damaged one
            os.replace(scratch, self.checkpoints_dir / name)
            sync_folder(self.checkpoints_dir)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        self._prune(keep)

    # ------------------------------------------------------------ on the way in

    def _lock(self) -> None:
        """Take the run for this process until `close`, or until the process ends in any way."""
        file = self.registry.runs_dir / ".locks" / f"{self.stage}-{self.run_name}.lock"
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise RegistryError(
                f"{self.reference}: in use by {holder}. Wait for it, end it, or start another run "
                "beside it with run_name=..."
            ) from None
        self._descriptor = descriptor
        _LOCKS.add(descriptor)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def _enter(self, config_text: str | None, *, overwrite: bool) -> None:
        """Decide between starting and resuming, and bring the folder into order."""
        if not overwrite:
            self.latest = self._newest_checkpoint()
        if self.latest is not None:
            self.state = "resume"
            self.created = self.latest.manifest.created
            self._set_aside("model")  # half-written when the run was interrupted
            for leftover in self.checkpoints_dir.glob(".step-*.tmp"):
                shutil.rmtree(leftover)
        else:
            self._set_aside()
            self._fresh = True
        self.model_dir.mkdir(parents=True, exist_ok=True)
        text = config_text or json.dumps(self.plan.config, indent=1) + "\n"
        (self.path / "config.yaml").write_text(text, encoding="utf-8")

    def _newest_checkpoint(self) -> Checkpoint | None:
        """The newest complete checkpoint; damaged newer ones are passed over, and noted.

        Raises:
            RegistryError: it was made with other settings, or all are damaged.
        """
        run = self.registry._folder(self.stage, self.run_name)
        problems = []
        for folder in reversed(checkpoint_folders(run / "checkpoints")):
            try:
                checkpoint = load_checkpoint(folder)
                found = checkpoint_problems(checkpoint, contents=True)
            except RegistryError as error:
                found = [str(error)]
            if found:
                problems += found
                continue
            if differences := self.plan.differences(checkpoint.manifest):
                what = f"{self.reference} was interrupted at step {checkpoint.step}"
                raise RegistryError(_refusal(what, differences, self.registry.runs_dir))
            self.notes += [f"damaged checkpoint passed over: {problem}" for problem in problems]
            return checkpoint
        if problems:
            listed = "\n  ".join(problems)
            raise RegistryError(
                f"{self.reference}: unfinished, and no checkpoint is sound:\n  {listed}\n"
                f"{_ways_out(self.registry.runs_dir)}"
            )
        return None

    def _set_aside(self, name: str = "") -> None:
        """Move the run's folder, or one thing in it, out of the way; nothing is deleted."""
        there = self.path / name
        if not there.exists() or (there.is_dir() and not any(there.iterdir())):
            return
        store = self.registry.runs_dir / ".replaced"
        places = (store / f"{self.stage}-{self.run_name}-{n}" for n in itertools.count(1))
        place = next(place for place in places if not place.exists())
        if name:
            place = place / name
        place.parent.mkdir(parents=True, exist_ok=True)
        os.rename(there, place)
        self.notes.append(f"moved aside: {there} -> {place}")

    # ------------------------------------------------------------ on the way out

    def _settle_files(self) -> dict[str, FileFacts]:
        names = run_files(self.path)
        for name in names:
            check_run_file(name, self.reference)
        if not any(name.startswith("model/") for name in names):
            raise RegistryError(f"{self.reference}: model/ is empty: there is nothing to publish.")
        files = {name: settle(self.path / name) for name in names}
        for folder, _, _ in os.walk(self.model_dir):
            sync_folder(Path(folder))
        sync_folder(self.path)
        return files

    def _prune(self, keep: int) -> None:
        checkpoints = self.registry._checkpoints(self.stage, self.run_name)
        kept = {c.step for c in checkpoints[-keep:]}
        kept |= {c.step for c in [c for c in checkpoints if c.manifest.best][-1:]}
        for checkpoint in checkpoints:
            if checkpoint.step not in kept:
                shutil.rmtree(checkpoint.path)

    def _remove_if_nothing_was_written(self) -> None:
        written = [self.path / name for name in list_files(self.path) if name != "config.yaml"]
        if any(path.lstat().st_size for path in written):
            return
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()  # where it was the only run


_LOCKS: set[int] = set()


def _drop_locks() -> None:
    """In a forked child (a data loader's worker): the lock stays with the parent alone."""
    for descriptor in _LOCKS:
        os.close(descriptor)
    _LOCKS.clear()


os.register_at_fork(after_in_child=_drop_locks)


# ---------------------------------------------------------------- contracts between stages


def check_contract(
    policy: Published, reward_model: Published, *, allow_foreign_rm: bool = False
) -> None:
    """Refuse a reward model that does not read what the policy writes. Loads no weights.

    Raises:
        RegistryError: tokenizer, template or base differ, or the reward model comes from another
            SFT run and allow_foreign_rm is false. Names every difference, both values, the way out.
    """
    ours, theirs = policy.manifest, reward_model.manifest
    make = f"`make rm RUN={policy.run_name}` trains a reward model from {policy.reference}"
    bases = f"base model ({ours.base.name}, {theirs.base.name})"
    compared = (
        ("tokenizer", ours.tokenizer.tokenizer_hash, theirs.tokenizer.tokenizer_hash),
        ("template", ours.tokenizer.template_hash, theirs.tokenizer.template_hash),
        (bases, ours.base.fingerprint, theirs.base.fingerprint),
    )
    wrong = [f"{what}: {one} and {other}" for what, one, other in compared if one != other]
    if wrong:
        listed = "\n  ".join(wrong)
        raise RegistryError(
            f"{policy.reference} and {reward_model.reference} differ in:\n  {listed}\n"
            f"The scores would be of other text, or of another model's. {make}."
        )
    if allow_foreign_rm:
        return
    origin = next((p for p in theirs.parents if p.role == "policy"), None)
    if origin is None or origin.digest != policy.digest:
        came = "no SFT run of this registry" if origin is None else origin.reference
        if origin is not None and origin.reference == policy.reference:
            came = f"an earlier {came} (manifest {origin.digest[:12]}, now {policy.digest[:12]})"
        raise RegistryError(
            f"{reward_model.reference} was trained from {came}, the policy is {policy.reference}: "
            f"its scores were learnt on another model's answers. {make}; rm_from= names another "
            "one; allow_foreign_rm=true uses it all the same."
        )
