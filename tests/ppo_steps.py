"""One step of PPO with a stage's settings: what tests ask of `rlhf.ppo`, each in a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf import engine, ppo, proofs
from rlhf.batch import Batch, Judged
from rlhf.config import PPOStage
from rlhf.monitor import Evidence, StoppingRules
from rlhf.roles import Roles
from rlhf.rollout import Prompt, Rollout, Sampler, share


def judge(
    rollout: Rollout, scores: Tensor, roles: Roles, cfg: PPOStage, **shaping: float
) -> Judged:
    return ppo.judge(rollout, scores, roles, cfg.ppo, cfg.sampling, **shaping)


def estimate_advantages(
    judged: Judged, cfg: PPOStage, *, kl_coef: float | None = None
) -> tuple[Batch, dict[str, float]]:
    """`kl_coef`: the one that was set, where none is given."""
    coef = cfg.ppo.kl_coef if kl_coef is None else kl_coef
    return ppo.estimate_advantages(judged, cfg.ppo, cfg.algorithm, cfg.sampling, kl_coef=coef)


def learner(policy: Any, critic: Any, cfg: PPOStage, demonstrations: Any = None) -> ppo.Learner:
    """Of engines, or of what stands in for them."""
    return ppo.Learner(policy, critic, cfg.ppo, cfg.sampling, cfg.seed, demonstrations)


def update(
    policy: Any,
    critic: Any,
    batch: Batch,
    cfg: PPOStage,
    *,
    step: int,
    kl_coef: float | None = None,
    demonstrations: Any = None,
) -> dict[str, float]:
    coef = cfg.ppo.kl_coef if kl_coef is None else kl_coef
    made = learner(policy, critic, cfg, demonstrations)
    stats = made.update(batch, step=step, kl_coef=coef)
    assert stats.pop("episode") == step * cfg.ppo.batch_size
    return stats


def save(policy: Any, critic: Any, folder: Path) -> None:
    """A learner's part of a checkpoint."""
    for name, part in parts(policy, critic).items():
        part.save(folder / name)


def load(policy: Any, critic: Any, folder: Path) -> None:
    cfg = PPOStage(run_name="any")
    state = {name: folder / name for name in parts(policy, critic)}
    learner(policy, critic, cfg).load_state_dict(state)


def parts(policy: Any, critic: Any) -> dict[str, Any]:
    return learner(policy, critic, PPOStage(run_name="any")).state_dict()


def start(roles: Roles, judged: Judged, cfg: PPOStage) -> dict[str, float]:
    return proofs.start(roles, judged, cfg.sampling, dtype=engine.dtype(cfg.engine))


def frozen(roles: Roles, reward_models: Any, judged: Judged, cfg: PPOStage) -> proofs.Frozen:
    return proofs.Frozen(
        roles,
        reward_models,
        judged,
        cfg.sampling,
        micro_batch_size=cfg.ppo.micro_batch_size,
        dtype=engine.dtype(cfg.engine),
    )


def stopping(cfg: PPOStage, folder: Path, renderer: Any) -> StoppingRules:
    return StoppingRules(
        *(cfg.stop, cfg.ppo, cfg.sampling, folder, renderer),
        dtype=cfg.engine.dtype,
        foreign=cfg.allow_foreign_rm,
    )


def evidence(cfg: PPOStage, **known: Any) -> Evidence:
    return Evidence(cfg=cfg.ppo, dtype=cfg.engine.dtype, foreign=cfg.allow_foreign_rm, **known)


def draw(policy: Any, prompts: list[list[int]], cfg: PPOStage, renderer: Any, *, step: int) -> Any:
    """This process's answers to each of `prompts`, `sampling.per_prompt` times."""
    asked = [
        Prompt(ids, {}, key) for key, ids in share(prompts, per_prompt=cfg.sampling.per_prompt or 1)
    ]
    return Sampler(policy, renderer, cfg.sampling, cfg.seed).rollout(asked, step=step)
