"""Policies whose optimum is known in closed form: pi_ref * exp(r / b) / Z, at a KL price of b.

(Ziegler et al. 2019; Rafailov et al. 2023, eq. 4, with b = kl_coef.) The task is small enough to
write every answer down, and the policy is a real model trained by the real steps.
"""

from __future__ import annotations

from dataclasses import replace

import ppo_steps
import pytest
import torch
from test_ppo import drawn, make_roles, stage

from rlhf import ppo
from rlhf.config import AlgorithmConfig
from rlhf.methods.settings import FullConfig

__all__ = ["make_roles"]  # fixtures
pytestmark = pytest.mark.usefixtures("process_group")

VOCABULARY = 12
PROMPT = [1, 5]
PRICE = 0.5  # of a nat
REWARD = torch.tensor([0.0, 1.0, -0.5, 0.3, 0.9, -1.0, 0.2, 0.6, -0.2, 0.8, 0.1, -0.7])
BONUS = (7, 4)  # first and second token of the answer that pays


@torch.no_grad()
def first_token(model):
    """p(token | PROMPT), by a plain forward pass."""
    return torch.softmax(model(torch.tensor([PROMPT])).logits[0, -1].double(), -1)


@torch.no_grad()
def two_tokens(model):
    """[V, V] p(first, second | PROMPT)."""
    ids = torch.tensor([[*PROMPT, first] for first in range(VOCABULARY)])
    second = torch.softmax(model(ids).logits[:, -1].double(), -1)
    return first_token(model)[:, None] * second


def total_variation(p, q):
    return float((p - q).abs().sum()) / 2


def train(make_roles, cfg, reward_of):
    """Train on rewards of whole answers; returns the roles."""
    roles = make_roles(FullConfig(), vocabulary=VOCABULARY, initializer_range=0.1)
    if not cfg.algorithm.critic:
        roles = replace(roles, critic=None)
    policy, critic = ppo.engines(roles.policy, roles.critic, cfg.ppo, cfg.engine)
    for step in range(1, cfg.ppo.steps + 1):
        found = drawn(roles.policy, cfg, prompts=[PROMPT] * cfg.ppo.batch_size, seed=step)
        scores = torch.tensor([reward_of(answer) for answer in found.answer_ids()])
        batch = ppo_steps.judge(found, scores, roles, cfg)
        batch, _ = ppo_steps.estimate_advantages(batch, cfg)
        ppo_steps.update(policy, critic, batch, cfg, step=step)
    return roles


def settings(name, *, new, **more):
    given = {"batch_size": 256, "micro_batch_size": 256, "epochs": 1, "minibatches": 1}
    given |= {"kl_coef": PRICE, "missing_eos_penalty": 0.0, "schedule": "linear", "lam": 1.0}
    cfg = stage(new=new, **(given | more))
    each = 4 if name in ("rloo", "grpo") else 1
    return replace(
        cfg, algorithm=AlgorithmConfig(name), sampling=replace(cfg.sampling, per_prompt=each)
    )


@pytest.mark.parametrize(
    "name",
    ["ppo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rloo", "reinforce_pp"))],
)
def test_one_token_answers_end_at_the_known_optimum(make_roles, name):
    cfg = settings(name, new=1, steps=120, learning_rate=1e-2, critic_learning_rate=1e-2)
    roles = train(make_roles, cfg, lambda answer: float(REWARD[answer[0]]))
    reference, policy = first_token(roles.reference), first_token(roles.policy)
    optimum = reference * torch.exp(REWARD.double() / PRICE)
    optimum /= optimum.sum()
    assert total_variation(reference, optimum) > 0.3, "it starts far from there"
    assert total_variation(policy, optimum) < 0.03


def test_a_bonus_at_the_end_reaches_the_first_token(make_roles):
    """Two tokens, one answer pays, and the score lands on the second: credit must travel."""
    cfg = settings("ppo", new=2, steps=150, learning_rate=1e-2, critic_learning_rate=1e-2)
    roles = train(make_roles, cfg, lambda answer: 2.0 * (tuple(answer) == BONUS))
    reference, policy = two_tokens(roles.reference), two_tokens(roles.policy)
    reward = torch.zeros(VOCABULARY, VOCABULARY).double()
    reward[BONUS] = 2.0
    optimum = reference * torch.exp(reward / PRICE)
    optimum /= optimum.sum()
    first, best = policy.sum(1)[BONUS[0]], optimum.sum(1)[BONUS[0]]
    assert float(reference.sum(1)[BONUS[0]]) < 0.5 * float(best)
    assert float(first) == pytest.approx(float(best), abs=0.02)
    assert total_variation(policy.flatten(), optimum.flatten()) < 0.03


def test_without_a_price_the_best_answer_takes_all(make_roles):
    """The optimum depends on kl_coef as it should: 0 leaves no reason to stay."""
    cfg = settings("ppo", new=1, steps=60, learning_rate=1e-2, critic_learning_rate=1e-2)
    cfg = replace(cfg, ppo=replace(cfg.ppo, kl_coef=0.0))
    roles = train(make_roles, cfg, lambda answer: float(REWARD[answer[0]]))
    assert float(first_token(roles.policy)[REWARD.argmax()]) > 0.8
