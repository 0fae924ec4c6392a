"""The settings' own refusals: every value that cannot work, named with what to do."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Any

import pytest

from rlhf import config
from rlhf.config import (
    CardConfig,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    ModelConfig,
    PPOConfig,
    PPOStage,
    RMStage,
    SamplingConfig,
    SFTStage,
    TemplateConfig,
    TrackingConfig,
    TrainConfig,
)
from rlhf.errors import ConfigError
from rlhf.manifest import flat
from rlhf.methods.settings import FullConfig, LoraConfig

NOT_FINITE = (math.nan, math.inf)


def stage(kind: type, **settings: Any) -> config.StageConfig:
    """A stage as composing makes it: every field given."""
    given: dict[str, Any] = {
        "run_name": "tiny",
        "runs_dir": "runs",
        "template": TemplateConfig("chat"),
        "data": DataConfig("rows.jsonl"),
        "method": LoraConfig(),
        "engine": EngineConfig(),
        "tracking": TrackingConfig(),
    }
    return kind(**(given | settings))


# (class, the field's group, field, a value that is refused, the end of the message)
REFUSED = [
    (ModelConfig, "model", "dtype", "float16", "Choose one of: auto, fp32, bf16, fp16"),
    (DataConfig, "data", "max_bad_fraction", -0.1, r"must lie in \[0, 1\]"),
    (DataConfig, "data", "max_bad_fraction", 1.5, r"must lie in \[0, 1\]"),
    (DataConfig, "data", "max_prompt_tokens", 0, "must be a number above 0"),
    (DataConfig, "data", "max_response_tokens", 0, "must be a number above 0"),
    (DataConfig, "data", "max_rows", 0, "Use null for all rows"),
    (LoraConfig, "method", "name", "full", "Choose one of: lora"),
    (FullConfig, "method", "name", "lora", "Choose one of: full"),
    (LoraConfig, "method", "rank", 0, "8 to 64 is usual"),
    (LoraConfig, "method", "alpha", 0.0, "scaled by alpha / rank"),
    (LoraConfig, "method", "dropout", 1.0, "It is a probability"),
    (LoraConfig, "method", "dropout", -0.1, "It is a probability"),
    (EngineConfig, "engine", "zero_stage", 4, "Choose one of: 0, 1, 2, 3"),
    (EngineConfig, "engine", "dtype", "float16", "Choose one of: auto, fp32, bf16"),
    (TrainConfig, "train", "learning_rate", 0.0, "Nothing would be learnt"),
    (TrainConfig, "train", "epochs", 0.0, "Nothing would be learnt"),
    (TrainConfig, "train", "batch_size", 0, "must be a number above 0"),
    (TrainConfig, "train", "micro_batch_size", 0, "must be a number above 0"),
    (TrainConfig, "train", "eval_every", 0, "must be a number above 0"),
    (TrainConfig, "train", "max_steps", 0, "Use null for what train.epochs says"),
    (TrainConfig, "train", "schedule", "cosin", "Choose one of: constant, linear, cosine"),
    (TrainConfig, "train", "warmup", 100, "It is a share of all steps"),
    (TrainConfig, "train", "max_grad_norm", 0.0, "1.0 is usual"),
    (TrainConfig, "train", "patience", 0, "It counts evaluations; null: to the end"),
    (TrainConfig, "train", "neftune_alpha", 0.0, "Use null to switch it off"),
    (SamplingConfig, "sampling", "temperature", 0.0, "must be above 0. PPO samples"),
    (SamplingConfig, "sampling", "max_new_tokens", 0, "Nothing would be sampled"),
    (SamplingConfig, "sampling", "batch_size", 0, "It counts sequences"),
    (SamplingConfig, "sampling", "top_k", 0, "Use null for all tokens"),
    (SamplingConfig, "sampling", "top_p", 0.0, r"must lie in \(0, 1\]"),
    (SamplingConfig, "sampling", "top_p", 1.1, r"must lie in \(0, 1\]"),
    (SamplingConfig, "sampling", "per_prompt", 0, "It counts answers"),
    (TrainConfig, "train", "save_every", 0, "It counts rows or steps"),
    (PPOConfig, "ppo", "eval_every", 0, "It counts something"),
    (PPOConfig, "ppo", "save_every", 0, "It counts something"),
    (PPOConfig, "ppo", "kl_budget", 0.0, "Use null for no limit"),
    *(
        (PPOConfig, "ppo", name, 0, "must be a number above 0")
        for name in ("steps", "batch_size", "micro_batch_size", "epochs", "minibatches")
    ),
    *(
        (PPOConfig, "ppo", name, 0.0, "must be a number above 0")
        for name in ("learning_rate", "critic_learning_rate", "max_grad_norm")
    ),
    (PPOConfig, "ppo", "cliprange", 0.0, "0.2 is usual"),
    (PPOConfig, "ppo", "cliprange_value", 0.0, "Use null to switch it off"),
    *((PPOConfig, "ppo", name, 1.1, "discounts the future") for name in ("gamma", "lam")),
    *((PPOConfig, "ppo", name, -0.1, "discounts the future") for name in ("gamma", "lam")),
    *(
        (PPOConfig, "ppo", name, -1, "0 switches it off")
        for name in ("kl_coef", "vf_coef", "missing_eos_penalty")
    ),
    (PPOConfig, "ppo", "schedule", "step", "Choose one of: constant, linear, cosine"),
    (PPOConfig, "ppo", "warmup", 1.5, "share of all optimizer steps"),
    (EvaluationConfig, "evaluation", "prompts", -1, "0 switches it off"),
    (EvaluationConfig, "evaluation", "samples", -1, "It counts answers"),
    (TrackingConfig, "tracking", "mode", "disabled", "auto, online, offline, off"),
    (CardConfig, "card", "probe_pairs", -1, "0 switches the probes off"),
    (CardConfig, "card", "bins", 0, "10 is usual"),
]


def test_an_empty_tag_is_refused():
    with pytest.raises(ConfigError, match=r"tracking\.tags=\['a', ''\]: W&B takes no empty tag"):
        TrackingConfig(tags=["a", ""])


@pytest.mark.parametrize(("kind", "group", "field", "value", "reason"), REFUSED)
def test_a_value_that_cannot_work_is_named_with_its_reason(kind, group, field, value, reason):
    with pytest.raises(ConfigError, match=rf"{group}\.{field}={value}.*{reason}"):
        kind(**{field: value})


def test_a_card_needs_flattery_and_other_models_once():
    with pytest.raises(ConfigError, match=r"card\.flattery=' ': .* language of the data"):
        CardConfig(flattery=" ")
    with pytest.raises(ConfigError, match=r"card\.agree_with=\[rm/a,rm/a\]: names a run twice"):
        CardConfig(agree_with=["rm/a", "rm/a"])


def floats(kind: type) -> list[str]:
    return [f.name for f in dataclasses.fields(kind) if f.type == "float"]


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (kind, field)
        for kind in (DataConfig, LoraConfig, TrainConfig, SamplingConfig, PPOConfig)
        for field in floats(kind)
    ],
)
def test_no_setting_takes_infinity_or_no_number(kind, field, value):
    with pytest.raises(ConfigError, match=rf"\.{field}={value}: must"):
        kind(**{field: value})


def test_a_batch_that_cannot_be_cut_names_both_settings():
    with pytest.raises(ConfigError, match=r"ppo\.batch_size=64 .* ppo\.minibatches=3 equal parts"):
        PPOConfig(minibatches=3)


def test_answers_to_a_prompt_must_divide_the_batch():
    kept: Any = stage(PPOStage, sampling=SamplingConfig(per_prompt=8))
    assert kept.sampling.per_prompt == 8
    with pytest.raises(ConfigError, match=r"ppo\.batch_size=64 .* sampling\.per_prompt=5 "):
        stage(PPOStage, sampling=SamplingConfig(per_prompt=5))


@pytest.mark.parametrize("kind", [SFTStage, RMStage, PPOStage])
@pytest.mark.parametrize("field", ["run", "run_name"])
@pytest.mark.parametrize(
    "name", ["a/b", "../a", "", ".", "-a", ".a", "a b", "ä", "a\n", "a\\b", "x" * 121]
)
def test_a_name_that_cannot_be_a_folder_is_refused(kind, field, name):
    with pytest.raises(ConfigError, match=rf"{field}=.*: cannot name a run\. It becomes a folder"):
        stage(kind, **{field: name})


@pytest.mark.parametrize("name", ["tiny", "kl01", "tldr-a", "0", "x" * 120, "a-kl_coef=0.1,seed=1"])
def test_a_name_that_can_be_a_folder_is_taken(name):
    assert stage(PPOStage, run_name=name).run_name == name


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_some_generator_would_refuse_is_refused_first(seed):
    with pytest.raises(ConfigError, match=rf"seed={seed}: must be a whole number from 0"):
        stage(SFTStage, seed=seed)
    assert stage(SFTStage, seed=0).seed == 0


@pytest.mark.parametrize("value", [-1.0, *NOT_FINITE])
def test_the_reward_models_centring_is_checked_after_what_every_stage_checks(value):
    with pytest.raises(ConfigError, match=rf"center_coef={value}: must lie in"):
        stage(RMStage, center_coef=value)
    with pytest.raises(ConfigError, match="cannot name a run"):
        stage(RMStage, run="a/b")


# What the docstrings say the literature gives; a default is not changed in passing.
N_PLUS = {
    "epochs": 4,
    "minibatches": 1,
    "kl_coef": 0.05,
    "gamma": 1.0,
    "lam": 0.95,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "whiten_advantages": True,
    "schedule": "linear",
}


def test_ppo_defaults_are_those_of_the_paper():
    assert {name: getattr(PPOConfig(), name) for name in N_PLUS} == N_PLUS


def test_a_nested_config_becomes_dotted_keys():
    nested = {"seed": 0, "ppo": {"kl_coef": 0.1, "deep": {"er": None}}, "empty": {}}
    assert flat(nested) == {
        "seed": 0,
        "ppo.kl_coef": 0.1,
        "ppo.deep.er": None,
        "empty": {},
    }


LIGHT = ["rlhf", "rlhf.config", "rlhf.registry", "rlhf.data", "rlhf.stage_run", "rlhf.guards"]
LIGHT += ["rlhf.launch", "rlhf.cli", "rlhf.run", "rlhf.contract", "rlhf.sharing", "rlhf.cleanup"]
LIGHT += ["rlhf.compare", "rlhf.adopt", "rlhf.inputs", "rlhf.state"]


def test_what_answers_fast_imports_nothing_heavy():
    """In one process, so that a failure names the first module that brought torch in."""
    code = (
        "import importlib, sys\n"
        f"for name in {LIGHT!r}:\n"
        "    importlib.import_module(name)\n"
        "    for heavy in ('torch', 'transformers', 'numpy', 'deepspeed', 'trl', 'wandb'):\n"
        "        assert heavy not in sys.modules, f'{name} imports {heavy}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
