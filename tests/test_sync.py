"""`rlhf sync`: what was tracked offline goes to W&B in order, by W&B's command."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhf import cli, locks, sync, wandb_run
from rlhf.errors import ConfigError, RegistryError
from rlhf.registry import Registry

KEY = "0123456789abcdef" * 3
# Stands for `wandb sync FOLDER`: notes what it is asked, and leaves W&B's mark, unless told not to.
STUB = """
import os, sys
from pathlib import Path
folder, here = Path(sys.argv[-1]), Path(sys.argv[1])
with here.open("a") as log:
    log.write(f"{folder.parents[1].name}/{folder.name} {os.environ.get('WANDB_API_KEY')}\\n")
if not (here.parent / "refuse").exists() or folder.name not in (here.parent / "refuse").read_text():
    for file in folder.glob("*.wandb"):
        file.with_suffix(".wandb.synced").touch()
"""


def tracked(runs: Path, reference: str, *folders: str) -> None:
    for name in folders:
        folder = runs / reference / "wandb" / name
        folder.mkdir(parents=True)
        (folder / f"run-{name.split('-')[-1]}.wandb").write_bytes(b":W&B")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ppo/tiny, whose three parts were tracked offline; rm/tiny with one; sft/tiny with none."""
    runs = tmp_path / "runs"
    tracked(
        runs,
        "ppo/tiny",
        "offline-run-20260103_000000-aaaa1111",
        "offline-run-20251231_235959-aaaa1111",
        "offline-run-20260102_030405-aaaa1111",
    )
    tracked(runs, "rm/tiny", "offline-run-20260101_000000-bbbb2222")
    (runs / "sft/tiny").mkdir(parents=True)
    stub = tmp_path / "stub.py"
    stub.write_text(STUB)
    monkeypatch.setattr(sync, "COMMAND", [sys.executable, str(stub), str(tmp_path / "asked")])
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(wandb_run, "account", lambda: (url, KEY))
        yield runs


def asked(runs: Path) -> list[str]:
    path = runs.parent / "asked"
    return path.read_text().splitlines() if path.exists() else []


def states(runs: Path) -> list[tuple[str, str]]:
    registry = Registry(runs)
    found = sync.parts(registry, sync.choose(registry, []))
    return [(part.folder.name.split("-")[2], part.state) for part in found]


def command(runs: Path, *arguments: str):
    return CliRunner().invoke(cli.app, ["sync", *arguments, "--runs-dir", str(runs)])


def test_parts_of_a_run_are_uploaded_in_order(runs):
    result = command(runs, "ppo/tiny")
    assert result.exit_code == 0
    assert asked(runs) == [
        f"tiny/offline-run-{when}-aaaa1111 {KEY}"
        for when in ("20251231_235959", "20260102_030405", "20260103_000000")
    ]
    assert result.stdout.count("uploaded") == 3
    again = command(runs, "ppo/tiny")
    assert again.exit_code == 0
    assert len(asked(runs)) == 3, "nothing is uploaded twice"
    assert again.stdout.count("uploaded") == 3


def test_all_runs(runs):
    assert command(runs, "--all").exit_code == 0
    assert len(asked(runs)) == 4
    assert {state for _, state in states(runs)} == {"uploaded"}


def test_after_a_part_that_fails_the_rest_of_its_run_waits(runs):
    (runs.parent / "refuse").write_text("offline-run-20260102_030405-aaaa1111")
    registry, said = Registry(runs), []
    found = sync.parts(registry, sync.choose(registry, []))
    with pytest.raises(RegistryError, match=r"not uploaded: ppo/tiny\..*same command"):
        sync.upload(found, said.append)
    assert len(asked(runs)) == 3  # rm/tiny, and two of PPO
    assert any("20260103" in line and "waits" in line for line in said)
    (runs.parent / "refuse").unlink()
    sync.upload(sync.parts(registry, sync.choose(registry, [])), said.append)
    assert [line.split("_")[0] for line in asked(runs)[3:]] == [
        "tiny/offline-run-20260102",
        "tiny/offline-run-20260103",
    ]


def test_what_a_later_process_sent_online_is_left_out(runs):
    tracked(runs, "ppo/tiny", "run-20260102_120000-aaaa1111", "run-20270101_000000-cccc3333")
    assert dict(states(runs)) == {
        "20260101_000000": "to upload",
        "20251231_235959": "replaced",
        "20260102_030405": "replaced",
        "20260103_000000": "to upload",
    }


def test_parts_of_one_second_are_in_order(tmp_path):
    tracked(
        tmp_path,
        "ppo/tiny",
        "offline-run-20260101_000000-aaaa1111-1",
        "offline-run-20260101_000000-aaaa1111",
        "offline-run-20260101_000000-aaaa1111-10",
        "offline-run-20260101_000000-aaaa1111-2",
    )
    registry = Registry(tmp_path)
    found = sync.parts(registry, sync.choose(registry, []))
    assert [part.folder.name[36:] for part in found] == ["", "-1", "-2", "-10"]


def test_folders_that_wandb_did_not_name_are_left_alone(runs):
    tracked(runs, "sft/tiny", "offline-run-old", "offline-run-20260101_000000-cccc3333-copy")
    tracked(runs, "sft/tiny", "run-20260102_000000-cccc3333-copy")
    tracked(runs, "sft/tiny", "offline-run-20260101_000000-cccc3333")
    registry = Registry(runs)
    (part,) = sync.parts(registry, sync.choose(registry, ["sft/tiny"]))
    assert (part.folder.name, part.state) == ("offline-run-20260101_000000-cccc3333", "to upload")


def test_a_run_at_work_is_left_alone(runs):
    code = (
        "import sys, time; from pathlib import Path; from rlhf import locks;"
        "locks.take(Path(sys.argv[1]), 'rm/tiny', ''); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(runs)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        assert ("20260101_000000", "at work") in states(runs)
        assert locks.holder(runs, "rm/tiny") is not None
    finally:
        holder.kill()
        holder.communicate()


def test_dry_run_and_nothing_to_do(runs):
    result = command(runs, "--all", "--dry-run")
    assert result.exit_code == 0
    assert result.stdout.count("to upload") == 4
    assert "Nothing was tracked offline." in command(runs, "sft/tiny").stdout
    assert asked(runs) == []


def test_without_a_key_the_way_out_is_named(runs, monkeypatch):
    monkeypatch.setattr(wandb_run, "account", lambda: ("https://api.wandb.ai", None))
    with pytest.raises(ConfigError, match=r"WANDB_API_KEY or run `wandb login`"):
        raise command(runs, "--all").exception


def test_without_a_network_it_does_not_try_for_minutes(runs, monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(wandb_run, "account", lambda: ("http://127.0.0.1:9", KEY))
    with pytest.raises(ConfigError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        raise command(runs, "--all").exception
    assert asked(runs) == []


def test_a_name_that_is_not_there_is_refused(runs):
    with pytest.raises(RegistryError, match=r"ppo/tinny: no such run.*ppo/tiny"):
        raise command(runs, "ppo/tinny").exception
    with pytest.raises(RegistryError, match="give --all"):
        raise command(runs).exception
    with pytest.raises(RegistryError, match="give --all"):
        raise command(runs, "ppo/tiny", "--all").exception


def test_it_is_wandbs_own_command_that_uploads():
    """Its options change; what we ask of it must be what it has."""
    assert sync.COMMAND[1:] == ["-m", "wandb", "sync"]
    done = subprocess.run([*sync.COMMAND, "--help"], capture_output=True, text=True, check=True)
    assert "wandb sync ./wandb/run-" in done.stdout  # a folder, as we give it


def test_the_mark_is_wandbs(tmp_path):
    from wandb.cli.beta_sync import _is_synced

    tracked(tmp_path, "ppo/tiny", "offline-run-20260101_000000-aaaa1111")
    folder = tmp_path / "ppo/tiny/wandb/offline-run-20260101_000000-aaaa1111"
    assert sync._state(folder) == "to upload"
    (folder / "run-aaaa1111.wandb.synced").touch()
    assert _is_synced(folder / "run-aaaa1111.wandb")
    assert sync._state(folder) == "uploaded"
