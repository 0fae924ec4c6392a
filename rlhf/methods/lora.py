"""The low-rank family (Hu et al. 2021) and the two of vectors, VeRA and IA3, by peft.

Two of them need more than peft's own files to be right. PiSSA takes what its adapter starts from
out of the base, so here what is saved is the difference: an ordinary LoRA of twice the rank, on
the base as it was. AdaLoRA may prune a layer to rank 0, which no file of tensors should hold.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf import libraries
from rlhf.errors import ConfigError
from rlhf.methods import lora_drop
from rlhf.methods import tokens as new_tokens
from rlhf.methods.settings import (
    ADAPTER,
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    LoraPlusConfig,
    MethodConfig,
    PhasedLoraConfig,
    VeraConfig,
)

Family = LoraConfig | VeraConfig | IA3Config

WEIGHTS = "adapter_model.safetensors"
_TRIPLE = ("lora_A", "lora_B", "lora_E")  # what AdaLoRA's adapter of a layer has


def changed() -> Iterator[str]:
    """What the low-rank family relies on in peft, and is not there: lines."""
    yield from libraries.unmentioned(LoraLayer, "lora_A", "lora_B", "scaling")
    yield from libraries.unmentioned(AdaLoraLayer, "lora_A", "lora_B", "lora_E")
    yield from libraries.unmentioned(peft.AdaLoraModel, "rankallocator", "update_and_allocate")
    yield from libraries.unmentioned(new_tokens.TrainableTokensWrapper, "token_adapter")
    yield from libraries.refusing(
        peft.LoraConfig.__init__,
        *("use_rslora", "use_dora", "init_lora_weights", "trainable_token_indices"),
    )


# ---------------------------------------------------------------- on a model


def attach(
    model: PreTrainedModel,
    cfg: Family,
    *,
    head: bool,
    steps: int | None = None,
    tokens: Collection[int] = (),
) -> peft.PeftModel:
    """Freeze `model` and put a fresh adapter on it; its outputs are unchanged at first.

    PiSSA moves a part of each weight into the adapter, so the base alone is another model then.

    Args:
        cfg: the `method` settings.
        head: the model ends in a scalar head (`score`), which is then trained in full.
        steps: optimizer steps there will be, which adalora spreads its pruning over.
        tokens: ids whose rows of embedding and head are trained too; see `tokens.py`.

    Raises:
        ConfigError: `method.targets` matches no layer, or the settings cannot work on this model.
    """
    _refuse_unknown(model, cfg)
    try:
        config: Any = _peft_config(model, cfg, head=head, steps=steps)
        if tokens:
            config.trainable_token_indices = new_tokens.layers(model, tokens)
        out = peft.get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(
            f"method.targets={cfg.targets}: no adapter could be placed: {error} Linear layers of "
            f"this model: {', '.join(sorted(_linear(model)))}."
        ) from error
    assert isinstance(out, peft.PeftModel)
    if isinstance(cfg, LoraConfig) and cfg.name == "pissa":
        _refuse_wide(out, cfg.rank)
        out.pissa_start = pissa_start(out)  # type: ignore[assignment]
    new_tokens.mend(out)
    settle(out, cfg)
    return out


def _peft_config(
    model: PreTrainedModel, cfg: Family, *, head: bool, steps: int | None
) -> peft.PeftConfig:
    task = peft.TaskType.SEQ_CLS if head else peft.TaskType.CAUSAL_LM
    common: dict[str, Any] = {"target_modules": _targets(cfg), "task_type": task}
    if isinstance(cfg, IA3Config):
        targets, inner = _ia3_layers(model, cfg)
        common["target_modules"] = targets
        return peft.IA3Config(**common, feedforward_modules=inner)
    if isinstance(cfg, VeraConfig):
        return peft.VeraConfig(
            **common,
            r=cfg.rank,
            vera_dropout=cfg.dropout,
            d_initial=cfg.d_initial,
            save_projection=False,  # its key makes the same matrices again
        )
    common |= {"lora_alpha": cfg.alpha, "lora_dropout": cfg.dropout}
    if isinstance(cfg, AdaLoraConfig):
        return peft.AdaLoraConfig(**common, **_pruning(cfg, steps))
    phases = cfg.phases if isinstance(cfg, PhasedLoraConfig) else 1
    common["lora_alpha"] *= phases  # so that the scale is that of one phase
    return peft.LoraConfig(
        **common,
        r=cfg.rank * phases,
        use_rslora=cfg.name == "rslora",
        use_dora=cfg.name == "dora",
        init_lora_weights="pissa" if cfg.name == "pissa" else True,
    )


def _pruning(cfg: AdaLoraConfig, steps: int | None) -> dict[str, Any]:
    """How peft names the course of ranks."""
    if steps is None:
        raise ConfigError(
            "method.name=adalora: its pruning is spread over the steps of supervised training, and "
            "here their number is not known. Use method=lora."
        )
    start = cfg.initial_rank if cfg.initial_rank is not None else math.ceil(1.5 * cfg.rank)
    if start <= cfg.rank:
        raise ConfigError(
            f"method.initial_rank={start} with method.rank={cfg.rank}: there would be nothing to "
            "prune. Use null for 1.5 times method.rank, or method=lora."
        )
    begin, end = round(cfg.begin * steps), round(cfg.end * steps)
    if begin >= end:
        raise ConfigError(
            f"method.begin={cfg.begin} and method.end={cfg.end}: of {steps} optimizer steps none "
            "lies between them, so ranks would never be pruned. Put them further apart, or train "
            "longer."
        )
    return {
        "target_r": cfg.rank,
        "init_r": start,
        "tinit": begin,
        "tfinal": steps - end,
        "deltaT": cfg.every,
        "total_step": steps,
        "orth_reg_weight": cfg.orthogonality,
    }


def _targets(cfg: Family) -> str | list[str]:
    """As peft wants them."""
    return cfg.targets if cfg.targets in ("all-linear", "auto") else _names(cfg.targets)


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",")]


def _ia3_layers(model: PreTrainedModel, cfg: IA3Config) -> tuple[list[str], list[str]]:
    """Which layers are scaled, and which of them at their input: peft's choice for this model.

    Models that peft does not know get that of Llama, which most are like.
    """
    kind = str(model.config.model_type)
    targets, inner = (
        known.get(kind, known["llama"])
        for known in (
            TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
            TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
        )
    )
    if cfg.targets != "auto":
        targets = _names(cfg.targets)
    if cfg.feedforward == "auto":
        return list(targets), [name for name in inner if name in targets]
    inner = _names(cfg.feedforward)
    if missing := [name for name in inner if name not in targets]:
        raise ConfigError(
            f"method.feedforward={cfg.feedforward}: {missing[0]} is none of the layers that are "
            f"scaled ({','.join(targets)}). Name it in method.targets too."
        )
    return list(targets), inner


def _linear(model: nn.Module) -> set[str]:
    return {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def _refuse_unknown(model: nn.Module, cfg: Family) -> None:
    """A name that matches nothing is a slip, even where others match."""
    if isinstance(targets := _targets(cfg), str):
        return
    known = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in known):
            raise ConfigError(
                f"method.targets={cfg.targets}: no adapter could be placed: the model has no layer "
                f"{target!r}. Linear layers of this model: {', '.join(sorted(_linear(model)))}."
            )


def _refuse_wide(model: peft.PeftModel, rank: int) -> None:
    """A layer has no more singular vectors than its smaller side."""
    for name, layer in _layers(model):
        weight = layer.lora_A[ADAPTER].weight
        if (found := len(weight)) < rank:
            raise ConfigError(
                f"method.rank={rank}: pissa starts from singular vectors, of which "
                f"{name.rpartition('.')[2]} has {found}. Use a lower rank, or method=lora."
            )


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every layer with an adapter of the LoRA kind."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            yield name, module


def settle(model: nn.Module, method: MethodConfig) -> nn.Module:
    """Freeze what the method leaves as it was drawn: the A of LoRA-FA (Zhang et al. 2023).

    Again after whatever makes an adapter trainable: loading it with is_trainable, choosing it
    with set_adapter, leaving disable_adapter.
    """
    if method.name == "lora_fa":
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
    return model


# ---------------------------------------------------------------- learning rates


def groups(
    model: nn.Module,
    cfg: MethodConfig,
    learning_rate: float,
    *,
    inside: nn.Module | None = None,
) -> list[dict[str, Any]] | None:
    """Groups of weights for an optimizer, where the method does not train all of them alike.

    LoRA+ gives B `ratio` times the learning rate of everything else (Hayou et al. 2024). Phased
    LoRA has the adapter first and then the head, whose moments outlive a phase.

    Args:
        model: its trained weights are grouped.
        inside: where the adapters lie, if not in `model`: a role on a shared backbone.

    Returns:
        Groups for torch's optimizers, each with its "lr", none of them empty; None: one for all.
    """
    layers = [layer for _, layer in _layers(inside if inside is not None else model)]
    if isinstance(cfg, LoraPlusConfig):
        second = {id(p) for layer in layers for p in layer.lora_B.parameters()}
        rates = (learning_rate, cfg.ratio * learning_rate)
    elif isinstance(cfg, PhasedLoraConfig):
        adapters = {id(p) for layer in layers for p in layer.parameters()}
        second = {id(p) for p in model.parameters()} - adapters
        rates = (learning_rate, learning_rate)
    else:
        return None
    trained = [p for p in model.parameters() if p.requires_grad]
    split = ([p for p in trained if (id(p) in second) is last] for last in (False, True))
    return [
        {"params": params, "lr": rate, "weight_decay": 0.0}
        for params, rate in zip(split, rates, strict=True)
        if params
    ]


# ---------------------------------------------------------------- files


def save(model: peft.PeftModel, folder: Path, adapter: str = ADAPTER) -> None:
    """Write the adapter as peft does, so that on the base as it was it says what the model says."""
    if (start := getattr(model, "pissa_start", None)) is not None and adapter == ADAPTER:
        save_converted(model, folder, start)
    elif isinstance(model.peft_config[adapter], peft.AdaLoraConfig):
        _save_pruned(model, folder, adapter)
    else:
        model.save_pretrained(str(folder), selected_adapters=[adapter], save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        if adapter == ADAPTER:
            lora_drop.write(model, folder)


def restore(model: peft.PeftModel, folder: Path) -> None:
    """Put back, in place, what `save` wrote of this model, which stays as large as it was."""
    weights = load_file(folder / WEIGHTS)
    if (start := getattr(model, "pissa_start", None)) is not None:
        weights = {name: _first_half(name, tensor, start) for name, tensor in weights.items()}
    elif isinstance(model.peft_config[ADAPTER], peft.AdaLoraConfig):
        _restore_pruned(model, folder, weights)
        return
    report: Any = peft.set_peft_model_state_dict(model, weights, adapter_name=ADAPTER)
    assert not report.unexpected_keys, report.unexpected_keys


def pissa_start(model: peft.PeftModel) -> dict[str, Tensor]:
    """What PiSSA moved from the base into a fresh adapter, by the names of the adapter's file."""
    state = peft.get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    kept = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in kept.items()}


def save_converted(model: peft.PeftModel, folder: Path, start: dict[str, Tensor]) -> None:
    """Write a PiSSA adapter as an ordinary one of twice the rank, on the base as it was.

    With W the base's weight, s the scale, and B0 A0 what the adapter started from, the model has
    W - s B0 A0 + s B A = W + s [B, -B0] [A; A0].

    Args:
        start: `pissa_start` of the fresh adapter.
    """
    state = peft.get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    out = {name: tensor.detach().cpu() for name, tensor in state.items()}
    for name, first in start.items():
        first = first.to(out[name].dtype)
        pair = [out[name], -first] if ".lora_B" in name else [out[name], first]
        out[name] = torch.cat(pair, dim=1 if ".lora_B" in name else 0)
    config: Any = copy.deepcopy(model.peft_config[ADAPTER])
    config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
    config.init_lora_weights, config.inference_mode = True, True
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in out.items()}, folder / WEIGHTS, {"format": "pt"})
    config.save_pretrained(str(folder))


def _first_half(name: str, tensor: Tensor, start: dict[str, Tensor]) -> Tensor:
    """The trained half of what `save_converted` put together."""
    if name not in start:
        return tensor
    rank = start[name].shape[1 if ".lora_B" in name else 0]
    return (tensor[:, :rank] if ".lora_B" in name else tensor[:rank]).contiguous()


def _save_pruned(model: peft.PeftModel, folder: Path, adapter: str) -> None:
    """peft leaves out what was pruned; of a layer that lost all, one triple, whose E is 0, stays.

    Between two prunings E grows again, so there everything is written (`adalora.py` sees to it).
    """
    config: Any = model.peft_config[adapter]
    pattern = config.rank_pattern
    if pattern is not None:  # {name: [kept?]}
        config.rank_pattern = {
            name: kept if any(kept) else [True, *kept[1:]] for name, kept in pattern.items()
        }
    try:
        model.save_pretrained(str(folder), selected_adapters=[adapter], save_embedding_layers=False)
    finally:
        config.rank_pattern = pattern  # peft shortens its names too
    (folder / "README.md").unlink(missing_ok=True)


def _restore_pruned(model: peft.PeftModel, folder: Path, weights: dict[str, Tensor]) -> None:
    """As many triples as the file has go where its pattern says; the others have E = 0.

    peft would make every layer as small as the file instead, under the optimizer's feet.
    """
    config: Any = model.peft_config[ADAPTER]
    config.rank_pattern = None  # for peft, which would follow it
    pattern = peft.PeftConfig.from_pretrained(str(folder)).rank_pattern or {}
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, AdaLoraLayer):
            continue
        rank = layer.lora_E[ADAPTER].shape[0]
        kept = torch.tensor(pattern.get(f"{name}.lora_E", [True] * rank))
        with torch.no_grad():
            layer.lora_E[ADAPTER].zero_()
            for part in _TRIPLE:
                target = getattr(layer, part)[ADAPTER]
                value = weights.pop(f"base_model.model.{name}.{part}").to(target)
                where = (slice(None), kept) if part == "lora_B" else kept
                target[where] = value
    if weights:  # the head
        peft.set_peft_model_state_dict(model, weights, adapter_name=ADAPTER)
    config.rank_pattern = {f"{name}.{ADAPTER}": value for name, value in pattern.items()} or None
