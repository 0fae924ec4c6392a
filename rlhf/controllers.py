"""KL-coefficient controllers: `kl_coef` from one PPO step to the next. No torch.

Both kinds have `.coef`, and `.update(kl, episodes)` after every step. Every process must give
`update` the same numbers, those of all processes together, or their coefficients part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rlhf.errors import ConfigError, StoppedByGuard
from rlhf.state import read_state


@dataclass
class _State:
    """The one number that moves; target and horizon are settings."""

    coef: float


class FixedKL:
    """The coefficient that was set, at every step."""

    def __init__(self, coef: float) -> None:
        if not coef >= 0:
            raise ConfigError(f"ppo.kl_coef={coef}: must be 0 or more; it is a price on leaving.")
        self.coef = float(coef)

    def update(self, kl: float, episodes: int) -> None:
        """Changes nothing."""

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.coef = read_state(_State, state, self).coef


class AdaptiveKL:
    """Steers the KL to a target (Ziegler et al. 2019, section 2.2).

        e    = clip((kl - target) / target, -0.2, 0.2)
        coef = coef * (1 + e * episodes / horizon)

    The paper writes K_beta = 0.1 for episodes / horizon; its code has it as here, so that the pace
    is per episode and does not change with the batch size (K_beta is 0.1 for batches of 1000 at
    the code's horizon of 10000). The factor of a step is at most 1 +- 0.2 * episodes / horizon.

    Args:
        coef: where it starts, above 0 (times anything, 0 stays 0); score per nat.
        target: KL(policy, reference) of a whole response, in nats: `objective/kl`, not per token.
        horizon: in episodes (responses); 10000 in the paper's code.

    Raises:
        ConfigError: one of them is not above 0.
    """

    def __init__(self, coef: float, target: float, horizon: float) -> None:
        for name, number in (("ppo.kl_coef", coef), ("target", target), ("horizon", horizon)):
            if not number > 0:
                raise ConfigError(f"adaptive KL: {name}={number} must be above 0.")
        self.coef, self.target, self.horizon = float(coef), float(target), float(horizon)

    def update(self, kl: float, episodes: int) -> None:
        """After a step: dearer if the KL was above the target, cheaper if below.

        Args:
            kl: mean over the step's responses of a response's KL, in nats.
            episodes: how many responses that were, over all processes.

        Raises:
            StoppedByGuard: kl is nan or inf.
            ConfigError: the horizon is so short that the coefficient could reach 0.
        """
        if not math.isfinite(kl):
            raise StoppedByGuard(
                f"objective/kl is {kl}: no coefficient follows from it. The policy diverged: lower "
                "ppo.learning_rate, or raise ppo.kl_coef."
            )
        if 0.2 * episodes >= self.horizon:
            raise ConfigError(
                f"adaptive KL: horizon={self.horizon:g} is too short for {episodes} responses per "
                "step: the coefficient could fall to 0 or below and stay there. Take at least "
                f"{episodes}, one step; 10000 is the usual choice."
            )
        error = min(max((kl - self.target) / self.target, -0.2), 0.2)
        self.coef *= 1 + error * episodes / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.coef = read_state(_State, state, self).coef
