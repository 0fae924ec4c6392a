"""Who wins, by how much, and how sure that is: statistics of paired answers, without torch.

An outcome is 1 where ours wins, 0 where theirs does, 0.5 for a tie. Intervals are paired: prompts
are drawn again with replacement, and both answers to a prompt stay together (Efron & Tibshirani
1993, ch. 13: the percentile interval).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf.intervals import Mean

RESAMPLES = 5000
LEVEL = 0.95
BLOCK = 1_000_000  # numbers in memory at once
PRIOR_STD = 10.0  # of the length coefficient; see benchmarks/length_control.py

Numbers = NDArray[np.float64]


class Interval(Mean):
    """A number and its 95 % interval, by resampling."""

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def bootstrap(statistic: Callable[[Numbers], Numbers], size: int, *, seed: int) -> Interval:
    """`statistic` of all `size` prompts, and its percentile interval over resampled prompts.

    Args:
        statistic: counts [S, n], how often each prompt was drawn, -> [S] numbers. It leaves out
            (nan) a resample that it is not defined for.
        size: n, the prompts.
        seed: of the resampling; the same for whatever is compared.
    """
    value = statistic(np.ones((1, size)))[0]
    drawn = np.concatenate([statistic(counts) for counts in _resampled(size, seed)])
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))


def _resampled(size: int, seed: int) -> Iterator[Numbers]:
    """[s, n] counts, in blocks of bounded size, RESAMPLES in all."""
    generator = np.random.default_rng(seed)
    step = max(1, BLOCK // size)
    for start in range(0, RESAMPLES, step):
        count = min(step, RESAMPLES - start)
        yield generator.multinomial(size, np.full(size, 1 / size), size=count).astype(float)


def mean(values: Sequence[float], *, seed: int) -> Interval:
    """The mean over prompts; of outcomes it is the win rate, in which a tie counts half."""
    numbers = np.asarray(values, dtype=float)
    return bootstrap(lambda counts: counts @ numbers / len(numbers), len(numbers), seed=seed)


def by_category(
    outcomes: Sequence[float], categories: Sequence[str], *, seed: int
) -> list[tuple[str, int, Interval]]:
    """(category, its prompts, its win rate), by name."""
    out = []
    for name in sorted(set(categories)):
        own = [o for o, category in zip(outcomes, categories, strict=True) if category == name]
        out.append((name, len(own), mean(own, seed=seed)))
    return out


def outcome(winner: str) -> float:
    """Of a verdict: "ours", "theirs" or "tie"."""
    return {"ours": 1.0, "theirs": 0.0, "tie": 0.5}[winner]


# ---------------------------------------------------------------- length


def length_controlled(
    outcomes: Sequence[float], differences: Sequence[float], *, seed: int
) -> Interval | None:
    """The win rate that answers of equal length would have (Dubois et al. 2024, sec. 3).

    Their regression without the difficulty of a prompt, which takes many models to estimate:

        P(ours wins) = sigmoid(theta + phi * tanh(d / std(d))),   win rate = sigmoid(theta)

    where d is ours - theirs in length. They regularise; here phi has a N(0, 10^2) prior, which
    changes nothing that a few dozen prompts say, and keeps phi finite where length decides all.

    Args:
        outcomes: 1, 0, or 0.5 for a tie.
        differences: d, in any unit.
        seed: of the interval, see `bootstrap`.

    Returns:
        None where it cannot be told: one side's answers are longer on every prompt. Equal length
        is then outside of what was seen, and tanh is 1 where they are much longer, so that the
        prior would give the plain win rate.
    """
    y, d = np.asarray(outcomes, dtype=float), np.asarray(differences, dtype=float)
    if d.min() > 0 or d.max() < 0:
        return None
    return bootstrap(lambda counts: _at_equal_length(y, d, counts), len(y), seed=seed)


def _at_equal_length(y: Numbers, d: Numbers, counts: Numbers) -> Numbers:
    """sigmoid(theta) [S] for each row of counts [S, n]."""
    total = counts.sum(1, keepdims=True)
    centred = d - counts @ d[:, None] / total  # [S, n]
    spread = np.sqrt((counts * centred**2).sum(1, keepdims=True) / total)
    x = np.tanh(np.divide(d, spread, out=np.zeros_like(counts), where=spread > 0))
    wins = counts @ y / total[:, 0]
    out = np.where(spread[:, 0] > 0, wins, np.nan if d.any() else wins)
    fits = (wins > 0) & (wins < 1) & (spread[:, 0] > 0)  # else theta is at infinity, or phi unknown
    if fits.any():
        theta, _ = fit_logistic(y, x[fits], counts[fits], prior_std=PRIOR_STD)
        out[fits] = sigmoid(theta)
    return out


def fit_logistic(
    y: ArrayLike, x: ArrayLike, weights: ArrayLike, *, prior_std: float
) -> tuple[Numbers, Numbers]:
    """Many weighted regressions of y on x at once, by Newton's method with step halving.

    Maximises sum w [y log p + (1 - y) log(1 - p)] - phi^2 / (2 prior_std^2), p = sigmoid(theta +
    phi x). It has one maximum where the weighted mean of y lies in (0, 1).

    Args:
        y: [n] in [0, 1].
        x, weights: [S, n].

    Returns:
        theta [S], phi [S].
    """
    y, x, w = np.asarray(y, float), np.asarray(x, float), np.asarray(weights, float)
    ridge = prior_std**-2

    def loss(theta: Numbers, phi: Numbers) -> Numbers:
        z = theta[:, None] + phi[:, None] * x
        return (w * (np.logaddexp(0, z) - y * z)).sum(1) + 0.5 * ridge * phi**2

    start = w @ y / w.sum(1)
    theta, phi = np.log(start / (1 - start)), np.zeros(len(x))
    now = loss(theta, phi)
    for _ in range(100):
        p = sigmoid(theta[:, None] + phi[:, None] * x)
        error, v = w * (p - y), w * p * (1 - p)
        g, h = error.sum(1), (error * x).sum(1) + ridge * phi  # gradient
        a, b, c = v.sum(1), (v * x).sum(1), (v * x * x).sum(1) + ridge  # Hessian
        determinant = np.maximum(a * c - b * b, 1e-300)
        steps = (c * g - b * h) / determinant, (a * h - b * g) / determinant
        size = np.ones(len(x))
        for _ in range(30):
            new = theta - size * steps[0], phi - size * steps[1]
            then = loss(*new)
            worse = ~(then <= now + 1e-12 * np.abs(now))
            if not worse.any():
                break
            size[worse] /= 2
        size[worse] = 0
        theta, phi = theta - size * steps[0], phi - size * steps[1]
        now = loss(theta, phi)
        if max(np.abs(size * steps[0]).max(), np.abs(size * steps[1]).max()) < 1e-8:
            break
    return theta, phi


def sigmoid(z: Numbers) -> Numbers:
    """1 / (1 + e^-z), without overflow."""
    return np.exp(-np.logaddexp(0, -z))
