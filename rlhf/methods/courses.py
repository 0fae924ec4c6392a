"""What a method does beside the steps of supervised training: groups, schedules, phases, pruning.

The trainer asks at fixed places, and knows no method by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.adalora import AdaLoraLayer, RankAllocator
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf import engine, ranks
from rlhf.config import TrainConfig
from rlhf.errors import ConfigError
from rlhf.methods import lora
from rlhf.methods.settings import ADAPTER, AdaLoraConfig, MethodConfig, PhasedLoraConfig
from rlhf.state import read_state

AVERAGES = "importance.safetensors"


def of(method: MethodConfig | None, model: nn.Module, cfg: TrainConfig, steps: int) -> Course:
    """The course of a method.

    Args:
        method: None: nothing beside the steps.
        model: as `lora.attach` or another family made it.
        cfg: the loop's settings.
        steps: optimizer steps there will be.

    Raises:
        ConfigError: fewer steps than phases.
    """
    if isinstance(method, PhasedLoraConfig):
        return Phases(method, model, cfg, steps)
    if isinstance(method, AdaLoraConfig):
        assert isinstance(model, peft.PeftModel)
        return Pruning(method, model)
    return Course(method, model)


class Course:
    """A method that is trained like any other, at most with learning rates of its own."""

    def __init__(self, method: MethodConfig | None, model: nn.Module) -> None:
        self.method, self.model = method, model

    def groups(self, learning_rate: float) -> list[dict[str, Any]] | None:
        """Groups of trained weights for the optimizer; None: one for all."""
        if self.method is None:
            return None
        return lora.groups(self.model, self.method, learning_rate)

    def factor(self) -> Callable[[int], float] | None:
        """Optimizer step -> factor on the learning rate; None: as `train.schedule` says."""
        return None

    def begin(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Training starts.

        Args:
            optimizer: torch's, whatever DeepSpeed has put around it.
            step: optimizer steps that were done before; the weights of that step are loaded, and
                so is the state of its checkpoint.
        """

    def end_step(self, step: int) -> None:
        """So many optimizer steps are done; a checkpoint of this step comes afterwards."""

    def penalty(self) -> Tensor | None:
        """What is added to the loss of a batch while the model is trained."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside weights and optimizer."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        read_state(_Nothing, state, self)

    def end(self) -> None:
        """Training is over; also after an error."""


@dataclass
class _Nothing:
    """The state of most methods."""


# ---------------------------------------------------------------- ReLoRA, PLoRA


def lengths(steps: int, phases: int) -> list[int]:
    """Optimizer steps of each phase: equal parts, the last one with the rest."""
    each = steps // phases
    return [each] * (phases - 1) + [steps - each * (phases - 1)]


class Phases(Course):
    """One adapter of rank phases * rank, of which a phase trains its own block of `rank`.

    That is the function of merging B A into the base after each phase and starting with a new
    pair, but the base is never touched: a checkpoint is an adapter, and what PPO measures the
    policy against stays where it was. Outside the block gradients are zero, and at the start of a
    phase so are Adam's moments, whose updates are then zero too: what is finished stays bit for
    bit, under ZeRO's copies of the weights as well. Adam's count of steps goes on, as it does in
    ReLoRA's own code.
    """

    def __init__(
        self, method: PhasedLoraConfig, model: nn.Module, cfg: TrainConfig, steps: int
    ) -> None:
        super().__init__(method, model)
        if steps < method.phases:
            raise ConfigError(
                f"method.phases={method.phases}: training has {steps} optimizer steps, and each "
                "phase needs one. Choose fewer phases, or train longer."
            )
        self._cfg, self._rank, self._name = cfg, method.rank, method.name
        self._rewarm = method.rewarm
        self._lengths = lengths(steps, method.phases)
        self._ends = [sum(self._lengths[: k + 1]) for k in range(method.phases)]
        self._optimizer: torch.optim.Optimizer | None = None
        self._hooks: list[Any] = []
        self._phase = 0

    def phase(self, step: int) -> int:
        """The phase that the step after `step` steps belongs to."""
        return min(sum(step >= end for end in self._ends), len(self._ends) - 1)

    def factor(self) -> Callable[[int], float]:
        """ReLoRA: one schedule, and a linear way back after each restart. PLoRA: one a phase."""
        schedule, warmup = self._cfg.schedule, self._cfg.warmup

        def make(total: int) -> Callable[[int], float]:
            return engine.learning_rate_factor(schedule, warmup=warmup, total=total)

        whole, parts = make(self._ends[-1]), [make(length) for length in self._lengths]

        def factor(step: int) -> float:
            phase = self.phase(step)
            since = step - (self._ends[phase] - self._lengths[phase])
            if self._name == "plora":
                return parts[phase](since)
            back = math.ceil(self._rewarm * self._lengths[phase]) if phase else 0
            return whole(step) * min(1.0, (since + 1) / (back + 1))

        return factor

    def begin(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        self._optimizer, self._phase = optimizer, self.phase(step)
        layers: list[Any] = [m for m in self.model.modules() if isinstance(m, LoraLayer)]
        for layer in layers:
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            self._hooks.append(a.register_hook(lambda grad: self._only(grad, 0)))
            self._hooks.append(b.register_hook(lambda grad: self._only(grad, 1)))

    def _only(self, grad: Tensor, axis: int) -> Tensor:
        """A gradient [phases * rank, in] (axis 0) or [out, phases * rank] (1) in this block."""
        out = torch.zeros_like(grad)
        at = (axis, self._phase * self._rank, self._rank)
        out.narrow(*at).copy_(grad.narrow(*at))
        return out

    def end_step(self, step: int) -> None:
        assert self._optimizer is not None
        if (phase := self.phase(step)) != self._phase:
            self._phase = phase
            for weight in self._optimizer.param_groups[0]["params"]:  # the adapter's: lora.groups
                for name, value in self._optimizer.state[weight].items():
                    if name != "step":
                        value.zero_()

    def end(self) -> None:
        for hook in self._hooks:
            hook.remove()


# ---------------------------------------------------------------- AdaLoRA


@dataclass
class _Pruned:
    """The state of AdaLoRA: the triples that are left, and the folder of their importance."""

    rank_pattern: dict[str, Any] | None
    importance: Path


class Pruning(Course):
    """Singular values E of the least important triples are set to 0 (Zhang et al. 2023).

    peft does it, right after the optimizer's step, while the gradients that the step was made of
    are still there. Its moving averages of importance are in no checkpoint of peft's: they are
    written beside it.
    """

    def __init__(self, method: AdaLoraConfig, model: peft.PeftModel) -> None:
        super().__init__(method, model)
        self._tuner: Any = model.base_model
        self._config: Any = model.peft_config[ADAPTER]
        self._coefficient = method.orthogonality
        self._step = 0
        self._hook: Any = None
        self._found: _Pruned | None = None  # in the checkpoint that training goes on from

    @property
    def _ranks(self) -> RankAllocator:
        return self._tuner.rankallocator

    def begin(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """As above.

        Raises:
            ConfigError: the optimizer moves copies of the weights, which would undo the pruning.
        """
        moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(p.requires_grad and id(p) not in moved for p in self.model.parameters()):
            raise ConfigError(
                "method.name=adalora: the optimizer works on copies of the weights and writes them "
                "back, which undoes the pruning. Use engine=zero0 with engine.dtype=fp32."
            )
        self._step = step
        if self._found is not None:
            self._put_back(self._found)
        self._hook = optimizer.register_step_post_hook(lambda *_: self._prune())

    def _prune(self) -> None:
        self._step += 1
        self._tuner.update_and_allocate(self._step)
        if self._step < self._config.total_step - self._config.tfinal:
            # Not settled, and E grows again until the next pruning: files must hold every triple.
            self._config.rank_pattern = None

    def penalty(self) -> Tensor:
        """coefficient * mean over all P and Q of ||P^T P - I||_F (eq. 4, as peft weighs it)."""
        layers: list[Any] = [m for m in self.model.modules() if isinstance(m, AdaLoraLayer)]
        norms = []
        for layer in layers:
            for p in (layer.lora_B[ADAPTER].T, layer.lora_A[ADAPTER]):  # [rank, side]
                norms.append(torch.linalg.matrix_norm(p @ p.T - torch.eye(len(p)).to(p)))
        return self._coefficient * torch.stack(norms).mean()

    def state_dict(self) -> dict[str, Any]:
        return {"rank_pattern": self._config.rank_pattern, "importance": self}

    def save(self, folder: Path) -> None:
        """The running averages of every triple's importance; every process calls it."""
        if not ranks.is_main():
            return
        averages = {
            f"{kind}/{name}": value.contiguous()
            for kind in ("exp_avg_ipt", "exp_avg_unc")
            for name, value in getattr(self._ranks, kind).items()
        }
        folder.mkdir()
        save_file(averages, folder / AVERAGES)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._found = read_state(_Pruned, state, self)

    def _put_back(self, found: _Pruned) -> None:
        self._config.rank_pattern = found.rank_pattern
        weights = dict(self._tuner.model.named_parameters())
        self._ranks.reset_ipt()
        for key, value in load_file(found.importance / AVERAGES).items():
            kind, name = key.split("/")
            getattr(self._ranks, kind)[name] = value.to(weights[name])
            self._ranks.ipt[name] = torch.zeros_like(weights[name])

    def end(self) -> None:
        if self._hook is not None:
            self._hook.remove()
