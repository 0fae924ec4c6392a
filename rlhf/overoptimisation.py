"""When the reward model stops being a guide: held-out score against what it stands for.

A policy that is optimised against a reward model first gets better and then only learns what the
model rewards by mistake (Gao, Schulman and Hilton 2023, "Scaling Laws for Reward Model
Overoptimization", who draw both scores against the square root of KL). To see it one needs a
*measure* that training never sees: a gold score, or a second reward model of another seed or
another half of the data (`evaluation.second_rm`). `Course` follows a run from evaluation to
evaluation, says by name what goes wrong, and marks the knee.
The best step is `ppo.worth`'s to choose.

Differences are of the same prompts answered with the same noise, so their intervals are those of
paired differences.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from rlhf.intervals import Mean, mean_of
from rlhf.state import read_state

FILE = "overoptimisation.json"
SCHEMA = 1
MEMORY = 5  # evaluations that are kept; those but the newest are compared with the next one
PACE = 0.25  # of what a point of score brought of the measure before: less is standing still
SPREADS = 0.25  # a rise of the score that counts, in standard deviations of the SFT answers'
LONGER = 1.5  # times the SFT answers' length
LESS = 0.7  # of the SFT answers' variety or ends
CERTAIN = 0.35  # of the entropy of SFT answers
REPEATED = 0.15  # more of an answer's bigrams than in SFT answers

GOLD, SECOND = "gold", "second reward model"


@dataclass(frozen=True)
class Evaluation:
    """Held-out answers at one step; each list has one number for each prompt.

    Attributes:
        step: of training; 0 for the SFT model.
        kl: nats per answer to the reference, mean over prompts.
        scores: what PPO optimises.
        measure: what it does not: gold, or a second reward model's scores; None without one.
        length: tokens per answer.
        eos_rate: share of answers that ended.
        distinct: distinct bigrams / all bigrams, of all answers together.
        repetition: share of an answer's bigrams that it had before, mean over answers.
        entropy: nats per token.
    """

    step: int
    kl: float
    scores: list[float]
    measure: list[float] | None
    length: float
    eos_rate: float
    distinct: float
    repetition: float
    entropy: float

    def numbers(self) -> dict[str, float | None]:
        """As one point of the report's curves."""
        score = mean_of(self.scores)
        out: dict[str, float | None] = {
            "step": self.step,
            "kl": self.kl,
            "score": score.value,
            "score_low": score.low,
            "score_high": score.high,
        }
        gold = None if self.measure is None else mean_of(self.measure)
        for end, name in (("value", "gold"), ("low", "gold_low"), ("high", "gold_high")):
            out[name] = None if gold is None else getattr(gold, end)
        names = ("length", "eos_rate", "distinct", "repetition", "entropy")
        return out | {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Alarm:
    """Something that goes wrong, at the step where it was first seen."""

    step: int
    name: str
    text: str


@dataclass
class Course:
    """One run's evaluations, in order.

    Attributes:
        measure: what watches: GOLD, SECOND, or None.
        points: `Evaluation.numbers` of each.
        warnings: each name once.
        first: the SFT model's evaluation.
        peak: the one with the most of the measure so far.
        fell: since the peak the score rose and the measure fell.
        plateau: the one since which the score rose and the measure does not; None where it does.
        recent: the last few.
    """

    measure: str | None
    points: list[dict[str, float | None]] = field(default_factory=list)
    warnings: list[Alarm] = field(default_factory=list)
    first: Evaluation | None = None
    peak: Evaluation | None = None
    fell: bool = False
    plateau: Evaluation | None = None
    recent: list[Evaluation] = field(default_factory=list)

    @property
    def knee(self) -> dict[str, float] | None:
        """{"step", "kl"} of the evaluation after which only the score rose; None without one."""
        at = self.peak if self.fell else self.plateau
        return None if at is None else {"step": at.step, "kl": at.kl}

    # ------------------------------------------------------------ while it trains

    def see(self, now: Evaluation) -> list[Alarm]:
        """Add an evaluation; what is wrong for the first time.

        The first one is the SFT model's, which the later ones are compared with.
        """
        self.points.append(now.numbers())
        if self.first is None or self.peak is None:
            self.first = self.peak = now
            self.recent = [now]
            return []
        if now.measure is not None and all(map(math.isfinite, now.measure)):
            self._follow(now, self.first, self.peak)
        self.recent = [*self.recent[1 - MEMORY :], now]
        known = {warning.name for warning in self.warnings}
        found = {name: rule(self, now) for name, rule in RULES.items() if name not in known}
        new = [Alarm(now.step, name, text) for name, text in found.items() if text is not None]
        self.warnings += new
        return new

    def _follow(self, now: Evaluation, first: Evaluation, peak: Evaluation) -> None:
        if _mean(now.measure) > _mean(peak.measure):
            self.peak, self.fell = now, False
        elif _rise(now, peak, first) is not None and _change(now, peak).high < 0:
            self.fell = True
        if self.plateau is not None and _change(now, self.plateau).low <= 0:
            return
        since = [then for then in self.recent[:-1] if _stalled(now, then, first)]
        self.plateau = since[0] if since else None

    # ------------------------------------------------------------ kept, and written

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        read = read_state(Course, state, self)
        for each in fields(Course):
            setattr(self, each.name, getattr(read, each.name))

    def text(self) -> str:
        """`overoptimisation.json`, for the report."""
        shown = {
            "schema": SCHEMA,
            "measure": self.measure,
            "points": self.points,
            "knee": self.knee,
            "warnings": [asdict(warning) for warning in self.warnings],
        }
        return json.dumps(_finite(shown), indent=1, allow_nan=False) + "\n"

    def said(self) -> list[str]:
        """The warnings as lines, for the manifest."""
        return [f"{w.name} (step {w.step}): {w.text}" for w in self.warnings]


# ---------------------------------------------------------------- what goes wrong

Rule = Callable[[Course, Evaluation], str | None]


def _over_optimised(course: Course, now: Evaluation) -> str | None:
    """The score rose since the peak, and the measure fell."""
    if not course.fell or course.peak is None:
        return None
    step, fall = course.peak.step, _change(now, course.peak)
    since = f"step {step}" if step else "the SFT model (step 0)"
    return (
        f"since {since} the held-out score rose by {_gain(now, course.peak):.3g} while "
        f"{course.measure} fell by {-fall.value:.3g} (95 % {-fall.high:.3g} to {-fall.low:.3g}): "
        f"the policy learns what the reward model gets wrong. @best goes by {course.measure}; a "
        "higher ppo.kl_coef, fewer ppo.steps or a better reward model help."
    )


def _without_gain(course: Course, now: Evaluation) -> str | None:
    """The score rises and the measure stands still."""
    if (then := course.plateau) is None:
        return None
    change = _change(now, then)
    return (
        f"since step {then.step} the held-out score rose by {_gain(now, then):.3g} and "
        f"{course.measure} changed by {change.value:+.3g} (95 % {change.low:+.3g} to "
        f"{change.high:+.3g}). Read the samples: stop there, or raise ppo.kl_coef."
    )


def _sign(wrong: Callable[[Evaluation, Evaluation], str | None], *, always: bool = False) -> Rule:
    """Something that is wrong where the measure does not gain by it, or always."""

    def rule(course: Course, now: Evaluation) -> str | None:
        if course.first is None or (text := wrong(course.first, now)) is None:
            return None
        why = _no_gain(course, now)
        if why is None and not always:
            return None
        return f"{text}{f' while {why}' if why else ''}: read the samples."

    return rule


def _no_gain(course: Course, now: Evaluation) -> str | None:
    """What the measure says, where it is no gain over the SFT model; None where it gained."""
    assert course.first is not None
    assert course.peak is not None
    if now.measure is None:
        return (
            "nothing that training does not see watches this run (evaluation.second_rm could be a "
            "reward model of another seed)"
        )
    if course.fell:
        return f"{course.measure} fell since step {course.peak.step}"
    if course.plateau is not None:
        return f"{course.measure} is flat since step {course.plateau.step}"
    change = _change(now, course.first)
    if change.low > 0:
        return None
    return f"{course.measure} {'fell' if change.high < 0 else 'is flat'}"


def _longer(first: Evaluation, now: Evaluation) -> str | None:
    if now.length <= LONGER * first.length:
        return None
    return f"length is up {now.length / first.length - 1:.0%} ({now.length:.1f} tokens)"


def _unending(first: Evaluation, now: Evaluation) -> str | None:
    if now.eos_rate >= LESS * first.eos_rate:
        return None
    return f"{now.eos_rate:.0%} of the answers end ({first.eos_rate:.0%} of the SFT model's)"


def _alike(first: Evaluation, now: Evaluation) -> str | None:
    if now.distinct >= LESS * first.distinct:
        return None
    return f"variety collapses (distinct bigrams {first.distinct:.2f} to {now.distinct:.2f})"


def _repeating(first: Evaluation, now: Evaluation) -> str | None:
    if now.repetition <= first.repetition + REPEATED:
        return None
    return (
        f"answers repeat themselves ({now.repetition:.0%} of an answer's bigrams, "
        f"{first.repetition:.0%} in SFT answers)"
    )


def _certain(first: Evaluation, now: Evaluation) -> str | None:
    if now.entropy >= CERTAIN * first.entropy:
        return None
    return f"entropy fell from {first.entropy:.2f} to {now.entropy:.2f} nats per token"


RULES: dict[str, Rule] = {
    "over-optimised": _over_optimised,
    "score without gain": _without_gain,
    "length": _sign(_longer),
    "ends": _sign(_unending, always=True),  # most measures do not see that an answer was cut off
    "variety": _sign(_alike),
    "repetition": _sign(_repeating),
    "entropy": _sign(_certain),
}

# ---------------------------------------------------------------- numbers


def repetition(answers: Sequence[Sequence[int]]) -> float:
    """Share of an answer's bigrams that it had before, mean over answers with at least one."""
    shares = []
    for ids in answers:
        pairs = list(itertools.pairwise(ids))
        if pairs:
            shares.append(1 - len(set(pairs)) / len(pairs))
    return math.fsum(shares) / len(shares) if shares else 0.0


def distinct(answers: Sequence[Sequence[int]]) -> float:
    """Distinct bigrams / all bigrams of all answers together; 1 without any."""
    pairs = [pair for ids in answers for pair in itertools.pairwise(ids)]
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def _change(now: Evaluation, before: Evaluation) -> Mean:
    """Of the measure, prompt by prompt."""
    assert now.measure is not None
    assert before.measure is not None
    return mean_of([a - b for a, b in zip(now.measure, before.measure, strict=True)])


def _gain(now: Evaluation, before: Evaluation) -> float:
    """Of the mean score."""
    return _mean(now.scores) - _mean(before.scores)


def _rise(now: Evaluation, before: Evaluation, first: Evaluation) -> float | None:
    """Of the score, prompt by prompt; None where it may be noise, or is small."""
    rise = mean_of([a - b for a, b in zip(now.scores, before.scores, strict=True)])
    return rise.value if rise.low > 0 and rise.value > SPREADS * _deviation(first.scores) else None


def _stalled(now: Evaluation, then: Evaluation, first: Evaluation) -> bool:
    """Since `then` the score rose, and the measure did not, or hardly beside what it did before."""
    rise, change = _rise(now, then, first), _change(now, then)
    if rise is None or change.low > 0:
        return False
    before = _gain(then, first)
    pace = _change(then, first).value / before if before > 0 else 0.0
    return pace <= 0 or change.value < PACE * pace * rise


def _mean(numbers: Sequence[float] | None) -> float:
    return math.fsum(numbers) / len(numbers) if numbers else -math.inf


def _deviation(numbers: Sequence[float]) -> float:
    mean = _mean(numbers)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in numbers) / max(1, len(numbers) - 1))


def _finite(value: Any) -> Any:
    """nan and infinities as None, inside lists and dicts."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
