"""Which plots a report has, and their points: plain numbers, thinned, packed for the page."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf import metrics
from rlhf.overoptimisation import GOLD, SECOND
from rlhf.report import thin
from rlhf.report.collect import Run
from rlhf.report.files import Card, Curve, Interval, Point, number

Numbers = NDArray[np.float64]

# Of each stage, what is shown first and in this order; the rest is folded away.
FIRST = {
    "sft": ("train/loss", "eval/loss", "eval/gold"),
    "rm": ("train/loss", "eval/loss", "eval/accuracy", "eval/margin", "eval/ece"),
    "ppo": (
        "objective/scores",
        "objective/kl",
        "eval/score",
        "eval/gold",
        "eval/second",
        "eval/win_rate",
        "eval/kl",
        "response/length",
        "response/eos_rate",
        "objective/entropy",
        "policy/approxkl",
        "policy/clipfrac",
        "val/explained_variance",
    ),
}
ENDS = ("_ci_low", "_ci_high")  # of a 95 % interval: drawn around their metric


@dataclass(frozen=True)
class Series:
    """One line of a plot.

    Attributes:
        run: place in the list of runs, whose name, colour and switch it has; -1: none of them.
        x, y: [N].
        low, high: [N], the ends of intervals, where there are any.
        steps: [N], where x is not the step.
    """

    run: int
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None
    steps: Numbers | None = None


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        key: unique in a page.
        about: what y is, in words.
        knees: (run, x): where over-optimisation begins.
        bars: (left, right, height) of a histogram.
        dots: points without the line that joins them.
        first: among the plots that are not folded away.
    """

    key: str
    title: str
    about: str
    x_label: str
    y_label: str
    series: list[Series] = field(default_factory=list)
    knees: list[tuple[int, float]] = field(default_factory=list)
    bars: list[tuple[float, float, float]] = field(default_factory=list)
    dots: bool = False
    first: bool = True


# ---------------------------------------------------------------- curves over steps


def curves(runs: Sequence[Run], stage: str, place: dict[str, int]) -> list[Panel]:
    """A plot for each metric that a run of `stage` has at least two numbers of.

    Args:
        place: reference -> place of a run in the page's list.
    """
    members = [run for run in runs if run.stage == stage]
    names = dict.fromkeys(name for run in members for name in run.curves)
    first = {name: place for place, name in enumerate(FIRST[stage])}
    terms = metrics.terms(names)
    if len(terms) > 1:  # a reward that is a sum
        first |= dict.fromkeys(terms, first["objective/scores"])
    panels: list[Panel] = []
    for name in sorted(names, key=lambda name: (first.get(name, len(first)), metrics.order(name))):
        if name.endswith(ENDS) or name == "episode":
            continue
        with_it = [run for run in members if name in run.curves]
        if not any(np.isfinite(run.curves[name].values).sum() > 1 for run in with_it):
            continue
        metric = metrics.find(name)
        better = {True: "higher is better", False: "lower is better"}
        way = better.get(metric.higher_is_better, "") if metric else ""  # type: ignore[arg-type]
        panels.append(
            Panel(
                key=f"{stage}-{len(panels)}",
                title=name,
                about="; ".join(part for part in (metric.meaning if metric else "", way) if part),
                x_label="step",
                y_label="" if metric is None or metric.unit == "1" else metric.unit,
                series=[_over_steps(run, name, place[run.reference]) for run in with_it],
                first=name in first,
            )
        )
    return panels


def _over_steps(run: Run, name: str, place: int) -> Series:
    curve = run.curves[name]
    low, high = (run.curves.get(name + end) for end in ENDS)
    steps = curve.steps.astype(np.float64)
    if low is None or high is None:
        return Series(place, steps, curve.values)
    ends = [_at(curve.steps, each) for each in (low, high)]
    return Series(place, steps, curve.values, *ends)


def _at(steps: NDArray[np.int64], curve: Curve | None) -> Numbers:
    """The values of `curve` at `steps`, nan where it has none; of several the last."""
    if curve is None or len(curve.steps) == 0:
        return np.full(len(steps), np.nan)
    found = np.searchsorted(curve.steps, steps, side="right") - 1
    there = (found >= 0) & (curve.steps[found] == steps)
    return np.where(there, curve.values[found], np.nan)


# ---------------------------------------------------------------- reward against KL


def against_kl(runs: Sequence[Run], place: dict[str, int]) -> list[Panel]:
    """Score, and gold or a second reward model, against the KL that was paid for them, for all
    PPO runs.

    Held-out points are of overoptimisation.json, else of the evaluations in metrics.jsonl; their
    x is sqrt(KL), in which gold rises and falls as a parabola (Gao et al. 2023, eq. 1).
    """
    members = [run for run in runs if run.stage == "ppo"]
    root = "sqrt(KL to the reference), KL in nats per answer"
    score = Panel("kl-score", "held-out score against KL", "what PPO is paid for", root, "score")
    unseen = {
        GOLD: Panel(
            "kl-gold", "held-out gold against KL", "what PPO never sees", root, "gold score"
        ),
        SECOND: Panel(
            "kl-second",
            "second reward model against KL",
            "it only watches: PPO is not paid for its scores",
            root,
            "its score",
        ),
    }
    train = Panel(
        "kl-train",
        "training score against KL",
        "each update's rollouts: objective/scores against objective/kl",
        "objective/kl, nats per answer",
        "score",
        dots=True,
    )
    for run in members:
        which = place[run.reference]
        measure, points = held_out_points(run)
        for panel, name in ((score, "score"), (unseen[measure], "gold")):
            measured = [p for p in points if getattr(p, name).value is not None]
            if measured:
                panel.series.append(_against_root(measured, name, which))
            if measured and run.over and run.over.knee:
                panel.knees.append((which, math.sqrt(max(0.0, run.over.knee[1]))))
        if {"objective/scores", "objective/kl"} <= run.curves.keys():
            scores, kl = run.curves["objective/scores"], run.curves["objective/kl"]
            steps = scores.steps.astype(np.float64)
            train.series.append(Series(which, _at(scores.steps, kl), scores.values, steps=steps))
    return [panel for panel in (score, *unseen.values(), train) if panel.series]


def held_out_points(run: Run) -> tuple[str, list[Point]]:
    """What measures a PPO run that training never sees, GOLD or SECOND, and the held-out
    evaluations by step; `gold` of a point is that measure."""
    if run.over is not None and run.over.points:
        return SECOND if run.over.measure == SECOND else GOLD, run.over.points
    measure = SECOND if "eval/second" in run.curves and "eval/gold" not in run.curves else GOLD
    kl = run.curves.get("eval/kl")
    if kl is None:
        return measure, []
    score, gold = (
        [_at(kl.steps, run.curves.get(f"eval/{name}{end}")) for end in ("", *ENDS)]
        for name in ("score", "second" if measure == SECOND else "gold")
    )
    return measure, [
        Point(
            int(step),
            float(value),
            Interval(*(number(column[i]) for column in score)),
            Interval(*(number(column[i]) for column in gold)),
        )
        for i, (step, value) in enumerate(zip(kl.steps, kl.values, strict=True))
        if np.isfinite(value)
    ]


def _against_root(points: Sequence[Point], name: str, place: int) -> Series:
    found = [getattr(point, name) for point in points]
    return Series(
        place,
        np.sqrt(np.array([max(0.0, point.kl) for point in points])),
        _numbers(f.value for f in found),
        _numbers(f.low for f in found),
        _numbers(f.high for f in found),
        steps=_numbers(point.step for point in points),
    )


def _numbers(values: Iterable[float | None]) -> Numbers:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


# ---------------------------------------------------------------- a reward model's card


def of_card(card: Card, key: str, place: int) -> list[Panel]:
    """Calibration and margins of a reward model."""
    panels = []
    bins = [b for b in card.bins if b.confidence is not None and b.accuracy is not None]
    if bins:
        confidence = _numbers(b.confidence for b in bins)
        ends = np.array([min(0.5, confidence.min()), 1.0])
        panels.append(
            Panel(
                f"{key}-calibration",
                "calibration",
                "share of pairs that are right, by confidence; the grey line is perfect",
                "confidence, sigmoid(margin)",
                "accuracy",
                [
                    Series(-1, ends, ends),
                    Series(place, confidence, _numbers(b.accuracy for b in bins)),
                ],
            )
        )
    if card.counts and len(card.edges) == len(card.counts) + 1:
        bars = zip(card.edges, card.edges[1:], card.counts, strict=False)
        panels.append(
            Panel(
                f"{key}-margins",
                "margins",
                "chosen minus rejected score; below 0 the pair is wrong",
                "margin, score",
                "pairs",
                bars=[bar for bar in bars if all(map(math.isfinite, bar))],
            )
        )
    return panels


# ---------------------------------------------------------------- packed for the page


def pack(panel: Panel, most: int) -> dict[str, Any]:
    """A panel as JSON, with at most `most` points a line; arrays as base64, little-endian."""
    return {
        "key": panel.key,
        "x": panel.x_label,
        "y": panel.y_label,
        "series": [_pack_series(series, most) for series in panel.series],
        "knees": panel.knees,
        "bars": panel.bars,
        "dots": panel.dots,
    }


def _pack_series(series: Series, most: int) -> dict[str, Any]:
    kept = thin.keep(series.y, most)
    out: dict[str, Any] = {"run": series.run, "x": _packed(series.x[kept])}
    for name in ("y", "low", "high", "steps"):
        values = getattr(series, name)
        if values is not None:
            out[name] = _packed(values[kept], always_real=name == "y")
    return out


def _packed(values: Numbers, *, always_real: bool = False) -> str:
    """One letter for the type (u: uint16, i: int32, f: float32, d: float64) and the bytes."""
    kind = "f"
    finite = np.isfinite(values)
    if not always_real and finite.all() and (values == np.round(values)).all():
        inside = [k for k, t in (("u", np.uint16), ("i", np.int32)) if _fits(values, t)]
        kind = inside[0] if inside else "d"
    elif finite.any() and np.abs(values[finite]).max() > np.finfo(np.float32).max:
        kind = "d"
    types = {"u": "<u2", "i": "<i4", "f": "<f4", "d": "<f8"}
    clean = values if kind in "ui" else np.where(finite, values, np.nan)
    return kind + base64.b64encode(clean.astype(types[kind]).tobytes()).decode()


def _fits(values: Numbers, kind: type[np.integer[Any]]) -> bool:
    limits = np.iinfo(kind)
    return bool(values.min(initial=0) >= limits.min and values.max(initial=0) <= limits.max)
