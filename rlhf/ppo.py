"""What happens to a rollout: judge it, estimate advantages, update policy and critic.

These are the steps that `stages/ppo.py` reads out; the formulas are in `returns.py` and
`losses.py`. Notation: B sequences, P prompt, R response, T = P + R.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf import engine, losses, metrics, models, ptx, returns
from rlhf.batch import Batch, Judged, of_all_ranks
from rlhf.config import EngineConfig, PPOConfig, PPOStage, SamplingConfig
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


def save(policy: Engine, critic: Engine | None, folder: Path) -> None:
    """Write a checkpoint: both models with optimizers and schedules, and what others may load.

    Prompts, noise and the order of minibatches are functions of (seed, step): nothing to keep.
    """
    policy.save(folder / "policy")
    if critic is not None:
        critic.save(folder / "critic")
    models.save_trained(policy.module, folder / "model")


def load(policy: Engine, critic: Engine | None, folder: Path) -> None:
    """Put back what `save` wrote."""
    policy.load(folder / "policy")
    if critic is not None:
        critic.load(folder / "critic")


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


def expect_publishable(metrics: dict[str, float], *, step: int) -> None:
    """The held-out means of the policy that would be published are numbers.

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


# ---------------------------------------------------------------- judge


def score(
    rollout: Rollout, reward: Rewards, rows: list[Row], renderer: Renderer, cfg: PPOStage
) -> tuple[Verdict, dict[str, float]]:
    """What reward models and functions say of a rollout.

    Args:
        rollout: this process's part.
        reward: every term.
        rows: of the data, one for each row of `rollout`; see `rollout.share`.
        renderer: makes text of tokens.
        cfg: the stage's settings.

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
        micro_batch_size=cfg.ppo.micro_batch_size,
    )
    measured = {f"{metrics.TERMS}{name}": part for name, part in verdict.parts.items()}
    if verdict.spread is not None:
        measured["objective/scores_spread"] = verdict.spread
    sums = torch.stack([x.double().sum() for x in (*measured.values(), torch.ones(len(rows)))])
    *totals, count = engine.sum_over_ranks(sums.to(engine.device())).tolist()
    return verdict, {name: total / count for name, total in zip(measured, totals, strict=True)}


@torch.no_grad()
def judge(
    rollout: Rollout,
    scores: Tensor,
    roles: Roles,
    cfg: PPOStage,
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
        cfg: the stage's settings.
        bias, scale: of the scores, as `standard_scores` finds them.
    """
    size = cfg.ppo.micro_batch_size
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
        return per_token(partial(logprobs, model, cfg=cfg.sampling, restricted=False))

    ref_logprobs = over_all_tokens(roles.reference)
    # What the sampler noted is of other tokens where top-k or top-p ruled some out.
    own = over_all_tokens(roles.policy) if cfg.sampling.truncates else rollout.old_logprobs
    kl = losses.kl_estimate(own, ref_logprobs, estimator="k1")
    old_values = None if roles.critic is None else per_token(partial(values, roles.critic))
    scores = returns.shape_scores(scores, bias=bias, scale=scale, clip=cfg.ppo.score_clip)
    scores = torch.where(rollout.ended, scores, scores - cfg.ppo.missing_eos_penalty)
    if cfg.ppo.overlong_buffer:
        scores = scores + returns.overlong_penalty(
            rollout.response_mask.sum(1).to(scores.dtype),
            limit=cfg.sampling.max_new_tokens,
            buffer=cfg.ppo.overlong_buffer,
            penalty=cfg.ppo.overlong_penalty,
        )
    return Judged(
        **rollout.tensors(),
        scores=scores,
        ref_logprobs=ref_logprobs,
        kl=torch.where(rollout.response_mask, kl, 0.0),
        old_values=old_values,
    )


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
    batch: Judged, cfg: PPOStage, *, kl_coef: float
) -> tuple[Batch, dict[str, float]]:
    """Per-token rewards, then advantages by the algorithm, then whitening over all processes.

    Args:
        batch: judged.
        cfg: the stage's settings.
        kl_coef: of this step, as the controller has it.

    Returns:
        The batch with advantages and returns, and the objective's numbers, over all processes.
    """
    mask, algorithm = batch.response_mask, cfg.algorithm
    inside = kl_coef if cfg.ppo.kl_in == "reward" else 0.0
    rewards = returns.token_rewards(batch.scores, batch.kl, mask, kl_coef=inside)
    if cfg.ppo.whiten_rewards:
        rewards = _whiten(rewards, mask, subtract_mean=False)
    if algorithm.groups:
        whole = torch.where(mask, rewards, 0.0).sum(1)  # [B]
        compare = {"per_prompt": cfg.sampling.per_prompt or 1}
        if algorithm.name == "rloo":
            found = returns.rloo(whole, **compare)
        else:
            found = returns.grpo(whole, **compare, scale=algorithm.scale)
        advantages = targets = returns.spread(found, mask)
    elif algorithm.name == "reinforce_pp":
        advantages = targets = returns.reinforce_pp(rewards, mask, gamma=cfg.ppo.gamma)
    else:
        assert batch.old_values is not None
        advantages, targets = returns.gae(
            rewards, batch.old_values, mask, gamma=cfg.ppo.gamma, lam=cfg.ppo.lam
        )
    stats = _describe(batch, targets, kl_coef)
    if cfg.ppo.whiten_advantages and not algorithm.groups:  # groups have a scale of their own
        advantages = _whiten(advantages, mask, subtract_mean=True)
    known = {f.name: getattr(batch, f.name) for f in fields(Judged)}
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


def update(
    policy: Engine,
    critic: Engine | None,
    batch: Batch,
    cfg: PPOStage,
    *,
    step: int,
    kl_coef: float,
    demonstrations: ptx.Demonstrations | None = None,
    ratios: list[Tensor] | None = None,
) -> dict[str, float]:
    """`epochs` passes of `minibatches` optimizer steps each, over all processes together.

    In the first `ppo.critic_warmup` steps the policy stands still. `kl_coef` is that of this step
    and matters here where KL is a term of the loss. `demonstrations`
    are what `ppo.ptx_coef` mixes in: as many rows per optimizer step as there are answers. `ratios`
    gets the probability ratios of this process's tokens, one tensor for each policy pass.

    Returns:
        Losses and statistics, each a mean over the step's updates; learning rates as they were
        at the first of them.

    Raises:
        StoppedByGuard: one of them is not finite.
    """
    device = batch.prompts.device
    totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))
    norms: dict[str, list[float]] = defaultdict(list)
    generator = torch.Generator().manual_seed(mix(mix(cfg.seed) - step) & (2**63 - 1))
    warming_up = critic is not None and step <= cfg.ppo.critic_warmup
    trained: dict[str, Engine] = {} if warming_up else {"policy": policy}
    if critic is not None:
        trained["val"] = critic
    for model in trained.values():
        model.module.train()
    rates = {f"{name}/learning_rate": model.learning_rate for name, model in trained.items()}
    batch = of_all_ranks(batch, per_prompt=cfg.sampling.per_prompt or 1)
    size, micro_size = _sizes(cfg.ppo)
    turns = itertools.count((step - 1) * cfg.ppo.epochs * cfg.ppo.minibatches + 1)
    for _ in range(cfg.ppo.epochs):
        order = torch.randperm(len(batch), generator=generator).to(device)
        for chosen in order.split(size * world_size()):
            minibatch, turn = batch.rows(chosen[rank() :: world_size()]), next(turns)
            count = engine.sum_over_ranks(minibatch.response_mask.sum())
            for name, model in trained.items():
                shown: Iterator[ptx.Shown | None] = itertools.repeat(None)
                if demonstrations is not None and name == "policy":
                    shown = demonstrations.parts(turn, size)
                for micro in minibatch.micro(micro_size):
                    if name == "policy":
                        found = _train_policy(
                            model, micro, count, cfg, kl_coef, next(shown), ratios
                        )
                    else:
                        found = _train_critic(model, micro, count, cfg)
                    for stat, value in found.items():
                        totals[stat] = totals[stat] + value.detach()
                if (norm := model.grad_norm) is not None:
                    norms[f"{name}/grad_norm"].append(norm)
    updates = cfg.ppo.epochs * cfg.ppo.minibatches
    stats = {n: float(engine.sum_over_ranks(total)) / updates for n, total in totals.items()}
    for name, mean in stats.items():
        if not math.isfinite(mean):
            raise StoppedByGuard(
                f"{name} became {mean} in this update. The policy diverged: lower "
                f"ppo.learning_rate={cfg.ppo.learning_rate:g} or ppo.critic_learning_rate="
                f"{cfg.ppo.critic_learning_rate:g}, or raise ppo.kl_coef={cfg.ppo.kl_coef:g}."
            )
    return stats | rates | {name: sum(found) / len(found) for name, found in norms.items()}


def _train_policy(
    policy: Engine,
    micro: Batch,
    count: Tensor,
    cfg: PPOStage,
    kl_coef: float,
    shown: ptx.Shown | None,
    ratios: list[Tensor] | None = None,
) -> dict[str, Tensor]:
    """One micro-batch through the policy; each statistic is its part of the minibatch mean."""
    everything = logits = temperate_logits(policy.module, micro, cfg.sampling)
    if cfg.sampling.truncates:
        logits = restrict(everything, micro.responses, micro.floors)
    mask = micro.response_mask
    new_logprobs = torch.where(mask, losses.logprobs_of(logits, micro.responses), 0.0)
    if ratios is not None:
        ratios.append((new_logprobs.detach() - micro.old_logprobs)[mask].exp())
    loss, stats = losses.ppo_policy_loss(
        new_logprobs,
        micro.old_logprobs,
        micro.advantages,
        mask,
        cliprange=cfg.ppo.cliprange,
        cliprange_high=cfg.ppo.cliprange_high,
        dual_clip=cfg.ppo.dual_clip,
        count=count,
    )
    stats = {"loss/policy": loss, **stats}
    if cfg.ppo.kl_in == "loss":
        plain = new_logprobs
        if cfg.sampling.truncates:
            plain = losses.logprobs_of(everything, micro.responses)
        kl, more = losses.kl_loss(
            plain,
            micro.ref_logprobs,
            mask,
            estimator=cfg.ppo.kl_estimator,
            count=count,
        )
        loss, stats = loss + kl_coef * kl, stats | {"loss/kl": kl, **more}
    if cfg.ppo.entropy_coef:
        entropy = masked_mean(losses.entropy_of(logits), mask, count=count)
        loss, stats = loss - cfg.ppo.entropy_coef * entropy, stats | {"policy/entropy": entropy}
    if shown is not None:
        imitation = ptx.loss(policy.module, shown)
        loss, stats = loss + cfg.ppo.ptx_coef * imitation, stats | {"loss/ptx": imitation}
    policy.backward(loss)
    policy.step()
    return stats


def _train_critic(critic: Engine, micro: Batch, count: Tensor, cfg: PPOStage) -> dict[str, Tensor]:
    """The same for the critic."""
    assert micro.old_values is not None
    loss, stats = losses.ppo_value_loss(
        values(critic.module, micro),
        micro.old_values,
        micro.returns,
        micro.response_mask,
        cliprange_value=math.inf if cfg.ppo.cliprange_value is None else cfg.ppo.cliprange_value,
        count=count,
    )
    critic.backward(cfg.ppo.vf_coef * loss)
    critic.step()
    return {"loss/value": loss, **stats}


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
