"""A run that is being written: settings compared, folder locked, checkpoints, publishing.

`open_run` decides what a command means: start, go on from the newest checkpoint, or leave alone
what is finished. Writing happens under a lock that the operating system gives back when a process
dies.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rlhf
from rlhf import locks
from rlhf.errors import RegistryError, RLHFError, StoppedByGuard
from rlhf.manifest import (
    MANIFEST,
    SCHEMA,
    BaseModel,
    CardFacts,
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
    finite,
    flat,
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
from rlhf.registry import (
    REPLACED,
    Absent,
    Published,
    Reference,
    Registry,
    check_run_name,
    check_stage,
)

# Settings that cannot change results: they name folders, people and screens (first parts), when
# and where something is written or read, or the parts in which one sum is made (but for rounding).
# Data are compared by fingerprint, wherever they lie.
NO_RESULT = {"run", "run_name", "runs_dir", "overwrite", "tracking", "keep_checkpoints"}
NO_RESULT |= {
    "data.path",
    "ppo.ptx_data",
    "evaluation.samples",
    "engine.checkpointing",
    "train.micro_batch_size",
    "ppo.micro_batch_size",
    "train.save_every",
    "ppo.save_every",
}

NO_SPACE = os.strerror(errno.ENOSPC)
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}
FULL = 1 << 20  # bytes; libraries report a full disk in many ways, this is how it is known


# ---------------------------------------------------------------- settings


def result_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that can change results, as flat dotted keys."""
    return {k: v for k, v in flat(config).items() if not {k, k.split(".")[0]} & NO_RESULT}


def config_hash(config: Mapping[str, Any]) -> str:
    """sha256 of the settings that can change results, whatever their order."""
    text = json.dumps(result_keys(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """What a command asks for: its settings, the runs it starts from, its data.

    Attributes:
        config: flat dotted keys.
        parents: each with the sha256 of its manifest.
        data: split -> fingerprint of its rows, and setting -> that of a reward function's file;
            None where they are not compared.
    """

    config: dict[str, Any]
    parents: list[Parent]
    data: dict[str, str] | None = None

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
        data = made.fingerprints if self.data is None else self.data
        for split in sorted(made.fingerprints | data):
            before, after = (d.get(split, "(none)")[:12] for d in (made.fingerprints, data))
            if before != after:
                what = "code" if split.startswith("reward.") else "rows"
                lines.append(f"data {split}: other {what} (fingerprint {before} -> {after})")
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


# ---------------------------------------------------------------- opening


def open_run(
    registry: Registry,
    stage: str,
    run_name: str,
    config: Mapping[str, Any],
    parents: Mapping[str, Published],
    *,
    data: Mapping[str, str] | None = None,
    config_text: str | None = None,
    overwrite: bool = False,
    command: list[str] | None = None,
) -> Run:
    """Start, resume or recognise a run; one process only, rank 0 where there are several.

    Args:
        config: every setting, nested or flat; what cannot change results is ignored when
            settings are compared.
        parents: role -> the run it is played by.
        data: split -> fingerprint of its rows, wherever they lie.
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
    check_stage(stage)
    check_run_name(run_name)
    plan = Plan(
        flat(config),
        [Parent(role, p.reference, p.digest) for role, p in parents.items()],
        None if data is None else dict(data),
    )
    run = Run(registry, stage, run_name, plan, command or list(sys.argv))
    registry.folder(stage, run_name)
    if not overwrite and _is_finished(run):
        return run
    try:
        run._lock()
        if not overwrite and _is_finished(run):  # published while we came in
            run.close()
        else:
            run._enter(config_text, overwrite=overwrite)
    except OSError as error:
        run.close()
        raise RegistryError(
            f"runs_dir={registry.runs_dir}: cannot be written: {error.filename or run.path}: "
            f"{error.strerror}. Set runs_dir= (or RLHF_RUNS) to a folder that can."
        ) from error
    except BaseException:
        run.close()
        raise
    return run


def _is_finished(run: Run) -> bool:
    """True where `run` is finished and is what its plan asks for; reads only."""
    registry = run.registry
    try:
        manifest, _ = registry.load(Reference(run.stage, run.run_name))
    except Absent:
        return False
    except RegistryError as error:
        raise RegistryError(f"{error} {_ways_out(registry.runs_dir)}") from error
    if differences := run.plan.differences(manifest):
        what = f"{run.reference} is finished"
        raise RegistryError(_refusal(what, differences, registry.runs_dir))
    run.state = "finished"
    run.published = registry.resolve(run.reference)
    return True


def _ways_out(runs_dir: Path) -> str:
    return (
        "Ways out: run_name=... starts another run beside it; overwrite=true moves it to "
        f"{runs_dir / REPLACED} and starts anew."
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
        if self._descriptor is None or not locks.is_held(self._descriptor):
            return
        if self._fresh and self.published is None:
            self._remove_if_nothing_was_written()
        locks.release(self._descriptor)
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
        stopped: str | None = None,
        warnings: Sequence[str] = (),
        card: CardFacts | None = None,
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
            stopped: why a run-time guard ended it early, where one did.
            warnings: what was noticed on the way.
            card: the verdict on a reward model, whose measures are in card.json.

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
                stopped=stopped,
                files=files,
                warnings=list(warnings),
                card=card,
            )
            text = seal(manifest)
            unseal(Manifest, text.encode(), str(self.path / MANIFEST))  # our own rules hold
            write_last(self.path / MANIFEST, text)
        except OSError as error:
            raise self._refused("not published", error) or error from error
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
        try:
            scratch.mkdir(parents=True)
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
                fingerprints=self.plan.data or {},
                files={file: settle(scratch / file) for file in list_files(scratch)},
            )
            for folder, _, _ in os.walk(scratch):
                sync_folder(Path(folder))
            write_last(scratch / MANIFEST, seal(manifest))
            shutil.rmtree(self.checkpoints_dir / name, ignore_errors=True)  # a damaged one
            os.replace(scratch, self.checkpoints_dir / name)
            sync_folder(self.checkpoints_dir)
        except BaseException as error:
            refused = self._refused(f"no checkpoint at step {step}", error)
            shutil.rmtree(scratch, ignore_errors=True)
            if refused is not None:
                raise refused from error
            raise
        self._prune(keep)

    @contextlib.contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Say plainly where the disk refuses something in the block.

        Args:
            what: was to be written; the start of the message.

        Raises:
            RegistryError: the disk does.
        """
        try:
            yield
        except Exception as error:
            if (refused := self._refused(f"{what} not written", error)) is not None:
                raise refused from error
            raise

    def _refused(self, what: str, error: BaseException) -> RegistryError | None:
        """The error for a disk that refuses, in whatever words a library puts it; else None."""
        full = free_bytes(self.path) < FULL or NO_SPACE in str(error)
        ours = str(getattr(error, "filename", "")).startswith(str(self.path))
        disk = isinstance(error, OSError) and (ours or error.errno in DISK)
        if isinstance(error, RLHFError | StoppedByGuard) or not isinstance(error, Exception):
            return None
        if not (full or disk):
            return None
        reason = NO_SPACE
        if not full:
            reason = getattr(error, "strerror", None) or str(error)
        return RegistryError(
            f"{self.reference}: {what}: {getattr(error, 'filename', None) or self.path}: {reason}. "
            "What was complete before stays: put this right, and the same command goes on from "
            "the last checkpoint."
        )

    # ------------------------------------------------------------ on the way in

    def _lock(self) -> None:
        """Take the run for this process until `close`, or until the process ends in any way."""
        beside = "Wait for it, end it, or start another run beside it with run_name=..."
        self._descriptor = locks.take(self.registry.runs_dir, self.reference, beside)

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
        run = self.registry.folder(self.stage, self.run_name)
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
        store = self.registry.runs_dir / REPLACED
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
        checkpoints = []
        for folder in checkpoint_folders(self.checkpoints_dir):
            with contextlib.suppress(RegistryError):  # a damaged one is no checkpoint, and stays
                checkpoints.append(load_checkpoint(folder))
        kept = {c.step for c in checkpoints[-keep:]}
        kept |= {c.step for c in [c for c in checkpoints if c.manifest.best][-1:]}
        for checkpoint in checkpoints:
            if checkpoint.step not in kept:
                gone = checkpoint.path.with_name(f".{checkpoint.path.name}.tmp")
                os.replace(checkpoint.path, gone)  # never half-removed under its name
                shutil.rmtree(gone)

    def _remove_if_nothing_was_written(self) -> None:
        ours = ("config.yaml", "log.txt")
        written = [self.path / name for name in list_files(self.path) if name not in ours]
        if any(path.lstat().st_size for path in written):
            return
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()  # where it was the only run


def free_bytes(path: Path) -> int:
    """What an ordinary user may still write on the disk of `path`."""
    with contextlib.suppress(OSError):
        disk = os.statvfs(path)
        return disk.f_bavail * disk.f_frsize
    return FULL
