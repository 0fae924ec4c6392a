"""Many publish at once, a process is killed, the disk is full: what is left is never half a run.

tests/test_registry.py has the faults of one manifest and of one publisher; here are those of a
whole run, from its opening through its checkpoints to its publication.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import errno
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_registry import (
    CONFIG,
    facts,
    fill,
    flip,
    no_waiting_for_the_disk,
    published,
    save,
)

from rlhf import cli, locks, manifest, parts
from rlhf import run as runs
from rlhf.errors import RegistryError
from rlhf.manifest import checkpoint_folders, checkpoint_problems, load_checkpoint
from rlhf.registry import STAGES, Published, Registry
from rlhf.run import Run, open_run

__all__ = ["no_waiting_for_the_disk"]  # a fixture: a killed process loses nothing it has written

TESTS = Path(__file__).resolve().parent
FACTS = facts(environment=facts()["environment"] | {"libraries": {}})  # looking them up takes time
STEPS = 3


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "runs")


@pytest.fixture
def rlhf_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`rlhf ...` on a registry: exit code, and all it said."""

    def run(registry: Registry, *arguments: str) -> tuple[int, str]:
        argv = ["rlhf", *arguments, "--runs-dir", str(registry.runs_dir)]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out + captured.err

    return run


def live(registry: Registry) -> Run:
    """sft/tiny from where it stands to its end: checkpoints, of which one is kept; publication."""
    opened = open_run(registry, "sft", "tiny", CONFIG, {})
    with opened as run, run.writing("its files are"):  # as the stages do
        if run.state != "finished":
            done = run.latest.step if run.latest is not None else 0
            for step in range(done + 1, STEPS + 1):
                save(run, step, keep=1)
            fill(run)
            run.publish(**FACTS)
    return run


def complete_checkpoints(registry: Registry) -> list[int]:
    """Steps of the checkpoints of sft/tiny in which every byte is there."""
    steps = []
    for folder in checkpoint_folders(registry.runs_dir / "sft/tiny/checkpoints"):
        with contextlib.suppress(RegistryError):
            checkpoint = load_checkpoint(folder)
            if not checkpoint_problems(checkpoint, contents=True):
                steps.append(checkpoint.step)
    return steps


def check_what_is_left(registry: Registry) -> str:
    """After any end of `live`: nothing half-made is taken for whole, and it can go on to its end.

    Returns:
        "finished", or the state in which the same command goes on: "resume" or "new".
    """
    states = {info.reference: info.state for info in registry.runs("sft")}
    assert set(states) <= {"sft/tiny"}
    assert set(states.values()) <= {"finished", "unfinished"}
    complete = complete_checkpoints(registry)
    # The lock is free: at once, or as soon as a `git` that the killed process was just starting
    # has closed what it was born with.
    deadline = time.monotonic() + 5
    while locks.holder(registry.runs_dir, "sft/tiny") and time.monotonic() < deadline:
        time.sleep(0.01)
    with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
        state = run.state
        if states.get("sft/tiny") == "finished":
            assert state == "finished"
        else:
            assert state == ("resume" if complete else "new")
            assert run.latest is None or run.latest.step == complete[-1]
            assert not list(run.path.glob("checkpoints/.*")), "leftovers"
    live(registry)
    assert registry.verify("sft/tiny") == []
    assert complete_checkpoints(registry)[-1:] == [STEPS]
    return state


def in_a_child(work: Callable[[], object]) -> int:
    """Start `work` in a forked process; its id. It ends with 0, or 1 where `work` raised."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


# ---------------------------------------------------------------- many at once


def publish_many(runs_dir: str, publisher: int, count: int) -> None:
    """What one of many processes does: wait for the start, then publish one run after another."""
    registry = Registry(runs_dir)
    draw = random.Random(publisher)
    last: dict[str, Published] = {}
    print("ready", flush=True)
    sys.stdin.readline()
    for n in range(count):
        stage = STAGES[n % 3]
        parents = {"rm": {"policy": "sft"}, "ppo": {"policy": "sft", "reward_model": "rm"}}
        given = {role: last[of] for role, of in parents.get(stage, {}).items()}
        with open_run(registry, stage, f"p{publisher}-{n}", CONFIG, given) as run:
            fill(run)
            for size in (1, 5_000, 60_000):
                (run.model_dir / f"part-{size}.safetensors").write_bytes(draw.randbytes(size))
            run.publish(**FACTS)
        last[stage] = registry.resolve(run.reference)


@pytest.mark.parametrize(("publishers", "count"), [(4, 20)])
def test_many_processes_publish_at_once_and_every_run_is_whole(
    registry: Registry, rlhf_command, publishers: int, count: int
):
    code = "import sys, test_faults as t; t.publish_many(sys.argv[1], int(sys.argv[2]), {})"
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code.format(count), str(registry.runs_dir), str(publisher)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        for publisher in range(publishers)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    looks = 0
    while any(process.poll() is None for process in started):
        seen = registry.runs()  # a reader in the midst of it
        assert {info.state for info in seen} <= {"finished", "unfinished"}
        looks += 1
    for process in started:
        assert process.wait() == 0
        process.communicate()
    assert looks > 1
    total = publishers * count
    assert Counter(info.state for info in registry.runs()) == {"finished": total}
    for info in registry.runs():
        assert registry.verify(info.reference) == []
    assert not list(registry.runs_dir.rglob("*.tmp"))
    code, said = rlhf_command(registry, "ls")
    assert code == 0
    assert said.count(" finished ") == total + 1  # the header has it too
    code, said = rlhf_command(registry, "ls", "--json")
    assert len(json.loads(said)) == total


@pytest.mark.parametrize("times", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_of_two_publishers_on_one_name_one_publishes(tmp_path: Path, times: int):
    def compete(registry: Registry, gate: int) -> None:
        os.read(gate, 1)
        try:
            with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
                if run.state == "finished":
                    os._exit(10)
                fill(run)
                run.publish(**FACTS)
        except RegistryError as error:
            os._exit(11 if "sft/tiny: in use by " in str(error) else 1)

    for n in range(times):
        registry = Registry(tmp_path / str(n))
        gate, release = os.pipe()
        children = [in_a_child(lambda r=registry, g=gate: compete(r, g)) for _ in range(2)]
        os.write(release, b"gg")
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children)
        os.close(gate)
        os.close(release)
        assert codes in ([0, 10], [0, 11])
        assert registry.verify("sft/tiny") == []
        assert not (registry.runs_dir / ".replaced").exists(), "one swept the other's files away"


# ---------------------------------------------------------------- killed

BOUNDARIES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
BOUNDARIES |= {"fcntl.flock", "subprocess.Popen"}


def die_at(boundary: int) -> None:
    """Arm this process to be killed as it comes to a call that changes the disk or opens a file."""
    left = boundary
    fsync = os.fsync

    def count() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted_fsync(descriptor: int) -> None:
        count()
        fsync(descriptor)
        count()

    os.fsync = counted_fsync
    runs.git_commit = lambda: None  # a process of its own; it writes nothing
    sys.addaudithook(lambda event, _: count() if event in BOUNDARIES else None)


def test_a_run_killed_at_any_call_is_finished_or_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """From opening to publishing, through three checkpoints and the removal of two of them."""
    monkeypatch.setattr(runs, "git_commit", lambda: None)
    states = []
    for boundary in range(2_000):
        registry = Registry(tmp_path / str(boundary))
        child = in_a_child(lambda at=boundary, r=registry: (die_at(at), live(r)))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            break
        assert code == -signal.SIGKILL
        try:
            states.append(check_what_is_left(registry))
        except Exception as error:
            raise AssertionError(f"killed at call {boundary}: {error}") from error
        shutil.rmtree(registry.runs_dir)
    assert code == 0
    assert len(states) > 100
    order = [state for n, state in enumerate(states) if states[n - 1 : n] != [state]]
    assert order == ["new", "resume", "finished"]


@pytest.mark.parametrize("nth", range(STEPS + 1))
def test_a_process_killed_in_the_middle_of_writing_a_manifest(registry: Registry, nth: int):
    """Of each checkpoint, and of the run: half a manifest is none."""

    def die_half_way() -> None:
        left = nth

        def half(path: Path, mode: str = "r", **options: Any) -> Any:
            nonlocal left
            file = builtins.open(path, mode, **options)  # noqa: SIM115
            if mode == "w":
                left -= 1
                if left < 0:
                    write = file.write

                    def cut(text: str) -> None:
                        write(text[: len(text) // 2])
                        file.flush()
                        os.kill(os.getpid(), signal.SIGKILL)

                    file.write = cut
            return file

        manifest.open = half  # type: ignore[attr-defined]
        live(registry)

    child = in_a_child(die_half_way)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (half,) = registry.runs_dir.rglob("manifest.json.tmp")
    assert half.stat().st_size > 100
    assert check_what_is_left(registry) == ("resume" if nth else "new")


@pytest.mark.parametrize("times", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_is_finished_or_goes_on(tmp_path: Path, times: int):
    durations = []
    for n in range(5):
        registry = Registry(tmp_path / f"whole-{n}")
        started = time.perf_counter()
        child = in_a_child(lambda r=registry: live(r))
        assert os.waitpid(child, 0)[1] == 0
        durations.append(time.perf_counter() - started)
    reach = min(durations)  # of the delays; a busy machine sleeps longer than it is told
    draw = random.Random(0)
    killed = attempts = 0
    states: Counter[str] = Counter()
    while killed < times and attempts < 10 * times:
        attempts += 1
        registry = Registry(tmp_path / str(attempts))
        child = in_a_child(lambda r=registry: live(r))
        time.sleep(draw.random() * reach)
        os.kill(child, signal.SIGKILL)
        hit = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        reach *= 1.05 if hit else 0.9  # so that every part of its life is met, and most tries count
        if hit:
            killed += 1
            states[check_what_is_left(registry)] += 1
        shutil.rmtree(registry.runs_dir, ignore_errors=True)  # not there, if killed before that
    print(f"killed {killed} times in {attempts} attempts: {dict(states)}")
    assert killed == times


def test_a_checkpoint_that_was_half_removed_does_not_stop_the_next_one(registry: Registry):
    """Killed while superseded checkpoints were removed: one of them has no manifest any more."""
    with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
        save(run, 1)
        save(run, 2)
    (registry.runs_dir / "sft/tiny/checkpoints/step-000001/manifest.json").unlink()
    assert check_what_is_left(registry) == "resume"


def test_a_damaged_checkpoint_that_was_passed_over_does_not_stop_the_next_one(registry: Registry):
    """The run goes on from step 1, and is asked to stop before it comes to step 3 again."""
    with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
        save(run, 1)
        save(run, 3)
    flip(registry.runs_dir / "sft/tiny/checkpoints/step-000003/manifest.json", 30)
    with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
        assert run.latest is not None
        assert run.latest.step == 1
        save(run, 2)
    with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
        assert run.latest is not None
        assert run.latest.step == 2


def test_a_checkpoint_is_on_disk_before_it_has_its_name(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
):
    """What a power cut would take: a name must not come before what it stands for."""
    synced: list[int] = []
    named: dict[str, list[int]] = {}
    replace = os.replace

    def record(source: Path, target: Path) -> None:
        named[Path(target).name] = list(synced)
        replace(source, target)

    with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
        monkeypatch.setattr(
            os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino)
        )
        monkeypatch.setattr(os, "replace", record)
        save(run, 1)
    checkpoint = run.checkpoints_dir / "step-000001"
    files = {path.stat().st_ino for path in checkpoint.rglob("*") if path.name != "manifest.json"}
    assert files | {checkpoint.stat().st_ino} <= set(named["manifest.json"])
    assert (checkpoint / "manifest.json").stat().st_ino in named["step-000001"]
    assert named["step-000001"][-1] == checkpoint.stat().st_ino
    assert synced[-1] == run.checkpoints_dir.stat().st_ino


# ---------------------------------------------------------------- no room on the disk


def content(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refuse_from(patch: pytest.MonkeyPatch, place: int, *, for_good: bool) -> Callable[[], int]:
    """Let the `place`-th call that needs room on the disk fail, and all later ones if `for_good`.

    Returns:
        tells how many such calls there were.
    """
    seen = 0

    def refusing(call: Callable[..., Any], needs_room: Callable[..., bool]) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            if needs_room(*args, **kwargs):
                seen += 1
                if seen > place if for_good else seen == place + 1:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
            return call(*args, **kwargs)

        return refuse

    def always(*_: Any, **__: Any) -> bool:
        return True

    def written(_: Any, mode: Any = "r", *__: Any, **___: Any) -> bool:
        return "w" in str(mode)

    def created(_: Any, flags: int, *__: Any, **___: Any) -> bool:
        return bool(flags & os.O_CREAT)

    for name in ("fsync", "mkdir", "replace", "rename", "write"):
        patch.setattr(os, name, refusing(getattr(os, name), always))
    patch.setattr(os, "open", refusing(os.open, created))
    patch.setattr(Path, "write_text", refusing(Path.write_text, always))
    patch.setattr(manifest, "open", refusing(builtins.open, written), raising=False)
    return lambda: seen


@pytest.mark.parametrize("for_good", [False, True])
def test_a_disk_that_refuses_any_call_gives_one_clear_error_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, for_good: bool
):
    monkeypatch.setattr(runs, "git_commit", lambda: None)
    tried = 0
    for place in range(1_000):
        registry = Registry(tmp_path / str(place))
        earlier = published(registry, "rm/earlier", environment=FACTS["environment"])
        with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
            save(run, 1)
        before = content(earlier.path)
        with monkeypatch.context() as patch:
            calls = refuse_from(patch, place, for_good=for_good)
            said = ""
            try:
                live(registry)
            except RegistryError as error:
                said = str(error)
            except OSError as error:
                raise AssertionError(f"refused at call {place}, and not said plainly") from error
            tried = calls()
        assert not said or "no space left on" in said.lower()
        assert content(earlier.path) == before
        assert complete_checkpoints(registry), "no checkpoint was left"
        assert check_what_is_left(registry) in ("resume", "finished")
        shutil.rmtree(registry.runs_dir)
        if tried <= place:
            break
    assert 30 < tried <= place


@pytest.mark.parametrize("limit", [0, 100])
def test_a_file_that_may_not_grow_is_one_clear_error(registry: Registry, limit: int):
    """A quota, as a real file system reports it: written in part, then refused."""
    published(registry, "rm/earlier")
    with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
        save(run, 1)
        fill(run)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(RegistryError, match=r"sft/tiny: not published: .*File too large"):
                run.publish(**FACTS)
            with pytest.raises(RegistryError, match=r"sft/tiny: no checkpoint at step 2: .*too l"):
                save(run, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert complete_checkpoints(registry) == [1]
    assert registry.verify("rm/earlier") == []
    assert check_what_is_left(registry) == "resume"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def occupy(path: Path, *, leaving: int = 0) -> None:
    """Let a file take all the room of a disk, but for `leaving` bytes."""
    with open(path, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    os.truncate(path, path.stat().st_size - leaving)


def test_a_full_disk_at_any_fill_level_loses_nothing(small_disk: Path):
    registry = Registry(small_disk / "runs")
    ballast = small_disk / "ballast"
    earlier = published(registry, "rm/earlier")
    with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
        save(run, 1)
    before = content(earlier.path)
    said = []
    for pages in range(100):
        occupy(ballast, leaving=4096 * pages)
        try:
            live(registry)
            break
        except RegistryError as error:
            said.append(str(error).lower())
        ballast.unlink()
        assert content(earlier.path) == before
        assert complete_checkpoints(registry)
        assert registry.runs("sft")[0].state == "unfinished"
    assert said
    assert all("no space left on" in message for message in said)
    ballast.unlink()
    assert check_what_is_left(registry) == "finished"


def test_a_disk_full_at_the_last_moment_leaves_the_run_unfinished(small_disk: Path):
    registry = Registry(small_disk / "runs")
    earlier = published(registry, "rm/earlier")
    before = content(earlier.path)
    with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
        save(run, 1)
        fill(run)
        occupy(small_disk / "ballast")
        with pytest.raises(RegistryError, match=r"(?i)sft/tiny: not published: .*no space left"):
            run.publish(**FACTS)
        with pytest.raises(RegistryError, match=r"(?i)tiny: no checkpoint at step 2: .*no space"):
            save(run, 2)
    assert not list(run.path.rglob("*manifest.json.tmp"))
    assert content(earlier.path) == before
    assert complete_checkpoints(registry) == [1]
    (small_disk / "ballast").unlink()
    assert check_what_is_left(registry) == "resume"


class SafetensorError(Exception):
    """As safetensors raises it, which is no OSError."""


LIBRARIES = [
    RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    OSError(errno.ENOSPC, "No space left on device"),
]


@pytest.mark.parametrize("error", LIBRARIES, ids=lambda error: type(error).__name__)
def test_whatever_a_library_raises_on_a_full_disk_it_is_said_plainly(
    small_disk: Path, error: Exception
):
    def write_until_full(folder: Path) -> None:
        occupy(folder / "optimizer.pt")
        raise error

    def checkpoint(run: Run) -> None:
        with run.checkpoint(2) as folder:
            write_until_full(folder)

    def model(run: Run) -> None:
        with run.writing("model/"):
            write_until_full(run.model_dir)

    registry = Registry(small_disk / "runs")
    earlier = published(registry, "rm/earlier")
    before = content(earlier.path)
    for write, what in ((checkpoint, "no checkpoint at step 2"), (model, "model/ not written")):
        with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
            if run.latest is None:
                save(run, 1)
            with pytest.raises(RegistryError, match=f"(?i)sft/tiny: {what}: .*: no space left"):
                write(run)
        assert complete_checkpoints(registry) == [1]
        assert content(earlier.path) == before
        shutil.rmtree(run.model_dir)
    assert check_what_is_left(registry) == "resume"


@pytest.mark.parametrize("error", [RuntimeError("writing"), SafetensorError("writing")])
def test_an_error_that_is_not_of_the_disk_stays_what_it_is(registry: Registry, error: Exception):
    with open_run(registry, "sft", "tiny", CONFIG, {}) as run:
        save(run, 1)
        with pytest.raises(type(error), match="writing"), run.checkpoint(2):
            raise error
        with pytest.raises(type(error), match="writing"), run.writing("model/"):
            raise error
    assert check_what_is_left(registry) == "resume"


# ---------------------------------------------------------------- bad input, through the door


def safetensors(**tensors: bytes) -> bytes:
    """A file of safetensors, by the book: length of the header, header, bytes."""
    header, begin = {}, 0
    for name, data in tensors.items():
        offsets = [begin, begin + len(data)]
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": offsets}
        begin = offsets[1]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(tensors.values())


@pytest.fixture
def child(registry: Registry) -> Published:
    """rm/tiny from sft/tiny; its model has a head, an adapted layer and a base, and a tokenizer."""
    sft = published(registry)
    with open_run(registry, "rm", "tiny", CONFIG, {"policy": sft}) as run:
        fill(run)
        weights = {"layer.weight": b"adapted", "embed.weight": b"base", "score.weight": b"head"}
        (run.model_dir / "model.safetensors").write_bytes(safetensors(**weights))
        (run.model_dir / "tokenizer.json").write_text('{"vocab": {"a": 0, "b": 1}}')
        (run.model_dir / "chat_template.jinja").write_text("{{ messages }}")
        parts.record(run.model_dir, ["layer"])
        run.publish(**FACTS)
    return registry.resolve("rm/tiny")


def cut(name: str) -> Callable[[Path], None]:
    """The first half of a file is left."""
    return lambda run: os.truncate(run / name, (run / name).stat().st_size // 2)


def flipped(name: str, place: int) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        size = (run / name).stat().st_size
        flip(run / name, place % size)

    return change


def other_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text((run / name).read_text().replace(old, new)) and None


def resealed(run: Path) -> None:
    """A manifest whose own digest fits, with another sha256 for the weights."""
    file = run / "manifest.json"
    sound = manifest.unseal(manifest.Manifest, file.read_bytes(), str(file))
    name = "model/model.safetensors"
    wrong = sound.files | {name: dataclasses.replace(sound.files[name], sha256="0" * 64)}
    file.write_text(manifest.seal(dataclasses.replace(sound, files=wrong)))


WEIGHTS = "model/model.safetensors"
BAD: dict[str, tuple[Callable[[Path], object], str, str]] = {  # damage, verify says, resolve says
    "weights cut short": (cut(WEIGHTS), f"{WEIGHTS}: has", "weights (model.safetensors: not whole"),
    "a bit of the header": (flipped(WEIGHTS, 12), f"{WEIGHTS}: sha256 differs", "base ("),
    "a bit of the length": (flipped(WEIGHTS, 7), f"{WEIGHTS}: sha256 differs", "weights (model.s"),
    "a bit of the head": (flipped(WEIGHTS, -1), f"{WEIGHTS}: sha256", "head (score.weight)"),
    "a bit of an adapted layer": (
        lambda run: flipped(WEIGHTS, (run / WEIGHTS).read_bytes().index(b"adapted"))(run),
        f"{WEIGHTS}: sha256 differs",
        "adapter (layer.weight)",
    ),
    "tokenizer of the same size": (
        other_text("model/tokenizer.json", '"a": 0, "b": 1', '"a": 1, "b": 0'),
        "model/tokenizer.json: sha256 differs",
        "published: tokenizer:",
    ),
    "template": (
        other_text("model/chat_template.jinja", "messages", "mess_ages"),
        "model/chat_template.jinja: has",
        "published: template:",
    ),
    "manifest cut in half": (cut("manifest.json"), "not a whole JSON", "not a whole JSON"),
    "manifest of a newer schema": (
        other_text("manifest.json", '"schema": 3', '"schema": 4'),
        "schema: found 4, but this version of rlhf reads 3",
        "schema: found 4",
    ),
    "another sha256, resealed": (resealed, f"{WEIGHTS}: sha256 differs", "published: weights:"),
    "file missing": (lambda run: (run / WEIGHTS).unlink(), f"{WEIGHTS}: missing", f"{WEIGHTS}: m"),
    "file added": (
        lambda run: (run / "model/modeling_x.py").write_text("print()"),
        "model/modeling_x.py: not in the manifest",
        "model/modeling_x.py",
    ),
    "file emptied": (lambda run: os.truncate(run / WEIGHTS, 0), f"{WEIGHTS}: has 0 b", "weights"),
    "file replaced by a folder": (
        lambda run: ((run / WEIGHTS).unlink(), (run / WEIGHTS).mkdir()),
        f"{WEIGHTS}: missing",
        f"{WEIGHTS}: missing",
    ),
}


@pytest.mark.parametrize("damage", BAD)
def test_bad_input_is_named_by_verify_and_before_it_is_loaded(
    registry: Registry, child: Published, rlhf_command, damage: str
):
    assert rlhf_command(registry, "verify", "rm/tiny") == (0, "rm/tiny: sound\n")
    change, verify_says, resolve_says = BAD[damage]
    change(child.path)
    code, said = rlhf_command(registry, "verify", "rm/tiny")
    assert code == 2
    assert "rm/tiny: damaged" in said
    assert verify_says in said
    with pytest.raises(RegistryError) as refused:
        registry.resolve("rm/tiny", contents=True)
    assert resolve_says in str(refused.value)
    assert "Traceback" not in said
    assert rlhf_command(registry, "ls")[0] == 0, "one bad run does not hide the others"


def test_a_deleted_or_replaced_parent_is_named_by_verify(
    registry: Registry, child: Published, rlhf_command
):
    sft = registry.resolve("sft/tiny")
    os.rename(sft.path, registry.runs_dir / "gone")
    code, said = rlhf_command(registry, "verify", "rm/tiny")
    assert code == 2
    assert "parent policy sft/tiny: sft/tiny: no such run" in said
    published(registry, metrics={"eval/loss": 9.0})
    code, said = rlhf_command(registry, "verify", "rm/tiny")
    assert code == 2
    assert "parent policy sft/tiny: is not what this run started from" in said
