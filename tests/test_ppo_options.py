"""Every option of PPO changes the number it should; and the estimators without a critic."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import ppo_steps
import pytest
import torch
from test_ppo import (
    EOS,
    FULL,
    assert_same,
    drawn,
    judge,
    judged,
    make_roles,
    noisy,
    off_policy,
    ready,
    stage,
    updated,
    weights,
)
from torch.testing import assert_close

from rlhf import ppo
from rlhf.config import AlgorithmConfig, PPOConfig, PPOStage, SamplingConfig
from rlhf.controllers import AdaptiveKL, FixedKL
from rlhf.errors import ConfigError
from rlhf.rewards import Verdict

__all__ = ["make_roles"]  # fixtures
pytestmark = pytest.mark.usefixtures("process_group")


def algorithm(name, cfg=None, *, per_prompt=4, scale=True):
    cfg = stage() if cfg is None else cfg
    each = per_prompt if name in ("rloo", "grpo") else 1
    sampling = replace(cfg.sampling, per_prompt=each)
    return replace(cfg, algorithm=AlgorithmConfig(name, scale=scale), sampling=sampling)


def rewards_by_row(batch, kl_coef):
    """score - kl_coef * KL of each answer, row by row."""
    kl = [float(row[mask].sum()) for row, mask in zip(batch.kl, batch.response_mask, strict=True)]
    return [float(s) - kl_coef * k for s, k in zip(batch.scores, kl, strict=True)]


# estimators --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_answers_are_compared_within_their_prompt(make_roles, name, scale):
    cfg = algorithm(name, stage(kl_coef=0.3), scale=scale)
    batch = noisy(judged(replace(make_roles(), critic=None), cfg))
    found, stats = ppo_steps.estimate_advantages(batch, cfg)
    rewards = rewards_by_row(batch, 0.3)
    for row in range(8):
        group = rewards[row // 4 * 4 : row // 4 * 4 + 4]
        mean = sum(group) / 4
        if name == "rloo":
            expected = rewards[row] - (sum(group) - rewards[row]) / 3
        else:
            std = (sum((r - mean) ** 2 for r in group) / 3) ** 0.5
            expected = (rewards[row] - mean) / ((std + 1e-4) if scale else 1)
        mask = batch.response_mask[row]
        assert found.advantages[row][mask].tolist() == pytest.approx(
            [expected] * int(mask.sum()), rel=1e-5, abs=1e-6
        )
        assert not found.advantages[row][~mask].any()
    assert not any(name.startswith("val/") for name in stats)


def test_reinforce_pp_is_the_reward_to_come_whitened_over_the_batch(make_roles):
    cfg = algorithm("reinforce_pp", stage(kl_coef=0.3, gamma=0.9))
    batch = noisy(ready(make_roles(), stage()))
    found, _ = ppo_steps.estimate_advantages(batch, cfg)
    to_come = []
    for row, mask in enumerate(batch.response_mask):
        kl = batch.kl[row][mask].tolist()
        rewards = [-0.3 * k for k in kl]
        rewards[-1] += float(batch.scores[row])
        to_come += [
            sum(0.9 ** (n - t) * rewards[n] for n in range(t, len(kl))) for t in range(len(kl))
        ]
    mean = sum(to_come) / len(to_come)
    std = (sum((x - mean) ** 2 for x in to_come) / len(to_come)) ** 0.5
    expected = [(x - mean) / std for x in to_come]
    assert found.advantages[batch.response_mask].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["rloo", "grpo", "reinforce_pp"])
def test_without_a_critic_the_policy_learns_all_the_same(make_roles, name):
    roles = replace(make_roles(), critic=None)
    cfg = algorithm(name, stage(learning_rate=1e-2))
    batch = judge(drawn(roles.policy, cfg), roles, cfg)
    assert batch.old_values is None
    batch, _ = ppo_steps.estimate_advantages(batch, cfg)
    policy, critic = ppo.engines(roles.policy, roles.critic, cfg.ppo, cfg.engine)
    assert critic is None
    before = weights(roles.policy)
    stats = ppo_steps.update(policy, critic, batch, cfg, step=1)
    assert not any(key.startswith("val/") or key == "loss/value" for key in stats)
    assert max(float((t - before[n]).abs().max()) for n, t in weights(roles.policy).items()) > 1e-3


def test_a_checkpoint_without_a_critic_comes_back(make_roles, tmp_path):
    roles, cfg = replace(make_roles(), critic=None), algorithm("rloo", stage(learning_rate=1e-2))
    batch = noisy(judged(roles, cfg))
    batch, _ = ppo_steps.estimate_advantages(batch, cfg)
    policy, critic = ppo.engines(roles.policy, None, cfg.ppo, cfg.engine)
    ppo_steps.update(policy, critic, batch, cfg, step=1)
    kept = weights(roles.policy)
    ppo_steps.save(policy, critic, tmp_path / "kept")
    ppo_steps.update(policy, critic, batch, cfg, step=2)
    ppo_steps.load(policy, critic, tmp_path / "kept")
    assert_same(kept, weights(roles.policy), rtol=0, atol=0)
    assert not (tmp_path / "kept" / "critic").exists()


def test_groups_need_more_than_one_answer():
    assert PPOStage(run_name="t", algorithm=AlgorithmConfig("rloo")).sampling.per_prompt == 4
    assert PPOStage(run_name="t").sampling.per_prompt == 1
    with pytest.raises(ConfigError, match=r"sampling\.per_prompt=1 with algorithm=grpo"):
        PPOStage(
            run_name="t", algorithm=AlgorithmConfig("grpo"), sampling=SamplingConfig(per_prompt=1)
        )
    with pytest.raises(ConfigError, match=r"algorithm\.name=ppo2"):
        AlgorithmConfig("ppo2")


# scores ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_scores_are_shaped_before_penalties(make_roles):
    roles = make_roles()
    found = drawn(roles.policy, stage())
    raw = judge(found, roles, stage(missing_eos_penalty=0.0)).scores
    cfg = stage(missing_eos_penalty=2.0, score_clip=0.1)
    shaped = judge(found, roles, cfg, bias=0.05, scale=0.5).scores
    expected = [
        min(max((float(s) - 0.05) / 0.5, -0.1), 0.1) - (0.0 if ended else 2.0)
        for s, ended in zip(raw, found.ended, strict=True)
    ]
    assert shaped.tolist() == pytest.approx(expected, abs=1e-6)
    assert 0 < int(found.ended.sum()) < 8
    assert len({round(x, 4) for x in expected}) > 2


@torch.no_grad()
def test_long_answers_lose_more_and_more(make_roles):
    roles = make_roles()
    found = drawn(roles.policy, stage())
    plain = judge(found, roles, stage()).scores
    cfg = stage(overlong_buffer=6, overlong_penalty=3.0)
    lowered = judge(found, roles, cfg).scores
    lengths = found.response_mask.sum(1).tolist()
    expected = [-3.0 * max(0, length - 4) / 6 for length in lengths]  # the limit is 10
    assert (lowered - plain).tolist() == pytest.approx(expected, abs=1e-5)
    assert min(lengths) <= 4 < max(lengths)


def test_sft_scores_set_bias_and_scale():
    scores = [1.0, 3.0, 5.0, 7.0]
    std = (sum((x - 4) ** 2 for x in scores) / 4) ** 0.5
    assert ppo.standard_scores(scores, PPOConfig()) == {"bias": 0.0, "scale": 1.0}
    cfg = PPOConfig(center_scores=True, scale_scores=True)
    assert ppo.standard_scores(scores, cfg) == pytest.approx({"bias": 4.0, "scale": std})
    assert ppo.standard_scores([2.0, 2.0], cfg)["scale"] > 0  # all alike


def test_whitened_rewards_have_variance_one_and_keep_their_mean(make_roles):
    """Seen through returns: with gamma 1, lam 1 the first one is the sum of an answer's rewards."""
    batch = noisy(ready(make_roles(), stage()))
    cfg = stage(kl_coef=0.3, whiten_rewards=True, gamma=1.0, lam=1.0)
    found, _ = ppo_steps.estimate_advantages(batch, cfg)
    rewards = []
    for row, mask in enumerate(batch.response_mask):
        rewards.append([-0.3 * k for k in batch.kl[row][mask].tolist()])
        rewards[-1][-1] += float(batch.scores[row])
    flat = [r for row in rewards for r in row]
    mean = sum(flat) / len(flat)
    std = (sum((r - mean) ** 2 for r in flat) / len(flat)) ** 0.5
    for row, mine in enumerate(rewards):
        expected = sum((r - mean) / std + mean for r in mine)
        assert float(found.returns[row, 0]) == pytest.approx(expected, abs=1e-4)


# KL ----------------------------------------------------------------------------------------------


def test_kl_in_the_loss_leaves_the_reward_alone(make_roles):
    batch = noisy(ready(make_roles(), stage()))
    inside, _ = ppo_steps.estimate_advantages(batch, stage(kl_coef=0.3), kl_coef=0.3)
    outside, stats = ppo_steps.estimate_advantages(
        batch, stage(kl_coef=0.3, kl_in="loss"), kl_coef=0.3
    )
    without, _ = ppo_steps.estimate_advantages(batch, stage(kl_coef=0.3), kl_coef=0.0)
    assert_close(outside.returns, without.returns, rtol=0, atol=0)
    assert float((inside.returns - outside.returns).abs().max()) > 0.01
    assert stats["objective/kl_coef"] == 0.3


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_in_the_loss_is_the_mean_estimate_of_all_tokens(make_roles, estimator):
    """At the first pass, from the log-probabilities of the batch itself."""
    roles = make_roles()
    cfg = stage(kl_coef=0.3, kl_in="loss", kl_estimator=estimator, micro_batch_size=2, epochs=1)
    batch = noisy(ready(roles, cfg))
    shifted = batch.ref_logprobs - 0.2 * batch.response_mask  # a reference that is elsewhere
    batch = replace(batch, ref_logprobs=shifted)
    stats, *_ = updated(roles, batch, cfg)
    d = (batch.old_logprobs - batch.ref_logprobs)[batch.response_mask].double()
    expected = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[estimator].mean()
    assert stats["loss/kl"] == pytest.approx(float(expected), rel=1e-3)
    assert stats["policy/kl"] == pytest.approx(float(d.mean()), rel=1e-3)


def test_kl_in_the_loss_pulls_the_policy_back(make_roles):
    """No reward at all, a policy that moved: only this term can bring it nearer."""
    distances = {}
    for coef in (0.0, 5.0):
        roles = make_roles(FULL)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(4)
            for parameter in roles.policy.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        cfg = stage(kl_coef=coef, kl_in="loss", epochs=4, minibatches=2, learning_rate=3e-3)
        batch = ready(roles, cfg)
        nothing = torch.zeros_like(batch.advantages)
        updated(roles, replace(batch, advantages=nothing), cfg)
        with torch.no_grad():
            now = ppo.logprobs(roles.policy, batch, cfg.sampling)
        distances[coef] = float((now - batch.ref_logprobs)[batch.response_mask].square().mean())
    assert distances[5.0] < 0.6 * distances[0.0]


def test_the_price_of_kl_is_fixed_or_steered():
    assert isinstance(ppo.kl_controller(PPOConfig()), FixedKL)
    cfg = PPOConfig(kl_coef=0.1, kl_target=2.0, kl_horizon=640)
    price = ppo.kl_controller(cfg)
    assert isinstance(price, AdaptiveKL)
    price.update(9.0, 64)  # far above: +0.2 * 64 / 640
    assert price.coef == pytest.approx(0.1 * 1.02)
    with pytest.raises(ConfigError, match=r"ppo\.kl_target=2\.0 with ppo\.kl_coef=0"):
        PPOConfig(kl_coef=0.0, kl_target=2.0)


def test_the_price_of_a_step_is_the_one_that_is_paid(make_roles):
    batch = noisy(ready(make_roles(), stage()))
    dear, stats = ppo_steps.estimate_advantages(batch, stage(kl_coef=0.1), kl_coef=0.7)
    same, _ = ppo_steps.estimate_advantages(batch, stage(kl_coef=0.7), kl_coef=0.7)
    assert torch.equal(dear.returns, same.returns)
    assert stats["objective/kl_coef"] == 0.7


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_terms_are_averaged_wherever_the_scores_are(make_roles, device):
    cfg = stage()
    rollout = drawn(make_roles().policy, cfg)
    rollout = replace(rollout, **{n: x.to(device) for n, x in rollout.tensors().items()})
    scores = torch.arange(8.0, device=device)
    reward = SimpleNamespace(score=lambda *_, **__: Verdict(scores, {"a": 2 * scores}, scores + 1))
    rows = [{"prompt": [{"content": ""}]}] * 8
    renderer = SimpleNamespace(decode=str)
    verdict, means = ppo.score(rollout, reward, rows, renderer, micro_batch_size=4)
    assert verdict.scores is scores
    assert means == {"objective/scores/a": 7.0, "objective/scores_spread": 4.5}


# policy ------------------------------------------------------------------------------------------


def test_clip_higher_and_dual_clip_stop_other_tokens(make_roles):
    """Counted by hand on ratios that lie on all sides."""
    roles = make_roles()
    batch = off_policy(noisy(ready(roles, stage())))
    batch, _ = ppo_steps.estimate_advantages(batch, stage(), kl_coef=stage().ppo.kl_coef)
    with torch.no_grad():
        now = ppo.logprobs(roles.policy, batch, stage().sampling)
    mask = batch.response_mask
    ratio = (now - batch.old_logprobs)[mask].exp()
    good = batch.advantages[mask] > 0
    for settings, stopped in (
        ({}, (good & (ratio > 1.2)) | (~good & (ratio < 0.8))),
        ({"cliprange_high": 0.4}, (good & (ratio > 1.4)) | (~good & (ratio < 0.8))),
        (
            {"dual_clip": 1.3},
            (good & (ratio > 1.2)) | (~good & (ratio < 0.8)) | (~good & (ratio > 1.3)),
        ),
    ):
        fresh = make_roles()
        stats, *_ = updated(fresh, batch, stage(epochs=1, learning_rate=1e-9, **settings))
        assert stats["policy/clipfrac"] == pytest.approx(float(stopped.float().mean()), abs=1e-6)
    counts = {float(s) for s in (ratio > 1.2, ratio > 1.4) for s in [s.sum()]}
    assert len(counts) == 2, "the settings could not be told apart"


def test_the_entropy_bonus_spreads_the_policy(make_roles):
    entropies = {}
    for coef in (0.0, 1.0):
        roles = make_roles(FULL)
        cfg = stage(entropy_coef=coef, epochs=4, learning_rate=3e-3)
        batch = ready(roles, cfg)
        batch = replace(batch, advantages=torch.zeros_like(batch.advantages))
        stats, *_ = updated(roles, batch, cfg)
        with torch.no_grad():
            logits = ppo.temperate_logits(roles.policy, batch, cfg.sampling)
        p = logits.softmax(-1)[batch.response_mask]
        entropies[coef] = float(-(p * p.clamp(min=1e-30).log()).sum(-1).mean())
        assert ("policy/entropy" in stats) == (coef > 0)
    assert entropies[1.0] > entropies[0.0] + 0.05


def test_while_the_critic_warms_up_the_policy_stands_still(make_roles):
    roles = make_roles()
    cfg = stage(critic_warmup=2, learning_rate=1e-2, critic_learning_rate=1e-2)
    batch = noisy(ready(roles, cfg))
    batch, _ = ppo_steps.estimate_advantages(batch, cfg)
    policy, critic = ppo.engines(roles.policy, roles.critic, cfg.ppo, cfg.engine)
    before = weights(roles.policy), weights(roles.critic)
    for step in (1, 2):
        stats = ppo_steps.update(policy, critic, batch, cfg, step=step)
        assert not any(name.startswith("policy/") for name in stats)
    assert_same(weights(roles.policy), before[0], rtol=0, atol=0)
    moved = {n for n, t in weights(roles.critic).items() if not torch.equal(t, before[1][n])}
    assert moved
    ppo_steps.update(policy, critic, batch, cfg, step=3)
    changed = weights(roles.policy)
    assert any(not torch.equal(t, before[0][n]) for n, t in changed.items())


def test_eos_is_a_token_like_any_other_to_the_options(make_roles):
    """The end is trained: its log-probability moves with an advantage of its own."""
    roles = make_roles(FULL)
    cfg = stage(epochs=2, learning_rate=3e-3)
    batch = ready(roles, cfg)
    ends = (batch.responses == EOS) & batch.response_mask
    assert bool(ends.any())
    batch = replace(batch, advantages=torch.where(ends, 1.0, 0.0))
    updated(roles, batch, cfg)
    with torch.no_grad():
        now = ppo.logprobs(roles.policy, batch, cfg.sampling)
    assert float((now - batch.old_logprobs)[ends].mean()) > 0.05


# schedules ---------------------------------------------------------------------------------------


def rates(make_roles, **settings):
    """[(policy's, critic's learning rate)] at the first update of each of four steps, and after."""
    cfg = stage(steps=4, epochs=1, minibatches=2, schedule="linear", **settings)
    roles = make_roles()
    batch = ready(roles, cfg)
    policy, critic = ppo.engines(roles.policy, roles.critic, cfg.ppo, cfg.engine)
    found = []
    for step in range(1, 5):
        stats = ppo_steps.update(policy, critic, batch, cfg, step=step)
        found.append((stats.get("policy/learning_rate"), stats["val/learning_rate"]))
    return [*found, (policy.learning_rate, critic.learning_rate)]


def test_policy_and_critic_have_schedules_of_their_own(make_roles):
    same = [1e-3, 0.75e-3, 0.5e-3, 0.25e-3, 0.0]
    assert rates(make_roles) == [pytest.approx((rate, rate)) for rate in same]
    found = rates(make_roles, critic_schedule="constant", critic_learning_rate=2e-3)
    assert found == [pytest.approx((rate, 2e-3)) for rate in same]


def test_the_policys_schedule_leaves_out_the_steps_in_which_it_stands_still(make_roles):
    found = rates(make_roles, critic_warmup=2)
    assert [policy for policy, _ in found[:2]] == [None, None]
    assert [policy for policy, _ in found[2:]] == pytest.approx([1e-3, 0.5e-3, 0.0])
    assert [critic for _, critic in found] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3, 0.0])


def test_a_policy_that_would_never_learn_is_refused():
    with pytest.raises(ConfigError, match=r"ppo\.critic_warmup=5 with ppo\.steps=5: the policy"):
        PPOConfig(steps=5, critic_warmup=5)


@pytest.mark.parametrize("role", [1, 2], ids=["policy", "critic"])
def test_adam_epsilon_is_added_to_the_root_of_the_second_moment(make_roles, role):
    """Of one gradient g a first step makes lr * g / (|g| + epsilon)."""

    def moved(epsilon):
        rates = {"learning_rate": 1.0, "critic_learning_rate": 1.0}
        cfg = stage(epochs=1, adam_epsilon=epsilon, max_grad_norm=1e9, **rates)
        roles = make_roles(FULL)
        before = weights(roles.policy if role == 1 else roles.critic)
        after = updated(roles, noisy(ready(roles, cfg)), cfg)[role]
        return torch.cat([(after[n] - before[n]).flatten() for n in before]).double()

    large, small = moved(10.0), moved(0.01)
    size = 10.0 * large.abs() / (1 - large.abs())  # |g|, of |step| = |g| / (|g| + 10)
    assert float(size.max()) > 0.01
    assert_close(small, large.sign() * size / (size + 0.01), rtol=0, atol=1e-3)
