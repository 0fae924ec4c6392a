"""Seconds and bytes of a report about 20 PPO runs of 10,000 steps.

python benchmarks/report.py                # makes the runs in a temporary folder; a minute in all
python benchmarks/report.py --keep DIR     # makes them in DIR and leaves them there

The runs have the numbers that a PPO run has (40 at every step, 11 at every 100th) and 200 samples
each. Timed is `rlhf report`, a process of its own, as a user starts it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rlhf.manifest import BaseModel, TokenizerFacts
from rlhf.metrics import METRICS
from rlhf.registry import Registry
from rlhf.run import open_run

RUNS, STEPS, EVERY = 20, 10_000, 100
LOGGED = ("objective/", "policy/", "loss/", "val/", "response/", "time/", "perf/", "episode")
WORDS = ("the", "a", "happy", "friend", "kite", "garden", "letter", "thank", "you", "soon")


def main() -> None:
    """Make the runs, report, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--keep", metavar="DIR", help="make the runs here and leave them")
    keep = parser.parse_args().keep
    with tempfile.TemporaryDirectory() as folder:
        registry = Registry(Path(keep or folder) / "runs")
        for seed in range(RUNS):
            if not (registry.runs_dir / f"ppo/seed-{seed:02d}/manifest.json").exists():
                make(registry, seed)
        names = [run.reference for run in registry.runs("ppo")]
        lines = sum(f.stat().st_size for f in registry.runs_dir.glob("ppo/*/metrics.jsonl"))
        print(f"{len(names)} runs, {STEPS:,} steps, metrics.jsonl {lines / 1e6:.0f} MB in all")
        for some in (names, names[:1]):
            out = Path(folder) / "report.html"
            wall, cpu = timed(registry, some, out)
            size = out.stat().st_size
            print(f"{len(some):3} runs: {wall:.1f} s wall, {cpu:.1f} s CPU, {size:,} bytes")


def make(registry: Registry, seed: int) -> None:
    """A finished run with noisy curves."""
    noise = random.Random(seed)
    each = [name for name in METRICS if name.startswith(LOGGED)]
    held_out = [name for name in METRICS if name.startswith(("eval/score", "eval/gold", "eval/kl"))]
    config = {"stage": "ppo", "run": "many", "run_name": f"seed-{seed:02d}", "seed": seed}
    with open_run(registry, "ppo", f"seed-{seed:02d}", config, {}) as run:
        (run.model_dir / "model.safetensors").write_bytes(b"")
        with run.metrics_path.open("w") as file:
            for step in range(1, STEPS + 1):
                t = step / STEPS
                names = each + held_out if step % EVERY == 0 else each
                row = {n: math.sqrt(t) * k + noise.gauss(0, 0.3) for k, n in enumerate(names)}
                file.write(json.dumps({"step": step} | row) + "\n")
        with run.samples_path.open("w") as file:
            for n in range(200):
                texts = {who: " ".join(noise.choices(WORDS, k=40)) for who in ("sft", "ppo")}
                scores = {f"{who}_score": noise.random() for who in texts}
                file.write(json.dumps({"prompt": f"prompt {n}"} | texts | scores) + "\n")
        run.publish(
            base=BaseModel("base", None, "base-1"),
            tokenizer=TokenizerFacts("tokenizer-1", "template-1", pad_id=0, eos_id=2),
            method={"name": "lora", "adapter_chain": []},
            data=[],
            metrics={name: noise.random() for name in each + held_out},
            golden={},
            environment={"world_size": 1, "zero_stage": 2, "seed": seed}
            | {"dtype": "float32", "device": "cpu"},
            phases={"train": {"seconds": 3600.0, "peak_memory_gb": 2.0}},
        )


def timed(registry: Registry, references: list[str], out: Path) -> tuple[float, float]:
    """Wall and CPU seconds of `rlhf report`."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "rlhf.cli", "report", *references, "--out", str(out)],
        env=os.environ | {"RLHF_RUNS": str(registry.runs_dir), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
