"""The numbers of a run, as they come: to metrics.jsonl, the console and W&B alike.

Which numbers there are is said in `metrics.py`; `wandb_run.py` speaks to W&B. With `tracking=off`
nothing outside the standard library is imported.
"""

from __future__ import annotations

import math
import os
import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import ConfigError, StoppedByGuard
from rlhf.journal import Journal
from rlhf.metrics import HISTOGRAMS, in_table_order
from rlhf.wandb_run import WandbRows, first_line

if TYPE_CHECKING:
    from rlhf.console import Console
    from rlhf.registry import Published

MODES = ("auto", "online", "offline", "off")

# What the table of samples shows of a line of samples_log.jsonl, in order.
SAMPLE_COLUMNS = (
    "step",
    "prompt",
    "sft",
    "ppo",
    "sft_score",
    "ppo_score",
    "sft_gold",
    "ppo_gold",
    "ppo_kl",
    "ppo_length",
)
TABLE_ROWS = 10_000  # that W&B shows of a table; the newest are taken
SAMPLES_LOG = "samples_log.jsonl"


class Tracker:
    """Writes each number once to metrics.jsonl, the console and W&B. Main process only.

    Args:
        stage, run, run_name: W&B shows job type = stage, group = run, name = stage/run_name.
        config: the composed settings, as plain JSON values.
        metrics_path: the metrics.jsonl to write; replaced unless `append`.
        directory: the run folder; W&B files land in `directory`/wandb.
        project, entity: where W&B puts the run; entity None is the key's default.
        mode: "auto" (online when a key is at hand, else offline), "online", "offline" or "off".
        console: shown every line of numbers; None for silence.
        append: an interrupted run goes on: keep the finished lines of metrics.jsonl, and the W&B
            run, which gets what it lacks of them and no step twice.
        total: steps of the stage, for the console.
        tags: of the W&B run.

    Raises:
        ConfigError: an unknown mode; "online" without key or network; wandb not installed.
    """

    def __init__(
        self,
        *,
        stage: str,
        run: str,
        run_name: str,
        config: dict[str, Any],
        metrics_path: Path,
        directory: Path,
        project: str,
        entity: str | None,
        mode: str,
        console: Console | None,
        append: bool = False,
        total: int | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        self.stage = stage
        self.total = total
        self._reference = f"{stage}/{run_name}"
        self._console = console
        self._closed = False
        self._exit_code = 0
        self._append = self._behind = append
        self._samples_path = directory / SAMPLES_LOG
        self._samples: Journal | None = None
        self._samples_shown = 0  # rows of the table that W&B was given last
        if mode not in MODES:
            raise ConfigError(
                f"tracking.mode={mode!r}: not one of {', '.join(MODES)}. `auto` is online when a "
                "W&B key is at hand and offline otherwise; `tracking=off` silences it."
            )
        directory.mkdir(parents=True, exist_ok=True)
        self._wandb = self._start_wandb(
            mode,
            WandbRows(directory, resume=append),
            project=project,
            entity=entity,
            group=run,
            name=self._reference,
            job_type=stage,
            tags=list(dict.fromkeys(tags)),
            config=config,
        )
        try:
            self._metrics = Journal(metrics_path, append=append)
        except BaseException:
            self._finish_wandb(exit_code=1)
            raise

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Record the numbers of one step; several calls may share a step, none may go back.

        Raises:
            KeyError: a name that is not one of a metric (`metrics.find`); nothing is written then.
            ValueError: `step` is before the last one (W&B would drop the numbers in silence).
        """
        numbers = in_table_order(metrics)
        last = self._metrics.step
        if last is not None and step < last:
            raise ValueError(f"step={step} comes after step {last}: steps never go back")
        if self._closed:
            raise ValueError(f"log(step={step}) after close()")
        self._catch_up()
        self._metrics.write(
            {"step": step} | {name: _json_value(value) for name, value in numbers.items()}
        )
        self._to_wandb(lambda rows: rows.add(step, numbers))
        if self._console is not None:
            self._console.metrics(self.stage, step, self.total, numbers)

    def histograms(self, values: Mapping[str, Sequence[float]], *, step: int) -> None:
        """Show how numbers are distributed at a step, in W&B.

        Args:
            values: by name of HISTOGRAMS; what is not finite is left out.

        Raises:
            KeyError: another name.
        """
        for name in values:
            if name not in HISTOGRAMS:
                raise KeyError(f"histogram {name!r} is not one of {', '.join(HISTOGRAMS)}")
        self._catch_up()
        self._to_wandb(lambda rows: rows.add_histograms(step, values))

    def samples(self, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
        """Keep a few answers of an evaluation in samples_log.jsonl and in a growing W&B table.

        A W&B table cannot be added to: it is logged whole, each time it has doubled and at the
        end, which costs at most twice the last one.

        Args:
            rows: as SAMPLE_COLUMNS names them; other values are kept in the file only.
        """
        if not rows:
            return
        self._catch_up()
        if self._samples is None:
            self._samples = Journal(self._samples_path, append=self._append)
        for row in rows:
            whole = {"step": step, **row}
            self._samples.write({name: _json_value(value) for name, value in whole.items()})
        if self._samples.lines >= 2 * self._samples_shown:
            self._show_samples(step)

    def _show_samples(self, step: int) -> None:
        if self._samples is None or self._samples.lines == self._samples_shown:
            return
        shown = self._samples.rows()[-TABLE_ROWS:]
        self._samples_shown = self._samples.lines
        self._to_wandb(lambda rows: rows.add_table(step, "samples", SAMPLE_COLUMNS, shown))

    @property
    def names(self) -> frozenset[str]:
        """What metrics.jsonl has a number of."""
        return frozenset(self._metrics.names)

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Set the numbers W&B shows for the run as a whole (the manifest keeps its own)."""
        numbers = in_table_order(metrics)
        self._to_wandb(lambda rows: rows.summarise(numbers))

    def stop(self, reason: str) -> None:
        """A guard ended the run: W&B tells whoever asked for alerts, and shows it as failed."""
        self._exit_code = 3
        self._note_failure(lambda rows: rows.alert(f"{self._reference}: stopped", reason))

    def publish(self, made: Published, parents: Sequence[Published]) -> None:
        """Record a published run as a W&B artifact, with what it came from."""
        self._note_failure(lambda rows: rows.publish(made, parents))

    @property
    def lines(self) -> int:
        """How many lines metrics.jsonl has."""
        return self._metrics.lines

    def rewind(self, lines: int, *, step: int | None = None) -> None:
        """Keep the first `lines` of metrics.jsonl, and the samples up to `step`: a resumed run
        logs again what came after its checkpoint."""
        self._metrics.rewind(lines=lines)
        if self._samples_path.exists():
            self._samples = Journal(self._samples_path, append=True)
            self._samples.rewind(step=step)

    def close(self, exit_code: int = 0) -> None:
        """Finish W&B and the files; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self._catch_up()
            if self._metrics.step is not None:
                self._show_samples(self._metrics.step)
            self._finish_wandb(exit_code or self._exit_code)
        finally:
            self._metrics.close()
            if self._samples is not None:
                self._samples.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if isinstance(error, StoppedByGuard):
            self.stop(str(error))
        self.close(exit_code=0 if kind is None else self._exit_code or 1)

    # -- W&B

    def _catch_up(self) -> None:
        """Give W&B the lines of an interrupted run that it lacks, before there are new ones."""
        if not self._behind:
            return
        self._behind = False
        for row in self._metrics.rows() if self._wandb is not None else ():
            step = row.pop("step")
            numbers = {name: float(v) if isinstance(v, str) else v for name, v in row.items()}
            self._to_wandb(partial(WandbRows.add, step=step, values=numbers))

    def _note(self, text: str) -> None:
        if self._console is not None:
            self._console.note(f"[{self.stage}] tracking: {text}")

    def _start_wandb(self, mode: str, rows: WandbRows, **about: Any) -> WandbRows | None:
        """The W&B run, or None when tracking is off."""
        if mode == "auto":  # what the user told W&B itself comes before our choice
            wish = os.environ.get("WANDB_MODE", "").lower()
            mode = {"disabled": "off", "offline": "offline", "dryrun": "offline"}.get(wish, mode)
        if mode == "off":
            return None
        try:
            self._note(rows.start(mode, about))
            return rows
        except ConfigError:
            raise
        except Exception as error:  # a missing package, a broken setting, a dead service
            missing = isinstance(error, ModuleNotFoundError) and error.name == "wandb"
            reason = "wandb is not installed" if missing else first_line(error)
            if mode == "auto":
                self._note(f"off ({reason})")
                return None
            raise ConfigError(
                f"tracking.mode={mode}: W&B did not start ({reason}). "
                + ("`pip install wandb`" if missing else "Mend that")
                + ", or do without: `tracking=off`."
            ) from error

    def _to_wandb(self, action: Callable[[WandbRows], object]) -> None:
        """Do `action` with the W&B run; a dashboard that fails must not end a training run."""
        if self._wandb is None:
            return
        try:
            action(self._wandb)
        except Exception as error:
            self._wandb = None
            self._note(f"W&B failed and is left out from here on ({error!r})")

    def _note_failure(self, action: Callable[[WandbRows], object]) -> None:
        """The same for what the numbers do not need: they go on."""
        if self._wandb is None:
            return
        try:
            action(self._wandb)
        except Exception as error:
            self._note(f"W&B did not take it ({first_line(error)})")

    def _finish_wandb(self, exit_code: int) -> None:
        self._to_wandb(lambda rows: rows.finish(exit_code))
        self._wandb = None


def _json_value(value: Any) -> Any:
    """JSON has no nan and no infinity: they are written as "nan", "inf" and "-inf"."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
