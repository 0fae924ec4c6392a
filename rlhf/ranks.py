"""Which process this is, from the launcher's environment. No torch.

torchrun, deepspeed and `NPROC=` set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; for
a task that `srun` started they are made from SLURM's variables.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import MutableMapping

from rlhf.errors import ConfigError

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NOT_LOST = (
    "nothing was published. The same command goes on from the last checkpoint, or starts again "
    "where there is none."
)
PARENT = "RLHF_PARENT"  # set in the ranks that NPROC= starts: its process id


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Processes that share this machine's cores; srun, which says nothing, gives each its own."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def is_main() -> bool:
    """Rank 0 alone writes and prints."""
    return rank() == 0


def name() -> str:
    """This process among the others, in words: "rank 1 of 4 on node-b"."""
    return f"rank {rank()} of {world_size()} on {socket.gethostname()}"


def rows_per_pass(rows: int, at_most: int) -> int:
    """The size of a forward pass: the largest of `at_most` rows that divides a process's `rows`."""
    return next(size for size in range(min(rows, at_most), 0, -1) if rows % size == 0)


# ---------------------------------------------------------------- the launcher's variables


def adopt_launcher(processes: int, environment: MutableMapping[str, str] = os.environ) -> None:
    """Make one kind of environment of every launcher's, and refuse one that cannot work.

    Args:
        processes: how many NPROC= asks for.
        environment: this process's; srun's tasks get RANK and the others in it.

    Raises:
        ConfigError: processes would run that do not know of each other, or wait for some that
            nobody started.
    """
    if "RANK" not in environment:
        _adopt_slurm(processes, environment)
    if "RANK" not in environment:
        if environment.get("WORLD_SIZE", "1") != "1":
            raise ConfigError(
                f"WORLD_SIZE={environment['WORLD_SIZE']}, but RANK is not set: this process cannot "
                "know which of them it is. Start it with torchrun, deepspeed or srun, which set "
                "both, with NPROC=... for several on this machine, or unset WORLD_SIZE for one."
            )
        return
    if processes > 1:
        raise ConfigError(
            f"NPROC={processes} with RANK={environment['RANK']}: a launcher has started this "
            "process as one of its ranks, and each of them would start "
            f"{processes} more. Leave NPROC out, or the launcher."
        )
    place, count = _number("RANK", environment), _number("WORLD_SIZE", environment)
    if place >= count:
        raise ConfigError(
            f"RANK={place} with WORLD_SIZE={count}: ranks count from 0, so the last one is "
            f"{count - 1}. Start every process with one launcher, which sets both."
        )
    absent = [key for key in LAUNCHED if not environment.get(key)]
    if count > 1 and absent:
        raise ConfigError(
            f"WORLD_SIZE={count}, but {', '.join(absent)} not set: the {count} processes cannot "
            "find each other. Start them with torchrun or deepspeed, which set it, or give the "
            "address of rank 0's machine, a free port on it, and each process's place on its own "
            "machine."
        )


def _number(key: str, environment: MutableMapping[str, str]) -> int:
    text = environment.get(key, "1" if key == "WORLD_SIZE" else "")
    if not text.isdecimal():
        raise ConfigError(f"{key}={text}: it is a number that the launcher sets.")
    return int(text)


def _adopt_slurm(processes: int, environment: MutableMapping[str, str]) -> None:
    """RANK and the others for a task of `srun`; elsewhere nothing."""
    step = "SLURM_STEP_NUM_TASKS"  # srun sets it; a batch script itself has SLURM_NTASKS alone
    if step not in environment:
        tasks = environment.get("SLURM_NTASKS", "1")
        if tasks != "1" and processes == 1:
            raise ConfigError(
                f"SLURM_NTASKS={tasks}, but this process was not started by srun: it would run "
                f"alone, and {tasks} tasks were asked for. Start it with `srun python ...`; with "
                "NPROC=..., to have several processes on this machine; or with SLURM_NTASKS=1 "
                "for one."
            )
        return
    count = _number(step, environment)
    if count == 1:
        return
    if processes > 1:
        raise ConfigError(
            f"NPROC={processes} with {step}={count}: each of srun's tasks would start {processes} "
            "processes that know nothing of the other tasks'. Leave NPROC out, or ask srun for "
            "one task."
        )
    job, number = _number("SLURM_JOB_ID", environment), environment.get("SLURM_STEP_ID", "0")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    found = {
        "RANK": environment.get("SLURM_PROCID", ""),
        "LOCAL_RANK": environment.get("SLURM_LOCALID", ""),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(nodes),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(slurm_port(job, int(number))),
    }
    environment.update(found)


def first_host(nodes: str) -> str:
    """The first machine of a SLURM list: "node007" of "node[007-009,12],gpu1"."""
    found = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\])?([^,\[]*)", nodes)
    return "".join(part or "" for part in found.groups()) if found else ""


def slurm_port(job: int, step: int) -> int:
    """The same port for every task of a job step, and another for the next one."""
    return 15000 + (31 * job + step) % 15000  # below those that systems give out by themselves


# ---------------------------------------------------------------- when another one is gone


def lost_another(error: BaseException) -> bool:
    """Whether a call among processes failed because another process is gone or out of reach."""
    text = str(error)
    if type(error).__name__ in ("DistNetworkError", "DistStoreError"):
        return True
    if type(error).__name__ == "DistBackendError":  # NCCL
        return "remote process exited" in text or "Connection closed" in text
    return "gloo/transport" in text and "enforce fail" not in text
