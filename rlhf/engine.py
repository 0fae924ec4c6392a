"""DeepSpeed: the only file that imports it. One process or many, the same calls.

On a CPU no operator is compiled at start: no optimizer block in the DeepSpeed config (torch's
AdamW is handed over instead) and no shared-memory communication op.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf import lifeline
from rlhf.config import EngineConfig
from rlhf.ranks import is_main, world_size

T = TypeVar("T")


def start(seed: int) -> None:
    """Join the process group (of one, when started by plain `python`) and seed every generator.

    It is left when the process ends: DeepSpeed cannot join a second one.
    """
    _quiet_libraries()
    for key, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would compile for a minute
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if world_size() == 1:  # no port is opened, so that two runs never meet
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend, timeout=timedelta(minutes=30))
            lifeline.hold(from_main(lifeline.listen))  # a dead process is not waited for that long
        atexit.register(dist.destroy_process_group)
    deepspeed.init_distributed(dist_backend=dist.get_backend())
    from transformers import set_seed

    set_seed(seed)


def _quiet_libraries() -> None:
    """Libraries' notes on their own internals do not belong in a user's log."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("DeepSpeed", "transformers", "trl", "peft", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", module=r"(torch|transformers|deepspeed|trl|peft|accelerate)\b"
    )
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def dtype(cfg: EngineConfig) -> torch.dtype:
    """The dtype to train in: bf16 on a GPU that has it, else fp32, unless `engine.dtype` says."""
    if cfg.dtype != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[cfg.dtype]
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32


def where(cfg: EngineConfig) -> dict[str, str]:
    """{"dtype", "device"}, for the manifest."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"dtype": str(dtype(cfg)).removeprefix("torch."), "device": name}


def deepspeed_config(
    cfg: EngineConfig, *, micro_batch_size: int, accumulation: int, max_grad_norm: float
) -> dict[str, Any]:
    """The whole DeepSpeed config, for our engines and for TRL's trainers alike.

    Args:
        cfg: the `engine` settings.
        micro_batch_size: rows per forward pass and process.
        accumulation: backward passes per optimizer step.
        max_grad_norm: global gradient norm is clipped to it.
    """
    zero: dict[str, Any] = {"stage": cfg.zero_stage}
    if cfg.zero_stage == 3 and cfg.partition_threshold is not None:
        zero["stage3_param_persistence_threshold"] = cfg.partition_threshold
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch_size * accumulation * world_size(),
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": dtype(cfg) == torch.bfloat16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


def learning_rate_factor(schedule: str, *, warmup: float, total: int) -> Callable[[int], float]:
    """Optimizer step -> factor on the learning rate: linear warm-up, then the schedule to zero."""
    warmup_steps = math.ceil(warmup * total)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = (step - warmup_steps) / max(1, total - warmup_steps)
        if schedule == "constant":
            return 1.0
        if schedule == "linear":
            return max(0.0, 1.0 - progress)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    return factor


class Engine:
    """A model in training: forward passes on `module`, then `backward` and `step`.

    Losses given to `backward` are parts of a sum over all micro-batches and all processes, already
    divided by the global count; one `step` follows each `backward`, and every `accumulation`-th
    of them updates the weights.
    """

    def __init__(
        self,
        module: nn.Module,
        cfg: EngineConfig,
        *,
        learning_rate: float,
        factor: Callable[[int], float],
        micro_batch_size: int,
        accumulation: int,
        max_grad_norm: float,
    ) -> None:
        import deepspeed

        trained = [p for p in module.parameters() if p.requires_grad]
        self._frozen = len(trained) < len(list(module.parameters()))  # they are not saved
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0, eps=1e-5)
        self._engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=trained,
            optimizer=optimizer,
            lr_scheduler=lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, factor),
            config=deepspeed_config(
                cfg,
                micro_batch_size=micro_batch_size,
                accumulation=accumulation,
                max_grad_norm=max_grad_norm,
            ),
        )
        note_grad_norm(self._engine)
        # DeepSpeed divides a loss by the accumulation steps and averages over processes; our
        # losses are parts of a sum, so both are undone.
        self._scale = accumulation * world_size()
        self.module: nn.Module = self._engine.module

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed starts a micro-batch when its own wrapper's forward is called, which would tie
        # a loss to one call of the whole model. Not told, ZeRO-3 forgets earlier micro-batches.
        if hasattr(self._engine.optimizer, "clear_backward_seen_flag"):
            self._engine.optimizer.clear_backward_seen_flag()
        self._engine.backward(loss * self._scale)

    def step(self) -> None:
        self._engine.step()

    def save(self, folder: Path) -> None:
        """Write trained weights, optimizer and schedule to `folder`; every process its part."""
        self._engine.save_checkpoint(
            str(folder), tag="state", save_latest=False, exclude_frozen_parameters=self._frozen
        )

    def load(self, folder: Path) -> None:
        """Put back what `save` wrote, on as many processes; what `convert` made of it, on any."""
        self._engine._config.load_universal_checkpoint = is_universal(folder)
        path, _ = self._engine.load_checkpoint(
            str(folder), tag="state", load_module_strict=not self._frozen
        )
        assert path is not None, f"nothing was loaded from {folder}"
        separate_steps(self._engine)

    @property
    def grad_norm(self) -> float | None:
        """Global norm of the last update's gradients, before clipping; None before the first."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    @property
    def learning_rate(self) -> float:
        return float(self._engine.get_lr()[0])


def optimizer_parts(folder: Path) -> list[Path]:
    """The folders, anywhere in `folder`, in which each process wrote its part of an optimizer.

    There is none under ZeRO-0, where every process holds the whole and any number can load it.
    """
    return sorted({path.parent for path in folder.rglob("*_optim_states.pt")})


def convert(part: Path, target: Path) -> None:
    """Rewrite one of `optimizer_parts` so that any number of processes can load it.

    DeepSpeed's universal checkpoint (Lian et al. 2024, arXiv:2406.18820). One process calls it.
    """
    from deepspeed.checkpoint import ds_to_universal

    options = {
        "num_extract_workers": 1,  # this process; no others are forked
        "num_merge_workers": 1,
        "keep_temp_folder": False,
        "strict": True,
        "inject_missing_state": True,  # ZeRO-1 and 2 do not note the format's version
    }
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        folders = {"input_folder": str(part), "output_folder": str(target)}
        ds_to_universal.main(SimpleNamespace(**folders, **options))


def is_universal(folder: Path) -> bool:
    """Whether the optimizer's state in a folder was rewritten by `convert`."""
    return (folder / "latest_universal").exists()


def separate_steps(ds_engine: Any) -> None:
    """Give each part of a loaded optimizer its own count of steps.

    From a universal checkpoint ZeRO-3 hands all of them one tensor, and each of them adds to it.
    """
    inner = getattr(ds_engine.optimizer, "optimizer", None)
    for state in inner.state.values() if inner is not None else ():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def note_grad_norm(ds_engine: Any) -> None:
    """Let a DeepSpeed engine tell its gradient norm where it clips without noting it (ZeRO-0)."""
    if ds_engine.zero_optimization() or ds_engine.get_global_grad_norm() is not None:
        return

    def clip() -> None:
        trained = [p for p in ds_engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(trained, ds_engine.gradient_clipping())
        ds_engine._global_grad_norm = norm

    ds_engine.clip_fp32_gradients = clip


# ---------------------------------------------------------------- ZeRO-3


def serve(module: nn.Module, cfg: EngineConfig) -> nn.Module:
    """A frozen model split over the processes under ZeRO-3, in place; as it is otherwise."""
    if cfg.zero_stage == 3:
        import deepspeed

        config = deepspeed_config(cfg, micro_batch_size=1, accumulation=1, max_grad_norm=0.0)
        deepspeed.initialize(model=module, config=config)
    return module


def is_split(module: nn.Module) -> bool:
    """Whether ZeRO-3 has split its weights over the processes."""
    return any(hasattr(p, "ds_id") for p in module.parameters())


@contextlib.contextmanager
def gathered(module: nn.Module, *, write: bool = False) -> Iterator[None]:
    """While the block runs, every process holds the weights whole. Every process must enter it.

    Without it, saving or merging what ZeRO-3 has split writes empty tensors, with exit code 0.

    Args:
        write: rank 0's changes are spread to the others when the block ends.
    """
    split = [p for p in module.parameters() if hasattr(p, "ds_id")]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split, modifier_rank=0 if write else None):
        yield


@contextlib.contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """As `gathered`, and forward passes are those of a model that was never split.

    DeepSpeed's hooks, which gather and split each layer again, are off: sampling calls the model
    once for each token, and processes need not wait for each other's. For reading only.
    """
    hooks: list[dict[int, Callable[..., Any]]] = []
    for part in module.modules() if is_split(module) else ():
        hooks += [part._forward_pre_hooks, part._forward_hooks]
    kept = [dict(some) for some in hooks]
    with gathered(module):
        for some in hooks:
            for number in [n for n, hook in some.items() if _is_deepspeeds(hook)]:
                del some[number]
        try:
            yield
        finally:
            for some, before in zip(hooks, kept, strict=True):
                some.clear()
                some.update(before)


def _is_deepspeeds(hook: Callable[..., Any]) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("deepspeed.")


def forget_trainer() -> None:
    """Undo what a Trainer under ZeRO-3 leaves behind: every model loaded later would be split."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def size_of(parameter: nn.Parameter) -> int:
    """Number of values, also of one that ZeRO-3 has split."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of `values` over all processes, on each of them."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on one process at least, on each of them."""
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device())))


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """`value` of every process, by rank, on each of them."""
    if world_size() == 1:
        return [value]
    out: list[Any] = [None] * world_size()
    dist.all_gather_object(out, value)
    return out


def from_main(function: Callable[..., T], *arguments: Any) -> T:
    """What `function` returns on rank 0, which alone calls it, on each process."""
    box = [function(*arguments) if is_main() else None]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]
