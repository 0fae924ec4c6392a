"""The three stages, a few steps long, on the first rows of the built-in tiny world."""

from __future__ import annotations

import atexit
import json
import runpy
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def few_rows(folder: Path, stage: str, rows: Sequence[int]) -> Path:
    """The first rows of the tiny world's train, validation (and test) data for `stage`."""
    (folder / stage).mkdir(parents=True, exist_ok=True)
    for split, size in zip(("train", "validation", "test"), rows, strict=False):
        lines = (ROOT / "data/tiny" / stage / f"{split}.jsonl").read_text().splitlines()[:size]
        (folder / stage / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder / stage


DATA = Path(tempfile.mkdtemp(prefix="rlhf-small-line-"))
atexit.register(shutil.rmtree, DATA, ignore_errors=True)
SMALL = {
    "sft": [
        f"data.path={few_rows(DATA, 'sft', (192, 16))}",
        "train.max_steps=3",
        "evaluation.prompts=2",  # eight answers to each
        "sampling.max_new_tokens=12",
    ],
    "rm": [
        f"data.path={few_rows(DATA, 'rm', (96, 16, 40))}",
        "train.max_steps=3",
        "card.probe_pairs=8",
    ],
    "ppo": [
        f"data.path={few_rows(DATA, 'ppo', (64, 16))}",
        "ppo.steps=2",
        "ppo.batch_size=8",
        "ppo.micro_batch_size=4",
        "ppo.minibatches=2",
        "ppo.epochs=2",
        "sampling.max_new_tokens=12",
        "evaluation.prompts=6",
    ],
}


def run_stage(monkeypatch: pytest.MonkeyPatch, stage: str, *overrides: str) -> int:
    """`python stages/<stage>.py <overrides>` in this process; the exit code."""
    monkeypatch.setattr(sys, "argv", [f"stages/{stage}.py", *overrides])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "stages" / f"{stage}.py"), run_name="__main__")
    return int(stopped.value.code or 0)


def run_line(monkeypatch: pytest.MonkeyPatch, runs: Path, *overrides: str) -> dict[str, int]:
    """All three stages under one name."""
    fixed = [f"runs_dir={runs}", "tracking=off", *overrides]
    return {stage: run_stage(monkeypatch, stage, *fixed, *SMALL[stage]) for stage in SMALL}


def numbers(runs: Path, stage: str, name: str = "tiny") -> list[dict[str, object]]:
    """metrics.jsonl without what a clock or a machine decides."""
    lines = (runs / stage / name / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "perf/"))}
        for line in lines
    ]
