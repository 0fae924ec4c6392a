"""Runs pytest and prints a row for docs/compatibility.md: the day, versions, what passed."""

from __future__ import annotations

import datetime
import platform
import sys
from typing import Any

import pytest

from rlhf import libraries

SHOWN = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "deepspeed", "wandb")


class Counts:
    """What became of the tests."""

    text = ""

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        found = terminalreporter.stats
        kinds = ("passed", "failed", "error", "skipped")
        self.text = ", ".join(f"{len(found[kind])} {kind}" for kind in kinds if found.get(kind))


def main() -> int:
    counts = Counts()
    code = int(pytest.main(sys.argv[1:], plugins=[counts]))
    cells = [str(datetime.date.today()), platform.python_version()]
    cells += [f"{libraries.installed(name)}" for name in SHOWN]
    print(f"\n| day | python | {' | '.join(SHOWN)} | tests |")
    print(f"| {' | '.join([*cells, counts.text])} |")
    return code


if __name__ == "__main__":
    sys.exit(main())
