"""The four roles of PPO: policy, reference, critic, reward model; on one backbone or on four.

With adapters, the SFT model is the one frozen backbone. The policy's adapter is new, the reference
is the backbone with its adapters off, and critic and reward model carry the adapter that the reward
model was trained with, each with a head of its own. Other methods need a model for each role.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf import contract, engine
from rlhf.config import EngineConfig
from rlhf.methods import lora
from rlhf.methods.settings import MethodConfig
from rlhf.models import (
    ADAPTER,
    Backbone,
    SharedRole,
    freeze,
    load_causal,
    load_parent,
    load_scalar,
    no_dropout,
    trainable,
)
from rlhf.parts import HEAD
from rlhf.registry import Published


@dataclass(frozen=True)
class Roles:
    """The four models of PPO. Policy and critic are trained, the other two are frozen.

    The critic is None for algorithms that need none, the reward model where functions alone score.
    """

    policy: nn.Module
    reference: nn.Module
    critic: nn.Module | None
    reward_model: nn.Module | None


@dataclass(frozen=True)
class Loaded:
    """Every model that takes part.

    Attributes:
        reward_models: reference -> model that is optimised; the first is the one in `roles`.
        watching: reference -> the one that only watches, or none.
    """

    roles: Roles
    reward_models: dict[str, nn.Module]
    watching: dict[str, nn.Module]

    @property
    def readers(self) -> dict[str, nn.Module]:
        """reference -> every reward model."""
        return self.reward_models | self.watching


def load_all(
    sft: Published,
    rms: Sequence[Published],
    watching: Sequence[Published],
    tokenizer: PreTrainedTokenizerBase,
    method: MethodConfig,
    engine_cfg: EngineConfig,
    *,
    share_backbone: bool | None,
    needs_critic: bool,
) -> Loaded:
    """The roles, and every reward model by its reference; see `load_roles`.

    Args:
        rms: the reward models that are optimised.
        watching: the one that only watches, or none.
    """
    roles = load_roles(
        sft,
        rms[0] if rms else None,
        tokenizer,
        method,
        engine_cfg,
        share_backbone=share_backbone,
        needs_critic=needs_critic,
    )
    return Loaded(
        roles,
        load_reward_models(roles, rms, tokenizer, engine_cfg),
        {rm.reference: load_reward_model(rm, tokenizer, engine_cfg) for rm in watching},
    )


def load_roles(
    sft: Published,
    rm: Published | None,
    tokenizer: PreTrainedTokenizerBase,
    method: MethodConfig,
    engine_cfg: EngineConfig,
    *,
    share_backbone: bool | None = None,
    needs_critic: bool = True,
) -> Roles:
    """Policy and reference from the SFT run, critic and reward model from the RM run.

    The policy starts as the reference and the critic as the reward model. Critics that go on with
    the reward model's adapter are the same with and without a shared backbone. Without a reward
    model the critic starts from the SFT model with a new head.

    Args:
        rm: None where functions alone score.
        share_backbone: one frozen backbone for all four; None: where that can be.
        needs_critic: False leaves it out.

    Raises:
        ConfigError: it is asked for and cannot be.
    """
    dtype, device = engine.dtype(engine_cfg), engine.device()
    share = contract.check_sharing(sft, rm, method, engine_cfg, share_backbone)
    policy = trainable(load_parent(load_causal, sft, tokenizer, dtype), method)
    if share and rm is not None:
        adapter = _Adapter(rm.model_dir / "adapter")
        return _on_one_backbone(policy.to(device), adapter, method, needs_critic=needs_critic)
    critic: nn.Module | None = None
    if needs_critic and rm is not None and contract.is_adapter_on(sft, rm):
        start = load_parent(load_scalar, sft, tokenizer, dtype)
        critic = lora.settle(_Adapter(rm.model_dir / "adapter").on(start), method)
    elif needs_critic:
        start = load_parent(load_scalar, rm or sft, tokenizer, dtype)
        critic = trainable(start, method, head=True)
    return Roles(
        policy=policy.to(device),
        reference=engine.serve(
            freeze(load_parent(load_causal, sft, tokenizer, dtype)).to(device), engine_cfg
        ),
        critic=None if critic is None else critic.to(device),
        reward_model=None if rm is None else load_reward_model(rm, tokenizer, engine_cfg),
    )


def load_reward_models(
    roles: Roles,
    rms: Sequence[Published],
    tokenizer: PreTrainedTokenizerBase,
    engine_cfg: EngineConfig,
) -> dict[str, nn.Module]:
    """reference -> reward model: the first as it is in `roles`, the others each on its own."""
    own = {rm.reference: load_reward_model(rm, tokenizer, engine_cfg) for rm in rms[1:]}
    first = {} if roles.reward_model is None else {rms[0].reference: roles.reward_model}
    return first | own


def load_reward_model(
    rm: Published, tokenizer: PreTrainedTokenizerBase, engine_cfg: EngineConfig
) -> nn.Module:
    """A reward model on its own, frozen; split over the processes under ZeRO-3."""
    model = load_parent(load_scalar, rm, tokenizer, engine.dtype(engine_cfg))
    return engine.serve(freeze(model).to(engine.device()), engine_cfg)


class _Adapter:
    """A reward model's adapter and head, as its run published them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weights = load_file(folder / "adapter_model.safetensors")
        self.head: Tensor = next(w for name, w in self.weights.items() if HEAD in name)  # [1, H]

    def on(self, model: PreTrainedModel) -> peft.PeftModel:
        """`model` with this adapter and head, both trained."""
        no_dropout(model)
        out = peft.PeftModel.from_pretrained(model, self.folder, is_trainable=True)
        no_dropout(out)
        return out

    def add_to(self, model: peft.PeftModel, name: str) -> None:
        """This adapter, without the head, beside others."""
        config = peft.LoraConfig.from_pretrained(str(self.folder))
        config.modules_to_save, config.task_type = None, peft.TaskType.CAUSAL_LM
        config.lora_dropout, config.inference_mode = 0.0, False
        model.add_adapter(name, config)
        weights = {key: weight for key, weight in self.weights.items() if HEAD not in key}
        report: object = peft.set_peft_model_state_dict(model, weights, adapter_name=name)
        assert not report.unexpected_keys, report.unexpected_keys  # type: ignore[attr-defined]

    def new_head(self, like: Tensor) -> nn.Linear:
        """The head [H] -> [1], on the device and in the dtype of `like`."""
        head = nn.Linear(self.head.shape[1], 1, bias=False, device=like.device, dtype=like.dtype)
        with torch.no_grad():
            head.weight.copy_(self.head)
        return head


def _on_one_backbone(
    policy: nn.Module, adapter: _Adapter, method: MethodConfig, *, needs_critic: bool
) -> Roles:
    assert isinstance(policy, peft.PeftModel)
    for name in ["critic"] * needs_critic + ["reward_model"]:
        adapter.add_to(policy, name)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(any(f".{own}." in name for own in (ADAPTER, "critic")))
    lora.settle(policy, method)
    like = next(policy.parameters())
    backbone, head = Backbone(policy), adapter.new_head(like).requires_grad_(False)
    return Roles(
        policy=SharedRole(backbone, ADAPTER),
        reference=SharedRole(backbone, None),
        critic=SharedRole(backbone, "critic", adapter.new_head(like)) if needs_critic else None,
        reward_model=SharedRole(backbone, "reward_model", head),
    )
