"""The report card: measures by hand and by slow definitions, and the verdict on models that are
known to be good or bad."""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import sys

import pytest

from rlhf import card, pairwise
from rlhf.card import Probe
from rlhf.errors import RegistryError
from rlhf.intervals import Mean
from rlhf.pairwise import Pair


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def pair(margin: float, longer: int = 0, **more) -> Pair:
    """A pair by its margin and by how much longer the chosen answer is."""
    return Pair(margin / 2, -margin / 2, 50 + longer, 50, **more)


def calibrated(n: int, rng: random.Random, *, stretch: float = 1.0) -> list[float]:
    """Margins of a model whose sigmoid(margin / stretch) is the truth: of n pairs in random order
    the first one wins with that probability; the margin is then seen from the winner's side."""
    out = []
    for _ in range(n):
        margin = rng.gauss(0, 2)
        out.append(stretch * (margin if rng.random() < sigmoid(margin) else -margin))
    return out


# measures ----------------------------------------------------------------------------------------


def test_accuracy_counts_ties_half_and_lost_scores_as_ties():
    pairs = [pair(1), pair(-1), pair(0), Pair(math.nan, 1, 5, 5), Pair(math.inf, 1, 5, 5)]
    assert pairwise.correct(pairs) == [1, 0, 0.5, 0.5, 0.5]
    made = card.make(pairs, split="test")
    assert made.verdict == "no-go"
    assert made.reasons[0] == "2 of 5 pairs have a score that is no number"


def test_longer_by_hand():
    found = [pair(1, 3), pair(1, -3), pair(-1, 3), pair(-1, -3), pair(1, 0), pair(0, 1)]
    # longer scores higher: yes, no, no, yes; of one length; a tie
    assert pairwise.prefers_longer(found) == [1, 0, 0, 1, 0.5]
    made = card.make(found, split="test")
    # the longer one is the chosen one: yes, no, yes, no, as long, yes
    assert made.baselines["longer"].value == pytest.approx(3.5 / 6)
    assert card.make([pair(1)], split="test").prefers_longer is None


def test_calibration_by_hand():
    """Two bins: confidences .6 .6 .7 (right, wrong, right) and .9 .9 (right, wrong)."""
    logit = {p: math.log(p / (1 - p)) for p in (0.6, 0.7, 0.9)}
    margins = [logit[0.6], -logit[0.6], logit[0.7], logit[0.9], -logit[0.9]]
    found = pairwise.calibration(margins, bins=2)
    first, second = found.bins
    assert (first.low, first.high, first.pairs) == (0.5, 0.75, 3)
    assert (second.low, second.high, second.pairs) == (0.75, 1.0, 2)
    assert first.confidence == pytest.approx(1.9 / 3)
    assert first.accuracy == pytest.approx(2 / 3)
    assert second.confidence == pytest.approx(0.9)
    assert second.accuracy == 0.5
    assert found.ece == pytest.approx(3 / 5 * abs(1.9 / 3 - 2 / 3) + 2 / 5 * 0.4)
    # what it gave to the chosen answer: .6 .4 .7 .9 .1
    assert found.brier == pytest.approx((0.4**2 + 0.6**2 + 0.3**2 + 0.1**2 + 0.9**2) / 5)


def test_a_tie_is_a_confidence_of_one_half_and_half_right():
    found = pairwise.calibration([0.0, 0.0], bins=10)
    assert (found.ece, found.brier) == (0.0, 0.25)
    assert [(b.pairs, b.accuracy) for b in found.bins] == [(2, 0.5)]


def slow_ece(margins: list[float], bins: int) -> float:
    """Guo et al., eq. 3, over both orders of each pair, in bins of P(first wins) over [0, 1]."""
    seen = [(sigmoid(m), 1.0) for m in margins] + [(sigmoid(-m), 0.0) for m in margins]
    total = 0.0
    for k in range(2 * bins):
        low, high = k / (2 * bins), (k + 1) / (2 * bins)
        inside = [(p, y) for p, y in seen if low < p <= high]
        if inside:
            gap = abs(
                statistics.fmean(p for p, _ in inside) - statistics.fmean(y for _, y in inside)
            )
            total += len(inside) / len(seen) * gap
    return total


@pytest.mark.parametrize("bins", [1, 5, 10])
def test_the_error_is_that_of_both_orders_counted(bins: int):
    rng = random.Random(bins)
    margins = [rng.gauss(0.5, 2) for _ in range(300)]
    assert pairwise.calibration(margins, bins=bins).ece == pytest.approx(slow_ece(margins, bins))


def test_a_calibrated_model_has_the_error_of_chance_alone():
    rng = random.Random(1)
    assert pairwise.calibration(calibrated(200_000, rng), bins=10).ece < 0.005
    few = [pairwise.calibration(calibrated(400, rng), bins=10) for _ in range(300)]
    expected = statistics.fmean(one.ece_by_chance for one in few)
    assert statistics.fmean(one.ece for one in few) == pytest.approx(expected, rel=0.1)
    assert expected > 0.03


def test_an_overconfident_model_has_a_large_error():
    """Margins of +-3 where three of four are right: confidence sigmoid(3), accuracy 0.75."""
    found = pairwise.calibration([3.0, 3.0, 3.0, -3.0] * 50, bins=10)
    assert found.ece == pytest.approx(sigmoid(3) - 0.75)
    made = card.make([pair(m) for m in [3.0, 3.0, 3.0, -3.0] * 50], split="test")
    assert any("too sure of itself" in why for why in made.reasons)
    shy = card.make([pair(m) for m in [0.1, 0.1, 0.1, -0.1] * 50], split="test")
    assert any("right more often than it is sure" in why for why in shy.reasons)


def test_the_histogram_counts_every_margin_once():
    rng = random.Random(0)
    for margins in (
        [rng.gauss(1, 3) for _ in range(500)],
        [2.0],
        [-1.0, 0.0, 4.0],
        [5.0, 5 + 1e-15],
    ):
        found = pairwise.histogram(margins)
        assert sum(found.counts) == len(margins)
        assert len(found.edges) == len(found.counts) + 1 <= 23
        assert found.edges == sorted(set(found.edges))
        widths = [b - a for a, b in zip(found.edges, found.edges[1:], strict=False)]
        assert widths == pytest.approx([widths[0]] * len(widths))
        for low, high, count in zip(found.edges, found.edges[1:], found.counts, strict=False):
            tolerance = 1e-9 * (high - low)
            at_least = sum(low + tolerance < m < high - tolerance for m in margins)
            at_most = sum(low - tolerance <= m <= high + tolerance for m in margins)
            assert at_least <= count <= at_most
    wrong = pairwise.histogram([-1.0, -0.01, 0.0, 4.0])
    assert sum(c for c, e in zip(wrong.counts, wrong.edges, strict=False) if e < 0) == 2


def test_slices_by_hand():
    pairs = [
        Pair(1, 0, 4, 9, 1, "a"),  # less than half as long
        Pair(0, 1, 5, 10, 1, "a"),  # half as long is not less
        Pair(1, 0, 9, 9, 2, "b"),
        Pair(0, 0, 18, 9, 5, "a"),
        Pair(1, 0, 19, 9, 7, None),
    ]
    found = {
        kind: [(s.name, s.pairs, s.value) for s in parts]
        for kind, parts in pairwise.slices(pairs).items()
    }
    assert found["length"] == [
        ("chosen less than half as long", 1, 1.0),
        ("chosen shorter", 1, 0.0),
        ("same length", 1, 1.0),
        ("chosen longer", 1, 0.5),
        ("chosen more than twice as long", 1, 1.0),
    ]
    assert found["source"] == [("a", 3, 0.5), ("b", 1, 1.0)]
    assert found["turns"] == [
        ("1 turn", 2, 0.5),
        ("2 turns", 1, 1.0),
        ("5 turns or more", 2, 0.75),
    ]


def test_rare_sources_are_put_together():
    pairs = [pair(1, source=f"s{n % 12}") for n in range(35)]
    names = [(s.name, s.pairs) for s in pairwise.slices(pairs)["source"]]
    assert len(names) == pairwise.LARGEST_SLICES + 1
    assert names[-1] == ("(other)", 5)  # two of the twelve, with 3 and 2 pairs
    assert sum(n for _, n in names) == 35
    assert pairwise.slices([pair(1)])["source"] == []


def test_agreement_by_hand():
    ours, theirs = [pair(m) for m in (1, 1, -2, 0, 3)], [pair(m) for m in (5, -1, -1, 4, 0.1)]
    found = card.agree("rm/b", ours, theirs)
    assert (found.reference, found.pairs, found.value) == ("rm/b", 5, 3.5 / 5)


# the verdict -------------------------------------------------------------------------------------


def passed(n: int = 200) -> list[Probe]:
    return [card.probe(name, "it", [1.0] * n, [0.0] * n) for name in ("empty answer", "flattery")]


def test_a_perfect_model_gets_go():
    rng = random.Random(0)
    lengths = [rng.choice([-20, -5, 0, 5, 20]) for _ in range(300)]
    pairs = [pair(rng.uniform(5, 9), more, turns=1 + n % 3) for n, more in enumerate(lengths)]
    without = [pair(rng.gauss(0, 1), more) for more in lengths]
    made = card.make(pairs, split="test", removed=without, probes=passed())
    assert (made.verdict, made.reasons) == ("go", [])
    assert made.accuracy.value == 1.0


@pytest.mark.parametrize("sign", [1, -1])
def test_a_model_of_length_alone_gets_no_go(sign: int):
    """Where the longer (shorter) answer is mostly the chosen one, so that its accuracy is high."""
    rng = random.Random(0)
    lengths = [sign * rng.choice([30, 20, 10, 5, -10]) for _ in range(1000)]
    made = card.make([pair(sign * more / 3, more) for more in lengths], split="test")
    assert made.accuracy.value > 0.75
    assert made.verdict == "no-go"
    longer, shorter = ("longer", "shorter") if sign > 0 else ("shorter", "longer")
    assert f'"the {longer} one wins"' in made.reasons[0]
    assert made.reasons[1] == (
        f"it prefers the {longer} answer in 1.000 of 1000 pairs of different lengths"
    )
    assert not any(f"the {shorter}" in why for why in made.reasons)


def test_a_length_rule_that_beats_the_baseline_is_found_all_the_same():
    """Length decides but for a few pairs, on which the model is right: above the baseline, and
    still hardly more than a rule about length."""
    lengths = [10] * 600 + [-10] * 400
    pairs = [
        pair(m, more) for more, m in zip(lengths, [2] * 600 + [-2] * 360 + [2] * 40, strict=True)
    ]
    made = card.make(pairs, split="test")
    assert made.accuracy.low > 0.6 == pytest.approx(made.baselines["longer"].value)
    assert made.reasons[0].startswith("it prefers the longer answer in 0.960 of 1000 pairs")
    assert made.verdict == "no-go"


def test_a_handful_of_pairs_of_different_lengths_shows_no_rule_about_length():
    """The model is right in all of 400 pairs; in those that differ the longer one is better."""
    for uneven, verdict in ((card.UNEVEN_PAIRS - 1, "go"), (card.UNEVEN_PAIRS, "no-go")):
        made = card.make([pair(5)] * (400 - uneven) + [pair(5, 3)] * uneven, split="test")
        assert made.verdict == verdict
        rule = f"it prefers the longer answer in 1.000 of {uneven} pairs of different lengths"
        assert made.reasons == ([rule] if verdict == "no-go" else [])


def test_guessing_gets_no_go():
    rng = random.Random(3)
    made = card.make([pair(rng.gauss(0, 1)) for _ in range(400)], split="test")
    assert made.verdict == "no-go"
    assert "does not lie above 0.5, chance" in made.reasons[0]
    assert not any("by length" in why or "by turns" in why for why in made.reasons)  # one slice
    assert made.baselines["random"] == Mean(0.5, 0.5 - 0.98 / 20, 0.5 + 0.98 / 20)


def test_few_pairs_do_not_show_that_a_model_is_good():
    assert card.make([pair(1)] * 3, split="test").verdict == "no-go"  # by Wilson 0.44 to 1
    assert card.make([pair(4)] * 30, split="test").verdict == "go"


def test_a_prompt_that_makes_no_difference_is_a_caution():
    pairs = [pair(m) for m in [2.0] * 180 + [-2.0] * 20]
    made = card.make(pairs, split="test", removed=pairs)
    assert made.verdict == "caution"
    assert made.reasons == [
        "accuracy without the prompt is 0.900, with it 0.900: that it looks at the prompt does not "
        "show"
    ]
    # 12 pairs that only the prompt decides: mean .06, sd .2381, so 1.96 se is .033
    worse = [pair(m) for m in [-2.0] * 12 + [2.0] * 168 + [-2.0] * 20]
    made = card.make(pairs, split="test", removed=worse)
    assert made.prompt_gain is not None
    assert made.prompt_gain.value == pytest.approx(0.06)
    assert made.prompt_gain.low == pytest.approx(0.06 - 0.033, abs=1e-4)
    assert made.verdict == "go"
    # 3 pairs: mean .015, sd .1219, so 1.96 se is .0169: it may be chance
    worse = [pair(m) for m in [-2.0] * 3 + [2.0] * 177 + [-2.0] * 20]
    assert card.make(pairs, split="test", removed=worse).verdict == "caution"


def test_a_probe_that_scores_as_high_is_a_caution():
    pairs = [pair(6.0)] * 200
    failed = card.probe("repeated", "itself said twice", [1.0] * 10, [0.0] * 6 + [2.0] * 4)
    made = card.make(pairs, split="test", probes=[*passed(), failed])
    assert made.verdict == "caution"
    assert made.reasons == [
        "probe repeated: the chosen answer scores above itself said twice in only 0.600 of 10 pairs"
    ]


def test_a_slice_at_chance_is_a_caution_where_it_has_enough_pairs():
    good = [pair(6.0, 5)] * 200 + [pair(6.0, -30)] * 200
    for n, verdict in ((card.SLICE_PAIRS, "caution"), (card.SLICE_PAIRS - 2, "go")):
        weak = [pair(6.0, -5), pair(-6.0, -5)] * (n // 2)
        made = card.make(good + weak, split="test", bins=1)
        reasons = [why for why in made.reasons if "calibration" not in why]
        assert made.verdict == verdict
        if reasons:
            assert reasons == [
                "no better than chance by length, chosen shorter: accuracy 0.500 on 30 pairs"
            ]


def test_a_small_slice_is_a_caution_where_it_is_surely_wrong():
    good = [pair(6.0, 5)] * 200 + [pair(6.0, -30)] * 200
    made = card.make([*good, *[pair(-0.1, -5)] * 8, pair(0.1, -5)], split="test", bins=1)
    assert made.verdict == "caution"
    assert made.reasons[-1] == (
        "wrong more often than right by length, chosen shorter: accuracy 0.111 on 9 pairs"
    )
    made = card.make([*good, *[pair(-0.1, -5)] * 3, pair(0.1, -5)], split="test", bins=1)
    assert (made.slices["length"][1].value, made.verdict) == (0.25, "go")  # of 4: 0.05 to 0.70


# in a file and in words --------------------------------------------------------------------------


def test_a_card_comes_back_from_its_file(tmp_path):
    pairs = [pair(m, 3) for m in [2.0, -1.0, 0.5] * 20]
    made = card.make(
        pairs,
        split="validation",
        removed=pairs,
        probes=passed(9),
        agreement=[card.agree("rm/b", pairs, pairs)],
    )
    assert card.read(tmp_path) is None
    made.write(tmp_path)
    assert card.read(tmp_path) == made
    assert json.loads((tmp_path / "card.json").read_text())["schema"] == 1
    (tmp_path / "card.json").write_text('{"schema": 2}')
    with pytest.raises(RegistryError, match=r"card\.json: .* reads cards of schema 1"):
        card.read(tmp_path)
    (tmp_path / "card.json").write_text('{"schema": 1}')
    with pytest.raises(RegistryError, match=r"card\.json.*missing"):
        card.read(tmp_path)
    (tmp_path / "card.json").write_text("{")
    with pytest.raises(RegistryError, match=r"card\.json: cannot be read"):
        card.read(tmp_path)


def test_the_closing_table():
    pairs = [pair(m, 3) for m in [2.0] * 90 + [-1.0] * 10]
    weak = card.probe("repeated", "itself said twice", [1.0, 1.0], [2.0, 0.0])
    made = card.make(
        pairs,
        split="test",
        removed=pairs,
        probes=[*passed(), weak],
        agreement=[card.agree("rm/b", pairs, pairs)],
    )
    rows = dict(card.summary(made))
    assert rows["accuracy without the prompt"] == "0.900"
    assert rows["weakest probe"] == "repeated: chosen above it in 0.500 of pairs"
    assert rows["agreement with rm/b"] == "1.000"
    assert rows["verdict"].splitlines()[0] == "no-go"  # the longer one is always the chosen one
    assert rows["verdict"].count("\n- ") == len(made.reasons)
    assert card.summary(None) == []
    table = card.table(made)
    assert table[0][:3] == ("accuracy (test)", "100", "0.900")
    assert ("chosen above probe repeated", "2", "0.500") in [row[:3] for row in table]


def test_a_card_is_read_without_torch():
    code = "import sys, rlhf.card; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
