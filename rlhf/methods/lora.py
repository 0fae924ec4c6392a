"""Low-rank adapters (Hu et al. 2021), by peft."""

from __future__ import annotations

import peft
from torch import nn

from rlhf.config import LoraConfig
from rlhf.errors import ConfigError


def attach(model: nn.Module, cfg: LoraConfig, *, head: bool) -> nn.Module:
    """Freeze `model` and add adapters whose output is zero at first.

    Args:
        model: a transformers model.
        cfg: the `method` settings.
        head: the model ends in a scalar head (`score`), which is then trained in full.

    Raises:
        ConfigError: `method.targets` matches no layer.
    """
    targets = cfg.targets if cfg.targets == "all-linear" else cfg.targets.split(",")
    peft_config = peft.LoraConfig(
        r=cfg.rank,
        lora_alpha=cfg.alpha,  # type: ignore[arg-type]  # peft divides it, so any number does
        lora_dropout=cfg.dropout,
        target_modules=targets,
        task_type=peft.TaskType.SEQ_CLS if head else peft.TaskType.CAUSAL_LM,
    )
    try:
        return peft.get_peft_model(model, peft_config)
    except ValueError as error:
        linear = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        raise ConfigError(
            f"method.targets={cfg.targets}: no adapter could be placed: {error} Linear layers of "
            f"this model: {', '.join(sorted(linear))}."
        ) from error
