"""Tables and JSON as commands print them: plain, quick, and nothing that steers a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=vars))


def print_json_list(values: Iterable[Any]) -> None:
    """One item a line: json lays out large values slowly."""
    lines = ",\n".join(json.dumps(value, default=vars) for value in values)
    print(f"[\n{lines}\n]" if lines else "[]")


def glyphs(*texts: str) -> Sequence[str]:
    """Lines and corners as this output can show them."""
    try:
        "".join(texts).encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return [
            text.translate({ord(a): b for a, b in zip("└├│─", "`||-", strict=True)})
            for text in texts
        ]
    return texts


def printable(text: str) -> str:
    """`text` with what could steer a terminal spelled out; line ends stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns under headers, folded where a terminal is too narrow for them.

    Off a terminal text is never cut, so that it can be searched. Without rich, which needs more
    than a second for a thousand rows.
    """
    (rule,), gap = glyphs("─"), "   "
    cells = [[printable(cell).split("\n") for cell in row] for row in (headers, *rows)]
    widths = [
        max(len(text) for cell in column for text in cell) for column in zip(*cells, strict=True)
    ]
    if sys.stdout.isatty():
        from shutil import get_terminal_size

        widths = _narrowed(widths, get_terminal_size().columns - len(gap) * (len(widths) - 1))
        cells = [
            [_folded(cell, size) for cell, size in zip(row, widths, strict=True)] for row in cells
        ]
    lines = []
    for row in cells:
        for parts in zip_longest(*row, fillvalue=""):
            lines.append(gap.join(map(str.ljust, parts, widths)).rstrip())
    lines.insert(max(map(len, cells[0])), rule * (sum(widths) + len(gap) * (len(widths) - 1)))
    print("\n".join(lines))


def _narrowed(widths: list[int], room: int) -> list[int]:
    """`widths` with the widest made narrower, the first one last, until all fit into `room`."""
    widths = list(widths)
    for first in (1, 0):
        while sum(widths) > room and max(widths[first:], default=0) > 8:
            widths[widths.index(max(widths[first:]), first)] -= 1
    return widths


def _folded(lines: list[str], width: int) -> list[str]:
    """`lines` with the long ones going on in the next line."""
    from textwrap import wrap

    return [part for line in lines for part in (wrap(line, width) if len(line) > width else [line])]
