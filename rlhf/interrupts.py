"""Ctrl-C and SIGTERM: at once, or, while a stage trains, at the end of the step."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from rlhf import ranks

ECHO = 2.0


class Terminated(BaseException):
    """SIGTERM, raised in the main thread so that `with` blocks and locks are left in order."""


class Held:
    """What was asked while signals were held back; `asked` is the signal's number, or None."""

    def __init__(self) -> None:
        self.asked: int | None = None


_heard: set[int] = set()  # what was asked of this process so far


def raise_for(number: int) -> NoReturn:
    """Raise what a signal means: KeyboardInterrupt for SIGINT, else Terminated."""
    _heard.add(number)
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def terminate_in_order() -> None:
    """From here on SIGTERM raises Terminated in the main thread."""
    _heard.clear()
    signal.signal(signal.SIGTERM, lambda number, frame: raise_for(number))


def told_to_end() -> bool:
    """Whether SIGTERM came, held back or not."""
    return signal.SIGTERM in _heard


def leave_undisturbed() -> None:
    """From here on SIGTERM is not heard: this process is ending, and its launcher says so too."""
    signal.signal(signal.SIGTERM, lambda number, frame: None)


@contextlib.contextmanager
def held() -> Iterator[Held]:
    """While the block runs a first SIGINT or SIGTERM is only noted; a second one stops at once.

    A signal that the process ignores stays ignored. A launcher's rank gets one Ctrl-C twice, from
    the terminal and from the launcher: what comes within `ECHO` seconds is not a second one.
    """
    noted = Held()
    echo_until = 0.0

    def note(number: int, frame: object) -> None:
        nonlocal echo_until
        _heard.add(number)
        if noted.asked is None:
            noted.asked = number
            echo_until = time.monotonic() + (ECHO if ranks.world_size() > 1 else 0.0)
        elif time.monotonic() >= echo_until:
            raise_for(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
