"""How many threads a process computes with: a table by device and model size (docs/threads.md).

Where OMP_NUM_THREADS is set, it is left alone. Elsewhere the number follows from the model, the
cores that may be used and the processes of the run that share them, and from nothing else, such as
how busy the machine is: a run that goes on later on the same machine rounds as it did before.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from rlhf import ranks

SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # from which torch takes its number
GRAIN = 10_000_000  # parameters for each thread of a CPU; with fewer it costs more than it gives


def choose(parameters: int, *, device: str, cores: int, processes: int) -> int:
    """The table: on a CPU a thread for each `GRAIN`, and no more than the process's share of cores.

    Args:
        parameters: of the largest model at work.
        device: "cpu" or "cuda".
        cores: what all processes of the run on this machine may use.
        processes: how many they are.
    """
    share = max(1, cores // processes)
    return share if device != "cpu" else min(share, max(1, parameters // GRAIN))


def settle(parameters: int) -> str:
    """Let torch compute with as many threads as suit a model of that size; in words. Imports torch.

    Operators by OpenMP and products by MKL follow it alike, and so does DeepSpeed's CPU Adam.
    """
    import torch

    cores, setting = usable_cores(), given()
    if setting is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        processes = ranks.local_world_size()
        torch.set_num_threads(choose(parameters, device=device, cores=cores, processes=processes))
        shared = f", {processes} processes" if processes > 1 else ""
        setting = (
            f"{parameters / 1e6:.1f}M parameters, {device}{shared}; docs/threads.md; "
            "OMP_NUM_THREADS= sets it"
        )
    return f"threads: {torch.get_num_threads()} of {cores} cores ({setting})"


def in_words() -> str:
    """What `settle` would choose on this machine, for one process."""
    cores = usable_cores()
    return f"one for each {GRAIN / 1e6:.0f}M parameters on a CPU, 1 to {cores}"


def given(environment: Mapping[str, str] = os.environ) -> str | None:
    """The setting that a user or a launcher made, "OMP_NUM_THREADS=4"; None without one."""
    found = [f"{name}={environment[name]}" for name in SETTINGS if environment.get(name)]
    return found[0] if found else None


def usable_cores() -> int:
    """Cores that this process may use: of those it is bound to, what its control groups grant."""
    bound = hasattr(os, "sched_getaffinity")
    there = len(os.sched_getaffinity(0)) if bound else os.cpu_count() or 1
    return max(1, math.floor(min(there, quota())))


def quota(
    groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")
) -> float:
    """Seconds of CPU per second that control groups grant, of version 1 or 2; inf without a limit.

    Containers are limited so: such a process sees every core of its machine.

    Args:
        groups: the file that names this process's groups.
        mounted: where they are shown. Inside a container that may be its own group.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return math.inf
    return min((part for line in lines for part in _limits(line, mounted)), default=math.inf)


def _limits(line: str, mounted: Path) -> Iterator[float]:
    """What a line "4:cpu,cpuacct:/a/b" says of /a/b and of the groups that it lies in."""
    _, controllers, path = line.split(":", 2)
    if controllers and "cpu" not in controllers.split(","):
        return
    top = mounted / "cpu" if controllers else mounted
    folder = top / path.strip("/")
    for group in (folder, *folder.parents):
        try:
            if controllers:
                spent, period = (
                    (group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
                )
            else:
                spent, period = (group / "cpu.max").read_text().split()
            if spent.strip() not in ("max", "-1"):
                yield float(spent) / float(period)
        except (OSError, ValueError):  # there is none, as in the topmost group
            pass
        if group == top:
            return
