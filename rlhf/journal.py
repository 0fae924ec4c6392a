"""A file of JSON objects, one a line, each with its step: written as it happens, and rewound.

What a process was writing when it died is cut off; a run that goes on from a checkpoint drops what
came after it, since it does that again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Journal:
    """One such file, open for writing.

    Args:
        path: the file; replaced unless `append`, which keeps its whole lines.

    Attributes:
        lines: how many lines it has.
        step: that of the last line, or None.
        names: the keys that some line has.
    """

    def __init__(self, path: Path, *, append: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = 0
        self.step: int | None = None
        self.names: set[str] = set()
        self._file = path.open("r+b" if append and path.exists() else "w+b")
        try:
            self.rewind()
        except BaseException:
            self._file.close()
            raise

    def write(self, row: dict[str, Any]) -> None:
        """Add a line, which is in the file before the next one; `row` has a "step"."""
        line = json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n"
        self._file.write(line.encode("utf-8", "backslashreplace"))  # half a character of a model
        self._file.flush()
        self.lines += 1
        self.step = row["step"]
        self.names |= row.keys()

    def rewind(self, *, lines: int | None = None, step: int | None = None) -> None:
        """Keep the whole lines: `lines` of them, and those up to `step`, where they are given."""
        self._file.seek(0)
        end, self.lines, self.step, self.names = 0, 0, None, set()
        for line in self._file:
            if not line.endswith(b"}\n") or self.lines == lines:  # cut off by a crash; enough
                break
            row = json.loads(line)
            if step is not None and row["step"] > step:
                break
            end, self.step = end + len(line), row["step"]
            self.lines += 1
            self.names |= row.keys()
        self._file.seek(end)
        self._file.truncate()

    def rows(self) -> list[dict[str, Any]]:
        """What is in it, from the first line."""
        self._file.seek(0)
        found = [json.loads(line) for line in self._file]
        self._file.seek(0, 2)
        return found

    def close(self) -> None:
        """Nothing is written after this."""
        self._file.close()
