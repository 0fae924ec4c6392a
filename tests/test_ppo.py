"""PPO's steps: against one row at a time, the pure functions, and on a toy it must solve."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import fields, replace

import ppo_steps
import pytest
import torch
from launching import start_ranks
from rounding import TINY
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from rlhf import engine, models, ppo
from rlhf.batch import Batch
from rlhf.config import EngineConfig, PPOConfig, PPOStage, SamplingConfig
from rlhf.errors import StoppedByGuard
from rlhf.methods.settings import FullConfig, LoraConfig
from rlhf.returns import gae, token_rewards
from rlhf.roles import Roles
from rlhf.rollout import sample, share

pytestmark = pytest.mark.usefixtures("process_group")

PAD, EOS = 0, 2
VOCABULARY = 24
CLOSE = {"rtol": 0, "atol": TINY}
PROMPTS = [[1, 5, 6], [1, 7], [1, 8, 9, 10, 11], [1, 13], [1, 14, 15], [1, 5], [1, 9, 9], [1, 3]]
FULL, LORA = FullConfig(), LoraConfig(rank=4)


def stage(*, temperature=1.0, top_k=None, top_p=None, zero_stage=2, seed=0, new=10, **settings):
    settings = {
        "batch_size": 8,
        "micro_batch_size": 4,
        "steps": 5,
        "schedule": "constant",
    } | settings
    settings = {"learning_rate": 1e-3, "critic_learning_rate": 1e-3} | settings
    return PPOStage(
        run_name="t",
        seed=seed,
        sampling=SamplingConfig(
            temperature=temperature, top_k=top_k, top_p=top_p, max_new_tokens=new
        ),
        engine=EngineConfig(zero_stage=zero_stage),
        ppo=PPOConfig(**settings),
    )


@pytest.mark.parametrize(
    ("held_out", "value"),
    [
        ({}, None),
        ({"eval/score": 3.0, "eval/kl": 1.0}, 3.0),
        ({"eval/score": 3.0, "eval/second": 2.0, "eval/kl": 1.0}, 2.0),
        ({"eval/score": 3.0, "eval/second": 2.0, "eval/gold": 0.0, "eval/kl": 4.0}, 0.0),
        ({"eval/gold": 1.0, "eval/kl": 4.1}, None),
        ({"eval/second": math.nan, "eval/score": 3.0}, None),  # or no later one would be better
    ],
)
def test_what_the_best_checkpoint_is_chosen_by(held_out, value):
    assert ppo.worth(held_out, PPOConfig(kl_budget=4.0)) == value


class Ids:
    """The special ids, all that is asked of a tokenizer here."""

    pad_token_id, bos_token_id, eos_token_id = PAD, 1, EOS


def scalar_model(causal, tokenizer, folder, seed):
    """As `models.load_scalar` gives it, with a head large enough to see."""
    causal.save_pretrained(folder)
    model = models.load_scalar(folder, tokenizer, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.score.weight.copy_(0.3 * torch.randn(1, 32, generator=generator))
    return model


@pytest.fixture
def make_roles(tiny_model, tmp_path):
    """A factory: four small models, the critic of another backbone than the reward model's."""

    def make(method=LORA, *, vocabulary=VOCABULARY, **settings):
        def causal(seed):
            return tiny_model(seed=seed, vocab_size=vocabulary, **settings)

        def scalar(seed):
            return scalar_model(causal(seed), Ids(), tmp_path / f"{seed}", seed)

        torch.manual_seed(0)  # an adapter's first values
        return Roles(
            policy=models.trainable(causal(0), method),
            reference=models.freeze(causal(0)),
            critic=models.trainable(scalar(1), method, head=True).eval(),
            reward_model=models.freeze(scalar(2)),
        )

    return make


def drawn(policy, cfg, *, prompts=PROMPTS, seed=3):
    return sample(
        policy,
        prompts,
        keys=range(len(prompts)),
        seed=seed,
        cfg=cfg.sampling,
        pad_id=PAD,
        eos_id=EOS,
        device=torch.device("cpu"),
    )


@torch.no_grad()
def judge(found, roles, cfg, **shaping):
    """By the reward model of `roles` alone."""
    scores = models.scores(roles.reward_model, found.ids, found.mask)
    return ppo_steps.judge(found, scores, roles, cfg, **shaping)


def ready(roles, cfg, **options):
    """A judged batch, with advantages."""
    batch = judge(drawn(roles.policy, cfg, **options), roles, cfg)
    return ppo_steps.estimate_advantages(batch, cfg)[0]


def judged(roles, cfg):
    return judge(drawn(roles.policy, cfg), roles, cfg)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert_close(tensor, other[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


# batches -----------------------------------------------------------------------------------------


def test_rows_drop_padding_and_nothing_else(make_roles):
    cfg = stage()
    batch = ready(make_roles(), cfg)
    for index in ([0], [3, 1], [5, 2, 0], list(range(8))):
        part = batch.rows(torch.tensor(index))
        assert len(part) == len(index)
        assert bool(part.prompt_mask[:, 0].any())
        assert bool(part.response_mask[:, -1].any())
        prompts = max(len(PROMPTS[i]) for i in index)
        responses = max(int(batch.response_mask[i].sum()) for i in index)
        assert part.ids.shape == part.mask.shape == (len(index), prompts + responses)
        for row, i in enumerate(index):
            assert part.ids[row, part.mask[row]].tolist() == batch.ids[i, batch.mask[i]].tolist()
            for field in fields(batch):
                new, old = getattr(part, field.name)[row], getattr(batch, field.name)[i]
                if field.name.startswith("prompt"):
                    assert torch.equal(new, old[-prompts:]), field.name
                elif new.dim():
                    assert torch.equal(new, old[:responses]), field.name
                else:
                    assert new == old
    assert [len(part) for part in batch.micro(3)] == [3, 3, 2]
    joined = [row for part in batch.micro(3) for row in part.ids[part.mask].tolist()]
    assert joined == batch.ids[batch.mask].tolist()
    assert len(batch) == 8, "the whole is left as it was"
    assert batch.prompts.shape[1] == 5


# judge -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("micro", [1, 4, 8])
@torch.no_grad()
def test_judge_is_each_row_alone(make_roles, micro, temperature):
    roles = make_roles()
    for parameter in roles.policy.parameters():  # or every KL would be 0
        if parameter.requires_grad:
            parameter += 0.05
    cfg = stage(micro_batch_size=micro, temperature=temperature, missing_eos_penalty=0.0)
    found = drawn(roles.policy, cfg)
    batch = judge(found, roles, cfg)
    assert float(batch.kl.abs().max()) > 0.1
    critic, reward_model = roles.critic.get_base_model(), roles.reward_model
    for row, (prompt, answer) in enumerate(zip(PROMPTS, found.answer_ids(), strict=True)):
        ids, n = torch.tensor([prompt + answer]), len(answer)
        states = slice(len(prompt) - 1, -1)  # from which each token of the answer was drawn
        logits = roles.reference(ids).logits[0, states] / temperature
        ref = torch.log_softmax(logits, -1).gather(1, ids[0, -n:, None]).squeeze(1)
        assert_close(batch.ref_logprobs[row, :n], ref, **CLOSE)
        assert_close(batch.kl[row, :n], found.old_logprobs[row, :n] - ref, **CLOSE)
        values = (critic.score(critic.model(ids).last_hidden_state))[0, states, 0]
        assert_close(batch.old_values[row, :n], values, **CLOSE)
        score = reward_model.score(reward_model.model(ids).last_hidden_state)[0, -1, 0]
        assert_close(batch.scores[row], score, **CLOSE)
        for name in ("ref_logprobs", "kl", "old_values", "old_logprobs"):
            assert not getattr(batch, name)[row, n:].any(), f"{name} is 0 on padding"


def test_missing_eos_is_penalised_exactly_where_it_is_missing(make_roles):
    roles = make_roles()
    cfgs = [stage(missing_eos_penalty=penalty) for penalty in (0.0, 3.0)]
    found = drawn(roles.policy, cfgs[0])
    assert 0 < int(found.ended.sum()) < 8
    without, penalised = (judge(found, roles, cfg) for cfg in cfgs)
    expected = [0.0 if answer[-1] == EOS else 3.0 for answer in found.answer_ids()]
    assert (without.scores - penalised.scores).tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(without.ref_logprobs, penalised.ref_logprobs)


def test_judging_leaves_no_gradient_behind(make_roles):
    roles = make_roles()
    batch = ready(roles, stage())
    tensors = [getattr(batch, field.name) for field in fields(batch)]
    assert not any(tensor.requires_grad for tensor in tensors)


# estimate ----------------------------------------------------------------------------------------


def noisy(batch, seed=0):
    """A batch with numbers of some size everywhere: no KL of 0, no values near each other."""
    generator = torch.Generator().manual_seed(seed)

    def random(like):
        return torch.randn(like.shape, generator=generator)

    mask = batch.response_mask
    return replace(
        batch,
        kl=torch.where(mask, 0.2 * random(batch.kl), 0.0),
        old_values=None if batch.old_values is None else torch.where(mask, random(batch.kl), 0.0),
        scores=1 + random(batch.scores),
    )


@pytest.mark.parametrize("whiten", [False, True])
def test_advantages_are_those_of_the_pure_functions(make_roles, whiten):
    cfg = stage(kl_coef=0.3, gamma=0.9, lam=0.8, whiten_advantages=whiten)
    batch = noisy(ready(make_roles(), cfg))
    found, _ = ppo_steps.estimate_advantages(batch, cfg)
    mask = batch.response_mask
    rewards = token_rewards(batch.scores, batch.kl, mask, kl_coef=0.3)
    advantages, returns = gae(rewards, batch.old_values, mask, gamma=0.9, lam=0.8)
    assert torch.equal(found.returns, returns)
    if whiten:
        real = advantages[mask]
        real = (real - real.mean()) / real.std(correction=0)
        advantages = torch.zeros_like(advantages).masked_scatter(mask, real)
        assert abs(float(found.advantages[mask].mean())) < 1e-6
        assert float(found.advantages[mask].std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert_close(found.advantages, advantages, rtol=0, atol=1e-5)
    assert not found.advantages[~mask].any()


def test_objective_numbers_by_hand(make_roles):
    cfg = stage(kl_coef=0.3)
    batch = noisy(ready(make_roles(), cfg))
    found, stats = ppo_steps.estimate_advantages(batch, cfg)
    rows = [(r[m], m) for r, m in zip(batch.responses, batch.response_mask, strict=True)]
    lengths = [len(answer) for answer, _ in rows]
    kl = sum(float(batch.kl[i][m].sum()) for i, (_, m) in enumerate(rows)) / 8
    score = float(batch.scores.sum()) / 8
    entropy = -sum(float(batch.old_logprobs[i][m].sum()) for i, (_, m) in enumerate(rows))
    returns, values = found.returns[batch.response_mask], batch.old_values[batch.response_mask]
    explained = 1 - (returns - values).var(correction=0) / returns.var(correction=0)
    bigrams = [pair for a, _ in rows for pair in zip(a.tolist(), a.tolist()[1:], strict=False)]
    expected = {
        "objective/kl": kl,
        "objective/kl_max": float(batch.kl.abs().max()),
        "objective/kl_coef": 0.3,
        "objective/scores": score,
        "objective/scores_std": float(batch.scores.std(correction=0)),
        "objective/non_score_reward": -0.3 * kl,
        "objective/rlhf_reward": score - 0.3 * kl,
        "objective/entropy": entropy / sum(lengths),
        "val/explained_variance": float(explained),
        "response/length": sum(lengths) / 8,
        "response/eos_rate": sum(int(a[-1]) == EOS for a, _ in rows) / 8,
        "response/distinct": len(set(bigrams)) / len(bigrams),
    }
    assert stats == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert ppo.tokens(batch) == sum(lengths) + sum(map(len, PROMPTS))


# update ------------------------------------------------------------------------------------------


def updated(roles, batch, cfg, *, step=1):
    policy, critic = ppo.engines(roles.policy, roles.critic, cfg.ppo, cfg.engine)
    stats = ppo_steps.update(policy, critic, batch, cfg, step=step)
    return stats, weights(roles.policy), weights(roles.critic)


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (3, 1), (2, 4)])
def test_number_of_optimizer_steps(make_roles, monkeypatch, epochs, minibatches):
    taken = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *a, **k: taken.append(1) or step(self, *a, **k)
    )
    cfg = stage(epochs=epochs, minibatches=minibatches, micro_batch_size=2)
    roles = make_roles()
    stats, *_ = updated(roles, ready(roles, cfg), cfg)
    assert len(taken) == 2 * epochs * minibatches  # policy and critic
    assert stats["policy/ratio"] == pytest.approx(1, abs=0.2)  # the mean of so many


@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
def test_micro_batch_size_does_not_change_the_weights(make_roles, method):
    found = []
    for micro in (8, 3, 1):  # three do not divide eight: two by two
        roles = make_roles(method)
        cfg = stage(micro_batch_size=micro, epochs=2, whiten_advantages=False)
        batch = noisy(ready(roles, replace_micro(cfg, 8)))
        batch, _ = ppo_steps.estimate_advantages(batch, cfg)
        start = weights(roles.policy) | weights(roles.critic)
        stats, *after = updated(roles, batch, cfg)
        found.append((stats, *after))
    (stats, policy, critic), *others = found
    moved = max(float((t - start[n]).abs().max()) for n, t in (policy | critic).items())
    assert moved > 1e-3
    for other_stats, other_policy, other_critic in others:
        assert other_stats == pytest.approx(stats, rel=1e-3, abs=1e-5)
        assert_same(policy, other_policy, rtol=0, atol=2e-5)
        assert_same(critic, other_critic, rtol=0, atol=2e-5)


@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
def test_recomputed_activations_change_no_weight(make_roles, method, zero_stage):
    found = []
    for checkpointing in (False, True):
        roles = make_roles(method)
        cfg = stage(epochs=2, zero_stage=zero_stage)
        cfg.engine.checkpointing = checkpointing
        batch = ready(roles, cfg)
        passes = []
        for model in (roles.policy, roles.critic):
            layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp"))
            layer.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        policy, critic = ppo.engines(roles.policy, roles.critic, cfg.ppo, cfg.engine)
        stats = ppo_steps.update(policy, critic, batch, cfg, step=1)
        with engine.gathered(roles.policy), engine.gathered(roles.critic):
            found.append((stats, weights(roles.policy) | weights(roles.critic), len(passes)))
    (stats, plain, once), (again, recomputed, twice) = found
    assert twice == 2 * once
    assert again == pytest.approx(stats, rel=1e-4, abs=1e-6)
    assert_same(plain, recomputed, **CLOSE)


def replace_micro(cfg, micro):
    return replace(cfg, ppo=replace(cfg.ppo, micro_batch_size=micro))


def off_policy(batch, seed=1):
    """As after some updates: ratios on both sides of the clip range, values that moved."""
    generator = torch.Generator().manual_seed(seed)
    shift = 0.3 * torch.randn(batch.kl.shape, generator=generator)
    mask = batch.response_mask
    return replace(
        batch,
        old_logprobs=torch.where(mask, batch.old_logprobs + shift, 0.0),
        old_values=torch.where(mask, batch.old_values + shift, 0.0),
    )


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_statistics_are_those_of_the_whole_batch(make_roles, zero_stage):
    cfg = stage(epochs=1, micro_batch_size=2, zero_stage=zero_stage, whiten_advantages=False)
    roles = make_roles()
    batch = off_policy(ready(roles, cfg))
    mask = batch.response_mask
    with torch.no_grad():
        now, values = (
            ppo.logprobs(roles.policy, batch, SamplingConfig())[mask],
            ppo.values(roles.critic, batch)[mask],
        )
    log_ratio = now - batch.old_logprobs[mask]
    ratio, advantages = log_ratio.exp(), batch.advantages[mask]
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    old, targets = batch.old_values[mask], batch.returns[mask]
    clipped = old + (values - old).clamp(-0.2, 0.2)
    error, clipped_error = (values - targets) ** 2, (clipped - targets) ** 2
    expected = {
        "loss/policy": -surrogate.mean(),
        "policy/approxkl": log_ratio.square().mean() / 2,
        "policy/clipfrac": (surrogate < ratio * advantages).float().mean(),
        "policy/ratio": ratio.mean(),
        "loss/value": torch.maximum(error, clipped_error).mean() / 2,
        "val/error": error.mean(),
        "val/clipfrac": (clipped_error > error).float().mean(),
    }
    assert 0 < float(expected["policy/clipfrac"]) < 1
    assert 0 < float(expected["val/clipfrac"]) < 1
    stats, *_ = updated(roles, batch, cfg)
    norms = {
        name: stats.pop(name) for name in ("policy/grad_norm", "val/grad_norm") if name in stats
    }
    assert stats.pop("policy/learning_rate") == stats.pop("val/learning_rate") == 1e-3
    assert stats == pytest.approx({n: float(x) for n, x in expected.items()}, rel=1e-4, abs=1e-6)
    assert len(norms) == 2
    assert all(norm > 0 for norm in norms.values())


def test_first_update_is_on_policy(make_roles):
    cfg = stage(epochs=1, whiten_advantages=False, temperature=0.7)
    roles = make_roles()
    batch = ready(roles, cfg)
    stats, *_ = updated(roles, batch, cfg)
    assert stats["policy/ratio"] == pytest.approx(1, abs=1e-5)
    assert stats["policy/approxkl"] == pytest.approx(0, abs=1e-9)
    assert stats["policy/clipfrac"] == 0
    mean = float(batch.advantages[batch.response_mask].mean())
    assert abs(mean) > 0.05
    assert stats["loss/policy"] == pytest.approx(-mean, abs=1e-5)
    assert stats["val/clipfrac"] == 0


def test_vf_coef_scales_the_critics_gradient_only(make_roles):
    found = {}
    for vf_coef in (0.1, 0.2):
        cfg = stage(epochs=1, vf_coef=vf_coef)
        roles = make_roles()
        found[vf_coef], *_ = updated(roles, ready(roles, cfg), cfg)
    one, two = found[0.1], found[0.2]
    assert two["val/grad_norm"] == pytest.approx(2 * one["val/grad_norm"], rel=1e-4)
    assert two["policy/grad_norm"] == pytest.approx(one["policy/grad_norm"], rel=1e-6)
    assert two["loss/value"] == pytest.approx(one["loss/value"], rel=1e-6)


@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
def test_only_policy_and_critic_learn(make_roles, method):
    cfg = stage(epochs=2, minibatches=2, micro_batch_size=2)
    roles = make_roles(method)
    before = {name: weights(model) for name, model in vars(roles).items()}
    updated(roles, ready(roles, cfg), cfg)
    for name, model in vars(roles).items():
        changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[name][n])}
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert changed == trained, name
        if name in ("reference", "reward_model"):
            assert not trained
            assert all(p.grad is None for p in model.parameters())


def test_minibatches_see_every_row_once_in_an_order_of_their_own(make_roles, monkeypatch):
    seen = []
    train = ppo.Learner._train_policy
    monkeypatch.setattr(
        ppo.Learner,
        "_train_policy",
        lambda learner, micro, *rest: seen.append(micro) or train(learner, micro, *rest),
    )
    cfg = stage(epochs=2, minibatches=4, micro_batch_size=1)
    batch = ready(make_roles(), cfg)

    def order(step, seed=0):
        seen.clear()
        updated(make_roles(), batch, replace(cfg, seed=seed), step=step)
        return [tuple(part.ids[part.mask].tolist()) for part in seen]

    one = order(1)
    rows = sorted(tuple(batch.ids[i, batch.mask[i]].tolist()) for i in range(8))
    assert sorted(one[:8]) == sorted(one[8:]) == rows
    assert one[:8] != one[8:]
    assert order(1) == one
    assert order(2) != one
    assert order(1, seed=1) != one


@pytest.mark.parametrize("name", ["advantages", "returns", "old_logprobs"])
def test_nan_stops_the_run(make_roles, name):
    cfg = stage(epochs=1)
    roles = make_roles()
    batch = ready(roles, cfg)
    getattr(batch, name)[2, 0] = float("nan")
    with pytest.raises(StoppedByGuard, match=r"became nan in this update.*ppo\.learning_rate"):
        updated(roles, batch, cfg)


def test_nan_on_padding_stops_nothing(make_roles):
    cfg = stage(epochs=1)
    roles = make_roles()
    batch = ready(roles, cfg)
    assert not bool(batch.response_mask.all())
    for name in ("advantages", "returns", "old_logprobs", "old_values"):
        spoilt = getattr(batch, name).masked_fill(~batch.response_mask, float("nan"))
        batch = replace(batch, **{name: spoilt})
    stats, policy, critic = updated(roles, batch, cfg)
    assert all(bool(tensor.isfinite().all()) for tensor in (policy | critic).values())
    assert stats["policy/ratio"] == pytest.approx(1, abs=1e-5)


# a task with a known answer ----------------------------------------------------------------------

WANTED = 7


def fraction_wanted(model, ids, mask):
    """Stands in for `models.scores`: the share of one token in the answer, which comes last."""
    width = mask.shape[1] - 2  # prompts have two tokens
    return ((ids == WANTED) & mask)[:, -width:].sum(1) / mask[:, -width:].sum(1)


def play(make_roles, monkeypatch, *, steps, **settings):
    """Mean score and mean KL to the reference of each step's rollout."""
    monkeypatch.setattr(models, "scores", fraction_wanted)
    cfg = stage(
        steps=steps,
        batch_size=64,
        micro_batch_size=64,
        learning_rate=3e-3,
        critic_learning_rate=3e-3,
        missing_eos_penalty=0.0,
        new=8,
        **settings,
    )
    roles = make_roles(LORA, vocabulary=12)
    policy, critic = ppo.engines(roles.policy, roles.critic, cfg.ppo, cfg.engine)
    prompts = [[1, 3 + i % 4] for i in range(64)]
    scores, kls = [], []
    for step in range(1, steps + 1):
        batch = judge(drawn(roles.policy, cfg, prompts=prompts, seed=step), roles, cfg)
        batch, stats = ppo_steps.estimate_advantages(batch, cfg)
        ppo_steps.update(policy, critic, batch, cfg, step=step)
        scores.append(stats["objective/scores"])
        kls.append(stats["objective/kl"])
    return scores, kls


def test_ppo_learns_what_pays_unless_kl_costs_more(make_roles, monkeypatch):
    scores, kls = play(make_roles, monkeypatch, steps=12, kl_coef=0.0)
    assert scores[0] < 0.1
    assert abs(kls[0]) < 1e-4
    assert scores[-1] > 0.4
    assert kls[-1] > 5

    # Whitened advantages make every step a full one, so it trembles around home: no drift.
    scores, priced = play(make_roles, monkeypatch, steps=12, kl_coef=1e3)
    assert abs(priced[0]) < 1e-4
    assert max(priced) < 1
    assert sum(priced[-4:]) < sum(kls[-4:]) / 10
    assert max(scores) < 0.15


# processes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("each", [1, 2])
def test_rows_of_all_ranks_are_in_the_order_of_one(make_roles, monkeypatch, each):
    """Each rank's part is as narrow as its own rows; what is longer elsewhere is padding."""
    cfg = stage()
    cfg.sampling.per_prompt = each
    roles = make_roles()
    whole = ready(roles, cfg)
    places = [
        [prompt * each + i for prompt in range(r, 8 // each, 2) for i in range(each)]
        for r in (0, 1)
    ]
    for field in fields(whole):  # the answers of one rank are short
        tensor = getattr(whole, field.name)
        if tensor.dim() == 2 and not field.name.startswith("prompt"):
            tensor[places[1], 4:] = -torch.inf if field.name == "floors" else 0
    parts = [whole.rows(torch.tensor(rows)) for rows in places]
    assert len({part.responses.shape[1] for part in parts}) == 2
    gathered = [{f.name: getattr(part, f.name) for f in fields(part)} for part in parts]
    monkeypatch.setattr(engine, "gather_objects", lambda own: gathered)
    for rank, rows in enumerate(places):  # it is how prompts are shared out
        monkeypatch.setenv("RANK", f"{rank}")
        monkeypatch.setenv("WORLD_SIZE", "2")
        asked = share(range(8 // each), per_prompt=each)
        assert asked == [(row, row // each) for row in rows]
    found = ppo.of_all_ranks(parts[0], per_prompt=each)
    for field in fields(whole):
        expected = getattr(whole, field.name)
        assert torch.equal(getattr(found, field.name), expected), field.name


def two_process_stage():
    return stage(micro_batch_size=3, epochs=2, minibatches=2, kl_coef=0.3)


def worker(folder):
    """One of two processes: every second row of the batch."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    engine.start(0)
    rank, cfg = int(os.environ["RANK"]), two_process_stage()
    batch = Batch(**load_file(f"{folder}/batch.safetensors")).rows(torch.arange(rank, 8, 2))
    policy = AutoModelForCausalLM.from_pretrained(f"{folder}/policy")
    critic = AutoModelForSequenceClassification.from_pretrained(f"{folder}/critic")
    batch, stats = ppo_steps.estimate_advantages(batch, cfg)
    engines = ppo.engines(policy, critic, cfg.ppo, cfg.engine)
    stats |= ppo_steps.update(*engines, batch, cfg, step=1)
    after = {f"policy.{n}": t.clone() for n, t in policy.state_dict().items()}
    after |= {f"critic.{n}": t.clone() for n, t in critic.state_dict().items()}
    after |= {f"stats.{n}": torch.tensor(value) for n, value in stats.items()}
    save_file(after, f"{folder}/rank{rank}.safetensors")


@pytest.mark.slow
def test_two_processes_do_what_one_does(make_roles, tmp_path):
    cfg = two_process_stage()
    roles = make_roles(FULL)
    batch = noisy(judge(drawn(roles.policy, cfg), roles, cfg))
    tensors = {field.name: getattr(batch, field.name).contiguous() for field in fields(batch)}
    save_file(tensors, tmp_path / "batch.safetensors")
    roles.policy.save_pretrained(tmp_path / "policy")
    roles.critic.save_pretrained(tmp_path / "critic")
    start_ranks(2, __file__, str(tmp_path), timeout=900)

    batch, stats = ppo_steps.estimate_advantages(batch, cfg)
    more, policy, critic = updated(roles, batch, cfg)
    expected = {f"policy.{n}": t for n, t in policy.items()}
    expected |= {f"critic.{n}": t for n, t in critic.items()}
    expected |= {f"stats.{n}": torch.tensor(value) for n, value in (stats | more).items()}
    for rank in range(2):
        found = load_file(tmp_path / f"rank{rank}.safetensors")
        assert_same(expected, found, rtol=1e-3, atol=2e-5)


if __name__ == "__main__":
    worker(sys.argv[1])
