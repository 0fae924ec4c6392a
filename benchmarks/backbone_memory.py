"""Four roles on one frozen backbone against four models: memory, CPU seconds, and the same numbers.

python benchmarks/backbone_memory.py                  # 30 million parameters, on one or two cores
python benchmarks/backbone_memory.py --size 108m      # a larger model
python benchmarks/backbone_memory.py --runs 2         # each layout once, not in the order ABBA
python benchmarks/backbone_memory.py --keep DIR       # leaves base model and runs in DIR

A Llama with random weights and the built-in tokenizer is fine-tuned for two steps (LoRA), then a
reward model for two steps; PPO follows with `share_backbone=true` and with `share_backbone=false`,
each in a process of its own, same seed, in the order ABBA. Memory is read before the four roles are
loaded and after, with every weight read once: until then it is only mapped from its file. Resident
memory counts a page that is mapped twice twice; the proportional one counts it once, and on a CPU
in fp32 models loaded from one file share its pages as long as nobody writes to them. Peaks are of
resident memory, up to the last step and in all, which includes the merging of adapters when the run
is published. A step's CPU seconds are the mean of all steps but the first, which also proves that
the policy equals its reference. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from rlhf import loading, models, ppo, roles, rollout
from rlhf.batch import Judged
from rlhf.config import PROJECT
from rlhf.stage_run import StageRun

TINY = PROJECT / "data" / "tiny"
SIZES = {  # hidden, intermediate, layers, heads
    "2m": (128, 384, 8, 4),
    "30m": (512, 1664, 8, 8),
    "108m": (768, 2816, 12, 12),
}
ROWS = {"train": 64, "validation": 8}
LAYOUTS = (True, False, False, True)  # share_backbone
COMPARED = ("scores", "old_values", "kl")
COMMON = ("experiment=none", "tracking=off", "run=m")
SUPERVISED = (
    *COMMON,
    "train.max_steps=2",
    "train.batch_size=8",
    "train.micro_batch_size=8",
    "train.learning_rate=1e-3",
)
PPO = (
    *COMMON,
    "sampling.max_new_tokens=24",
    "evaluation.prompts=8",
    "evaluation.samples=0",
    "ppo.steps=3",
    "ppo.batch_size=8",
    "ppo.micro_batch_size=4",
    "ppo.epochs=2",
    "ppo.learning_rate=1e-3",
    "ppo.critic_learning_rate=1e-3",
)


@dataclass
class Measured:
    """One PPO run. Memory is resident, in MB (10^6 bytes)."""

    shared: bool
    parameters: int  # over all four roles, a shared tensor once
    before: float
    loaded: float
    before_once: float  # proportional: a page that is mapped twice counts once
    loaded_once: float
    peak_trained: float
    peak: float
    step_seconds: float  # CPU
    all_seconds: float  # CPU
    folder: Path


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="30m", help="of the base model")
    parser.add_argument("--runs", type=int, choices=(2, 4), default=4, help="of PPO")
    parser.add_argument("--keep", metavar="DIR", help="work here and leave it")
    parser.add_argument("--watch", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.watch:
        watch(Path(given.watch[0]), given.watch[1:])
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(given.keep or folder).resolve()
        write_base(place / "base", *SIZES[given.size])
        write_rows(place)
        run(place, "sft", f"model.path={place / 'base'}", *SUPERVISED)
        run(place, "rm", *SUPERVISED)
        layouts = enumerate(LAYOUTS[: given.runs])
        measured = [measure(place, number, shared) for number, shared in layouts]
        show(measured)


def write_base(folder: Path, hidden: int, intermediate: int, layers: int, heads: int) -> None:
    """Random weights, always the same, with the built-in tokenizer."""
    tokenizer = loading.tokenizer(TINY / "base", named=str(TINY / "base"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    logging.disable_progress_bar()
    print(f"base model: {model.num_parameters():,} parameters", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(place: Path) -> None:
    """The first rows of the tiny world: what is measured is not the data."""
    for stage in ("sft", "rm", "ppo"):
        folder = place / "data" / stage
        folder.mkdir(parents=True, exist_ok=True)
        for split, count in ROWS.items():
            with (TINY / stage / f"{split}.jsonl").open(encoding="utf-8") as lines:
                (folder / f"{split}.jsonl").write_text("".join(islice(lines, count)))


def run(place: Path, stage: str, *settings: str, watched: Path | None = None) -> float:
    """One stage in a process of its own; its CPU seconds."""
    watching = [str(Path(__file__).resolve()), "--watch", str(watched)] if watched else []
    script = str(PROJECT / "stages" / f"{stage}.py")
    data = f"data.path={place / 'data' / stage}"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *watching, script, f"runs_dir={place / 'runs'}", data, *settings],
        env={"OMP_NUM_THREADS": "1"} | os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stdout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(place: Path, number: int, shared: bool) -> Measured:
    """One PPO run."""
    name, watched = f"{number}-{'one' if shared else 'four'}", place / f"watched-{number}"
    seconds = run(
        place, "ppo", *PPO, f"run_name={name}", f"share_backbone={shared}", watched=watched
    )
    said = json.loads(watched.with_suffix(".json").read_text())
    folder = place / "runs" / "ppo" / name
    phases = json.loads((folder / "manifest.json").read_text())["phases"]
    starts, ends = said["starts"], said["ends"]
    found = Measured(
        shared=shared,
        parameters=said["parameters"],
        before=said["before"],
        loaded=said["loaded"],
        before_once=said["before_once"],
        loaded_once=said["loaded_once"],
        peak_trained=phases["train"]["peak_memory_gb"] * 1e3,
        peak=said["peak"],
        step_seconds=statistics.mean(e - s for s, e in zip(starts[1:], ends[1:], strict=True)),
        all_seconds=seconds,
        folder=folder,
    )
    print(f"{name}: {found.peak:.0f} MB at most, {seconds:.0f} CPU s", flush=True)
    return found


# ---------------------------------------------------------------- in the process that is measured


def watch(to: Path, command: list[str]) -> None:
    """Run a stage here, and write what it held and what its rollouts were worth to `to`.*"""
    said: dict[str, Any] = {"starts": [], "ends": []}
    batches: dict[str, torch.Tensor] = {}

    def loading(load: Callable[..., roles.Roles]) -> Callable[..., roles.Roles]:
        def call(*arguments: Any, **named: Any) -> roles.Roles:
            said["before"], said["before_once"] = memory()
            loaded = load(*arguments, **named)
            said["parameters"] = held(loaded)
            said["loaded"], said["loaded_once"] = memory()
            return loaded

        return call

    def drawing(draw: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            said["starts"].append(time.process_time())
            return draw(*arguments, **named)

        return call

    def judging(judge: Callable[..., Judged]) -> Callable[..., Judged]:
        def call(*arguments: Any, **named: Any) -> Judged:
            batch = judge(*arguments, **named)
            step = len(said["starts"])
            for name in ("responses", *COMPARED):
                batches[f"{step}.{name}"] = getattr(batch, name).clone().contiguous()
            return batch

        return call

    def ending(log: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any, **named: Any) -> None:
            said["ends"].append(time.process_time())
            log(*arguments, **named)

        return call

    roles.load_roles = loading(roles.load_roles)
    rollout.Sampler.rollout = drawing(rollout.Sampler.rollout)  # type: ignore[method-assign]
    ppo.judge = judging(ppo.judge)
    StageRun.log = ending(StageRun.log)  # type: ignore[method-assign]
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        said["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        to.with_suffix(".json").write_text(json.dumps(said))
        save_file(batches, to.with_suffix(".safetensors"))


@torch.no_grad()
def held(loaded: roles.Roles) -> int:
    """Parameters over all four roles, a shared tensor once; each of them is read."""
    sizes: dict[int, int] = {}
    for role in vars(loaded).values():
        for model in (role, models.whole(role)):
            for parameter in model.parameters():
                assert torch.isfinite(parameter.sum())
                sizes[parameter.data_ptr()] = parameter.numel()
    return sum(sizes.values())


def memory() -> tuple[float, float]:
    """What this process holds now, in MB: resident, and proportional."""
    rows = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {row.split()[0]: float(row.split()[1]) * 1024 / 1e6 for row in rows}
    return sizes["Rss:"], sizes["Pss:"]


# ---------------------------------------------------------------- the tables


def show(measured: list[Measured]) -> None:
    """Each run, then the two layouts side by side, then how far they differ."""
    print(
        "\n| share_backbone | parameters | before load, MB | after load | peak, training |", end=""
    )
    print(" peak, all | CPU s per step | CPU s in all |")
    print("|---" * 8 + "|")
    for m in measured:
        print(
            f"| {str(m.shared).lower()} | {m.parameters:,} | {m.before:.0f} | {m.loaded:.0f} | "
            f"{m.peak_trained:.0f} | {m.peak:.0f} | {m.step_seconds:.2f} | {m.all_seconds:.0f} |"
        )
    print("\n| mean of the runs | one backbone | four models | ratio |\n|---|---|---|---|")
    for name, digits, value in (
        ("parameters held", 0, lambda m: m.parameters),
        ("the roles, resident MB (after load less before)", 0, lambda m: m.loaded - m.before),
        ("the roles, proportional MB", 0, lambda m: m.loaded_once - m.before_once),
        ("peak while training, MB", 0, lambda m: m.peak_trained),
        ("the same less what is there before the load", 0, lambda m: m.peak_trained - m.before),
        ("peak of the process, MB", 0, lambda m: m.peak),
        ("CPU s per step", 2, lambda m: m.step_seconds),
    ):
        one = statistics.mean(value(m) for m in measured if m.shared)
        four = statistics.mean(value(m) for m in measured if not m.shared)
        print(f"| {name} | {one:,.{digits}f} | {four:,.{digits}f} | {four / one:.2f} |")
    print("\n| largest difference between | scores | values | KL | trained adapter | (moved by) |")
    print("|---" * 6 + "|")
    first = measured[0]
    for number, other in enumerate(measured[1:], start=1):
        name = "two runs of one backbone" if other.shared else "one backbone and four models"
        apart = differences(first.folder, other.folder, number)
        print(f"| {name} | " + " | ".join(f"{value:.1e}" for value in apart) + " |")


def differences(first: Path, second: Path, number: int) -> list[float]:
    """Of scores, values and KL over all steps; of the policy's adapter; how far its B has moved."""
    place = first.parents[2]
    a = load_file(place / "watched-0.safetensors")
    b = load_file(place / f"watched-{number}.safetensors")
    steps = sorted({name.split(".")[0] for name in a})
    for step in steps:
        if not torch.equal(a[f"{step}.responses"], b[f"{step}.responses"]):
            print(f"in step {step} other answers were drawn: rounding decided about a token")
            steps = steps[: steps.index(step)]
            break
    found = [
        max(float((a[f"{step}.{name}"] - b[f"{step}.{name}"]).abs().max()) for step in steps)
        for name in COMPARED
    ]
    file = "model/adapter/adapter_model.safetensors"
    mine, other = load_file(first / file), load_file(second / file)
    found.append(max(float((mine[name] - other[name]).abs().max()) for name in mine))
    moved = (float(weight.abs().max()) for name, weight in mine.items() if "lora_B" in name)
    return [*found, max(moved)]


if __name__ == "__main__":
    main()
