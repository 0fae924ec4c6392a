"""Several processes of one Python file, as ranks that know of each other."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def start_ranks(processes: int, *command: str, timeout: float = 1500, **env: str) -> list[str]:
    """Run a Python file as so many ranks, each of which must end with 0; what each of them said.

    Args:
        command: the file, and its arguments.
        timeout: seconds.
        env: more variables.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": f"{processes}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | common | env | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        said = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, "\n".join(said)
    return said
