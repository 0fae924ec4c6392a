"""Every file in conf/ composes, and says what the dataclasses say unless it means not to."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf import config, guards, launch
from rlhf.config import CONF, SCHEMAS
from rlhf.errors import ConfigError
from rlhf.manifest import flat
from rlhf.methods.settings import METHOD_SETTINGS

GROUPS = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
    for folder in sorted(CONF.iterdir())
    if folder.is_dir()
}
# What a stage needs where no preset gives it.
NEEDED = {
    "sft": ["experiment=none", "data.path=rows", "model.path=base"],
    "rm": ["experiment=none", "data.path=rows"],
    "ppo": ["experiment=none", "data.path=rows"],
}
PRESETS = {"tiny_sft": "sft", "tiny_rm": "rm", "tiny_ppo": "ppo"}

# Where a group of conf/ means to differ from the dataclass: (file, setting) -> value. Presets
# (experiment/) are there to differ.
DELIBERATE: dict[tuple[str, str], Any] = {
    ("method/qlora", "quantization"): "nf4",
    ("engine/zero0", "zero_stage"): 0,
    ("engine/zero1", "zero_stage"): 1,
    ("engine/zero3", "zero_stage"): 3,
    ("engine/zero3_offload", "zero_stage"): 3,
    ("engine/zero3_offload", "offload"): True,
    ("engine/zero2_offload", "offload"): True,
    ("tracking/off", "mode"): "off",
    ("data/tiny", "max_prompt_tokens"): 64,
    ("data/tiny", "max_response_tokens"): 80,
}


def values(file: Path) -> dict[str, Any]:
    """What a file of conf/ sets, as dotted keys."""
    written = yaml.safe_load(file.read_text())
    written.pop("defaults", None)
    return flat(written) if written else {}


@pytest.fixture
def compose(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """`compose("ppo", "ppo.kl_coef=0.1")`, as the command line does it, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def one(stage: str, *overrides: str) -> Any:
        monkeypatch.setattr(sys, "argv", [f"{stage}.py", *overrides])
        return launch.compose(stage)

    return one


# ---------------------------------------------------------------- everything composes


@pytest.mark.parametrize("stage", SCHEMAS)
def test_a_stage_composes_as_it_is(compose, stage):
    cfg = compose(stage)
    assert type(cfg) is SCHEMAS[stage]
    assert (cfg.stage, cfg.run, cfg.run_name, cfg.runs_dir) == (stage, "tiny", "tiny", "runs")
    guards.check(cfg)
    assert Path(cfg.data.path) == CONF.parent / "data" / "tiny" / stage
    assert os.listdir() == []


@pytest.mark.parametrize("stage", SCHEMAS)
def test_a_stage_composes_without_a_preset(compose, stage):
    cfg = compose(stage, *NEEDED[stage])
    assert cfg.data == config.DataConfig("rows")
    loop = cfg.ppo if stage == "ppo" else cfg.train
    assert loop == type(loop)()


def choices_of(stage: str) -> dict[str, list[str]]:
    fields = {field.name for field in dataclasses.fields(SCHEMAS[stage])}
    return {group: choices for group, choices in GROUPS.items() if group in fields}


def dealt(stage: str) -> dict[str, list[str]]:
    """The choices that a stage tries: all, but a third of the methods, which all stages share."""
    number = list(SCHEMAS).index(stage)
    found = choices_of(stage)
    return found | {"method": found["method"][number :: len(SCHEMAS)]}


# Composing takes a quarter of a second, so each takes one choice of every group at a time.
ROUNDS = [
    (stage, {group: choices[turn % len(choices)] for group, choices in dealt(stage).items()})
    for stage in SCHEMAS
    for turn in range(max(map(len, dealt(stage).values())))
]


@pytest.mark.parametrize(("stage", "chosen"), ROUNDS)
def test_every_choice_of_every_group_composes(compose, stage, chosen):
    needed = [item for item in NEEDED[stage] if chosen.get(item.split(".")[0]) != "tiny"]
    if chosen.get("reward") == "function":
        needed.append("reward.function=own.py:f")
    cfg = compose(stage, *needed, *(f"{group}={choice}" for group, choice in chosen.items()))
    for group, choice in chosen.items():
        composed = flat(dataclasses.asdict(getattr(cfg, group)))
        for key, value in values(CONF / group / f"{choice}.yaml").items():
            assert composed[key] == value or "${" in str(value), f"{group}={choice}: {key}"
        if group in ("method", "template"):
            assert composed["name"] == choice


def test_every_group_and_preset_is_met_by_a_test_above():
    met = {(group, choice) for _, chosen in ROUNDS for group, choice in chosen.items()}
    files = {(file.parent.name, file.stem) for file in CONF.glob("*/*.yaml")}
    assert files - met == {("experiment", name) for name in (*PRESETS, "none")}
    assert {file.stem for file in CONF.glob("*.yaml")} == set(SCHEMAS)


@pytest.mark.parametrize(("preset", "stage"), PRESETS.items())
def test_every_preset_composes_and_wins_over_the_groups(compose, preset, stage):
    cfg = flat(dataclasses.asdict(compose(stage, f"experiment={preset}")))
    for key, value in values(CONF / "experiment" / f"{preset}.yaml").items():
        assert cfg[key] == pytest.approx(float(value))


def test_the_command_line_wins_over_the_preset(compose):
    ppo = compose("ppo", "ppo.steps=3", "ppo.learning_rate=1e-6").ppo
    assert (ppo.steps, ppo.learning_rate) == (3, 1e-6)


# ---------------------------------------------------------------- conf/ against the dataclasses


def defaults(file: Path) -> dict[str, Any]:
    """What the dataclass behind a file of conf/ says, as dotted keys."""
    if file.parent.name == "experiment":
        stage = PRESETS.get(file.stem, "sft")
        loop = {"ppo": config.PPOConfig()} if stage == "ppo" else {"train": config.TrainConfig()}
        schema = {key: dataclasses.asdict(value) for key, value in loop.items()}
        return flat(schema | {"sampling": dataclasses.asdict(config.SamplingConfig())})
    method = file.parent.name == "method"
    kind = METHOD_SETTINGS[file.stem] if method else config.GROUPS[file.parent.name]
    return {f.name: f.default for f in dataclasses.fields(kind)}


@pytest.mark.parametrize(
    "file",
    sorted(f for f in CONF.glob("*/*.yaml") if f.parent.name not in ("experiment", "reward")),
    ids=lambda f: f"{f.parent.stem}/{f.stem}",
)
def test_a_value_in_conf_equals_its_dataclass_or_is_listed_as_deliberate(file):
    place = f"{file.parent.name}/{file.stem}"
    known = defaults(file)
    for key, value in values(file).items():
        default = known[key]
        if default in (config.MISSING, None) or key in ("name", "chat_template", "tokens"):
            continue  # nothing to differ from
        meant = DELIBERATE.get((place, key), default)
        assert float(value) == meant if isinstance(meant, float) else value == meant, key


def test_no_deliberate_difference_is_listed_that_is_none():
    for place, key in DELIBERATE:
        file = CONF / f"{place}.yaml"
        assert key in values(file), (place, key)
        assert DELIBERATE[place, key] != defaults(file)[key], (place, key)


@pytest.mark.parametrize("stage", SCHEMAS)
def test_the_stage_files_hold_choices_and_no_values(stage):
    written = yaml.safe_load((CONF / f"{stage}.yaml").read_text())
    assert set(written) == {"defaults", "hydra"}
    assert written["hydra"] == {"run": {"dir": "."}, "output_subdir": None}
    assert "_self_" in written["defaults"]
    assert written["defaults"][0] == f"{stage}_schema"


@pytest.mark.parametrize(
    "file", sorted(CONF.glob("*/*.yaml")), ids=lambda f: f"{f.parent.stem}/{f.stem}"
)
def test_every_choice_heads_its_list_with_its_schema(file):
    written = yaml.safe_load(file.read_text())
    if file.parent.name != "experiment":
        method = file.parent.name == "method"
        schema = f"{file.stem if method else file.parent.name}_schema"
        assert written["defaults"] == [schema]


# ---------------------------------------------------------------- names that follow other names


def test_parents_follow_the_line_of_work(compose):
    cfg = compose("ppo", "run=tldr-a", "run_name=kl01")
    assert (cfg.run_name, cfg.policy_from, cfg.rm_from) == ("kl01", "sft/tldr-a", "rm/tldr-a")
    cfg = compose("rm", "run=tldr-a")
    assert (cfg.run_name, cfg.policy_from) == ("tldr-a", "sft/tldr-a")
    assert compose("ppo", "rm_from=rm/other").policy_from == "sft/tiny"


def test_a_name_of_digits_stays_a_name(compose):
    assert compose("ppo", "run=007").run_name == "007"


def test_the_runs_folder_can_come_from_the_environment(compose, monkeypatch):
    monkeypatch.setenv("RLHF_RUNS", "elsewhere")
    assert compose("sft").runs_dir == "elsewhere"
    assert compose("sft", "runs_dir=here").runs_dir == "here"


def test_the_tiny_world_is_found_from_any_folder(compose):
    cfg = compose("sft")
    assert (Path(cfg.data.path) / "train.jsonl").is_file()
    assert (Path(cfg.model.path) / "config.json").is_file()
    assert Path(cfg.data.gold.rpartition(":")[0]).is_file()


def test_the_plain_template_reads_prompt_newline_answer():
    template = yaml.safe_load((CONF / "template" / "plain.yaml").read_text())["chat_template"]
    from jinja2 import Template

    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    text = Template(template).render(messages=turns, bos_token="[B]", eos_token="[E]")
    assert text == "[B]Hi\nHello.[E]"


# ---------------------------------------------------------------- what nobody knows is refused

UNKNOWN = [
    ("ppo", "ppo.kl_coeff=0.1", r"ppo\.kl_coeff: .* Did you mean ppo\.kl_coef\b"),
    ("ppo", "+ppo.kl_coeff=0.1", r"ppo\.kl_coeff: .* Did you mean ppo\.kl_coef\b"),
    ("ppo", "++ppo.kl_coeff=0.1", r"ppo\.kl_coeff: .* Did you mean ppo\.kl_coef\b"),
    ("ppo", "kl_coef=0.1", r"kl_coef: .* Did you mean ppo\.kl_coef\?"),
    ("ppo", "+anything=1", r"anything: the ppo stage has no such setting"),
    ("ppo", "++anything.at.all=1", r"anything: the ppo stage has no such setting"),
    ("ppo", "+data.columns.promt=q", r"data\.columns\.promt: .* mean data\.columns\.prompt"),
    ("ppo", "engin=zero2", r"engin: .* Did you mean engine\?"),
    ("ppo", "run_nam=a", r"run_nam: .* Did you mean run_name"),
    ("sft", "train.epoch=1", r"train\.epoch: .* Did you mean train\.epochs"),
    ("sft", "model.pth=x", r"model\.pth: .* Did you mean model\.path"),
    ("ppo", "train.epochs=1", r"train: the ppo stage has no such setting"),
    ("rm", "ppo.steps=1", r"ppo: the rm stage has no such setting"),
    ("sft", "policy_from=sft/a", r"policy_from: the sft stage has no such setting"),
    ("rm", "rm_from=rm/a", r"rm_from: the rm stage has no such setting"),
]


@pytest.mark.parametrize(("stage", "override", "message"), UNKNOWN)
def test_a_setting_that_no_dataclass_knows_is_refused_with_its_near_misses(
    compose, stage, override, message
):
    with pytest.raises(ConfigError, match=message):
        compose(stage, override)


def test_a_setting_of_another_choice_says_so(compose):
    assert compose("ppo", "method=lora", "method.rank=4").method.rank == 4
    for given in ("method.rank=4", "+method.rank=4"):
        with pytest.raises(ConfigError, match=r"method\.rank: .* another choice of method"):
            compose("ppo", "method=full", given)


UNFIT = [
    ("ppo.kl_coef=abc", r"ppo\.kl_coef: Value 'abc' .* Float"),
    ("ppo.kl_coef=", r"ppo\.kl_coef: Value ''"),
    ("ppo.steps=0.5", r"ppo\.steps: Value '0\.5' .* Integer"),
    ("ppo.steps=null", r"ppo\.steps: .* not Optional"),
    ("ppo.steps=true", r"ppo\.steps: Value 'True' .* Integer"),
    ("seed=zero", r"seed: Value 'zero' .* Integer"),
    ("engine.offload=maybe", r"engine\.offload: Value 'maybe' is not a valid bool"),
    ("ppo=3", r"ppo: Invalid type assigned: int"),
    ("data.path=null", r"data\.path: .* not Optional"),
    ("engine=zero9", r"engine=zero9: no such choice\. Choose one of: zero0, .*zero3_offload"),
    ("method=lroa", r"method=lroa: no such choice\. Choose one of: adalora, .*full"),
    ("experiment=tiny", r"experiment=tiny: no such choice\. .* none, tiny_ppo, tiny_rm, tiny_sft"),
    ("experiment=tiny_sft", r"experiment/tiny_sft"),
    ("ppo.kl_coef=[1", r"given: ppo\.kl_coef=\[1"),
    ("ppo.kl_coef", r"Overrides look like key=value; given: ppo\.kl_coef"),
    ("ppo.kl_coef=0,0.1", r"(?s)ppo\.kl_coef=0,0\.1.*quote the value.*--multirun"),
    ("run_name=${nope}", r"run_name: Interpolation key 'nope' not found"),
    ("run_name=${oc.env:NO_SUCH_NAME}", r"run_name: .*NO_SUCH_NAME"),
    ("run=???", r"run\b.*missing|Missing"),
    ("~engine", r"engine: not set, and there is no default\. Add engine=\.\.\."),
    ("~ppo.kl_coef", r"ppo\.kl_coef: .*does not support deletion"),
    ("+engine=zero1", r"engine"),
    ("stage=sft", r"stage=sft: this is the ppo stage\. Run stages/sft\.py"),
    ("--config-name=sft", r"this is the ppo stage"),
    ("method.name=full", r"method\.name=full: .*lora"),
    ("ppo.kl_coef=-1", r"ppo\.kl_coef=-1\.0: must lie in"),
    ("ppo.kl_coef=1e999", r"ppo\.kl_coef=inf: must lie in"),
    ("run_name=a/b", r"run_name='a/b': cannot name a run"),
]


@pytest.mark.parametrize(("override", "message"), UNFIT)
def test_a_value_that_does_not_fit_is_refused_by_name(compose, override, message):
    with pytest.raises(ConfigError, match=message):
        compose("ppo", override)


@pytest.mark.parametrize(
    ("stage", "names"), [("sft", ["data.path", "model.path"]), ("ppo", ["data.path"])]
)
def test_missing_values_are_named_all_at_once_with_the_way_to_give_them(compose, stage, names):
    with pytest.raises(ConfigError) as caught:
        compose(stage, "experiment=none")
    assert str(caught.value).startswith(f"{', '.join(names)}: not set")
    assert str(caught.value).endswith(" ".join(f"{name}=..." for name in names))


def test_a_refusal_is_one_line(compose):
    with pytest.raises(ConfigError) as caught:
        compose("ppo", "ppo.kl_coef=abc")
    assert "\n" not in str(caught.value)
    assert "full_key" not in str(caught.value)


def test_every_setting_of_a_stage_is_known_to_the_near_misses(compose):
    for stage in SCHEMAS:
        composed = {
            key
            for key in flat(dataclasses.asdict(compose(stage)))
            if not re.match(r"reward\.(models|functions|weights)\.", key)  # names of the user's
        }
        assert composed <= set(launch.known_keys(stage))


# ---------------------------------------------------------------- rewards


@pytest.mark.parametrize(
    ("given", "models", "functions", "weights"),
    [
        ([], {"rm": ["rm/tiny"]}, [], {"rm": 1.0}),
        (["rm_from=rm/a"], {"rm": ["rm/a"]}, [], {"rm": 1.0}),
        (["reward=function", "reward.function=a.py:f"], {}, ["function"], {"function": 1.0}),
        (
            ["reward.function=a.py:f", "+reward.weights.function=0.5"],
            {"rm": ["rm/tiny"]},
            ["function"],
            {"rm": 1.0, "function": 0.5},
        ),
        (
            ["reward.models.rm=[rm/a,rm/b]", "reward.ensemble=lower", "reward.weights.rm=2"],
            {"rm": ["rm/a", "rm/b"]},
            [],
            {"rm": 2.0},
        ),
        (
            ["+reward.models.harm=[rm/b]", "+reward.functions.brief=a.py:f"],
            {"rm": ["rm/tiny"], "harm": ["rm/b"]},
            ["brief"],
            {"rm": 1.0},
        ),
    ],
)
def test_a_reward_is_put_together_on_the_command_line(compose, given, models, functions, weights):
    reward = compose("ppo", *given).reward
    assert type(reward) is config.RewardConfig
    assert (reward.models, list(reward.named_functions)) == (models, functions)
    assert reward.weights == weights


@pytest.mark.parametrize("path", ["own.py:f", "to/own.py:f", "/to/own.py:f"])
def test_a_function_in_the_place_of_a_choice_says_how_it_is_written(compose, path):
    match = f"reward={path}: .*function, rm. Write reward=function reward.function={path}"
    with pytest.raises(ConfigError, match=match):
        compose("ppo", f"reward={path}")
