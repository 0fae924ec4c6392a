"""What answers are worth: sums and ensembles by hand, what must not matter, and every refusal."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rounding import TINY
from torch import nn
from torch.testing import assert_close

from rlhf import engine, models
from rlhf.errors import ConfigError, ShapeError
from rlhf.rewards import Function, RewardConfig, Rewards, load_functions, rehearse

CLOSE = {"rtol": 1e-6, "atol": 1e-6}
PAD = 0


class Toy(nn.Module):
    """Shaped like a model of transformers: its score is a linear function of the last real id."""

    base_model_prefix = "backbone"

    def __init__(self, slope=1.0, offset=0.0):
        super().__init__()
        self.slope, self.offset = nn.Parameter(torch.tensor(slope)), offset
        self.sizes = []  # rows and columns of each pass

    def backbone(self, input_ids, attention_mask, position_ids, use_cache):
        self.sizes.append(tuple(input_ids.shape))
        return SimpleNamespace(last_hidden_state=input_ids[..., None].float())

    def score(self, hidden):
        return self.slope * hidden + self.offset


def batch(*ids):
    """One sequence per number, which stands last; ragged, padded on both sides."""
    rows = [[PAD] * (n % 3) + [7] * (3 - n % 3) + [n] + [PAD] * 2 for n in ids]
    tensor = torch.tensor(rows)
    return tensor, tensor != PAD


def judge(reward, *ids, responses=None, rows=None, micro_batch_size=2):
    texts = responses or [str(n) for n in ids]
    return reward.score(
        *batch(*ids),
        [f"p{n}" for n in ids],
        texts,
        rows or [{"n": n} for n in ids],
        micro_batch_size=micro_batch_size,
    )


def length(prompts, responses, rows):
    return [len(response) for response in responses]


def doubled(prompts, responses, rows):
    return [2.0 * row["n"] for row in rows]


def functions_of(cfg, *calls):
    named = zip(cfg.named_functions.items(), calls, strict=True)
    return {name: Function(setting, path, call) for (name, (setting, path)), call in named}


def of(call, path="own.py:f"):
    """One function and nothing else."""
    cfg = RewardConfig(function=path)
    return Rewards(cfg, functions_of(cfg, call), {})


def ensemble(*slopes, std_coef=1.0, **settings):
    """One member per slope, on top of an offset that tells them apart."""
    names = [f"rm/{letter}" for letter in "abcd"[: len(slopes)]]
    cfg = RewardConfig(models={"rm": names}, ensemble_std_coef=std_coef, **settings)
    return Rewards(cfg, {}, dict(zip(names, map(Toy, slopes), strict=True)))


# ---------------------------------------------------------------- sums


def test_one_reward_model_is_what_models_scores_says():
    model = Toy(2.0, offset=1.0)
    reward = Rewards(RewardConfig(models={"rm": ["rm/a"]}), {}, {"rm/a": model})
    verdict = judge(reward, 4, 5, 6)
    assert_close(verdict.scores, torch.tensor([9.0, 11.0, 13.0]))
    assert_close(verdict.scores, models.scores(model, *batch(4, 5, 6)))
    assert_close(verdict.parts, {"rm": verdict.scores})
    assert verdict.spread is None
    assert not verdict.scores.requires_grad


def test_one_function_and_no_reward_model():
    verdict = judge(of(length), 4, 5, responses=["abc", ""])
    assert verdict.scores.dtype == torch.float32
    assert_close(verdict.scores, torch.tensor([3.0, 0.0]))
    assert_close(verdict.parts, {"function": verdict.scores})
    assert verdict.spread is None


def test_a_weighted_sum_by_hand():
    # 0.5 * (2 n) - 3 * len + 1 * (2 n);  n = 4, len 1: 4 - 3 + 8 = 9;  n = 10, len 2: 10 - 6 + 20
    cfg = RewardConfig(
        models={"rm": ["rm/a"]},
        functions={"long": "a.py:f", "twice": "a.py:g"},
        weights={"rm": 0.5, "long": -3.0},
    )
    reward = Rewards(cfg, functions_of(cfg, length, doubled), {"rm/a": Toy(2.0)})
    verdict = judge(reward, 4, 10)
    assert_close(verdict.scores, torch.tensor([9.0, 24.0]), **CLOSE)
    before_weights = {"rm": [8.0, 20.0], "long": [1.0, 2.0], "twice": [8.0, 20.0]}
    assert_close(verdict.parts, {name: torch.tensor(part) for name, part in before_weights.items()})


def test_two_reward_models_in_two_terms_are_added_and_are_no_ensemble():
    cfg = RewardConfig(models={"help": ["rm/a"], "harm": ["rm/b"]}, weights={"harm": -2.0})
    verdict = judge(Rewards(cfg, {}, {"rm/a": Toy(1.0), "rm/b": Toy(10.0)}), 1, 2)
    assert_close(verdict.scores, torch.tensor([-19.0, -38.0]))
    assert verdict.spread is None


def test_a_weight_of_zero_switches_a_term_off():
    cfg = RewardConfig(models={"rm": ["rm/a"]}, function="a.py:f", weights={"rm": 0.0})
    verdict = judge(Rewards(cfg, functions_of(cfg, length), {"rm/a": Toy()}), 4)
    assert_close(verdict.scores, torch.tensor([1.0]))


# ---------------------------------------------------------------- ensembles
# Members say n, 2n and 6n: mean 3n, deviations -2n, -n, 3n, variance 14/3 n^2.


@pytest.mark.parametrize(
    ("settings", "scores"),
    [
        ({}, [3.0, 6.0]),
        ({"ensemble": "min"}, [1.0, 2.0]),
        ({"ensemble": "lower"}, [3 - math.sqrt(14 / 3), 6 - 2 * math.sqrt(14 / 3)]),
        ({"ensemble": "lower", "std_coef": 0.5}, [3 - math.sqrt(14 / 12), 6 - math.sqrt(14 / 3)]),
        ({"ensemble": "lower", "std_coef": 0.0}, [3.0, 6.0]),
        ({"ensemble": "min", "std_coef": 9.0}, [1.0, 2.0]),
        ({"ensemble": "min", "weights": {"rm": 10.0}}, [10.0, 20.0]),
        ({"ensemble": "min", "weights": {"rm": -1.0}}, [-1.0, -2.0]),  # combined, then weighted
    ],
)
def test_an_ensemble_by_hand(settings, scores):
    verdict = judge(ensemble(1.0, 2.0, 6.0, **settings), 1, 2)
    assert_close(verdict.scores, torch.tensor(scores), **CLOSE)
    # The spread is in the units of the members, whatever is made of them.
    assert verdict.spread is not None
    assert_close(verdict.spread, math.sqrt(14 / 3) * torch.tensor([1.0, 2.0]), **CLOSE)


def test_the_minimum_is_taken_answer_by_answer():
    cfg = RewardConfig(models={"rm": ["rm/a", "rm/b"]}, ensemble="min")
    verdict = judge(Rewards(cfg, {}, {"rm/a": Toy(1.0), "rm/b": Toy(-1.0, 6.0)}), 1, 5)
    assert_close(verdict.scores, torch.tensor([1.0, 1.0]))  # min(1, 5), min(5, 1)


def test_members_that_agree_have_no_spread():
    verdict = judge(ensemble(2.0, 2.0, ensemble="lower", std_coef=7.0), 3)
    assert_close(verdict.scores, torch.tensor([6.0]))
    assert_close(verdict.spread, torch.tensor([0.0]))


def test_a_run_in_two_terms_is_passed_through_once():
    cfg = RewardConfig(models={"one": ["rm/a"], "two": ["rm/a"]})
    model = Toy()
    verdict = judge(Rewards(cfg, {}, {"rm/a": model}), 1, 2, micro_batch_size=2)
    assert_close(verdict.scores, torch.tensor([2.0, 4.0]))
    assert len(model.sizes) == 1


# ---------------------------------------------------------------- what must not matter


def everything(ids=(4, 5, 6, 7, 8), order=(0, 1, 2, 3, 4), micro_batch_size=2):
    cfg = RewardConfig(
        models={"rm": ["rm/a", "rm/b"]}, function="a.py:f", ensemble="lower", weights={"rm": 0.3}
    )
    two = {"rm/a": Toy(1.0, 0.5), "rm/b": Toy(-2.0, 1.0)}
    reward = Rewards(cfg, functions_of(cfg, doubled), two)
    picked = [ids[i] for i in order]
    return judge(reward, *picked, micro_batch_size=micro_batch_size)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_the_micro_batch_does_not_matter(size):
    one, other = everything(micro_batch_size=size), everything(micro_batch_size=4)
    assert_close(one.scores, other.scores)
    assert_close(one.parts, other.parts)
    assert_close(one.spread, other.spread)


@pytest.mark.parametrize("order", [(4, 3, 2, 1, 0), (2, 0, 4, 1, 3)])
def test_each_row_keeps_its_own_score_in_any_order(order):
    straight, turned = everything(), everything(order=order)
    back = torch.tensor(order)
    assert_close(turned.scores, straight.scores[back])
    assert_close(turned.spread, straight.spread[back])
    for name, part in straight.parts.items():
        assert_close(turned.parts[name], part[back])


def test_passes_are_of_the_micro_size_and_without_columns_of_padding():
    model = Toy()
    judge(Rewards(RewardConfig(models={"rm": ["rm/a"]}), {}, {"rm/a": model}), 3, 7, 8)
    assert model.sizes == [(2, 4), (1, 2)]  # 6 columns came; 8 stands behind two of padding


def test_on_a_real_model_padding_does_not_matter(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = models.freeze(models.load_scalar(tmp_path, tiny_tokenizer, dtype=torch.float32))
    reward = Rewards(RewardConfig(models={"rm": ["rm/a"]}), {}, {"rm/a": model})
    ids, mask = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 8, 10]]), torch.ones(2, 5).bool()
    padded = nn.functional.pad(ids, (3, 4))
    real = nn.functional.pad(mask, (3, 4), value=False)
    texts, rows = ["", ""], [{}, {}]
    bare = reward.score(ids, mask, texts, texts, rows, micro_batch_size=2)
    wide = reward.score(padded, real, texts, texts, rows, micro_batch_size=1)
    assert_close(wide.scores, bare.scores, rtol=0, atol=TINY)
    assert bare.scores[0] != bare.scores[1]


# ---------------------------------------------------------------- what a function gets and gives


def test_a_function_gets_prompts_responses_and_rows_in_this_order_all_at_once():
    seen = []

    def look(prompts, responses, rows):
        seen.append((prompts, responses, rows))
        return [0.0] * len(rows)

    judge(of(look), 4, 5, 6, responses=["a", "b", "c"], micro_batch_size=1)
    assert seen == [(["p4", "p5", "p6"], ["a", "b", "c"], [{"n": 4}, {"n": 5}, {"n": 6}])]


def test_a_function_may_spoil_its_lists():
    def spoil(prompts, responses, rows):
        lengths = [float(len(response)) for response in responses]
        responses.sort()
        rows.clear()
        return lengths

    cfg = RewardConfig(functions={"one": "a.py:f", "two": "a.py:g"})
    verdict = judge(Rewards(cfg, functions_of(cfg, spoil, length), {}), 1, 2, responses=["zz", "a"])
    assert_close(verdict.parts["two"], torch.tensor([2.0, 1.0]))


@pytest.mark.parametrize(
    "values",
    [
        [1, 0],
        [True, False],
        np.array([1.0, 0.0], dtype=np.float32),
        [np.float32(1), np.int64(0)],
        torch.tensor([1.0, 0.0]),
        (x for x in (1.0, 0.0)),
    ],
    ids=["int", "bool", "array", "numpy", "tensor", "generator"],
)
def test_numbers_of_any_make_are_taken(values):
    verdict = judge(of(lambda *_: values), 1, 2)
    assert_close(verdict.scores, torch.tensor([1.0, 0.0]))


BAD = [float("nan"), math.inf, -math.inf, 1e39, None, "1", "x", [1.0], 1j, 10**400]


@pytest.mark.parametrize("value", BAD, ids=repr)
def test_what_is_no_finite_number_is_refused_with_its_row_and_value(value):
    with pytest.raises(ConfigError) as caught:
        judge(of(lambda *_: [0.0, value, value]), 1, 2, 3)
    text = str(caught.value)
    assert text.startswith(f"reward.function=own.py:f: gave {value!r} for row 1 ")
    assert "(prompt 'p2', response '2')" in text
    assert "one number per response, finite in fp32" in text


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1.0], "gave 1 values for 2 answers"),
        ([1.0, 2.0, 3.0], "gave 3 values for 2 answers"),
        ([], "gave 0 values for 2 answers"),
        (None, "gave no list for 2 answers"),
        (1.0, "gave no list for 2 answers"),
    ],
)
def test_another_number_of_values_is_refused(values, said):
    with pytest.raises(ConfigError, match=rf"^reward\.function=own\.py:f: {said}\."):
        judge(of(lambda *_: values), 1, 2)


def test_a_long_answer_is_shortened_in_the_refusal():
    with pytest.raises(ConfigError) as caught:
        judge(of(lambda *_: [math.nan]), 1, responses=["a" * 500 + "the end"])
    assert "the end'" in str(caught.value)
    assert len(str(caught.value)) < 300


OWN = """
def exact(prompts, responses, rows):
    return [float(response == row["answer"]) for response, row in zip(responses, rows)]

def lazy(prompts, responses, rows):
    for row in rows:
        yield row["answer"]

def no_two(prompts, responses, rows):
    if len(rows) > 1:
        raise ValueError("one at a time")
    return [0.0]

def leaves(prompts, responses, rows):
    if any(row.get("answer") == 1 for row in rows):
        raise SystemExit(0)
    return [0.0] * len(rows)

def two(prompts, responses):
    return [0.0]

def keywords(prompts, responses, rows, scale=1.0, *, other=None):
    return [scale] * len(rows)

class Judge:
    def __call__(self, prompts, responses, rows):
        return [4.0] * len(rows)

judge = Judge()
"""


@pytest.fixture
def own(tmp_path) -> Path:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return file


def loaded(own, name):
    cfg = RewardConfig(function=f"{own}:{name}")
    return Rewards(cfg, load_functions(cfg), {})


@pytest.mark.parametrize(("name", "line"), [("exact", 3), ("lazy", 7)])
def test_a_function_that_raises_is_refused_with_the_row_it_fails_on(own, name, line):
    rows = [{"answer": 2}, {"answer": 1}, {"other": "x"}, {}]
    with pytest.raises(ConfigError) as caught:
        judge(loaded(own, name), 1, 2, 3, 4, rows=rows)
    assert str(caught.value).startswith(
        f"reward.function={own}:{name}: raised KeyError('answer') (line {line}) for row 2 "
        "(prompt 'p3', response '3')."
    )


def test_a_function_cannot_end_the_run(own):
    """Exit code 0, and nothing published."""
    with pytest.raises(ConfigError, match=r"raised SystemExit\(0\) \(line 16\) for row 1 "):
        judge(loaded(own, "leaves"), 1, 2, rows=[{"answer": 2}, {"answer": 1}])


def test_a_function_that_fails_on_no_row_alone_says_so(own):
    with pytest.raises(ConfigError, match=r"one at a time.*on the rows together, on none alone\."):
        judge(loaded(own, "no_two"), 1, 2)


def test_an_interrupt_is_no_fault_of_the_function():
    asked = []

    def stop(*_):
        asked.append(1)
        if len(asked) == 1:
            raise KeyboardInterrupt
        raise ValueError

    with pytest.raises(KeyboardInterrupt):
        judge(of(stop), 1)


def test_what_fails_on_another_process_is_refused_here_too(monkeypatch):
    asked = []

    def gather(value):
        asked.append(value)
        return [value, "reward.function=own.py:f: gave nan for row 7"]

    monkeypatch.setattr(engine, "gather_objects", gather)
    with pytest.raises(ConfigError, match="for row 7"):
        judge(of(length), 1)
    assert asked == [None]
    with pytest.raises(ConfigError, match="for row 0"):  # the first process that failed speaks
        judge(of(lambda *_: [math.nan]), 1)
    assert "for row 0" in asked[1]
    judge(ensemble(1.0, 2.0), 1)  # without a function there is nothing to ask the others
    assert len(asked) == 2


# ---------------------------------------------------------------- before any weight


def test_a_function_is_loaded_by_the_name_of_its_term(own):
    cfg = RewardConfig(function=f"{own}:judge", functions={"fine": f"{own}:keywords"})
    functions = load_functions(cfg)
    assert list(functions) == ["function", "fine"]
    verdict = judge(Rewards(cfg, functions, {}), 1)
    assert_close(verdict.scores, torch.tensor([5.0]))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"function": "nowhere.py:f"}, r"^reward\.function=nowhere\.py:f: no file nowhere\.py"),
        ({"functions": {"a": "{own}:nope"}}, r"^reward\.functions\.a=.*has no function nope"),
        ({"function": "{own}:two"}, r"^reward\.function=.*:two: cannot take three arguments: too"),
    ],
)
def test_a_function_that_cannot_serve_is_refused(own, settings, said):
    filled = {
        key: value.format(own=own)
        if isinstance(value, str)
        else {name: path.format(own=own) for name, path in value.items()}
        for key, value in settings.items()
    }
    with pytest.raises(ConfigError, match=said):
        load_functions(RewardConfig(**filled))


def test_a_rehearsal_finds_a_column_that_is_missing(own):
    functions = loaded(own, "exact").functions
    asked = {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]}
    rehearse(functions, [asked | {"answer": "a"}])
    with pytest.raises(ConfigError, match=r"KeyError\('answer'\).*prompt 'q', response ''"):
        rehearse(functions, [asked])


def test_the_fingerprint_is_of_the_file(own):
    function = loaded(own, "exact").functions["function"]
    before = function.fingerprint
    assert before == hashlib.sha256(OWN.encode()).hexdigest()
    own.write_text(OWN + "# edited\n")
    assert function.fingerprint != before


def test_settings_and_functions_need_no_torch():
    code = (
        "import sys; from rlhf import rewards; "
        "rewards.load_functions(rewards.RewardConfig(models={'rm': ['rm/a']})); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---------------------------------------------------------------- settings

RM = {"models": {"rm": ["rm/a"]}}
TWO = {"models": {"rm": ["rm/a", "rm/b"]}}
REFUSED = [
    ({}, r"^reward: it has no term.*reward=rm, or reward=function reward\.function="),
    ({**RM, "functions": {"rm": "a.py:f"}}, r"^reward: the term rm is there twice"),
    (
        {"function": "a.py:f", "functions": {"function": "a.py:g"}},
        r"^reward: the term function is there twice",
    ),
    ({"models": {"rm": []}}, r"^reward\.models\.rm=\[\]: names no run.*reward=function"),
    ({"models": {"rm": ["rm/a", "rm/a"]}}, r"^reward\.models\.rm=\[rm/a,rm/a\]: names a run twice"),
    (
        {"models": {"x": ["rm/a", "rm/b"], "y": ["rm/c", "rm/d"]}},
        r"^reward\.models: x and y both name several",
    ),
    ({**TWO, "ensemble": "median"}, r"^reward\.ensemble=median: .* one of: mean, min, lower\."),
    ({**RM, "ensemble": "min"}, r"^reward\.ensemble=min: there is no ensemble"),
    ({"function": "a.py:f", "ensemble": "lower"}, r"^reward\.ensemble=lower: there is no ensemble"),
    *(
        ({**TWO, "ensemble_std_coef": value}, rf"^reward\.ensemble_std_coef={value}: must lie in")
        for value in (-0.5, math.inf, math.nan)
    ),
    *(
        ({**RM, "weights": {"rm": value}}, rf"^reward\.weights\.rm={value}: must be a finite")
        for value in (math.inf, -math.inf, math.nan)
    ),
    ({**RM, "weights": {"mr": 2.0}}, r"^reward\.weights\.mr=2\.0: .*no such term.* are: rm\."),
]


@pytest.mark.parametrize(("settings", "said"), REFUSED, ids=lambda v: v if type(v) is str else "")
def test_settings_that_cannot_work_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        RewardConfig(**settings)


def test_what_the_stage_asks_of_the_settings():
    cfg = RewardConfig(
        models={"rm": ["rm/b", "rm/a"], "more": ["rm/b"]},
        function="a.py:f",
        functions={"brief": "b.py:g"},
    )
    assert cfg.terms == ["rm", "more", "function", "brief"]
    assert cfg.references == ["rm/b", "rm/a"]  # each once; the critic starts from the first
    assert cfg.named_functions == {
        "function": ("reward.function", "a.py:f"),
        "brief": ("reward.functions.brief", "b.py:g"),
    }
    alone = RewardConfig(function="a.py:f")
    assert alone.references == []


def test_one_row_too_few_is_a_bug_of_the_caller():
    good = {"prompts": ["p"] * 2, "responses": ["r"] * 2, "rows": [{"n": 1}] * 2}
    for name in good:
        with pytest.raises(ShapeError, match="must be as many"):
            of(length).score(*batch(1, 2), **{**good, name: good[name][:1]}, micro_batch_size=2)
