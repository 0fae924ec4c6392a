"""The sampler: the right distribution, noise that belongs to a row, and nothing after the end."""

from __future__ import annotations

from types import SimpleNamespace

import ppo_steps
import pytest
import torch
from rounding import TINY
from torch.testing import assert_close
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from rlhf import models, rollout
from rlhf.config import PPOStage, SamplingConfig
from rlhf.methods.settings import LoraConfig
from rlhf.rollout import KeyedSampler, Rollout, mix, pad_left, sample, uniform

PAD, EOS = 0, 2
VOCABULARY = 24
PROMPTS = [[1, 5, 6], [1, 7], [1, 8, 9, 10, 11, 12], [1, 13], [1, 14, 15, 16], [1, 5, 6]]
KEYS = [10, 11, 12, 13, 14, 15]
CPU = torch.device("cpu")


@pytest.fixture
def policy(tiny_model):
    """A random model of few tokens, so that EOS comes up within a dozen draws."""
    return tiny_model(vocab_size=VOCABULARY)


def draw(policy, prompts=PROMPTS, *, keys=KEYS, seed=3, batch_size=64, new=12, **settings):
    cfg = SamplingConfig(batch_size=batch_size, max_new_tokens=new, **settings)
    return sample(
        policy, prompts, keys=keys, seed=seed, cfg=cfg, pad_id=PAD, eos_id=EOS, device=CPU
    )


def logprobs_of(drawn: Rollout) -> list[torch.Tensor]:
    return [row[mask] for row, mask in zip(drawn.old_logprobs, drawn.response_mask, strict=True)]


def same(one: Rollout, other: Rollout, order=None) -> None:
    order = list(range(len(one.prompts))) if order is None else order
    answers, logprobs = one.answer_ids(), logprobs_of(one)
    assert other.answer_ids() == [answers[i] for i in order]
    assert other.ended.tolist() == [bool(one.ended[i]) for i in order]
    for found, i in zip(logprobs_of(other), order, strict=True):
        assert_close(found, logprobs[i], rtol=0, atol=TINY)


# an answer belongs to its row --------------------------------------------------------------------


def test_same_key_and_seed_draw_the_same_answer(policy):
    drawn = draw(policy)
    assert len({tuple(answer) for answer in drawn.answer_ids()}) == 6
    assert len({len(answer) for answer in drawn.answer_ids()}) > 2  # there is padding to get wrong
    same(drawn, draw(policy))


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5])
def test_batch_size_does_not_matter(policy, batch_size):
    same(draw(policy), draw(policy, batch_size=batch_size))


def test_order_and_neighbours_do_not_matter(policy):
    drawn = draw(policy)
    order = [4, 1, 5, 0, 3, 2]
    again = draw(policy, [PROMPTS[i] for i in order], keys=[KEYS[i] for i in order])
    same(drawn, again, order)
    for i, key in enumerate(KEYS):
        same(drawn, draw(policy, [PROMPTS[i]], keys=[key]), [i])
        long_neighbour = [[1, *[9] * 20], PROMPTS[i]]
        both = draw(policy, long_neighbour, keys=[99, key])
        assert both.prompt_mask[1].sum() == len(PROMPTS[i])
        assert both.answer_ids()[1] == drawn.answer_ids()[i]


def test_equal_prompts_with_different_keys_get_different_answers(policy):
    answers = draw(policy, [PROMPTS[0]] * 40, keys=range(40)).answer_ids()
    assert len({tuple(answer) for answer in answers}) > 35


def test_another_seed_draws_other_answers(policy):
    one, other = draw(policy, seed=0).answer_ids(), draw(policy, seed=1).answer_ids()
    assert all(a != b for a, b in zip(one, other, strict=True))


def test_torchs_own_generator_is_neither_read_nor_moved(policy):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = draw(policy).answer_ids()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert draw(policy).answer_ids() == one


def test_a_steps_noise_depends_on_seed_step_and_place(policy, monkeypatch):
    renderer = SimpleNamespace(pad_id=PAD, eos_id=EOS)

    def step(number, seed, prompts=PROMPTS):
        cfg = PPOStage(run_name="t", seed=seed, sampling=SamplingConfig(max_new_tokens=12))
        return ppo_steps.draw(policy, prompts, cfg, renderer, step=number)

    def answers(*args):
        return [tuple(answer) for answer in step(*args).answer_ids()]

    assert answers(1, 0) == answers(1, 0)
    grid = [answers(number, seed) for number, seed in ((1, 0), (2, 0), (1, 1), (3, 1))]
    for place in range(len(PROMPTS)):
        assert len({found[place] for found in grid}) == len(grid)

    whole = answers(2, 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):  # two processes draw what one would
        monkeypatch.setenv("RANK", str(rank))
        assert answers(2, 0) == whole[rank::2]


# the distribution --------------------------------------------------------------------------------


def chi_square(counts, probabilities):
    """Pearson's statistic and degrees of freedom; tokens expected under 5 times form one bin."""
    total = int(counts.sum())
    rare = probabilities * total < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([probabilities[~rare], probabilities[rare].sum()[None]]) * total
    kept = expected > 0
    return float(((counts - expected).square() / expected)[kept].sum()), int(kept.sum()) - 1


def bound(freedom):
    """Mean plus five standard deviations of chi-square: 1 right sampler in 1,000 is above it."""
    return freedom + 5 * (2 * freedom) ** 0.5


DRAWS = 20_000


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_tokens_come_as_often_as_the_softmax_says(policy, temperature):
    drawn = draw(
        policy,
        [PROMPTS[0]] * DRAWS,
        keys=range(DRAWS),
        temperature=temperature,
        batch_size=5_000,
        new=2,
    )
    logits = policy(torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    probabilities = torch.softmax(logits / temperature, 0)
    first = drawn.responses[:, 0]
    found, freedom = chi_square(torch.bincount(first, minlength=VOCABULARY), probabilities)
    assert freedom >= 8
    assert found < bound(freedom)
    # The test can tell: the same draws are far from the other temperature.
    other = torch.softmax(logits / (1.7 - temperature), 0)
    assert chi_square(torch.bincount(first, minlength=VOCABULARY), other)[0] > 4 * bound(freedom)

    # The second token too, after the likeliest first one: its noise must not hang on the first's.
    token = int(torch.bincount(first).argmax())
    assert token != EOS
    second = drawn.responses[first == token, 1]
    logits = policy(torch.tensor([[*PROMPTS[0], token]])).logits[0, -1].double()
    probabilities = torch.softmax(logits / temperature, 0)
    found, freedom = chi_square(torch.bincount(second, minlength=VOCABULARY), probabilities)
    assert found < bound(freedom)


def test_sampler_never_draws_what_cannot_happen():
    scores = torch.tensor([[-torch.inf, 1.0, -torch.inf, 1.0, -torch.inf]]).repeat(2_000, 1)
    sampler = KeyedSampler(range(2_000), seed=0, cfg=SamplingConfig(), width=1)
    choice = sampler(torch.zeros(2_000, 1, dtype=torch.long), scores)
    assert (choice == 0).sum(1).tolist() == [1] * 2_000  # one token is left, with logit 0
    tokens = choice.argmax(1)
    assert set(tokens.tolist()) == {1, 3}
    assert abs(float((tokens == 1).float().mean()) - 0.5) < 5 * 0.5 / 2_000**0.5
    assert_close(sampler.logprobs[0], torch.full((2_000,), 0.5).log())


@pytest.mark.parametrize(("noise", "expected"), [(0.0, 1), (1 - 2**-53, 3)])
def test_the_ends_of_the_noise_draw_possible_tokens(monkeypatch, noise, expected):
    monkeypatch.setattr(
        rollout, "uniform", lambda keys, position: torch.tensor([noise], dtype=torch.float64)
    )
    scores = torch.tensor([[-torch.inf, 1.0, -torch.inf, 1.0, -torch.inf]])
    sampler = KeyedSampler([0], seed=0, cfg=SamplingConfig(), width=1)
    sampler(torch.zeros(1, 1, dtype=torch.long), scores)
    assert sampler.logprobs[0].isfinite().all()
    assert int(sampler(torch.zeros(1, 1, dtype=torch.long), scores).argmax(1)) == expected


@pytest.fixture
def by_place():
    """A GPT-2, in which where a token stands is an input of its own."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def test_padding_moves_no_token(by_place):
    drawn = draw(by_place)
    for i, key in enumerate(KEYS):
        same(drawn, draw(by_place, [PROMPTS[i]], keys=[key]), [i])
        prompt, answer = PROMPTS[i], drawn.answer_ids()[i]
        logits = by_place(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None])
        assert_close(logprobs_of(drawn)[i], expected.squeeze(1), rtol=0, atol=TINY)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
@torch.no_grad()
def test_logprobs_are_those_of_a_teacher_forced_pass(policy, temperature):
    drawn = draw(policy, temperature=temperature)
    for prompt, answer, found in zip(PROMPTS, drawn.answer_ids(), logprobs_of(drawn), strict=True):
        logits = policy(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits / temperature, -1)
        expected = expected.gather(1, torch.tensor(answer)[:, None]).squeeze(1)
        assert_close(found, expected, rtol=0, atol=TINY)


# the end -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [64, 3])
def test_the_answer_ends_with_its_eos(policy, batch_size):
    prompts = PROMPTS * 4
    drawn = draw(policy, prompts, keys=range(24), batch_size=batch_size)
    assert 0 < int(drawn.ended.sum()) < 24
    B, R = drawn.responses.shape
    assert drawn.response_mask.shape == drawn.old_logprobs.shape == (B, R)
    assert R <= 12
    for row in range(B):
        n = int(drawn.response_mask[row].sum())
        answer = drawn.responses[row, :n].tolist()
        assert drawn.response_mask[row].tolist() == [True] * n + [False] * (R - n)
        assert EOS not in answer[:-1]
        assert bool(drawn.ended[row]) == (answer[-1] == EOS)
        assert drawn.ended[row] or n == 12
        assert drawn.responses[row, n:].tolist() == [PAD] * (R - n)
        assert drawn.old_logprobs[row, n:].tolist() == [0.0] * (R - n)
        assert bool((drawn.old_logprobs[row, :n] < 0).all())  # of the EOS too
        assert drawn.prompts[row, drawn.prompt_mask[row]].tolist() == prompts[row]
        assert drawn.prompt_mask[row, -1]  # padded on the left


def test_an_answer_may_be_its_eos_alone(policy):
    with torch.no_grad():
        policy.lm_head.weight.zero_()  # every token is as likely
    drawn = draw(policy, [PROMPTS[0]] * 200, keys=range(200), new=3)
    first = drawn.responses[:, 0] == EOS
    assert bool(first.any())
    assert drawn.response_mask[first].sum(1).tolist() == [1] * int(first.sum())
    assert bool(drawn.ended[first].all())


def test_a_sampled_pad_counts(policy):
    """Nothing is guessed from ids: a pad the policy did draw is one of its tokens."""
    with torch.no_grad():
        policy.lm_head.weight.zero_()
    drawn = draw(policy, [PROMPTS[0]] * 100, keys=range(100), new=3)
    assert bool((drawn.responses[drawn.response_mask] == PAD).any())


# the policy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_policys_mode_is_restored(policy, training):
    expected = draw(policy.eval()).answer_ids()
    policy.train(training)
    assert draw(policy).answer_ids() == expected
    assert all(module.training == training for module in policy.modules())


def test_no_dropout_and_no_gradient_in_sampling(tiny_model):
    policy = tiny_model(vocab_size=VOCABULARY, attention_dropout=0.9)
    expected = draw(policy).answer_ids()
    drawn = draw(policy.train())
    assert drawn.answer_ids() == expected
    assert not drawn.old_logprobs.requires_grad


NASTY = {
    "top_k": 1,
    "top_p": 0.01,
    "temperature": 0.01,
    "do_sample": True,
    "repetition_penalty": 9.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": [5, 6, 7],
    "begin_suppress_tokens": [8, 9],
    "bad_words_ids": [[10]],
    "forced_bos_token_id": 4,
    "forced_eos_token_id": EOS,
    "min_new_tokens": 12,
    "max_length": 3,
    "max_new_tokens": 2,
    "eos_token_id": [3, 4, 5],
    "num_return_sequences": 1,
    "sequence_bias": [[[11], 20.0]],
    "use_cache": False,
}


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "lora"])
def test_the_models_own_generation_config_has_no_say(tiny_model, wrapped):
    def make():
        policy = tiny_model(vocab_size=VOCABULARY)
        if wrapped:
            policy = models.trainable(policy, LoraConfig(rank=2))
        return policy

    expected = draw(make())
    for name, value in NASTY.items():
        policy = make()
        inner = policy.get_base_model() if wrapped else policy
        inner.generation_config = GenerationConfig(pad_token_id=7, eos_token_id=EOS)
        setattr(inner.generation_config, name, value)
        same(expected, draw(policy))
        assert getattr(policy.generation_config, name) == value, "it is left as it was"


# top-k and top-p ---------------------------------------------------------------------------------


def kept_by_definition(probabilities, top_k, top_p):
    """Token by token, likeliest first, until enough are kept; then all that tie with the last."""
    order = sorted(range(len(probabilities)), key=lambda t: -probabilities[t])
    order = order[:top_k] if top_k else order
    total, kept = sum(probabilities[t] for t in order), []
    for token in order:
        kept.append(token)
        if top_p and sum(probabilities[t] for t in kept) / total >= top_p:
            break
    least = probabilities[kept[-1]]
    return {t for t, p in enumerate(probabilities) if p >= least}


@pytest.mark.parametrize("top_k", [None, 1, 5, 24, 99])
@pytest.mark.parametrize("top_p", [None, 0.01, 0.3, 0.9, 1.0])
def test_the_floor_keeps_what_the_definition_keeps(top_k, top_p):
    torch.manual_seed(1)
    logprobs = torch.log_softmax(2 * torch.randn(40, VOCABULARY), -1)
    floors = rollout.find_floors(logprobs, top_k=top_k, top_p=top_p)
    for row, floor in zip(logprobs, floors, strict=True):
        kept = kept_by_definition(row.double().exp().tolist(), top_k, top_p)
        if top_p != 1.0:  # where the last tokens add less than rounding
            assert {t for t in range(VOCABULARY) if row[t] >= floor} == kept
        if len(kept) < VOCABULARY and top_p != 1.0:  # half-way to the next one
            least, most = min(row[t] for t in kept), max(row[t] for t in set(range(24)) - kept)
            assert float(floor) == pytest.approx(float(least + most) / 2)


def test_ties_with_the_last_one_are_kept():
    logprobs = torch.log(torch.tensor([[0.4, 0.2, 0.2, 0.2]]))
    floor = rollout.find_floors(logprobs, top_k=2, top_p=None)
    assert float(floor) == -torch.inf
    logprobs = torch.log(torch.tensor([[0.4, 0.2, 0.2, 0.1, 0.1]]))
    floor = rollout.find_floors(logprobs, top_k=2, top_p=None)
    assert (logprobs >= floor[:, None]).tolist() == [[True, True, True, False, False]]


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.5}, {"top_k": 6, "top_p": 0.8}])
@torch.no_grad()
def test_only_what_is_kept_is_drawn_and_as_often_as_it_should(policy, settings):
    n = 4_000
    drawn = draw(policy, [PROMPTS[0]] * n, keys=range(n), batch_size=n, new=1, **settings)
    logits = policy(torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    full = torch.softmax(logits, 0)
    kept = kept_by_definition(full.tolist(), settings.get("top_k"), settings.get("top_p"))
    assert 1 < len(kept) < 10
    counts = torch.bincount(drawn.responses[:, 0], minlength=VOCABULARY)
    assert {t for t in range(VOCABULARY) if counts[t]} <= kept
    inside = torch.tensor([float(full[t]) if t in kept else 0.0 for t in range(VOCABULARY)])
    inside /= inside.sum()
    order = sorted(kept)
    found, freedom = chi_square(counts[order], inside[order].double())
    assert found < bound(freedom)
    expected = inside.log()[drawn.responses[:, 0]]
    assert_close(drawn.old_logprobs[:, 0], expected.float(), rtol=0, atol=TINY)


@pytest.mark.parametrize(
    "settings", [{"top_k": 4}, {"top_p": 0.6}, {"temperature": 0.7, "top_k": 6}]
)
@torch.no_grad()
def test_a_training_pass_gives_the_logprobs_that_were_sampled(policy, settings):
    """With other padding, so that rounding differs; and a wrong floor would show."""
    cfg = SamplingConfig(max_new_tokens=12, **settings)
    drawn = draw(policy, **settings)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, drawn.answer_ids(), strict=True)):
        ids = torch.tensor([prompt + answer])
        logits = policy(ids).logits[:, len(prompt) - 1 : -1] / cfg.temperature
        floors = drawn.floors[row : row + 1, : len(answer)]
        assert bool(torch.isfinite(floors).all())
        tokens = torch.tensor([answer])
        restricted = rollout.restrict(logits, tokens, floors).log_softmax(-1)
        now = restricted.gather(-1, tokens[..., None])[0, :, 0]
        assert_close(now, drawn.old_logprobs[row, : len(answer)], rtol=0, atol=TINY)
        full = logits.log_softmax(-1).gather(-1, tokens[..., None])[0, :, 0]
        assert bool((now > full + 1e-3).any()), "nothing was ruled out"


def test_a_drawn_token_stays_possible_when_the_weights_have_moved():
    logits = torch.tensor([[[0.0, 3.0, 2.0]]])
    out = rollout.restrict(logits, torch.tensor([[0]]), torch.tensor([[-1.0]]))
    assert out.tolist() == [[[0.0, 3.0, -torch.inf]]]  # token 2 has log p = -1.35
    same_logits = rollout.restrict(logits, torch.tensor([[0]]), torch.tensor([[-torch.inf]]))
    assert torch.equal(same_logits, logits)


def test_several_answers_to_a_prompt_stand_together_on_one_process(policy, monkeypatch):
    renderer = SimpleNamespace(pad_id=PAD, eos_id=EOS)
    sampling = SamplingConfig(max_new_tokens=12, per_prompt=4)
    cfg = PPOStage(run_name="t", sampling=sampling)
    whole = ppo_steps.draw(policy, PROMPTS[:4], cfg, renderer, step=1)
    prompts = [
        row[mask].tolist() for row, mask in zip(whole.prompts, whole.prompt_mask, strict=True)
    ]
    assert prompts == [prompt for prompt in PROMPTS[:4] for _ in range(4)]
    answers = whole.answer_ids()
    assert all(len({tuple(a) for a in answers[n : n + 4]}) > 1 for n in range(0, 16, 4))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    mine = ppo_steps.draw(policy, PROMPTS[:4], cfg, renderer, step=1)
    assert mine.answer_ids() == answers[4:8] + answers[12:16]


# noise -------------------------------------------------------------------------------------------

GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(state):
    """Sebastiano Vigna's splitmix64.c, in his words; yields the stream from `state`."""
    while True:
        state = (state + GOLDEN) % 2**64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        yield z ^ (z >> 31)


def unsigned(x):
    return x % 2**64


def test_mix_is_splitmix64():
    # The stream of seed 1234567, as published with many implementations of it.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    stream = splitmix64(1234567)
    assert [next(stream) for _ in range(3)] == published
    for step, expected in enumerate(published):
        assert unsigned(mix(unsigned(1234567 + step * GOLDEN))) == expected
    for x in (0, 1, 2**63, 2**64 - 1):
        assert unsigned(mix(x)) == next(splitmix64(x))
        assert -(2**63) <= mix(x) < 2**63
    assert mix(-5) == mix(2**64 - 5)


def test_uniform_by_hand():
    keys = [17, -3]
    for position in (0, 5):
        hashed = next(splitmix64(position))
        bits = [next(splitmix64(unsigned(key) ^ hashed)) for key in keys]
        expected = [float(b >> 11) / 2**53 for b in bits]
        assert uniform(torch.tensor(keys), position).tolist() == expected
    assert uniform(torch.tensor(keys), 0).dtype == torch.float64


def test_uniform_is_uniform():
    """Moments, and no correlation between neighbouring keys or positions, within 5 sigma."""
    n = 4_000
    sampler = KeyedSampler(range(n), seed=0, cfg=SamplingConfig(), width=0)
    noise = torch.stack([uniform(sampler.keys, position) for position in range(3)])  # [3, n]
    assert float(noise.min()) >= 0
    assert float(noise.max()) < 1
    centred = noise - 0.5
    sigma = (3 * n) ** -0.5
    assert abs(float(centred.mean())) < 5 * sigma * (1 / 12) ** 0.5
    # Of the square: mean 1/12, variance 1/80 - 1/144.
    assert abs(float(centred.square().mean()) - 1 / 12) < 5 * sigma * (1 / 80 - 1 / 144) ** 0.5
    for product in (
        centred[:, 1:] * centred[:, :-1],  # keys
        centred[1:] * centred[:-1],  # positions
        centred[2] * centred[0],
    ):
        assert abs(float(product.mean())) < 5 / 12 / product.numel() ** 0.5
    tenths = torch.histc(noise.flatten(), 10, 0, 1)
    found, freedom = chi_square(tenths, torch.full((10,), 0.1, dtype=torch.double))
    assert found < bound(freedom)


def test_no_two_rows_of_small_seeds_share_their_noise():
    """A symmetric mixture would give seed 3 and row 5 the noise of seed 5 and row 3."""
    keys = [
        int(key)
        for seed in range(48)
        for key in KeyedSampler(range(128), seed=seed, cfg=SamplingConfig(), width=0).keys
    ]
    assert len(set(keys)) == 48 * 128


# ragged rows -------------------------------------------------------------------------------------


def test_pad_left():
    ids, mask = pad_left([[4, 5, 6], [7]], PAD, CPU)
    assert ids.tolist() == [[4, 5, 6], [PAD, PAD, 7]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]
    assert mask.dtype == torch.bool
