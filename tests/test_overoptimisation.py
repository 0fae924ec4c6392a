"""When only the score still rises: knee, warnings by name, and what does not raise one."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import pytest

from rlhf.overoptimisation import GOLD, Course, Evaluation, distinct, repetition

PROMPTS = 200


def evaluation(step, score, gold, *, seed=0, noise=0.1, **more):
    """Answers whose scores and gold lie around these means; each prompt has its own height."""
    heights, draw = random.Random(0), random.Random(1000 * seed + step)
    own = [heights.gauss(0, 1) for _ in range(PROMPTS)]
    facts = {"length": 20.0, "eos_rate": 0.9, "distinct": 0.5, "repetition": 0.1, "entropy": 1.0}
    return Evaluation(
        step=step,
        kl=step / 2,
        scores=[score + height + draw.gauss(0, noise) for height in own],
        measure=None if gold is None else [gold + h + draw.gauss(0, noise) for h in own],
        **facts | more,
    )


def course(*evaluations, measure=GOLD):
    """What is said at each evaluation, and the course."""
    whole = Course(measure)
    return [[w.name for w in whole.see(now)] for now in evaluations], whole


def test_score_and_gold_that_rise_together_are_well():
    said, whole = course(*(evaluation(10 * n, n, n / 2) for n in range(6)))
    assert said == [[]] * 6
    assert whole.knee is None
    assert [point["step"] for point in whole.points] == [0, 10, 20, 30, 40, 50]


def test_gold_that_falls_while_the_score_rises():
    gold = [0, 0.5, 1.0, 0.8, 0.5, 0.2]
    said, whole = course(*(evaluation(10 * n, n, g) for n, g in enumerate(gold)))
    assert said == [[], [], [], ["over-optimised"], ["score without gain"], []]
    assert whole.knee == {"step": 20, "kl": 10.0}
    text = whole.warnings[0].text
    assert re.search(r"since step 20 the held-out score rose by (0\.9|1\.0)", text)
    # The fall is 0.2: sums of 200 differences of noise 0.1, so 0.2 to within a hundredth or two.
    fall, low, high = map(
        float, re.findall(r"fell by ([\d.]+) \(95 % ([\d.]+) to ([\d.]+)", text)[0]
    )
    assert low < 0.2 < high
    assert fall == pytest.approx(0.2, abs=0.03)
    assert "@best goes by gold" in text


def test_gold_that_falls_from_the_start():
    """No checkpoint is as good as the SFT model, and none is called so."""
    said, whole = course(evaluation(0, 0, 0), evaluation(10, 1, -0.5))
    assert said[1] == ["over-optimised"]
    assert whole.knee == {"step": 0, "kl": 0.0}
    assert whole.warnings[0].text.startswith("since the SFT model (step 0) the held-out score rose")


def test_gold_that_stands_still_while_the_score_rises():
    gold = [0, 1.0, 0.999, 0.998, 0.997]
    said, whole = course(*(evaluation(10 * n, n, g, noise=0.5) for n, g in enumerate(gold)))
    names = [name for names in said for name in names]
    assert names == ["score without gain"]
    assert whole.knee == {"step": 10, "kl": 5.0}
    assert "since step 10 the held-out score rose by" in whole.warnings[0].text


def test_gold_that_all_but_stands_still_is_told_from_gold_that_is_slow():
    """The score brought 0.4 of gold a point. A tenth of that since is no gain; all of it is."""
    for pace, named in ((0.04, True), (0.4, False)):
        gold = [0, 0.4, 0.8, 0.8 + 0.5 * pace, 0.8 + pace]
        score = [0, 1, 2, 2.5, 3]
        pairs = enumerate(zip(score, gold, strict=True))
        said, whole = course(*(evaluation(10 * n, s, g, noise=0.5) for n, (s, g) in pairs))
        assert (said[4] == ["score without gain"]) == named
        assert (whole.knee == {"step": 20, "kl": 10.0}) == named
        assert (said[4] == []) != named


def test_gold_that_never_rose_is_flat_too():
    """Each prompt's gold goes up or down by 0.1, on the whole by a hair up."""
    change = [0.1, -0.1] * 100
    start = evaluation(0, 0, 0, noise=0.0)
    steps = [start]
    for n in (1, 2):
        gold = [x + n * (0.001 + y) for x, y in zip(start.measure, change, strict=True)]
        steps.append(replace(evaluation(10 * n, n, 0, noise=0.0), measure=gold))
    said, whole = course(*steps)
    assert said == [[], [], ["score without gain"]]
    assert "since step 0 the held-out score rose by 2 and gold changed by +0.002" in (
        whole.warnings[0].text
    )


def test_a_score_that_may_be_noise_has_not_risen():
    """Eight prompts: a rise of 0.5 with a standard error of 1 is none, though gold surely fell."""
    flat = [1.0, -1.0] * 4
    steps = [evaluation(0, 0, 0), evaluation(10, 1, 1)]
    wild = [x + 0.5 + 4 * x for x in flat]
    few = [
        replace(steps[0], scores=flat, measure=[0.0] * 8),
        replace(steps[1], scores=flat, measure=[1.0] * 8),
        replace(steps[1], step=20, scores=wild, measure=[0.5, 0.4] * 4),
    ]
    assert course(*few)[1].knee is None
    sure = replace(few[2], scores=[x + 0.5 for x in flat])
    assert course(*few[:2], sure)[1].knee == {"step": 10, "kl": 5.0}


def test_a_plateau_may_end():
    """Gold that climbs again, as it may, takes the knee back; what was said stays said."""
    gold = [0, 1.0, 1.0, 1.0, 1.6]
    said, whole = course(*(evaluation(10 * n, n, g) for n, g in enumerate(gold)))
    assert said[3] == ["score without gain"]
    assert whole.knee is None


def test_gold_that_goes_on_takes_the_knee_back():
    gold = [0, 1.0, 0.8, 0.7, 1.5]
    said, whole = course(*(evaluation(10 * n, n, g) for n, g in enumerate(gold)))
    assert said[2] == ["over-optimised"]
    assert whole.knee is None
    assert whole.warnings, "what was said stays said"


def test_no_score_no_knee():
    """Gold that falls while the score stands still is a run that goes wrong in another way."""
    said, whole = course(evaluation(0, 0, 0), evaluation(10, 1, 1), evaluation(20, 1, 0.5))
    assert said == [[], [], []]
    assert whole.knee is None


def test_a_rise_that_is_small_beside_the_sft_answers_does_not_count():
    """They spread by 1; a quarter of that is asked for, however sure a smaller rise is."""
    for rise, known in ((0.2, False), (0.35, True)):
        steps = evaluation(0, 0, 0), evaluation(10, 1, 1), evaluation(20, 1 + rise, 0.5)
        said, whole = course(*steps)
        assert (said[2] == ["over-optimised"]) == known
        assert (whole.knee is not None) == known


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("length", {"length": 32.0}, "length is up 60% (32.0 tokens) while gold is flat"),
        ("ends", {"eos_rate": 0.5}, "50% of the answers end (90% of the SFT model's) while gold"),
        ("variety", {"distinct": 0.3}, "variety collapses (distinct bigrams 0.50 to 0.30)"),
        ("repetition", {"repetition": 0.3}, "answers repeat themselves (30% of an answer's"),
        ("entropy", {"entropy": 0.3}, "entropy fell from 1.00 to 0.30 nats per token while"),
    ],
)
def test_a_sign_is_named_where_gold_does_not_gain_by_it(name, change, text):
    same = evaluation(10, 3, 0, seed=5, noise=0.0, **change)
    flat = evaluation(0, 0, 0, noise=0.0), same
    said, whole = course(*flat)
    assert said[1] == [name]
    assert text in whole.warnings[0].text
    # More gold by it, and there is nothing to say, but for answers that were cut off; nor where it
    # is only a little.
    assert course(flat[0], evaluation(10, 3, 1, **change))[0][1] == (["ends"] * (name == "ends"))
    assert course(flat[0], evaluation(10, 3, 0, seed=5, noise=0.0, length=25.0))[0][1] == []


def test_a_sign_says_so_where_gold_fell_while_the_score_did_not_rise():
    said, whole = course(evaluation(0, 0, 0), evaluation(10, 0, -1, length=32.0))
    assert said[1] == ["length"]
    assert "length is up 60% (32.0 tokens) while gold fell:" in whole.warnings[0].text


def test_a_measure_that_is_no_number_is_neither_a_rise_nor_a_fall():
    """One score of a second reward model is lost, at a step that would be a plateau or a peak."""
    steps = [evaluation(10 * n, n, n / 2) for n in range(4)]
    lost = replace(steps[2], measure=[float("nan"), *steps[2].measure[1:]])
    said, whole = course(*steps[:2], lost, steps[3])
    assert said == [[]] * 4
    assert whole.knee is None
    flat = [replace(now, measure=lost.measure) for now in steps]
    flat[0] = steps[0]
    assert course(*flat)[0] == [[]] * 4


def test_a_sign_is_named_again_after_gold_fell():
    """Gold may be above the SFT model's still."""
    late = evaluation(20, 3, 0.5, length=40.0)
    said, _ = course(evaluation(0, 0, 0), evaluation(10, 2, 1), late)
    assert said[2] == ["over-optimised", "length"]


def test_without_a_measure_signs_are_told_and_the_way_out():
    steps = [evaluation(10 * n, n, None, length=20.0 + 10 * n) for n in range(4)]
    said, whole = course(*steps, measure=None)
    assert said == [[], [], ["length"], []]
    assert "evaluation.second_rm" in whole.warnings[0].text
    assert whole.knee is None
    assert whole.points[-1]["gold"] is None


def test_false_alarms_are_rare():
    """60 sound runs of 8 evaluations with the noise of 200 answers: at most a few are warned of."""
    warned = 0
    for seed in range(60):
        steps = (evaluation(10 * n, 0.3 * n, 0.1 * n, seed=seed, noise=0.5) for n in range(8))
        _, whole = course(*steps)
        warned += bool(whole.warnings)
    assert warned <= 6


def test_a_run_that_goes_on_has_the_course_of_an_unbroken_one():
    gold = [0, 0.5, 1.0, 0.8, 0.7, 0.2]
    steps = [evaluation(10 * n, n, g, length=20 + 5 * n) for n, g in enumerate(gold)]
    said, whole = course(*steps)
    for cut in range(1, len(steps)):
        first = Course(GOLD)
        for now in steps[:cut]:
            first.see(now)
        again = Course(None)
        again.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert [[w.name for w in again.see(now)] for now in steps[cut:]] == said[cut:]
        assert again.text() == whole.text()
        assert again.said() == whole.said()


def test_the_file_is_json_whatever_happens():
    whole = Course(GOLD)
    whole.see(evaluation(0, 0, 0))
    whole.see(evaluation(10, float("nan"), 1))
    found = json.loads(whole.text())
    assert found["points"][1]["score"] is None
    assert found["schema"] == 1


def test_repetition_and_variety_by_hand():
    # 1 2, 2 1, 1 2: one of three came before. 5 6: none. [7] has no bigram.
    assert repetition([[1, 2, 1, 2], [5, 6], [7]]) == pytest.approx((1 / 3 + 0) / 2)
    assert repetition([]) == 0
    # Of 12 21 12 | 12: {12, 21} of four.
    assert distinct([[1, 2, 1, 2], [1, 2]]) == 0.5
    assert distinct([[1]]) == 1
