"""Checkpoints of a stage at work: when one is written, which is best, where a run goes on.

A checkpoint is written at a step boundary by all processes together and is complete, with a
manifest, or not there. `state.json` in it holds the state of every tracked object, by name.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf import engine, interrupts, ranks, state
from rlhf.console import Console, Pace
from rlhf.errors import RegistryError, StoppedByGuard
from rlhf.manifest import step_name
from rlhf.run import Run
from rlhf.state import Saves, Stateful, read_state

_FOLDER = "in folder"  # what stands in state.json for what has a folder of its own


@dataclass
class Best:
    """The best evaluation so far.

    Attributes:
        step: None where there is none yet.
        value: the held-out value that it is judged by; higher is better.
        numbers: all numbers of that step.
    """

    step: int | None = None
    value: float | None = None
    numbers: dict[str, float] = field(default_factory=dict)

    def beaten_by(self, value: float | None) -> bool:
        """Whether `value` is a finite number above the best one.

        A nan or an infinity is not: no later value could beat it.
        """
        if value is None or not math.isfinite(value):
            return False
        return self.value is None or value > self.value

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        read = read_state(Best, values, self)
        self.step, self.value, self.numbers = read.step, read.value, read.numbers


class Checkpoints:
    """Keeps one stage's progress. `StageRun.begin` makes it.

    Args:
        run: the run, on the main process; None on the others.
        checkpoints_dir: where its checkpoints lie, on every process.
        total: steps of the stage.
        every: a checkpoint every so many steps; one is always written at the last step, at a new
            best, and when the stage is asked to stop.
        keep: newest checkpoints that stay, beside the best.

    Attributes:
        step: the step that was done last, or is at work.
        best: the best held-out value so far.
        folder: the checkpoint this run goes on from; None where it starts anew.
        stopping: some process was asked to stop; the checkpoint of this step is the last.
        stopped: why a guard ended it early, where the best checkpoint is published all the same.

    Raises:
        RegistryError: an earlier version of this program wrote the checkpoint.
    """

    def __init__(
        self,
        run: Run | None,
        checkpoints_dir: Path,
        console: Console,
        *,
        stage: str,
        total: int,
        every: int,
        keep: int,
    ) -> None:
        self.total = total
        self.step = 0
        self.best = Best()
        self._run, self._dir, self._console = run, checkpoints_dir, console
        self._stage, self._every, self._keep = stage, every, keep
        self.stopping = False
        self.stopped: str | None = None
        self._improved = False
        self._held = interrupts.Held()
        self._pace: Pace | None = None
        self.folder: Path | None = None
        self._converted: Path | None = None
        self._tracked: dict[str, Stateful] = {}
        self._found: dict[str, Any] = {}  # states that no object has taken yet
        self._read()
        self.track(best=self.best)

    def _read(self) -> None:
        latest = self._run.latest if self._run is not None else None
        self.step = engine.from_main(lambda: latest.step if latest is not None else 0)
        if self.step == 0:
            return
        self.folder = self._folder(self.step)
        stored = state.read_file(self.folder)
        self._found = stored["objects"]
        self._console.note(f"[{self._stage}] goes on from its checkpoint at step {self.step}")
        if stored["world_size"] != ranks.world_size():
            self._convert(stored["world_size"])

    @property
    def tracked(self) -> dict[str, Stateful]:
        """Every registered object, by name."""
        return dict(self._tracked)

    def track(self, **objects: Stateful) -> None:
        """Register what a checkpoint holds; a run that goes on puts its state back at once.

        Raises:
            RegistryError: the checkpoint lacks it, or its state is of another kind.
        """
        for name, one in objects.items():
            assert name not in self._tracked, f"{name} is tracked twice"
            self._tracked[name] = one
            if self.folder is None:
                continue
            if name not in self._found:
                raise RegistryError(
                    f"{self.folder / state.FILE}: it holds no state of {name!r}. {state.WAYS_OUT}"
                )
            one.load_state_dict(
                {key: self._loaded_value(value) for key, value in self._found.pop(name).items()}
            )

    def _loaded_value(self, value: Any) -> Any:
        if isinstance(value, dict) and value.keys() == {_FOLDER}:
            assert self.folder is not None
            return self.folder / value[_FOLDER]
        return value

    def _convert(self, made_by: int) -> None:
        """Go on from a copy of the checkpoint that another number of processes can load."""
        parts = engine.optimizer_parts(self._folder(self.step))
        if not parts:
            return
        self._console.note(
            f"[{self._stage}] it was made by {made_by} processes, each with a part of the "
            f"optimizer's state: converting it for {ranks.world_size()}"
        )
        whole = self._folder(self.step)
        self.folder = self._converted = self._dir / f".{step_name(self.step)}.converted.tmp"
        if self._run is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            shutil.copytree(
                whole,
                self.folder,
                copy_function=lambda file, link: os.symlink(os.path.abspath(file), link),
                ignore=lambda folder, names: {n for n in names if Path(folder, n) in parts},
            )
            for part in parts:
                engine.convert(part, self.folder / part.relative_to(whole))
        engine.barrier()

    def _loaded(self) -> None:
        """Every process has loaded what it goes on from."""
        if self._run is not None and self._converted is not None:
            shutil.rmtree(self._converted, ignore_errors=True)
        self._converted = None

    @property
    def model_is(self) -> str:
        """What model/ will hold: "best" where a best one was chosen, else "last"."""
        return "last" if self.best.step is None else "best"

    # ------------------------------------------------------------ while it trains

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Show progress, and hold Ctrl-C and SIGTERM back to the end of a step.

        A guard that stops training ends the block quietly where there is a best checkpoint, which
        can be published.

        Raises:
            KeyboardInterrupt, Terminated: asked to stop, after the checkpoint.
            StoppedByGuard: a guard stopped it before there was a best checkpoint.
            RegistryError: the checkpoint holds the state of something that is not tracked.
        """
        if self._found:
            raise RegistryError(
                f"{self._folder(self.step) / state.FILE}: it holds the state of "
                f"{', '.join(self._found)}, which this run does not track. {state.WAYS_OUT}"
            )
        progress = self._console.progress(self._stage, self.total, done=self.step)
        try:
            with interrupts.held() as self._held, progress as self._pace:
                yield
            engine.barrier()
            self._loaded()  # there may have been no step
        except StoppedByGuard as error:
            if self.best.step is None:
                raise
            self.stopped = str(error)
            at = step_name(self.best.step)
            self._console.note(f"[{self._stage}] stopped by a guard: publishing the best, {at}")
        if self.stopping:
            interrupts.raise_for(self._held.asked or signal.SIGTERM)  # asked on another process

    def steps(self) -> Iterator[int]:
        """The steps still to do; after each one a checkpoint where it is time for one."""
        for step in range(self.step + 1, self.total + 1):
            self.step = step
            yield step
            if self.end_step(step) or self._improved:
                self.save()
            if self.stopping:
                return

    def end_step(self, step: int) -> bool:
        """Count a step; True where a checkpoint is due after it. On every process."""
        self.step = step
        if self._pace is not None:
            self._pace.advance()
        self.stopping = engine.any_rank(self._held.asked is not None)
        self._loaded()
        return self.stopping or self.due(step, self._every)

    def due(self, step: int, every: int) -> bool:
        """True every so many steps, and at the last one."""
        return step % every == 0 or step == self.total

    def consider(self, value: float | None, numbers: Mapping[str, float]) -> bool:
        """Compare a held-out value (higher is better) of this step with the best so far.

        Args:
            value: None where this step may not be the best one. Nor may it where that is nan or
                an infinity.
            numbers: what is known of the step; published with it.

        Returns:
            True where it is the new best, which a checkpoint will hold.
        """
        if self.best.beaten_by(value):
            self.best.step, self.best.value, self.best.numbers = self.step, value, dict(numbers)
            self._improved = True
        return self._improved

    def save(self) -> None:
        """Write a checkpoint of this step; every process calls it."""
        with contextlib.ExitStack() as stack:
            folder = self._dir / f".{step_name(self.step)}.tmp"
            if self._run is not None:
                writing = self._run.checkpoint(self.step, best=self._improved, keep=self._keep)
                folder = stack.enter_context(writing)
            engine.barrier()
            taken: set[str] = set()
            states = {name: _write(one, folder, taken) for name, one in self._tracked.items()}
            if self._run is not None:
                size = ranks.world_size()
                stored = {"version": state.VERSION, "world_size": size, "objects": states}
                (folder / state.FILE).write_text(json.dumps(stored) + "\n", encoding="utf-8")
            engine.barrier()
        engine.barrier()  # nobody leaves before it is complete
        self._improved = False
        if self.stopping:
            self._console.note(f"[{self._stage}] asked to stop: checkpoint at step {self.step}")

    # ------------------------------------------------------------ when it is done

    def best_folder(self) -> Path | None:
        """The best checkpoint, where it is not the last step, whose weights are in memory."""
        in_memory = self.stopped is None and self.best.step == self.step
        if self.best.step is None or in_memory:
            return None
        return self._folder(self.best.step)

    def _folder(self, step: int) -> Path:
        return self._dir / step_name(step)


def _write(one: Stateful, folder: Path, taken: set[str]) -> dict[str, Any]:
    """The state of an object as JSON holds it; what `Saves` is written below `folder`.

    Args:
        taken: names of folders that are written already.
    """
    values = one.state_dict()
    for key, value in values.items():
        if isinstance(value, Saves):
            assert key not in taken, f"two objects keep their files in {key}"
            taken.add(key)
            value.save(folder / key)
            values[key] = {_FOLDER: key}
    return values
