"""Combinations that are refused, or worth a note: one table of rules, read in two passes.

`check` is called when the config is composed, before torch is imported; `check_device` when a
process knows what it runs on, before a weight is loaded. `rlhf doctor` shows the table, and
docs/guards.md is made from it.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf import libraries
from rlhf.errors import ConfigError
from rlhf.libraries import within
from rlhf.methods.table import METHODS
from rlhf.ranks import rows_per_pass, world_size

# ---------------------------------------------------------------- what is known beside the config


@dataclass(frozen=True)
class Device:
    """What a process computes on. `bf16` and `fp16`: in hardware, and DeepSpeed trains in it."""

    name: str
    gpus: int
    bf16: bool
    fp16: bool


UNKNOWN = Device("not known before torch is imported", gpus=0, bf16=False, fp16=False)


@dataclass(frozen=True)
class Facts:
    """What rules read beside the config.

    Attributes:
        versions: library -> the version that is installed; a missing one is not here.
        needs: library -> the versions that this project was run with, such as ">=1.13".
        processes: how many train together.
        device: what each of them computes on.
        lacks: what DeepSpeed's CPU Adam is compiled with and is not here, in words.
    """

    versions: Mapping[str, str]
    needs: Mapping[str, str]
    processes: int = 1
    device: Device = UNKNOWN
    lacks: tuple[str, ...] = ()

    @property
    def outside(self) -> dict[str, str]:
        """The installed libraries whose version is not one that is needed, with that version."""
        return {
            name: version
            for name, version in self.versions.items()
            if not within(version, self.needs[name])
        }


def facts(processes: int = 1) -> Facts:
    """What can be known without torch."""
    needs = libraries.needed() | libraries.needed("qlora")
    found = {name: libraries.installed(name) for name in needs}
    versions = {name: text for name, text in found.items() if text}
    return Facts(versions, needs, processes, lacks=lacking())


def lacking() -> tuple[str, ...]:
    """What is missing to compile DeepSpeed's CPU Adam; nothing where it was installed compiled."""
    found = importlib.util.find_spec("deepspeed")  # which imports nothing
    places = found.submodule_search_locations if found is not None else None
    if any(list(Path(place).glob("ops/adam/cpu_adam_op*.so")) for place in places or ()):
        return ()
    compiler = os.environ.get("CXX", "c++")  # as torch chooses it
    scripts = os.pathsep.join(
        [os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)]
    )
    missing = [] if shutil.which(compiler) else [f"a C++ compiler ({compiler})"]
    return (*missing, *([] if shutil.which("ninja", path=scripts) else ["ninja"]))


def device() -> Device:
    """What this process computes on. Imports torch."""
    import torch

    if not torch.cuda.is_available():
        return Device("CPU", gpus=0, bf16=False, fp16=False)
    return Device(
        torch.cuda.get_device_name(),
        gpus=torch.cuda.device_count(),
        bf16=torch.cuda.is_bf16_supported(including_emulation=False),
        fp16=torch.cuda.get_device_capability()[0] >= 7,  # as DeepSpeed's CUDA accelerator asks
    )


# ---------------------------------------------------------------- rules


@dataclass(frozen=True)
class Rule:
    """One combination that is refused, or worth a note.

    Attributes:
        name: shown in brackets, so that it can be searched for.
        applies: the condition on a stage's config and the facts.
        what: the settings and their values; here and below `{cfg...}` and `{facts...}` are filled.
        why: that cannot work, or is a poor choice.
        way_out: the overrides, or the shell command, after which the same stage runs.
        issues: public reports of what happens without this rule.
        library: (name, versions) that it is about, such as ("deepspeed", "==0.19.2"); none: all.
        values: more names for the three texts.
        on_device: it needs the device, so that torch is imported first.
        refuses: False: a note, and the stage goes on.
    """

    name: str
    applies: Callable[[Any, Facts], bool]
    what: str
    why: str
    way_out: str
    issues: tuple[str, ...] = ()
    library: tuple[str, str] | None = None
    values: Callable[[Any, Facts], dict[str, Any]] = field(default=lambda cfg, facts: {})
    on_device: bool = False
    refuses: bool = True

    def met(self, cfg: Any, known: Facts) -> bool:
        """Whether the config, on this machine, is what the rule is about."""
        if self.library is not None:
            name, versions = self.library
            if name not in known.versions or not within(known.versions[name], versions):
                return False
        return self.applies(cfg, known)

    def message(self, cfg: Any, known: Facts) -> str:
        """What is set, why it cannot work, what to do."""
        texts = (self.what, self.why, self.way_out)
        what, why, way = (self.filled(text, cfg, known) for text in texts)
        do = f"Run `{way}`." if way.startswith("pip ") else f"Use {way}."
        return f"[{self.name}] {what}: {why} {do}"

    def filled(self, text: str, cfg: Any, known: Facts) -> str:
        """One of the three texts with the values of this config."""
        return text.format(cfg=cfg, facts=known, **self.values(cfg, known))


def misfits(wrong: Mapping[str, str], needs: Mapping[str, str]) -> dict[str, str]:
    """Libraries and their versions that are not those needed: in words, and as pip's arguments."""
    said = [f"{name} {version} ({needs[name]} is needed)" for name, version in wrong.items()]
    return {
        "found": ", ".join(said),
        "wanted": " ".join(f"'{name}{needs[name]}'" for name in wrong),
    }


def _train_batch(cfg: Any, known: Facts) -> dict[str, int]:
    """The same or the next larger batch that splits over the processes."""
    return {"batch": _multiple(cfg.train.batch_size, known.processes)}


def _ppo_batch(cfg: Any, known: Facts) -> dict[str, int]:
    """As for training: minibatches and the answers to a prompt stay whole."""
    parts = math.lcm(cfg.ppo.minibatches, cfg.sampling.per_prompt or 1) * known.processes
    return {"batch": _multiple(cfg.ppo.batch_size, parts)}


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of


def _pass_sizes(cfg: Any, known: Facts) -> dict[str, Any]:
    """Rows of an optimizer step on one process, and of a forward pass: as asked and as it fits."""
    group = "ppo" if cfg.stage == "ppo" else "train"
    sizes = getattr(cfg, group)
    rows = sizes.batch_size // (getattr(sizes, "minibatches", 1) * known.processes)
    asked = sizes.micro_batch_size
    fits = rows_per_pass(rows, asked) if rows else 0
    larger = min((n for n in range(asked, rows + 1) if rows % n == 0), default=rows)
    return {"group": group, "rows": rows, "asked": asked, "fits": fits, "larger": larger}


def _in_small_parts(cfg: Any, known: Facts) -> bool:
    sizes = _pass_sizes(cfg, known)
    return 2 * sizes["fits"] < min(sizes["rows"], sizes["asked"])


def _right_stages(cfg: Any, known: Facts) -> dict[str, Any]:
    row = METHODS[cfg.method.name]
    below = [stage for stage in row.zero_stages if stage < 3]
    return {"row": row, "stage": max(below or row.zero_stages)}


def _stage_reason(cfg: Any) -> str:
    """Why a stage refuses a method; empty where it does not."""
    return str(getattr(METHODS[cfg.method.name], f"{cfg.stage}_reason", ""))


def _fp32(cfg: Any, known: Facts) -> bool:
    """Whether a stage trains in fp32, as `engine.dtype` settles it."""
    chosen = cfg.engine.dtype
    return chosen == "fp32" or (chosen == "auto" and not known.device.bf16)


def _quantized(cfg: Any) -> bool:
    return getattr(cfg.method, "quantization", None) is not None


RULES = (
    Rule(
        name="deepspeed-mixed-dtypes",
        library=("deepspeed", "==0.19.2"),
        applies=lambda cfg, facts: (
            cfg.engine.zero_stage == 3
            and METHODS[cfg.method.name].adapter
            and cfg.engine.dtype != "fp32"
        ),
        what="engine.zero_stage=3 with method={cfg.method.name} on deepspeed 0.19.2",
        why=(
            "a bf16 base with fp32 adapters fails in the first optimizer step (`output tensor must "
            "have the same type as input tensor`); 0.19.3 mended it."
        ),
        way_out="pip install 'deepspeed{facts.needs[deepspeed]}'",
        issues=("deepspeedai/DeepSpeed#8072", "deepspeedai/DeepSpeed#8113", "huggingface/trl#6089"),
    ),
    Rule(
        name="deepspeed-frozen-checkpointing",
        library=("deepspeed", "<0.19.3"),
        applies=lambda cfg, facts: (
            cfg.engine.zero_stage == 3
            and METHODS[cfg.method.name].adapter
            and cfg.engine.checkpointing
        ),
        what=(
            "engine.checkpointing=true with engine.zero_stage=3, method={cfg.method.name} and "
            "deepspeed {facts.versions[deepspeed]}"
        ),
        why=(
            "weights that are frozen are split up again before the backward pass has used their "
            "recomputed values, which then have no element; 0.19.3 mended it."
        ),
        way_out="pip install 'deepspeed{facts.needs[deepspeed]}'",
        issues=("deepspeedai/DeepSpeed#8148", "huggingface/transformers#47254"),
    ),
    Rule(
        name="library-bounds",
        applies=lambda cfg, facts: bool(facts.outside),
        values=lambda cfg, facts: misfits(facts.outside, facts.needs),
        what="installed: {found}",
        why=(
            "this project was run and compared with the versions in pyproject.toml (`rlhf doctor` "
            "lists them); with others it may train without an error, and differently: with "
            "deepspeed 0.19.3 its updates are not those of plain torch."
        ),
        way_out="pip install {wanted}",
    ),
    Rule(
        name="method-zero-stage",
        applies=lambda cfg, facts: (
            cfg.engine.zero_stage not in METHODS[cfg.method.name].zero_stages
        ),
        values=_right_stages,
        what="engine.zero_stage={cfg.engine.zero_stage} with method={cfg.method.name}",
        why="this method goes wrong in that stage: {row.zero_reason}.",
        way_out="engine=zero{stage}",
    ),
    Rule(
        name="zero3-adapter",
        applies=lambda cfg, facts: (
            cfg.engine.zero_stage == 3
            and METHODS[cfg.method.name].adapter
            and not cfg.engine.allow_zero3_adapters
        ),
        what="engine.zero_stage=3 with method={cfg.method.name}",
        why=(
            "ZeRO-3 splits every weight over the processes, and saving or merging an adapter "
            "without gathering them first writes empty tensors or the bare base model, with exit "
            "code 0. An adapter gains little from it: its optimizer state is small. A base too "
            "large for one GPU is the exception: engine.allow_zero3_adapters=true allows what was "
            "measured right."
        ),
        way_out="engine=zero2",
        issues=("huggingface/peft#1328", "huggingface/peft#297", "hiyouga/LLaMA-Factory#1226"),
    ),
    Rule(
        name="method-stage",
        applies=lambda cfg, facts: bool(_stage_reason(cfg)),
        values=lambda cfg, facts: {"reason": _stage_reason(cfg)},
        what="method={cfg.method.name} in stage {cfg.stage}",
        why="{reason}. What SFT trained by it is a fine start for PPO by LoRA.",
        way_out="method=lora",
    ),
    Rule(
        name="method-checkpointing",
        applies=lambda cfg, facts: (
            cfg.engine.checkpointing and not METHODS[cfg.method.name].checkpointing
        ),
        what="engine.checkpointing=true with method={cfg.method.name}",
        why=(
            "its keys and values enter each layer beside its input, and transformers drops them "
            "where activations are recomputed."
        ),
        way_out="engine.checkpointing=false",
    ),
    Rule(
        name="method-quantization",
        applies=lambda cfg, facts: _quantized(cfg) and not METHODS[cfg.method.name].quantization,
        what="method.quantization={cfg.method.quantization} with method={cfg.method.name}",
        why=(
            "this method reads or rewrites the weights that 4 bits stand for, and was not found "
            "right on them (PiSSA fails; DoRA has public reports under ZeRO-2)."
        ),
        way_out="method.quantization=null",
    ),
    Rule(
        name="adalora-dtype",
        on_device=True,
        applies=lambda cfg, facts: cfg.method.name == "adalora" and not _fp32(cfg, facts),
        what="method=adalora with engine.dtype={cfg.engine.dtype} on this device",
        why=(
            "in 16 bits the optimizer updates fp32 copies of the weights and writes them back, "
            "which undoes the pruning."
        ),
        way_out="engine.dtype=fp32",
    ),
    Rule(
        name="quantization-ppo",
        applies=lambda cfg, facts: _quantized(cfg) and cfg.stage == "ppo",
        what="method.quantization={cfg.method.quantization} in PPO",
        why=(
            "the SFT weights would be quantised anew, and the policy would begin as another model "
            "than the reference."
        ),
        way_out="method.quantization=null",
    ),
    Rule(
        name="quantization-zero3",
        applies=lambda cfg, facts: _quantized(cfg) and cfg.engine.zero_stage == 3,
        what="method.quantization={cfg.method.quantization} with engine.zero_stage=3",
        why="weights in 4 bits were not measured split over processes.",
        way_out="engine=zero2",
    ),
    Rule(
        name="quantization-library",
        applies=lambda cfg, facts: _quantized(cfg) and "bitsandbytes" not in facts.versions,
        what="method.quantization={cfg.method.quantization}",
        why="weights in 4 bits are bitsandbytes' work, which is not installed.",
        way_out="pip install 'bitsandbytes{facts.needs[bitsandbytes]}'",
    ),
    Rule(
        name="ppo-dropout",
        applies=lambda cfg, facts: cfg.stage == "ppo" and getattr(cfg.method, "dropout", 0.0) > 0,
        what="method.dropout={cfg.method.dropout} in PPO",
        why=(
            "a training pass would not give the probabilities that were sampled, so the ratio "
            "would not be 1 before an update. Dropout is fine in SFT and RM."
        ),
        way_out="method.dropout=0",
        issues=("CarperAI/trlx#508", "huggingface/trl#2358"),
    ),
    Rule(
        name="train-batch-processes",
        applies=lambda cfg, facts: (
            cfg.stage != "ppo" and cfg.train.batch_size % facts.processes > 0
        ),
        values=_train_batch,
        what="train.batch_size={cfg.train.batch_size} on {facts.processes} processes",
        why="every process takes the same number of rows of each optimizer step.",
        way_out="train.batch_size={batch}",
    ),
    Rule(
        name="ppo-batch-processes",
        applies=lambda cfg, facts: (
            cfg.stage == "ppo" and cfg.ppo.batch_size // cfg.ppo.minibatches % facts.processes > 0
        ),
        values=_ppo_batch,
        what=(
            "ppo.batch_size={cfg.ppo.batch_size} in ppo.minibatches={cfg.ppo.minibatches} on "
            "{facts.processes} processes"
        ),
        why="every process takes the same number of answers of each minibatch.",
        way_out="ppo.batch_size={batch}",
    ),
    Rule(
        name="ppo-answers-processes",
        applies=lambda cfg, facts: (
            cfg.stage == "ppo"
            and cfg.ppo.batch_size % ((cfg.sampling.per_prompt or 1) * facts.processes) > 0
        ),
        values=_ppo_batch,
        what=(
            "ppo.batch_size={cfg.ppo.batch_size} with sampling.per_prompt="
            "{cfg.sampling.per_prompt} on {facts.processes} processes"
        ),
        why=(
            "the answers to one prompt are drawn on one process, and every process has as many "
            "prompts as each other one."
        ),
        way_out="ppo.batch_size={batch}",
    ),
    Rule(
        name="small-passes",
        refuses=False,
        applies=_in_small_parts,
        values=_pass_sizes,
        what="{group}.micro_batch_size={asked} with {rows} rows on each process",
        why=(
            "forward passes are of one size that divides those rows, and the largest that does has "
            "{fits}: slow."
        ),
        way_out="{group}.micro_batch_size={larger}",
    ),
    Rule(
        name="offload-zero0",
        applies=lambda cfg, facts: cfg.engine.offload and cfg.engine.zero_stage == 0,
        what="engine.offload=true with engine.zero_stage=0",
        why="DeepSpeed keeps in host memory what ZeRO splits; ZeRO-0 splits nothing.",
        way_out="engine=zero2_offload",
    ),
    Rule(
        name="offload-compiler",
        applies=lambda cfg, facts: (
            cfg.engine.offload and cfg.engine.zero_stage > 0 and bool(facts.lacks)
        ),
        values=lambda cfg, facts: {"missing": " and ".join(facts.lacks)},
        what="engine.offload=true without {missing}",
        why=(
            "states in host memory are updated by DeepSpeed's CPU Adam, which is compiled once, by "
            "ninja and a C++ compiler; DeepSpeed refuses torch's AdamW there. `pip install ninja` "
            "and your system's g++ are what it takes."
        ),
        way_out="engine.offload=false",
    ),
    Rule(
        name="fp16-zero0",
        applies=lambda cfg, facts: cfg.engine.dtype == "fp16" and cfg.engine.zero_stage == 0,
        what="engine.dtype=fp16 with engine.zero_stage=0",
        why=(
            "DeepSpeed divides the gradients by the loss scale there without having multiplied the "
            "loss by it, so they are 65536 times too small: weights were measured to move by 1 to "
            "10 % of what they should."
        ),
        way_out="engine=zero1",
        issues=("deepspeedai/DeepSpeed#8393",),
    ),
    Rule(
        name="fp16-device",
        on_device=True,
        applies=lambda cfg, facts: cfg.engine.dtype == "fp16" and not facts.device.fp16,
        what="engine.dtype=fp16 on this device ({facts.device.name})",
        why=(
            "DeepSpeed trains in it on GPUs of compute capability 7.0 (V100, T4) and newer, and "
            "stops elsewhere: `Type fp16 is not supported on your device.`"
        ),
        way_out="engine.dtype=fp32",
        issues=("deepspeedai/DeepSpeed#5718", "hiyouga/LLaMA-Factory#2612"),
    ),
    Rule(
        name="fp16-needless",
        on_device=True,
        refuses=False,
        applies=lambda cfg, facts: cfg.engine.dtype == "fp16" and facts.device.bf16,
        what="engine.dtype=fp16 on this device ({facts.device.name})",
        why=(
            "it has bf16, which is as fast and needs no loss scaling; fp16 overflows at 65504, and "
            "each overflow skips an update."
        ),
        way_out="engine.dtype=bf16",
    ),
    Rule(
        name="bf16-cpu",
        on_device=True,
        refuses=False,
        applies=lambda cfg, facts: cfg.engine.dtype == "bf16" and facts.device.gpus == 0,
        what="engine.dtype=bf16 on a CPU",
        why="it was measured to be 5 to 8 times slower than fp32 there.",
        way_out="engine.dtype=fp32",
    ),
)


# ---------------------------------------------------------------- the two passes


def check(cfg: Any, known: Facts | None = None) -> list[str]:
    """Refuse what would silently train, save or merge the wrong thing; without torch.

    Args:
        cfg: a stage's config.
        known: what `facts()` gives, unless given.

    Returns:
        Notes for a person.

    Raises:
        ConfigError: the first rule that the config breaks, by name.
    """
    return _check(cfg, known or facts(world_size()), on_device=False)


def check_device(cfg: Any, known: Facts | None = None) -> list[str]:
    """The rules that need the device: to be called after `engine.start`, before a weight is loaded.

    Args, Returns, Raises: as `check`.
    """
    known = known or facts(world_size())
    if known.device is UNKNOWN:
        known = replace(known, device=device())
    return _check(cfg, known, on_device=True)


def _check(cfg: Any, known: Facts, *, on_device: bool) -> list[str]:
    notes = []
    for rule in RULES:
        if rule.on_device == on_device and rule.met(cfg, known):
            if rule.refuses:
                raise ConfigError(rule.message(cfg, known))
            notes.append(rule.message(cfg, known))
    return notes
