"""`engine.deepspeed`: what reaches DeepSpeed, and what is refused, by whom and how soon."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from rlhf import deepspeed_settings, launch
from rlhf.config import PROJECT, EngineConfig
from rlhf.deepspeed_settings import OURS, PASSED, TOP, UNUSED
from rlhf.errors import ConfigError
from rlhf.run import config_hash, result_keys

# ---------------------------------------------------------------- refused without torch


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"zero_optimisation": {}},
            r"^engine\.deepspeed\.zero_optimisation: DeepSpeed has no such setting, and would "
            r"ignore it\. Did you mean zero_optimization\?$",
        ),
        (
            {"reduce_bucket_size": 5e7},
            r"^engine\.deepspeed\.reduce_bucket_size=50000000\.0: DeepSpeed has no such setting.* "
            r"These are passed on: .*engine\.deepspeed\.zero_optimization\.NAME\.$",
        ),
        (
            {"gradient_clipping": 0.5},
            r"^engine\.deepspeed\.gradient_clipping=0\.5: this is set under another name here.* "
            r"Use train\.max_grad_norm \(SFT, RM\) or ppo\.max_grad_norm\.$",
        ),
        ({"train_batch_size": 8}, r"Use train\.batch_size and .*ppo\.batch_size"),
        ({"optimizer": {"type": "Adam"}}, r"\.optimizer: this is set .* Use train\.learning_rate"),
        ({"fp16": {"loss_scale": 8}}, r"\.fp16: this is set .* Use engine\.dtype=fp16\.$"),
        (
            {"zero_optimization": {"reduce_bucket_size": 9, "stage": 3}},
            r"^engine\.deepspeed\.zero_optimization\.stage=3: this is set .* Use engine=zero0",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            r"\.zero_optimization\.offload_optimizer: this is set .* Use engine\.offload",
        ),
        (
            {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
            r"Use engine\.partition_threshold\.$",
        ),
        ({"zero_optimization": 2}, r"^engine\.deepspeed\.zero_optimization=2: it is a group of"),
        ({"data_types": {"param_dtype": "bf16"}}, r"\.param_dtype=bf16: .* Use engine\.dtype\.$"),
        (
            {"data_types": {"grad_accum_dtyp": "fp32"}},
            r"\.grad_accum_dtyp=fp32: .* would ignore it\. Did you mean grad_accum_dtype",
        ),
        ({"pipeline": {"stages": 2}}, r"\.pipeline: no stage uses it, .* Leave it out\.$"),
        ({"elasticity": {}}, r"\.elasticity: DeepSpeed has no such setting"),  # it was removed
    ],
    ids=lambda value: "" if isinstance(value, str) else ".".join(map(str, value)),
)
def test_what_cannot_be_passed_on_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(deepspeed=settings)


def test_what_is_passed_on_is_put_into_the_config_group_by_group():
    config = {"gradient_clipping": 1.0, "zero_optimization": {"stage": 2}, "steps_per_print": 9}
    more = {"zero_optimization": {"reduce_bucket_size": 5e7}, "prescale_gradients": True}
    assert deepspeed_settings.merged(config, more) == {
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e7},
        "steps_per_print": 9,
        "prescale_gradients": True,
    }
    assert config["zero_optimization"] == {"stage": 2}, "what was given is left alone"
    assert deepspeed_settings.merged(config, {}) == config


def compose(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Any:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # compose sets it
    monkeypatch.setattr(sys, "argv", ["sft.py", *overrides])
    return launch.compose("sft")


@pytest.mark.parametrize(
    "override",
    [
        "engine.deepspeed.zero_optimization.reduce_bucket_size=5e7",
        "+engine.deepspeed.zero_optimization.reduce_bucket_size=5e7",
        "engine.deepspeed={zero_optimization:{reduce_bucket_size:5e7}}",
    ],
)
@pytest.mark.parametrize("engine", ["zero2", "zero3_offload"])
def test_a_setting_needs_no_plus_before_it(monkeypatch, engine, override):
    cfg = compose(monkeypatch, f"engine={engine}", override)
    assert cfg.engine.deepspeed == {"zero_optimization": {"reduce_bucket_size": 5e7}}
    more = "engine.deepspeed.prescale_gradients=true"
    cfg = compose(monkeypatch, f"engine={engine}", override, more)
    assert cfg.engine.deepspeed["prescale_gradients"] is True
    assert cfg.engine.deepspeed["zero_optimization"]
    with pytest.raises(ConfigError, match=r"engine\.offlod: .* Did you mean engine\.offload"):
        compose(monkeypatch, "engine.offlod=true")  # beside it nothing is let in


def test_a_run_with_another_setting_is_another_run(monkeypatch):
    import dataclasses

    given = [(), ("engine.deepspeed.prescale_gradients=true",)]
    plain, other = (dataclasses.asdict(compose(monkeypatch, *each)) for each in given)
    assert result_keys(other)["engine.deepspeed.prescale_gradients"] is True
    assert config_hash(plain) != config_hash(other)


def test_a_stage_refuses_it_before_torch_is_imported(tmp_path: Path):
    for name in ("torch", "transformers", "deepspeed"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    done = subprocess.run(
        [sys.executable, str(PROJECT / "stages/ppo.py"), "engine.deepspeed.steps_per_prin=3"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(PROJECT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("refused: engine.deepspeed.steps_per_prin=3: DeepSpeed has no")
    assert done.stderr.endswith("Did you mean steps_per_print?\n")


# ---------------------------------------------------------------- DeepSpeed's own word


@pytest.fixture(scope="module")
def started():
    """The engine, in a process group of its own."""
    from rlhf import engine

    before = dict(os.environ)
    engine.start(0)
    yield engine
    os.environ.clear()
    os.environ.update(before)


class Asked(dict[str, Any]):
    """A config that notes which names DeepSpeed looks for."""

    names: ClassVar[set[str]] = set()

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def keys(self) -> Any:
        return self  # `name in config.keys()` is how it asks for some of them


def test_the_names_are_those_that_deepspeed_looks_for(started):
    from deepspeed.runtime import config

    Asked.names.clear()
    config.DeepSpeedConfig(Asked(train_batch_size=1))
    removed = set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert Asked.names - removed == TOP
    assert not removed & TOP


def test_names_inside_a_group_are_those_of_deepspeed(started):
    from deepspeed.runtime import config, constants
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields.items()
    known = {"zero_optimization": {*dict(fields), *(info.alias for _, info in fields)}}
    types = {"GRAD_ACCUM_DTYPE", "PARAM_DTYPE", "BUFFER_DTYPE", "KEEP_IN_FP32_MODULES"}
    known["data_types"] = {getattr(constants, name) for name in types}
    for name in (*OURS, *UNUSED):
        group, _, inner = name.partition(".")
        assert not inner or inner in known[group], name
    for group, names in deepspeed_settings.INSIDE.items():
        Asked.names.clear()
        config.DeepSpeedConfig({"train_batch_size": 1, group: Asked()})
        assert Asked.names == set(names) == known[group]


def test_a_name_is_in_one_of_the_three_lists():
    assert len(TOP) + sum("." in name for name in (*OURS, *UNUSED)) == sum(
        map(len, (PASSED, OURS, UNUSED))
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"zero_optimization": {"reduce_buket_size": 5e7}},
            r"^engine\.deepspeed\.zero_optimization\.reduce_buket_size=50000000\.0: DeepSpeed has "
            r"no such setting\. Did you mean reduce_bucket_size",
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": "many"}},
            r"^engine\.deepspeed\.zero_optimization\.reduce_bucket_size=many: Input should be a "
            r"valid integer",
        ),
        (
            {"comms_logger": {"verbos": True}},
            r"^engine\.deepspeed\.comms_logger\.verbos=True: DeepSpeed has no such setting\. "
            r"Leave it out\.$",
        ),
        (
            {"prescale_gradients": True},
            r"^engine\.deepspeed=.*: pre-scale gradients is not yet supported with ZeRO-2",
        ),
        ({"communication_data_type": "fp12"}, r"^engine\.deepspeed=.*DeepSpeed refuses it: "),
        ({"comms_logger": True}, r"^engine\.deepspeed=.*DeepSpeed refuses it: "),
    ],
    ids=lambda value: "" if isinstance(value, str) else ".".join(map(str, value)),
)
def test_what_deepspeed_refuses_is_refused_before_a_weight_is_loaded(started, settings, message):
    with pytest.raises(ConfigError, match=message):
        started.rehearse(EngineConfig(deepspeed=settings))


def test_a_setting_reaches_deepspeed_and_ours_stay(started):
    import torch
    from torch import nn

    more = {"zero_optimization": {"reduce_bucket_size": 5e7}, "memory_breakdown": True}
    cfg = EngineConfig(zero_stage=2, deepspeed=more)
    before = torch.get_rng_state()
    started.rehearse(cfg)
    assert torch.equal(torch.get_rng_state(), before), "what follows is drawn as without it"
    sizes = {"micro_batch_size": 1, "accumulation": 3, "max_grad_norm": 0.7}
    trainer = started.Engine(
        nn.Linear(2, 2), cfg, learning_rate=0.1, factor=lambda step: 1.0, **sizes
    )
    inner = trainer._engine
    assert inner.zero_reduce_bucket_size() == inner.optimizer.reduce_bucket_size == 50_000_000
    assert inner.memory_breakdown() is True
    assert inner.zero_optimization_stage() == 2
    assert (inner.gradient_accumulation_steps(), inner.gradient_clipping()) == (3, 0.7)
