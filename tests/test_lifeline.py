"""A process that is gone ends the others; one that said farewell does not. No torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SCRIPT = """
import json, os, pathlib, socket, sys, time
from rlhf import lifeline, ranks
lifeline.PATIENCE = 0.2
out = pathlib.Path(sys.argv[1])
place = out / "where"
if ranks.is_main():
    (out / "new").write_text(json.dumps(lifeline.listen()))
    (out / "new").rename(place)
while not place.exists():
    time.sleep(0.01)
lifeline.hold(tuple(json.loads(place.read_text())))
(out / f"up{ranks.rank()}").touch()
def wait_for(*names):
    while not all((out / name).exists() for name in names):
        time.sleep(0.01)
wait_for(*(f"up{rank}" for rank in range(ranks.world_size())))
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """`start(code, 3)`: so many processes, each with its line; then `code`."""
    started: list[subprocess.Popen[str]] = []

    def go(code: str, count: int = 3) -> list[subprocess.Popen[str]]:
        for rank in range(count):
            place = {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
            command = [sys.executable, "-c", SCRIPT + code, str(tmp_path)]
            process = subprocess.Popen(
                command, env=os.environ | place, stderr=subprocess.PIPE, text=True
            )
            started.append(process)
        while not all((tmp_path / f"up{rank}").exists() for rank in range(count)):
            assert all(process.poll() is None for process in started)
            time.sleep(0.01)
        return started

    yield go
    for process in started:
        process.kill()
        process.communicate()


def ends(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = process.communicate(timeout=300)
    return process.returncode, said


@pytest.mark.parametrize("gone", [0, 1])
def test_a_killed_process_ends_the_others_with_its_name(start, gone):
    processes = start("time.sleep(60)")
    processes[gone].send_signal(signal.SIGKILL)
    for rank, process in enumerate(processes):
        if rank != gone:
            code, said = ends(process)
            assert code == 1
            # Rank 2 hears of rank 1 by the end of rank 0.
            assert f"lost: rank {gone if rank == 0 else 0} of 3 on" in said
            assert "The same command goes on from the last checkpoint" in said
            assert said.startswith(f"\n[rank {rank} of 3 on " if rank else "\nlost: ")


def test_a_process_that_failed_ends_the_others(start):
    code = "if ranks.rank() == 1:\n    lifeline.leave(failed=True)\n    sys.exit(2)\ntime.sleep(60)"
    assert [ends(process)[0] for process in start(code)] == [1, 2, 1]


def test_what_rank_0_has_shown_is_not_said_again(start):
    code = (
        "if ranks.is_main():\n    lifeline.leave(failed=True)\n    sys.exit(2)\n"
        "if ranks.rank() == 1:\n    sys.exit(7 if lifeline.main_failed.wait(30) else 8)\n"
        "time.sleep(60)"
    )
    assert [ends(process) for process in start(code)] == [(2, ""), (7, ""), (1, "")]


def test_the_parent_ends_the_ranks_it_started(start, monkeypatch):
    monkeypatch.setenv("RLHF_PARENT", "1")
    processes = start("time.sleep(2)")
    processes[1].kill()
    assert [ends(processes[rank]) for rank in (0, 2)] == [(0, ""), (0, "")]


def test_processes_that_are_done_leave_one_by_one(start):
    code = "time.sleep(1 - 0.5 * ranks.rank())"  # the last one first, rank 0 at the end
    assert [ends(process) for process in start(code)] == [(0, "")] * 3


def test_rank_0_may_be_the_first_to_leave(start):
    assert [ends(process) for process in start("time.sleep(0.5 * ranks.rank())")] == [(0, "")] * 3


def test_nobody_listens_once_all_have_called(start):
    stranger = (
        "if ranks.is_main():\n    time.sleep(60)\nhost, port, _ = json.loads(place.read_text())\n"
    )
    processes = start(
        # Rank 1 and 2 are on the line; all places are taken, so nobody is listening any more.
        stranger + "time.sleep(0.5)\n"
        "try:\n    socket.create_connection((host, port), 5)\n"
        "except ConnectionRefusedError:\n    sys.exit(0)\n"
        "os._exit(9)\n"
    )
    assert [ends(process)[0] for process in processes[1:]] == [0, 0]


def test_a_wrong_word_is_hung_up_on(tmp_path):
    code = (
        "import socket, time\nfrom rlhf import lifeline\n"
        "host, port, word = lifeline.listen()\n"
        "with socket.create_connection((host, port)) as stranger:\n"
        "    stranger.sendall(b'guess rank 1 of 2 on here\\n')\n"
        "    stranger.settimeout(20)\n"
        "    assert stranger.recv(1) == b''\n"
        "assert lifeline._lines == []\n"
    )
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | place).returncode == 0
