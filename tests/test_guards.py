"""Combinations that are refused or noted: which ones, by which rule, how soon, and the way out."""

from __future__ import annotations

import os
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement

from rlhf import guards, launch, libraries
from rlhf.config import CONF, PROJECT, EngineConfig, TrainConfig
from rlhf.errors import ConfigError
from rlhf.guards import Device
from rlhf.methods.settings import FullConfig, LoraConfig
from rlhf.methods.table import METHODS

METHOD = {"lora": LoraConfig(), "full": FullConfig()}
# (method, ZeRO stage, offload) -> the rule that refuses it, or None.
TABLE = {
    ("lora", 0, False): None,
    ("lora", 1, False): None,
    ("lora", 2, False): None,
    ("lora", 3, False): "zero3-adapter",
    ("lora", 0, True): "offload-zero0",
    ("lora", 1, True): None,
    ("lora", 2, True): None,
    ("lora", 3, True): "zero3-adapter",
    ("full", 0, False): None,
    ("full", 1, False): None,
    ("full", 2, False): None,
    ("full", 3, False): None,
    ("full", 0, True): "offload-zero0",
    ("full", 1, True): None,
    ("full", 2, True): None,
    ("full", 3, True): None,
}


def sft(**engine: Any) -> SimpleNamespace:
    """The part of an SFT config that rules read."""
    method = METHOD[engine.pop("method", "lora")]
    return SimpleNamespace(
        stage="sft", method=method, engine=EngineConfig(**engine), train=TrainConfig()
    )


@pytest.mark.parametrize(("method", "zero_stage", "offload"), TABLE)
def test_a_combination_is_refused_by_its_rule_or_allowed(method, zero_stage, offload):
    cfg = sft(method=method, zero_stage=zero_stage, offload=offload)
    rule, known = TABLE[method, zero_stage, offload], replace(guards.facts(), lacks=())
    if rule is None:
        assert guards.check(cfg, known) == []
        return
    with pytest.raises(ConfigError, match=rf"^\[{rule}\] engine\..* Use engine=zero2") as caught:
        guards.check(cfg, known)
    assert "{" not in str(caught.value)  # filled in


# ---------------------------------------------------------------- every rule, and its way out

CPU = Device("CPU", gpus=0, bf16=False, fp16=False)
H200 = Device("NVIDIA H200", gpus=1, bf16=True, fp16=True)
T4 = Device("Tesla T4", gpus=1, bf16=False, fp16=True)
P100 = Device("Tesla P100", gpus=1, bf16=False, fp16=False)


@dataclass(frozen=True)
class Case:
    """What a rule is about, and words that its message has."""

    rule: str
    stage: str
    overrides: list[str]
    says: list[str]
    facts: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    only_stages: tuple[int, ...] | None = None  # ZeRO stages that the method's row has, for once
    lacking: str = ""  # a library that is not installed


ALLOWED = ["engine=zero3", "engine.allow_zero3_adapters=true"]
CASES = [
    Case(
        "deepspeed-mixed-dtypes",
        "sft",
        ALLOWED,
        ["on deepspeed 0.19.2", "Run `pip install 'deepspeed>=0.19.8,<1'`."],
        versions={"deepspeed": "0.19.2"},
    ),
    Case(
        "deepspeed-frozen-checkpointing",
        "ppo",
        [*ALLOWED, "engine.checkpointing=true", "engine.dtype=fp32"],
        ["engine.checkpointing=true", "deepspeed 0.19.1:", "'deepspeed>=0.19.8,<1'"],
        versions={"deepspeed": "0.19.1"},
    ),
    Case(
        "library-bounds",
        "rm",
        [],
        [
            "torch 2.14.1 (>=2.11,<2.14 is needed), deepspeed 0.19.3 (>=0.19.8,<1 is needed):",
            "Run `pip install 'torch>=2.11,<2.14' 'deepspeed>=0.19.8,<1'`.",
        ],
        versions={"torch": "2.14.1", "deepspeed": "0.19.3"},
    ),
    Case(
        "method-zero-stage",
        "sft",
        ["engine=zero2"],
        ["engine.zero_stage=2 with method=lora", "a reset is undone.", "Use engine=zero1."],
        only_stages=(0, 1),
    ),
    Case("zero3-adapter", "ppo", ["engine=zero3"], ["method=lora", "Use engine=zero2."]),
    Case(
        "method-stage",
        "ppo",
        ["method=relora"],
        ["method=relora in stage ppo: it follows the schedule", "Use method=lora."],
    ),
    Case(
        "method-checkpointing",
        "sft",
        ["method=prefix_tuning", "engine.checkpointing=true"],
        ["with method=prefix_tuning", "Use engine.checkpointing=false."],
    ),
    Case(
        "method-quantization",
        "sft",
        ["method=pissa", "method.quantization=nf4"],
        ["method.quantization=nf4 with method=pissa", "method.quantization=null"],
    ),
    Case(
        "adalora-dtype",
        "sft",
        ["method=adalora", "engine=zero0"],
        ["method=adalora with engine.dtype=auto", "Use engine.dtype=fp32."],
        facts={"device": H200},
    ),
    Case(
        "quantization-ppo",
        "ppo",
        ["method.quantization=nf4"],
        ["quantised anew", "Use method.quantization=null."],
    ),
    Case(
        "quantization-zero3",
        "rm",
        ["method.quantization=nf4", *ALLOWED],
        ["method.quantization=nf4 with engine.zero_stage=3", "Use engine=zero2."],
    ),
    Case(
        "quantization-library",
        "sft",
        ["method=qlora"],
        ["bitsandbytes' work, which is not installed", "'bitsandbytes>=0.50,<1'"],
        lacking="bitsandbytes",
    ),
    Case("ppo-dropout", "ppo", ["method.dropout=0.1"], ["method.dropout=0.1 in PPO"]),
    Case(
        "train-batch-processes",
        "rm",
        [],
        ["train.batch_size=16 on 3 proc", "Use train.batch_size=18."],
        facts={"processes": 3},
    ),
    Case(
        "ppo-batch-processes",
        "ppo",
        [],
        ["ppo.minibatches=4 on 3", "Use ppo.batch_size=72."],
        facts={"processes": 3},
    ),
    Case(
        "ppo-answers-processes",
        "ppo",
        ["algorithm=grpo", "sampling.per_prompt=32"],
        ["sampling.per_prompt=32 on 4", "Use ppo.batch_size=128."],
        facts={"processes": 4},
    ),
    Case(
        "small-passes",
        "sft",
        ["train.batch_size=34"],
        ["micro_batch_size=16 with 17 rows", "has 1: slow.", "Use train.micro_batch_size=17."],
        facts={"processes": 2},
    ),
    Case(
        "small-passes",
        "ppo",
        ["ppo.batch_size=44", "ppo.micro_batch_size=8"],
        ["micro_batch_size=8 with 11 rows", "has 1: slow.", "Use ppo.micro_batch_size=11."],
    ),
    Case(
        "fp16-device",
        "sft",
        ["engine.dtype=fp16"],
        ["(CPU)", "`Type fp16 is not supported on your device.`", "Use engine.dtype=fp32."],
        facts={"device": CPU},
    ),
    Case("fp16-device", "sft", ["engine.dtype=fp16"], ["P100"], facts={"device": P100}),
    Case(
        "fp16-needless",
        "rm",
        ["engine.dtype=fp16"],
        ["NVIDIA H200", "Use engine.dtype=bf16."],
        facts={"device": H200},
    ),
    Case("bf16-cpu", "ppo", ["engine.dtype=bf16"], ["5 to 8 times"], facts={"device": CPU}),
    Case(
        "fp16-zero0",
        "ppo",
        ["engine=zero0", "engine.dtype=fp16"],
        ["engine.dtype=fp16 with engine.zero_stage=0", "65536 times", "Use engine=zero1."],
        facts={"device": T4},
    ),
    Case(
        "offload-zero0",
        "rm",
        ["engine=zero0", "engine.offload=true"],
        ["ZeRO-0 splits nothing", "Use engine=zero2_offload."],
    ),
    Case(
        "offload-compiler",
        "sft",
        ["engine=zero2_offload"],
        ["without a C++ compiler (c++) and ninja:", "`pip install ninja`", "engine.offload=false"],
        facts={"lacks": ("a C++ compiler (c++)", "ninja")},
    ),
]


def compose(stage: str, *overrides: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYDRA_FULL_ERROR", "1")  # compose sets it
        patch.setattr(sys, "argv", [f"{stage}.py", *overrides])
        return launch.compose(stage)


def said(cfg: Any, known: guards.Facts) -> list[str]:
    """What both passes have to say."""
    try:
        notes = guards.check(cfg, known)
        return notes if known.device is guards.UNKNOWN else guards.check_device(cfg, known)
    except ConfigError as refusal:
        return [str(refusal)]


def expect(case: Case) -> None:
    """The rule speaks about its case, says what it should, and is silent after its way out."""
    rule = next(rule for rule in guards.RULES if rule.name == case.rule)
    plain = replace(guards.facts(), lacks=())
    plain = replace(plain, versions={"bitsandbytes": "0.50.2"} | dict(plain.versions))
    versions = dict(plain.versions) | case.versions
    versions.pop(case.lacking, None)
    known = replace(plain, versions=versions, **case.facts)
    with pytest.MonkeyPatch.context() as patch:
        cfg = compose(case.stage, *case.overrides)
        if case.only_stages is not None:
            row = replace(
                METHODS[cfg.method.name],
                zero_stages=case.only_stages,
                zero_reason="a reset is undone",
            )
            patch.setitem(METHODS, cfg.method.name, row)
        (message,) = said(cfg, known)
        assert message.startswith(f"[{rule.name}] "), message
        assert all(words in message for words in case.says), message
        assert "{" not in message
        way = rule.filled(rule.way_out, cfg, known)
        assert way in message
        if way.startswith("pip install "):
            for wanted in map(Requirement, shlex.split(way)[2:]):
                here = plain.versions[wanted.name]
                assert wanted.specifier.contains(here)
                known = replace(known, versions={**known.versions, wanted.name: here})
        else:
            cfg = compose(case.stage, *case.overrides, *way.split())
        assert said(cfg, known) == []


def before_torch() -> list[Case]:
    on_device = {rule.name for rule in guards.RULES if rule.on_device}
    return [case for case in CASES if case.rule not in on_device]


@pytest.mark.parametrize(
    "case", [c for c in CASES if c not in before_torch()], ids=lambda case: case.rule
)
def test_a_rule_about_the_device_speaks_and_its_way_out_is_open(case):
    expect(case)


def test_the_other_rules_speak_without_torch_and_their_ways_out_are_open():
    code = (
        "import sys, test_guards\n"
        "for case in test_guards.before_torch():\n"
        "    test_guards.expect(case)\n"
        "    assert 'torch' not in sys.modules, case\n"
        "print('done')\n"
    )
    paths = [str(Path(__file__).parent), str(PROJECT)]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_every_rule_has_a_case_above_and_a_name_of_its_own():
    names = [rule.name for rule in guards.RULES]
    assert set(names) == {case.rule for case in CASES}
    assert len(set(names)) == len(names)


def test_allowing_adapters_in_zero3_allows_only_what_the_table_has(monkeypatch):
    cfg = sft(zero_stage=3, allow_zero3_adapters=True)
    assert guards.check(cfg) == []
    row = replace(METHODS["lora"], zero_stages=(0, 1, 2), zero_reason="it hangs")
    monkeypatch.setitem(METHODS, "lora", row)
    with pytest.raises(ConfigError, match=r"^\[method-zero-stage\].* it hangs\. Use engine=zero2"):
        guards.check(cfg)


def test_a_library_rule_asks_for_its_versions_and_for_the_settings():
    def rule_of(version: str, **engine: Any) -> str | None:
        known = guards.facts()
        known = replace(known, versions=known.versions | {"deepspeed": version})
        cfg = sft(zero_stage=3, allow_zero3_adapters=True, **engine)
        spoken = said(cfg, known)
        return spoken[0].split("]")[0].lstrip("[") if spoken else None

    assert rule_of("0.19.2") == "deepspeed-mixed-dtypes"
    assert rule_of("0.19.2+cu130", dtype="bf16") == "deepspeed-mixed-dtypes"
    assert rule_of("0.19.2", dtype="fp32") == "library-bounds"
    assert rule_of("0.19.2", method="full") == "library-bounds"
    assert rule_of("0.19.1") == "library-bounds"
    assert rule_of("0.19.1", checkpointing=True) == "deepspeed-frozen-checkpointing"
    assert rule_of("0.19.3rc1", checkpointing=True) == "library-bounds"
    assert rule_of("0.19.20") is None


# ---------------------------------------------------------------- versions


@pytest.mark.parametrize(
    ("version", "bounds", "inside"),
    [
        ("0.19.10", ">=0.19.9", True),  # as strings it would be the other way round
        ("0.19.9", ">=0.19.10", False),
        ("0.19.10", "<0.19.9", False),
        ("1.9", ">=1.13", False),
        ("2.13.0+cpu", ">=2.11,<2.14", True),
        ("2.13.1.dev20260101+cu130", ">=2.11,<2.14", True),
        ("2.12.0a0+0e4e9a5", ">=2.11,<2.14", True),  # builds for clusters are named so
        ("2.11.0rc1", ">=2.11,<2.14", False),
        ("2.14.0a0", ">=2.11,<2.14", False),
        ("2.14.0", ">=2.11,<2.14", False),
        ("0.19.8rc1", ">=0.19.8", False),
        ("no version", ">=0.19.8", False),
    ],
)
def test_versions_are_compared_as_versions(version, bounds, inside):
    assert libraries.within(version, bounds) is inside


def test_the_bounds_are_those_of_pyproject_and_hold_here():
    needs = libraries.needed()
    assert needs["torch"] == ">=2.11,<2.14"
    assert needs["trl"] == ">=1.13,<2"
    assert needs["hydra-core"] == ">=1.3.2,<2"
    assert guards.facts().outside == {}


@pytest.mark.parametrize(
    ("library", "version", "wanted"),
    [
        ("trl", "1.12.0", ">=1.13,<2"),
        ("torch", "2.10.1", ">=2.11,<2.14"),
        ("peft", "0.9", ">=0.21,<1"),
    ],
)
def test_what_is_installed_despite_the_bounds_is_refused(monkeypatch, library, version, wanted):
    found = libraries.importlib.metadata.version
    monkeypatch.setattr(
        libraries.importlib.metadata,
        "version",
        lambda name: version if name == library else found(name),
    )
    with pytest.raises(ConfigError) as caught:
        guards.check(sft())
    assert str(caught.value).startswith(
        f"[library-bounds] installed: {library} {version} ({wanted} is needed): "
    )


def test_a_library_that_is_missing_is_left_to_who_imports_it(monkeypatch):
    def version(name: str) -> str:
        raise libraries.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(libraries.importlib.metadata, "version", version)
    assert guards.facts().versions == {}
    assert guards.check(sft()) == []


# ---------------------------------------------------------------- what CPU Adam is compiled with


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`tools("c++")`: a PATH with these programs alone, and python in a folder of its own."""
    monkeypatch.delenv("CXX", raising=False)
    places = [tmp_path / name for name in ("path", "scripts", "deepspeed")]
    for place in places:
        place.mkdir()
    path, scripts, deepspeed = places
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setattr(sys, "executable", str(scripts / "python"))
    found = SimpleNamespace(submodule_search_locations=[str(deepspeed)])
    monkeypatch.setattr(guards.importlib.util, "find_spec", lambda name: found)

    def put(*programs: str, folder: str = "path") -> Path:
        for program in programs:
            file = tmp_path / folder / program
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("")
            file.chmod(0o755)
        return tmp_path

    return put


def test_what_is_missing_to_compile_cpu_adam_is_named(tools, monkeypatch):
    assert guards.lacking() == ("a C++ compiler (c++)", "ninja")
    tools("c++")
    assert guards.lacking() == guards.facts().lacks == ("ninja",)
    monkeypatch.setenv("CXX", "clang++-19")  # torch asks for this one then
    assert guards.lacking() == ("a C++ compiler (clang++-19)", "ninja")
    tools("clang++-19", "ninja")
    assert guards.lacking() == ()


def test_ninja_of_an_environment_that_is_not_activated_is_found(tools):
    tools("c++")
    tools("ninja", folder="scripts")
    assert guards.lacking() == ()


def test_nothing_is_missing_where_cpu_adam_was_installed_compiled(tools):
    tools("cpu_adam_op.cpython-311-x86_64-linux-gnu.so", folder="deepspeed/ops/adam")
    assert guards.lacking() == ()


def test_nothing_is_missing_where_nothing_is_offloaded():
    known = replace(guards.facts(), lacks=("ninja",))
    assert guards.check(sft(), known) == []
    with pytest.raises(ConfigError, match=r"^\[offload-compiler\] .* without ninja: "):
        guards.check(sft(offload=True), known)


# ---------------------------------------------------------------- processes


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """`command(main, "ppo.steps=3")`: the exit code of a ppo stage that starts no rank.

    Signals and variables are afterwards as they were.
    """
    for name in ("NPROC", "RANK", "WORLD_SIZE", "HYDRA_FULL_ERROR", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(launch, "start_ranks", lambda count: 0)

    def run(main: Callable[[Any], None], *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["ppo.py", *arguments])
        return launch._run("ppo", main)

    handler = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, handler)


LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3"}
LAUNCHED |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("env", [{"NPROC": "3"}, LAUNCHED], ids=["NPROC", "launched"])
def test_a_batch_that_cannot_be_split_is_refused_before_a_rank_is_started(
    command, monkeypatch, capsys, env
):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert command(lambda cfg: None) == 2
    assert "refused: [ppo-batch-processes] " in capsys.readouterr().err
    assert command(lambda cfg: None, "ppo.batch_size=72") == 0


# ---------------------------------------------------------------- notes


def test_a_note_is_said_once_and_the_stage_goes_on(command, monkeypatch, capsys):
    note = replace(guards.RULES[0], library=None, applies=lambda cfg, facts: True, refuses=False)
    monkeypatch.setattr(guards, "RULES", [note])
    seen: list[Any] = []
    assert command(seen.append) == 0
    assert capsys.readouterr().err.count("[deepspeed-mixed-dtypes] ") == 1
    assert len(seen) == 1
    monkeypatch.setenv("NPROC", "2")  # rank 0 says it
    assert command(seen.append) == 0
    assert capsys.readouterr().err == ""


def test_the_device_is_looked_at_where_it_is_not_given(monkeypatch):
    cfg = sft(dtype="bf16")
    assert guards.check(cfg) == []
    monkeypatch.setattr(guards, "device", lambda: H200)
    assert guards.check_device(cfg) == []
    monkeypatch.setattr(guards, "device", lambda: CPU)
    (note,) = guards.check_device(cfg)
    assert note.startswith("[bf16-cpu] engine.dtype=bf16 on a CPU: ")
    assert guards.check_device(sft(dtype="fp32")) == guards.check_device(sft()) == []


def test_fp16_is_for_gpus_without_bf16():
    cfg = sft(dtype="fp16")
    on = {device: said(cfg, replace(guards.facts(), device=device)) for device in (T4, H200, CPU)}
    assert on[T4] == []
    assert [text.split("]")[0] for text in (*on[H200], *on[CPU])] == [
        "[fp16-needless",
        "[fp16-device",
    ]


def test_this_device_is_a_cpu_or_a_gpu_with_a_name():
    torch = pytest.importorskip("torch")
    found = guards.device()
    assert (found.gpus > 0) is torch.cuda.is_available()
    assert found == CPU or found.name not in ("", "CPU")


# ---------------------------------------------------------------- the table of methods


def test_the_table_of_methods_is_that_of_conf():
    assert sorted(METHODS) == sorted(file.stem for file in (CONF / "method").glob("*.yaml"))
    assert all(name == row.name for name, row in METHODS.items())


def test_a_method_that_is_not_right_in_a_zero_stage_says_what_goes_wrong():
    for row in METHODS.values():
        assert row.zero_stages
        assert set(row.zero_stages) <= {0, 1, 2, 3}
        assert bool(row.zero_reason) is (row.zero_stages != (0, 1, 2, 3)), row


# ---------------------------------------------------------------- how soon


@pytest.fixture
def trapped(tmp_path: Path) -> dict[str, str]:
    """An environment where importing torch or transformers ends the process loudly."""
    trap = tmp_path / "trap"
    trap.mkdir()
    for name in ("torch", "transformers", "deepspeed"):
        (trap / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    return {"PYTHONPATH": os.pathsep.join([str(trap), str(PROJECT)])}


@pytest.mark.parametrize("parents", [False, True])
@pytest.mark.parametrize("choice", ["zero3", "zero3_offload"])
def test_zero3_with_lora_is_refused_in_two_seconds_without_torch(
    tmp_path, trapped, publish_run, parents, choice
):
    here = tmp_path / "here"
    here.mkdir()
    if parents:
        sft = publish_run(here / "runs", "sft")
        publish_run(here / "runs", "rm", {"policy": sft})
    before = sorted(here.rglob("*"))
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, str(PROJECT / "stages" / "ppo.py"), f"engine={choice}"],
        cwd=here,
        env=os.environ | trapped,
        capture_output=True,
        text=True,
        check=False,
    )
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("refused: [zero3-adapter] engine.zero_stage=3 with method=lora")
    assert done.stderr.count("\n") == 1
    assert sorted(here.rglob("*")) == before
    assert now.ru_utime + now.ru_stime - spent.ru_utime - spent.ru_stime < 2.0


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_the_other_stages_refuse_it_too(tmp_path, trapped, stage):
    done = subprocess.run(
        [sys.executable, str(PROJECT / "stages" / f"{stage}.py"), "engine=zero3"],
        cwd=tmp_path,
        env=os.environ | trapped,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "[zero3-adapter]" in done.stderr


def test_dropout_is_refused_in_ppo_and_only_there():
    assert guards.check(compose("sft", "method.dropout=0.1")) == []
    assert guards.check(compose("rm", "method.dropout=0.1")) == []
    with pytest.raises(ConfigError, match=r"^\[ppo-dropout\] method\.dropout=0\.1"):
        guards.check(compose("ppo", "method.dropout=0.1"))
    assert guards.check(compose("ppo", "method=full")) == []
