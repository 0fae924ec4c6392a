"""One stage's run from opening to publishing: folder, console, numbers, checkpoints, manifest.

The stages read as recipes because this is here; nothing in it knows what is trained. No torch
until something is loaded: a refusal, and "already finished", answer at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import resource
import secrets
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

import rlhf
from rlhf import compatibility, config, guards, ranks, run, state, threads
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
from rlhf.run import Run
from rlhf.state import Stateful, read_state
from rlhf.tracking import Tracker

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from rlhf.card import Card
    from rlhf.checkpointing import Checkpoints


@dataclasses.dataclass
class _State:
    """What a resumed run goes on with.

    Attributes:
        seconds: that each phase has cost.
        lines: of metrics.jsonl.
        numbers: of the last step.
    """

    seconds: dict[str, float]
    lines: int
    numbers: dict[str, float]


class StageRun:
    """A stage at work. Made by `open_run`.

    Attributes:
        cfg: the stage's config.
        path: the run's folder.
        console: silent on every process but the main one.
        checkpoints: once training has begun; see `begin`.
        tracker: where numbers go; None before `begin`, and on every process but the main one.
    """

    checkpoints: Checkpoints

    def __init__(
        self,
        cfg: config.StageConfig,
        run: Run | None,
        console: Console,
        data: Mapping[str, Split],
        parents: Mapping[str, Published],
    ) -> None:
        self.cfg = cfg
        self.console = console
        self.path = Path(cfg.runs_dir).expanduser() / cfg.stage / cfg.run_name
        self.tracker: Tracker | None = None
        self.phases: dict[str, dict[str, float]] = {}
        self._started = {"total": time.perf_counter()}  # of what is at work
        self._before: dict[str, float] = {}  # seconds spent before this run was resumed
        self._card: Card | None = None
        self._exits = contextlib.ExitStack()  # what ends with the run
        self._data, self._parents = dict(data), dict(parents)
        self._run = run
        self._numbers: dict[str, float] = {}  # of the last step
        self._times: dict[str, float] = {}
        self._opened_as = run.state if run is not None else "new"

    @property
    def finished(self) -> bool:
        return self._opened_as == "finished"

    @property
    def stopped(self) -> str | None:
        """Why a run-time guard ended training early, now or when the run was finished."""
        if self._run is not None and self._run.published is not None:
            return self._run.published.manifest.stopped
        return self.checkpoints.stopped if hasattr(self, "checkpoints") else None

    @property
    def model_dir(self) -> Path:
        """Where what others load is written."""
        return self.path / "model"

    def note(self, *lines: str) -> None:
        """Lines on the console, and in log.txt."""
        for text in lines:
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

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """The phase in which models are loaded; what refuses or compiles comes before them.

        Raises:
            ConfigError: DeepSpeed, the device or a library cannot do what is asked.
        """
        compatibility.check(self.cfg)
        from rlhf import engine  # torch

        with self.phase("load"):
            engine.start(self.cfg.seed)
            self.note(*guards.check_device(self.cfg))
            engine.rehearse(self.cfg.engine)
            yield

    def settle_threads(self, *loaded: nn.Module) -> None:
        """Compute with as many threads as the largest of these models is worth."""
        self.note(threads.settle(models().largest(*loaded)))

    def begin(self, trained: nn.Module, *, steps: int, save_every: int) -> None:
        """Say what is trained, find the checkpoint to go on from, and open metrics and W&B.

        Raises:
            RegistryError: the checkpoint was written by an earlier version, or the processes do not
                see one folder.
        """
        from rlhf.checkpointing import Checkpoints  # torch

        self._say_what_is_trained(*models().count_parameters(trained))
        if ranks.world_size() > 1:
            self._expect_one_folder()
        self.checkpoints = Checkpoints(
            self._run,
            self.path / "checkpoints",
            self.console,
            stage=self.cfg.stage,
            total=steps,
            every=save_every,
            keep=self.cfg.keep_checkpoints,
        )
        self._open_tracker()
        self.checkpoints.track(run=self)

    def state_dict(self) -> dict[str, Any]:
        lines = self.tracker.lines if self.tracker is not None else 0
        return dataclasses.asdict(_State(self._seconds(), lines, self._numbers))

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        read = read_state(_State, values, self)
        self._before, self._numbers = read.seconds, read.numbers
        if self.tracker is not None:
            self.tracker.rewind(read.lines, step=self.checkpoints.step)

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

    def _open_tracker(self) -> None:
        """Where numbers go; main process only.

        W&B hears of what is published as well, so it is finished when the run ends.
        """
        if not ranks.is_main():
            return
        cfg = self.cfg
        code = {"version": rlhf.__version__, "git_commit": git_commit()}
        self.tracker = self._exits.enter_context(
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
                append=self.checkpoints.step > 0,
                total=self.checkpoints.total,
                tags=tags(cfg),
            )
        )

    def _say_what_is_trained(self, trained: int, total: int) -> None:
        """Rows, what was dropped, parameters."""
        for split in self._data.values():
            if not split.rows and not split.dropped:  # a file of code
                continue
            dropped = ", ".join(f"{n} dropped: {why}" for why, n in split.dropped.items())
            self.note(
                f"{split.name}: {len(split.rows)} rows" + (f" ({dropped})" if dropped else "")
            )
        self.note(f"training {trained:,} of {total:,} parameters, method={self.cfg.method.name}")

    @contextlib.contextmanager
    def training(self) -> Iterator[Iterator[int]]:
        """The phase of the steps still to do, which it gives; see `Checkpoints.working`."""
        with self.phase("train"), self.checkpoints.working():
            yield self.checkpoints.steps()

    @property
    def step(self) -> int:
        """The step that was done last."""
        return self.checkpoints.step

    def track(self, **objects: Stateful) -> None:
        """Register what a resumed run goes on with; see `Checkpoints.track`."""
        self.checkpoints.track(**objects)

    def consider(self, value: float | None, numbers: Mapping[str, float]) -> bool:
        """Whether this step is the best so far; see `Checkpoints.consider`."""
        return self.checkpoints.consider(value, numbers)

    def due(self, step: int, every: int) -> bool:
        """True every so many steps, and at the last one."""
        return self.checkpoints.due(step, every)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the block's seconds to this step's `time/...` number."""
        start = time.perf_counter()
        yield
        self._times[name] = self._times.get(name, 0.0) + time.perf_counter() - start

    def log(self, stats: dict[str, float], *, step: int, tokens: int) -> None:
        """One step's numbers, with what it cost; `tokens` were read or written in it."""
        seconds = sum(self._times.values())
        cost = {
            "time/total": self._seconds()["total"],
            "perf/tokens_per_second": tokens / max(seconds, 1e-9),
            "perf/peak_memory_gb": peak_memory_gb(),
        }
        if self.tracker is not None:
            self.tracker.log(stats | self._times | cost, step=step)
        self._times, self._numbers = {}, dict(stats)

    def log_evaluation(
        self, samples: list[dict[str, Any]], histograms: dict[str, list[float]], *, step: int
    ) -> None:
        """What an evaluation shows beside its numbers: a few answers, and distributions."""
        if self.tracker is not None:
            self.tracker.samples(samples, step=step)
            self.tracker.histograms(histograms, step=step)

    def load_best(self, model: nn.Module) -> None:
        """Put the weights of the best step into `model`, where it has later ones."""
        if best := self.checkpoints.best_folder():
            models().load_trained(model, best / "model")

    def published_numbers(self) -> dict[str, float]:
        """Those that were logged at the step that is published: the best one, else the last."""
        best = self.checkpoints.best
        return dict(self._numbers if best.step is None else best.numbers)

    def log_final(self, metrics: dict[str, float]) -> None:
        """The numbers of what is published, which may be of an earlier, better step.

        W&B shows them for the run as a whole; metrics.jsonl gets those that are no curve yet.
        """
        if self.tracker is not None:
            numbers = {name: value for name, value in metrics.items() if find(name)}
            if new := {n: value for n, value in numbers.items() if n not in self.tracker.names}:
                self.tracker.log(new, step=self.checkpoints.step)
            self.tracker.summary(numbers)

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
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        golden: Callable[..., dict[str, Any]],
        sequences: list[list[int]],
        *,
        base: BaseModel,
        metrics: dict[str, float],
        summary: list[tuple[str, str]],
        warnings: Sequence[str] = (),
    ) -> None:
        """Write model/ with its golden values, then the manifest; show the closing table.

        Every process calls it; rank 0 writes.

        Args:
            golden: `golden.write_logits` or `golden.write_scores`, of the first `sequences`.
            base: the model at the root of the line of work.
            metrics: final numbers; names that W&B knows become its summary.
            summary: the rows of the closing table.
            warnings: what was noticed on the way, for those who look later.
        """
        from rlhf import engine, text  # torch

        with self.phase("publish"):
            if self._run is not None:
                self.model_dir.mkdir(parents=True, exist_ok=True)
            models().publish(model, tokenizer, self.model_dir)
            pad_id, dtype = int(tokenizer.pad_token_id), engine.dtype(self.cfg.engine)
            facts = golden(model, sequences, pad_id, self.model_dir, dtype)
        self.finish(
            base=base,
            tokenizer=engine.from_main(text.published_facts, self.model_dir),
            metrics=metrics,
            golden=facts,
            where=engine.where(self.cfg.engine),
            summary=summary,
            warnings=warnings,
        )

    def finish(
        self,
        *,
        base: BaseModel,
        tokenizer: dict[str, Any],
        metrics: dict[str, float],
        golden: dict[str, Any],
        where: dict[str, Any],
        summary: list[tuple[str, str]],
        warnings: Sequence[str] = (),
    ) -> None:
        """Write the manifest, last, and show the closing table. Main process only.

        Args:
            tokenizer: as `text.tokenizer_facts` gives it.
            golden: what a child recomputes after loading.
            where: {"dtype", "device", "threads"}.
            base, metrics, summary, warnings: as in `publish`.
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
                for s in self._data.values()
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
            model_is=self.checkpoints.model_is,
            stopped=self.stopped,
            warnings=warnings,
            card=self._card.facts if self._card is not None else None,
        )
        if self.tracker is not None and self._run.published is not None:
            self.tracker.publish(self._run.published, list(self._parents.values()))
            if self.stopped is not None:
                self.tracker.stop(self.stopped)
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
def open_run(
    cfg: config.StageConfig,
    data: Mapping[str, Split],
    parents: Mapping[str, Published] | None = None,
    *,
    notes: Sequence[str] = (),
) -> Iterator[StageRun]:
    """Open the stage's run (rank 0) and leave it in order, whatever happens inside.

    Args:
        data: what is read, as the manifest will record it.
        parents: role -> the run that plays it.
        notes: lines for the console and the log, where the run is not finished yet.

    Raises:
        RegistryError: finished with another config, in use, damaged, or the disk refuses.
        StoppedByGuard: a guard ended training early, and what was best is published.
    """
    with _open(cfg, data, parents or {}) as run:
        if not run.finished:
            run.note(*notes)
        yield run
    if run.stopped is not None:
        raise StoppedByGuard(run.stopped)


@contextlib.contextmanager
def _open(
    cfg: config.StageConfig, data: Mapping[str, Split], parents: Mapping[str, Published]
) -> Iterator[StageRun]:
    console = Console(quiet=not ranks.is_main())
    if not ranks.is_main():
        opened = StageRun(cfg, None, console, data, parents)
        # The main process leaves a finished run at once (or refuses it); waiting for it would hang.
        if not cfg.overwrite and (opened.path / MANIFEST).exists():
            opened._opened_as = "finished"
        yield opened
        return
    with run.open_run(
        Registry(cfg.runs_dir),
        cfg.stage,
        cfg.run_name,
        dataclasses.asdict(cfg),
        parents,
        data={name: split.fingerprint for name, split in data.items()},
        config_text=OmegaConf.to_yaml(OmegaConf.structured(cfg)),
        overwrite=cfg.overwrite,
        command=sys.argv,
    ) as written:
        if written.latest is not None:
            state.read_file(written.latest.path)  # of an earlier version: refused before a load
        opened = StageRun(cfg, written, console, data, parents)
        for text in written.notes:
            opened.note(text)
        if opened.finished:
            opened.note(
                f"{written.reference} is finished with this config: nothing to do. overwrite=true "
                "runs it again; run_name=... makes another."
            )
            console.note(f"published: {written.path}")
        with written.writing("its files are"), opened._exits:
            try:
                yield opened
            except StoppedByGuard:  # before there was anything to publish: what led to it
                opened.report()
                raise


def models() -> types.ModuleType:
    """`rlhf.models`, which imports torch."""
    return importlib.import_module("rlhf.models")


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
