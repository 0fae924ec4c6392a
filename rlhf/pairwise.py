"""Measures of a model of preferences on held-out pairs, from its scores: what it gets right and
where, how sure it is and how rightly, whether length decides. The standard library only.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.intervals import share

LARGEST_SLICES = 10  # sources that are shown by name
MARGIN_BINS = 20


@dataclass(frozen=True)
class Pair:
    """What a reward model said of one held-out pair, and what is known of it without a model.

    Attributes:
        chosen, rejected: scores.
        chosen_length, rejected_length: of the answers, in tokens, end token left out.
        turns: user turns in the prompt.
        source: where the row came from, as the data says.
    """

    chosen: float
    rejected: float
    chosen_length: int
    rejected_length: int
    turns: int = 1
    source: str | None = None

    @property
    def margin(self) -> float:
        """Chosen minus rejected score; 0, a tie, where one of them is no number."""
        margin = self.chosen - self.rejected
        return margin if math.isfinite(margin) else 0.0


@dataclass(frozen=True)
class Slice:
    """Accuracy on a part of the pairs."""

    name: str
    pairs: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bin:
    """Pairs whose confidence lies in (low, high]; means of confidence and of being right."""

    low: float
    high: float
    confidence: float
    accuracy: float
    pairs: int


@dataclass(frozen=True)
class Calibration:
    """Calibration error and Brier score of P(chosen wins) = sigmoid(margin); see `calibration`."""

    ece: float
    ece_by_chance: float
    brier: float
    bins: list[Bin]


@dataclass(frozen=True)
class Margins:
    """Histogram of chosen - rejected; 0 is an edge wherever margins of both signs occur."""

    edges: list[float]
    counts: list[int]


def correct(pairs: Sequence[Pair]) -> list[float]:
    """Per pair: 1 where the chosen answer scores higher, 0.5 at a tie."""
    return [outcome(pair.margin) for pair in pairs]


def prefers_longer(pairs: Sequence[Pair]) -> list[float]:
    """Per pair of different lengths: 1 where the longer answer scores higher, 0.5 at a tie."""
    found = [(pair.chosen_length > pair.rejected_length, pair.margin) for pair in uneven(pairs)]
    return [outcome(margin if longer else -margin) for longer, margin in found]


def uneven(pairs: Sequence[Pair]) -> list[Pair]:
    """Those whose answers differ in length."""
    return [pair for pair in pairs if pair.chosen_length != pair.rejected_length]


def outcome(margin: float) -> float:
    return 0.5 if margin == 0 else float(margin > 0)


def confidence(margin: float) -> float:
    """sigmoid(|margin|): the probability that a reward model gives to what it prefers."""
    return 1 / (1 + math.exp(-abs(margin)))


def calibration(margins: Sequence[float], *, bins: int) -> Calibration:
    """Expected calibration error (Guo et al. 2017, eq. 3) and Brier score (Brier 1950) of a model
    of pairs, P(chosen wins) = sigmoid(margin).

    "Chosen" is a label and not an input, so the event must not depend on it: were it "chosen wins",
    it would always happen. Each pair is therefore read from the side of the answer that the model
    prefers: confidence sigmoid(|margin|), in [0.5, 1], and right where that answer is the chosen
    one; a tie has confidence 0.5 and is half right. Counting each pair in both orders, with
    confidences p and 1 - p, gives the same error. The Brier score is the same from every side,
    (1 - sigmoid(margin))^2; 0.25 is that of a model that knows nothing.

    The error of few pairs is above 0 by chance. `ece_by_chance` is its expectation for a calibrated
    model with these confidences: the sum over bins of pairs / n * sqrt(2 c (1 - c) / (pi * pairs)),
    the mean absolute deviation of a normal distribution (c: mean confidence of the bin).

    Args:
        margins: chosen - rejected.
        bins: of equal width in (0.5, 1]; empty ones are left out.
    """
    n = len(margins)
    members: dict[int, list[float]] = defaultdict(list)
    for margin in margins:
        place = math.ceil((confidence(margin) - 0.5) * 2 * bins) - 1
        members[min(max(place, 0), bins - 1)].append(margin)
    made, ece, chance = [], 0.0, 0.0
    for place, inside in sorted(members.items()):
        sure = sum(confidence(margin) for margin in inside) / len(inside)
        right = sum(outcome(margin) for margin in inside) / len(inside)
        low, high = (0.5 + 0.5 * edge / bins for edge in (place, place + 1))
        made.append(Bin(low, high, sure, right, len(inside)))
        ece += len(inside) / n * abs(sure - right)
        chance += len(inside) / n * math.sqrt(2 * sure * (1 - sure) / (math.pi * len(inside)))
    lost = [1 - confidence(m) if m >= 0 else confidence(m) for m in margins]
    return Calibration(ece, chance, sum(p * p for p in lost) / n, made)


def histogram(margins: Sequence[float]) -> Margins:
    """Counts of margins in about 20 bins of equal width, one of whose edges is 0."""
    low, high = min(margins), max(margins)
    alike = high - low <= 1e-9 * max(abs(high), abs(low), 1.0)  # too narrow for edges between
    width = 1.0 if alike else (high - low) / MARGIN_BINS
    first, last = math.floor(low / width), math.floor(high / width) + 1
    counts = [0] * (last - first)
    for margin in margins:
        counts[min(math.floor(margin / width) - first, len(counts) - 1)] += 1
    return Margins([width * place for place in range(first, last + 1)], counts)


def slices(pairs: Sequence[Pair]) -> dict[str, list[Slice]]:
    """Accuracy by length, by source (where rows name one) and by number of user turns."""
    sources = [pair.source for pair in pairs if pair.source is not None]
    common = sorted(set(sources), key=lambda name: (-sources.count(name), name))[:LARGEST_SLICES]
    kinds = [*(name for name, _ in LENGTHS), LONGEST]
    turns = [f"{n} turn{'s' * (n > 1)}" for n in range(1, 5)] + ["5 turns or more"]
    return {
        "length": _slices(pairs, [_length_slice(pair) for pair in pairs], kinds),
        "source": _slices(
            pairs,
            [p.source if p.source in common else p.source and "(other)" for p in pairs],
            [*common, "(other)"],
        ),
        "turns": _slices(pairs, [turns[min(p.turns, 5) - 1] for p in pairs], turns),
    }


LENGTHS = (  # the chosen answer's length over the rejected one's is below this
    ("chosen less than half as long", 0.5),
    ("chosen shorter", 1.0),
    ("same length", math.nextafter(1.0, 2.0)),
    ("chosen longer", math.nextafter(2.0, 3.0)),
)
LONGEST = "chosen more than twice as long"


def _length_slice(pair: Pair) -> str:
    ratio = pair.chosen_length / max(pair.rejected_length, 1)
    return next((name for name, below in LENGTHS if ratio < below), LONGEST)


def _slices(
    pairs: Sequence[Pair], names: Sequence[str | None], order: Sequence[str]
) -> list[Slice]:
    right = correct(pairs)
    out = []
    for name in order:
        inside = [r for r, own in zip(right, names, strict=True) if own == name]
        if inside:
            out.append(Slice(name, len(inside), **dataclasses.asdict(share(inside))))
    return out
