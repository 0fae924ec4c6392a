"""Combinations of settings that are refused when the config is composed, before torch is imported.

Each rule says what is wrong, why, and the ways out; `rules` is the whole list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf.errors import ConfigError
from rlhf.methods.table import METHODS


@dataclass(frozen=True)
class Rule:
    """One combination that is refused.

    Attributes:
        name: shown in brackets, so that it can be searched for.
        refuses: the condition on a stage's config.
        message: what is set, why it cannot work, what to do; `{...}` is filled from the config.
        issues: public reports of what happens without this rule.
    """

    name: str
    refuses: Callable[[Any], bool]
    message: str
    issues: tuple[str, ...] = ()


RULES = (
    Rule(
        name="zero3-adapter",
        refuses=lambda cfg: cfg.engine.zero_stage == 3 and not METHODS[cfg.method.name].zero3,
        message=(
            "engine.zero_stage=3 with method={cfg.method.name}: ZeRO-3 splits every weight over "
            "the processes, and saving or merging an adapter without gathering them first writes "
            "empty tensors or the bare base model, with exit code 0. An adapter gains nothing from "
            "it: its optimizer state is small. Use engine=zero2, or train all weights with "
            "method=full."
        ),
        issues=("huggingface/peft#1328", "huggingface/peft#297", "hiyouga/LLaMA-Factory#1226"),
    ),
    Rule(
        name="ppo-dropout",
        refuses=lambda cfg: cfg.stage == "ppo" and getattr(cfg.method, "dropout", 0.0) > 0,
        message=(
            "method.dropout={cfg.method.dropout} in PPO: a training pass would not give the "
            "probabilities that were sampled, so the ratio would not be 1 before an update. Use "
            "method.dropout=0; dropout is fine in SFT and RM."
        ),
        issues=("CarperAI/trlx#508", "huggingface/trl#2358"),
    ),
    Rule(
        name="zero3-not-yet",
        refuses=lambda cfg: cfg.engine.zero_stage == 3,
        message=(
            "engine.zero_stage=3: sampling and publishing from weights that are split over the "
            "processes is not built yet. Use engine=zero2."
        ),
    ),
    Rule(
        name="offload-not-yet",
        refuses=lambda cfg: cfg.engine.offload,
        message=(
            "engine.offload=true: keeping optimizer states in host memory is not built yet. Use "
            "engine=zero2."
        ),
    ),
)


def check(cfg: Any) -> None:
    """Refuse what would silently train, save or merge the wrong thing.

    Raises:
        ConfigError: the first rule that the config breaks, by name.
    """
    for rule in RULES:
        if rule.refuses(cfg):
            raise ConfigError(f"[{rule.name}] {rule.message.format(cfg=cfg)}")
