"""The numbers that a stage may log: names, units, meanings, and which way is good.

The names are exact and spelled as the field spells them (TRL, OpenRLHF), so that a curve means the
same in every run; console, metrics.jsonl, W&B and reports all read this list. It is also their
documentation. Units are nats, tokens, seconds and rows.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """One number that a stage may log: how to read it, and which way is good (None: neither)."""

    name: str
    unit: str
    meaning: str
    higher_is_better: bool | None = None


HIGH, LOW, NEITHER = True, False, None  # which way is good

# The order is the order of the keys in metrics.jsonl. Means and sums over tokens count response
# tokens only, over all processes; "a response's KL" is the sum of its tokens' estimates.
METRICS: dict[str, Metric] = {
    name: Metric(name, unit, meaning, higher_is_better)
    for name, unit, higher_is_better, meaning in (
        ("episode", "rows", NEITHER, "responses sampled since the run began"),
        ("train/loss", "nats", LOW, "last update: per answer token (SFT), per pair (RM)"),
        ("train/accuracy", "fraction", HIGH, "RM: training pairs that score chosen higher"),
        ("train/margin", "score", HIGH, "RM: mean chosen - rejected score, training pairs"),
        ("train/epoch", "epochs", NEITHER, "passes over the training rows so far"),
        ("train/learning_rate", "1", NEITHER, "learning rate of the last update"),
        ("train/grad_norm", "1", NEITHER, "L2 norm of the gradient before clipping"),
        ("eval/loss", "nats", LOW, "train/loss on held-out rows"),
        ("eval/accuracy", "fraction", HIGH, "RM: held-out pairs that are right; last, test pairs"),
        ("eval/accuracy_ci_low", "fraction", HIGH, "lower end of its 95 % interval"),
        ("eval/accuracy_ci_high", "fraction", HIGH, "upper end of its 95 % interval"),
        ("eval/accuracy_longer", "fraction", NEITHER, "what 'the longer one wins' would get"),
        ("eval/margin", "score", HIGH, "RM: mean chosen - rejected score, held-out pairs"),
        ("eval/ece", "fraction", LOW, "RM: calibration error of sigmoid(margin), held out"),
        ("eval/brier", "1", LOW, "RM: mean of (1 - sigmoid(margin))^2, held out; 0.25: no idea"),
        ("objective/kl", "nats", LOW, "mean over responses of a response's KL to the reference"),
        ("objective/kl_max", "nats", LOW, "largest |log policy - log reference| of a token"),
        ("objective/kl_coef", "score/nat", NEITHER, "weight of the KL penalty in the reward"),
        ("objective/scores", "score", HIGH, "mean score of the answers, penalties taken off"),
        ("objective/scores_std", "score", NEITHER, "standard deviation of the scores of a step"),
        ("objective/scores_spread", "score", LOW, "mean std of a score over an ensemble's members"),
        ("objective/non_score_reward", "score", HIGH, "mean over responses of -kl_coef * its KL"),
        ("objective/rlhf_reward", "score", HIGH, "scores + non_score_reward: what PPO maximises"),
        ("objective/entropy", "nats", NEITHER, "mean over tokens of -log prob, sampling policy"),
        ("policy/approxkl", "nats", NEITHER, "mean over tokens of (log ratio)^2 / 2, new to old"),
        ("policy/clipfrac", "fraction", NEITHER, "tokens on which the policy clip was active"),
        ("policy/ratio", "1", NEITHER, "mean over tokens of new prob / old prob"),
        ("policy/kl", "nats", LOW, "mean over tokens of log policy - log reference, in training"),
        ("policy/entropy", "nats", NEITHER, "mean over tokens of the entropy, in training"),
        ("policy/learning_rate", "1", NEITHER, "of the policy, at the step's first update"),
        ("policy/grad_norm", "1", NEITHER, "L2 norm of the policy's gradient before clipping"),
        (
            "loss/policy",
            "1",
            NEITHER,
            "clipped policy loss, mean over tokens, no other term",
        ),
        ("loss/kl", "nats", LOW, "KL as a term of the loss, mean over tokens, before kl_coef"),
        ("loss/ptx", "nats", LOW, "SFT loss mixed in (PPO-ptx), per answer token, before ptx_coef"),
        ("loss/value", "score^2", LOW, "clipped value loss: half the mean square, no vf_coef"),
        ("val/clipfrac", "fraction", NEITHER, "tokens on which the value clip was active"),
        ("val/explained_variance", "fraction", HIGH, "1 - Var(return - value) / Var(return)"),
        ("val/error", "score^2", LOW, "mean over tokens of (value - return)^2, unclipped"),
        ("val/learning_rate", "1", NEITHER, "of the critic, at the step's first update"),
        ("val/grad_norm", "1", NEITHER, "L2 norm of the critic's gradient before clipping"),
        ("response/length", "tokens", NEITHER, "mean response length, EOS included"),
        ("response/eos_rate", "fraction", HIGH, "responses that ended by EOS, not by the limit"),
        ("response/distinct", "fraction", HIGH, "distinct bigrams / all bigrams of a batch"),
        ("eval/gold", "score", HIGH, "mean gold score, held-out prompts; never trained on"),
        ("eval/gold_sft", "score", NEITHER, "mean gold score of the SFT model, same prompts"),
        ("eval/gold_best_of_8", "score", NEITHER, "mean of the best gold of 8 SFT samples"),
        ("eval/gold_ci_low", "score", HIGH, "lower end of the 95 % interval of eval/gold"),
        ("eval/gold_ci_high", "score", HIGH, "upper end of the 95 % interval of eval/gold"),
        ("eval/win_rate", "fraction", HIGH, "prompts where gold beats the SFT answer's; ties 1/2"),
        ("eval/win_rate_ci_low", "fraction", HIGH, "lower end of its 95 % interval"),
        ("eval/win_rate_ci_high", "fraction", HIGH, "upper end of its 95 % interval"),
        ("eval/score", "score", HIGH, "mean score of answers to held-out prompts, temperature 1"),
        ("eval/score_ci_low", "score", HIGH, "lower end of its 95 % interval"),
        ("eval/score_ci_high", "score", HIGH, "upper end of its 95 % interval"),
        ("eval/score_sft", "score", NEITHER, "the same of the SFT model's answers"),
        ("eval/second", "score", HIGH, "mean score of a reward model that only watches"),
        ("eval/second_ci_low", "score", HIGH, "lower end of its 95 % interval"),
        ("eval/second_ci_high", "score", HIGH, "upper end of its 95 % interval"),
        ("eval/second_sft", "score", NEITHER, "the same of the SFT model's answers"),
        ("eval/length", "tokens", NEITHER, "mean length of held-out answers, EOS included"),
        ("eval/eos_rate", "fraction", HIGH, "held-out answers that ended by EOS"),
        ("eval/distinct", "fraction", HIGH, "distinct bigrams / all bigrams of held-out answers"),
        ("eval/repetition", "fraction", LOW, "bigrams that an answer had before, mean of answers"),
        ("eval/kl", "nats", LOW, "objective/kl on held-out prompts at temperature 1"),
        ("proof/kl", "nats", LOW, "largest |KL(policy, reference)| of a token before any update"),
        ("proof/ratio", "1", LOW, "largest |ratio - 1| of a token before any update"),
        ("time/rollout", "seconds", LOW, "sampling the responses of this step"),
        ("time/score", "seconds", LOW, "reference, critic and reward passes of this step"),
        ("time/update", "seconds", LOW, "optimising policy and critic in this step"),
        ("time/total", "seconds", LOW, "wall time since the stage began"),
        ("perf/tokens_per_second", "tokens/s", HIGH, "prompt and response tokens by step time"),
        ("perf/peak_memory_gb", "GB", LOW, "peak memory of the main process, or of its GPU"),
    )
}


TERMS = "objective/scores/"  # in front of the names of a reward's terms, which are the user's


def find(name: str) -> Metric | None:
    """One of METRICS, or a term of the reward; None for any other name."""
    if name in METRICS or not (term := name.removeprefix(TERMS)) or term == name:
        return METRICS.get(name)
    return Metric(name, "score", f"mean of the reward's term {term}, before its weight")


def terms(metrics: Iterable[str]) -> list[str]:
    """The names among `metrics` that are terms of a reward, in order."""
    return [name for name in metrics if name.startswith(TERMS)]


def order(name: str) -> tuple[int, str]:
    """Sorts as METRICS does; a term comes after the score, another name last."""
    listed = TERMS.rstrip("/") if name.startswith(TERMS) else name
    return _PLACES.get(listed, len(_PLACES)), name


_PLACES = {name: place for place, name in enumerate(METRICS)}

# What tells most about a finished run, in reading order.
HEADLINES = ("eval/loss", "eval/accuracy", "eval/gold", "eval/win_rate", "eval/score", "eval/kl")


def headlines(*runs: Collection[str]) -> list[str]:
    """Those of `HEADLINES` that any of the runs has; each run is the names of its final numbers.

    KL is that of held-out answers. Where nothing was held out, that of the rollouts stands in for
    it; they were sampled before the step's update.
    """
    shown = [name for name in HEADLINES if any(name in run for run in runs)]
    without = any("objective/kl" in run and "eval/kl" not in run for run in runs)
    return [*shown, "objective/kl"] if without else shown


# Distributions that PPO shows at every evaluation; in W&B only.
HISTOGRAMS: dict[str, str] = {
    "histogram/scores": "scores of a step's answers, penalties taken off",
    "histogram/advantages": "of a step's response tokens, whitened",
    "histogram/ratios": "new prob / old prob of the tokens in a step's updates",
    "histogram/lengths": "tokens of a step's answers",
}


def in_table_order(metrics: Mapping[str, float]) -> dict[str, float]:
    """The same numbers as plain int or float, in the order of METRICS.

    Raises:
        KeyError: a name that is neither in METRICS nor a term's, with the nearest ones.
    """
    for name in metrics:
        if find(name) is None:
            near = difflib.get_close_matches(name, METRICS, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "see METRICS for the names."
            raise KeyError(f"metric {name!r} is not in rlhf.metrics.METRICS: {hint}")
    return {name: _plain_number(metrics[name]) for name in sorted(metrics, key=order)}


def _plain_number(value: Any) -> float:
    """An int stays an int; numpy's and torch's scalars become Python's, every digit kept."""
    try:
        return operator.index(value)
    except TypeError:
        return float(value)
