"""One stage's run from opening to publishing: folder, console, tracker, clock, manifest.

The stages read as recipes because this is here; nothing in it knows what is trained. No torch:
a refusal, and "already finished", answer at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import resource
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

import rlhf
from rlhf import config, ranks
from rlhf.console import Console
from rlhf.data import Split
from rlhf.errors import RegistryError, StoppedByGuard
from rlhf.manifest import (
    MANIFEST,
    BaseModel,
    DataFacts,
    TokenizerFacts,
    git_commit,
    now,
    write_last,
)
from rlhf.metrics import find
from rlhf.registry import Published, Registry
from rlhf.run import Run, open_run
from rlhf.tracking import Tracker

if TYPE_CHECKING:
    from rlhf.card import Card
    from rlhf.keeper import Keeper


class Session:
    """A stage at work. Made by `open_session`.

    Attributes:
        cfg: the stage's config.
        finished: the run was finished before, with this very config; there is nothing to do.
        path: the run's folder.
        console: silent on every process but the main one.
    """

    def __init__(
        self,
        cfg: config.StageConfig,
        run: Run | None,
        console: Console,
        parents: dict[str, Published] | None = None,
    ) -> None:
        self.cfg = cfg
        self.console = console
        self.path = Path(cfg.runs_dir).expanduser() / cfg.stage / cfg.run_name
        self.phases: dict[str, dict[str, float]] = {}
        self._started = {"total": time.perf_counter()}  # of what is at work
        self._before: dict[str, float] = {}  # seconds spent before this run was resumed
        self._keeper: Keeper | None = None
        self._card: Card | None = None
        self._tracker: Tracker | None = None
        self._exits = contextlib.ExitStack()  # what ends with the session
        self._parents = parents or {}
        self._run = run
        self._times: dict[str, float] = {}
        self._state = run.state if run is not None else "new"

    @property
    def finished(self) -> bool:
        return self._state == "finished"

    @property
    def stopped(self) -> str | None:
        """Why a run-time guard ended training early, now or when the run was finished."""
        if self._run is not None and self._run.published is not None:
            return self._run.published.manifest.stopped
        return self._keeper.stopped if self._keeper is not None else None

    @property
    def model_dir(self) -> Path:
        """Where what others load is written."""
        return self.path / "model"

    def note(self, text: str) -> None:
        """A line on the console, and in log.txt."""
        self.console.note(f"[{self.cfg.stage}] {text}")
        if self._run is not None and not self.finished:
            with self._run.log_path.open("a", encoding="utf-8") as log:
                log.write(f"{now()} {text}\n")

    def write(self, name: str, text: str) -> None:
        """A file of the run that may change later, whole whenever it is read; main process only."""
        if self._run is not None:
            write_last(self.path / name, text)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the work for the manifest."""
        self._started[name] = time.perf_counter()
        yield
        self._end_phase(name)

    def _end_phase(self, name: str) -> None:
        seconds = self._seconds()[name]
        del self._started[name]
        self.phases[name] = {"seconds": seconds, "peak_memory_gb": peak_memory_gb()}

    def _seconds(self) -> dict[str, float]:
        """What each phase has cost so far, also before this run was resumed."""
        done = {name: phase["seconds"] for name, phase in self.phases.items()}
        now = time.perf_counter()
        at_work = {n: now - start + self._before.get(n, 0.0) for n, start in self._started.items()}
        return done | at_work

    def keeper(self, total: int, every: int) -> Keeper:
        """What writes and finds this run's checkpoints, for a stage of `total` steps.

        Raises:
            RegistryError: the checkpoint was written by another number of processes, or they do not
                see one folder.
        """
        from rlhf.keeper import Keeper  # torch

        if ranks.world_size() > 1:
            self._expect_one_folder()
        self._keeper = Keeper(
            self._run,
            self.path / "checkpoints",
            self.console,
            stage=self.cfg.stage,
            total=total,
            every=every,
            keep=self.cfg.keep_checkpoints,
            seconds=self._seconds,
        )
        self._before = self._keeper.state.get("seconds", {})
        return self._keeper

    def _expect_one_folder(self) -> None:
        """Refuse a `runs_dir` that is not shared: a process's part of checkpoints would be lost."""
        from rlhf import engine  # torch

        mark = self.path / engine.from_main(lambda: f".shared-{secrets.token_hex(8)}")
        if self._run is not None:
            mark.touch()
        engine.barrier()
        seen = engine.gather_objects((mark.exists(), ranks.name()))
        if self._run is not None:
            mark.unlink()
        if blind := [name for sees, name in seen if not sees]:
            raise RegistryError(
                f"runs_dir={self.cfg.runs_dir}: {', '.join(blind)} does not see the run's folder "
                "that rank 0 made, and every process writes its part of a checkpoint there. Set "
                "runs_dir= (or RLHF_RUNS) to a folder on a file system that all machines share."
            )

    @contextlib.contextmanager
    def tracker(self, keeper: Keeper) -> Iterator[Tracker | None]:
        """Where numbers go while the block runs; None on every process but the main one.

        W&B hears of what is published as well, so it is finished when the session ends.
        """
        if not ranks.is_main():
            yield None
            return
        cfg = self.cfg
        code = {"version": rlhf.__version__, "git_commit": git_commit()}
        tracker = self._exits.enter_context(
            Tracker(
                stage=cfg.stage,
                run=cfg.run,
                run_name=cfg.run_name,
                config=dataclasses.asdict(cfg) | {"code": code},
                metrics_path=self.path / "metrics.jsonl",
                directory=self.path,
                project=cfg.tracking.project,
                entity=cfg.tracking.entity,
                mode=cfg.tracking.mode,
                console=self.console,
                append=keeper.step > 0,
                total=keeper.total,
                tags=tags(cfg),
            )
        )
        if keeper.step > 0:
            tracker.rewind(keeper.state["lines"], step=keeper.step)
        self._tracker = keeper.tracker = tracker
        yield tracker

    def opening(self, splits: dict[str, Split], trained: int, total: int) -> None:
        """Say what is about to happen: rows, what was dropped, parameters."""
        for split in splits.values():
            dropped = ", ".join(f"{n} dropped: {why}" for why, n in split.dropped.items())
            self.note(
                f"{split.name}: {len(split.rows)} rows" + (f" ({dropped})" if dropped else "")
            )
        self.note(f"training {trained:,} of {total:,} parameters, method={self.cfg.method.name}")

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the block's seconds to this step's `time/...` number."""
        start = time.perf_counter()
        yield
        self._times[name] = self._times.get(name, 0.0) + time.perf_counter() - start

    def log(self, tracker: Tracker | None, stats: dict[str, float], step: int, tokens: int) -> None:
        """One step's numbers, with what it cost; `tokens` were read or written in it."""
        seconds = sum(self._times.values())
        cost = {
            "time/total": self._seconds()["total"],
            "perf/tokens_per_second": tokens / max(seconds, 1e-9),
            "perf/peak_memory_gb": peak_memory_gb(),
        }
        if tracker is not None:
            tracker.log(stats | self._times | cost, step=step)
        self._times = {}

    def log_detail(
        self,
        tracker: Tracker | None,
        samples: list[dict[str, Any]],
        histograms: dict[str, list[float]],
        step: int,
    ) -> None:
        """What an evaluation shows beside its numbers: a few answers, and distributions."""
        if tracker is not None:
            tracker.samples(samples, step=step)
            tracker.histograms(histograms, step=step)

    def log_final(self, tracker: Tracker | None, metrics: dict[str, float], step: int) -> None:
        """The numbers of what is published, which may be of an earlier, better step.

        W&B shows them for the run as a whole; metrics.jsonl gets those that are no curve yet.
        """
        if tracker is not None:
            numbers = {name: value for name, value in metrics.items() if find(name)}
            if new := {n: value for n, value in numbers.items() if n not in tracker.names}:
                tracker.log(new, step=step)
            tracker.summary(numbers)

    def publish_model(self, write: Callable[..., None], *what: Any) -> None:
        """Let `write(*what, folder)` fill model/; every process calls it, rank 0 writes."""
        if self._run is not None:
            self.model_dir.mkdir(parents=True, exist_ok=True)
        write(*what, self.model_dir)

    def show_samples(self, rows: list[dict[str, Any]]) -> None:
        """All of them to samples.jsonl, one object a line, and the first few to the console."""
        if self._run is None or not rows:
            return
        self.console.samples(rows[: self.cfg.evaluation.samples])
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (self.path / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def keep_card(self, card: Card | None) -> None:
        """Write card.json; its verdict will stand in the manifest. None: there is none."""
        self._card = card
        if self._run is not None and card is not None:
            card.write(self.path)

    def publish(
        self,
        *,
        base: BaseModel,
        tokenizer: dict[str, Any],
        splits: dict[str, Split],
        metrics: dict[str, float],
        golden: dict[str, Any],
        where: dict[str, Any],
        summary: list[tuple[str, str]],
        warnings: Sequence[str] = (),
    ) -> None:
        """Write the manifest, last, and show the closing table. Main process only.

        Args:
            base: the model at the root of the line of work.
            tokenizer: as `text.tokenizer_facts` gives it.
            splits: the data as it was used.
            metrics: final numbers; names that W&B knows become its summary.
            golden: what a child recomputes after loading.
            where: {"dtype", "device", "threads"}.
            summary: the rows of the closing table.
            warnings: what was noticed on the way, for those who look later.
        """
        if self._run is None:
            return
        self._end_phase("total")
        total = self.phases["total"]["seconds"]
        self._run.publish(
            base=base,
            tokenizer=TokenizerFacts(**tokenizer),
            method={
                **dataclasses.asdict(self.cfg.method),
                "adapter_chain": [parent.reference for parent in self._run.plan.parents],
            },
            data=[
                DataFacts(s.source, s.name, s.fingerprint, len(s.rows), dict(s.dropped))
                for s in splits.values()
            ],
            metrics=metrics,
            golden=golden,
            environment={
                "world_size": ranks.world_size(),
                "zero_stage": self.cfg.engine.zero_stage,
                **where,
                "seed": self.cfg.seed,
            },
            phases=self.phases,
            model_is=self._keeper.model_is if self._keeper is not None else "last",
            stopped=self.stopped,
            warnings=warnings,
            card=self._card.facts if self._card is not None else None,
        )
        if self._tracker is not None and self._run.published is not None:
            self._tracker.publish(self._run.published, list(self._parents.values()))
            if self.stopped is not None:
                self._tracker.stop(self.stopped)
        cost = f"{total:.0f} s, peak memory {peak_memory_gb():.2f} GB"
        title = f"{self.cfg.stage}/{self.cfg.run_name}"
        self.console.summary(title, [*summary, ("cost", cost)], str(self.path))
        self.report()

    def report(self) -> None:
        """Write report.html; a run without one is as good, so nothing that goes wrong ends it."""
        if self._run is None:
            return
        try:
            from rlhf.report import page

            page.write(self._run.registry, [self._run.reference], self.path / page.NAME)
        except Exception as error:
            with contextlib.suppress(OSError):
                self.note(f"{self._run.reference}: no report.html ({error})")


@contextlib.contextmanager
def open_session(
    cfg: config.StageConfig,
    splits: dict[str, Split],
    parents: dict[str, Published] | None = None,
) -> Iterator[Session]:
    """Open the stage's run (rank 0) and leave it in order, whatever happens inside.

    Raises:
        RegistryError: finished with another config, in use, damaged, or the disk refuses.
        StoppedByGuard: a guard ended training early, and what was best is published.
    """
    with _open(cfg, splits, parents or {}) as session:
        yield session
    if session.stopped is not None:
        raise StoppedByGuard(session.stopped)


@contextlib.contextmanager
def _open(
    cfg: config.StageConfig, splits: dict[str, Split], parents: dict[str, Published]
) -> Iterator[Session]:
    console = Console(quiet=not ranks.is_main())
    if not ranks.is_main():
        session = Session(cfg, None, console)
        # The main process leaves a finished run at once (or refuses it); waiting for it would hang.
        if not cfg.overwrite and (session.path / MANIFEST).exists():
            session._state = "finished"
        yield session
        return
    with open_run(
        Registry(cfg.runs_dir),
        cfg.stage,
        cfg.run_name,
        dataclasses.asdict(cfg),
        parents,
        data={name: split.fingerprint for name, split in splits.items()},
        config_text=OmegaConf.to_yaml(OmegaConf.structured(cfg)),
        overwrite=cfg.overwrite,
        command=sys.argv,
    ) as run:
        session = Session(cfg, run, console, parents)
        for text in run.notes:
            session.note(text)
        if session.finished:
            session.note(
                f"{run.reference} is finished with this config: nothing to do. overwrite=true "
                "runs it again; run_name=... makes another."
            )
            console.note(f"published: {run.path}")
        with run.writing("its files are"), session._exits:
            try:
                yield session
            except StoppedByGuard:  # before there was anything to publish: what led to it
                session.report()
                raise


def tags(cfg: config.StageConfig) -> list[str]:
    """What runs are told apart by in W&B: stage, method, algorithm, ZeRO stage, the user's own."""
    algorithm = getattr(cfg, "algorithm", None)
    zero = f"zero{cfg.engine.zero_stage}" + ("_offload" if cfg.engine.offload else "")
    own = [] if algorithm is None else [algorithm.name]
    return [cfg.stage, cfg.method.name, *own, zero, *cfg.tracking.tags]


def peak_memory_gb() -> float:
    """Peak memory of this process, or of its GPU where it uses one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated() / 1e9)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
