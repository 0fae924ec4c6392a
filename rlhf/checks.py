"""Checks that settings share: each names the setting, its value, and why it cannot work."""

from __future__ import annotations

import math

from rlhf.errors import ConfigError


def above(name: str, value: float, low: float, why: str) -> None:
    """Refuse what is not a number above `low`."""
    if not low < value < math.inf:  # not a number is refused too
        raise ConfigError(f"{name}={value}: must be a number above {low:g}. {why}")


def between(name: str, value: float, low: float, high: float, why: str) -> None:
    """Refuse what is not a number in [low, high]."""
    if not low <= value <= high or math.isinf(value):
        raise ConfigError(f"{name}={value}: must lie in [{low:g}, {high:g}]. {why}")


def one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse what is none of `choices`."""
    if value not in choices:
        listed = ", ".join(str(choice) for choice in choices)
        raise ConfigError(f"{name}={value}: no such choice. Choose one of: {listed}.")
