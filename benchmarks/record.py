"""Numbers of many short runs and of the full tiny line, to the bit: before and after a change that
must move none of them.

    python benchmarks/record.py record.json            # run every line, write what came out
    python benchmarks/record.py now.json --same-as record.json

Every line runs alone on one thread. What is recorded of a run: sha256 of metrics.jsonl without
times and memory, of samples.jsonl and overoptimisation.json, and of every file of weights. The
record holds for one CPU and one set of versions; it notes both.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "transformers", "trl", "peft", "deepspeed")
CLOCKED = ("time/", "perf/")
METHODS = ("full", "dora", "lora_drop", "relora", "prefix_tuning", "houlsby")

SUPERVISED = ["train.max_steps=6", "train.eval_every=3", "data.max_rows=192"]
SMALL = {
    "sft": [*SUPERVISED, "evaluation.prompts=2", "sampling.max_new_tokens=12"],
    "rm": [*SUPERVISED, "card.probe_pairs=8"],
    "ppo": [
        *("data.max_rows=64", "ppo.steps=3", "ppo.batch_size=16", "ppo.micro_batch_size=4"),
        *("ppo.minibatches=2", "ppo.epochs=2", "ppo.eval_every=1", "sampling.max_new_tokens=16"),
        *("evaluation.prompts=6",),
    ],
}
GOLD = f"reward.function={ROOT}/data/tiny/gold.py:gold_scores"
PPO = {
    "ppo": [],
    "rloo": ["algorithm=rloo"],
    "grpo": ["algorithm=grpo"],
    "reinforce_pp": ["algorithm=reinforce_pp"],
    "ensemble": ["reward.models.rm=[rm/small,rm/other]", "reward.ensemble=lower"],
    "function": ["reward=function", GOLD],
    "separate": ["share_backbone=false"],
    "kl_in_loss": ["ppo.kl_in=loss", "ppo.kl_target=2", "ppo.entropy_coef=0.01", "ppo.ptx_coef=1"],
    "shaped": [
        *("ppo.scale_scores=true", "ppo.whiten_rewards=true", "ppo.overlong_buffer=4"),
        *("ppo.critic_warmup=1", "evaluation.second_rm=rm/other", "sampling.top_p=0.9"),
        *("sampling.temperature=0.8", "data.gold=null", "ppo.dual_clip=3"),
    ],
}


def full() -> Iterator[tuple[str, str, list[str], int]]:
    """(stage, run name, overrides, processes) of `make sft rm ppo`."""
    for stage in ("sft", "rm", "ppo"):
        yield stage, "tiny", ["run=tiny"], 1


def small() -> Iterator[tuple[str, str, list[str], int]]:
    """The same of the short runs; parents come before their children."""
    yield "sft", "small", SMALL["sft"], 1
    yield "rm", "small", SMALL["rm"], 1
    yield "rm", "other", [*SMALL["rm"], "run=small", "seed=1"], 1
    for name, more in PPO.items():
        yield "ppo", name, ["run=small", *SMALL["ppo"], *more], 1
    for method in METHODS:
        for stage in ("sft", "rm"):
            yield stage, method, [f"run={method}", f"method={method}", *SMALL[stage]], 1
    yield "ppo", "full", ["run=full", "method=full", *SMALL["ppo"]], 1
    for stage in ("sft", "rm", "ppo"):
        yield stage, "two", ["run=two", *SMALL[stage]], 2


LINES = {"full": full, "small": small}


def run(stage: str, name: str, overrides: list[str], processes: int, runs: Path) -> None:
    command = [sys.executable, f"stages/{stage}.py", f"run_name={name}", f"runs_dir={runs}"]
    command += ["tracking=off", *overrides]
    if not any(o.startswith("run=") for o in overrides):
        command.append(f"run={name}")
    env = os.environ | {"OMP_NUM_THREADS": "1", "NPROC": str(processes)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-4000:]}")


def read(folder: Path) -> dict[str, str]:
    """What is recorded of a finished run: name -> sha256."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers = [{k: v for k, v in line.items() if not k.startswith(CLOCKED)} for line in lines]
    found = {"metrics.jsonl": _sha256(json.dumps(numbers).encode())}
    for name in ("samples.jsonl", "overoptimisation.json"):
        if (folder / name).exists():
            found[name] = _sha256((folder / name).read_bytes())
    weights = sorted((folder / "model").rglob("*.safetensors"))
    return found | {str(p.relative_to(folder)): _sha256(p.read_bytes()) for p in weights}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def machine() -> dict[str, str]:
    """What the numbers depend on besides the code."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": model.group(1) if model else platform.processor(),
        "python": platform.python_version(),
        **{library: version(library) for library in LIBRARIES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="where the record is written")
    parser.add_argument("--lines", nargs="+", choices=[*LINES], default=[*LINES])
    parser.add_argument("--same-as", type=Path, help="a record that this one must equal")
    given = parser.parse_args()
    made: dict[str, dict[str, str]] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        for stage, name, overrides, processes in (x for line in given.lines for x in LINES[line]()):
            start = time.perf_counter()
            run(stage, name, overrides, processes, Path(folder))
            made[f"{stage}/{name}"] = read(Path(folder) / stage / name)
            print(f"{stage}/{name}: {time.perf_counter() - start:.0f} s", flush=True)
    given.file.write_text(json.dumps(made, indent=1) + "\n")
    if given.same_as is None:
        return
    record = json.loads(given.same_as.read_text())
    other = [
        f"{run}: {name}: {then.get(name, '-')[:60]} -> {now.get(name, '-')[:60]}"
        for run, now in made.items()
        for then in [record.get(run, {})]
        for name in sorted(now | then)
        if then.get(name) != now.get(name)
    ]
    print("\n".join(other) or f"the same to the bit: {len(made) - 1} runs")
    sys.exit(1 if other else 0)


if __name__ == "__main__":
    main()
