"""A line from every process to rank 0, which breaks when one of them is gone. No torch.

A collective call waits half an hour for a process that is not there: gloo hears of one that died,
but not of a machine that did, and NCCL of neither. Nothing is sent on these lines but a farewell;
the operating systems keep them alive, so a process may be as busy as it likes.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import socket
import sys
import threading
import time

from rlhf import ranks

PATIENCE = 5.0  # seconds the main thread has to end in order before the process is ended
SILENCE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))  # 40 s in all
FAREWELL, FAILED = b"done", b"failed"

main_failed = threading.Event()  # rank 0 left with an error, which it has shown
_leaving = threading.Event()
_lines: list[socket.socket] = []


def listen() -> tuple[str, int, str]:
    """On rank 0: expect the other processes; host, port, and the word they say when they call."""
    host = os.environ["MASTER_ADDR"]
    try:
        family = socket.getaddrinfo(host, None)[0][0]
        server = socket.create_server((host, 0), family=family)
    except OSError:  # its name for others is none of its own addresses
        server = socket.create_server(("", 0))
    word = secrets.token_hex(8)
    _in_background(_expect, server, word)
    atexit.register(leave)
    return host, server.getsockname()[1], word


def hold(where: tuple[str, int, str]) -> None:
    """On every process: keep the line to rank 0, which said `where` it listens."""
    if ranks.is_main():
        return
    host, port, word = where
    try:
        line = socket.create_connection((host, port), timeout=30)
    except OSError as error:
        print(f"[{ranks.name()}] no line to {host}:{port}: {error.strerror}", file=sys.stderr)
        return
    line.sendall(f"{word} {ranks.name()}\n".encode())
    _lines.append(line)
    _in_background(_watch, line, f"rank 0 of {ranks.world_size()} on {host}")
    atexit.register(leave)


def leave(*, failed: bool = False) -> None:
    """Hang up; the others end too where this process has `failed`."""
    if _leaving.is_set():
        return
    _leaving.set()
    for line in _lines:
        with contextlib.suppress(OSError):  # the other side was faster
            line.sendall(FAILED if failed else FAREWELL)
            line.shutdown(socket.SHUT_RDWR)


def _in_background(function: object, *arguments: object) -> None:
    threading.Thread(target=function, args=arguments, daemon=True).start()  # type: ignore[arg-type]


def _expect(server: socket.socket, word: str) -> None:
    """Take the calls of the processes of this job, and of nobody else."""
    missing = ranks.world_size() - 1
    while missing:
        line, _ = server.accept()
        line.settimeout(30)
        with contextlib.suppress(OSError):
            said = b""
            while not said.endswith(b"\n") and (more := line.recv(1)):
                said += more
            first, _, who = said.decode(errors="replace").strip().partition(" ")
            if secrets.compare_digest(first.encode(), word.encode()):
                missing -= 1
                _lines.append(line)
                _in_background(_watch, line, who)
                continue
        line.close()
    server.close()


def _watch(line: socket.socket, who: str) -> None:
    """Wait until a line ends, and end this process where that was no farewell."""
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in SILENCE:
        if hasattr(socket, option):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    said = b""
    with contextlib.suppress(OSError):  # reset, or silent for too long
        while more := line.recv(64):
            said += more
    if said == FAREWELL:
        return
    if said == FAILED and not ranks.is_main():
        main_failed.set()
    if ranks.PARENT in os.environ:  # it sees which one ended, says so, and ends the others
        return
    # The main thread may hear of it as well, and leave in order; rank 0 speaks before the others.
    time.sleep(PATIENCE if ranks.is_main() else 2 * PATIENCE)
    if _leaving.is_set():
        return
    if not main_failed.is_set():
        place = "" if ranks.is_main() else f"[{ranks.name()}] "
        text = f"\n{place}lost: {who} has ended or is out of reach: {ranks.NOT_LOST}"
        print(text, file=sys.stderr, flush=True)
    os._exit(1)
