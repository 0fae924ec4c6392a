"""How many threads: the table, the cores that may be used, the processes that share them."""

import math
import os

import pytest

from rlhf import ranks, threads


@pytest.mark.parametrize(
    ("parameters", "device", "cores", "processes", "expected"),
    [
        (1_150_000, "cpu", 2, 1, 1),
        (1_150_000, "cpu", 64, 1, 1),
        (19_999_999, "cpu", 8, 1, 1),
        (20_000_000, "cpu", 8, 1, 2),
        (59_999_999, "cpu", 64, 1, 5),
        (134_500_000, "cpu", 64, 1, 13),
        (134_500_000, "cpu", 2, 1, 2),
        (134_500_000, "cpu", 8, 2, 4),
        (134_500_000, "cpu", 8, 3, 2),
        (134_500_000, "cpu", 2, 4, 1),  # never none
        (1_150_000, "cuda", 16, 1, 16),
        (1_150_000, "cuda", 16, 8, 2),
        (7_000_000_000, "cuda", 4, 8, 1),
    ],
)
def test_the_table(parameters, device, cores, processes, expected):
    chosen = threads.choose(parameters, device=device, cores=cores, processes=processes)
    assert chosen == expected


@pytest.fixture
def machine(monkeypatch):
    """`machine(cores=4, quota=2.5)`: what this process may use, and no setting."""
    for name in (*threads.SETTINGS, "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def make(cores, quota=math.inf):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
        monkeypatch.setattr(threads, "quota", lambda: quota)

    return make


@pytest.mark.parametrize(
    ("cores", "quota", "expected"),
    [(4, math.inf, 4), (64, 2.0, 2), (64, 2.5, 2), (2, 8.0, 2), (64, 0.5, 1)],
)
def test_usable_cores_are_those_of_the_mask_and_of_the_quota(machine, cores, quota, expected):
    machine(cores, quota)
    assert threads.usable_cores() == expected


def group(root, path, **files):
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


V2 = "0::/slice/job"
V1 = "5:memory:/job\n4:cpu,cpuacct:/docker/abc\n0::/"


@pytest.mark.parametrize(
    ("groups", "written", "expected"),
    [
        (V2, {}, math.inf),
        (V2, {"slice/job": {"cpu__max": "max 100000"}}, math.inf),
        (V2, {"slice/job": {"cpu__max": "250000 100000"}}, 2.5),
        (  # the group around it grants less
            V2,
            {"slice/job": {"cpu__max": "800000 100000"}, "slice": {"cpu__max": "200000 100000"}},
            2.0,
        ),
        (V2, {".": {"cpu__max": "400000 100000"}}, 4.0),  # a container's own group is the top
        (V1, {"cpu/docker/abc": {"cpu__cfs_quota_us": -1, "cpu__cfs_period_us": 100000}}, math.inf),
        (
            V1,
            {"cpu/docker/abc": {"cpu__cfs_quota_us": 300000, "cpu__cfs_period_us": 100000}},
            3.0,
        ),
        (V1, {"cpu": {"cpu__cfs_quota_us": 50000, "cpu__cfs_period_us": 100000}}, 0.5),
    ],
)
def test_the_quota_of_control_groups(tmp_path, groups, written, expected):
    mounted = tmp_path / "cgroup"
    for path, files in written.items():
        group(mounted, path, **files)
    (tmp_path / "self").write_text(groups + "\n")
    assert threads.quota(tmp_path / "self", mounted) == expected
    assert threads.quota(tmp_path / "absent", mounted) == math.inf


def test_every_process_gets_its_share_and_says_so(machine, monkeypatch):
    import torch

    machine(8)
    before = torch.get_num_threads()
    try:
        for name, processes in (("LOCAL_WORLD_SIZE", "4"), ("LOCAL_SIZE", "2")):
            monkeypatch.setenv(name, processes)
            assert ranks.local_world_size() == int(processes)
            said = threads.settle(134_500_000)
            assert torch.get_num_threads() == 8 // int(processes)
            share = f"threads: {8 // int(processes)} of 8 cores (134.5M parameters, cpu, "
            assert said.startswith(f"{share}{processes} processes; docs/threads.md; ")
            monkeypatch.delenv(name)
        said = threads.settle(1_150_000)
        assert said.startswith("threads: 1 of 8 cores (1.1M parameters, cpu; docs/threads.md; ")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", threads.SETTINGS)
def test_what_is_set_is_left_alone(machine, monkeypatch, name):
    import torch

    machine(8)
    monkeypatch.setenv(name, "3")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert threads.settle(1_150_000) == f"threads: 3 of 8 cores ({name}=3)"
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
