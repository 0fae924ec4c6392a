"""What happens to a rollout: judge it, estimate advantages, update policy and critic.

These are the steps that `stages/ppo.py` reads out; the formulas are in `returns.py` and
`losses.py`. Notation: B sequences, P prompt, R response, T = P + R.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf import engine, losses, metrics, models, ptx, returns
from rlhf.batch import Batch, Judged, of_all_ranks
from rlhf.config import AlgorithmConfig, EngineConfig, PPOConfig, SamplingConfig
from rlhf.controllers import AdaptiveKL, FixedKL
from rlhf.data import Row
from rlhf.engine import Engine
from rlhf.errors import StoppedByGuard
from rlhf.masking import masked_mean, masked_whiten
from rlhf.methods import lora
from rlhf.methods.settings import MethodConfig
from rlhf.overoptimisation import distinct
from rlhf.ranks import rank, rows_per_pass, world_size
from rlhf.rewards import Rewards, Verdict, last_turn
from rlhf.roles import Roles
from rlhf.rollout import Rollout, mix, restrict
from rlhf.state import read_state
from rlhf.text import Renderer


def engines(
    policy: nn.Module,
    critic: nn.Module | None,
    cfg: PPOConfig,
    engine_cfg: EngineConfig,
    method: MethodConfig | None = None,
) -> tuple[Engine, Engine | None]:
    """Both models ready for `update`, each with its own optimizer and schedule.

    An algorithm without a critic has None for it, here and below. `method` made them trainable,
    and may give some weights a learning rate of their own.
    """
    rows, micro = _sizes(cfg)

    def make(module: nn.Module, learning_rate: float, schedule: str, steps: int) -> Engine:
        models.recompute(module, engine_cfg)
        return Engine(
            module,
            engine_cfg,
            learning_rate=learning_rate,
            factor=engine.learning_rate_factor(
                schedule, warmup=cfg.warmup, total=steps * cfg.epochs * cfg.minibatches
            ),
            micro_batch_size=micro,
            accumulation=rows // micro,
            max_grad_norm=cfg.max_grad_norm,
            epsilon=cfg.adam_epsilon,
            groups=None
            if method is None
            else lora.groups(module, method, learning_rate, inside=models.whole(module)),
        )

    if critic is None:
        return make(policy, cfg.learning_rate, cfg.schedule, cfg.steps), None
    return (
        make(policy, cfg.learning_rate, cfg.schedule, cfg.steps - cfg.critic_warmup),
        make(critic, cfg.critic_learning_rate, cfg.critic_schedule or cfg.schedule, cfg.steps),
    )


def _sizes(cfg: PPOConfig) -> tuple[int, int]:
    """Rows of a minibatch on each process, and of a forward pass."""
    rows = cfg.batch_size // cfg.minibatches // world_size()
    return rows, rows_per_pass(rows, cfg.micro_batch_size)


def kl_controller(cfg: PPOConfig) -> FixedKL | AdaptiveKL:
    """What sets the coefficient of KL from step to step."""
    if cfg.kl_target is None:
        return FixedKL(cfg.kl_coef)
    return AdaptiveKL(cfg.kl_coef, cfg.kl_target, cfg.kl_horizon)


WORTH = ("eval/gold", "eval/second", "eval/score")


def worth(held_out: dict[str, float], cfg: PPOConfig) -> float | None:
    """What `@best` is chosen by; None beyond the KL budget, without any, or where it is no number.

    Gold where there is one, else the second reward model's score, else the score that is optimised.
    """
    if cfg.kl_budget is not None and not held_out.get("eval/kl", 0.0) <= cfg.kl_budget:
        return None  # a KL that is no number is within no budget
    value = next((held_out[name] for name in WORTH if name in held_out), math.nan)
    return value if math.isfinite(value) else None


def expect_publishable(metrics: dict[str, float], *, step: int) -> dict[str, float]:
    """`metrics`, where the held-out means of the policy that would be published are numbers.

    Raises:
        StoppedByGuard: one is not, so no evaluation was finite that could have been the best.
    """
    chosen_by = [name for name in WORTH if name in metrics][:1]
    for name in [*chosen_by, "eval/score", "eval/kl"]:
        if not math.isfinite(metrics.get(name, 0.0)):
            raise StoppedByGuard(
                f"{name} is {metrics[name]} for the policy of step {step}, and no evaluation gave "
                "a number that could be the best: nothing is published. Look at what measures it "
                "(data.gold, evaluation.second_rm, the reward model), and at samples_log.jsonl."
            )
    return metrics


# ---------------------------------------------------------------- judge


def score(
    rollout: Rollout,
    reward: Rewards,
    rows: list[Row],
    renderer: Renderer,
    *,
    micro_batch_size: int,
) -> tuple[Verdict, dict[str, float]]:
    """What reward models and functions say of a rollout.

    Args:
        rollout: this process's part.
        reward: every term.
        rows: of the data, one for each row of `rollout`.
        renderer: makes text of tokens.
        micro_batch_size: rows per forward pass of a reward model.

    Returns:
        The verdict, and over all processes the mean of each term before its weight, and what an
        ensemble disagrees by.
    """
    verdict = reward.score(
        rollout.ids,
        rollout.mask,
        [last_turn(row) for row in rows],
        [renderer.decode(ids) for ids in rollout.answer_ids()],
        rows,
        micro_batch_size=micro_batch_size,
    )
    measured = {f"{metrics.TERMS}{name}": part for name, part in verdict.parts.items()}
    if verdict.spread is not None:
        measured["objective/scores_spread"] = verdict.spread
    ones = torch.ones(len(rows), device=rollout.ids.device)
    sums = torch.stack([x.double().sum() for x in (*measured.values(), ones)])
    *totals, count = engine.sum_over_ranks(sums).tolist()
    return verdict, {name: total / count for name, total in zip(measured, totals, strict=True)}


@torch.no_grad()
def judge(
    rollout: Rollout,
    scores: Tensor,
    roles: Roles,
    cfg: PPOConfig,
    sampling: SamplingConfig,
    *,
    bias: float = 0.0,
    scale: float = 1.0,
) -> Judged:
    """What reference and critic say of a rollout, beside its scores.

    KL compares policy and reference over all tokens, whatever top-k or top-p rules out: over the
    few tokens that a sharp policy may still draw, the two would agree, and sharpness cost nothing.

    Scores are shaped first (`returns.shape_scores`), then penalties are taken off: one for an
    answer that was cut at the limit (`ppo.missing_eos_penalty`; Huang et al. 2024, detail 5.4:
    answers should end), one that grows towards the limit (`ppo.overlong_penalty`).

    Args:
        rollout: this process's part.
        scores: [B] what its answers are worth, see `score`.
        roles: critic None where the algorithm has none.
        cfg, sampling: the settings of that name.
        bias, scale: of the scores, as `standard_scores` finds them.
    """
    size = cfg.micro_batch_size
    parts = [
        (slice(n, n + size), rollout.rows(slice(n, n + size))) for n in range(0, len(rollout), size)
    ]

    def per_token(measure: Callable[[Rollout], Tensor]) -> Tensor:  # by role: they may share
        out = torch.zeros_like(rollout.old_logprobs)
        for rows, part in parts:
            found = measure(part)
            out[rows, : found.shape[1]] = found
        return out

    def over_all_tokens(model: nn.Module) -> Tensor:
        return per_token(partial(logprobs, model, cfg=sampling, restricted=False))

    ref_logprobs = over_all_tokens(roles.reference)
    # What the sampler noted is of other tokens where top-k or top-p ruled some out.
    own = over_all_tokens(roles.policy) if sampling.truncates else rollout.old_logprobs
    kl = losses.kl_estimate(own, ref_logprobs, estimator="k1")
    old_values = None if roles.critic is None else per_token(partial(values, roles.critic))
    scores = returns.shape_scores(scores, bias=bias, scale=scale, clip=cfg.score_clip)
    scores = torch.where(rollout.ended, scores, scores - cfg.missing_eos_penalty)
    if cfg.overlong_buffer:
        scores = scores + returns.overlong_penalty(
            rollout.response_mask.sum(1).to(scores.dtype),
            limit=sampling.max_new_tokens,
            buffer=cfg.overlong_buffer,
            penalty=cfg.overlong_penalty,
        )
    return Judged(
        **rollout.tensors(),
        scores=scores,
        ref_logprobs=ref_logprobs,
        kl=torch.where(rollout.response_mask, kl, 0.0),
        old_values=old_values,
    )


@dataclass
class Judge:
    """What reward, reference and critic say of rollouts.

    Attributes:
        reward: every term.
        roles: whose reference and critic are asked.
        renderer: makes text of tokens.
        cfg, sampling: the settings `ppo` and `sampling`.
        bias, scale: of scores; see `standardize`.
    """

    reward: Rewards
    roles: Roles
    renderer: Renderer
    cfg: PPOConfig
    sampling: SamplingConfig
    bias: float = 0.0
    scale: float = 1.0

    def standardize(self, scores: list[float]) -> None:
        """From now on scores are compared with those of SFT answers, where settings ask for it."""
        found = standard_scores(scores, self.cfg)
        self.bias, self.scale = found["bias"], found["scale"]

    def __call__(self, rollout: Rollout, rows: list[Row]) -> tuple[Judged, dict[str, float]]:
        """The rollout judged, and the means of the reward's terms; see `score` and `judge`."""
        size = self.cfg.micro_batch_size
        verdict, means = score(rollout, self.reward, rows, self.renderer, micro_batch_size=size)
        judged = judge(
            rollout,
            verdict.scores,
            self.roles,
            self.cfg,
            self.sampling,
            bias=self.bias,
            scale=self.scale,
        )
        return judged, means


def standard_scores(scores: list[float], cfg: PPOConfig) -> dict[str, float]:
    """{"bias", "scale"} for `judge`: mean and std of what SFT answers score, where asked for."""
    mean = sum(scores) / max(1, len(scores))
    std = (sum((x - mean) ** 2 for x in scores) / max(1, len(scores))) ** 0.5
    return {
        "bias": mean if cfg.center_scores else 0.0,
        "scale": max(std, 1e-8) if cfg.scale_scores else 1.0,
    }


def logprobs(
    model: nn.Module, batch: Rollout, cfg: SamplingConfig, *, restricted: bool = True
) -> Tensor:
    """[B, R] nats, of each response token; 0 on padding.

    Restricted: as the policy samples it, that is softmax(logits / temperature) without the tokens
    that top-k or top-p ruled out. Not restricted: over all tokens, as KL compares them.
    """
    logits = temperate_logits(model, batch, cfg)
    if restricted and cfg.truncates:
        logits = restrict(logits, batch.responses, batch.floors)
    out = losses.logprobs_of(logits, batch.responses)
    return torch.where(batch.response_mask, out, 0.0)


def temperate_logits(model: nn.Module, batch: Rollout, cfg: SamplingConfig) -> Tensor:
    """[B, R, V], of all tokens, temperature applied."""
    logits = models.response_logits(model, batch.ids, batch.mask, batch.responses.shape[1])
    return logits / cfg.temperature


def values(critic: nn.Module, batch: Rollout) -> Tensor:
    """[B, R], the critic's estimate before each response token is emitted; 0 on padding."""
    before = models.token_values(critic, batch.ids, batch.mask)[:, batch.prompts.shape[1] - 1 : -1]
    return torch.where(batch.response_mask, before, 0.0)


# ---------------------------------------------------------------- estimate


def estimate_advantages(
    judged: Judged,
    cfg: PPOConfig,
    algorithm: AlgorithmConfig,
    sampling: SamplingConfig,
    *,
    kl_coef: float,
) -> tuple[Batch, dict[str, float]]:
    """Per-token rewards, then advantages by the algorithm, then whitening over all processes.

    Args:
        judged: this process's part.
        cfg, algorithm, sampling: the settings of that name.
        kl_coef: of this step, as the controller has it.

    Returns:
        The batch with advantages and returns, and the objective's numbers, over all processes.
    """
    mask, per_prompt = judged.response_mask, sampling.per_prompt or 1
    inside = kl_coef if cfg.kl_in == "reward" else 0.0
    rewards = returns.token_rewards(judged.scores, judged.kl, mask, kl_coef=inside)
    if cfg.whiten_rewards:
        rewards = _whiten(rewards, mask, subtract_mean=False)
    if algorithm.groups:
        whole = torch.where(mask, rewards, 0.0).sum(1)  # [B]
        if algorithm.name == "rloo":
            found = returns.rloo(whole, per_prompt=per_prompt)
        else:
            found = returns.grpo(whole, per_prompt=per_prompt, scale=algorithm.scale)
        advantages = targets = returns.spread(found, mask)
    elif algorithm.name == "reinforce_pp":
        advantages = targets = returns.reinforce_pp(rewards, mask, gamma=cfg.gamma)
    else:
        assert judged.old_values is not None
        advantages, targets = returns.gae(
            rewards, judged.old_values, mask, gamma=cfg.gamma, lam=cfg.lam
        )
    stats = _describe(judged, targets, kl_coef)
    if cfg.whiten_advantages and not algorithm.groups:  # groups have a scale of their own
        advantages = _whiten(advantages, mask, subtract_mean=True)
    known = {f.name: getattr(judged, f.name) for f in fields(Judged)}
    return Batch(**known, advantages=advantages, returns=targets), stats


def _whiten(x: Tensor, mask: Tensor, *, subtract_mean: bool) -> Tensor:
    """With the moments over all processes."""
    count = engine.sum_over_ranks(mask.sum())
    mean = engine.sum_over_ranks(masked_mean(x, mask, count=count))
    var = engine.sum_over_ranks(masked_mean((x - mean) ** 2, mask, count=count))
    return masked_whiten(x, mask, subtract_mean=subtract_mean, mean=mean, var=var)


def _describe(batch: Judged, targets: Tensor, kl_coef: float) -> dict[str, float]:
    """The objective's numbers over all processes; see `metrics.METRICS` for each."""
    mask = batch.response_mask
    sequences = engine.sum_over_ranks(mask.new_tensor(len(batch), dtype=torch.double))
    tokens = engine.sum_over_ranks(mask.sum().double())

    def mean_row(x: Tensor) -> float:  # x: [B]
        return float(engine.sum_over_ranks(x.double().sum()) / sequences)

    def mean_token(x: Tensor) -> float:  # x: [B, R]
        return float(engine.sum_over_ranks(torch.where(mask, x, 0).double().sum()) / tokens)

    kl, score = mean_row(batch.kl.sum(1)), mean_row(batch.scores)
    score_std = mean_row((batch.scores.double() - score) ** 2) ** 0.5
    largest = float(batch.kl.abs().max())
    critic = {}
    if batch.old_values is not None:
        unexplained, mean_return = targets - batch.old_values, mean_token(targets)
        variance = mean_token((targets - mean_return) ** 2)
        left = mean_token((unexplained - mean_token(unexplained)) ** 2)
        critic["val/explained_variance"] = 1.0 - left / max(variance, 1e-12)
    return {
        "objective/kl": kl,
        "objective/kl_max": float(torch.tensor(engine.gather_objects(largest)).max()),  # nan stays
        "objective/kl_coef": kl_coef,
        "objective/scores": score,
        "objective/scores_std": score_std,
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": score - kl_coef * kl,
        "objective/entropy": -mean_token(batch.old_logprobs),
        **critic,
        "response/length": float(tokens / sequences),
        "response/eos_rate": mean_row(batch.ended),
        "response/distinct": _distinct_bigrams(batch),
    }


def _distinct_bigrams(batch: Judged) -> float:
    own = [r[m].tolist() for r, m in zip(batch.responses, batch.response_mask, strict=True)]
    answers = [ids for part in engine.gather_objects(own) for ids in part]
    return distinct(answers) if any(len(ids) > 1 for ids in answers) else 0.0


# ---------------------------------------------------------------- update


class Learner:
    """Policy and critic in training: `epochs` passes of `minibatches` optimizer steps per rollout.

    Args:
        policy, critic: as `engines` makes them; critic None where the algorithm has none.
        cfg, sampling: the settings of that name.
        seed: of the order of rows.
        demonstrations: what `ppo.ptx_coef` mixes in: as many rows per optimizer step as there are
            answers.

    Attributes:
        ratios: new / old probability of this process's tokens in the last update, one tensor for
            each pass of the policy; empty while the critic learns alone.
    """

    def __init__(
        self,
        policy: Engine,
        critic: Engine | None,
        cfg: PPOConfig,
        sampling: SamplingConfig,
        seed: int,
        demonstrations: ptx.Demonstrations | None = None,
    ) -> None:
        self.policy, self.critic, self.cfg, self.sampling = policy, critic, cfg, sampling
        self.seed, self.demonstrations = seed, demonstrations
        self.ratios: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """Both models with optimizers and schedules, and what others may load.

        Prompts, noise and the order of minibatches are functions of (seed, step): nothing to keep.
        """
        critic = {} if self.critic is None else {"critic": self.critic}
        return {"policy": self.policy, **critic, "model": models.Trained(self.policy.module)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        read = read_state(_WithCritic if self.critic else _State, state, self)
        self.policy.load(read.policy)
        if self.critic is not None:
            self.critic.load(read.critic)  # type: ignore[attr-defined]

    def update(self, batch: Batch, *, step: int, kl_coef: float) -> dict[str, float]:
        """Learn from one rollout, over all processes together.

        In the first `ppo.critic_warmup` steps the policy stands still. `kl_coef` is that of this
        step and matters here where KL is a term of the loss.

        Returns:
            Losses and statistics, each a mean over the step's updates; learning rates as they were
            at the first of them.

        Raises:
            StoppedByGuard: one of them is not finite.
        """
        cfg, device = self.cfg, batch.prompts.device
        totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))
        norms: dict[str, list[float]] = defaultdict(list)
        generator = torch.Generator().manual_seed(mix(mix(self.seed) - step) & (2**63 - 1))
        self.ratios = []
        trained = self._trained(step)
        for model in trained.values():
            model.module.train()
        rates = {f"{name}/learning_rate": model.learning_rate for name, model in trained.items()}
        batch = of_all_ranks(batch, per_prompt=self.sampling.per_prompt or 1)
        size, micro_size = _sizes(cfg)
        turns = itertools.count((step - 1) * cfg.epochs * cfg.minibatches + 1)
        for _ in range(cfg.epochs):
            order = torch.randperm(len(batch), generator=generator).to(device)
            for chosen in order.split(size * world_size()):
                minibatch, turn = batch.rows(chosen[rank() :: world_size()]), next(turns)
                count = engine.sum_over_ranks(minibatch.response_mask.sum())
                for name, model in trained.items():
                    shown: Iterator[ptx.Shown | None] = itertools.repeat(None)
                    if self.demonstrations is not None and name == "policy":
                        shown = self.demonstrations.parts(turn, size)
                    for micro in minibatch.micro(micro_size):
                        if name == "policy":
                            found = self._train_policy(micro, count, kl_coef, next(shown))
                        else:
                            found = self._train_critic(model, micro, count)
                        for stat, value in found.items():
                            totals[stat] = totals[stat] + value.detach()
                    if (norm := model.grad_norm) is not None:
                        norms[f"{name}/grad_norm"].append(norm)
        updates = cfg.epochs * cfg.minibatches
        episode = {"episode": step * cfg.batch_size}
        stats = {n: float(engine.sum_over_ranks(total)) / updates for n, total in totals.items()}
        for name, mean in stats.items():
            if not math.isfinite(mean):
                raise StoppedByGuard(
                    f"{name} became {mean} in this update. The policy diverged: lower "
                    f"ppo.learning_rate={cfg.learning_rate:g} or ppo.critic_learning_rate="
                    f"{cfg.critic_learning_rate:g}, or raise ppo.kl_coef={cfg.kl_coef:g}."
                )
        stats |= episode | rates
        return stats | {name: sum(found) / len(found) for name, found in norms.items()}

    def _trained(self, step: int) -> dict[str, Engine]:
        """What learns in a step, by the beginning of its numbers' names."""
        if self.critic is None:
            return {"policy": self.policy}
        if step <= self.cfg.critic_warmup:
            return {"val": self.critic}
        return {"policy": self.policy, "val": self.critic}

    def _train_policy(
        self, micro: Batch, count: Tensor, kl_coef: float, shown: ptx.Shown | None
    ) -> dict[str, Tensor]:
        """One micro-batch through the policy; each statistic is its part of the minibatch mean."""
        cfg, sampling, policy = self.cfg, self.sampling, self.policy
        everything = logits = temperate_logits(policy.module, micro, sampling)
        if sampling.truncates:
            logits = restrict(everything, micro.responses, micro.floors)
        mask = micro.response_mask
        new_logprobs = torch.where(mask, losses.logprobs_of(logits, micro.responses), 0.0)
        self.ratios.append((new_logprobs.detach() - micro.old_logprobs)[mask].exp())
        loss, stats = losses.ppo_policy_loss(
            new_logprobs,
            micro.old_logprobs,
            micro.advantages,
            mask,
            cliprange=cfg.cliprange,
            cliprange_high=cfg.cliprange_high,
            dual_clip=cfg.dual_clip,
            count=count,
        )
        stats = {"loss/policy": loss, **stats}
        if cfg.kl_in == "loss":
            plain = new_logprobs
            if sampling.truncates:
                plain = losses.logprobs_of(everything, micro.responses)
            kl, more = losses.kl_loss(
                plain, micro.ref_logprobs, mask, estimator=cfg.kl_estimator, count=count
            )
            loss, stats = loss + kl_coef * kl, stats | {"loss/kl": kl, **more}
        if cfg.entropy_coef:
            entropy = masked_mean(losses.entropy_of(logits), mask, count=count)
            loss, stats = loss - cfg.entropy_coef * entropy, stats | {"policy/entropy": entropy}
        if shown is not None:
            imitation = ptx.loss(policy.module, shown)
            loss, stats = loss + cfg.ptx_coef * imitation, stats | {"loss/ptx": imitation}
        policy.backward(loss)
        policy.step()
        return stats

    def _train_critic(self, critic: Engine, micro: Batch, count: Tensor) -> dict[str, Tensor]:
        """The same for the critic."""
        clip = self.cfg.cliprange_value
        assert micro.old_values is not None
        loss, stats = losses.ppo_value_loss(
            values(critic.module, micro),
            micro.old_values,
            micro.returns,
            micro.response_mask,
            cliprange_value=math.inf if clip is None else clip,
            count=count,
        )
        critic.backward(self.cfg.vf_coef * loss)
        critic.step()
        return {"loss/value": loss, **stats}


@dataclass
class _State:
    """Of a learner without a critic: the folders of its parts."""

    policy: Path
    model: Path


@dataclass
class _WithCritic(_State):
    critic: Path


SHOWN = 10_000  # values of a distribution, at most, of each process


def distributions(batch: Batch, ratios: list[Tensor]) -> dict[str, list[float]]:
    """What `metrics.HISTOGRAMS` shows of a step, of all processes; each of them calls it.

    Args:
        batch: with advantages.
        ratios: as `update` filled it; empty while the critic warms up.
    """
    mask = batch.response_mask
    own = {
        "histogram/scores": batch.scores,
        "histogram/advantages": batch.advantages[mask],
        "histogram/ratios": torch.cat(ratios) if ratios else batch.scores[:0],
        "histogram/lengths": mask.sum(1),
    }
    few = {name: x[:: max(1, math.ceil(len(x) / SHOWN))].tolist() for name, x in own.items()}
    parts = engine.gather_objects(few)
    return {name: [x for part in parts for x in part[name]] for name in own}


def tokens(batch: Batch) -> int:
    """Real tokens of a batch, prompts included, over all processes."""
    return int(engine.sum_over_ranks(batch.mask.sum()))
