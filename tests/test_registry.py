"""Runs, references, lineage: what is refused, what is found, and what is left untouched."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rlhf
from rlhf import manifest as manifests
from rlhf.errors import ConfigError, RegistryError
from rlhf.manifest import BaseModel, CardFacts, DataFacts, TokenizerFacts
from rlhf.registry import (
    Published,
    Reference,
    Registry,
    check_run_name,
    default_runs_dir,
    parse_reference,
)
from rlhf.run import Run, config_hash, open_run, result_keys

CONFIG: dict[str, Any] = {
    "stage": "sft",
    "run": "tiny",
    "seed": 0,
    "train": {"learning_rate": 1e-4, "max_steps": None},
    "data": {"columns": {}, "path": "data/tiny"},
    "tracking": {"mode": "off", "project": "rlhf"},
    "runs_dir": "runs",
    "overwrite": False,
}


def facts(**changes: Any) -> dict[str, Any]:
    """What a stage knows when it publishes."""
    return {
        "base": BaseModel("tiny-base", None, "base-1"),
        "tokenizer": TokenizerFacts("tokenizer-1", "template-1", pad_id=0, eos_id=2, bos_id=1),
        "method": {"name": "lora", "adapter_chain": ["sft/tiny"], "rank": 16},
        "data": [DataFacts("data/tiny", "train", "data-1", 90, {"empty answer": 10})],
        "metrics": {"eval/loss": 1.25, "eval/gold": 0.5},
        "golden": {"file": "model/golden.json", "tolerance": 1e-4},
        "environment": {
            "world_size": 1,
            "zero_stage": 2,
            "dtype": "fp32",
            "device": "cpu",
            "seed": 0,
        },
        "phases": {"train": {"seconds": 12.5, "peak_memory_gb": 0.5}},
    } | changes


def fill(run: Run) -> None:
    """Write what a stage writes before it publishes."""
    run.metrics_path.write_text('{"step": 1, "train/loss": 2.0}\n')
    run.samples_path.write_text('{"prompt": "p", "answer": "a"}\n')
    (run.model_dir / "tokenizer").mkdir()
    (run.model_dir / "tokenizer" / "tokenizer.json").write_text("{}")
    (run.model_dir / "model.safetensors").write_bytes(b"weights of " + run.reference.encode())
    (run.model_dir / "golden.json").write_text("[0.5]")


def published(
    registry: Registry,
    reference: str = "sft/tiny",
    parents: dict[str, Published] | None = None,
    config: dict[str, Any] = CONFIG,
    overwrite: bool = False,
    **changes: Any,
) -> Published:
    stage, run_name = reference.split("/")
    with open_run(
        registry,
        stage,
        run_name,
        config,
        parents or {},
        config_text="seed: 0\n",
        overwrite=overwrite,
    ) as run:
        fill(run)
        run.publish(**facts(**changes))
    return registry.resolve(reference)


def interrupted(registry: Registry, *steps: int, config: dict[str, Any] = CONFIG) -> None:
    """A run sft/tiny that ended after checkpoints at `steps`."""
    with open_run(registry, "sft", "tiny", config, {}) as run:
        run.metrics_path.write_text("{}\n")
        for step in steps:
            save(run, step)


def save(run: Run, step: int, **options: Any) -> None:
    with run.checkpoint(step, **options) as folder:
        (folder / "model").mkdir()
        (folder / "model" / "model.safetensors").write_bytes(b"step %d" % step)
        (folder / "optimizer.pt").write_bytes(b"momenta")


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every file and folder, with what changes when it is touched."""
    paths = [folder, *folder.rglob("*")]
    return {
        str(p): (p.lstat().st_mtime_ns, p.lstat().st_ino, p.lstat().st_size) for p in sorted(paths)
    }


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """One test looks at the calls of fsync; the others would only wait for them."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "runs")


# ---------------------------------------------------------------- references and names


def test_reference_has_stage_name_and_checkpoint():
    assert parse_reference("sft/tiny") == Reference("sft", "tiny", None)
    assert parse_reference("ppo/kl=0.1,lr_2+b@best") == Reference("ppo", "kl=0.1,lr_2+b", "best")
    assert str(parse_reference("rm/tiny@step-40")) == "rm/tiny@step-000040"


BAD_NAMES = ["", ".", "..", "a..b", "a/b", "../up", "/etc", "a b", " a", "-x", ".x", "é", "a\n"]
BAD_NAMES += ["a\\b", "a:b", "a\0", "x" * 121]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_could_leave_the_registry_are_refused(name: str, registry: Registry):
    with pytest.raises(RegistryError, match=r"\[A-Za-z0-9\._=\+,-\]") as caught:
        parse_reference(f"sft/{name}")
    assert repr(f"sft/{name}") in str(caught.value)
    with pytest.raises(ConfigError, match=r"\[A-Za-z0-9\._=\+,-\]") as caught_name:
        check_run_name(name)
    assert f"run_name={name}:" in str(caught_name.value)
    with pytest.raises(ConfigError):
        open_run(registry, "sft", name, CONFIG, {})
    assert not registry.runs_dir.exists()


def test_longest_name_is_accepted_and_makes_a_folder(registry: Registry):
    assert published(registry, "sft/" + "x" * 120).run_name == check_run_name("x" * 120)


@pytest.mark.parametrize("text", ["tiny", "", "sfx/tiny", "SFT/tiny", "/sft/tiny", "sft"])
def test_other_stages_are_refused(text: str):
    with pytest.raises(RegistryError, match="one of sft, rm, ppo") as caught:
        parse_reference(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("checkpoint", ["", "newest", "step-", "step-x", "step--1", "best@last"])
def test_other_checkpoints_are_refused(checkpoint: str):
    with pytest.raises(RegistryError, match="no checkpoint"):
        parse_reference(f"sft/tiny@{checkpoint}")


def test_runs_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RLHF_RUNS", raising=False)
    assert default_runs_dir() == "runs"
    monkeypatch.setenv("RLHF_RUNS", "elsewhere")
    assert default_runs_dir() == "elsewhere"


# ---------------------------------------------------------------- which settings count


def test_hash_ignores_order_and_what_cannot_change_results():
    reordered = {key: CONFIG[key] for key in reversed(CONFIG)}
    reordered["train"] = {"max_steps": None, "learning_rate": 1e-4}
    other = {
        "tracking": {"mode": "online", "entity": "someone"},
        "runs_dir": "elsewhere",
        "overwrite": True,
        "run": "other",
        "run_name": "other",
        "keep_checkpoints": 5,
        "data": {"columns": {}, "path": "moved/tiny"},
    }
    assert config_hash(reordered) == config_hash(CONFIG) == config_hash(CONFIG | other)
    assert result_keys(CONFIG) == {
        "stage": "sft",
        "seed": 0,
        "train.learning_rate": 1e-4,
        "train.max_steps": None,
        "data.columns": {},
    }


@pytest.mark.parametrize("key", sorted(result_keys(CONFIG)))
def test_hash_changes_with_every_other_setting(key: str):
    flat = result_keys(CONFIG)
    assert config_hash(flat) == config_hash(CONFIG)
    assert config_hash(flat | {key: "something else"}) != config_hash(CONFIG)
    assert config_hash({k: v for k, v in flat.items() if k != key}) != config_hash(CONFIG)


def test_hash_tells_true_from_one_and_text_from_number():
    hashes = {config_hash({"a": value}) for value in (1, True, "1", 1.5, None, "None", [1], [])}
    assert len(hashes) == 8


# ---------------------------------------------------------------- open: what it decides


def test_new_run_gets_a_folder_and_its_config(registry: Registry):
    with open_run(registry, "sft", "tiny", CONFIG, {}, config_text="seed: 0\n") as run:
        assert (run.state, run.latest, run.published, run.notes) == ("new", None, None, [])
        assert run.path == registry.runs_dir / "sft" / "tiny"
        assert (run.path / "config.yaml").read_text() == "seed: 0\n"
        assert run.model_dir.is_dir()
        assert not (run.path / "manifest.json").exists()


def test_new_run_that_wrote_nothing_leaves_no_folder(registry: Registry):
    def refuse_the_data() -> None:
        with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
            run.log_path.touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        refuse_the_data()
    assert not (registry.runs_dir / "sft").exists()


def test_started_with_nothing_to_resume_is_set_aside_and_counted(registry: Registry):
    for number in (1, 2):
        with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
            assert run.state == "new"
            run.metrics_path.write_text(f"attempt {number}")
    with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
        assert run.state == "new"
        assert not run.metrics_path.exists()
        aside = registry.runs_dir / ".replaced"
        assert run.notes == [f"moved aside: {run.path} -> {aside / 'sft-tiny-2'}"]
    for number in (1, 2):
        assert (aside / f"sft-tiny-{number}" / "metrics.jsonl").read_text() == f"attempt {number}"


def test_interrupted_run_resumes_from_its_newest_checkpoint(registry: Registry):
    interrupted(registry, 10, 20)
    created = json.loads(
        (registry.runs_dir / "sft/tiny/checkpoints/step-000020/manifest.json").read_text()
    )["created"]
    (registry.runs_dir / "sft/tiny/model/half.safetensors").write_text("half")
    scratch = registry.runs_dir / "sft/tiny/checkpoints/.step-000030.tmp"
    scratch.mkdir()
    with open_run(registry, "sft", "tiny", CONFIG | {"runs_dir": "elsewhere"}, {}) as run:
        assert run.state == "resume"
        assert run.latest is not None
        assert run.latest.step == 20
        assert (run.latest.path / "optimizer.pt").read_bytes() == b"momenta"
        assert run.created == created
        assert run.metrics_path.exists()
        assert list(run.model_dir.iterdir()) == []  # a half-written model must not be published
        assert not scratch.exists()
        assert (registry.runs_dir / ".replaced/sft-tiny-1/model/half.safetensors").exists()


def test_interrupted_run_with_other_settings_is_refused(registry: Registry):
    interrupted(registry, 10)
    before = snapshot(registry.runs_dir / "sft")
    with pytest.raises(RegistryError, match=r"interrupted at step 10 .*\n  seed: 0 -> 1\n") as e:
        open_run(registry, "sft", "tiny", CONFIG | {"seed": 1}, {})
    assert "run_name=" in str(e.value)
    assert "overwrite=true" in str(e.value)
    assert snapshot(registry.runs_dir / "sft") == before


def test_interrupted_run_starts_anew_when_told_to(registry: Registry):
    interrupted(registry, 10)
    with open_run(registry, "sft", "tiny", CONFIG, {}, overwrite=True) as run:
        assert (run.state, run.latest) == ("new", None)
        assert not run.checkpoints_dir.exists()
    assert (registry.runs_dir / ".replaced/sft-tiny-1/checkpoints/step-000010").is_dir()


def test_damaged_newest_checkpoint_is_passed_over_and_noted(registry: Registry):
    interrupted(registry, 10, 20)
    flip(registry.runs_dir / "sft/tiny/checkpoints/step-000020/optimizer.pt", 0)
    with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
        assert run.latest is not None
        assert run.latest.step == 10
        assert "step-000020/optimizer.pt: sha256 differs" in run.notes[0]
        save(run, 20)  # reached again, it takes the place of the damaged one
        assert (run.checkpoints_dir / "step-000020/optimizer.pt").read_bytes() == b"momenta"


def test_run_never_starts_over_silently_when_all_checkpoints_are_damaged(registry: Registry):
    interrupted(registry, 10)
    (registry.runs_dir / "sft/tiny/metrics.jsonl").write_text("")
    for file in (registry.runs_dir / "sft/tiny/checkpoints/step-000010").rglob("*.*"):
        file.write_bytes(b"")
    before = snapshot(registry.runs_dir / "sft")
    with pytest.raises(RegistryError, match="no checkpoint is sound") as caught:
        open_run(registry, "sft", "tiny", CONFIG, {})
    assert "overwrite=true" in str(caught.value)
    assert snapshot(registry.runs_dir / "sft") == before


def test_checkpoint_of_another_run_is_not_resumed(registry: Registry):
    interrupted(registry, 10)
    os.rename(registry.runs_dir / "sft/tiny", registry.runs_dir / "sft/other")
    with pytest.raises(RegistryError, match="belongs to sft/tiny@step-000010, not sft/other"):
        open_run(registry, "sft", "other", CONFIG, {})


def test_finished_run_with_the_same_settings_touches_nothing(registry: Registry):
    made = published(registry)
    before = snapshot(registry.runs_dir)
    same = CONFIG | {"tracking": {"mode": "online"}, "runs_dir": "elsewhere"}
    with open_run(registry, "sft", "tiny", same, {}, config_text="other text") as run:
        assert run.state == "finished"
        assert run.published == made
        with pytest.raises(RegistryError, match="not open for writing"):
            run.publish(**facts())
        with pytest.raises(RegistryError, match="not open for writing"), run.checkpoint(1):
            pass
    assert snapshot(registry.runs_dir) == before


def test_finished_run_with_other_settings_prints_each_difference(registry: Registry):
    published(registry)
    before = snapshot(registry.runs_dir)
    other = {k: v for k, v in CONFIG.items() if k != "stage"}
    other |= {"seed": 1, "data": {"path": "mine", "columns": {"a": "b"}}, "new": True, "run": "x"}
    with pytest.raises(RegistryError, match="sft/tiny is finished with another config") as caught:
        open_run(registry, "sft", "tiny", other, {})
    message = str(caught.value)
    assert message.splitlines()[1:6] == [
        "  data.columns: {} -> (not set)",
        "  data.columns.a: (not set) -> b",
        "  new: (not set) -> true",
        "  seed: 0 -> 1",
        "  stage: sft -> (not set)",
    ]
    assert "run_name=" in message
    assert "overwrite=true" in message
    assert snapshot(registry.runs_dir) == before


def test_other_rows_are_other_data_and_a_moved_folder_is_not(registry: Registry):
    data = {"train": "data-1"}
    published(registry)
    moved = CONFIG | {"data": {"columns": {}, "path": "/elsewhere/tiny"}}
    assert open_run(registry, "sft", "tiny", moved, {}, data=data).state == "finished"
    with pytest.raises(RegistryError) as caught:
        open_run(registry, "sft", "tiny", CONFIG, {}, data={"train": "data-2"})
    assert "data train: other rows (fingerprint data-1 -> data-2)" in str(caught.value)
    with pytest.raises(RegistryError, match="data test: other rows"):
        open_run(registry, "sft", "tiny", CONFIG, {}, data=data | {"test": "data-3"})


def test_changed_parent_is_named_as_stale(registry: Registry):
    sft = published(registry)
    published(registry, "rm/tiny", {"policy": sft})
    again = published(registry, overwrite=True, metrics={"eval/loss": 1.0})
    assert again.digest != sft.digest
    with pytest.raises(RegistryError, match=r"parent policy: sft/tiny .* stale") as caught:
        open_run(registry, "rm", "tiny", CONFIG, {"policy": again})
    assert sft.digest[:12] in str(caught.value)
    assert again.digest[:12] in str(caught.value)
    assert "seed" not in str(caught.value)
    assert open_run(registry, "rm", "tiny", CONFIG, {"policy": sft}).state == "finished"


def test_other_parent_is_named(registry: Registry):
    published(registry, "rm/tiny", {"policy": published(registry)})
    other = published(registry, "sft/other")
    with pytest.raises(RegistryError, match="parent policy: sft/tiny -> sft/other"):
        open_run(registry, "rm", "tiny", CONFIG, {"policy": other})
    with pytest.raises(RegistryError, match=r"parent policy: sft/tiny -> \(none\)"):
        open_run(registry, "rm", "tiny", CONFIG, {})


def test_overwrite_moves_a_finished_run_aside(registry: Registry):
    for metric in (1.0, 2.0, 3.0):
        published(registry, overwrite=True, metrics={"eval/loss": metric})
    assert registry.resolve("sft/tiny").manifest.metrics == {"eval/loss": 3.0}
    for number, metric in ((1, 1.0), (2, 2.0)):
        text = (registry.runs_dir / f".replaced/sft-tiny-{number}/manifest.json").read_bytes()
        old = manifests.unseal(manifests.Manifest, text, "manifest.json")
        assert old.metrics == {"eval/loss": metric}
    assert [run.reference for run in registry.runs()] == ["sft/tiny"]


def test_damaged_finished_run_is_never_written_over(registry: Registry):
    made = published(registry)
    (made.path / "manifest.json").write_text("{")
    with pytest.raises(RegistryError, match=r"manifest\.json: not a whole JSON.*overwrite=true"):
        open_run(registry, "sft", "tiny", CONFIG, {})
    with open_run(registry, "sft", "tiny", CONFIG, {}, overwrite=True) as run:
        assert run.state == "new"


# ---------------------------------------------------------------- the lock

HOLDER = """
import sys, time
from rlhf.registry import Registry
from rlhf.run import open_run
run = open_run(Registry(sys.argv[1]), "sft", "tiny", {"seed": 0}, {})
run.metrics_path.write_text("mine")
print("open", flush=True)
time.sleep(600)
"""

FORKING = HOLDER.replace(
    'print("open", flush=True)',
    """import os
if os.fork() == 0:
    print("open", flush=True)
    os.close(1)
    time.sleep(5)
    os._exit(0)
""",
)


@contextlib.contextmanager
def another_process(runs_dir: Path, code: str = HOLDER) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", textwrap.dedent(code), str(runs_dir)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(rlhf.__file__).parent.parent
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("overwrite", [False, True])
def test_second_process_is_refused_and_told_who_holds_the_run(registry: Registry, overwrite: bool):
    with another_process(registry.runs_dir) as holder:
        before = snapshot(registry.runs_dir)
        with pytest.raises(RegistryError, match=f"in use by process {holder.pid} on") as caught:
            open_run(registry, "sft", "tiny", {"seed": 0}, {}, overwrite=overwrite)
        assert "run_name=" in str(caught.value)
        assert snapshot(registry.runs_dir) == before
        open_run(registry, "sft", "other", {"seed": 0}, {}).close()


def test_lock_of_a_killed_process_is_free(registry: Registry):
    with another_process(registry.runs_dir) as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with open_run(registry, "sft", "tiny", {"seed": 0}, {}) as run:
            assert run.state == "new"
    assert (registry.runs_dir / ".replaced/sft-tiny-1/metrics.jsonl").read_text() == "mine"


def test_lock_is_not_inherited_by_a_forked_worker(registry: Registry):
    with another_process(registry.runs_dir, FORKING) as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        open_run(registry, "sft", "tiny", {"seed": 0}, {}).close()  # while the orphan sleeps


def test_closed_run_can_be_opened_again_in_the_same_process(registry: Registry):
    run = open_run(registry, "sft", "tiny", CONFIG, {})
    with pytest.raises(RegistryError, match=f"in use by process {os.getpid()} "):
        open_run(registry, "sft", "tiny", CONFIG, {})
    run.close()
    run.close()
    open_run(registry, "sft", "tiny", CONFIG, {}).close()


def test_run_published_while_waiting_at_the_door_is_finished(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
):
    lock = Run._lock

    def publish_then_lock(run: Run) -> None:
        monkeypatch.setattr(Run, "_lock", lock)
        published(registry)
        lock(run)

    monkeypatch.setattr(Run, "_lock", publish_then_lock)
    with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
        assert run.state == "finished"
        with pytest.raises(RegistryError, match="not open for writing"):
            run.publish(**facts())
    assert registry.verify("sft/tiny") == []


# ---------------------------------------------------------------- publishing


def test_manifest_records_everything(registry: Registry):
    sft = published(registry)
    with open_run(
        registry,
        "rm",
        "tiny",
        CONFIG,
        {"policy": sft},
        config_text="seed: 0\n",
        command=["rm.py", "seed=0"],
    ) as run:
        fill(run)
        given = facts(metrics={"eval/loss": 1.25, "eval/margin": float("nan")}, model_is="best")
        given["environment"]["host_memory_gb"] = 8
        made = run.publish(**given)
    assert (made.schema, made.reference, made.model_is) == (3, "rm/tiny", "best")
    assert made.package_version == rlhf.__version__
    assert made.created.endswith("+00:00")
    assert made.created <= made.finished
    assert made.command == ["rm.py", "seed=0"]
    assert made.config["train.learning_rate"] == 1e-4
    assert made.config["tracking.mode"] == "off"
    assert made.config_hash == config_hash(CONFIG)
    parent = made.parents[0]
    assert (parent.role, parent.reference, parent.digest) == ("policy", "sft/tiny", sft.digest)
    assert made.base.fingerprint == "base-1"
    assert made.tokenizer.eos_id == 2
    assert made.method.name == "lora"
    assert made.method.adapter_chain == ["sft/tiny"]
    assert made.method.settings == {"rank": 16}
    assert (made.data[0].rows, made.data[0].dropped) == (90, {"empty answer": 10})
    assert made.metrics == {"eval/loss": 1.25, "eval/margin": None}
    assert made.golden == {"file": "model/golden.json", "tolerance": 1e-4}
    assert made.environment.zero_stage == 2
    assert made.environment.libraries["python"] == ".".join(map(str, sys.version_info[:3]))
    assert made.environment.other == {"host_memory_gb": 8}
    assert made.phases["train"].seconds == 12.5
    assert sorted(made.files) == [
        "config.yaml",
        "metrics.jsonl",
        "model/golden.json",
        "model/model.safetensors",
        "model/tokenizer/tokenizer.json",
        "samples.jsonl",
    ]
    weights = made.files["model/model.safetensors"]
    assert weights.sha256 == hashlib.sha256(b"weights of rm/tiny").hexdigest()
    assert weights.size == len(b"weights of rm/tiny")


def test_digest_of_a_run_is_the_sha256_of_its_manifest(registry: Registry):
    made = published(registry)
    assert made.digest == hashlib.sha256((made.path / "manifest.json").read_bytes()).hexdigest()
    assert made.model_dir == made.path / "model"
    assert (made.reference, made.stage, made.run_name) == ("sft/tiny", "sft", "tiny")


@pytest.mark.parametrize(
    "broken",
    [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()],
)
def test_publishing_that_fails_at_the_last_rename_leaves_the_run_unfinished(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, broken: BaseException
):
    published(registry, "sft/earlier")

    def crash(source: Any, target: Any) -> None:
        raise broken

    with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
        fill(run)
        save(run, 10)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", crash)
            with pytest.raises((RegistryError, KeyboardInterrupt)) as e:
                run.publish(**facts())
    if isinstance(broken, OSError):
        assert "sft/tiny: not published" in str(e.value)
        assert "No space left on device" in str(e.value)
    assert [p.name for p in run.path.glob("manifest*")] == []
    with pytest.raises(RegistryError, match="sft/tiny: unfinished"):
        registry.resolve("sft/tiny")
    assert registry.verify("sft/earlier") == []
    with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
        assert run.state == "resume"


def test_manifest_is_the_last_file_and_on_disk_before_its_name(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
):
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        events.append("fsync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def record_replace(source: Any, target: Any) -> None:
        events.append(f"rename {Path(target).name}")
        replace(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("names of open files are read from /proc")
    with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
        fill(run)
        monkeypatch.setattr(os, "fsync", record_fsync)
        monkeypatch.setattr(os, "replace", record_replace)
        run.publish(**facts())
    assert events[-3:] == ["fsync manifest.json.tmp", "rename manifest.json", "fsync tiny"]
    earlier = {"config.yaml", "metrics.jsonl", "samples.jsonl", "model.safetensors", "golden.json"}
    assert {f"fsync {name}" for name in earlier | {"model", "tokenizer"}} <= set(events[:-3])


def killed_while_publishing(registry: Registry, after: int) -> bool:
    """Publish in a child that is killed as it opens or renames its `after`-th file."""
    child = os.fork()
    if child == 0:
        try:
            run = open_run(registry, "sft", "tiny", CONFIG, {})
            fill(run)
            left = after

            def die(event: str, _: object) -> None:
                nonlocal left
                if event in ("open", "os.rename"):
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(die)
            environment = facts()["environment"] | {"libraries": {}}
            run.publish(**facts(environment=environment))
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_publisher_killed_at_any_file_leaves_no_manifest_or_a_sound_one(tmp_path: Path):
    states = []
    for after in range(100):
        registry = Registry(tmp_path / str(after))
        killed = killed_while_publishing(registry, after)
        states.append(registry.runs()[0].state)
        if states[-1] == "finished":
            assert registry.verify("sft/tiny") == []
        else:
            with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
                assert run.state == "new"
        if not killed:
            break
    assert not killed
    assert len(states) > 10
    assert states == sorted(states, reverse=True)
    assert set(states) == {"unfinished", "finished"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": TokenizerFacts("t", "c", None, 1)}, r"tokenizer\.pad_id: expected int, fou"),  # type: ignore[arg-type]
        ({"base": BaseModel("b", None, None)}, r"base\.fingerprint: expected str, found None"),  # type: ignore[arg-type]
        ({"method": {"rank": 1}}, r"method\.name: missing"),
        ({"environment": {"seed": 0}}, r"environment\.world_size: missing"),
        ({"golden": {"file": "eval/golden.json"}}, r"golden\.file=eval/golden\.json"),
    ],
)
def test_missing_facts_are_named_and_nothing_is_published(
    registry: Registry, change: dict[str, Any], message: str
):
    with pytest.raises(RegistryError, match=message):
        published(registry, **change)
    assert registry.runs()[0].state == "unfinished"


def test_numbers_of_other_libraries_are_recorded_as_plain_ones(registry: Registry):
    numpy = pytest.importorskip("numpy")
    made = published(
        registry,
        metrics={"eval/loss": numpy.float32(0.5)},
        tokenizer=TokenizerFacts("t", "c", numpy.int64(0), numpy.int64(2)),
    )
    assert made.manifest.metrics == {"eval/loss": 0.5}
    assert made.manifest.tokenizer.eos_id == 2


def test_empty_model_is_not_published(registry: Registry):
    with (
        open_run(registry, "sft", "tiny", CONFIG, {}) as run,
        pytest.raises(RegistryError, match="model/ is empty"),
    ):
        run.publish(**facts())


@pytest.mark.parametrize("name", ["training_args.bin", "deep/optimizer.PT", "x.pkl"])
def test_pickles_are_not_published(registry: Registry, name: str):
    with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
        fill(run)
        (run.model_dir / name).parent.mkdir(exist_ok=True)
        (run.model_dir / name).write_bytes(b"")
        with pytest.raises(RegistryError, match=f"{name}: a pickle can run code"):
            run.publish(**facts())
    assert registry.runs()[0].state == "unfinished"


@pytest.mark.parametrize("target", ["weights", "folder"])
def test_links_are_not_published(registry: Registry, tmp_path: Path, target: str):
    (tmp_path / "weights").write_bytes(b"elsewhere")
    (tmp_path / "folder").mkdir()
    with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
        fill(run)
        (run.model_dir / "more").symlink_to(tmp_path / target)
        with pytest.raises(RegistryError, match=r"model/more: is a link"):
            run.publish(**facts())
    assert registry.runs()[0].state == "unfinished"


def test_git_commit_is_of_this_checkout_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "checkout" / "rlhf"
    package.mkdir(parents=True)
    monkeypatch.setattr(rlhf, "__file__", str(package / "__init__.py"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    assert manifests.git_commit() is None  # a repository around an installed package is not ours
    monkeypatch.setattr(rlhf, "__file__", str(tmp_path / "rlhf" / "__init__.py"))
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert manifests.git_commit() == head.stdout.strip()


# ---------------------------------------------------------------- checkpoints


def test_newest_checkpoints_and_the_best_are_kept(registry: Registry):
    with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
        for step in (5, 10, 15, 20, 25):
            save(run, step, best=step in (5, 10))
        kept = sorted(path.name for path in run.checkpoints_dir.iterdir())
    assert kept == ["step-000010", "step-000020", "step-000025"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failed_checkpoint_leaves_nothing(registry: Registry, error: type[BaseException]):
    def fail(run: Run) -> None:
        with run.checkpoint(20) as folder:
            (folder / "optimizer.pt").write_bytes(b"half")
            raise error

    with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
        save(run, 10)
        with pytest.raises(error):
            fail(run)
        assert [path.name for path in run.checkpoints_dir.iterdir()] == ["step-000010"]


def test_reference_can_mean_a_checkpoint(registry: Registry):
    with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
        fill(run)
        save(run, 10, best=True)
        save(run, 20)
        with run.checkpoint(30) as folder:
            (folder / "optimizer.pt").write_bytes(b"no model")
        run.publish(**facts(), model_is="last")
    bare = registry.resolve("sft/tiny")
    assert registry.resolve("sft/tiny@last") == bare  # model/ is the last
    best = registry.resolve("sft/tiny@best")
    assert best.reference == "sft/tiny@step-000010"
    assert (best.model_dir / "model.safetensors").read_bytes() == b"step 10"
    assert best.digest != bare.digest
    assert registry.verify("sft/tiny@best") == []
    flip(best.model_dir / "model.safetensors", 0)
    assert registry.verify("sft/tiny") == []
    assert (
        "checkpoints/step-000010/model/model.safetensors: sha256"
        in registry.verify("sft/tiny@step-10")[0]
    )
    with pytest.raises(RegistryError, match=r"no model/ to load\. Use sft/tiny"):
        registry.resolve("sft/tiny@step-30")
    with pytest.raises(
        RegistryError, match=r"There are: sft/tiny, sft/tiny@best, sft/tiny@last, .*step-000030"
    ):
        registry.resolve("sft/tiny@step-40")


# ---------------------------------------------------------------- looking runs up


def test_missing_run_lists_what_exists_and_how_to_make_it(registry: Registry):
    with pytest.raises(RegistryError, match=r"Finished sft runs: none\. `make sft RUN=tiny`"):
        registry.resolve("sft/tiny")
    for name in ("sft/b", "sft/a", "rm/c"):
        published(registry, name)
    with open_run(registry, "sft", "half", CONFIG, {}) as run:
        run.metrics_path.write_text("{}")
    with pytest.raises(RegistryError, match=r"sft/tiny: no such run.* runs: sft/a, sft/b\. `make"):
        registry.resolve("sft/tiny")
    with pytest.raises(RegistryError, match=r"sft/half: unfinished.*`make sft RUN=half`"):
        registry.resolve("sft/half")


def test_missing_run_among_many_lists_the_first_twenty(registry: Registry):
    for number in range(23):
        folder = registry.runs_dir / "sft" / f"run{number:02}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    with pytest.raises(RegistryError, match=r"sft/run19 and 3 more \(rlhf ls --stage sft\)"):
        registry.resolve("sft/tiny")


def test_runs_lists_finished_unfinished_and_damaged(registry: Registry):
    assert registry.runs() == []
    published(registry, "rm/good", {"policy": published(registry)})
    bad = published(registry, "sft/bad")
    (bad.path / "manifest.json").write_text("{}")
    interrupted_run = open_run(registry, "ppo", "tiny", CONFIG, {})
    (registry.runs_dir / "sft" / "stray file").touch()
    found = [(run.reference, run.state) for run in registry.runs()]
    assert found == [
        ("sft/bad", "damaged"),
        ("sft/tiny", "finished"),
        ("rm/good", "finished"),
        ("ppo/tiny", "unfinished"),
    ]
    assert [run.reference for run in registry.runs("rm")] == ["rm/good"]
    assert registry.runs()[1].manifest == registry.resolve("sft/tiny").manifest
    assert "schema: found None" in (registry.runs()[0].problem or "")
    with pytest.raises(RegistryError, match="there is sft, rm, ppo"):
        registry.runs("dpo")
    interrupted_run.close()


@pytest.fixture
def read_only_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that writes fails as on a read-only mount (also for root, whom chmod lets by)."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system", str(args[0]))

    for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "utime", "truncate", "symlink"):
        monkeypatch.setattr(os, name, refuse)
    opened = os.open

    def open_to_read(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse(path)
        return opened(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_to_read)


def test_registry_on_a_read_only_disk_can_be_read(
    registry: Registry, request: pytest.FixtureRequest
):
    made = published(registry, "rm/tiny", {"policy": published(registry)})
    before = snapshot(registry.runs_dir)
    request.getfixturevalue("read_only_disk")
    for path in [registry.runs_dir, *registry.runs_dir.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert registry.resolve("rm/tiny") == made
    assert registry.verify("rm/tiny") == []
    assert len(registry.runs()) == 2
    assert open_run(registry, "sft", "tiny", CONFIG, {}).state == "finished"
    with pytest.raises(RegistryError, match=r"cannot be written: .*Read-only.*runs_dir="):
        open_run(registry, "sft", "new", CONFIG, {})
    for path in [registry.runs_dir, *registry.runs_dir.rglob("*")]:
        path.chmod(0o755)
    assert snapshot(registry.runs_dir) == before


def test_unwritable_runs_folder_is_refused_with_nothing_half_made(tmp_path: Path):
    (tmp_path / "file").write_text("a regular file")
    runs_dir = tmp_path / "file" / "runs"
    before = snapshot(tmp_path)
    with pytest.raises(RegistryError, match=r"cannot be written.*Set runs_dir=") as caught:
        open_run(Registry(runs_dir), "sft", "tiny", CONFIG, {})
    assert f"runs_dir={runs_dir}:" in str(caught.value)
    with pytest.raises(RegistryError, match="no such run"):
        Registry(runs_dir).resolve("sft/tiny")
    assert snapshot(tmp_path) == before


def test_full_disk_on_the_way_in_leaves_no_run(registry: Registry, monkeypatch: pytest.MonkeyPatch):
    def full(*args: Any, **kwargs: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(RegistryError, match="No space left on device"):
            open_run(registry, "sft", "tiny", CONFIG, {})
    assert not (registry.runs_dir / "sft").exists()
    open_run(registry, "sft", "tiny", CONFIG, {}).close()  # and the lock is free


# ---------------------------------------------------------------- damage


IMMUTABLE = ["config.yaml", "metrics.jsonl", "samples.jsonl", "model/model.safetensors"]
IMMUTABLE += ["model/golden.json", "model/tokenizer/tokenizer.json", "manifest.json"]


@pytest.mark.parametrize("name", IMMUTABLE)
def test_any_flipped_byte_of_an_immutable_file_is_found(registry: Registry, name: str):
    made = published(registry)
    file = made.path / name
    sound = file.read_bytes()
    places = random.Random(0).sample(range(len(sound)), min(len(sound), 40))
    for place in places:
        flip(file, place)
        problems = registry.verify("sft/tiny")
        assert problems, f"byte {place} of {name} was flipped and nobody noticed"
        assert any(name in problem for problem in problems)
        file.write_bytes(sound)
    assert registry.verify("sft/tiny") == []


def test_manifest_with_other_white_space_is_found(registry: Registry):
    made = published(registry)
    file = made.path / "manifest.json"
    file.write_text(file.read_text().replace("\n ", "\n\t", 1))
    assert "self_digest: the file was changed" in registry.verify("sft/tiny")[0]


def test_manifest_cut_in_half_is_found(registry: Registry):
    file = published(registry).path / "manifest.json"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(RegistryError, match=r"sft/tiny/manifest\.json: not a whole JSON"):
        registry.resolve("sft/tiny")


@pytest.mark.parametrize("name", IMMUTABLE[:-1])
def test_missing_and_resized_files_are_found_before_loading(registry: Registry, name: str):
    file = published(registry).path / name
    content = file.read_bytes()
    file.write_bytes(content + b"x")
    with pytest.raises(RegistryError, match=f"{name}: has {len(content) + 1} bytes"):
        registry.resolve("sft/tiny")
    file.unlink()
    with pytest.raises(RegistryError, match=f"{name}: missing"):
        registry.resolve("sft/tiny")
    assert f"{name}: missing" in registry.verify("sft/tiny")


def test_added_file_in_the_model_is_found(registry: Registry):
    made = published(registry)
    (made.model_dir / "modeling_x.py").write_text("print('boo')")
    assert registry.verify("sft/tiny") == ["model/modeling_x.py: not in the manifest"]
    with pytest.raises(RegistryError, match="modeling_x"):
        registry.resolve("sft/tiny")


def test_what_may_change_later_is_not_verified(registry: Registry):
    made = published(registry)
    (made.path / "report.html").write_text("<html>")
    (made.path / "log.txt").write_text("more")
    (made.path / "eval").mkdir()
    (made.path / "eval" / "new.json").write_text("{}")
    assert registry.verify("sft/tiny") == []


def test_changed_and_deleted_parents_are_found(registry: Registry):
    sft = published(registry)
    published(registry, "rm/tiny", {"policy": sft})
    assert registry.verify("rm/tiny") == []
    again = published(registry, overwrite=True)
    problem = "parent policy sft/tiny: is not what this run started from"
    if again.digest != sft.digest:  # published within one second, both may be alike
        assert registry.verify("rm/tiny")[0].startswith(problem)
    again = published(registry, overwrite=True, metrics={"eval/loss": 9.0})
    assert registry.verify("rm/tiny")[0].startswith(problem)
    os.rename(again.path, registry.runs_dir / "gone")
    assert "parent policy sft/tiny: sft/tiny: no such run" in registry.verify("rm/tiny")[0]


def test_verify_of_a_missing_or_unfinished_run_is_refused(registry: Registry):
    with pytest.raises(RegistryError, match="no such run"):
        registry.verify("sft/tiny")
    interrupted(registry, 10)
    with pytest.raises(RegistryError, match="unfinished"):
        registry.verify("sft/tiny")


def test_run_moved_to_another_name_is_refused(registry: Registry):
    made = published(registry)
    os.rename(made.path, made.path.with_name("better"))
    with pytest.raises(RegistryError, match="reference: it is the manifest of sft/tiny"):
        registry.resolve("sft/better")


# ---------------------------------------------------------------- a manifest that was tampered with


def forge(made: Published, change: Any) -> None:
    """Change a manifest and give it the digest that fits, as an attacker or a stray tool would."""
    file = made.path / "manifest.json"
    fields = json.loads(file.read_text())
    change(fields)
    fields["self_digest"] = ""
    text = json.dumps(fields, indent=1) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    file.write_text(json.dumps(fields | {"self_digest": digest}, indent=1) + "\n")


def test_forged_manifest_without_a_change_is_accepted(registry: Registry):
    made = published(registry)
    forge(made, lambda fields: None)
    assert registry.resolve("sft/tiny") == made


@pytest.mark.parametrize(
    "name",
    [
        "../../sft/other/model/model.safetensors",
        "model/../../../secret",
        "/etc/passwd",
        "model//etc",
        "model/./x",
        "model/",
        "",
        "model/..\\x",
        "checkpoints/step-000010/manifest.json",
        "eval/scores.json",
        "model/pytorch_model.bin",
    ],
)
def test_file_names_cannot_leave_the_run(registry: Registry, name: str):
    made = published(registry)
    file = {"size": 1, "sha256": "0" * 64}
    forge(made, lambda fields: fields["files"].update({name: file}))
    with pytest.raises(RegistryError, match=r"sft/tiny/manifest\.json: files\.") as caught:
        registry.resolve("sft/tiny")
    assert f"files.{name}" in str(caught.value)
    assert registry.verify("sft/tiny") == [str(caught.value)]
    assert registry.runs()[0].state == "damaged"


@pytest.mark.parametrize("linked", ["model/model.safetensors", "model/tokenizer", "model"])
def test_links_out_of_the_run_are_refused(registry: Registry, tmp_path: Path, linked: str):
    made = published(registry)
    os.rename(made.path / linked, tmp_path / "elsewhere")  # the same bytes, in another place
    (made.path / linked).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RegistryError, match=f"{linked}.*: is a link"):
        registry.resolve("sft/tiny")
    assert any("is a link" in problem for problem in registry.verify("sft/tiny"))


def test_linked_manifest_and_linked_run_are_refused(registry: Registry, tmp_path: Path):
    made = published(registry)
    os.rename(made.path / "manifest.json", tmp_path / "manifest.json")
    (made.path / "manifest.json").symlink_to(tmp_path / "manifest.json")
    with pytest.raises(RegistryError, match=r"manifest\.json: is a link"):
        registry.resolve("sft/tiny")
    outside = published(Registry(tmp_path / "other"))
    (registry.runs_dir / "rm").mkdir()
    (registry.runs_dir / "rm" / "tiny").symlink_to(outside.path.resolve())
    for call in (registry.resolve, registry.verify):
        with pytest.raises(RegistryError, match="leads out of the registry"):
            call("rm/tiny")
    with pytest.raises(RegistryError, match="leads out of the registry"):
        open_run(registry, "rm", "tiny", CONFIG, {}, overwrite=True)


def test_whole_registry_behind_a_link_is_fine(registry: Registry, tmp_path: Path):
    published(registry)
    (tmp_path / "link").symlink_to(registry.runs_dir)
    assert Registry(tmp_path / "link").verify("sft/tiny") == []


def fields_of(kind: Any) -> list[str]:
    """Those that every manifest has."""
    known = kind.__dataclass_fields__.items()
    own = ("schema", "self_digest")
    return [name for name, f in known if name not in own and not f.metadata.get("optional")]


def test_a_manifest_without_a_card_is_what_it_was_before_there_were_cards(registry: Registry):
    made = published(registry)
    assert made.manifest.card is None
    assert "card" not in json.loads((made.path / "manifest.json").read_text())


def test_a_card_stands_in_the_manifest_and_is_checked(registry: Registry):
    verdict = CardFacts("caution", ["one", "two"])
    made = published(registry, card=verdict)
    assert registry.resolve("sft/tiny").manifest.card == verdict
    for wrong, message in (
        ({"verdict": "maybe", "reasons": []}, "card.verdict: expected go, caution or no-go"),
        ({"verdict": "go"}, "card.reasons: missing"),
        ({"verdict": "go", "reasons": [1]}, r"card.reasons\[0\]: expected str, found 1"),
        (7, "card: expected an object, found 7"),
    ):
        forge(made, lambda fields, wrong=wrong: fields.update(card=wrong))
        with pytest.raises(RegistryError, match=rf"manifest\.json: {message}"):
            registry.resolve("sft/tiny")


def test_a_manifest_of_before_a_field_was_added_is_read(registry: Registry):
    made = published(registry)
    forge(made, lambda fields: fields.pop("warnings", None))
    assert registry.resolve("sft/tiny").manifest.warnings == []
    forge(made, lambda fields: fields.update(warnings=["length: up"]))
    assert registry.resolve("sft/tiny").manifest.warnings == ["length: up"]
    forge(made, lambda fields: fields.update(warnings="length"))
    with pytest.raises(RegistryError, match=r"warnings: expected list, found 'length'"):
        registry.resolve("sft/tiny")


@pytest.mark.parametrize("name", [n for n in fields_of(manifests.Manifest) if n != "warnings"])
def test_every_missing_or_wrongly_typed_field_is_named(registry: Registry, name: str):
    made = published(registry)
    sound = (made.path / "manifest.json").read_bytes()
    forge(made, lambda fields: fields.pop(name))
    with pytest.raises(RegistryError, match=rf"manifest\.json: {name}: missing"):
        registry.resolve("sft/tiny")
    (made.path / "manifest.json").write_bytes(sound)
    forge(made, lambda fields: fields.update({name: 7}))
    with pytest.raises(RegistryError, match=rf"manifest\.json: {name}: expected .*found 7"):
        registry.resolve("sft/tiny")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("tokenizer.eos_id", True, "tokenizer.eos_id: expected int, found True"),
        ("tokenizer.eos_id", 2.0, "tokenizer.eos_id: expected int, found 2.0"),
        ("environment.libraries", {"torch": 2}, "environment.libraries.torch: expected str"),
        ("parents", [{"role": "policy"}], "parents[0].reference: missing"),
        ("files.config.yaml", {"size": "8"}, "files.config.yaml.size: expected int, found '8'"),
        ("metrics", {"eval/loss": "low"}, "metrics.eval/loss: expected number, found 'low'"),
        ("data", [1], "data[0]: expected an object, found 1"),
        ("surprise", 1, "surprise: no such field in schema 3"),
        ("model_is", "newest", "model_is: expected best or last, found 'newest'"),
    ],
)
def test_wrong_values_deep_inside_are_named(
    registry: Registry, path: str, value: Any, message: str
):
    def change(fields: dict[str, Any]) -> None:
        group, _, rest = path.partition(".")
        if rest:
            fields[group] = fields[group] | {rest: value}
            if path == "files.config.yaml":
                fields[group][rest]["sha256"] = "0"
        else:
            fields[group] = value

    forge(published(registry), change)
    with pytest.raises(RegistryError) as caught:
        registry.resolve("sft/tiny")
    assert f"manifest.json: {message}" in str(caught.value)


@pytest.mark.parametrize("schema", [1, 2, 4, "3", True, None])
def test_other_schema_is_named_before_anything_else(registry: Registry, schema: object):
    made = published(registry)
    text = json.dumps({"schema": schema, "what else": "nobody knows"})
    (made.path / "manifest.json").write_text(text)
    with pytest.raises(RegistryError, match=rf"manifest\.json: schema: found {schema!r}, but"):
        registry.resolve("sft/tiny")


@pytest.mark.parametrize("text", ["[]", "null", "{", "", "\0", "NaN", "[" * 100_000, "\udcff"])
def test_whatever_stands_in_a_manifest_it_is_one_clear_error(registry: Registry, text: str):
    made = published(registry)
    (made.path / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(RegistryError, match=r"sft/tiny/manifest\.json: "):
        registry.resolve("sft/tiny")


# ---------------------------------------------------------------- what this module imports


def test_registry_imports_nothing_heavy():
    code = "import rlhf.registry, rlhf.cli, sys; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "transformers", "pydantic", "hydra", "omegaconf", "numpy"}
