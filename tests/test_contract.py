"""What must hold between two stages: each breach is refused by name, before a weight is loaded."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_registry import CONFIG, flip, no_waiting_for_the_disk, published, registry

from rlhf.config import CardConfig, DataConfig, EngineConfig, PPOStage, SamplingConfig, TrainConfig
from rlhf.contract import (
    Reading,
    card_notes,
    check_beginning,
    check_method,
    check_pair,
    check_positions,
    check_rows,
    parent,
    ppo_parents,
    sibling_notes,
    siblings,
)
from rlhf.data import Split
from rlhf.errors import ConfigError, RegistryError
from rlhf.manifest import BaseModel, CardFacts, TokenizerFacts
from rlhf.methods.settings import (
    BottleneckConfig,
    LoraConfig,
    MethodConfig,
    PrefixConfig,
    PromptConfig,
)
from rlhf.registry import Published, Registry

__all__ = ["no_waiting_for_the_disk", "registry"]


def test_fewer_rows_than_a_step_takes_are_refused():
    cfg, rows = TrainConfig(batch_size=4, micro_batch_size=2), [{}] * 4
    split = Split("train", "a/train.jsonl", "f", rows, Counter())
    check_rows(cfg, split)
    split.rows = rows[:3]
    with pytest.raises(ConfigError, match=r"train\.batch_size=4 with 3 rows .* lower one\.$"):
        check_rows(cfg, split)


HOULSBY = {"name": "houlsby", "adapter_chain": [], "size": 64, "activation": "gelu"}
PROMPT = {"name": "prompt_tuning", "adapter_chain": [], "tokens": 20}


@pytest.mark.parametrize(
    ("made", "method", "message"),
    [
        (HOULSBY, BottleneckConfig(), None),
        (HOULSBY, LoraConfig(), r"method=lora: sft/tiny was trained by method=houlsby, which"),
        (HOULSBY, BottleneckConfig("pfeiffer"), r"method=pfeiffer: .* Use method=houlsby, which"),
        (HOULSBY, BottleneckConfig(size=32), r"method\.size=32: .*size=64\. Set method\.size=64"),
        (PROMPT, PromptConfig(), None),
        (PROMPT, PromptConfig(tokens=8), r"method\.tokens=8: .* has tokens=20\."),
        ({"name": "lora", "adapter_chain": [], "rank": 4}, PrefixConfig(), None),  # merged
    ],
)
def test_an_adapter_that_cannot_be_merged_goes_on_or_is_refused(
    registry: Registry, made: dict[str, Any], method: MethodConfig, message: str | None
):
    sft = published(registry, method=made)
    if message is None:
        check_method(sft, method)
        return
    with pytest.raises(ConfigError, match=message):
        check_method(sft, method)


@pytest.mark.parametrize(("sft_by", "rm_by"), [("lora", "prompt"), ("prompt", "lora")])
def test_ppo_begins_with_a_prompt_only_where_both_parents_have_one(
    registry: Registry, sft_by: str, rm_by: str
):
    made = {"lora": {"name": "lora", "adapter_chain": []}, "prompt": PROMPT}
    sft = published(registry, method=made[sft_by])
    published(registry, "rm/tiny", {"policy": sft}, method=made[rm_by])
    parents = ppo_parents(registry, "sft/tiny", ["rm/tiny"], reading(cfg()))
    off = "sft" if sft_by == "lora" else "rm"
    with pytest.raises(
        ConfigError, match=rf"method=prompt_tuning on {off}/tiny, which was trained by method=lora"
    ):
        check_beginning(*parents, PromptConfig(), EngineConfig(), share_backbone=None)


def reading(cfg: PPOStage) -> Reading:
    return Reading(cfg.data.max_prompt_tokens, cfg.sampling.max_new_tokens, cfg.allow_foreign_rm)


def cfg(*, prompt: int = 64, answer: int = 64, allow_foreign_rm: bool = False) -> PPOStage:
    return PPOStage(
        run_name="tiny",
        allow_foreign_rm=allow_foreign_rm,
        data=DataConfig("rows.jsonl", max_prompt_tokens=prompt),
        sampling=SamplingConfig(max_new_tokens=answer),
    )


@pytest.fixture
def pair(registry: Registry) -> tuple[Published, Published]:
    sft = published(registry)
    return sft, published(registry, "rm/tiny", {"policy": sft})


@pytest.mark.parametrize("allow_foreign_rm", [False, True])
def test_reward_model_of_this_line_is_accepted(
    pair: tuple[Published, Published], allow_foreign_rm: bool
):
    check_pair(*pair, reading(cfg(allow_foreign_rm=allow_foreign_rm)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokenizer": TokenizerFacts("tokenizer-2", "template-1", 0, 2)}, "tokenizer"),
        ({"tokenizer": TokenizerFacts("tokenizer-1", "template-2", 0, 2)}, "template"),
        ({"base": BaseModel("tiny-base", None, "base-2")}, "base"),
    ],
)
@pytest.mark.parametrize("allow_foreign_rm", [False, True])
def test_reward_model_that_reads_something_else_is_refused(
    registry: Registry, change: dict[str, Any], named: str, allow_foreign_rm: bool
):
    """Another base may be asked for; another text may not, since ids are handed over."""
    sft = published(registry)
    rm = published(registry, "rm/tiny", {"policy": sft}, **change)
    if named == "base" and allow_foreign_rm:
        check_pair(sft, rm, reading(cfg(allow_foreign_rm=True)))
        return
    with pytest.raises(RegistryError, match=r"make rm RUN=tiny") as caught:
        check_pair(sft, rm, reading(cfg(allow_foreign_rm=allow_foreign_rm)))
    message = str(caught.value)
    assert f"{named}-1 and {named}-2" in message
    assert "sft/tiny and rm/tiny differ" in message
    others = {"tokenizer", "template", "base"} - {named}
    assert not any(f"{other}-1 and" in message for other in others)


def test_all_differences_are_named_at_once(registry: Registry):
    sft = published(registry)
    rm = published(
        registry,
        "rm/tiny",
        {"policy": sft},
        tokenizer=TokenizerFacts("tokenizer-2", "template-2", 0, 2),
        base=BaseModel("other", None, "base-2"),
    )
    with pytest.raises(RegistryError) as caught:
        check_pair(sft, rm, reading(cfg()))
    assert len(str(caught.value).splitlines()) == 5


def test_reward_model_of_another_line_needs_permission(registry: Registry):
    sft, other = published(registry), published(registry, "sft/other")
    rm = published(registry, "rm/other", {"policy": other})
    message = r"rm/other was trained from sft/other, the policy is sft/tiny.*allow_foreign_rm=true"
    with pytest.raises(RegistryError, match=message):
        check_pair(sft, rm, reading(cfg()))
    check_pair(sft, rm, reading(cfg(allow_foreign_rm=True)))


def test_reward_model_of_an_earlier_run_of_the_same_name_needs_permission(registry: Registry):
    rm = published(registry, "rm/tiny", {"policy": published(registry)})
    again = published(registry, overwrite=True, metrics={"eval/loss": 0.1})
    with pytest.raises(RegistryError, match="trained from an earlier sft/tiny"):
        check_pair(again, rm, reading(cfg()))
    with pytest.raises(RegistryError, match="no SFT run of this registry"):
        check_pair(again, published(registry, "rm/adopted"), reading(cfg()))


# ---------------------------------------------------------------- report cards


def card(*agree_with: str, enabled: bool = True) -> CardConfig:
    return CardConfig(enabled=enabled, agree_with=list(agree_with))


def test_a_card_compares_with_reward_models_of_the_same_sft_run(registry: Registry):
    sft, other = published(registry), published(registry, "sft/other")
    a, b = (published(registry, name, {"policy": sft}) for name in ("rm/a", "rm/b"))
    published(registry, "rm/tiny", {"policy": sft})
    published(registry, "rm/other", {"policy": other})
    assert siblings(registry, sft, card("rm/a", "rm/b"), run_name="tiny") == [a, b]
    assert siblings(registry, sft, card(), run_name="tiny") == []
    assert siblings(registry, sft, card("rm/none", enabled=False), run_name="tiny") == []
    with pytest.raises(ConfigError, match=r"agree_with: rm/other was not trained from sft/tiny"):
        siblings(registry, sft, card("rm/other"), run_name="tiny")
    with pytest.raises(ConfigError, match=r"agree_with: rm/tiny is the run that is being made"):
        siblings(registry, sft, card("rm/tiny"), run_name="tiny")
    with pytest.raises(ConfigError, match=r"card\.agree_with=sft/tiny: a run of stage sft cannot"):
        siblings(registry, sft, card("sft/tiny"), run_name="tiny")
    with pytest.raises(RegistryError, match="rm/none: no such run"):
        siblings(registry, sft, card("rm/none"), run_name="tiny")


def test_other_seeds_that_are_there_are_named(registry: Registry):
    sft, other = published(registry), published(registry, "sft/other")
    assert sibling_notes(registry, sft, card(), run_name="tiny") == []
    for name, parent_run in (("rm/b", sft), ("rm/a", sft), ("rm/tiny", sft), ("rm/other", other)):
        published(registry, name, {"policy": parent_run})
    (note,) = sibling_notes(registry, sft, card(), run_name="tiny")
    assert note.startswith("trained from sft/tiny too: rm/a, rm/b. card.agree_with=[rm/a,rm/b] ")
    assert sibling_notes(registry, sft, card("rm/a"), run_name="tiny") == []
    assert sibling_notes(registry, sft, card(enabled=False), run_name="tiny") == []


def test_ppo_says_what_the_reward_models_cards_say(registry: Registry):
    sft = published(registry)
    cards = {
        "go": CardFacts("go", []),
        "caution": CardFacts("caution", ["this", "and that"]),
        "bad": CardFacts("no-go", ["length alone"]),
        "none": None,
    }
    rms = [published(registry, f"rm/{n}", {"policy": sft}, card=c) for n, c in cards.items()]
    assert card_notes(rms) == [
        "reward model rm/go: GO",
        "reward model rm/caution: CAUTION\n  - this\n  - and that",
        "reward model rm/bad: NO-GO: PPO will climb a score that does not show which answer people "
        "prefer\n  - length alone",
        "reward model rm/none: it has no report card, so what it goes by is unknown",
    ]
    step = dataclasses.replace(rms[0], reference="rm/go@step-000040", model_dir=sft.path / "x")
    assert card_notes([step]) == ["reward model rm/go@step-000040 (card of rm/go): GO"]


# ---------------------------------------------------------------- lengths


def test_texts_longer_than_the_reward_model_saw_are_refused(registry: Registry):
    sft = published(registry)
    limits = {"columns": {}, "max_prompt_tokens": 64, "max_response_tokens": 80}
    rm = published(registry, "rm/tiny", {"policy": sft}, config=CONFIG | {"data": limits})
    check_pair(sft, rm, reading(cfg(prompt=64, answer=80)))
    with pytest.raises(ConfigError, match=r"data\.max_prompt_tokens=65: rm/tiny was .*=64"):
        check_pair(sft, rm, reading(cfg(prompt=65, answer=80)))
    with pytest.raises(ConfigError, match=r"sampling\.max_new_tokens=81: .*max_response_tokens=80"):
        check_pair(sft, rm, reading(cfg(prompt=64, answer=81)))


def test_texts_longer_than_the_positions_are_refused(registry: Registry):
    sft = published(registry)
    (sft.model_dir / "config.json").write_text(json.dumps({"max_position_embeddings": 128}))
    check_positions(sft, 128, "data.x")
    with pytest.raises(ConfigError, match=r"129 tokens.*positions for 128\. Lower data\.x\."):
        check_positions(sft, 129, "data.x")
    (sft.model_dir / "config.json").write_text("{}")  # positions without end
    check_positions(sft, 10_000, "data.x")


# ---------------------------------------------------------------- what may be a parent


def test_a_sound_parent_is_taken(registry: Registry):
    sft = published(registry)
    assert parent(registry, "policy_from", "sft/tiny") == sft


@pytest.mark.parametrize(
    ("setting", "reference"),
    [("policy_from", "rm/tiny"), ("rm_from", "sft/tiny"), ("rm_from", "ppo/tiny")],
)
def test_a_run_of_another_stage_is_refused(registry: Registry, setting: str, reference: str):
    with pytest.raises(ConfigError, match=f"{setting}={reference}: a run of stage"):
        parent(registry, setting, reference)


def test_a_method_this_version_lacks_is_refused(registry: Registry):
    published(registry, method={"name": "hypernet"})
    with pytest.raises(RegistryError, match=r"sft/tiny: made by method=hypernet.*Install"):
        parent(registry, "policy_from", "sft/tiny")


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "samples.jsonl", "model/model.safetensors"]
)
def test_a_parent_with_a_flipped_byte_is_refused(registry: Registry, name: str):
    made = published(registry)
    flip(made.path / name, 0)
    with pytest.raises(RegistryError, match=rf"sft/tiny: damaged.*\n  {name}: sha256 differs"):
        parent(registry, "policy_from", "sft/tiny")


def test_the_stage_may_start_from_a_parent_on_a_read_only_disk(registry: Registry, tmp_path: Path):
    published(registry)
    for path in (registry.runs_dir, *registry.runs_dir.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert parent(registry, "policy_from", "sft/tiny").reference == "sft/tiny"
    finally:
        for path in (registry.runs_dir, *registry.runs_dir.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
