"""A whole update in float64 against the papers' formulas, one sequence and one token at a time.

`judge`, `estimate_advantages` and `update` run as in training, but on plain torch instead of
DeepSpeed. The definitions below know nothing of masks, padding or micro-batches: a sequence is a
list of tokens, and numbers are Python's or 0-dim tensors. Then what must not matter: more padding,
the order of rows, and how a batch is split.
"""

from __future__ import annotations

import copy
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field, fields, replace

import ppo_steps
import pytest
import torch
from test_ppo import EOS, FULL, LORA, PROMPTS, drawn, judge, make_roles, stage
from test_roles import load, parents
from torch.nn.functional import pad
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlhf import models
from rlhf.config import AlgorithmConfig
from rlhf.rollout import Rollout

__all__ = ["load", "make_roles", "parents"]  # fixtures

SEED = 12  # its answers have many lengths; some end, some are cut
BOUND = 1e-9  # relative, against the definitions
ROUNDING = 1e-10  # relative, between two runs that should not differ
BOTH = pytest.mark.parametrize("method", [FULL, LORA], ids=["full", "lora"])
LAYOUTS = [(1, 1, 8), (2, 2, 4), (1, 4, 1), (2, 1, 2)]  # epochs, minibatches, micro-batch size
GIVEN = {
    "kl_coef": 0.3,
    "gamma": 0.95,
    "lam": 0.9,
    "vf_coef": 0.3,
    "cliprange": 0.2,
    "cliprange_value": 0.25,
    "missing_eos_penalty": 0.8,
}


@pytest.fixture(autouse=True)
def _norms_in_float64(monkeypatch):
    """Llama's norm computes in float32 whatever the model's dtype; 1e-7 is too coarse here."""

    def forward(self, hidden):
        scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * hidden * scale

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


# the case ----------------------------------------------------------------------------------------


def settings(layout=(2, 2, 4), *, name="ppo", scale=True, temperature=0.7, **options):
    epochs, minibatches, micro = layout
    shape = {"epochs": epochs, "minibatches": minibatches, "micro_batch_size": micro}
    cfg = stage(temperature=temperature, **(GIVEN | shape | options))
    sampling = replace(cfg.sampling, per_prompt=4 if name in ("rloo", "grpo") else 1)
    return replace(cfg, algorithm=AlgorithmConfig(name, scale=scale), sampling=sampling)


@dataclass
class Case:
    """Four models and what one of them answered, as after some updates.

    Attributes:
        rollout: with `logprobs` moved off the policy's, so that ratios are not 1.
        value_shift: [B, R] by how much old values are moved off the critic's.
    """

    roles: object
    rollout: object
    value_shift: object


def make_case(make_roles, method, cfg):
    # eager attention has float32 in it
    return moved_off(make_roles(method, attn_implementation="sdpa"), cfg)


def moved_off(roles, cfg):
    """Policy and critic are off where they started, and the rollout is off both."""
    generator = torch.Generator().manual_seed(5)

    def randn(like):
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    for model in vars(roles).values():
        models.whole(model).double()
        for parameter in trained(model.double()).values():
            parameter.data += 0.05 * randn(parameter)
    if not cfg.algorithm.critic:
        roles = replace(roles, critic=None)
    each = cfg.sampling.per_prompt
    prompts = [PROMPTS[row // each] for row in range(8)]
    rollout = drawn(roles.policy, cfg, prompts=prompts, seed=SEED)
    moved = rollout.old_logprobs.double() + 0.3 * randn(rollout.old_logprobs)
    rollout = replace(rollout, old_logprobs=torch.where(rollout.response_mask, moved, 0.0))
    return Case(roles, rollout, 0.4 * randn(moved))


@dataclass
class Run:
    """What an update did.

    Attributes:
        gradients: role -> of each optimizer step, name -> tensor.
        weights: role -> name -> tensor, after the update.
        minibatches: for each optimizer step, the rows in it.
        stats: the numbers it reports.
        taken: which branch of a formula was taken how often; of the definitions alone.
    """

    gradients: dict = field(default_factory=lambda: defaultdict(list))
    weights: dict = field(default_factory=dict)
    minibatches: list = field(default_factory=list)
    stats: dict = field(default_factory=dict)
    taken: Counter = field(default_factory=Counter)


def trained(model):
    """name -> parameter, the scalar head last."""
    found = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return dict(sorted(found, key=lambda pair: "score" in pair[0]))


def optimizer_of(model, learning_rate):
    return torch.optim.AdamW(
        trained(model).values(), lr=learning_rate, weight_decay=0.0, eps=1e-5, foreach=False
    )


def take_step(run, role, model, optimizer):
    """An optimizer step whose gradients are kept."""
    run.gradients[role].append({name: p.grad.clone() for name, p in trained(model).items()})
    optimizer.step()
    optimizer.zero_grad()
    run.weights[role] = {name: p.detach().clone() for name, p in trained(model).items()}


class PlainEngine:
    """`rlhf.engine.Engine` in plain torch: losses are parts of a sum, some of them to a step."""

    grad_norm = None

    def __init__(self, run, role, module, accumulation, learning_rate):
        self.run, self.role, self.module, self.accumulation = run, role, module, accumulation
        self.learning_rate = learning_rate
        self.optimizer, self.parts = optimizer_of(module, learning_rate), 0

    def backward(self, loss):
        assert loss.dtype == torch.float64
        loss.backward()

    def step(self):
        self.parts += 1
        if self.parts % self.accumulation == 0:
            take_step(self.run, self.role, self.module, self.optimizer)


def library(case, cfg, *, learning_rate=1e-3, change=lambda batch, roles: batch, **shaping):
    """An update by the code under test; `case` is left as it was."""
    run, roles = Run(), copy.deepcopy(case.roles)
    batch = judge(case.rollout, roles, cfg, **shaping)
    if roles.critic is not None:
        batch = replace(batch, old_values=batch.old_values + case.value_shift)
    batch, objective = ppo_steps.estimate_advantages(batch, cfg)
    batch = change(batch, roles)
    accumulation = 8 // cfg.ppo.minibatches // cfg.ppo.micro_batch_size
    policy, critic = (
        None if model is None else PlainEngine(run, role, model, accumulation, learning_rate)
        for role, model in (("policy", roles.policy), ("critic", roles.critic))
    )
    rows = [(answer.prompt + answer.tokens) for answer in answers(case)]
    assert len({tuple(row) for row in rows}) == 8, "a row is known by its tokens"
    seen = []

    def note_rows(module, args, kwargs):
        masks = kwargs["attention_mask"].bool()
        for ids, mask in zip(kwargs["input_ids"], masks, strict=True):
            seen.append(rows.index(ids[mask].tolist()))

    roles.policy.register_forward_pre_hook(note_rows, with_kwargs=True)
    run.stats = objective | ppo_steps.update(policy, critic, batch, cfg, step=1)
    size = 8 // cfg.ppo.minibatches
    run.minibatches = [seen[start : start + size] for start in range(0, len(seen), size)]
    return run


# the definitions ---------------------------------------------------------------------------------


@dataclass
class Answer:
    """One row, without padding."""

    prompt: list
    tokens: list
    old_logprobs: list
    value_shift: list
    floors: list


def answers(case):
    rollout, found = case.rollout, []
    for row in range(8):
        mask = rollout.response_mask[row]
        per_token = (rollout.responses, rollout.old_logprobs, case.value_shift, rollout.floors)
        prompt = rollout.prompts[row][rollout.prompt_mask[row]].tolist()
        found.append(Answer(prompt, *(tensor[row][mask].tolist() for tensor in per_token)))
    return found


def base(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def distributions(model, answer, cfg, *, everything=False):
    """For each token of the answer, the log-probabilities [V] it was drawn from, or of all."""
    logits, found = model(torch.tensor([answer.prompt + answer.tokens])).logits[0], []
    for t, token in enumerate(answer.tokens):
        before = len(answer.prompt) + t - 1  # the position that predicts it
        row = logits[before] / cfg.sampling.temperature
        kept = torch.log_softmax(row.detach(), 0) >= answer.floors[t]
        kept[token] = True
        kept |= everything
        found.append(row - torch.logsumexp(row[kept], 0) + torch.where(kept, 0.0, -torch.inf))
    return found


def logprobs(model, answer, cfg, **options):
    found = zip(distributions(model, answer, cfg, **options), answer.tokens, strict=True)
    return [distribution[token] for distribution, token in found]


def scalars(model, answer):
    """The scalar head after each token, prompt included."""
    inner = base(model)
    hidden = inner.model(torch.tensor([answer.prompt + answer.tokens])).last_hidden_state
    return list(inner.score(hidden)[0, :, 0])


def values(model, answer):
    """Before each token of the answer is emitted."""
    return scalars(model, answer)[len(answer.prompt) - 1 : -1]


def number(x):
    return float(x.detach()) if torch.is_tensor(x) else x


def floats(numbers):
    return [number(x) for x in numbers]


def mean(numbers):
    return sum(numbers) / len(numbers)


def whiten(rows, *, subtract_mean):
    """Over all tokens of all rows, with the variance of the population."""
    flat = [x for row in rows for x in row]
    centre = mean(flat)
    std = (mean([(x - centre) ** 2 for x in flat]) + 1e-8) ** 0.5
    back = 0.0 if subtract_mean else centre
    return [[(x - centre) / std + back for x in row] for row in rows]


def score_of(model, answer, cfg, *, bias=0.0, scale=1.0):
    """The reward model's verdict, less what the answer did wrong."""
    score = (float(scalars(model, answer)[-1]) - bias) / scale
    if cfg.ppo.score_clip is not None:
        score = min(max(score, -cfg.ppo.score_clip), cfg.ppo.score_clip)
    if answer.tokens[-1] != EOS:
        score -= cfg.ppo.missing_eos_penalty
    if cfg.ppo.overlong_buffer:
        excess = len(answer.tokens) - (cfg.sampling.max_new_tokens - cfg.ppo.overlong_buffer)
        if excess > 0:
            score -= cfg.ppo.overlong_penalty * excess / cfg.ppo.overlong_buffer
    return score


def generalized_advantages(rewards, values, gamma, lam):
    """Schulman et al. 2016, eq. 16: a discounted sum of TD errors; nothing follows the end."""
    n = len(rewards)
    following = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


def group_advantages(totals, cfg):
    """Each answer against the others to its prompt (RLOO) or their mean and std (GRPO)."""
    found, each = [], cfg.sampling.per_prompt
    for i, total in enumerate(totals):
        group = range(i // each * each, i // each * each + each)
        if cfg.algorithm.name == "rloo":
            found.append(total - mean([totals[j] for j in group if j != i]))
            continue
        centre = mean([totals[j] for j in group])
        std = (sum((totals[j] - centre) ** 2 for j in group) / (each - 1)) ** 0.5
        found.append((total - centre) / (std + 1e-4 if cfg.algorithm.scale else 1.0))
    return found


@torch.no_grad()
def estimate(roles, given, cfg, **shaping):
    """Row by row: reference log-probabilities, old values, advantages, returns; and numbers."""
    scores = [score_of(roles.reward_model, answer, cfg, **shaping) for answer in given]
    ref, own = (
        [floats(logprobs(model, answer, cfg, everything=True)) for answer in given]
        for model in (roles.reference, roles.policy)
    )
    if not cfg.sampling.truncates:  # then it is what the sampler noted
        own = [answer.old_logprobs for answer in given]
    kl = [[p - q for p, q in zip(*rows, strict=True)] for rows in zip(own, ref, strict=True)]
    price = cfg.ppo.kl_coef if cfg.ppo.kl_in == "reward" else 0.0
    rewards = [[-price * k for k in row] for row in kl]
    for row, score in zip(rewards, scores, strict=True):
        row[-1] += score
    if cfg.ppo.whiten_rewards:
        rewards = whiten(rewards, subtract_mean=False)
    old_values = [[0.0] * len(row) for row in rewards]
    gamma, lam = cfg.ppo.gamma, cfg.ppo.lam
    if cfg.algorithm.name == "ppo":
        for answer, row in zip(given, old_values, strict=True):
            own = floats(values(roles.critic, answer))
            row[:] = [v + shift for v, shift in zip(own, answer.value_shift, strict=True)]
        pairs = zip(rewards, old_values, strict=True)
        advantages = [generalized_advantages(*pair, gamma, lam) for pair in pairs]
    elif cfg.algorithm.name == "reinforce_pp":
        advantages = [
            [sum(gamma ** (k - t) * row[k] for k in range(t, len(row))) for t in range(len(row))]
            for row in rewards
        ]
    else:
        found = group_advantages([sum(row) for row in rewards], cfg)
        advantages = [[a] * len(row) for a, row in zip(found, rewards, strict=True)]
    targets = [
        [a + v for a, v in zip(*rows, strict=True)]
        for rows in zip(advantages, old_values, strict=True)
    ]
    if cfg.ppo.whiten_advantages and cfg.algorithm.name in ("ppo", "reinforce_pp"):
        advantages = whiten(advantages, subtract_mean=True)
    numbers = {"objective/scores": mean(scores), "objective/kl": mean([sum(row) for row in kl])}
    return ref, old_values, advantages, targets, numbers


def policy_term(new, old, advantage, cfg, taken):
    """A token's loss: Schulman et al. 2017, eq. 7; Yu et al. 2025; Ye et al. 2020, eq. 5."""
    ratio = torch.exp(new - old)
    low, high = 1 - cfg.ppo.cliprange, 1 + (cfg.ppo.cliprange_high or cfg.ppo.cliprange)
    where = "below" if ratio < low else "above" if ratio > high else "within"
    taken[f"ratio {where}, {'good' if advantage > 0 else 'bad'} token"] += 1
    objective = min(ratio * advantage, min(max(ratio, low), high) * advantage)
    if cfg.ppo.dual_clip is not None and advantage < 0:
        taken["dual clip"] += bool(objective < cfg.ppo.dual_clip * advantage)
        objective = max(objective, cfg.ppo.dual_clip * advantage)
    return -objective


def value_term(value, old, target, cfg, taken):
    """A token's loss: Ouyang et al. 2022, as printed by Huang et al. 2024."""
    width = math.inf if cfg.ppo.cliprange_value is None else cfg.ppo.cliprange_value
    clipped = min(max(value, old - width), old + width)
    taken["value inside" if clipped is value else "value outside"] += 1
    taken["value stopped"] += bool((clipped - target) ** 2 > (value - target) ** 2)
    return max((value - target) ** 2, (clipped - target) ** 2) / 2


def kl_term(new, ref, cfg):
    """Schulman 2020."""
    difference = new - ref
    if cfg.ppo.kl_estimator == "k1":
        return difference
    if cfg.ppo.kl_estimator == "k2":
        return difference**2 / 2
    return torch.exp(-difference) - 1 + difference


def entropy(distribution):
    return -sum(torch.exp(x) * x for x in distribution if x > -torch.inf)


def naive(case, cfg, minibatches, *, learning_rate=1e-3, **shaping):
    """The update by definition, on the rows of these minibatches; `case` is left as it was."""
    run, roles, given = Run(), copy.deepcopy(case.roles), answers(case)
    ref, old_values, advantages, targets, numbers = estimate(roles, given, cfg, **shaping)
    policy_optimizer = optimizer_of(roles.policy, learning_rate)
    if roles.critic is not None:
        critic_optimizer = optimizer_of(roles.critic, learning_rate)
    sums = Counter()
    for rows in minibatches:
        count = sum(len(given[i].tokens) for i in rows)
        for i in rows:
            total, answer = 0.0, given[i]
            plain = logprobs(roles.policy, answer, cfg, everything=True)
            for t, distribution in enumerate(distributions(roles.policy, answer, cfg)):
                new = distribution[answer.tokens[t]]
                loss = policy_term(new, answer.old_logprobs[t], advantages[i][t], cfg, run.taken)
                sums["loss/policy"] += number(loss) / count
                if cfg.ppo.kl_in == "loss":
                    kl = kl_term(plain[t], ref[i][t], cfg)
                    sums["loss/kl"] += number(kl) / count
                    loss = loss + cfg.ppo.kl_coef * kl
                if cfg.ppo.entropy_coef:
                    bonus = entropy(distribution)
                    sums["policy/entropy"] += number(bonus) / count
                    loss = loss - cfg.ppo.entropy_coef * bonus
                total = total + loss / count
            if torch.is_tensor(total) and total.requires_grad:  # or every token was clipped
                total.backward()
        take_step(run, "policy", roles.policy, policy_optimizer)
        if roles.critic is None:
            continue
        for i in rows:
            total = 0.0
            for t, value in enumerate(values(roles.critic, given[i])):
                loss = value_term(value, old_values[i][t], targets[i][t], cfg, run.taken)
                sums["loss/value"] += number(loss) / count
                total = total + cfg.ppo.vf_coef * loss / count
            if torch.is_tensor(total) and total.requires_grad:
                total.backward()
        take_step(run, "critic", roles.critic, critic_optimizer)
    run.stats = numbers | {name: x / len(minibatches) for name, x in sums.items()}
    return run


# one against the other ---------------------------------------------------------------------------


def error(found, expected):
    """The largest max |a - b| / max |b| of a tensor, and its name; 0 / 0 is 0."""
    assert found.keys() == expected.keys()
    assert all(tensor.dtype == torch.float64 for tensor in (*found.values(), *expected.values()))
    floor = 1e-6 * max(float(tensor.abs().max()) for tensor in expected.values())
    return max(
        (float((found[name] - b).abs().max()) / max(float(b.abs().max()), floor), name)
        for name, b in expected.items()
    )


def assert_same_run(found, expected, bound):
    """Gradients of every optimizer step, then weights."""
    assert found.gradients.keys() == found.weights.keys() == expected.gradients.keys()
    for role, steps in expected.gradients.items():
        for step, gradients in enumerate(steps):
            worst, name = error(found.gradients[role][step], gradients)
            assert worst <= bound, f"{role}, step {step}: {name} is off by {worst:.1e}"
        assert len(found.gradients[role]) == len(steps)
        worst, name = error(found.weights[role], expected.weights[role])
        assert worst <= bound, f"{role}, weights: {name} is off by {worst:.1e}"


def compare(make_roles, method, cfg, **shaping):
    """Both ways on one case; returns what the definitions did."""
    case = make_case(make_roles, method, cfg)
    found = library(case, cfg, **shaping)
    for epoch in range(cfg.ppo.epochs):
        part = found.minibatches[epoch * cfg.ppo.minibatches :][: cfg.ppo.minibatches]
        assert sorted(row for rows in part for row in rows) == list(range(8))
    expected = naive(case, cfg, found.minibatches, **shaping)
    assert len(expected.gradients["policy"]) == cfg.ppo.epochs * cfg.ppo.minibatches
    assert_same_run(found, expected, BOUND)
    assert {name: found.stats[name] for name in expected.stats} == pytest.approx(
        expected.stats, rel=BOUND, abs=1e-12
    )
    return expected


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ppo_is_its_definition(make_roles, method, layout):
    compare(make_roles, method, settings(layout))


@BOTH
@pytest.mark.parametrize("layout", [(1, 1, 8), (2, 2, 1)], ids=str)
@pytest.mark.parametrize(
    ("name", "scale"),
    [("rloo", True), ("grpo", True), ("grpo", False), ("reinforce_pp", True)],
    ids=["rloo", "grpo", "dr_grpo", "reinforce_pp"],
)
def test_algorithms_without_a_critic_are_their_definitions(make_roles, method, layout, name, scale):
    run = compare(make_roles, method, settings(layout, name=name, scale=scale))
    assert run.gradients.keys() == {"policy"}


OPTIONS = {
    "k1": {"kl_in": "loss", "kl_estimator": "k1"},
    "k2": {"kl_in": "loss", "kl_estimator": "k2"},
    "k3": {"kl_in": "loss", "kl_estimator": "k3"},
    "entropy": {"entropy_coef": 0.1},
    "clip_higher": {"cliprange_high": 0.5},
    "dual_clip": {"dual_clip": 1.3},
    "whiten_rewards": {"whiten_rewards": True},
    "no_whitening": {"whiten_advantages": False},
    "no_value_clip": {"cliprange_value": None},
    "overlong": {"overlong_buffer": 4, "overlong_penalty": 0.7},
    "truncated": {"top_k": 8, "top_p": 0.9, "entropy_coef": 0.1},
    "truncated_kl_loss": {"top_p": 0.8, "kl_in": "loss", "kl_estimator": "k2"},
    "cooler": {"temperature": 1.6, "kl_in": "loss", "entropy_coef": 0.1, "dual_clip": 1.3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_their_definitions(make_roles, name):
    """Of one model and the other by turns: what an option does is the same on both."""
    method, options = (FULL, LORA)[list(OPTIONS).index(name) % 2], OPTIONS[name]
    compare(make_roles, method, settings((1, 2, 2), **options))


def test_kl_as_a_loss_without_a_critic_is_its_definition(make_roles):
    options = {"kl_in": "loss", "kl_estimator": "k3", "cliprange_high": 0.28}
    compare(make_roles, LORA, settings((2, 1, 4), name="grpo", **options))


def test_shaped_scores_are_their_definition(make_roles):
    compare(make_roles, LORA, settings(score_clip=0.6), bias=0.2, scale=1.7)


# the case is hard enough -------------------------------------------------------------------------


@BOTH
def test_every_branch_is_taken(make_roles, method):
    cfg = settings((1, 1, 8), dual_clip=1.3)
    case = make_case(make_roles, method, cfg)
    given = answers(case)
    lengths = [len(answer.tokens) for answer in given]
    assert len(set(lengths)) > 3
    assert 0 < sum(answer.tokens[-1] == EOS for answer in given) < 8
    taken = naive(case, cfg, [range(8)]).taken
    for where in ("below", "within", "above"):
        assert taken[f"ratio {where}, good token"] > 1
        assert taken[f"ratio {where}, bad token"] > 1
    assert taken["dual clip"] > 1
    assert taken["value inside"] > 1
    assert 1 < taken["value stopped"] < taken["value outside"] - 1
    assert taken["value inside"] + taken["value outside"] == sum(lengths)


@BOTH
def test_every_number_matters(make_roles, method):
    """A definition with another setting is another update."""
    cfg = settings((1, 1, 8))
    case = make_case(make_roles, method, cfg)
    right = naive(case, cfg, [range(8)])
    for role, names in {
        "policy": ["kl_coef", "gamma", "lam", "cliprange", "missing_eos_penalty"],
        "critic": ["kl_coef", "gamma", "lam", "cliprange_value", "missing_eos_penalty", "vf_coef"],
    }.items():
        for name in names:
            other = replace(cfg, ppo=replace(cfg.ppo, **{name: 0.5 * getattr(cfg.ppo, name)}))
            wrong = naive(case, other, [range(8)])
            worst, _ = error(wrong.gradients[role][0], right.gradients[role][0])
            assert worst > 1e-3, f"{name}: {worst:.1e}"


# what must not matter ----------------------------------------------------------------------------


def assert_nothing_changed(found, expected):
    assert_same_run(found, expected, ROUNDING)
    assert found.stats == pytest.approx(expected.stats, rel=ROUNDING, abs=1e-12)


def padded(case, left, right):
    """More columns, with other tokens and numbers in all that does not count."""
    generator = torch.Generator().manual_seed(7)
    rollout = case.rollout
    wide = {
        f.name: getattr(rollout, f.name)
        if getattr(rollout, f.name).dim() == 1
        else pad(getattr(rollout, f.name), (left, 0) if f.name.startswith("prompt") else (0, right))
        for f in fields(rollout)
    }
    for name, mask in (("prompts", "prompt_mask"), ("responses", "response_mask")):
        other = torch.randint(3, 24, wide[name].shape, generator=generator)
        wide[name] = torch.where(wide[mask], wide[name], other)
    wide["old_logprobs"] = torch.where(wide["response_mask"], wide["old_logprobs"], -7.0)
    return Case(case.roles, replace(rollout, **wide), pad(case.value_shift, (0, right)))


def keep_padding(monkeypatch):
    """Minibatches and micro-batches as wide as the whole batch."""

    def rows(self, index):
        return replace(self, **{f.name: getattr(self, f.name)[index] for f in fields(self)})

    monkeypatch.setattr(Rollout, "rows", rows)


@BOTH
@pytest.mark.parametrize("kept", [False, True], ids=["dropped", "kept"])
def test_padding_changes_nothing(make_roles, monkeypatch, method, kept):
    cfg = settings((2, 2, 2), kl_in="loss", entropy_coef=0.1, whiten_rewards=True)
    case = make_case(make_roles, method, cfg)
    expected = library(case, cfg)
    if kept:
        keep_padding(monkeypatch)
    assert_nothing_changed(library(padded(case, 3, 5), cfg), expected)


@BOTH
def test_the_order_of_rows_changes_nothing(make_roles, method):
    cfg = settings((2, 1, 2))
    case = make_case(make_roles, method, cfg)
    expected = library(case, cfg)
    order = torch.tensor([5, 2, 7, 0, 3, 6, 1, 4])
    rollout = case.rollout
    rollout = replace(rollout, **{f.name: getattr(rollout, f.name)[order] for f in fields(rollout)})
    assert_nothing_changed(
        library(Case(case.roles, rollout, case.value_shift[order]), cfg), expected
    )


@BOTH
@pytest.mark.parametrize("minibatches", [1, 2])
def test_the_micro_batch_size_changes_nothing(make_roles, method, minibatches):
    case = make_case(make_roles, method, settings())
    sizes = [size for size in (8, 4, 2, 1) if size <= 8 // minibatches]
    expected, *others = (library(case, settings((2, minibatches, size))) for size in sizes)
    for found in others:
        assert found.minibatches == expected.minibatches
        assert_nothing_changed(found, expected)


def numbered(run):
    """With parameters named by their place among those of a role."""
    gradients = {
        role: [dict(enumerate(step.values())) for step in steps]
        for role, steps in run.gradients.items()
    }
    weights = {role: dict(enumerate(named.values())) for role, named in run.weights.items()}
    return replace(run, gradients=gradients, weights=weights)


def test_one_backbone_under_all_roles_changes_nothing(load):
    cfg = settings((2, 2, 2), kl_in="loss")
    four, one = moved_off(load(False), cfg), moved_off(load(True), cfg)
    assert isinstance(one.roles.policy, models.SharedRole)
    assert torch.equal(one.rollout.responses, four.rollout.responses)
    # The published reward model was merged in float32, which rounds its scores.
    roles = replace(one.roles, reward_model=four.roles.reward_model)
    found = library(replace(four, roles=roles), cfg)
    assert_nothing_changed(numbered(found), numbered(library(four, cfg)))


@BOTH
def test_minibatches_add_up_to_the_whole(make_roles, method):
    """Weights that stand still: gradients of the parts, by their tokens, are the whole's."""
    case = make_case(make_roles, method, settings())
    lengths = [len(answer.tokens) for answer in answers(case)]
    whole = library(case, settings((1, 1, 8)), learning_rate=0.0)
    for minibatches, micro in ((2, 4), (4, 1), (8, 1)):
        found = library(case, settings((1, minibatches, micro)), learning_rate=0.0)
        shares = [sum(lengths[i] for i in rows) / sum(lengths) for rows in found.minibatches]
        assert len(shares) == minibatches
        for role, (expected,) in whole.gradients.items():
            total = {
                name: sum(
                    share * part[name]
                    for share, part in zip(shares, found.gradients[role], strict=True)
                )
                for name in expected
            }
            worst, name = error(total, expected)
            assert worst <= ROUNDING, f"{role}, {minibatches} minibatches: {name}: {worst:.1e}"


@BOTH
def test_no_gradient_takes_another_way(make_roles, method):
    """What was judged is a constant, even where autograd could follow it into both models."""
    cfg = settings((1, 2, 4), kl_in="loss")
    case = make_case(make_roles, method, cfg)

    def attach(batch, roles):
        parameters = [*trained(roles.policy).values(), *trained(roles.critic).values()]
        total = sum(p.sum() for p in parameters)
        nothing = total - total.detach()  # 0, with a gradient of 1 everywhere
        names = ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns")
        return replace(batch, **{name: getattr(batch, name) + nothing for name in names})

    expected = library(case, cfg)
    assert_nothing_changed(library(case, cfg, change=attach), expected)
