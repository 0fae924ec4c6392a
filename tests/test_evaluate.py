"""Held-out measures: by hand, with made-up scorers, and with nothing to measure."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rlhf import evaluate, models
from rlhf.config import EvaluationConfig, RewardConfig, SamplingConfig
from rlhf.evaluate import Answers, HeldOut
from rlhf.intervals import Mean, mean_of, share, win_rate, wins
from rlhf.rewards import Rewards
from rlhf.text import Renderer

PAD = 0
ROWS = [
    {"prompt": [{"role": "user", "content": f"Tell me{' the fox' * n}."}]} for n in (1, 3, 2, 4)
]


@pytest.fixture
def renderer(tiny_tokenizer):
    return Renderer(tiny_tokenizer)


@pytest.fixture
def roles(tiny_model):
    reference = models.freeze(tiny_model(seed=0, initializer_range=0.1))
    return SimpleNamespace(policy=reference, reference=reference)


def by_sum(monkeypatch):
    """The reward model is a sum: the score of a sequence is that of its token ids."""
    calls = []

    def scores(model, ids, mask):
        calls.append(len(ids))
        return (ids * mask).sum(1).float()

    monkeypatch.setattr(models, "scores", scores)
    return calls


# numbers -----------------------------------------------------------------------------------------


def test_mean_by_hand():
    # Mean 3, deviations -2 0 -1 3, variance 14/3, standard error sqrt(14/12).
    found = mean_of([1, 3, 2, 6])
    half = 1.96 * math.sqrt(14 / 12)
    assert (found.value, found.low, found.high) == pytest.approx((3, 3 - half, 3 + half))
    assert str(mean_of([1.0, 1.0])) == "1.000 (95 % 1.000 to 1.000)"
    assert mean_of([5.0]) == Mean(5.0, 5.0, 5.0)


def test_win_rate_by_hand():
    # win, loss, tie, win: 2.5 of 4; deviations .375 -.625 -.125 .375, variance .6875/3.
    found = win_rate([2, 1, 5, 9], [1, 2, 5, 0])
    half = 1.96 * math.sqrt(0.6875 / 3 / 4)
    assert (found.value, found.low, found.high) == pytest.approx(
        (0.625, 0.625 - half, 0.625 + half)
    )
    assert win_rate([1.0, 1.0], [1.0, 1.0]).value == 0.5
    assert win_rate([1, 2], [0, 0]).value == 1.0
    assert win_rate([0, 0], [1, 2]).value == 0.0
    assert wins([math.nan, 1, math.nan, 2], [1, math.nan, math.nan, 1]) == [0.5, 0.5, 0.5, 1]
    with pytest.raises(ValueError, match="zip"):
        win_rate([1.0], [1.0, 2.0])


def test_a_share_has_the_interval_of_wilson():
    """The values p for which the share found is 1.96 standard deviations away from p."""
    for successes, n in ((0, 5), (3, 4), (41, 120), (1, 1), (12, 12)):
        found = share([1.0] * successes + [0.0] * (n - successes))
        steps = [i / 200_000 for i in range(200_001)]
        inside = [
            p for p in steps if abs(successes / n - p) <= 1.96 * math.sqrt(p * (1 - p) / n) + 1e-12
        ]
        assert found.value == successes / n
        assert found.low == pytest.approx(inside[0], abs=1e-5)
        assert found.high == pytest.approx(inside[-1], abs=1e-5)
    assert share([0.5, 0.5]).value == 0.5


# the reward model --------------------------------------------------------------------------------


def test_scores_come_in_order(monkeypatch):
    calls = by_sum(monkeypatch)
    sequences = [[1, 2, 3], [40], [5, 5], [6], [7, 1, 1, 1, 1]]
    for size, expected in ((2, [2, 2, 1]), (5, [5]), (64, [5])):
        calls.clear()
        found = evaluate.score_all(None, sequences, PAD, size)
        assert found == [6, 40, 10, 6, 11]
        assert calls == expected
    assert evaluate.score_all(None, [], PAD, 4) == []


def test_pairs_by_hand(monkeypatch):
    by_sum(monkeypatch)
    rows = [
        {"chosen_ids": [9, 9], "rejected_ids": [1, 1, 1]},  # right (18 > 3), and the shorter
        {"chosen_ids": [1, 1, 1], "rejected_ids": [8]},  # wrong (3 < 8), and the longer
        {"chosen_ids": [4, 4], "rejected_ids": [5, 3]},  # a tie in both
        {"chosen_ids": [7, 1, 1, 1], "rejected_ids": [2]},  # right (10 > 2), and the longer
    ]
    found = evaluate.pairs(rows, *evaluate.pair_scores(None, rows, PAD, batch_size=3))
    assert found["eval/accuracy"] == pytest.approx(2.5 / 4)
    assert found["eval/accuracy_longer"] == pytest.approx(2.5 / 4)
    assert found["eval/margin"] == pytest.approx((15 - 5 + 0 + 8) / 4)
    interval = share([1, 0, 0.5, 1])
    assert found["eval/accuracy_ci_low"] == interval.low
    assert found["eval/accuracy_ci_high"] == interval.high
    shorter = [{"chosen_ids": [9], "rejected_ids": [1, 1]}]
    found = evaluate.pairs(shorter, *evaluate.pair_scores(None, shorter, PAD, batch_size=3))
    assert (found["eval/accuracy"], found["eval/accuracy_longer"]) == (1.0, 0.0)


# answers -----------------------------------------------------------------------------------------


def sampling(temperature=1.0):
    return SamplingConfig(temperature=temperature, max_new_tokens=6, batch_size=2)


def held_out(renderer, roles, *, prompts=3, gold=None, second=None, seed=0, temperature=1.0):
    return HeldOut(
        ROWS,
        [renderer.prompt(row["prompt"]) for row in ROWS],
        renderer,
        roles,
        Rewards(RewardConfig({"rm": ["rm/t"]}), {}, {"rm/t": None}),  # see by_sum
        gold=gold,
        second=second,
        cfg=EvaluationConfig(prompts=prompts),
        sampling=sampling(temperature),
        seed=seed,
        gold_path=None,
    )


def made_up_gold(questions, answers, rows):
    """Longer questions are better; the three arguments go row by row."""
    assert [row["prompt"][-1]["content"] for row in rows] == questions
    assert len(answers) == len(rows)
    return [len(question) / 100 for question in questions]


def test_answers_carry_every_measure(renderer, roles, monkeypatch, tiny_model):
    by_sum(monkeypatch)
    policy = tiny_model(seed=0, initializer_range=0.1)
    with torch.no_grad():
        policy.lm_head.weight += 0.1 * torch.randn(
            policy.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)
        )
    found = held_out(renderer, roles, gold=made_up_gold).answers(policy)
    assert found.prompt_ids == [renderer.prompt(row["prompt"]) for row in ROWS[:3]]
    assert found.gold == [len(row["prompt"][0]["content"]) / 100 for row in ROWS[:3]]
    for i in range(3):
        prompt, answer = found.prompt_ids[i], found.answer_ids[i]
        assert 1 <= len(answer) <= 6
        assert found.texts[i] == renderer.decode(answer)
        assert found.ended[i] == (answer[-1] == renderer.eos_id)
        assert found.scores[i] == sum(prompt) + sum(answer)
        total = own = 0.0
        for model, sign in ((policy, 1), (roles.reference, -1)):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            taken = torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None])
            total += sign * float(taken.sum())
            own = float(taken.sum()) if model is policy else own
        assert found.kl[i] == pytest.approx(total, abs=1e-4)
        assert found.logprobs[i] == pytest.approx(own, abs=1e-4)
    assert max(map(abs, found.kl)) > 0.1


def test_a_second_reward_model_watches_where_there_is_no_gold(renderer, roles, monkeypatch):
    by_sum(monkeypatch)
    alone = held_out(renderer, roles)
    assert alone.course.measure is None
    assert alone.answers(roles.reference).measure is None
    seen = held_out(renderer, roles, second=object())  # by_sum scores whatever the model is
    assert seen.course.measure == "second reward model"
    found = seen.answers(roles.reference)
    sums = [sum(p) + sum(a) for p, a in zip(found.prompt_ids, found.answer_ids, strict=True)]
    assert found.second == found.measure == sums
    told = seen.compare(found, found)
    assert told["eval/second"] == told["eval/second_sft"] == pytest.approx(sum(sums) / 3)
    with_gold = held_out(renderer, roles, second=object(), gold=made_up_gold)
    assert with_gold.course.measure == "gold"
    found = with_gold.answers(roles.reference)
    assert found.measure == found.gold
    assert found.second == sums


def test_what_is_watched_of_answers(renderer, roles, monkeypatch):
    by_sum(monkeypatch)
    ours = held_out(renderer, roles, gold=made_up_gold)
    found = ours.baseline()
    now = found.at(7)
    tokens = sum(map(len, found.answer_ids))
    assert now.entropy == pytest.approx(-sum(found.logprobs) / tokens)
    assert now.length == tokens / 3
    assert (now.step, now.scores, now.measure) == (7, found.scores, found.gold)
    ours.baseline()  # a run that goes on has the SFT model's already
    assert [point["step"] for point in ours.course.points] == [0]
    longer = replace(found, answer_ids=[ids * 2 for ids in found.answer_ids])
    monkeypatch.setattr(ours, "answers", lambda policy: longer)
    assert ours.evaluate() == ours.compare(found, longer)
    said = ours.follow(10)
    assert any(text.startswith("warning: length: length is up 100%") for text in said)
    assert [point["step"] for point in ours.course.points] == [0, 10]
    none = held_out(renderer, roles, prompts=0)
    none.baseline()
    assert (none.evaluate(), none.follow(20), none.course.points) == ({}, [], [])


def test_held_out_sampling_is_the_same_for_every_model_and_temperature(
    renderer, roles, monkeypatch
):
    by_sum(monkeypatch)

    def drawn(**settings):
        return held_out(renderer, roles, **settings).answers(roles.reference)

    first = drawn()
    assert drawn() == first
    assert drawn(temperature=0.3) == first
    assert drawn(seed=1).answer_ids != first.answer_ids
    more = drawn(prompts=4)
    assert more.answer_ids[:3] == first.answer_ids, "more prompts change no answer"
    assert first.kl == pytest.approx([0, 0, 0], abs=1e-5)
    assert first.gold is None


# comparing ---------------------------------------------------------------------------------------


def answers(scores, gold, kl=(0.5, 1.5, 1.0)):
    return Answers(
        prompt_ids=[[1]] * 3,
        answer_ids=[[2, 3, 2, 3], [2, 3], [4]],  # bigrams: 23 32 23, 23, none
        texts=[f"text {score}" for score in scores],
        ended=[True, False, True],
        gold=gold,
        scores=list(scores),
        kl=list(kl),
    )


def test_compare_by_hand():
    before, after = answers([1, 2, 3], [0.2, 0.4, 0.6]), answers([4, 2, 3], [0.3, 0.4, 0.8])
    found = HeldOut.compare(before, after)
    gold, wins = mean_of([0.3, 0.4, 0.8]), mean_of([1, 0.5, 1])
    score = mean_of([4, 2, 3])
    scores = {
        "eval/score": 3,
        "eval/score_ci_low": score.low,
        "eval/score_ci_high": score.high,
        "eval/score_sft": 2,
        "eval/kl": 1,
        "eval/length": 7 / 3,
        "eval/eos_rate": 2 / 3,
        "eval/distinct": 2 / 4,
        "eval/repetition": (1 / 3 + 0) / 2,
    }
    assert found == pytest.approx(
        scores
        | {
            "eval/gold": 0.5,
            "eval/gold_ci_low": gold.low,
            "eval/gold_ci_high": gold.high,
            "eval/gold_sft": 0.4,
            "eval/win_rate": 2.5 / 3,
            "eval/win_rate_ci_low": wins.low,
            "eval/win_rate_ci_high": wins.high,
        }
    )
    without = HeldOut.compare(answers([1, 2, 3], None), answers([4, 2, 3], None))
    assert without == pytest.approx(scores)


def test_samples_show_both_answers_to_one_prompt(renderer, roles, monkeypatch):
    given = iter([answers([1, 2, 3], [0.2, 0.4, 0.6]), answers([4, 5, 6], None)])
    ours = held_out(renderer, roles)
    monkeypatch.setattr(ours, "answers", lambda policy: next(given))
    ours.baseline()
    ours.evaluate()
    found = ours.samples()
    assert len(found) == 3
    assert found[1] == {
        "prompt": ROWS[1]["prompt"][-1]["content"],
        "sft": "text 2",
        "sft_score": 2,
        "sft_gold": 0.4,
        "sft_ended": False,
        "ppo": "text 5",
        "ppo_score": 5,
        "ppo_gold": None,
        "ppo_ended": False,
    }


def test_zero_prompts_measure_nothing(renderer, roles, monkeypatch):
    calls = by_sum(monkeypatch)
    none = held_out(renderer, roles, prompts=0, gold=made_up_gold)
    assert none.baseline() == Answers([], [], [], [])
    assert none.evaluate() == {}
    assert none.samples() == none.progress() == []
    assert calls == []
    settings = {"cfg": sampling(), "seed": 0, "gold": made_up_gold}
    found = evaluate.ceiling(roles.reference, renderer, [], **settings)
    assert found == {}
    assert evaluate.ppo_summary({"objective/scores": 1.25}) == [
        ("score of the last rollout", "1.250")
    ]


# the ceiling -------------------------------------------------------------------------------------


def test_ceiling_by_hand(renderer, roles):
    """Gold counts the calls: draw d gives every answer (d mod 3) / 10, plus its place / 100."""
    drawn = []

    def gold(questions, texts, rows):
        drawn.append(texts)
        return [(len(drawn) - 1) % 3 / 10 + place / 100 for place in range(len(texts))]

    cfg, rows = sampling(), ROWS[:3]
    found = evaluate.ceiling(roles.reference, renderer, rows, cfg=cfg, seed=0, gold=gold)
    assert len(drawn) == 8
    assert all(len(texts) == 3 for texts in drawn)
    assert len({tuple(texts) for texts in drawn}) == 8, "eight draws, eight noises"
    # Draws 0..7 are worth 0 .1 .2 0 .1 .2 0 .1: .7 / 8; places 0 1 2 add .01 on average.
    assert found["eval/gold"] == pytest.approx(0.7 / 8 + 0.01)
    assert found["eval/gold_best_of_8"] == pytest.approx(0.2 + 0.01)
    half = 1.96 * math.sqrt(0.01**2 / 3)  # over prompts, which is what was drawn at random
    assert found["eval/gold_ci_low"] == pytest.approx(0.7 / 8 + 0.01 - half)
    assert found["eval/gold_ci_high"] == pytest.approx(0.7 / 8 + 0.01 + half)
    assert evaluate.ceiling(roles.reference, renderer, rows, cfg=cfg, seed=0, gold=None) == {}


# closing tables ----------------------------------------------------------------------------------


def test_closing_tables():
    interval = {"_ci_low": 0.7, "_ci_high": 0.9}

    def with_ci(name, value):
        return {name: value} | {name + end: x for end, x in interval.items()}

    losses = {"start/eval/loss": 2.5, "eval/loss": 1.25}
    assert len(evaluate.sft_summary(losses)) == 2
    table = dict(
        evaluate.sft_summary(losses | with_ci("eval/gold", 0.8) | {"eval/gold_best_of_8": 0.95})
    )
    assert table["held-out loss, base model"].startswith("2.500 ")
    assert table["gold of SFT samples"] == "0.800 (95 % 0.700 to 0.900)"
    table = dict(
        evaluate.rm_summary(
            with_ci("eval/accuracy", 0.8) | {"eval/accuracy_longer": 0.6, "eval/margin": 1.5},
            "test",
        )
    )
    assert table["accuracy on test pairs"] == "0.800 (95 % 0.700 to 0.900)"
    assert table['"the longer one wins"'] == "0.600"
    scores = {"eval/score": 2.0, "eval/score_sft": 1.0, "eval/kl": 3.14159}
    scores |= {"eval/score_ci_low": 1.5, "eval/score_ci_high": 2.5}
    assert dict(evaluate.ppo_summary(scores)) == {
        "held-out score": "1.000 -> 2.000 (95 % 1.500 to 2.500)",
        "KL to the reference": "3.14 nats per answer, held out",
    }
    full = scores | with_ci("eval/gold", 0.8) | with_ci("eval/win_rate", 0.8)
    table = dict(evaluate.ppo_summary(full | {"eval/gold_sft": 0.5}))
    assert table["held-out gold"] == "0.500 -> 0.800 (95 % 0.700 to 0.900)"
    assert table["PPO beats SFT by gold"].startswith("0.800 (95 % 0.700 to 0.900)")
