"""How often the interval of the win rate at equal length holds the truth, in simulations.

python benchmarks/length_control.py

Two judges: one sees length alone, and the truth is 0.5; one has a length bias of ordinary size
(phi = 2) beside a preference (theta = 0.5), and the truth is 0.622. Differences in length are
normal, ours longer by 0.3 or 1 standard deviation on average. 60 experiments each, 300 resamples,
for three priors of phi: `versus.PRIOR_STD` is 10, since with narrower ones much of a strong bias
stays, and the interval misses the truth more often.
"""

from __future__ import annotations

import numpy as np

from rlhf import versus

EXPERIMENTS = 60
TRUTH = 1 / (1 + np.exp(-0.5))


def length_alone(d: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The longer answer wins."""
    return (np.sign(d) + 1) / 2


def biased(d: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The model that is fitted, with theta = 0.5 and phi = 2."""
    chance = 1 / (1 + np.exp(-(0.5 + 2 * np.tanh(d / d.std()))))
    return (rng.random(len(d)) < chance).astype(float)


def main() -> None:
    versus.RESAMPLES = 300
    print(
        "prompts  prior std  ours longer by  judge         mean   std    interval holds the truth"
    )
    for size in (40, 200):
        for versus.PRIOR_STD in (10.0, 2.5, 1.0):
            for shift in (0.3, 1.0):
                for name, judge, truth in (
                    ("length alone", length_alone, 0.5),
                    ("biased", biased, TRUTH),
                ):
                    values, held = [], 0
                    for trial in range(EXPERIMENTS):
                        rng = np.random.default_rng(trial if truth == 0.5 else 1000 + trial)
                        d = np.round(rng.normal(shift * 50, 50, size))
                        found = versus.length_controlled(list(judge(d, rng)), list(d), seed=trial)
                        assert found is not None
                        values.append(found.value)
                        held += found.low <= truth <= found.high
                    print(
                        f"{size:7d}  {versus.PRIOR_STD:9}  {shift:14}  {name:12}  "
                        f"{np.mean(values):.3f}  {np.std(values):.3f}  {held / EXPERIMENTS:.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
