"""The table of a stage at work: its headline numbers, from the first to the last.

It takes numbers as they come and gives a rich table of them for the width and height at hand.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import rich.box
from rich.table import Table

from rlhf.metrics import find

TREND = 16  # values in the small plot of a number
RECENT = f"last {TREND}"  # the head of its column
BESIDE = 6  # lines of the picture that are no number: title, head, rule, bars, a line of text
BARS = "▁▂▃▄▅▆▇█"
GOOD = {True: 1, False: -1, None: 0}
WIDE = 80  # columns, below which units and plots are left out
NARROW = 60  # below which the first value is, too


@dataclass
class History:
    """One number so far; `best` is (value, step), by the good direction that METRICS names."""

    unit: str
    first: float
    last: float
    best: tuple[float, int] | None = None
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=TREND))


class Board:
    """The numbers of one stage.

    Args:
        names: which metrics, in order; those that come are shown.
    """

    def __init__(self, stage: str, names: Sequence[str], total: int | None) -> None:
        self.stage, self.total = stage, total
        self.step = 0
        self._names = names
        self._found: dict[str, History] = {}

    def take(self, step: int, metrics: Mapping[str, float]) -> None:
        """The numbers of a step; what is not to be shown is left out."""
        self.step = step
        for name in self._names:
            if name not in metrics or (metric := find(name)) is None:
                continue
            value = metrics[name]
            found = self._found.setdefault(name, History(metric.unit, value, value))
            found.last = value
            found.recent.append(value)
            sign = GOOD[metric.higher_is_better]
            best = -math.inf if found.best is None else sign * found.best[0]
            if sign and math.isfinite(value) and sign * value > best:
                found.best = (value, step)

    def __bool__(self) -> bool:
        """There is something to show."""
        return bool(self._found)

    def table(self, width: int, height: int, *, plots: bool = True) -> Table:
        """The table, for a screen of so many columns and lines.

        Args:
            plots: the terminal can show them.
        """
        wide = width >= WIDE
        heads = ["last"] if width < NARROW else ["first", "best", "last"]
        heads += (["unit"] if wide else []) + ([RECENT] if wide and plots else [])
        names = [name for name in self._names if name in self._found][: max(1, height - BESIDE)]
        cells = [[self._cell(name, head) for head in heads] for name in names]
        columns = zip(heads, *cells, strict=True)
        room = width - 2 - sum(3 + max(map(len, column)) for column in columns)

        at = f"{self.step}" if self.total is None else f"{self.step}/{self.total}"
        title = f"{self.stage}: step {at}"
        table = Table(box=rich.box.SIMPLE_HEAD, title=title, title_justify="left", show_edge=False)
        table.add_column("", no_wrap=True)
        for head in heads:
            right = head in ("first", "best", "last")
            table.add_column(head, justify="right" if right else "left", no_wrap=True)
        for name, row in zip(names, cells, strict=True):
            table.add_row(name[-max(room, 4) :], *row)  # the end of a name tells more
        return table

    def _cell(self, name: str, head: str) -> str:
        found = self._found[name]
        if head == "best":
            return "" if found.best is None else f"{found.best[0]:.4g} @{found.best[1]}"
        if head == "unit":
            return found.unit
        if head == RECENT:
            return trend(tuple(found.recent))  # at once: numbers come while the picture is drawn
        return f"{found.first if head == 'first' else found.last:.4g}"


def trend(values: Sequence[float]) -> str:
    """A plot of one line, from the least of the values to the largest; a gap is no number."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return ""
    low, span = min(known), max(known) - min(known)

    def bar(value: float) -> str:
        if not math.isfinite(value):
            return " "
        return BARS[round((value - low) / span * (len(BARS) - 1)) if span > 0 else len(BARS) // 2]

    return "".join(map(bar, values))
