"""The report card of a reward model: what it gets right on held-out pairs, what it may go by
instead, and whether PPO should trust it.

`pairwise.py` has the measures and `probes.py` asks the model. No torch, so that commands can read a
card. Thresholds are the constants below; docs/cards.md says how to read the numbers.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import RegistryError
from rlhf.intervals import Mean, Z, mean_of, share, wins
from rlhf.manifest import CARD, VERDICTS, CardFacts, read_typed
from rlhf.pairwise import (
    Calibration,
    Margins,
    Pair,
    Slice,
    calibration,
    correct,
    histogram,
    outcome,
    prefers_longer,
    slices,
)

SCHEMA = 1
GO, CAUTION, NO_GO = VERDICTS

LENGTH_RULE = 0.95  # no-go: it prefers the longer (or the shorter) answer in this share of pairs
UNEVEN_PAIRS = 30  # of different lengths; fewer show no such rule
ECE_BEYOND_CHANCE = 0.05  # caution: calibration error above that of a calibrated model
SLICE_PAIRS = 30  # that fewer pairs do not lie above chance is no caution


@dataclass(frozen=True)
class Probe:
    """The share of pairs whose chosen answer scores above a worse one made from it."""

    name: str
    what: str
    pairs: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement:
    """The share of pairs in which another reward model prefers the same answer."""

    reference: str
    pairs: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Card:
    """What card.json holds.

    Attributes:
        split: of the pairs; where it is validation, the best checkpoint was chosen on them.
        baselines: "longer": the longer answer wins; "random": what chance gives on so many pairs;
            "prompt_removed": this model, shown the answers under an empty prompt.
        prefers_longer: share of the pairs of different lengths whose longer answer scores higher.
        prompt_gain: accuracy with the prompt less accuracy without it, pair by pair.
    """

    schema: int
    split: str
    pairs: int
    verdict: str
    reasons: list[str]
    accuracy: Mean
    baselines: dict[str, Mean]
    prefers_longer: Mean | None
    prompt_gain: Mean | None
    slices: dict[str, list[Slice]]
    calibration: Calibration
    margins: Margins
    probes: list[Probe]
    agreement: list[Agreement]

    @property
    def metrics(self) -> dict[str, float]:
        """eval/ece and eval/brier."""
        return {"eval/ece": self.calibration.ece, "eval/brier": self.calibration.brier}

    @property
    def facts(self) -> CardFacts:
        """What the manifest carries."""
        return CardFacts(self.verdict, self.reasons)

    def write(self, folder: Path) -> None:
        """card.json in a run's folder."""
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False, allow_nan=False)
        (folder / CARD).write_text(text + "\n", encoding="utf-8")


def read(folder: Path) -> Card | None:
    """The card in a run's folder; None where there is none.

    Raises:
        RegistryError: it is not one.
    """
    path = folder / CARD
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RegistryError(f"{path}: cannot be read: {error}") from error
    if not isinstance(fields, dict) or fields.get("schema") != SCHEMA:
        raise RegistryError(
            f"{path}: this version of rlhf reads cards of schema {SCHEMA}, and this is none. "
            "Install the version that wrote it."
        )
    made: Card = read_typed(Card, fields, str(path))
    return made


def make(
    pairs: Sequence[Pair],
    *,
    split: str,
    removed: Sequence[Pair] | None = None,
    probes: Iterable[Probe] = (),
    agreement: Iterable[Agreement] = (),
    bins: int = 10,
) -> Card:
    """The card of a reward model.

    Args:
        pairs: of the held-out split, with its scores.
        removed: the same pairs, scored under an empty prompt; None: not measured.
        bins: of the calibration curve.
    """
    right = correct(pairs)
    lengths = [(pair.chosen_length, pair.rejected_length) for pair in pairs]
    baselines = {
        "longer": share([outcome(c - r) for c, r in lengths]),
        "random": Mean(0.5, *_around_half(len(pairs))),
    }
    gain = None
    if removed is not None:
        without = correct(removed)
        baselines["prompt_removed"] = share(without)
        gain = mean_of([a - b for a, b in zip(right, without, strict=True)])
    longer = prefers_longer(pairs)
    card = Card(
        schema=SCHEMA,
        split=split,
        pairs=len(pairs),
        verdict=GO,
        reasons=[],
        accuracy=share(right),
        baselines=baselines,
        prefers_longer=share(longer) if longer else None,
        prompt_gain=gain,
        slices=slices(pairs),
        calibration=calibration([pair.margin for pair in pairs], bins=bins),
        margins=histogram([pair.margin for pair in pairs]),
        probes=list(probes),
        agreement=list(agreement),
    )
    lost = sum(not math.isfinite(pair.chosen - pair.rejected) for pair in pairs)
    verdict, reasons = judge(card, lost=lost, uneven=len(longer))
    return dataclasses.replace(card, verdict=verdict, reasons=reasons)


# ---------------------------------------------------------------- parts


def probe(name: str, what: str, chosen: Sequence[float], worse: Sequence[float]) -> Probe:
    """How often the chosen answers score above worse ones; a tie counts half."""
    measured = share(wins(chosen, worse))
    return Probe(name, what, len(chosen), **dataclasses.asdict(measured))


def agree(reference: str, ours: Sequence[Pair], theirs: Sequence[Pair]) -> Agreement:
    """How often two reward models prefer the same answer; a tie of one of them counts half."""
    sides = list(zip(correct(ours), correct(theirs), strict=True))
    measured = share([0.5 if 0.5 in side else float(side[0] == side[1]) for side in sides])
    return Agreement(reference, len(sides), **dataclasses.asdict(measured))


def _around_half(n: int) -> tuple[float, float]:
    """Where 95 % of accuracies of guesses on n pairs lie."""
    half = Z * math.sqrt(0.25 / n)
    return max(0.0, 0.5 - half), min(1.0, 0.5 + half)


# ---------------------------------------------------------------- verdict


def judge(card: Card, *, lost: int, uneven: int) -> tuple[str, list[str]]:
    """The verdict on the measures of a card, and its reasons, those of a no-go first.

    Args:
        lost: pairs with a score that is no number.
        uneven: pairs whose answers differ in length.
    """
    bad = _no_go(card, uneven)
    if lost:
        bad.insert(0, f"{lost} of {card.pairs} pairs have a score that is no number")
    doubts = _caution(card)
    return (NO_GO if bad else CAUTION if doubts else GO), bad + doubts


def _no_go(card: Card, uneven: int) -> list[str]:
    reasons = []
    longer = card.baselines["longer"].value
    rule, named = max((longer, '"the longer one wins"'), (1 - longer, '"the shorter one wins"'))
    if card.accuracy.low <= rule:
        against = f"{rule:.3f}, what {named} gets" if rule > 0.5 else "0.5, chance"
        reasons.append(
            f"accuracy {card.accuracy} on {card.pairs} {card.split} pairs does not lie above "
            f"{against}"
        )
    if card.prefers_longer is not None and uneven >= UNEVEN_PAIRS:
        for word, often in (
            ("longer", card.prefers_longer.value),
            ("shorter", 1 - card.prefers_longer.value),
        ):
            if often >= LENGTH_RULE:
                of = f"{often:.3f} of {uneven} pairs of different lengths"
                reasons.append(f"it prefers the {word} answer in {of}")
    return reasons


def _caution(card: Card) -> list[str]:
    reasons = []
    curve = card.calibration
    if curve.ece - curve.ece_by_chance > ECE_BEYOND_CHANCE:
        sure = sum(b.pairs * (b.confidence - b.accuracy) for b in curve.bins) > 0
        how = "too sure of itself" if sure else "right more often than it is sure"
        reasons.append(
            f"calibration error {curve.ece:.3f} ({curve.ece_by_chance:.3f} by chance): it is {how}"
        )
    if card.prompt_gain is not None and card.prompt_gain.low <= 0:
        without = card.baselines["prompt_removed"].value
        reasons.append(
            f"accuracy without the prompt is {without:.3f}, with it {card.accuracy.value:.3f}: "
            "that it looks at the prompt does not show"
        )
    for probe in card.probes:
        if probe.low <= 0.5:
            of = f"{probe.value:.3f} of {probe.pairs} pairs"
            reasons.append(
                f"probe {probe.name}: the chosen answer scores above {probe.what} in only {of}"
            )
    for name, parts in card.slices.items():
        for part in parts if len(parts) > 1 else ():
            wrong = part.high < 0.5
            if wrong or (part.pairs >= SLICE_PAIRS and part.low <= 0.5):
                how = "wrong more often than right" if wrong else "no better than chance"
                of = f"accuracy {part.value:.3f} on {part.pairs} pairs"
                reasons.append(f"{how} by {name}, {part.name}: {of}")
    return reasons


# ---------------------------------------------------------------- in words


def summary(card: Card | None) -> list[tuple[str, str]]:
    """Rows for the closing table of the reward model's stage; none without a card."""
    if card is None:
        return []
    rows = []
    if "prompt_removed" in card.baselines:
        rows.append(
            ("accuracy without the prompt", f"{card.baselines['prompt_removed'].value:.3f}")
        )
    curve = card.calibration
    rows.append(("calibration error", f"{curve.ece:.3f} ({curve.ece_by_chance:.3f} by chance)"))
    if card.probes:
        worst = min(card.probes, key=lambda probe: probe.low)
        rows.append(
            ("weakest probe", f"{worst.name}: chosen above it in {worst.value:.3f} of pairs")
        )
    rows += [(f"agreement with {a.reference}", f"{a.value:.3f}") for a in card.agreement]
    return [*rows, ("verdict", "\n".join([card.verdict, *(f"- {why}" for why in card.reasons)]))]


def table(card: Card) -> list[tuple[str, str, str, str]]:
    """(measure, pairs, value, 95 % interval) for `rlhf show`."""

    def row(name: str, pairs: int, measured: Any) -> tuple[str, str, str, str]:
        interval = f"{measured.low:.3f} to {measured.high:.3f}"
        return name, str(pairs), f"{measured.value:.3f}", interval

    rows = [row(f"accuracy ({card.split})", card.pairs, card.accuracy)]
    rows += [row(f"baseline {name}", card.pairs, one) for name, one in card.baselines.items()]
    for name, parts in card.slices.items():
        rows += [row(f"{name}: {part.name}", part.pairs, part) for part in parts]
    rows += [row(f"chosen above probe {one.name}", one.pairs, one) for one in card.probes]
    rows += [row(f"agrees with {one.reference}", one.pairs, one) for one in card.agreement]
    curve = card.calibration
    chance = f"{curve.ece_by_chance:.3f} by chance"
    rows.append(("calibration error", str(card.pairs), f"{curve.ece:.3f}", chance))
    rows.append(("Brier score", str(card.pairs), f"{curve.brier:.3f}", "0.250 knows nothing"))
    return rows
