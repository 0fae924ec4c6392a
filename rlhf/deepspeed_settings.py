"""`engine.deepspeed`: which settings of DeepSpeed are passed on, and what stands for the others.

DeepSpeed ignores a name that it does not know, and two values for one thing contradict each other,
so both are refused when a stage is composed. Neither torch nor DeepSpeed is imported here.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from rlhf.errors import ConfigError

# Buckets and messages of ZeRO; how DeepSpeed speaks, measures and counts. The values are its own.
PASSED = frozenset(
    {
        "zero_optimization",
        "communication_data_type",
        "prescale_gradients",
        "gradient_predivide_factor",
        "disable_allgather",
        "data_types",
        "comms_logger",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "steps_per_print",
        "log_level",
        "disable_python_gc",
        "vocabulary_size",
    }
)

_SIZES = (
    "train.batch_size and train.micro_batch_size (SFT, RM), or ppo.batch_size, ppo.minibatches and "
    "ppo.micro_batch_size"
)
_STEPS = (
    "train.learning_rate, train.schedule and train.warmup (SFT, RM), or ppo.learning_rate, "
    "ppo.critic_learning_rate, ppo.schedule and ppo.warmup"
)
_OFFLOAD = "engine.offload, as engine=zero2_offload and engine=zero3_offload set it"
_THRESHOLD = "engine.partition_threshold"
_TRACKING = "tracking=wandb, or metrics.jsonl in the run"

# DeepSpeed's name -> ours. With a dot: a name inside a group.
OURS = {
    "train_batch_size": _SIZES,
    "train_micro_batch_size_per_gpu": _SIZES,
    "gradient_accumulation_steps": _SIZES,
    "managed_gradient_accumulation": _SIZES,
    "gradient_clipping": "train.max_grad_norm (SFT, RM) or ppo.max_grad_norm",
    "optimizer": _STEPS,
    "scheduler": _STEPS,
    "bf16": "engine.dtype=bf16",
    "bfloat16": "engine.dtype=bf16",
    "fp16": "engine.dtype=fp16",
    "torch_autocast": "engine.dtype",
    "data_types.param_dtype": "engine.dtype",
    "activation_checkpointing": "engine.checkpointing",
    "zero_allow_untested_optimizer": _OFFLOAD,
    "zero_force_ds_cpu_optimizer": _OFFLOAD,
    "zero_optimization.stage": "engine=zero0, zero1, zero2 or zero3",
    "zero_optimization.offload_optimizer": _OFFLOAD,
    "zero_optimization.offload_param": _OFFLOAD,
    "zero_optimization.cpu_offload": _OFFLOAD,
    "zero_optimization.cpu_offload_param": _OFFLOAD,
    "zero_optimization.cpu_offload_use_pin_memory": _OFFLOAD,
    "zero_optimization.stage3_param_persistence_threshold": _THRESHOLD,
    "zero_optimization.param_persistence_threshold": _THRESHOLD,
    "tensorboard": _TRACKING,
    "wandb": _TRACKING,
    "csv_monitor": _TRACKING,
    "comet": _TRACKING,
}

# Ways to train, to save or to feed that no stage uses; a loss here is a part of a sum over all
# processes and is clipped by its norm, which two of them would undo.
UNUSED = frozenset(
    {
        "aio",
        "autotuning",
        "checkpoint",
        "compile",
        "data_efficiency",
        "dataloader_drop_last",
        "datastates_ckpt",
        "expert_parallel",
        "flops_profiler",
        "gradient_allreduce_op",
        "hybrid_engine",
        "pipeline",
        "seq_parallel_communication_data_type",
        "sequence_parallel_size",
        "tensor_parallel",
        "timers",
        "use_data_before_expert_parallelism",
        "weight_quantization",
        "zero_optimization.compute_grad_norm",
        "zero_optimization.zenflow",
    }
)

# Names inside a group where DeepSpeed ignores those that it does not know.
INSIDE = {
    "data_types": ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"),
}

TOP = frozenset(name for name in (*PASSED, *OURS, *UNUSED) if "." not in name)


def check(settings: Mapping[str, Any]) -> None:
    """Refuse what DeepSpeed would ignore, and what is set elsewhere.

    Names inside the other groups are DeepSpeed's to judge; see `engine.rehearse`.

    Args:
        settings: the value of `engine.deepspeed`.

    Raises:
        ConfigError: the first name that cannot be passed on.
    """
    for name, value in _two_levels(settings):
        shown = f"engine.deepspeed.{name}"
        if not isinstance(value, Mapping):
            shown += f"={value}"
        if name in OURS:
            raise ConfigError(
                f"{shown}: this is set under another name here, and DeepSpeed would be given two "
                f"values. Use {OURS[name]}."
            )
        if name in UNUSED:
            raise ConfigError(
                f"{shown}: no stage uses it, so it would change nothing, or train something else "
                "than the stage says. Leave it out."
            )
        group, _, inner = name.rpartition(".")
        known = INSIDE.get(group, (inner,)) if group else TOP
        if inner not in known:
            ways = near(inner, known) or (
                f"These are passed on: {', '.join(sorted(PASSED))}; what belongs to ZeRO is "
                "engine.deepspeed.zero_optimization.NAME."
            )
            raise ConfigError(
                f"{shown}: DeepSpeed has no such setting, and would ignore it. {ways}"
            )
        if name == "zero_optimization" and not isinstance(value, Mapping):
            raise ConfigError(
                f"{shown}: it is a group of settings. Use engine=zero0, zero1, zero2 or zero3 for "
                "the stage, and engine.deepspeed.zero_optimization.NAME=VALUE for the others."
            )


def _two_levels(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Each name with its value, those inside a group after it."""
    found = []
    for name, value in settings.items():
        found.append((str(name), value))
        if isinstance(value, Mapping):
            found += [(f"{name}.{inner}", each) for inner, each in value.items()]
    return found


def near(name: str, known: Collection[str]) -> str:
    """What may have been meant, as a sentence; empty where nothing comes near."""
    close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    return f"Did you mean {', '.join(close)}?" if close else ""


def merged(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `settings` put into it, group by group; neither is changed."""
    out = dict(config)
    for name, value in settings.items():
        both = isinstance(value, Mapping) and isinstance(out.get(name), Mapping)
        out[name] = merged(out[name], value) if both else value
    return out
