"""Statistics of paired answers: against slow definitions, planted truths and invariances."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import numpy as np
import pytest

from rlhf import versus


@pytest.fixture
def few(monkeypatch):
    """Fewer resamples, for tests that take many intervals or many prompts."""
    monkeypatch.setattr(versus, "RESAMPLES", 400)


def test_all_ties_are_half_exactly_and_without_width():
    assert versus.mean([0.5] * 37, seed=3) == versus.Interval(0.5, 0.5, 0.5)
    assert versus.length_controlled([0.5] * 37, [0] * 37, seed=3) == versus.Interval(0.5, 0.5, 0.5)


def test_the_interval_is_that_of_a_slow_bootstrap():
    rng = random.Random(0)
    values = [rng.choice([0, 0.5, 1, 1]) for _ in range(60)]
    drawn = sorted(sum(rng.choices(values, k=60)) / 60 for _ in range(20000))
    found = versus.mean(values, seed=1)
    assert found.value == sum(values) / 60
    # The standard error is about 0.05; percentiles of 5000 resamples are good to about 0.003.
    assert found.low == pytest.approx(drawn[500], abs=0.01)
    assert found.high == pytest.approx(drawn[19500], abs=0.01)


def test_the_seed_makes_the_interval():
    values = [random.Random(n).gauss(0, 1) for n in range(50)]
    assert versus.mean(values, seed=1) == versus.mean(values, seed=1)
    assert versus.mean(values, seed=1) != versus.mean(values, seed=2)


def test_the_interval_does_not_depend_on_the_size_of_a_block(monkeypatch):
    values = [random.Random(n).random() for n in range(40)]
    whole = versus.mean(values, seed=0)
    monkeypatch.setattr(versus, "BLOCK", 1000)
    assert versus.mean(values, seed=0).low == pytest.approx(whole.low, rel=1e-12)


def test_coverage_of_the_interval(few):
    """Of 400 experiments with a true win rate of 0.65, about 95 % of the intervals hold it."""
    rng = np.random.default_rng(7)
    inside = 0
    for trial in range(400):
        wins = rng.choice([1.0, 0.5, 0.0], p=[0.6, 0.1, 0.3], size=120)
        found = versus.mean(list(wins), seed=trial)
        inside += found.low <= 0.65 <= found.high
    assert 0.92 <= inside / 400 <= 0.98  # 3 standard errors are 0.033


def test_categories_are_means_of_their_own_rows():
    found = versus.by_category([1, 0, 0.5, 1], ["b", "a", "b", "b"], seed=0)
    assert [(name, size, part.value) for name, size, part in found] == [
        ("a", 1, 0.0),
        ("b", 3, pytest.approx(2.5 / 3)),
    ]


# length ------------------------------------------------------------------------------------------


def slow_fit(y, x, prior_std=math.inf):
    """The maximum by golden-section search in theta within golden-section search in phi."""

    def loss(theta, phi):
        total = 0.5 * (phi / prior_std) ** 2
        for one, at in zip(y, x, strict=True):
            z = theta + phi * at
            total += math.log1p(math.exp(-abs(z))) + max(z, 0) - one * z
        return total

    def minimum(function, low, high):
        ratio = (math.sqrt(5) - 1) / 2
        while high - low > 1e-9:
            a, b = high - ratio * (high - low), low + ratio * (high - low)
            low, high = (low, b) if function(a) < function(b) else (a, high)
        return (low + high) / 2

    def best_theta(phi):
        return minimum(lambda theta: loss(theta, phi), -40, 40)

    phi = minimum(lambda phi: loss(best_theta(phi), phi), -60, 60)
    return best_theta(phi), phi


def made_up(n, theta, phi, seed=0, mean=20.0, std=30.0):
    """Outcomes with ties, and length differences, from the model with these coefficients."""
    rng = np.random.default_rng(seed)
    d = np.round(rng.normal(mean, std, n))
    chance = 1 / (1 + np.exp(-(theta + phi * np.tanh(d / d.std()))))
    y = (rng.random(n) < chance).astype(float)
    y[rng.random(n) < 0.05] = 0.5
    return y, d


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_fit_is_the_slow_one(seed):
    y, d = made_up(40, theta=0.4, phi=1.2, seed=seed)
    x = np.tanh(d / d.std())
    theta, phi = versus.fit_logistic(y, x[None], np.ones((1, 40)), prior_std=10.0)
    assert (theta[0], phi[0]) == pytest.approx(slow_fit(y, x, prior_std=10.0), abs=1e-4)
    # The prior moves the win rate at equal length by less than a thousandth of plain likelihood's.
    plain, _ = slow_fit(y, x)
    assert versus.sigmoid(theta)[0] == pytest.approx(1 / (1 + math.exp(-plain)), abs=5e-3)


def test_a_fit_with_counts_is_one_of_repeated_rows():
    y, d = made_up(30, theta=-0.3, phi=0.8)
    x = np.tanh(d / d.std())
    counts = np.random.default_rng(1).integers(0, 4, 30)
    one = versus.fit_logistic(y, x[None], counts[None], prior_std=10.0)
    rows = np.repeat(np.arange(30), counts)
    other = versus.fit_logistic(y[rows], x[rows][None], np.ones((1, len(rows))), prior_std=10.0)
    assert one[0] == pytest.approx(other[0], abs=1e-9)
    assert one[1] == pytest.approx(other[1], abs=1e-9)


def test_a_planted_length_bias_is_taken_out(few):
    """Answers are equally good, ours are longer, and the judge likes length."""
    y, d = made_up(4000, theta=0.0, phi=2.0, mean=30.0)
    assert versus.mean(list(y), seed=0).low > 0.65
    found = versus.length_controlled(list(y), list(d), seed=0)
    assert found.value == pytest.approx(0.5, abs=0.04)
    assert found.low < 0.5 < found.high


def test_a_planted_preference_stays(few):
    """Ours are better, and shorter, which hides it."""
    y, d = made_up(4000, theta=1.0, phi=2.0, mean=-30.0)
    assert versus.mean(list(y), seed=0).value < 0.5
    found = versus.length_controlled(list(y), list(d), seed=0)
    assert found.value == pytest.approx(1 / (1 + math.exp(-1.0)), abs=0.04)
    assert found.low < 1 / (1 + math.exp(-1.0)) < found.high


def test_where_length_tells_nothing_control_changes_little(few):
    y, d = made_up(4000, theta=0.5, phi=0.0, mean=0.0)
    plain, found = versus.mean(list(y), seed=0), versus.length_controlled(list(y), list(d), seed=0)
    assert found.value == pytest.approx(plain.value, abs=0.005)


def test_swapping_sides_swaps_the_rate():
    y, d = made_up(80, theta=0.7, phi=1.0)
    ours = versus.length_controlled(list(y), list(d), seed=0)
    theirs = versus.length_controlled(list(1 - y), list(-d), seed=0)
    assert ours.value + theirs.value == pytest.approx(1, abs=1e-9)
    assert ours.low + theirs.high == pytest.approx(1, abs=1e-6)


def test_the_unit_of_length_does_not_matter():
    y, d = made_up(80, theta=0.7, phi=1.0)
    one = versus.length_controlled(list(y), list(d), seed=0)
    assert versus.length_controlled(list(y), list(d * 4.5), seed=0).value == pytest.approx(
        one.value, abs=1e-9
    )


@pytest.mark.parametrize("winner", [0.0, 1.0])
def test_one_side_wins_everything(winner):
    assert versus.length_controlled([winner] * 9, list(range(9)), seed=0) == versus.Interval(
        winner, winner, winner
    )


def test_where_the_longer_one_always_wins_nothing_is_infinite():
    d = [-9.0, -5, -3, -1, 1, 4, 6, 9]
    found = versus.length_controlled([float(one > 0) for one in d], d, seed=0)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.value == pytest.approx(0.5, abs=0.15)
    x = np.tanh(np.array(d) / np.std(d))
    slow, _ = slow_fit([float(one > 0) for one in d], x, prior_std=10.0)
    assert found.value == pytest.approx(1 / (1 + math.exp(-slow)), abs=1e-4)


def test_where_one_side_is_longer_on_every_prompt_length_cannot_be_controlled_for():
    """A judge that likes length alone: the truth is 0.5, the plain win rate about 0.88."""
    y, d = made_up(200, theta=0.0, phi=2.0, mean=300.0)
    assert np.mean(y) > 0.8
    assert versus.length_controlled(list(y), list(d), seed=0) is None
    assert versus.length_controlled(list(1 - y), list(-d), seed=0) is None
    assert versus.length_controlled([1, 0, 1], [4, 4, 4], seed=0) is None
    assert versus.length_controlled([1, 0, 1], [4, 4, 0], seed=0) is not None
    assert versus.length_controlled([1, 0, 1], [0, 0, 0], seed=0).value == pytest.approx(2 / 3)


def test_one_prompt():
    assert versus.mean([1.0], seed=0) == versus.Interval(1.0, 1.0, 1.0)


def test_no_torch():
    code = "import sys, rlhf.versus; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=900).returncode == 0
