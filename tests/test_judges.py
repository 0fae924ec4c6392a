"""Judges: which there are, what they say, and what a biased or broken one does to a result."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from stub_endpoint import answers_in, longer, says, serving

from rlhf import endpoint, judges, versus
from rlhf.endpoint import Endpoint
from rlhf.errors import ConfigError, RegistryError
from rlhf.judges import EndpointJudge, Side, find, read_verdict
from rlhf.registry import Registry


def side(*texts: str, ended: bool = True) -> Side:
    """Answers as a judge sees them."""
    answers = SimpleNamespace(texts=list(texts), ended=[ended] * len(texts))
    return Side(answers, None, None)


def rows(count: int) -> list[dict]:
    return [{"prompt": [{"role": "user", "content": f"Question {n}"}]} for n in range(count)]


def judge(stub, **settings) -> EndpointJudge:
    asked = Endpoint(stub.url, "judge-1", key=None, timeout=5.0)
    return EndpointJudge(
        "openai:judge-1", asked, **({"concurrency": 4, "prices": (1.0, 10.0)} | settings)
    )


def verdicts(one, ours: Side, theirs: Side):
    done = []
    out = one.verdicts(rows(len(ours.answers.texts)), ours, theirs, done.append)
    assert sum(done) == len(ours.answers.texts)
    return out


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.001)
    with serving() as server:
        yield server


# what a reply says -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("[[A]]", "A"),
        ("A is vague, B is not.\n[[B]]", "B"),
        ("[[C]]", "C"),
        ("[[tie]]", "C"),
        ("B", "B"),
        (" **A**. ", "A"),
        ("Both are fine.\nVerdict: B", "B"),
        ("Final verdict: **tie**", "C"),
        ("[[A]] would be said of kindness, [[B]] of sense.\n[[B]]", "B"),
        ("<think>[[A]] at first sight</think>\n[[B]]", "B"),
        ("<think>[[A]] at first sight, but", None),
        ("[[A]] or [[B]]", None),
        ("A is better", None),
        ("As a language model, I like both.", None),
        ("Because of this, I choose A", None),
        ("[[D]]", None),
        ("", None),
    ],
)
def test_reading_a_verdict(reply, verdict):
    assert read_verdict(reply) == verdict


# an endpoint -------------------------------------------------------------------------------------


def test_the_better_one_wins_in_both_orders(stub):
    found = verdicts(judge(stub), side("long answer", "x", "same"), side("y", "longer one", "four"))
    assert found.winners == ["ours", "theirs", "tie"]
    assert (found.ours, found.theirs) == (None, None)
    shown = sorted(answers_in(body) for body in stub.asked)
    expected = [("long answer", "y"), ("x", "longer one"), ("same", "four")]
    assert shown == sorted(expected + [pair[::-1] for pair in expected])
    # 6 questions of 100 tokens in and 5 out, at 1 and 10 for a million.
    assert found.facts["calls"] == 6
    assert found.facts["cost"] == pytest.approx((600 * 1 + 30 * 10) / 1e6)
    assert found.facts["disagreements"] == found.facts["failures"] == found.facts["unparsed"] == 0


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_judge_that_likes_a_place_gives_ties(stub, letter):
    stub.answer = lambda body: says(f"[[{letter}]]")
    found = verdicts(judge(stub), side("a", "b", "c"), side("d", "e", "f"))
    assert found.winners == ["tie"] * 3
    assert found.facts["disagreements"] == 3
    outcomes = [versus.outcome(winner) for winner in found.winners]
    assert versus.mean(outcomes, seed=0) == versus.Interval(0.5, 0.5, 0.5)


def test_a_win_and_a_tie_are_a_tie(stub):
    stub.answer = lambda body: says("[[A]]" if answers_in(body)[0] == "ours" else "[[C]]")
    found = verdicts(judge(stub), side("ours"), side("theirs"))
    assert found.winners == ["tie"]
    assert found.facts["disagreements"] == 1


def test_the_same_answer_twice_is_a_tie_and_not_asked(stub):
    found = verdicts(judge(stub), side("same", "a"), side("same", "bb"))
    assert found.winners == ["tie", "theirs"]
    assert len(stub.asked) == 2


def test_an_answer_that_was_cut_is_another(stub):
    verdicts(judge(stub), side("same", ended=False), side("same"))
    assert len(stub.asked) == 2


def test_what_fails_has_no_verdict_and_is_counted(stub):
    def bad_for_b(body):
        return (500, {}, "") if "b" in answers_in(body) else longer(body)

    stub.answer = bad_for_b
    found = verdicts(judge(stub, concurrency=1), side("aaa", "b", "c"), side("d", "eee", "fff"))
    assert found.winners == ["ours", None, "theirs"]
    assert found.facts["failures"] == 1
    assert found.facts["retries"] == endpoint.RETRIES
    assert not found.facts["given_up"]


def test_a_reply_without_a_verdict_is_counted(stub):
    stub.answer = lambda body: says("Hm.") if "b" in answers_in(body) else longer(body)
    found = verdicts(judge(stub), side("aaa", "b"), side("d", "eee"))
    assert found.winners == ["ours", None]
    assert found.facts["unparsed"] == 1


def test_a_judge_that_never_gives_a_verdict_is_refused(stub):
    stub.answer = lambda body: says("As a language model, I like both.")
    with pytest.raises(ConfigError, match=r"none of its replies holds a verdict.*language model"):
        verdicts(judge(stub), side("a", "b"), side("c", "d"))


def test_an_endpoint_that_fails_for_ever_is_refused_soon(stub):
    stub.answer = lambda body: (500, {}, "out of order")
    count = 200
    ours, theirs = side(*["a"] * count), side(*["b"] * count)
    with pytest.raises(ConfigError, match=r"no verdict came from .*HTTP 500: out of order"):
        verdicts(judge(stub), ours, theirs)
    # Those that were on their way when it was given up are finished; nobody else is asked.
    assert len(stub.asked) <= (endpoint.GIVE_UP + 4) * (1 + endpoint.RETRIES)


def test_ties_that_were_not_asked_about_make_no_result(stub):
    stub.answer = lambda body: (500, {}, "out of order")
    with pytest.raises(ConfigError, match="no verdict came from"):
        verdicts(judge(stub), side("same", "a"), side("same", "b"))


def test_what_was_judged_before_an_endpoint_died_is_kept(stub):
    stub.answer = lambda body: longer(body) if len(stub.asked) <= 6 else (500, {}, "")
    found = verdicts(judge(stub, concurrency=1), side(*["aa"] * 20), side(*["b"] * 20))
    assert found.winners == ["ours"] * 3 + [None] * 17
    assert found.facts["given_up"]
    assert found.facts["failures"] == 17


def test_no_more_questions_at_once_than_allowed(stub):
    """Counted while an answer is being made; three meet each time, however slow the machine is."""
    three, lock, counts = threading.Barrier(3, timeout=30), threading.Lock(), [0]

    def meet(body):
        with lock:
            counts.append(counts[-1] + 1)
        three.wait()
        with lock:
            counts.append(counts[-1] - 1)
        return longer(body)

    stub.answer = meet
    verdicts(judge(stub, concurrency=3), side(*["aa"] * 12), side(*["b"] * 12))
    assert len(counts) == 1 + 2 * 24  # both orders of twelve
    assert max(counts) == 3


def test_order_of_replies_does_not_matter(stub):
    def late_at_first(body):
        time.sleep(0.1 if "0" in body["messages"][-1]["content"][:30] else 0)
        return longer(body)

    stub.answer = late_at_first
    found = verdicts(judge(stub), side("aa", "b", "cc"), side("d", "ee", "f"))
    assert found.winners == ["ours", "theirs", "ours"]


def test_an_interrupt_ends_it_at_once(stub):
    def slow(body):
        time.sleep(0.2)
        return longer(body)

    def interrupt(done):
        raise KeyboardInterrupt

    stub.answer = slow
    with pytest.raises(KeyboardInterrupt):
        judge(stub).verdicts(rows(100), side(*["a"] * 100), side(*["b"] * 100), interrupt)
    asked = len(stub.asked)
    time.sleep(1.0)
    assert len(stub.asked) <= asked + 8  # those on their way, in both orders


def test_a_conversation_is_shown_whole():
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "And now?"},
    ]
    shown = judges.question({"prompt": turns}, "one", "two")[-1]["content"]
    assert "user: Hello\n\nassistant: Hi\n\nuser: And now?" in shown
    assert shown.index("## Answer A\none") < shown.index("## Answer B\ntwo")


# functions ---------------------------------------------------------------------------------------


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "runs")


def by_function(tmp_path: Path, body: str, registry: Registry):
    file = tmp_path / "mine.py"
    file.write_text(f"def score(prompts, responses, rows):\n    {body}\n")
    return find(f"{file}:score", registry=registry, gold=None, batch_size=4)


def test_a_function_judges_by_its_scores(tmp_path, registry):
    one = by_function(tmp_path, "return [len(text) for text in responses]", registry)
    one.rehearse(rows(1))
    found = verdicts(one, side("aaa", "b", "cc"), side("d", "eee", "ff"))
    assert found.winners == ["ours", "theirs", "tie"]
    assert (found.ours, found.theirs) == ([3, 1, 2], [1, 3, 2])


def test_the_same_answer_is_a_tie_even_for_a_function_that_throws_dice(tmp_path, registry):
    body = "import random; return [random.random() for _ in responses]"
    found = verdicts(by_function(tmp_path, body, registry), side("a", "b"), side("a", "b"))
    assert found.winners == ["tie", "tie"]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("return [rows[0]['missing']]", r"raised KeyError\('missing'\)"),
        ("return [float('nan')]", "gave nan"),
        ("return []", "gave 0 values for 1 answers"),
    ],
)
def test_a_function_that_cannot_judge_is_found_in_a_rehearsal(tmp_path, registry, body, why):
    with pytest.raises(ConfigError, match=why):
        by_function(tmp_path, body, registry).rehearse(rows(1))


@pytest.mark.parametrize(
    ("ours", "theirs"), [(math.nan, 1.0), (1.0, math.nan), (math.nan, math.nan), (math.inf, 1.0)]
)
def test_a_score_that_is_no_number_is_no_verdict(ours, theirs):
    """Not a win of either side."""
    found = judges.by_score(side("a", "c"), side("b", "d"), ([ours, 2.0], [theirs, 1.0]))
    assert found.winners == [None, "ours"]
    assert found.facts["failures"] == 1


# what is refused ---------------------------------------------------------------------------------


def refused(name: str, registry: Registry, **settings):
    with pytest.raises((ConfigError, RegistryError)) as error:
        find(name, registry=registry, **({"gold": None, "batch_size": 4} | settings))
    return str(error.value)


def test_judges_that_there_are_not(registry, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert "no such judge. Choose gold, rm/NAME" in refused("gpt-4", registry)
    assert "no such judge" in refused("openai:", registry)
    assert "there is no gold score" in refused("gold", registry)
    assert "no such run" in refused("rm/none", registry)
    assert "no file" in refused("missing.py:score", registry)
    assert "no endpoint. Give --judge-url" in refused("openai:m", registry)
    assert "--concurrency=0: must" in refused("openai:m", registry, url="http://h", concurrency=0)
    assert "--judge-timeout=0: must" in refused("openai:m", registry, url="http://h", timeout=0.0)


def test_code_that_came_with_a_run_is_not_executed(registry, tmp_path):
    file = registry.runs_dir / "ppo" / "theirs" / "model" / "gold.py"
    file.parent.mkdir(parents=True)
    file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef gold(p, a, r): return [0] * len(p)")
    said = refused("gold", registry, gold=f"{file}:gold")
    assert "is not executed" in said
    assert "--judge FILE.py:function" in said
    assert not (tmp_path / "ran").exists()


def test_the_address_may_come_from_the_environment(registry, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    one = find("openai:m", registry=registry, gold=None, batch_size=4)
    assert one.endpoint.url == "http://127.0.0.1:1/v1"
