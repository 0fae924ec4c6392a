"""The price of KL from step to step: by hand, towards a target, through a checkpoint."""

import json
import math

import pytest

from rlhf.controllers import AdaptiveKL, FixedKL
from rlhf.errors import ConfigError, StoppedByGuard


def test_a_fixed_coefficient_stays():
    controller = FixedKL(0.05)
    for kl in (0.0, 100.0, math.inf, math.nan):
        controller.update(kl, 512)
    assert controller.coef == 0.05
    assert FixedKL(0).coef == 0.0


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),  # on target
        (6.6, 1 + 0.1 * 0.05),  # a tenth above: e = 0.1; 500 of 10000 episodes
        (5.4, 1 - 0.1 * 0.05),
        (60.0, 1 + 0.2 * 0.05),  # e is clipped at 0.2, either way
        (0.0, 1 - 0.2 * 0.05),
        (-3.0, 1 - 0.2 * 0.05),  # an estimate from samples may be negative
    ],
)
def test_adaptive_by_hand(kl, factor):
    controller = AdaptiveKL(0.2, target=6.0, horizon=10000)
    controller.update(kl, 500)
    assert controller.coef == pytest.approx(0.2 * factor, rel=1e-12)


def test_the_papers_k_beta_is_episodes_over_horizon():
    # Ziegler 2019: beta * (1 + 0.1 * e), e = clip((9 - 6) / 6, -0.2, 0.2) = 0.2
    controller = AdaptiveKL(1.0, target=6.0, horizon=10000)
    controller.update(9.0, 1000)
    assert controller.coef == pytest.approx(1 + 0.1 * 0.2, rel=1e-12)


def test_two_steps_multiply():
    controller = AdaptiveKL(0.1, target=10.0, horizon=100)
    controller.update(11.0, 10)  # * 1.01
    controller.update(8.5, 20)  # e = -0.15: * 0.97
    assert controller.coef == pytest.approx(0.1 * 1.01 * 0.97, rel=1e-12)


def test_the_coefficient_is_steered_to_the_target():
    # a policy whose KL falls as its price rises, KL = 1 / coef, is led to KL = target
    for start in (0.001, 10.0):
        controller = AdaptiveKL(start, target=5.0, horizon=1000)
        for _ in range(1000):
            controller.update(1 / controller.coef, 100)
        assert 1 / controller.coef == pytest.approx(5.0, rel=1e-3)


@pytest.mark.parametrize("make", [lambda: FixedKL(0.3), lambda: AdaptiveKL(0.3, 6.0, 1000)])
def test_a_resumed_run_goes_on_where_it_stopped(make):
    unbroken, stopped = make(), make()
    for controller in (unbroken, stopped):
        controller.update(7.1, 64)
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert resumed.coef == stopped.coef
    for controller in (unbroken, resumed):
        controller.update(3.3, 64)
    assert resumed.coef == unbroken.coef


def test_loading_takes_the_coefficient_of_the_state():
    for controller in (FixedKL(0.3), AdaptiveKL(0.3, 6.0, 1000)):
        controller.load_state_dict({"coef": 0.7})
        assert controller.coef == 0.7
        assert controller.state_dict() == {"coef": 0.7}


@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
def test_a_kl_that_is_no_number_stops_the_run(kl):
    controller = AdaptiveKL(0.1, 6.0, 1000)
    with pytest.raises(StoppedByGuard, match=rf"objective/kl is {kl}"):
        controller.update(kl, 64)
    assert controller.coef == 0.1


def test_what_cannot_work_is_refused():
    for coef in (-0.1, math.nan):
        with pytest.raises(ConfigError, match=rf"kl_coef={coef}"):
            FixedKL(coef)
    with pytest.raises(ConfigError, match=r"kl_coef=0\.0 must be above 0"):
        AdaptiveKL(0.0, 6.0, 1000)
    for target in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match=rf"target={target} must be above 0"):
            AdaptiveKL(0.1, target, 1000)
    with pytest.raises(ConfigError, match=r"horizon=0 must be above 0"):
        AdaptiveKL(0.1, 6.0, 0)


def test_a_horizon_that_could_end_the_penalty_is_refused():
    controller = AdaptiveKL(0.1, 6.0, 100)
    controller.update(0.0, 499)
    assert controller.coef == pytest.approx(0.1 * (1 - 0.998))
    with pytest.raises(ConfigError, match=r"horizon=100 is too short for 500 responses"):
        controller.update(0.0, 500)
