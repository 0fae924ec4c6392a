"""Signals are held to the end of a step, and never lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from rlhf import interrupts


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupts.terminate_in_order()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, interrupts.Terminated)],
)
def test_the_first_is_noted_and_the_second_raises(number, error):
    with interrupts.held() as held:
        assert held.asked is None
        send(number)
        assert held.asked == number
        with pytest.raises(error):
            send(number)
    with pytest.raises(error):  # as before the block
        send(number)


def test_ctrl_c_after_sigterm_stops_at_once():
    with interrupts.held() as held:
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert held.asked == signal.SIGTERM


def test_what_is_ignored_stays_ignored():
    """As Ctrl-C is in a process that a shell put in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts.held() as held:
        send(signal.SIGINT)
        assert held.asked is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_handlers_come_back_after_an_error():
    with pytest.raises(ValueError, match="x"), interrupts.held():
        raise ValueError("x")
    with pytest.raises(interrupts.Terminated):
        send(signal.SIGTERM)


def test_one_ctrl_c_reaches_a_launchers_rank_twice(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    clock = [100.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: clock[0])
    with interrupts.held() as held:
        send(signal.SIGINT)
        send(signal.SIGTERM)  # the launcher's echo
        assert held.asked == signal.SIGINT
        clock[0] += interrupts.ECHO
        with pytest.raises(KeyboardInterrupt):  # a second one
            send(signal.SIGINT)


def test_whether_it_was_told_to_end():
    assert not interrupts.told_to_end()
    with interrupts.held():
        send(signal.SIGTERM)
    assert interrupts.told_to_end()
    interrupts.terminate_in_order()
    assert not interrupts.told_to_end()


def test_a_process_that_is_ending_ends_undisturbed():
    interrupts.leave_undisturbed()
    send(signal.SIGTERM)
