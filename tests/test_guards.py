"""Combinations that are refused: which ones, by which rule, and how soon."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf import guards
from rlhf.config import CONF, PROJECT, EngineConfig, FullConfig, LoraConfig
from rlhf.errors import ConfigError
from rlhf.methods.table import METHODS

METHOD = {"lora": LoraConfig(), "full": FullConfig()}
# (method, ZeRO stage, offload) -> the rule that refuses it, or None.
TABLE = {
    ("lora", 0, False): None,
    ("lora", 1, False): None,
    ("lora", 2, False): None,
    ("lora", 3, False): "zero3-adapter",
    ("lora", 2, True): "offload-not-yet",
    ("lora", 3, True): "zero3-adapter",
    ("full", 0, False): None,
    ("full", 1, False): None,
    ("full", 2, False): None,
    ("full", 3, False): "zero3-not-yet",
    ("full", 2, True): "offload-not-yet",
    ("full", 3, True): "zero3-not-yet",
}


@pytest.mark.parametrize(("method", "zero_stage", "offload"), TABLE)
def test_a_combination_is_refused_by_its_rule_or_allowed(method, zero_stage, offload):
    cfg = SimpleNamespace(
        stage="sft",
        method=METHOD[method],
        engine=EngineConfig(zero_stage=zero_stage, offload=offload),
    )
    rule = TABLE[method, zero_stage, offload]
    if rule is None:
        guards.check(cfg)
        return
    with pytest.raises(ConfigError, match=rf"^\[{rule}\] engine\.") as caught:
        guards.check(cfg)
    assert "engine=zero2" in str(caught.value)  # a way out
    assert "{" not in str(caught.value)  # filled in


def test_every_rule_refuses_something_above_and_has_a_name_of_its_own():
    names = [rule.name for rule in guards.RULES]
    assert set(names) == {rule for rule in TABLE.values() if rule} | {"ppo-dropout"}
    assert len(set(names)) == len(names)


def test_every_way_out_that_a_rule_names_is_open():
    for rule in guards.RULES:
        for method in METHOD.values():
            guards.check(
                SimpleNamespace(stage="sft", method=method, engine=EngineConfig(zero_stage=2))
            )
        assert "engine=zero2" in rule.message or rule.name == "ppo-dropout"
    assert (CONF / "engine" / "zero2.yaml").is_file()


def test_the_table_of_methods_is_that_of_conf():
    assert sorted(METHODS) == sorted(file.stem for file in (CONF / "method").glob("*.yaml"))
    assert all(name == row.name for name, row in METHODS.items())


def test_zero3_is_never_allowed_for_an_adapter():
    assert [row.name for row in METHODS.values() if row.adapter and row.zero3] == []


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
    method, engine = LoraConfig(dropout=0.1), EngineConfig()
    for stage in ("sft", "rm"):
        guards.check(SimpleNamespace(stage=stage, method=method, engine=engine))
    with pytest.raises(ConfigError, match=r"^\[ppo-dropout\] method\.dropout=0\.1"):
        guards.check(SimpleNamespace(stage="ppo", method=method, engine=engine))
    guards.check(SimpleNamespace(stage="ppo", method=FullConfig(), engine=engine))
