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
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf import deepspeed_settings, libraries, lifeline
from rlhf.config import EngineConfig
from rlhf.errors import ConfigError, StoppedByGuard
from rlhf.ranks import is_main, lost_another, world_size

T = TypeVar("T")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Of fp16 alone. The scale on the loss starts at 2^16; an overflow of gradients skips an update and
# halves it, at once (a hysteresis of 1), and a thousand updates without one double it.
LOSS_SCALING = {
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 1,
    "min_loss_scale": 1,
}

REDUCE_BUCKET = 500_000_000  # numbers: DeepSpeed's own, for gradients that are reduced together


def changed() -> Iterator[str]:
    """What this file relies on in DeepSpeed, beside what it documents, and is not there: lines."""
    _quiet_libraries()
    import deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    yield from libraries.lacking(deepspeed.ops, "__compatible_ops__")
    yield from libraries.lacking(
        DeepSpeedEngine,
        *("backward", "step", "get_global_grad_norm", "get_lr", "zero_optimization"),
        *("gradient_clipping", "clip_fp32_gradients", "fp16_enabled"),
    )
    yield from libraries.refusing(
        DeepSpeedEngine.save_checkpoint, "tag", "save_latest", "exclude_frozen_parameters"
    )
    yield from libraries.refusing(DeepSpeedEngine.load_checkpoint, "tag", "load_module_strict")
    yield from libraries.unmentioned(
        DeepSpeedEngine, "_global_grad_norm", "basic_optimizer", "load_universal_checkpoint"
    )
    for optimizer in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        yield from libraries.lacking(optimizer, "clear_backward_seen_flag")
        yield from libraries.unmentioned(optimizer, "overflow")
    yield from libraries.refusing(deepspeed.zero.GatheredParameters.__init__, "modifier_rank")


def start(seed: int) -> None:
    """Join the process group (of one, when started by plain `python`) and seed every generator.

    It is left when the process ends: DeepSpeed cannot join a second one.
    """
    _quiet_libraries()
    for key, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    if torch.cuda.is_available():
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
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in (
        "DeepSpeed",
        "transformers",
        "trl",
        "peft",
        "accelerate",
        "datasets",
        "bitsandbytes",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", module=r"(torch|transformers|deepspeed|trl|peft|accelerate)\b"
    )
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def rehearse(cfg: EngineConfig) -> None:
    """What DeepSpeed refuses, or has to compile, shows here: before a weight is loaded.

    Raises:
        ConfigError: it does not take `engine.deepspeed`, or cannot compile its CPU Adam.
    """
    if cfg.offload:
        _make_cpu_adam_ready()
    if cfg.deepspeed:
        with _in_our_names(cfg), torch.random.fork_rng(devices=[]):
            Engine(
                nn.Linear(1, 1),
                cfg,
                learning_rate=1.0,
                factor=lambda step: 1.0,
                micro_batch_size=1,
                accumulation=1,
                max_grad_norm=1.0,
            )


@contextlib.contextmanager
def _in_our_names(cfg: EngineConfig) -> Iterator[None]:
    """DeepSpeed's errors, of whatever kind, about a value of `engine.deepspeed`."""
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        raise ConfigError(_refusal(error, cfg)) from error
    except Exception as error:
        if lost_another(error):
            raise
        said = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"engine.deepspeed={cfg.deepspeed}: DeepSpeed refuses it: {said}. Leave out what it "
            "names, or see what DeepSpeed's documentation of its JSON config says of it."
        ) from error


def _refusal(error: Any, cfg: EngineConfig) -> str:
    """What pydantic found, with the setting's whole name and near misses."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    found = error.errors()[0]
    path = [str(part) for part in found["loc"]]
    groups = [
        name
        for name, value in cfg.deepspeed.items()
        if path and isinstance(value, dict) and path[0] in value
    ]
    name = ".".join(["engine.deepspeed", *groups[:1], *path])
    if found["type"] != "extra_forbidden":
        return f"{name}={found['input']}: {found['msg']}."
    fields = DeepSpeedZeroConfig.model_fields if groups[:1] == ["zero_optimization"] else {}
    known = [field.alias or name for name, field in fields.items()]
    ways = deepspeed_settings.near(path[-1], known) or "Leave it out."
    return f"{name}={found['input']}: DeepSpeed has no such setting. {ways}"


def _make_cpu_adam_ready() -> None:
    """Compile the optimizer that works in host memory, or load what an earlier run compiled."""
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from torch.utils import cpp_extension

    scripts = Path(sys.executable).parent
    if shutil.which("ninja") is None and (scripts / "ninja").exists():  # not an activated venv
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(scripts)])
    try:
        folder = Path(cpp_extension._get_build_directory(CPUAdamBuilder.NAME, False))
        built = installed_ops.get(CPUAdamBuilder.NAME) or any(folder.glob("*.so"))
        if is_main() and not built:
            note = f"building DeepSpeed's CPU Adam in {folder}, one to three minutes, once"
            print(note, file=sys.stderr, flush=True)
        CPUAdamBuilder().load()
    except Exception as error:  # of torch, of DeepSpeed, or with all that the compiler said
        lines = str(error).splitlines() or [type(error).__name__]
        said = next((line for line in lines if "error:" in line), lines[0]).strip().rstrip(".")
        raise ConfigError(
            "engine.offload=true: DeepSpeed's CPU Adam, which updates weights in host memory, "
            f"could not be compiled: {said}. Use engine.offload=false, or make `c++` and `ninja` "
            "work and start again."
        ) from error


def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def dtype(cfg: EngineConfig) -> torch.dtype:
    """The dtype to train in: bf16 on a GPU that has it, else fp32, unless `engine.dtype` says."""
    if cfg.dtype != "auto":
        return DTYPES[cfg.dtype]
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def where(cfg: EngineConfig) -> dict[str, Any]:
    """{"dtype", "device", "threads"}, for the manifest."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    kind = str(dtype(cfg)).removeprefix("torch.")
    return {"dtype": kind, "device": name, "threads": torch.get_num_threads()}


def deepspeed_config(
    cfg: EngineConfig,
    model: nn.Module | None = None,
    *,
    micro_batch_size: int,
    accumulation: int,
    max_grad_norm: float,
) -> dict[str, Any]:
    """The whole DeepSpeed config, for our engines and for TRL's trainers alike.

    Args:
        cfg: the `engine` settings.
        model: what will be trained. Buckets are then no larger than its trained weights, rather
            than DeepSpeed's half a billion numbers (2 GB of fp32) for however small an adapter.
        micro_batch_size: rows per forward pass and process.
        accumulation: backward passes per optimizer step.
        max_grad_norm: global gradient norm is clipped to it.
    """
    zero: dict[str, Any] = {"stage": cfg.zero_stage}
    if cfg.zero_stage == 3 and cfg.partition_threshold is not None:
        zero["stage3_param_persistence_threshold"] = cfg.partition_threshold
    if model is not None:
        trained = sum(size_of(p) for p in model.parameters() if p.requires_grad)
        zero["reduce_bucket_size"] = min(REDUCE_BUCKET, trained)
    for part in offloaded(cfg):
        zero[f"offload_{part}"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch_size * accumulation * world_size(),
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": dtype(cfg) == torch.bfloat16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # true: accelerate makes an Adam of our AdamW
        "steps_per_print": 2**31,
    }
    if dtype(cfg) == torch.float16:
        config["fp16"] = {"enabled": True, **LOSS_SCALING}
    return deepspeed_settings.merged(config, cfg.deepspeed)


def offloaded(cfg: EngineConfig) -> list[str]:
    """What lies in host memory, as DeepSpeed names it."""
    if not cfg.offload:
        return []
    return ["optimizer", "param"] if cfg.zero_stage == 3 else ["optimizer"]


def adamw(
    parameters: Iterable[Any],
    cfg: EngineConfig,
    *,
    learning_rate: float,
    eps: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019): torch's, or DeepSpeed's where its states are offloaded.

    There DeepSpeed refuses torch's, as slow; since it is chosen here, nobody can ask for it.

    Args:
        parameters: weights, or groups of them.
    """
    if not cfg.offload:
        return torch.optim.AdamW(
            parameters, lr=learning_rate, eps=eps, weight_decay=weight_decay, betas=betas
        )
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(
        parameters,
        lr=learning_rate,
        eps=eps,
        weight_decay=weight_decay,
        betas=betas,
        adamw_mode=True,
    )


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

    Args:
        learning_rate: of all that is trained, where `groups` does not say otherwise.
        factor: optimizer step -> factor on the learning rate of each group.
        groups: all trained weights, as torch's optimizers take groups; None: one group.
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
        epsilon: float = 1e-5,
        groups: list[dict[str, Any]] | None = None,
    ) -> None:
        import deepspeed

        trained = [p for p in module.parameters() if p.requires_grad]
        self._frozen = len(trained) < len(list(module.parameters()))  # they are not saved
        optimizer = adamw(groups or trained, cfg, learning_rate=learning_rate, eps=epsilon)
        self._engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=trained,
            optimizer=optimizer,
            lr_scheduler=lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, factor),
            config=deepspeed_config(
                cfg,
                module,
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
        with ending_loss_scaling():
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
        """Global norm of the last update's gradients, before clipping; None before the first.

        None too after an overflow of fp16: that update was skipped, and the next scale is half.
        """
        return last_grad_norm(self._engine)

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


def torch_optimizer(ds_engine: Any) -> torch.optim.Optimizer:
    """The optimizer inside a DeepSpeed engine; under ZeRO its groups hold this process's part."""
    return ds_engine.basic_optimizer


def note_grad_norm(ds_engine: Any) -> None:
    """Let a DeepSpeed engine tell its gradient norm where it clips without noting it (ZeRO-0)."""
    if ds_engine.zero_optimization() or ds_engine.get_global_grad_norm() is not None:
        return

    def clip() -> None:
        trained = [p for p in ds_engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(trained, ds_engine.gradient_clipping())
        ds_engine._global_grad_norm = norm

    ds_engine.clip_fp32_gradients = clip


def last_grad_norm(ds_engine: Any) -> float | None:
    """Global norm of a DeepSpeed engine's last gradients; nan or inf where it is no number.

    DeepSpeed says -1 for nan, and in fp32 it skips such an update without a word. None before the
    first update, and after an overflow of fp16.
    """
    norm = ds_engine.get_global_grad_norm()
    if norm is None or overflowed(ds_engine):
        return None
    return float(norm) if float(norm) >= 0 else math.nan


def overflowed(ds_engine: Any) -> bool:
    """Whether a DeepSpeed engine skipped its last update because gradients overflowed in fp16.

    Weights and schedule stay as they were. In other dtypes it says no: such a gradient is not
    one that a smaller scale would mend.
    """
    return bool(ds_engine.fp16_enabled() and ds_engine.optimizer.overflow)


@contextlib.contextmanager
def ending_loss_scaling() -> Iterator[None]:
    """Where gradients overflow in fp16 whatever the scale, DeepSpeed's error is a guard's stop.

    Raises:
        StoppedByGuard: an overflow at the smallest scale.
    """
    try:
        yield
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        raise StoppedByGuard(
            "gradients overflow in fp16 even where the loss is not scaled: they are no finite "
            "numbers, or beyond 65504. Use engine.dtype=fp32 (or bf16, where the GPU has it), or "
            "lower the learning rate."
        ) from error


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
