"""Means, shares and their intervals: pure, without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % interval (normal approximation, n - 1 in the variance)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} (95 % {self.low:.3f} to {self.high:.3f})"


def mean_of(numbers: Sequence[float]) -> Mean:
    """Mean and 95 % interval of independent numbers."""
    n = len(numbers)
    mean = sum(numbers) / n
    variance = sum((x - mean) ** 2 for x in numbers) / max(1, n - 1)
    half = 1.96 * math.sqrt(variance / n)
    return Mean(mean, mean - half, mean + half)


def win_rate(challenger: Sequence[float], other: Sequence[float]) -> Mean:
    """Share of prompts on which `challenger` measures higher; a tie counts half."""
    pairs = zip(challenger, other, strict=True)
    return mean_of([0.5 if a == b else float(a > b) for a, b in pairs])
