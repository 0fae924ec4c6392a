"""Bugs that were reported of other PPO libraries, each held against this one.

Each test names the public report that it answers. Where another file tests the same already:

the penalty for a missing EOS replaced the score (huggingface/trl#2012)
    test_ppo.py::test_missing_eos_is_penalised_exactly_where_it_is_missing
padding was whatever equals the pad id (huggingface/trl#1623)
    test_rollout.py::test_a_sampled_pad_counts
a tokenizer padded with its EOS (huggingface/trl#3091, huggingface/alignment-handbook#127)
    test_text.py::test_padding_with_eos_or_with_nothing_is_replaced_by_an_unused_token
    test_text.py::test_no_token_to_pad_with_is_refused
SFT masked the EOS, so that answers never end (huggingface/trl#2059)
    test_text.py::test_the_mask_is_one_on_exactly_the_answer_and_its_eos
PPO masked the EOS (verl-project/verl#655)
    test_ppo_options.py::test_eos_is_a_token_like_any_other_to_the_options
a text began twice (OpenRLHF/OpenRLHF#242)
    test_text.py::test_a_template_that_begins_twice_is_refused
    test_text.py::test_earlier_turns_keep_their_eos_and_the_prompt_has_one_bos
the reward model was trained on another text than PPO gave it (huggingface/trl#1702)
    test_text.py::test_all_stages_read_a_conversation_alike
the reward model had another tokenizer (huggingface/trl#1979, huggingface/trl#1674)
    test_contract.py::test_reward_model_that_reads_something_else_is_refused
the reward model's head was lost (huggingface/trl#1379, huggingface/peft#1070)
    test_golden.py::test_a_lost_head_is_refused
no reward but a model's (huggingface/trl#3093)
    test_stage_rewards.py::test_a_function_needs_no_reward_model
the price of KL stood still (trl 1.12 has no adaptive KL)
    test_ppo_options.py::test_the_price_of_kl_is_fixed_or_steered
    test_resume.py::test_the_price_of_kl_has_moved
a run could not be resumed (huggingface/trl#2657, hiyouga/LLaMA-Factory#8715)
    test_resume.py::test_a_stage_stopped_three_times_ends_as_the_unbroken_one
fewer optimizer steps than the settings said (huggingface/trl#5645)
    test_ppo.py::test_number_of_optimizer_steps
gradients were lost between micro-batches (huggingface/trl#583)
    test_ppo.py::test_micro_batch_size_does_not_change_the_weights
top-k and top-p were in the old log-probabilities alone (huggingface/trl#2358)
    test_rollout.py::test_a_training_pass_gives_the_logprobs_that_were_sampled
the model's own generation settings had a say, and the KL went below 0 (huggingface/trl#235)
    test_rollout.py::test_the_models_own_generation_config_has_no_say
dropout was alive while ratios were taken (CarperAI/trlx#508)
    test_guards.py::test_dropout_is_refused_in_ppo_and_only_there
    test_models.py::test_a_model_with_dropout_trains_without
the loss was nan, and training went on (hiyouga/LLaMA-Factory#551)
    test_ppo.py::test_nan_stops_the_run
answers depended on the number of processes (huggingface/trl#2596)
    test_rollout.py::test_a_steps_noise_depends_on_seed_step_and_place
"""

from __future__ import annotations

import copy
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import ppo_steps
import pytest
import torch
from test_ppo import (
    EOS,
    FULL,
    LORA,
    PAD,
    PROMPTS,
    assert_same,
    drawn,
    judge,
    judged,
    make_roles,
    noisy,
    ready,
    stage,
    updated,
    weights,
)
from test_roles import moved
from torch.testing import assert_close

from rlhf import engine, models, ppo, rollout
from rlhf.config import EngineConfig
from rlhf.manifest import BaseModel
from rlhf.roles import load_roles
from rlhf.text import Renderer

__all__ = ["make_roles"]  # fixtures
pytestmark = pytest.mark.usefixtures("process_group")

TESTS = Path(__file__).parent
CLOSE = {"rtol": 0, "atol": 2e-5}


def test_the_tests_of_the_table_exist():
    named = re.findall(r"(test_\w+\.py)::(test_\w+)", str(__doc__))
    assert len(named) > 15
    for file, name in named:
        assert f"\ndef {name}(" in (TESTS / file).read_text(), f"{file}::{name}"


# the score and the end of an answer --------------------------------------------------------------


def test_the_eos_gets_the_whole_score_itself(make_roles):
    """huggingface/trl#3750: one slot later it is on a pad, and the EOS has lam times a rumour.

    At lam 0 a token's advantage is what it is paid itself.
    """
    cfg = stage(lam=0.0, kl_coef=0.0, whiten_advantages=False)
    batch = ready(make_roles(), cfg)
    batch = replace(batch, old_values=torch.zeros_like(batch.old_values))
    found, _ = ppo_steps.estimate_advantages(batch, cfg)
    lengths = batch.response_mask.sum(1).tolist()
    assert min(lengths) < max(lengths) == batch.responses.shape[1]
    for row, n in enumerate(lengths):
        paid = found.advantages[row].tolist()
        assert paid[n - 1] == pytest.approx(float(batch.scores[row]))
        assert not any(paid[: n - 1] + paid[n:])


def test_the_penalty_follows_the_token_that_stops(make_roles):
    """huggingface/trl#3750: sampling stopped at one token, the penalty looked for another."""
    roles, stop = make_roles(), 9
    cfg = stage(missing_eos_penalty=3.0)
    prompts = PROMPTS * 8
    sampled = rollout.sample(
        roles.policy,
        prompts,
        keys=range(len(prompts)),
        seed=3,
        cfg=cfg.sampling,
        pad_id=PAD,
        eos_id=stop,
        device=torch.device("cpu"),
    )
    answers = sampled.answer_ids()
    ends = [answer[-1] == stop for answer in answers]
    passed_over = [EOS in answer and not end for answer, end in zip(answers, ends, strict=True)]
    assert any(ends)
    assert any(passed_over), "no answer has the other one, the test could not tell"
    scores = torch.linspace(-2, 2, len(prompts))
    found = ppo_steps.judge(sampled, scores, roles, cfg).scores
    lost = (scores - found).tolist()
    assert lost == pytest.approx([0.0 if end else 3.0 for end in ends], abs=1e-5)


def test_a_pad_that_is_the_eos_hides_no_end(make_roles):
    """huggingface/trl#1623, verl-project/verl#535: what is a pad was read off the token ids."""
    roles, cfg = make_roles(), stage()
    batches = {}
    for pad in (PAD, EOS):
        sampled = rollout.sample(
            roles.policy,
            PROMPTS,
            keys=range(len(PROMPTS)),
            seed=3,
            cfg=cfg.sampling,
            pad_id=pad,
            eos_id=EOS,
            device=torch.device("cpu"),
        )
        batch = noisy(judge(sampled, roles, cfg))
        batches[pad] = ppo_steps.estimate_advantages(batch, cfg)[0]
    apart, same = batches[PAD], batches[EOS]
    mask = same.response_mask
    assert bool(mask[same.responses == EOS].any())
    assert not bool(mask[same.responses == EOS].all()), "nothing was padded"
    assert torch.equal(mask, apart.response_mask)
    assert torch.equal(same.prompt_mask, apart.prompt_mask)
    assert torch.equal(same.responses[mask], apart.responses[mask])
    for name in ("old_logprobs", "ref_logprobs", "scores", "advantages", "returns"):
        assert_close(getattr(same, name), getattr(apart, name), **CLOSE)


# the ratio and the KL ----------------------------------------------------------------------------

SAMPLINGS = (
    {"temperature": 0.7},
    {"temperature": 1.6, "top_k": 5},
    {"top_p": 0.7},
    {"temperature": 0.8, "top_k": 9, "top_p": 0.6},
)


@pytest.mark.parametrize("settings", SAMPLINGS, ids=str)
def test_the_ratio_is_one_before_any_update(make_roles, settings):
    """huggingface/trl#2358, CarperAI/trlx#508, NVIDIA/NeMo-Aligner#68: it was not.

    Of every token, in the mode and the rows of a training pass, so with other padding.
    """
    roles, cfg = make_roles(), stage(**settings)
    moved(roles.policy, 5)
    batch = judged(roles, cfg)
    roles.policy.train()
    for index in ([6, 1], [5], [3, 0, 7, 2, 4]):
        part = batch.rows(torch.tensor(index))
        ratio = (ppo.logprobs(roles.policy, part, cfg.sampling) - part.old_logprobs).exp()
        assert float((ratio - 1).abs().max()) < 1e-4
    plain = ppo.logprobs(roles.policy, batch, stage().sampling)
    assert float((plain - batch.old_logprobs).abs().max()) > 0.1, "the settings change nothing"


def test_the_tokens_that_were_drawn_are_trained_on(tiny_model, tiny_tokenizer):
    """huggingface/trl#5224: encode(decode(ids)) is not ids, and the ratio was of other tokens."""
    policy, renderer = tiny_model(), Renderer(tiny_tokenizer)
    cfg = stage(new=12)
    found = ppo_steps.draw(policy, PROMPTS, cfg, renderer, step=1)
    encode = renderer.tokenizer
    again = [
        encode(renderer.decode(ids), add_special_tokens=False)["input_ids"]
        for ids in found.answer_ids()
    ]
    assert again != found.answer_ids(), "the test could not tell"
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt + found.answer_ids()[row]])
        with torch.no_grad():
            logprobs = policy(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        now = logprobs.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
        assert_close(now, found.old_logprobs[row][found.response_mask[row]], **CLOSE)


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0.7}, {}, {"temperature": 1.4}, {"top_k": 5}, {"top_p": 0.7}],
    ids=lambda given: ", ".join(f"{k} {v}" for k, v in given.items()) or "plain",
)
@torch.no_grad()
def test_the_kl_starts_at_zero_and_then_is_positive(make_roles, sampling):
    """huggingface/trl#235, huggingface/trl#1161: it went below 0 and stayed there.

    A single token's k1 may be negative; the mean over answers of the policy may not, beyond what
    chance explains.
    """
    roles, cfg = make_roles(), stage(**sampling)
    assert float(judged(roles, cfg).kl.abs().max()) < 1e-4
    moved(roles.policy, 5)
    found = drawn(roles.policy, cfg, prompts=PROMPTS * 32)
    batch = judge(found, roles, cfg)
    kl = batch.kl.sum(1)
    assert float(batch.kl.min()) < 0, "k1 of one token"
    assert float(kl.mean()) > 5 * float(kl.std()) / len(kl) ** 0.5
    _, stats = ppo_steps.estimate_advantages(batch, cfg)
    assert stats["objective/kl"] == pytest.approx(float(kl.mean()), rel=1e-5)


@pytest.mark.parametrize("sampling", [{"top_k": 5}, {"top_p": 0.7}], ids=str)
@torch.no_grad()
def test_a_sharper_policy_is_further_away_under_top_k_and_top_p(make_roles, sampling):
    """By the definition: the sum over what may be drawn of p * log(policy / reference)."""
    roles, cfg = make_roles(FULL), stage(**sampling)
    roles.reference.lm_head.weight.mul_(0.5)
    means = []
    for factor in (1.0, 1.5, 2.0, 4.0):
        roles.policy.lm_head.weight.copy_(roles.reference.lm_head.weight * factor)
        batch = judge(drawn(roles.policy, cfg, prompts=PROMPTS * 8), roles, cfg)
        exact = torch.zeros(len(batch))
        for row in range(len(batch)):
            ids, n = batch.ids[row][batch.mask[row]][None], int(batch.response_mask[row].sum())
            own, ref = (
                model(ids).logits[0, -n - 1 : -1].log_softmax(-1)
                for model in (roles.policy, roles.reference)
            )
            may = own >= batch.floors[row, :n, None]
            probability = own.masked_fill(~may, -torch.inf).softmax(-1)
            exact[row] = (probability * (own - ref)).sum()
        kl = batch.kl.sum(1)
        error = float((kl - exact).std()) / len(kl) ** 0.5
        assert float(kl.mean()) == pytest.approx(float(exact.mean()), abs=4 * error + 1e-5)
        means.append(float(kl.mean()))
    assert means[0] == pytest.approx(0, abs=1e-4)
    assert means == sorted(means)
    assert means[1] > 0.5


# what a role is made of --------------------------------------------------------------------------


@pytest.fixture
def parents(tmp_path, tiny_model, tiny_tokenizer):
    """(base, sft, runs): the base and the SFT model in memory, and what their runs left behind."""
    tiny_model(initializer_range=0.1).save_pretrained(tmp_path / "base")
    torch.manual_seed(1)

    def load(kind, name):
        return kind(tmp_path / name, tiny_tokenizer, dtype=torch.float32).eval()

    base = load(models.load_causal, "base")
    fingerprint = models.fingerprint(base)
    sft = moved(models.trainable(load(models.load_causal, "base"), LORA), 2).eval()
    models.publish(sft, tiny_tokenizer, tmp_path / "sft")
    models.save_trained(sft, tmp_path / "step")
    head = moved(models.trainable(load(models.load_scalar, "sft"), LORA, head=True), 4)
    models.publish(head, tiny_tokenizer, tmp_path / "rm")

    def run(stage, folder, *, parents=(), under=None):
        facts = BaseModel("base", None, fingerprint)
        made_by = SimpleNamespace(name="lora", settings={})
        return SimpleNamespace(
            reference=f"{stage}/t",
            stage=stage,
            run_name="t",
            model_dir=tmp_path / folder,
            under=under,
            is_checkpoint=under is not None,
            digest=f"digest of {folder}",
            manifest=SimpleNamespace(parents=list(parents), base=facts, method=made_by),
        )

    origin = SimpleNamespace(role="policy", digest="digest of sft")
    runs = {
        "sft": run("sft", "sft"),
        "checkpoint": run("sft", "step", under=str(tmp_path / "base")),
        "rm": run("rm", "rm", parents=[origin]),
    }
    return base, sft, runs


@pytest.mark.parametrize("given", ["one backbone", "four models", "a checkpoint"])
@torch.no_grad()
def test_the_reference_is_the_sft_model_and_not_its_base(parents, tiny_tokenizer, given):
    """huggingface/trl#495, huggingface/trl#536: with adapters off, the SFT adapter was off too."""
    base, sft, runs = parents
    roles = load_roles(
        runs["checkpoint" if given == "a checkpoint" else "sft"],
        runs["rm"],
        tiny_tokenizer,
        LORA,
        EngineConfig(),
        share_backbone=given == "one backbone",
    )
    ids = torch.tensor([[1, 20, 21, 22, 23, 24], [1, 7, 8, 30, 31, 32]])
    mask = torch.ones_like(ids).bool()

    def logprobs(model):
        return models.response_logits(model, ids, mask, 4).log_softmax(-1)

    expected = logprobs(sft)
    assert float((logprobs(base) - expected).abs().max()) > 0.1, "SFT changed nothing"
    assert_close(logprobs(roles.policy), expected, **CLOSE)
    moved(roles.policy, 7)
    assert float((logprobs(roles.policy) - expected).abs().max()) > 0.1
    assert_close(logprobs(roles.reference), expected, **CLOSE)


@pytest.mark.parametrize("given", ["one backbone", "four models", "no reward model"])
def test_the_critic_trains_its_adapter_and_its_head_and_nothing_else(
    parents, tiny_tokenizer, given
):
    """huggingface/trl#1650, huggingface/trl#3071: its head was not trained; or all of it was.

    It starts as the reward model, and without one as the SFT model with a head of its own.
    """
    _, sft, runs = parents
    rm = None if given == "no reward model" else runs["rm"]
    share = given == "one backbone"
    roles = load_roles(runs["sft"], rm, tiny_tokenizer, LORA, EngineConfig(), share_backbone=share)
    ids = torch.tensor([[1, 20, 21, 22, 23, 24]])
    mask = torch.ones_like(ids).bool()
    with torch.no_grad():
        if rm is not None:
            values = models.token_values(roles.critic, ids, mask)
            start = models.token_values(roles.reward_model, ids, mask)
        else:
            values = models.hidden_states(roles.critic, ids, mask)
            start = models.hidden_states(sft, ids, mask)
    assert_close(values, start, **CLOSE)
    assert float(values.abs().max()) > 0.01

    named = [(n, p) for n, p in roles.critic.named_parameters() if p.requires_grad]
    heads = [n for n, _ in named if "score" in n]
    adapters = [n for n, _ in named if "lora_" in n or n.startswith("adapters.")]
    assert len(heads) == 1
    assert adapters
    assert len(heads) + len(adapters) == len(named), "more than adapter and head is trained"
    before = [parameter.detach().clone() for _, parameter in named]
    cfg = stage(critic_learning_rate=1e-2)
    scores = torch.linspace(-1, 1, len(PROMPTS))
    batch = ppo_steps.judge(drawn(roles.policy, cfg), scores, roles, cfg)
    updated(roles, ppo_steps.estimate_advantages(batch, cfg)[0], cfg)
    still = [n for (n, p), old in zip(named, before, strict=True) if torch.equal(p, old)]
    assert still == []


# checkpoints and schedules -----------------------------------------------------------------------


def test_a_checkpoint_brings_back_critic_and_both_optimizers(make_roles, tmp_path):
    """huggingface/trl#2657: the policy alone was saved. NVIDIA-NeMo/RL#3171: optimizers began anew.

    In models and engines that are new, as in a new process, the next update is the same.
    """
    cfg = stage(learning_rate=1e-2, critic_learning_rate=1e-2, schedule="linear")
    roles = make_roles()
    batch = ppo_steps.estimate_advantages(noisy(ready(roles, cfg)), cfg)[0]

    def engines(roles):
        return ppo.engines(roles.policy, roles.critic, cfg.ppo, cfg.engine)

    pair = engines(roles)
    for step in (1, 2):
        ppo_steps.update(*pair, batch, cfg, step=step)
    ppo_steps.save(*pair, tmp_path / "kept")
    kept = weights(roles.policy), weights(roles.critic)
    ppo_steps.update(*pair, batch, cfg, step=3)
    expected = weights(roles.policy), weights(roles.critic)

    fresh = make_roles()
    pair = engines(fresh)
    ppo_steps.load(*pair, tmp_path / "kept")
    for model, then in zip((fresh.policy, fresh.critic), kept, strict=True):
        assert_same(then, weights(model), rtol=0, atol=0)
    ppo_steps.update(*pair, batch, cfg, step=3)
    for model, then in zip((fresh.policy, fresh.critic), expected, strict=True):
        assert_same(then, weights(model), rtol=0, atol=1e-7)

    again = make_roles()
    for model, then, now in zip((again.policy, again.critic), kept, expected, strict=True):
        model.load_state_dict(then)  # the weights alone: Adam and the schedule begin anew
        assert any(not torch.equal(then[name], now[name]) for name in now)
    ppo_steps.update(*engines(again), batch, cfg, step=3)
    for model, then in zip((again.policy, again.critic), expected, strict=True):
        apart = max(float((t - then[name]).abs().max()) for name, t in weights(model).items())
        assert apart > 1e-3, "the test could not tell"


def test_the_schedule_ends_with_the_last_optimizer_step(make_roles):
    """huggingface/trl#2530, huggingface/trl#5645: steps were counted in one unit, taken in another.

    Linear to zero, under gradient accumulation: the last of all optimizer steps has the smallest
    rate above 0, and after it the rate is 0.
    """
    cfg = stage(
        steps=3, epochs=2, minibatches=2, micro_batch_size=2, schedule="linear", learning_rate=1.0
    )
    roles = make_roles()
    batch = ppo_steps.estimate_advantages(noisy(ready(roles, cfg)), cfg)[0]
    batch = replace(batch, advantages=torch.zeros_like(batch.advantages))  # it stays where it is
    pair = ppo.engines(roles.policy, roles.critic, cfg.ppo, cfg.engine)
    rates = []
    for step in (1, 2, 3):
        ppo_steps.update(*pair, batch, cfg, step=step)
        rates.append([one.learning_rate for one in pair])
    assert [policy for policy, _ in rates] == pytest.approx([2 / 3, 1 / 3, 0.0])
    assert [critic for _, critic in rates] == pytest.approx([2e-3 / 3, 1e-3 / 3, 0.0])


# processes ---------------------------------------------------------------------------------------


class TwoRanks:
    """Two threads that stand for two processes: sums and lists are over both of them."""

    def __init__(self, monkeypatch):
        self._barrier = threading.Barrier(2, timeout=30)
        self._own = threading.local()
        self._given = [None, None]
        monkeypatch.setattr(engine, "sum_over_ranks", lambda value: sum(self._exchange(value)))
        monkeypatch.setattr(engine, "gather_objects", self._exchange)

    def _exchange(self, value):
        self._given[self._own.rank] = value
        self._barrier.wait()
        both = list(self._given)
        self._barrier.wait()
        return both

    def __call__(self, function, *parts):
        """[function(part) on rank 0, on rank 1]."""

        def work(rank):
            self._own.rank = rank
            try:
                return function(parts[rank])
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(work, range(2)))


class Summed:
    """Stands in for an engine: gradients add up, weights stay, passes are counted."""

    grad_norm, learning_rate = None, 0.0

    def __init__(self, module):
        self.module, self.passes = copy.deepcopy(module), 0

    def backward(self, loss):
        self.passes += 1
        loss.backward()

    def step(self):
        pass

    def gradients(self):
        named = self.module.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.requires_grad}


def by_length(batch):
    """The rows of two ranks: one has the short answers, the other the long ones."""
    order = batch.response_mask.sum(1).argsort()
    return order[: len(order) // 2], order[len(order) // 2 :]


def test_advantages_and_numbers_do_not_depend_on_the_number_of_ranks(make_roles, monkeypatch):
    """huggingface/trl#2596: each rank whitened by its own mean and variance."""
    cfg = stage(whiten_rewards=True, kl_coef=0.3)
    batch = noisy(ready(make_roles(), cfg))
    whole, stats = ppo_steps.estimate_advantages(batch, cfg)
    alone = [ppo_steps.estimate_advantages(batch.rows(rows), cfg)[0] for rows in by_length(batch)]
    ranks = TwoRanks(monkeypatch)
    parts = ranks(
        lambda rows: ppo_steps.estimate_advantages(batch.rows(rows), cfg),
        *by_length(batch),
    )
    for rows, (found, numbers), by_itself in zip(by_length(batch), parts, alone, strict=True):
        expected = whole.rows(rows)
        assert_close(found.advantages, expected.advantages, **CLOSE)
        assert_close(found.returns, expected.returns, **CLOSE)
        assert numbers == pytest.approx(stats, rel=1e-4, abs=1e-5)
        apart = (by_itself.advantages - expected.advantages).abs().max()
        assert float(apart) > 0.05, "whitening by rank would not show"


def test_gradients_do_not_depend_on_the_number_of_ranks(make_roles, monkeypatch):
    """huggingface/trl#2596: a mean of means gives a rank of short answers too much weight."""
    cfg = stage(epochs=1, micro_batch_size=2, entropy_coef=0.1)
    roles = make_roles()
    batch = ppo_steps.estimate_advantages(noisy(ready(roles, cfg)), cfg)[0]

    def update(rows):
        pair = Summed(roles.policy), Summed(roles.critic)
        return pair, ppo_steps.update(*pair, batch.rows(rows), cfg, step=1)

    whole, stats = update(torch.arange(len(batch)))
    ranks = TwoRanks(monkeypatch)
    rows = by_length(batch)
    lengths = [int(batch.response_mask[part].sum()) for part in rows]
    assert lengths[1] > 2 * lengths[0]
    (one, numbers), (other, same) = ranks(update, *rows)
    assert numbers == same == pytest.approx(stats, rel=1e-4, abs=1e-6)
    for role, first, second in zip(whole, one, other, strict=True):
        total = first.gradients()
        total = {name: grad + second.gradients()[name] for name, grad in total.items()}
        assert max(float(grad.abs().max()) for grad in total.values()) > 1e-3
        assert_same(role.gradients(), total, **CLOSE)


def test_ranks_take_as_many_passes_whatever_their_answers(make_roles, monkeypatch):
    """CarperAI/trlx#373, OpenRLHF/OpenRLHF#949: a rank with less to do left the others waiting.

    One rank's answers are their EOS alone, the other's run to the limit.
    """
    cfg = stage(epochs=2, minibatches=2, micro_batch_size=1)
    roles = make_roles()
    batch = ready(roles, cfg)
    short, long = by_length(batch)
    mask = batch.response_mask.clone()
    mask[short, 1:] = False
    mask[long] = True
    batch = replace(batch, response_mask=mask)
    ranks = TwoRanks(monkeypatch)

    def update(rows):
        part, stats = ppo_steps.estimate_advantages(batch.rows(rows), cfg)
        pair = Summed(roles.policy), Summed(roles.critic)
        stats |= ppo_steps.update(*pair, part, cfg, step=1)
        return [one.passes for one in pair], stats

    (passes, stats), (others, same) = ranks(update, short, long)
    assert passes == others == [2 * len(short), 2 * len(short)]
    assert stats == same
