"""Checkpoints of a stage at work: when one is written, which is best, where a run goes on.

A checkpoint is written at a step boundary by all processes together and is complete, with a
manifest, or not there. `state.json` in it holds what a resumed run must know and no weight.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlhf import engine, interrupts, ranks
from rlhf.console import Console, Pace
from rlhf.errors import StoppedByGuard
from rlhf.manifest import step_name
from rlhf.run import Run
from rlhf.tracking import Tracker

STATE = "state.json"


class Keeper:
    """Keeps one stage's progress. `session.keeper` makes it.

    Args:
        run: the run, on the main process; None on the others.
        checkpoints_dir: where its checkpoints lie, on every process.
        total: steps of the stage.
        every: a checkpoint every so many steps; one is always written at the last step, at a new
            best, and when the stage is asked to stop.
        keep: newest checkpoints that stay, beside the best.
        seconds: what each phase has cost so far, to be found again.

    Attributes:
        step: the step that was done last, or is at work.
        state: what the stage wants to find again when it is resumed; JSON values.
        best: {"step", "value"} of the best held-out value so far, or None.
        folder: the checkpoint this run goes on from, until the first step is done; None where it
            starts anew.
        tracker: whose lines are counted, once there is one.
        stopping: some process was asked to stop; the checkpoint of this step is the last.
        stopped: why a guard ended it early, where the best checkpoint is published all the same.
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
        seconds: Callable[[], dict[str, float]] = dict,
    ) -> None:
        self.total = total
        self.step = 0
        self.state: dict[str, Any] = {}
        self.best: dict[str, Any] | None = None
        self.tracker: Tracker | None = None
        self._run, self._dir, self._console = run, checkpoints_dir, console
        self._stage, self._every, self._keep, self._seconds = stage, every, keep, seconds
        self.stopping = False
        self.stopped: str | None = None
        self._improved = False
        self._held = interrupts.Held()
        self._pace: Pace | None = None
        self.folder: Path | None = None
        self._converted: Path | None = None
        self._read()

    def _read(self) -> None:
        latest = self._run.latest if self._run is not None else None
        self.step = engine.from_main(lambda: latest.step if latest is not None else 0)
        if self.step == 0:
            return
        self.folder = self._folder(self.step)
        stored = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
        self.state, self.best = stored["state"], stored["best"]
        if self.best is not None and not math.isfinite(self.best["value"]):
            self.best = None  # of a version that let it be the best; nothing would beat it
        self._console.note(f"[{self._stage}] goes on from its checkpoint at step {self.step}")
        if stored["world_size"] != ranks.world_size():
            self._convert(stored["world_size"])

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
    def is_best(self) -> bool:
        """Whether the step that was done last is the best so far."""
        return self.best is not None and self.best["step"] == self.step

    @property
    def model_is(self) -> str:
        """What model/ will hold: "best" where a best one was chosen, else "last"."""
        return "last" if self.best is None else "best"

    # ------------------------------------------------------------ while it trains

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Show progress, and hold Ctrl-C and SIGTERM back to the end of a step.

        A guard that stops training ends the block quietly where there is a best checkpoint, which
        can be published.

        Raises:
            KeyboardInterrupt, Terminated: asked to stop, after the checkpoint.
            StoppedByGuard: a guard stopped it before there was a best checkpoint.
        """
        progress = self._console.progress(self._stage, self.total, done=self.step)
        try:
            with interrupts.held() as self._held, progress as self._pace:
                yield
            engine.barrier()
            self._loaded()  # there may have been no step
        except StoppedByGuard as error:
            if self.best is None:
                raise
            self.stopped = str(error)
            at = step_name(self.best["step"])
            self._console.note(f"[{self._stage}] stopped by a guard: publishing the best, {at}")
        if self.stopping:
            interrupts.raise_for(self._held.asked or signal.SIGTERM)  # asked on another process

    def steps(self, write: Callable[[Path], None]) -> Iterator[int]:
        """The steps still to do; after each one a checkpoint where it is time for one.

        Args:
            write: fills a folder; called on every process.
        """
        for step in range(self.step + 1, self.total + 1):
            self.step = step
            yield step
            if self.end_step(step) or self._improved:
                self.save(write)
            if self.stopping:
                return

    def end_step(self, step: int) -> bool:
        """Count a step; True where a checkpoint is due after it. On every process."""
        self.step = step
        if self._pace is not None:
            self._pace.advance()
        self.stopping = engine.any_rank(self._held.asked is not None)
        self._loaded()
        return self.stopping or self.at(step, self._every)

    def at(self, step: int, every: int) -> bool:
        """True every so many steps, and at the last one."""
        return step % every == 0 or step == self.total

    def consider(self, value: float | None) -> bool:
        """Compare a held-out value (higher is better) of this step with the best so far.

        Args:
            value: None where this step may not be the best one. Nor may it where that is nan or
                an infinity: no later value could beat it.

        Returns:
            True where it is the new best, which a checkpoint will hold.
        """
        counts = value is not None and math.isfinite(value)
        if counts and (self.best is None or value > self.best["value"]):
            self.best = {"step": self.step, "value": value}
            self._improved = True
        return self._improved

    def save(self, write: Callable[[Path], None]) -> None:
        """Write a checkpoint of this step; every process calls it."""
        with contextlib.ExitStack() as stack:
            folder = self._dir / f".{step_name(self.step)}.tmp"
            if self._run is not None:
                writing = self._run.checkpoint(self.step, best=self._improved, keep=self._keep)
                folder = stack.enter_context(writing)
            engine.barrier()
            write(folder)
            if self._run is not None:
                lines = self.tracker.lines if self.tracker is not None else 0
                self.state |= {"lines": lines, "seconds": self._seconds()}
                stored = {"state": self.state, "best": self.best, "world_size": ranks.world_size()}
                (folder / STATE).write_text(json.dumps(stored) + "\n", encoding="utf-8")
            engine.barrier()
        engine.barrier()  # nobody leaves before it is complete
        self._improved = False
        if self.stopping:
            self._console.note(f"[{self._stage}] asked to stop: checkpoint at step {self.step}")

    # ------------------------------------------------------------ when it is done

    def best_folder(self) -> Path | None:
        """The best checkpoint, where it is not the last step, whose weights are in memory."""
        in_memory = self.stopped is None and self.is_best
        if self.best is None or in_memory:
            return None
        return self._folder(self.best["step"])

    def _folder(self, step: int) -> Path:
        return self._dir / step_name(step)
