"""What lies in a run's folder, read so that damage is told and never ends a report.

Each reader returns what could be read and adds to `problems` what could not. Numbers may be
written as "nan", "inf" and "-inf", as in metrics.jsonl.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")

# What reading a JSON value as something else may raise.
ODD = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)

MOST_BYTES = 64 << 20  # of a JSON file beside metrics.jsonl; a report needs no more


@dataclass(frozen=True)
class Curve:
    """One metric over a run: `steps` [N] int64, `values` [N] float64, nan and infinities kept."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A number and its 95 % interval; None where it was not measured or is not finite."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Slice:
    """An interval with a name: of `count` pairs or prompts; `about` says what was done."""

    name: str
    count: int | None
    interval: Interval
    about: str = ""


@dataclass(frozen=True)
class Bin:
    """Pairs whose confidence, sigmoid(margin), lies between `low` and `high`."""

    low: float | None
    high: float | None
    confidence: float | None
    accuracy: float | None
    pairs: int | None


@dataclass(frozen=True)
class Card:
    """card.json of a reward model."""

    split: str
    pairs: int | None
    verdict: str
    reasons: list[str]
    accuracy: Interval
    baselines: list[Slice]
    slices: dict[str, list[Slice]]
    ece: float | None
    brier: float | None
    bins: list[Bin]
    edges: list[float]
    counts: list[float]
    probes: list[Slice]
    agreement: list[Slice]


@dataclass(frozen=True)
class Row:
    """A prompt with answers: (whose, text, {measure: number}); `tag` is a category or a winner."""

    prompt: str
    answers: list[tuple[str, str, dict[str, float | None]]]
    tag: str = ""


@dataclass(frozen=True)
class Evaluation:
    """An eval/<name>.json: answers of `reference` against those of `against`, by a judge."""

    name: str
    reference: str
    against: str
    judge: str
    calls: str
    prompts: int | None
    wins: Interval
    ties: float | None
    length_controlled: Interval | None
    categories: list[Slice]
    measures: list[tuple[str, Interval, Interval]]  # score, kl, length: ours, theirs
    rows: list[Row]


@dataclass(frozen=True)
class Point:
    """A held-out evaluation during PPO; KL in nats per answer."""

    step: int
    kl: float
    score: Interval
    gold: Interval


@dataclass(frozen=True)
class OverOptimisation:
    """overoptimisation.json of a PPO run; `knee` is the KL where gold stops rising."""

    measure: str
    points: list[Point]
    knee: tuple[int | None, float] | None
    warnings: list[str]


# ---------------------------------------------------------------- metrics.jsonl


def metrics(path: Path, problems: list[str]) -> dict[str, Curve]:
    """The curves of metrics.jsonl; a last line that is still being written is left out."""
    alike: dict[tuple[str, ...], list[list[Any]]] = {}  # names -> line, step and values of each row
    bad: list[int] = []
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            for line, text in enumerate(file, 1):
                try:
                    row = json.loads(text)
                    step = int(row.pop("step"))
                except ODD:
                    if text.endswith("\n") and text.strip():
                        bad.append(line)
                    continue
                alike.setdefault(tuple(row), []).append([line, step, *row.values()])
    except FileNotFoundError:
        return {}
    except OSError as error:
        problems.append(f"{path.name}: cannot be read ({error.strerror})")
    if bad:
        problems.append(f"{path.name}: lines that cannot be read: {len(bad)}, first line {bad[0]}")
    parts: dict[str, list[NDArray[np.float64]]] = {}
    for names, rows in alike.items():
        table = _table(rows)
        for place, name in enumerate(names, 2):
            parts.setdefault(name, []).append(table[:, [0, 1, place]])
    return {name: _curve(found) for name, found in parts.items()}


def _table(rows: list[list[Any]]) -> NDArray[np.float64]:
    try:
        return np.array(rows, dtype=np.float64)  # reads "nan" and "-inf" as well
    except ODD:
        return np.array([[_number_or_nan(value) for value in row] for row in rows])


def _curve(parts: list[NDArray[np.float64]]) -> Curve:
    """Of tables [N, 3] of line, step and value; in the order of the lines."""
    rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if len(parts) > 1:
        rows = rows[rows[:, 0].argsort()]
    steps = np.clip(rows[:, 1], 0, np.iinfo(np.int32).max).astype(np.int64)
    return Curve(steps, np.ascontiguousarray(rows[:, 2]))


def _number_or_nan(value: Any) -> float:
    try:
        return float(value)
    except ODD:
        return math.nan


# ---------------------------------------------------------------- one object, or one a line


def read(path: Path, parse: Callable[[Any], T], problems: list[str]) -> T | None:
    """`parse` of a JSON file; None where there is none, or where it is not what it should be."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"has more than {MOST_BYTES >> 20} MB")
        return parse(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f"{path.name}: cannot be read ({error.strerror})")
    except ODD as error:
        what = f"{type(error).__name__}: {error}"[:200]
        problems.append(f"{path.name}: is not what it should be, and is left out ({what})")
    return None


def read_lines(path: Path, parse: Callable[[Any], T], problems: list[str]) -> list[T]:
    """`parse` of each line of a file of JSON lines; lines that cannot be read are counted."""
    found, bad = [], 0
    try:
        with path.open("rb") as file:
            for line in file:
                try:
                    found.append(parse(json.loads(line)))
                except ODD:
                    bad += line.endswith(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(f"{path.name}: cannot be read ({error.strerror})")
    if bad:
        problems.append(f"{path.name}: lines that cannot be read: {bad}")
    return found


# ---------------------------------------------------------------- what they hold


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if value is None or isinstance(value, bool):
        return None
    found = float(value)
    return found if math.isfinite(found) else None


def text(value: Any) -> str:
    """A string as it is, half surrogate pairs as "?"; anything else as JSON."""
    found = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return found.encode("utf-8", "replace").decode()


def interval(given: Any) -> Interval:
    """From {"value", "low", "high"}; without a value, one of nothing."""
    if given is None:
        return Interval(None)
    return Interval(number(given["value"]), number(given.get("low")), number(given.get("high")))


def _count(value: Any) -> int | None:
    found = number(value)
    return None if found is None else int(found)


def _slice(given: Any, *, name: str = "name", count: str = "pairs") -> Slice:
    about = text(given.get("what", ""))
    return Slice(text(given[name]), _count(given.get(count)), interval(given), about)


def card(given: Any) -> Card:
    """From card.json."""
    calibration, margins = given.get("calibration") or {}, given.get("margins") or {}
    return Card(
        split=text(given.get("split", "")),
        pairs=_count(given.get("pairs")),
        verdict=text(given["verdict"]),
        reasons=[text(reason) for reason in given.get("reasons", [])],
        accuracy=interval(given["accuracy"]),
        baselines=[
            Slice(text(name).replace("_", " "), None, interval(found))
            for name, found in given.get("baselines", {}).items()
        ],
        slices={
            text(name): [_slice(part) for part in parts]
            for name, parts in given.get("slices", {}).items()
        },
        ece=number(calibration.get("ece")),
        brier=number(calibration.get("brier")),
        bins=[_bin(b) for b in calibration.get("bins", [])],
        edges=[float(edge) for edge in margins.get("edges", [])],
        counts=[float(count) for count in margins.get("counts", [])],
        probes=[_slice(probe) for probe in given.get("probes", [])],
        agreement=[_slice(part, name="reference") for part in given.get("agreement", [])],
    )


def _bin(given: Any) -> Bin:
    low, high, confidence, accuracy = (
        number(given.get(key)) for key in ("low", "high", "confidence", "accuracy")
    )
    return Bin(low, high, confidence, accuracy, _count(given.get("pairs")))


def evaluation(given: Any) -> Evaluation:
    """From eval/<name>.json."""
    judge = given["judge"]
    about = [f"{_count(judge.get('calls')) or 0} calls"]
    if failed := _count(judge.get("failures")):
        about.append(f"{failed} failed")
    if cost := number(judge.get("cost")):
        about.append(f"cost {cost:.4g}")
    measures = [
        (name, interval(given[name]["ours"]), interval(given[name]["theirs"]))
        for name in ("score", "kl", "length")
        if given.get(name)
    ]
    controlled = given.get("length_controlled")
    ours, theirs = text(given["reference"]), text(given["against"])
    return Evaluation(
        name=f"{ours} against {theirs}",
        reference=ours,
        against=theirs,
        judge=text(judge["name"]),
        calls=", ".join(about),
        prompts=_count(given.get("prompts")),
        wins=interval(given["wins"]),
        ties=number(given.get("ties")),
        length_controlled=interval(controlled) if controlled else None,
        categories=[_slice(part, count="prompts") for part in given.get("by_category", [])],
        measures=measures,
        rows=[_evaluated(row, ours, theirs) for row in given.get("rows", [])],
    )


def _evaluated(row: Any, ours: str, theirs: str) -> Row:
    won = {"ours": f"{ours} wins", "theirs": f"{theirs} wins", "tie": "a tie"}
    tags = [text(row.get("category") or ""), won.get(text(row.get("winner", "")), "")]
    return Row(
        text(row["prompt"]),
        [
            (ours, text(row["ours"]), {"score": number(row.get("ours_score"))}),
            (theirs, text(row["theirs"]), {"score": number(row.get("theirs_score"))}),
        ],
        ", ".join(tag for tag in tags if tag),
    )


def sample(given: Any) -> Row:
    """From a line of samples.jsonl: "sft" and "ppo" are whose answers they are."""
    return Row(
        text(given["prompt"]),
        [
            (
                who,
                text(given[who]),
                {
                    "score": number(given.get(f"{who}_score")),
                    "gold": number(given.get(f"{who}_gold")),
                    "ended": None if given.get(f"{who}_ended", True) else 0.0,
                },
            )
            for who in ("sft", "ppo")
            if given.get(who) is not None
        ],
    )


def sample_in_time(given: Any) -> Row:
    """From a line of samples_log.jsonl; the step is the tag."""
    measures = {
        "score": number(given.get("ppo_score")),
        "gold": number(given.get("ppo_gold")),
        "KL": number(given.get("ppo_kl")),
        "tokens": number(given.get("ppo_length")),
        "ended": None if given.get("ppo_ended", True) else 0.0,
    }
    step = int(given["step"])
    return Row(
        text(given["prompt"]), [(f"step {step}", text(given["ppo"]), measures)], f"step {step}"
    )


def over_optimisation(given: Any) -> OverOptimisation:
    """From overoptimisation.json."""
    knee = given.get("knee")
    where = number(knee.get("kl")) if knee else None
    points = []
    for point in given.get("points", []):
        kl = number(point.get("kl"))
        if kl is not None:
            points.append(
                Point(int(point["step"]), kl, *(_named(point, n) for n in ("score", "gold")))
            )
    return OverOptimisation(
        measure=text(given.get("measure") or ""),
        points=points,
        knee=None if where is None else (_count(knee.get("step")), where),
        warnings=[
            # as in the manifest
            f"{text(w.get('name'))} (step {text(w.get('step'))}): {text(w['text'])}"
            for w in given.get("warnings", [])
        ],
    )


def _named(point: Any, name: str) -> Interval:
    keys = (name, f"{name}_low", f"{name}_high")
    return Interval(*(number(point.get(key)) for key in keys))
