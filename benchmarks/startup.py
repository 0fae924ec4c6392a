"""How long until the first training step: each stage under each engine, cold and warm.

python benchmarks/startup.py                          # all of them, about ten minutes
python benchmarks/startup.py --engines zero2 zero3    # some
python benchmarks/startup.py --engines zero2_offload --extensions DIR   # warm, compiled in DIR

Each run is a stage on the tiny world in a process of its own, ended when its first training step
begins. Cold: the folder of compiled DeepSpeed operators is empty. CPU seconds are of the whole
process, children included; "imports" are those of the libraries alone. The rest is what a start
costs: settings, data, hashing parents, loading models, DeepSpeed's engines, and the evaluation of
the model that training starts from.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "sft": ["train.max_steps=2", "data.max_rows=64", "evaluation.prompts=0"],
    "rm": ["train.max_steps=2", "data.max_rows=64"],
}


def spent() -> float:
    """CPU seconds of this process and of the children it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def begin(stage: str, overrides: list[str]) -> None:
    """Run a stage up to its first training step, and print one JSON line."""
    start = time.perf_counter() - spent_since_exec()
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401
    import trl  # noqa: F401

    torch.set_num_threads(1)
    imports, imports_wall = spent(), time.perf_counter() - start
    from rlhf import supervised
    from rlhf.stage_run import StageRun

    def reached(*args: Any, **kwargs: Any) -> None:
        row = {"imports": imports, "start": spent() - imports}
        row |= {"imports_wall": imports_wall, "wall": time.perf_counter() - start}
        print(json.dumps(row), flush=True)
        os._exit(0)

    supervised._Report.on_step_begin = reached  # type: ignore[method-assign]
    StageRun.timed = reached  # type: ignore[method-assign, assignment]
    sys.argv = [f"stages/{stage}.py", *overrides]
    runpy.run_path(str(ROOT / "stages" / f"{stage}.py"), run_name="__main__")


def spent_since_exec() -> float:
    """Wall seconds since this process was started."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    up = float(Path("/proc/uptime").read_text().split()[0])
    return up - ticks / os.sysconf("SC_CLK_TCK")


def measure(stage: str, engine: str, runs: str, extensions: str) -> dict[str, float]:
    """One start."""
    method = ["method=full"] if "zero3" in engine else []
    given = [f"runs_dir={runs}", "tracking=off", f"engine={engine}", f"run_name={engine}", *method]
    parents = {
        "sft": [],
        "rm": ["policy_from=sft/tiny"],
        "ppo": ["policy_from=sft/tiny", "rm_from=rm/tiny"],
    }
    command = [
        sys.executable,
        __file__,
        "--begin",
        stage,
        *given,
        *parents[stage],
        "overwrite=true",
    ]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": extensions},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit(f"{stage} {engine} did not start:\n{done.stdout}{done.stderr}")
    return json.loads(lines[-1])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    engines = ["zero0", "zero1", "zero2", "zero3"]
    parser.add_argument("--engines", nargs="+", default=engines)
    parser.add_argument("--stages", nargs="+", default=["sft", "rm", "ppo"])
    parser.add_argument("--extensions", help="compiled operators are here: warm starts only")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for stage, sizes in SMALL.items():
            command = [sys.executable, str(ROOT / "stages" / f"{stage}.py"), *sizes]
            subprocess.run(
                [*command, f"runs_dir={folder}", "tracking=off"], check=True, capture_output=True
            )
        print("| stage | engine | | imports, CPU s | start, CPU s | wall s in all |")
        print("|---|---|---|---|---|---|")
        for stage in args.stages:
            for engine in args.engines:
                with tempfile.TemporaryDirectory() as empty:
                    for state in ("warm",) if args.extensions else ("cold", "warm"):
                        row = measure(stage, engine, folder, args.extensions or empty)
                        numbers = (f"{row[name]:.1f}" for name in ("imports", "start", "wall"))
                        print(f"| {' | '.join((stage, engine, state, *numbers))} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--begin"]:
        begin(sys.argv[2], sys.argv[3:])
    else:
        main()
