"""Held-out measures: what the policy answers, what the reward model gets right, who wins.

Held-out sampling is the same for every model that is compared: temperature 1, the same prompts,
the same noise keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rlhf import engine, models, overoptimisation
from rlhf.config import EvaluationConfig, SamplingConfig
from rlhf.data import Gold
from rlhf.errors import ConfigError, StoppedByGuard
from rlhf.intervals import mean_of, share, win_rate, wins
from rlhf.losses import logprobs_of
from rlhf.rewards import Rewards, last_turn
from rlhf.roles import Roles
from rlhf.rollout import Rollout, pad_left, sample
from rlhf.text import Renderer


@dataclass
class Answers:
    """One answer per prompt.

    Attributes:
        prompt_ids, answer_ids: token ids, without padding.
        texts: the answers as text.
        ended: whether each answer ended by EOS.
        gold: the gold score of each, where the data has one.
        scores: what each is worth to PPO; empty where none was asked.
        kl: nats, log policy - log reference of each answer; empty where no reference was given.
        second: what a reward model says that is not trained on; empty without one.
        logprobs: nats, log probability of each answer under the policy that wrote it.
    """

    prompt_ids: list[list[int]]
    answer_ids: list[list[int]]
    texts: list[str]
    ended: list[bool]
    gold: list[float] | None = None
    scores: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    second: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def measure(self) -> list[float] | None:
        """What training never sees: gold, or a second reward model's scores, or None."""
        return self.gold or self.second or None

    def at(self, step: int) -> overoptimisation.Evaluation:
        """As what is watched from step to step."""
        tokens = sum(map(len, self.answer_ids))
        return overoptimisation.Evaluation(
            step=step,
            kl=mean_of(self.kl).value,
            scores=self.scores,
            measure=self.measure,
            length=mean_of([len(ids) for ids in self.answer_ids]).value,
            eos_rate=mean_of([float(ended) for ended in self.ended]).value,
            distinct=overoptimisation.distinct(self.answer_ids),
            repetition=overoptimisation.repetition(self.answer_ids),
            entropy=-sum(self.logprobs) / tokens if tokens else 0.0,
        )


def answer(
    policy: nn.Module,
    renderer: Renderer,
    rows: list[dict[str, Any]],
    *,
    cfg: SamplingConfig,
    seed: int,
    gold: Gold | None = None,
    reward: Rewards | None = None,
    reference: nn.Module | None = None,
) -> Answers:
    """Sample one answer per row at temperature 1, and measure it.

    Args:
        policy: a language model.
        renderer: makes the prompts.
        rows: with "prompt" messages.
        cfg: the `sampling` settings; temperature is taken to be 1.
        seed: of the noise; two models compared share it.
        gold: a measure that training never sees, where there is one.
        reward: what scores, if anything.
        reference: what KL is to, if anything.
    """
    if not rows:
        return Answers([], [], [], [])
    prompts = [renderer.prompt(row["prompt"]) for row in rows]
    at_one = SamplingConfig(
        temperature=1.0, max_new_tokens=cfg.max_new_tokens, batch_size=cfg.batch_size
    )
    drawn = sample(
        policy,
        prompts,
        keys=range(len(rows)),
        seed=seed,
        cfg=at_one,
        pad_id=renderer.pad_id,
        eos_id=renderer.eos_id,
        device=engine.device(),
    )
    ids = drawn.answer_ids()
    texts = [renderer.decode(row) for row in ids]
    own = torch.where(drawn.response_mask, drawn.old_logprobs, 0.0).sum(1)
    out = Answers(prompts, ids, texts, drawn.ended.tolist(), logprobs=own.tolist())
    if gold is not None:
        out.gold = gold([row["prompt"][-1]["content"] for row in rows], texts, rows)
    if reward is not None:
        sequences = [p + a for p, a in zip(prompts, ids, strict=True)]
        verdict = reward.score(
            *pad_left(sequences, renderer.pad_id, engine.device()),
            [last_turn(row) for row in rows],
            texts,
            rows,
            micro_batch_size=cfg.batch_size,
        )
        # Every process asks; a function that gives other numbers each time is heard once.
        out.scores = engine.gather_objects(verdict.scores.tolist())[0]
    if reference is not None:
        out.kl = kl_to_reference(reference, drawn, cfg.batch_size)
    return out


@torch.no_grad()
def score_all(
    reward_model: nn.Module, sequences: Sequence[list[int]], pad_id: int, batch_size: int
) -> list[float]:
    """The reward model's verdict on each token sequence, in order."""
    out: list[float] = []
    for start in range(0, len(sequences), batch_size):
        ids, mask = pad_left(sequences[start : start + batch_size], pad_id, engine.device())
        out += models.scores(reward_model, ids, mask).tolist()
    return out


@torch.no_grad()
def kl_to_reference(reference: nn.Module, drawn: Rollout, batch_size: int) -> list[float]:
    """log policy - log reference of each answer in nats: its mean estimates the KL (k1)."""
    out: list[float] = []
    for start in range(0, len(drawn.prompts), batch_size):
        rows = slice(start, start + batch_size)
        responses, mask = drawn.responses[rows], drawn.response_mask[rows]
        ids = torch.cat([drawn.prompts[rows], responses], dim=1)
        real = torch.cat([drawn.prompt_mask[rows], mask], dim=1)
        logits = models.response_logits(reference, ids, real, responses.shape[1])
        ref_logprobs = logprobs_of(logits, responses)
        out += torch.where(mask, drawn.old_logprobs[rows] - ref_logprobs, 0.0).sum(1).tolist()
    return out


BEST_OF = 8


def ceiling(
    policy: nn.Module,
    renderer: Renderer,
    rows: list[dict[str, Any]],
    *,
    cfg: SamplingConfig,
    seed: int,
    gold: Gold | None,
) -> dict[str, float]:
    """Mean gold of SFT samples on held-out prompts, and of the best of 8: the room PPO has.

    Returns:
        eval/gold with its 95 % interval, eval/gold_best_of_8; nothing without a gold score.
    """
    if gold is None or not rows:
        return {}
    draws = []
    for draw in range(BEST_OF):
        answers = answer(policy, renderer, rows, cfg=cfg, seed=seed + draw, gold=gold)
        assert answers.gold is not None
        draws.append(answers.gold)
    per_prompt = list(zip(*draws, strict=True))
    mean = mean_of([sum(g) / BEST_OF for g in per_prompt])
    return {
        "eval/gold": mean.value,
        "eval/gold_ci_low": mean.low,
        "eval/gold_ci_high": mean.high,
        "eval/gold_best_of_8": mean_of([max(g) for g in per_prompt]).value,
    }


def pair_scores(
    reward_model: nn.Module, rows: list[dict[str, list[int]]], pad_id: int, *, batch_size: int
) -> tuple[list[float], list[float]]:
    """The scores of the chosen and of the rejected answers, in order."""
    chosen = score_all(reward_model, [row["chosen_ids"] for row in rows], pad_id, batch_size)
    rejected = score_all(reward_model, [row["rejected_ids"] for row in rows], pad_id, batch_size)
    return chosen, rejected


def pairs(
    rows: list[dict[str, list[int]]], chosen: list[float], rejected: list[float]
) -> dict[str, float]:
    """How often the reward model prefers the chosen answer of held-out pairs; a tie counts half.

    Args:
        rows: as `Renderer.pairs` gives them.
        chosen, rejected: their scores.

    Returns:
        eval/accuracy with its 95 % interval, eval/margin, and eval/accuracy_longer: what
        "the longer answer wins" would get.
    """
    accuracy = share(wins(chosen, rejected))
    longer = win_rate(
        [len(row["chosen_ids"]) for row in rows], [len(row["rejected_ids"]) for row in rows]
    )
    return {
        "eval/accuracy": accuracy.value,
        "eval/accuracy_ci_low": accuracy.low,
        "eval/accuracy_ci_high": accuracy.high,
        "eval/accuracy_longer": longer.value,
        "eval/margin": mean_of([c - r for c, r in zip(chosen, rejected, strict=True)]).value,
    }


class HeldOut:
    """The same held-out prompts, answered before, during and after PPO.

    Args:
        rows: of the validation split; the first `evaluation.prompts` are asked.
        prompts: token ids of each row.
        renderer, gold, reward: as in `answer`.
        roles: whose policy answers, and whose reference KL is to.
        second: a reward model that only watches.
        cfg, sampling: the settings `evaluation` and `sampling`.
        seed: of the noise.
        gold_path: the setting `data.gold`, for errors.

    Attributes:
        course: score against what training never sees, from evaluation to evaluation.
    """

    def __init__(
        self,
        rows: list[dict[str, Any]],
        prompts: list[list[int]],
        renderer: Renderer,
        roles: Roles,
        reward: Rewards,
        *,
        gold: Gold | None,
        second: nn.Module | None,
        cfg: EvaluationConfig,
        sampling: SamplingConfig,
        seed: int,
        gold_path: str | None,
    ) -> None:
        self.rows, self.prompts, self.renderer = rows, prompts, renderer
        self.roles, self.reward = roles, reward
        self.gold, self.second, self.cfg, self.sampling = gold, second, cfg, sampling
        self.seed, self._gold_path = seed, gold_path
        watches = None if second is None else overoptimisation.SECOND
        measure = overoptimisation.GOLD if gold is not None else watches
        self.course = overoptimisation.Course(measure)
        self._before = self._now = Answers([], [], [], [])

    def baseline(self) -> Answers:
        """What the SFT model answers, which everything later is compared with.

        Raises:
            ConfigError: the measure is no number on some of them, and no step could be the best.
            StoppedByGuard: the score that would be learnt from is none.
        """
        self._before = self._now = self.answers(self.roles.reference)
        self._expect_numbers(self._before)
        if self._before.texts and not self.course.points:  # a run that goes on has it already
            self.course.see(self._before.at(0))
        return self._before

    def evaluate(self) -> dict[str, float]:
        """Answer as the policy is now: scores, KL, and gold with its wins over the SFT answers."""
        self._now = self.answers(self.roles.policy)
        return self.compare(self._before, self._now)

    def follow(self, step: int) -> list[str]:
        """Add what `evaluate` found last to the run's course; new warnings as lines."""
        now = self._now
        if not now.texts:
            return []
        lines = [f"warning: {w.name}: {w.text}" for w in self.course.see(now.at(step))]
        if now.measure is not None and (lost := _no_numbers(now.measure)):
            lines.append(
                f"warning: no number: {self.course.measure} is no finite number on {lost} of "
                f"{len(now.texts)} held-out answers at step {step}, which cannot be the best step"
            )
        return lines

    def answers(self, policy: nn.Module) -> Answers:
        """One answer per prompt at temperature 1, with gold, score and KL to the reference."""
        out = answer(
            policy,
            self.renderer,
            self.rows[: self.cfg.prompts],
            cfg=self.sampling,
            seed=self.seed,
            gold=self.gold,
            reward=self.reward,
            reference=self.roles.reference,
        )
        if self.second is not None:
            sequences = [p + a for p, a in zip(out.prompt_ids, out.answer_ids, strict=True)]
            size = self.sampling.batch_size
            out.second = score_all(self.second, sequences, self.renderer.pad_id, size)
        return out

    def _expect_numbers(self, before: Answers) -> None:
        count = len(before.texts)
        if lost := _no_numbers(before.scores):
            raise StoppedByGuard(
                f"before the first update {lost} of {count} held-out answers of the SFT model get "
                "a score that is no finite number: the reward model overflows or is damaged. PPO "
                "would learn nothing. Look at its card (rlhf show), or use engine.dtype=fp32."
            )
        if before.measure is not None and (lost := _no_numbers(before.measure)):
            setting = f"evaluation.second_rm={self.cfg.second_rm}"
            if before.gold is not None:
                setting = f"data.gold={self._gold_path}"
            raise ConfigError(
                f"{setting}: it gives no finite number for {lost} of {count} held-out answers of "
                "the SFT model, so their mean is none and no step of PPO could be the best. Mend "
                "it, or leave it out."
            )

    @staticmethod
    def compare(before: Answers, after: Answers) -> dict[str, float]:
        """Scores, KL, and gold with the share of prompts on which the later answer wins."""
        if not before.texts:
            return {}
        score = mean_of(after.scores)
        out = {
            "eval/score": score.value,
            "eval/score_ci_low": score.low,
            "eval/score_ci_high": score.high,
            "eval/score_sft": mean_of(before.scores).value,
            "eval/kl": mean_of(after.kl).value,
            "eval/length": mean_of([len(ids) for ids in after.answer_ids]).value,
            "eval/eos_rate": mean_of([float(ended) for ended in after.ended]).value,
            "eval/distinct": overoptimisation.distinct(after.answer_ids),
            "eval/repetition": overoptimisation.repetition(after.answer_ids),
        }
        if after.second:
            second = mean_of(after.second)
            out |= {
                "eval/second": second.value,
                "eval/second_ci_low": second.low,
                "eval/second_ci_high": second.high,
                "eval/second_sft": mean_of(before.second).value,
            }
        if before.gold is not None and after.gold is not None:
            mean, wins = mean_of(after.gold), win_rate(after.gold, before.gold)
            out |= {
                "eval/gold": mean.value,
                "eval/gold_ci_low": mean.low,
                "eval/gold_ci_high": mean.high,
                "eval/gold_sft": mean_of(before.gold).value,
                "eval/win_rate": wins.value,
                "eval/win_rate_ci_low": wins.low,
                "eval/win_rate_ci_high": wins.high,
            }
        return out

    def samples(self) -> list[dict[str, Any]]:
        """The same prompts answered by SFT and, last, by PPO, with score and gold."""
        out = []
        for i, row in enumerate(self.rows[: len(self._before.texts)]):
            sample: dict[str, Any] = {"prompt": row["prompt"][-1]["content"]}
            for who, answers in (("sft", self._before), ("ppo", self._now)):
                sample[who] = answers.texts[i]
                sample[f"{who}_score"] = answers.scores[i]
                sample[f"{who}_gold"] = None if answers.gold is None else answers.gold[i]
                sample[f"{who}_ended"] = answers.ended[i]
            out.append(sample)
        return out

    def progress(self) -> list[dict[str, Any]]:
        """The first few samples, with KL to the reference in nats and length in tokens: what is
        kept of each evaluation."""
        now = self._now
        return [
            sample | {"ppo_kl": now.kl[i], "ppo_length": len(now.answer_ids[i])}
            for i, sample in enumerate(self.samples()[: self.cfg.samples])
        ]


def _no_numbers(values: Sequence[float]) -> int:
    """How many are not finite."""
    return sum(not math.isfinite(value) for value in values)


# ---------------------------------------------------------------- closing tables


def with_interval(metrics: dict[str, float], name: str) -> str:
    """A number and its 95 % interval."""
    low, high = metrics[f"{name}_ci_low"], metrics[f"{name}_ci_high"]
    return f"{metrics[name]:.3f} (95 % {low:.3f} to {high:.3f})"


def sft_summary(metrics: dict[str, float]) -> list[tuple[str, str]]:
    """The closing table of SFT."""
    rows = [
        ("held-out loss, base model", f"{metrics['start/eval/loss']:.3f} nats per answer token"),
        ("held-out loss, SFT", f"{metrics['eval/loss']:.3f} nats per answer token"),
    ]
    if "eval/gold" in metrics:
        rows += [
            ("gold of SFT samples", with_interval(metrics, "eval/gold")),
            (
                "gold, best of 8 samples",
                f"{metrics['eval/gold_best_of_8']:.3f} (a ceiling for PPO)",
            ),
        ]
    return rows


def rm_summary(metrics: dict[str, float], split: str) -> list[tuple[str, str]]:
    """The closing table of the reward model."""
    return [
        (f"accuracy on {split} pairs", with_interval(metrics, "eval/accuracy")),
        ('"the longer one wins"', f"{metrics['eval/accuracy_longer']:.3f}"),
        ("margin", f"{metrics['eval/margin']:.3f} (mean chosen - rejected score)"),
    ]


def ppo_summary(metrics: dict[str, float]) -> list[tuple[str, str]]:
    """The closing table of PPO."""
    if "eval/score" not in metrics:
        return [("score of the last rollout", f"{metrics['objective/scores']:.3f}")]
    rows = [
        (
            "held-out score",
            f"{metrics['eval/score_sft']:.3f} -> {with_interval(metrics, 'eval/score')}",
        ),
        ("KL to the reference", f"{metrics['eval/kl']:.2f} nats per answer, held out"),
    ]
    if "eval/second" in metrics:
        after = with_interval(metrics, "eval/second")
        rows.append(("second reward model", f"{metrics['eval/second_sft']:.3f} -> {after}"))
    if "eval/gold" in metrics:
        after = with_interval(metrics, "eval/gold")
        wins = with_interval(metrics, "eval/win_rate")
        rows += [
            ("held-out gold", f"{metrics['eval/gold_sft']:.3f} -> {after}"),
            ("PPO beats SFT by gold", f"{wins} of prompts, a tie counts half"),
        ]
    return rows
