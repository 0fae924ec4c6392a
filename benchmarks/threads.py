"""One thread, all, or as many as `rlhf/threads.py` chooses: what a model of each size costs.

python benchmarks/threads.py                     # alone on the machine, a few minutes
python benchmarks/threads.py --busy 2            # beside two loops that keep a core busy each
python benchmarks/threads.py --sizes 1M 135M --pairs 3 --choices 1 all default
python benchmarks/threads.py --stages --busy 2 --choices 1 default    # the tiny world's stages

Llamas with random weights, fp32. In a process of its own each: a step of SFT (8 rows of 64 tokens
forward and backward, AdamW), 16 sampled tokens for each of 8 rows, and log-probabilities of 8 rows
of 64 tokens without a gradient, as PPO scores them. The choices take turns, in the order ABBA; the
lowest of a choice's runs is shown for CPU seconds, wall seconds and switches between threads or
programs alike. "1" and "all" are OMP_NUM_THREADS as stages find it; "default" has none.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STAGES = {
    "sft": ["train.max_steps=30", "evaluation.prompts=16"],
    "rm": ["train.max_steps=15", "card.enabled=false"],
    "ppo": ["ppo.steps=2", "ppo.batch_size=32", "ppo.eval_every=2", "evaluation.prompts=16"],
}

SHAPES = {  # hidden, layers, heads, key heads, inner, vocabulary
    "1M": (128, 5, 4, 2, 384, 1280),  # the tiny world's base
    "5M": (256, 6, 8, 4, 768, 2048),
    "10M": (320, 8, 8, 4, 896, 2048),
    "20M": (384, 12, 6, 3, 1024, 4096),
    "40M": (512, 14, 8, 4, 1408, 4096),
    "60M": (576, 16, 9, 3, 1536, 8192),
    "135M": (576, 30, 9, 3, 1536, 49152),  # SmolLM2-135M
}
ROWS, LENGTH, NEW = 8, 64, 16
REPEATS = {"1M": 12, "5M": 8, "10M": 5, "20M": 3, "40M": 2}  # others: once
WORK = ("step", "sample", "score")


def measure(size: str) -> dict[str, Any]:
    """CPU s, wall s and context switches of each kind of work, once it is warm."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf import threads

    hidden, layers, heads, key_heads, inner, vocabulary = SHAPES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        intermediate_size=inner,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = None  # every row gets all its tokens
    parameters = sum(p.numel() for p in model.parameters())
    threads.settle(parameters)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(3, vocabulary, (ROWS, LENGTH))

    def step() -> None:
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def sample() -> None:
        model.eval()
        model.generate(
            ids[:, :32],
            attention_mask=torch.ones_like(ids[:, :32]),
            max_new_tokens=NEW,
            do_sample=True,
            top_k=0,
        )

    @torch.no_grad()
    def score() -> None:
        model.eval()
        logits = model(input_ids=ids).logits[:, :-1]
        logits.log_softmax(-1).gather(-1, ids[:, 1:, None])

    row: dict[str, Any] = {"parameters": parameters, "threads": torch.get_num_threads()}
    work = {"step": step, "sample": sample, "score": score}
    for name, function in work.items():
        function()  # warm
        row[name] = timed(function, REPEATS.get(size, 1))
    return row


def timed(function: Callable[[], None], repeats: int) -> dict[str, float]:
    before, start, used = switches(), time.perf_counter(), time.process_time()
    for _ in range(repeats):
        function()
    return {
        "wall": (time.perf_counter() - start) / repeats,
        "cpu": (time.process_time() - used) / repeats,
        "switches": (switches() - before) / repeats,
    }


def switches() -> int:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_nvcsw + usage.ru_nivcsw


@contextmanager
def busy(count: int) -> Iterator[None]:
    """`count` programs that each keep a core busy, for as long as the block runs."""
    loop = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"  # nor outlives it
    loops = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(count)]
    try:
        yield
    finally:
        for started in loops:
            started.kill()
            started.wait()


def environment(choice: str) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as stages set it
    if choice != "default":
        cores = str(len(os.sched_getaffinity(0)))
        env["OMP_NUM_THREADS"] = cores if choice == "all" else choice
    return env


def run(size: str, choice: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", size]
    done = subprocess.run(
        command, env=environment(choice), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def measure_stage(script: str, *given: str) -> dict[str, float]:
    """CPU s, wall s and context switches of a whole stage, imports and publishing included."""
    start = time.perf_counter()
    subprocess.run([sys.executable, script, *given], capture_output=True, check=True)
    wall, usage = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu, count = usage.ru_utime + usage.ru_stime, usage.ru_nvcsw + usage.ru_nivcsw
    return {"wall": wall, "cpu": cpu, "switches": count}


def compare_stages(choices: list[str], pairs: int) -> None:
    """One row for each run; those of a stage are side by side, so that they meet the same load."""
    print("| stage | pair | threads | wall s | CPU s | switches | wall ratio | CPU ratio |")
    print("|---|---|---|---|---|---|---|---|")
    runs = [(str(pair + 1), choice) for pair in range(pairs) for choice in choices]
    first = f"{choices[0]}-1"
    parents = {"sft": [], "rm": [f"policy_from=sft/{first}"]}
    parents["ppo"] = [*parents["rm"], f"rm_from=rm/{first}"]
    with tempfile.TemporaryDirectory() as folder:
        for stage in STAGES:
            script = str(ROOT / "stages" / f"{stage}.py")
            given = [*STAGES[stage], *parents[stage], f"runs_dir={folder}", "tracking=off"]
            command = [sys.executable, __file__, "--measure-stage", script, *given]
            started = {
                (pair, choice): subprocess.Popen(
                    [*command, f"run_name={choice}-{pair}"],
                    env=environment(choice),
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for pair, choice in runs
            }
            made = {run: json.loads(process.communicate()[0]) for run, process in started.items()}
            for pair, choice in runs:
                cells = numbers(made[pair, choice], made[pair, choices[0]], digits=1)
                print(f"| {' | '.join((stage, pair, choice, *cells))} |", flush=True)


def numbers(one: dict[str, float], first: dict[str, float], *, digits: int) -> list[str]:
    return [
        f"{one['wall']:.{digits}f}",
        f"{one['cpu']:.{digits}f}",
        f"{one['switches']:,.0f}",
        f"{one['wall'] / first['wall']:.2f}",
        f"{one['cpu'] / first['cpu']:.2f}",
    ]


def compare(size: str, choices: list[str], pairs: int) -> None:
    """One row of the table for each choice and kind of work."""
    runs: dict[str, list[dict[str, Any]]] = {choice: [] for choice in choices}
    for pair in range(pairs):
        for choice in choices if pair % 2 == 0 else choices[::-1]:
            runs[choice].append(run(size, choice))
    parameters = runs[choices[0]][0]["parameters"]
    for name in (*WORK, "all three"):
        parts = WORK if name == "all three" else (name,)
        low = {
            choice: {
                kind: min(sum(one[part][kind] for part in parts) for one in runs[choice])
                for kind in ("wall", "cpu", "switches")
            }
            for choice in choices
        }
        for choice in choices:
            shown = f"{choice} ({runs[choice][0]['threads']})" if choice == "default" else choice
            cells = numbers(low[choice], low[choices[0]], digits=3)
            row = " | ".join((f"{parameters / 1e6:.1f}M", name, shown, *cells))
            print(f"| {row} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--choices", nargs="+", default=["1", "all"])
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--busy", type=int, default=0, help="loops that keep a core busy each")
    parser.add_argument("--stages", action="store_true", help="those of the tiny world instead")
    args = parser.parse_args()
    if args.stages:
        with busy(args.busy):
            compare_stages(args.choices, args.pairs)
        return
    print("| parameters | work | threads | wall s | CPU s | switches | wall ratio | CPU ratio |")
    print("|---|---|---|---|---|---|---|---|")
    with busy(args.busy):
        for size in args.sizes:
            compare(size, args.choices, args.pairs)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2])))
    elif sys.argv[1:2] == ["--measure-stage"]:
        print(json.dumps(measure_stage(*sys.argv[2:])))
    else:
        main()
