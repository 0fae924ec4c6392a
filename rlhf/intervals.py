"""Means and shares with their 95 % intervals. The standard library only, so that what looks at
finished runs can use it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.96  # two-sided 95 % of a normal distribution


@dataclass(frozen=True)
class Mean:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} (95 % {self.low:.3f} to {self.high:.3f})"


def mean_of(numbers: Sequence[float]) -> Mean:
    """Mean and 95 % interval of independent numbers (normal approximation, n - 1 in the variance).

    Raises:
        ZeroDivisionError: there are none.
    """
    n = len(numbers)
    mean = sum(numbers) / n
    variance = sum((x - mean) ** 2 for x in numbers) / max(1, n - 1)
    half = Z * math.sqrt(variance / n)
    return Mean(mean, mean - half, mean + half)


def win_rate(challenger: Sequence[float], other: Sequence[float]) -> Mean:
    """Share of prompts on which `challenger` measures higher; a tie counts half."""
    return mean_of(wins(challenger, other))


def wins(challenger: Sequence[float], other: Sequence[float]) -> list[float]:
    """1 where `challenger` measures higher, 0 where `other` does, 0.5 where neither (ties, nan)."""
    pairs = zip(challenger, other, strict=True)
    return [0.5 + 0.5 * (a > b) - 0.5 * (b > a) for a, b in pairs]


def share(outcomes: Sequence[float]) -> Mean:
    """The share of successes, and its 95 % score interval (Wilson 1927).

    Unlike `mean_of` it stays in [0, 1], and is no point where few pairs all came out the same way.
    Outcomes of one half (ties) make it a little too wide.

    Args:
        outcomes: each 0, 1, or 0.5 for a tie.

    Raises:
        ZeroDivisionError: there are none.
    """
    n = len(outcomes)
    p = sum(outcomes) / n
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return Mean(p, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)))
