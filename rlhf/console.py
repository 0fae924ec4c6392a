"""What a person sees while a stage runs.

All of it goes to stderr except the closing summary, which is the result and goes to stdout. On a
terminal there is one live picture: a table of the headline numbers, and the bars of progress below
it. In a log file both are plain lines now and then, without control characters. Colours follow
NO_COLOR, and text off a terminal is laid out for 100 columns.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import rich.box
import rich.console
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from rlhf import metrics
from rlhf.board import Board

WIDTH_OFF_TERMINAL = 100
SECONDS_BETWEEN_LINES = 10.0
SAMPLE_CHARACTERS = 600
REFRESHES_PER_SECOND = 1  # of the live picture; each takes 5 ms

# The few numbers that tell whether a stage goes well, in reading order.
HEADLINES: dict[str, tuple[str, ...]] = {
    "sft": ("train/loss", "train/learning_rate", "eval/loss"),
    "rm": ("train/loss", "train/accuracy", "eval/loss", "eval/accuracy", "eval/margin"),
    "ppo": (
        "objective/scores",
        "objective/kl",
        "policy/approxkl",
        "policy/clipfrac",
        "val/explained_variance",
        "response/length",
        "response/eos_rate",
        "eval/score",
        "eval/kl",
        "eval/gold",
        "eval/second",
        "eval/win_rate",
    ),
}


class Console:
    """Notes, numbers, progress and tables for one process.

    Args:
        quiet: nothing at all is shown (every process but the main one; tests).
        err, out: where to write; stderr and stdout unless given.
        clock: seconds from any origin, for rates and for the pace of plain lines.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        err: TextIO | None = None,
        out: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._err = _rich_console(err or sys.stderr, quiet=quiet)
        self._out = _rich_console(out or sys.stdout, quiet=quiet)
        self._clock = clock
        self._live: Live | None = None
        self._bars: Progress | None = None
        self._board: Board | None = None
        self._depth = 0

    def note(self, text: str) -> None:
        """A plain line, such as "[sft] 800 rows, 12 dropped"."""
        self._line(self._err, text)

    def metrics(
        self, stage: str, step: int, total: int | None, metrics: Mapping[str, float]
    ) -> None:
        """The numbers that matter for the stage: in the live table, else as one compact line.

        None of them, no line.
        """
        names = _with_terms(HEADLINES.get(stage, tuple(metrics)), metrics)
        if self._live is not None:
            if self._board is None or self._board.stage != stage:
                self._board = Board(stage, names, total)
            self._board.take(step, metrics)
            return
        shown = [f"{name} {metrics[name]:.4g}" for name in names if name in metrics]
        if shown:
            at = f"{step}" if total is None else f"{step}/{total}"
            self.note(f"[{stage}] step {at}  " + "  ".join(shown))

    @contextmanager
    def progress(
        self, description: str, total: int, unit: str = "steps", *, done: int = 0
    ) -> Iterator[Pace]:
        """Show progress with rate and ETA while the block runs; blocks may be nested.

        Args:
            done: units finished before this process began (a resumed run); not in the rate.
        """
        nested = self._depth > 0
        self._depth += 1
        try:
            show = self._bar if _is_live(self._err) else self._lines
            with show(Pace(description, total, unit, done, self._clock), nested) as pace:
                yield pace
        finally:
            self._depth -= 1

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Names and values under a title."""
        self._two_columns(self._err, title, rows)

    def summary(self, title: str, rows: Sequence[tuple[str, str]], published: str | None) -> None:
        """The closing table of a stage on stdout; `published` is the path of its result."""
        self._two_columns(self._out, title, rows)
        if published is not None:
            self._line(self._out, f"published: {published}")  # a line: a cell would break the path

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The same prompts answered before and after PPO, side by side.

        Args:
            rows: with keys prompt, sft, ppo (text) and, where known, sft_score, sft_gold,
                ppo_score, ppo_gold.
        """
        table = Table(box=rich.box.ROUNDED, expand=True, show_lines=True, title="samples")
        for title, ratio in (("prompt", 2), ("SFT answer", 3), ("PPO answer", 3)):
            table.add_column(title, ratio=ratio, overflow="fold")
        for row in rows:
            cells = [str(row["prompt"])]
            for who in ("sft", "ppo"):
                verdict = ", ".join(
                    f"{name} {row[key]:.3f}"
                    for name in ("score", "gold")
                    if row.get(key := f"{who}_{name}") is not None
                )
                answer = str(row[who])
                if len(answer) > SAMPLE_CHARACTERS:
                    answer = answer[:SAMPLE_CHARACTERS] + " [...]"
                cells.append(f"{answer}\n({verdict})" if verdict else answer)
            table.add_row(*(_safe(self._err, cell) for cell in cells))
        self._err.print(table)

    def _two_columns(
        self, console: rich.console.Console, title: str, rows: Sequence[tuple[str, str]]
    ) -> None:
        table = Table(box=rich.box.ROUNDED, show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(_safe(console, name), _safe(console, value))
        self._line(console, title)  # rich would squeeze a title to the width of its table
        console.print(table)

    def _line(self, console: rich.console.Console, text: str) -> None:
        console.print(_safe(console, text), soft_wrap=True)

    @contextmanager
    def _bar(self, pace: Pace, nested: bool) -> Iterator[Pace]:
        """A bar of the live picture; a nested one is a second line of it, gone when it ends."""
        if self._live is None or self._bars is None:
            self._bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                _PaceColumn(),
                console=self._err,
            )
            self._board = None
            self._live = Live(
                get_renderable=self._picture,
                console=self._err,
                refresh_per_second=REFRESHES_PER_SECOND,
                redirect_stdout=sys.stdout.isatty(),  # or a piped stdout would land on stderr
            )
            self._live.start()
        live, bars = self._live, self._bars
        task = bars.add_task(pace.description, total=pace.total, completed=pace.done, pace=pace)
        pace.on_advance = lambda: bars.update(task, completed=pace.done)
        try:
            yield pace
        finally:
            if nested:
                bars.remove_task(task)
            else:
                try:
                    live.stop()
                finally:
                    self._live = self._bars = None

    def _picture(self) -> rich.console.RenderableType:
        """What the live display shows now, as it fits the terminal."""
        bars: rich.console.RenderableType = self._bars or ""
        if not self._board:
            return bars
        size = self._err.size
        plots = self._err.encoding.lower().startswith("utf")
        table = self._board.table(size.width, size.height, plots=plots)
        return rich.console.Group(table, bars)

    @contextmanager
    def _lines(self, pace: Pace, nested: bool) -> Iterator[Pace]:
        """A line every ten seconds, and one at the end unless a nested part was over in less."""
        last = self._clock()

        def on_advance() -> None:
            nonlocal last
            if self._clock() - last >= SECONDS_BETWEEN_LINES and pace.done < pace.total:
                last = self._clock()
                self.note(f"{pace.description}: {pace.words()}")

        pace.on_advance = on_advance
        try:
            yield pace
        finally:
            if not nested or pace.elapsed() >= SECONDS_BETWEEN_LINES:
                spent = duration(pace.elapsed())
                self.note(f"{pace.description}: {pace.words(eta=False)}, {spent} in all")


class Pace:
    """How far a piece of work is, and how fast: "12/200 steps, 3.2 steps/s, ETA 59s"."""

    def __init__(
        self, description: str, total: int, unit: str, done: int, clock: Callable[[], float]
    ) -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.done = done
        self.on_advance: Callable[[], None] = lambda: None
        self._done_before = done
        self._clock = clock
        self._start = self._last = clock()

    def advance(self, n: int = 1) -> None:
        """`n` more units are done."""
        self.done += n
        self._last = self._clock()
        self.on_advance()

    def elapsed(self) -> float:
        """Seconds since the work began here."""
        return self._clock() - self._start

    def rate(self) -> float | None:
        """Units per second up to the last one done here; None before that."""
        seconds, done = self._last - self._start, self.done - self._done_before
        return done / seconds if done > 0 and seconds > 0 else None

    def eta(self) -> float | None:
        """Seconds to go at that rate."""
        rate = self.rate()
        if rate is None:
            return None
        return max(0.0, (self.total - self.done) / rate - (self._clock() - self._last))

    def words(self, *, eta: bool = True) -> str:
        """How far, how fast, and (if asked and not done) how long still."""
        parts = [f"{self.done}/{self.total} {self.unit}"]
        if (rate := self.rate()) is not None:
            one = re.sub("(?<=[cs]h)es$|s$", "", self.unit)  # batches -> batch, steps -> step
            parts.append(f"{rate:.1f} {self.unit}/s" if rate >= 1 else f"{1 / rate:.1f} s/{one}")
        if eta and self.done < self.total and (seconds := self.eta()) is not None:
            parts.append(f"ETA {duration(seconds)}")
        return ", ".join(parts)


class _PaceColumn(ProgressColumn):
    """The words behind the bar."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["pace"].words(), style="progress.remaining")


def duration(seconds: float) -> str:
    """7.4 -> "7s", 65 -> "1m 05s", 7384 -> "2h 03m"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def _with_terms(names: Sequence[str], found: Mapping[str, float]) -> list[str]:
    """`names`, and after the score the terms that it is the sum of, where there are several."""
    terms = metrics.terms(found)
    shown = [[name, *terms] if name == "objective/scores" else [name] for name in names]
    return [name for some in shown for name in some] if len(terms) > 1 else list(names)


def _rich_console(file: TextIO, *, quiet: bool) -> rich.console.Console:
    width = None if file.isatty() else WIDTH_OFF_TERMINAL
    return rich.console.Console(
        file=file, width=width, quiet=quiet, markup=False, emoji=False, highlight=False
    )


def _is_live(console: rich.console.Console) -> bool:
    """A terminal that can redraw. FORCE_COLOR makes rich call a log file a terminal: not enough."""
    return not console.quiet and console.file.isatty() and os.environ.get("TERM") != "dumb"


def _safe(console: rich.console.Console, text: str) -> Text:
    """Text that cannot steer the terminal or break its encoding: models write any character."""
    clean = "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    return Text(clean.encode(console.encoding, "replace").decode(console.encoding))
