"""The HTTP side of a judge, against a server on this machine."""

from __future__ import annotations

import json
import threading
import time

import pytest
from stub_endpoint import Stub, says, serving

from rlhf import endpoint
from rlhf.endpoint import Endpoint, Usage, price
from rlhf.errors import ConfigError

KEY = "sk-very-secret-0123456789"
ASK = [{"role": "user", "content": "A or B?"}]


@pytest.fixture
def stub():
    with serving(lambda body: says("[[A]]")) as server:
        yield server


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Seconds that were waited for another try; none of them pass."""
    asked: list[float] = []
    wait = threading.Event.wait

    def note(self, timeout=None):
        if timeout is not None and threading.current_thread() is threading.main_thread():
            asked.append(timeout)
            return self.is_set()
        return wait(self, timeout)

    monkeypatch.setattr(threading.Event, "wait", note)
    return asked


def client(stub: Stub, **settings) -> Endpoint:
    return Endpoint(stub.url, "judge-1", **({"key": None, "timeout": 5.0} | settings))


def then(*replies):
    """A server that gives these replies one after the other, and the last one for ever."""
    waiting = list(replies)
    return lambda body: waiting.pop(0) if len(waiting) > 1 else waiting[0]


def test_a_question_and_its_reply(stub):
    asked = client(stub, key=KEY)
    assert asked.ask(ASK) == "[[A]]"
    assert stub.paths == ["/v1/chat/completions"]
    assert stub.keys == [f"Bearer {KEY}"]
    assert stub.asked[0]["model"] == "judge-1"
    assert stub.asked[0]["messages"] == ASK
    assert stub.asked[0]["temperature"] == 0
    assert asked.take_usage() == Usage(calls=1, prompt_tokens=100, completion_tokens=5)
    assert asked.take_usage() == Usage()


def test_without_a_key_there_is_no_header(stub):
    client(stub).ask(ASK)
    client(stub, key="").ask(ASK)
    assert stub.keys == [None, None]


def test_the_whole_address_may_be_given(stub):
    stub.url += "/chat/completions/"
    client(stub).ask(ASK)
    assert stub.paths == ["/v1/chat/completions"]


def test_429_then_an_answer(stub, waits):
    stub.answer = then((429, {"Retry-After": "7"}, "slow down"), says("[[B]]"))
    asked = client(stub)
    assert asked.ask(ASK) == "[[B]]"
    assert waits == [7.0]
    assert asked.take_usage() == Usage(
        calls=2, retries=1, failures=0, prompt_tokens=100, completion_tokens=5
    )


@pytest.mark.parametrize(
    ("header", "waited"), [("100000", 120.0), ("-5", 0.0), ("nan", None), ("Fri, 1 Jan", None)]
)
def test_odd_waits_are_bounded(stub, waits, header, waited):
    stub.answer = then((429, {"Retry-After": header}, ""), says("[[B]]"))
    assert client(stub).ask(ASK) == "[[B]]"
    assert waits == [waited] if waited is not None else 0.75 <= waits[0] <= 1.25


def test_500_for_ever(stub, waits):
    stub.answer = lambda body: (500, {}, "out of order")
    asked = client(stub)
    assert asked.ask(ASK) is None
    assert len(stub.asked) == 1 + endpoint.RETRIES
    # 1, 2, 4, 8, 16 seconds, each up to a quarter more or less.
    assert [0.75 * 2**n <= wait <= 1.25 * 2**n for n, wait in enumerate(waits)] == [True] * 5
    assert asked.take_usage() == Usage(calls=6, retries=5, failures=1)
    assert asked.problem == "HTTP 500: out of order"


def test_after_some_failures_in_a_row_nothing_more_is_asked(stub):
    stub.answer = lambda body: (503, {}, "")
    asked = client(stub)
    for _ in range(20):
        assert asked.ask(ASK) is None
    assert len(stub.asked) == endpoint.GIVE_UP * (1 + endpoint.RETRIES)
    assert asked.given_up
    assert asked.take_usage().failures == 20


def test_a_success_in_between_is_no_reason_to_give_up(stub):
    stub.answer = lambda body: (404, {}, "") if len(stub.asked) % 3 else says("[[A]]")
    asked = client(stub)
    assert [asked.ask(ASK) for _ in range(9)] == [None, None, "[[A]]"] * 3
    assert not asked.given_up


def test_what_cannot_get_better_is_not_asked_again(stub):
    stub.answer = lambda body: (404, {}, '{"error": "no such model"}')
    asked = client(stub)
    assert asked.ask(ASK) is None
    assert len(stub.asked) == 1
    assert "HTTP 404" in asked.problem
    assert "no such model" in asked.problem


GARBAGE = ["", "<html>nginx</html>", "[]", "{}", '{"choices": []}', '{"choices": [{"message": 5}]}']


@pytest.mark.parametrize("text", [*GARBAGE, "[" * 100000, "null"])
def test_a_reply_that_is_no_chat_completion(stub, text):
    stub.answer = lambda body: (200, {}, text)
    asked = client(stub)
    assert asked.ask(ASK) is None
    assert "no chat completion" in asked.problem
    assert asked.take_usage().failures == 1


@pytest.mark.parametrize("usage", [None, 5, {"prompt_tokens": "many"}, {"prompt_tokens": -3}])
def test_odd_counts_of_tokens_are_none(stub, usage):
    choices = [{"message": {"content": None}}]
    stub.answer = lambda body: (200, {}, json.dumps({"choices": choices, "usage": usage}))
    asked = client(stub)
    assert asked.ask(ASK) == ""
    assert asked.take_usage() == Usage(calls=1)


def test_a_slow_answer_is_asked_for_again(stub):
    def slow_at_first(body):
        if len(stub.asked) == 1:
            time.sleep(1.0)
        return says("[[A]]")

    stub.answer = slow_at_first
    asked = client(stub, timeout=0.3)
    assert asked.ask(ASK) == "[[A]]"
    assert asked.take_usage().retries == 1


def test_a_server_that_never_ends_its_reply(stub):
    stub.answer = lambda body: (200, {"Content-Length": "1000000"}, "{")
    asked = client(stub, timeout=0.2)
    began = time.monotonic()
    assert asked.ask(ASK) is None
    assert time.monotonic() - began < 10


def test_a_reply_that_trickles(stub, monkeypatch):
    """Every byte comes in time, the whole would take five seconds."""
    monkeypatch.setattr(endpoint, "RETRIES", 0)
    stub.pause = 0.05
    stub.answer = lambda body: says("x" * 20)
    asked = client(stub, timeout=0.3)
    assert asked.ask(ASK) is None
    assert asked.problem == "no whole reply in 0.3 s"


def test_a_reply_without_end_is_cut(stub, monkeypatch):
    monkeypatch.setattr(endpoint, "LARGEST", 1000)
    stub.answer = lambda body: says("x" * 5000)
    asked = client(stub)
    assert asked.ask(ASK) is None
    assert "longer than" in asked.problem


def test_settings_that_a_model_does_not_take_are_left_out(stub):
    def picky(body):
        if "max_tokens" in body:
            return 400, {}, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'."
        if "temperature" in body:
            return 400, {}, "Unsupported value: 'temperature' must be 1."
        return says("[[B]]")

    stub.answer = picky
    asked = client(stub)
    assert asked.ask(ASK) == "[[B]]"
    assert stub.asked[-1].keys() == {"model", "messages", "max_completion_tokens"}
    assert asked.ask(ASK) == "[[B]]"
    assert len(stub.asked) == 4  # it is remembered


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(stub, status):
    with serving() as elsewhere:
        stub.answer = lambda body: (status, {"Location": f"{elsewhere.url}/chat/completions"}, "")
        asked = client(stub, key=KEY)
        assert asked.ask(ASK) is None
        assert elsewhere.paths == []
    assert f"HTTP {status}" in asked.problem


def test_the_key_is_in_no_message(stub):
    stub.answer = lambda body: (400, {}, f"Incorrect API key: {KEY}\x1b[2J")
    asked = client(stub, key=KEY)
    asked.ask(ASK)
    assert asked.problem == "HTTP 400: Incorrect API key: *** [2J"
    assert KEY not in repr(asked)


def test_the_key_is_in_no_reply_and_no_part_of_it_in_a_cut_message(stub):
    asked = client(stub, key=KEY)
    stub.answer = lambda body: says(f"I was asked with {KEY}")
    assert asked.ask(ASK) == "I was asked with ***"
    stub.answer = lambda body: (200, {}, "x" * 110 + KEY)
    assert asked.ask(ASK) is None
    assert KEY[:5] not in asked.problem
    stub.answer = lambda body: (400, {}, "x" * 190 + KEY)
    assert asked.ask(ASK) is None
    assert KEY[:5] not in asked.problem


@pytest.mark.parametrize("key", ["sk-1\nX-Other: 1", "sk 1", "sk-ä"])
def test_a_key_that_no_header_holds_is_refused_and_not_shown(stub, key):
    with pytest.raises(ConfigError, match="MY_KEY: what it holds is no key") as refused:
        client(stub, key=key, key_variable="MY_KEY")
    assert key not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://host/v1",
        "file:///etc/passwd",
        "http://",
        "http://[::1/v1",
        "http://host:99999/v1",
        "http://host:port/v1",
        "http://hōst/v1",
        "http://host/a b",
        "http://a..b/v1",
        "http://host/vü",
        "http://host\u2028/v1",
    ],
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ConfigError, match="no address"):
        Endpoint(url, "m", key=None)


@pytest.mark.parametrize(
    "url",
    [
        "https://me:secret@host/v1",
        "https://host/v1?key=secret",
        "https://me:secret@[::1/v1",
        "me:secret@host/v1",
        "ftp://me:secret@host/v1",
        "https://host/v1#secret",
    ],
)
def test_an_address_with_a_secret_is_refused_and_not_shown(url):
    with pytest.raises(ConfigError, match="--judge-key-env") as refused:
        Endpoint(url, "m", key=None)
    assert "secret" not in str(refused.value)


def test_reach(stub):
    client(stub).reach()
    stub.models_status = 404  # not every server lists its models
    client(stub).reach()
    stub.models_status = 401
    with pytest.raises(ConfigError, match=r"it asks for a key.*OPENAI_API_KEY"):
        client(stub).reach()
    with pytest.raises(ConfigError, match="the key in OPENAI_API_KEY is not accepted") as refused:
        client(stub, key=KEY).reach()
    assert KEY not in str(refused.value)


def test_nobody_there():
    with serving() as gone:
        pass
    with pytest.raises(ConfigError, match=r"no endpoint answers there: .*refused"):
        client(gone).reach()


def test_price_by_hand():
    usage = Usage(prompt_tokens=2_000_000, completion_tokens=500_000)
    assert price(usage, 3.0, 12.0) == 12.0
    assert price(usage, None, 12.0) == 6.0
    assert price(usage, None, None) is None
