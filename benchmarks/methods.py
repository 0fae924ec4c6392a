"""Every fine-tuning method under one budget: a table and a plot.

make methods                                            # SFT on the tiny world, 100 steps each
python benchmarks/methods.py --methods lora dora -- train.max_steps=250
python benchmarks/methods.py --name stories --  experiment=none template=plain model.path=DIR ...

One process and one seed a method, one after another; the learning rate of each is in RATES (of the
order that its paper gives; adapters and prompts take more than whole weights). "merge error" is
the largest difference of a logit between the model in memory and the published one, loaded anew;
a method that cannot be merged is published as it is. "disk" is what has to be kept of it beside the
base. CPU seconds are of the whole process less the imports. Runs that are there already are read.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rlhf.methods.table import METHODS  # noqa: E402

# Learning rate, and settings that a small model needs.
RATES: dict[str, tuple[float, list[str]]] = {
    "full": (1e-3, []),
    "freeze": (2e-3, []),
    "lora": (5e-3, []),
    "rslora": (2e-3, []),
    "dora": (5e-3, []),
    "pissa": (1e-3, []),
    "qlora": (5e-3, []),
    "adalora": (1e-2, ["engine=zero0"]),
    "lora_plus": (1e-3, []),
    "lora_fa": (1e-2, []),
    "vera": (2e-2, []),
    "lora_drop": (5e-3, []),
    "plora": (5e-3, []),
    "relora": (5e-3, []),
    "prefix_tuning": (5e-3, []),
    "prompt_tuning": (5e-2, []),
    "p_tuning": (5e-3, []),
    "p_tuning_v2": (1e-1, []),
    "houlsby": (5e-3, []),
    "pfeiffer": (5e-3, []),
    "bitfit": (1e-2, ["method.add_biases=true"]),
    "ia3": (2e-2, []),
    "unipelt": (5e-3, []),
}


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train one method, unless its run is there; its numbers."""
    rate, more = RATES[name]
    overrides = [
        f"runs_dir={args.runs}",
        f"run_name={name}",
        f"method={name}",
        f"train.learning_rate={rate}",
        *more,
        *args.overrides,
    ]
    folder = Path(args.runs) / "sft" / name
    figures = folder.parent / f"{name}.cpu.json"
    if not (folder / "manifest.json").exists():
        before, start = children(), time.perf_counter()
        stage = [sys.executable, str(ROOT / "stages/sft.py"), *overrides]
        done = subprocess.run(stage, check=False, capture_output=True, text=True)
        if done.returncode:
            return {"name": name, "failed": (done.stderr or done.stdout).strip().splitlines()[-1]}
        spent = {"cpu": children() - before - imports(), "wall": time.perf_counter() - start}
        figures.write_text(json.dumps(spent))
    manifest = json.loads((folder / "manifest.json").read_text())
    trained = re.search(r"training ([\d,]+) of ([\d,]+)", (folder / "log.txt").read_text())
    assert trained is not None
    metrics = manifest["metrics"]
    return json.loads(figures.read_text()) | {
        "name": name,
        "rate": rate,
        "trained": int(trained[1].replace(",", "")),
        "start": metrics["start/eval/loss"],
        "loss": metrics["eval/loss"],
        "gold": metrics.get("eval/gold"),
        "memory": manifest["phases"]["total"]["peak_memory_gb"],
        "disk": on_disk(name, folder / "model"),
        "merge": merge_error(f"sft/{name}", args.runs),
    }


def children() -> float:
    """CPU seconds of all processes that were waited for."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def imports(known: list[float] = []) -> float:  # noqa: B006
    """CPU seconds that the libraries take to import, measured once."""
    if not known:
        before = children()
        code = "import torch, transformers, trl, peft, deepspeed, datasets"
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        known.append(children() - before)
    return known[0]


def on_disk(name: str, model: Path) -> int:
    """Bytes to keep beside the base: the adapter, or whole weights."""
    folder = model / "adapter" if METHODS[name].adapter else model
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def merge_error(reference: str, runs: str) -> float:
    """Golden logits of memory against the published model, by the code that checks them."""
    code = (
        "import sys, torch\n"
        "from rlhf import golden, models, text\n"
        "from rlhf.config import TemplateConfig\n"
        "from rlhf.registry import Registry\n"
        "run = Registry(sys.argv[1]).resolve(sys.argv[2])\n"
        "tokenizer = text.load_parent_tokenizer(run, template=TemplateConfig('inherit'))\n"
        "model = models.load_parent(models.load_causal, run, tokenizer, torch.float32)\n"
        "print(golden.check_logits(model.eval(), run))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, runs, reference],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return float(done.stdout.split()[-1])


# ---------------------------------------------------------------- what is written


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, the lowest held-out loss first."""
    head = [
        "method",
        "trained",
        "learning rate",
        "CPU s",
        "peak GB",
        "held-out loss",
        "gold",
        "disk kB",
        "merge error",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in sorted(rows, key=lambda row: row.get("loss", 99.0)):
        if "failed" in row:
            lines.append(f"| {row['name']} | failed: {row['failed'][:120]} |" + " |" * 7)
            continue
        gold = "-" if row["gold"] is None else f"{row['gold']:.3f}"
        merged = f"{row['merge']:.0e}" if METHODS[row["name"]].mergeable else "not merged"
        cells = [
            row["name"],
            f"{row['trained']:,}",
            f"{row['rate']:g}",
            f"{row['cpu']:.0f}",
            f"{row['memory']:.2f}",
            f"{row['loss']:.4f}",
            gold,
            f"{row['disk'] / 1e3:,.0f}",
            merged if METHODS[row["name"]].adapter else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Held-out loss against trained parameters; needs matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "methods"}
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    groups = {"whole weights": "#4c72b0", "merges": "#55a868", "stays apart": "#c44e52"}
    for group, colour in groups.items():
        of = [row for row in rows if "loss" in row and group_of(row["name"]) == group]
        x, y = [row["trained"] for row in of], [row["loss"] for row in of]
        axis.plot(x, y, linestyle="none", marker="o", color=colour, label=group)
        for row in of:
            at = (row["trained"], row["loss"])
            axis.annotate(row["name"], at, xytext=(4, 3), textcoords="offset points", fontsize=8)
    starts = [row["start"] for row in rows if "start" in row]
    if starts:
        axis.axhline(starts[0], color="0.6", linewidth=1, label="before")
    axis.set(xscale="log", xlabel="trained parameters", ylabel="held-out loss, nats a token")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, metadata={"Date": None})


def group_of(name: str) -> str:
    """Its colour in the plot."""
    row = METHODS[name]
    if not row.adapter:
        return "whole weights"
    return "merges" if row.mergeable else "stays apart"


def main() -> int:
    """Train what is asked for, and write the table and the plot."""
    given = sys.argv[1:]
    own, overrides = given, []
    if "--" in given:
        own, overrides = given[: given.index("--")], given[given.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="*", default=list(RATES), choices=RATES, metavar="M")
    parser.add_argument("--name", default="tiny", help="of the files that are written")
    parser.add_argument("--runs", default=str(ROOT / "runs/methods"), help="where runs go")
    parser.add_argument("--out", default=str(ROOT / "benchmarks/methods"), help="table and plot")
    args = parser.parse_args(own)
    args.overrides = overrides or ["train.max_steps=100"]
    args.runs = str(Path(args.runs) / args.name)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for n, name in enumerate(args.methods):
        rows.append(run(name, args))
        said = rows[-1].get("failed") or f"held-out loss {rows[-1]['loss']:.4f}"
        print(f"[{n + 1}/{len(args.methods)}] {name}: {said}", flush=True)
    (out / f"{args.name}.md").write_text(table(rows))
    print(table(rows))
    try:
        plot(rows, out / f"{args.name}.svg")
    except ModuleNotFoundError:
        print("no plot: pip install matplotlib")
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
