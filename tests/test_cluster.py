"""Several processes under every launcher, and two machines: the same numbers; and one that dies.

Two network namespaces with a cable between them stand for two machines; they need root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_line import ROOT, SMALL, numbers

pytestmark = pytest.mark.slow

STAGES = {
    stage: [str(ROOT / "stages" / f"{stage}.py"), "tracking=off", *sizes]
    for stage, sizes in SMALL.items()
}
SFT = STAGES["sft"]
BIN = Path(sys.executable).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
LONG = ["train.max_steps=8", "train.save_every=2"]


def start(*command: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ends(process: subprocess.Popen[str], seconds: float = 400) -> tuple[int, str]:
    """Its code and what it said."""
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def weights(runs: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(runs / stage / "tiny/model/model.safetensors")


def expect_same(runs: Path, other: Path, stage: str = "sft") -> None:
    assert numbers(runs, stage) == numbers(other, stage)
    mine, theirs = weights(runs, stage), weights(other, stage)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sft/tiny by two processes of `NPROC=2`."""
    runs = tmp_path_factory.mktemp("one")
    code, said = ends(start(sys.executable, *SFT, f"runs_dir={runs}", NPROC="2"))
    assert code == 0, said
    return runs


def test_torchrun(one, tmp_path):
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", *SFT, f"runs_dir={tmp_path}"]
    code, said = ends(start(*command))
    assert code == 0, said
    assert said.count("published:") == 1
    expect_same(tmp_path, one)


def test_deepspeed_without_ssh(one, tmp_path):
    """One launcher on each of two machines, with a hostfile; here both are this one."""
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    runs = tmp_path / "runs"
    command = [
        *(str(BIN / "deepspeed"), "--hostfile", str(hosts), "--no_ssh", "--node_rank", "0"),
        *("--master_addr", "127.0.0.1", "--master_port", free_port(), "--no_local_rank"),
        *(*SFT, f"runs_dir={runs}"),
    ]
    code, said = ends(start(*command, PATH=f"{BIN}:{os.environ['PATH']}"))
    assert code == 0, said
    expect_same(runs, one)


def tasks(*runs: Path) -> list[subprocess.Popen[str]]:
    """One process for each folder of runs, with what srun sets."""
    started = []
    for task, folder in enumerate(runs):
        slurm = {
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_TASKS": str(len(runs)),
            "SLURM_PROCID": str(task),
            "SLURM_LOCALID": str(task),
            "SLURM_STEP_NODELIST": "localhost",
        }
        started.append(start(sys.executable, *SFT, f"runs_dir={folder}", **slurm))
    return started


def test_srun(one, tmp_path):
    ended = [ends(task) for task in tasks(tmp_path, tmp_path)]
    assert [code for code, _ in ended] == [0, 0], ended
    expect_same(tmp_path, one)


def test_a_folder_that_is_not_shared_is_refused(tmp_path):
    mine, other = (ends(task) for task in tasks(tmp_path / "a", tmp_path / "b"))
    assert mine[0] == 2, mine
    assert other[0] == 2, other
    assert f"refused: runs_dir={tmp_path}/a: rank 1 of 2 on " in mine[1]
    assert "does not see the run's folder" in mine[1]
    assert "refused" not in other[1]
    assert not list(tmp_path.glob("*/sft/tiny"))


def agents(
    machines: list[list[str]], address: str, *arguments: str, stage: str = "sft"
) -> list[subprocess.Popen[str]]:
    """torchrun on each of two machines, where a machine is what a command is run by."""
    started = []
    port = free_port()
    for place, machine in enumerate(machines):
        where = ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(place)]
        where += ["--master_addr", address, "--master_port", port]
        started.append(start(*machine, *TORCHRUN, *where, *STAGES[stage], *arguments))
    return started


def test_two_agents_with_a_static_rendezvous(one, tmp_path):
    ended = [ends(agent) for agent in agents([[], []], "127.0.0.1", f"runs_dir={tmp_path}")]
    assert [code for code, _ in ended] == [0, 0], ended
    assert [said.count("published:") for _, said in ended] == [1, 0]
    expect_same(tmp_path, one)


def test_what_all_ranks_refuse_is_said_once(tmp_path):
    """After they have met: rank 0 takes its time to end."""
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", *SFT, "train.batch_size=25"]
    code, said = ends(start(*command, f"runs_dir={tmp_path}"))
    assert code == 1
    assert said.count("refused: [train-batch-processes] train.batch_size=25 on 2") == 1
    assert "[rank 1" not in said
    assert not (tmp_path / "sft/tiny").exists()


ALONE = """
from rlhf import ranks
from rlhf.errors import ConfigError
from rlhf.launch import stage

@stage("sft")
def main(cfg):
    from rlhf import engine
    engine.start(0)
    if ranks.rank() == 1:
        raise ConfigError("a setting: why.")
    engine.barrier()
    raise AssertionError("rank 0 went on")

main()
"""


@pytest.mark.parametrize("launcher", ["nproc", "torchrun"])
def test_what_one_rank_alone_refuses_ends_all_with_its_message(tmp_path, launcher):
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    if launcher == "nproc":
        code, said = ends(start(sys.executable, str(script), NPROC="2"))
        assert code == 2, said
    else:
        torchrun = [*TORCHRUN, "--standalone", "--nproc_per_node", "2"]
        code, said = ends(start(*torchrun, str(script)))
        assert code == 1, said
    assert said.count("refused: a setting: why.") == 1
    assert "[rank 1 of 2 on " in said
    assert "went on" not in said


# ---------------------------------------------------------------- one dies


def wait_for_checkpoint(runs: Path, process: subprocess.Popen[str]) -> None:
    while not list((runs / "sft/tiny/checkpoints").glob("step-*/manifest.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def pid_of(runs: Path, rank: int) -> int:
    """The process of a rank, by its command line and its environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            variables = (folder / "environ").read_bytes().split(b"\0")
            if f"runs_dir={runs}".encode() in arguments and f"RANK={rank}".encode() in variables:
                return int(folder.name)
    raise AssertionError(f"no rank {rank}")


@pytest.mark.parametrize("launcher", ["nproc", "torchrun"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_in_the_middle_ends_all_and_the_same_command_goes_on(
    tmp_path, launcher, victim
):
    command, env = [sys.executable], {"NPROC": "2"}
    if launcher == "torchrun":
        command, env = [*TORCHRUN, "--standalone", "--nproc_per_node", "2"], {}
    command += [*SFT, *LONG, f"runs_dir={tmp_path}"]
    job = start(*command, **env)
    wait_for_checkpoint(tmp_path, job)
    os.kill(pid_of(tmp_path, victim), signal.SIGKILL)
    killed = time.monotonic()
    code, said = ends(job)
    assert time.monotonic() - killed < 30
    assert code == (137 if launcher == "nproc" else 1)
    if launcher == "nproc":
        assert f"lost: rank {victim} of 2 was ended by SIGKILL" in said
    elif victim == 1:
        assert "lost: another process has ended or is out of reach" in said
    if launcher == "nproc" or victim == 1:
        assert said.count("nothing was published. The same command goes on") == 1
        assert "Traceback" not in said.split("torchrun")[0].split("torch/distributed")[0]
    assert not (tmp_path / "sft/tiny/manifest.json").exists()
    code, said = ends(start(*command, **env))
    assert code == 0, said
    assert "goes on from its checkpoint at step" in said
    assert numbers(tmp_path, "sft")[-1]["step"] == 8


# ---------------------------------------------------------------- two machines

NAMES = ("rlhf-test-a", "rlhf-test-b")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[list[list[str]]]:
    """Two network namespaces, 10.77.0.1 and 10.77.0.2: what runs a command in each."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", "rlhf-va", "type", "veth", "peer", "name", "rlhf-vb")
    except subprocess.CalledProcessError as error:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    inside = []
    for place, (name, device) in enumerate(zip(NAMES, ("rlhf-va", "rlhf-vb"), strict=True)):
        ip("link", "set", device, "netns", name)
        ip("-n", name, "addr", "add", f"10.77.0.{place + 1}/24", "dev", device)
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "set", device, "up")
        inside.append(["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={device}"])
    yield inside
    for name in NAMES:
        ip("netns", "del", name)


def test_two_machines_are_as_one(one, machines, tmp_path):
    """SFT, reward model and PPO, each from what the one before published there."""
    for stage, command in STAGES.items():
        given = f"runs_dir={tmp_path}"
        ended = [ends(agent) for agent in agents(machines, "10.77.0.1", given, stage=stage)]
        assert [code for code, _ in ended] == [0, 0], ended
        if stage != "sft":
            code, said = ends(start(sys.executable, *command, f"runs_dir={one}", NPROC="2"))
            assert code == 0, said
        expect_same(tmp_path, one, stage)


def test_a_machine_that_falls_silent_is_not_waited_for(machines, tmp_path):
    """The cable is pulled: no process ends, and no connection is closed."""
    first, second = agents(machines, "10.77.0.1", *LONG, f"runs_dir={tmp_path}")
    wait_for_checkpoint(tmp_path, first)
    ip("-n", NAMES[0], "link", "set", "rlhf-va", "down")
    code, said = ends(first, 120)
    assert code != 0
    assert "lost: rank 1 of 2 on" in said
    assert "nothing was published. The same command goes on" in said
    ends(second, 120)
    assert not (tmp_path / "sft/tiny/manifest.json").exists()
