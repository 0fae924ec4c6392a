"""Our PPO beside TRL's from the same starting points: a learning curve, and two laid together.

    python benchmarks/anchor.py run --anchor DIR --out ours.jsonl --seed 0 --lr 1e-4 --updates 80
    python benchmarks/anchor.py compare --ours ours*.jsonl --trl trl*.jsonl --out anchor.md

DIR holds sft/, rm/, rm_polarity/ (Hugging Face), gold.py (`gold(text)`), prompts_train.jsonl and
prompts_val.jsonl. `run` is `stages/ppo.py` as a user starts it; numbers are taken from its own
calls, and what looks on (held-out evaluation, checkpoints, this script) is off the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib.util
import itertools
import json
import math
import os
import runpy
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# TRL's settings as ours are spelled; tests/test_anchor.py has the same list.
SETTINGS = [
    *("ppo.batch_size=64", "ppo.micro_batch_size=64", "ppo.epochs=4", "ppo.minibatches=1"),
    *("ppo.schedule=constant", "ppo.kl_coef=0.05", "ppo.gamma=1", "ppo.lam=0.95"),
    *("ppo.vf_coef=0.1", "ppo.cliprange=0.2", "ppo.cliprange_value=0.2"),
    *("ppo.missing_eos_penalty=1", "ppo.max_grad_norm=1e9", "sampling.max_new_tokens=64"),
    *("method=full", "experiment=none", "data.max_prompt_tokens=48", "evaluation.prompts=128"),
    *("tracking=off", "run=anchor", "ppo.eval_every=5", "ppo.save_every=1000000"),
]


# ---------------------------------------------------------------- run


class Clock:
    """CPU seconds of this process since `start`, without those spent in `off`."""

    def __init__(self) -> None:
        self.started = False
        self._start = self._off = 0.0

    def start(self) -> None:
        if not self.started:
            self.started, self._start, self._off = True, time.process_time(), 0.0

    def seconds(self) -> float:
        return time.process_time() - self._start - self._off

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Time in here does not count."""
        before = time.process_time()
        yield
        self._off += time.process_time() - before


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """One curve; the exit code of the stage."""
    import torch

    torch.set_num_threads(1)
    from rlhf import evaluate, ppo
    from rlhf.checkpointing import Checkpoints
    from rlhf.stage_run import StageRun

    gold = gold_of(args.anchor)
    clock = Clock()
    live: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(open(args.out, "w", encoding="utf-8"))
        folder = args.keep or stack.enter_context(tempfile.TemporaryDirectory())

        def write(row: dict[str, Any]) -> None:
            out.write(json.dumps(rounded(row)) + "\n")
            out.flush()

        def timed(self: StageRun, name: str) -> Any:
            clock.start()
            return real["timed"](self, name)

        def score(drawn: Any, reward: Any, rows: Any, renderer: Any, **sizes: Any) -> Any:
            verdict, means = real["score"](drawn, reward, rows, renderer, **sizes)
            live.update(drawn=drawn, scores=verdict.scores, renderer=renderer)
            return verdict, means

        def answers(self: evaluate.HeldOut, policy: Any) -> evaluate.Answers:
            with clock.off():
                found = real["answers"](self, policy)
                live["eval"] = describe(found)
            if not clock.started:
                given = {name: getattr(args, name) for name in ("seed", "lr", "updates", "rm")}
                about = {"torch": torch.__version__, "args": {**given, "more": overrides}}
                write({"update": 0, "episodes": 0, "cpu_s": 0.0, "eval": live.pop("eval")} | about)
            return found

        def log(self: StageRun, stats: dict[str, float], **more: Any) -> None:
            seconds = clock.seconds()
            with clock.off():
                drawn, scores = live["drawn"], live["scores"]
                texts = [live["renderer"].decode(ids) for ids in drawn.answer_ids()]
                row = {
                    "update": more["step"],
                    "episodes": more["step"] * len(texts),
                    "cpu_s": seconds,
                    "score": scores.mean().item(),
                    "score_std": scores.std().item(),
                    "score_with_penalty": stats["objective/scores"],
                    "kl": stats["objective/kl"],
                    "length": drawn.response_mask.sum(1).float().mean().item(),
                    "eos": drawn.ended.float().mean().item(),
                    "gold_train": statistics.mean(gold(text) for text in texts),
                    "clipfrac": stats.get("policy/clipfrac", 0.0),
                    "approxkl": stats.get("policy/approxkl", 0.0),
                    "value_loss": stats["loss/value"],
                    "explained": stats["val/explained_variance"],
                }
                if "eval" in live:
                    row["eval"] = live.pop("eval")
                write(row)
            real["log"](self, stats, **more)

        def save(self: Checkpoints) -> None:
            with clock.off():
                real["save"](self)

        real: dict[str, Callable[..., Any]] = {}
        for owner, hook in (
            *((StageRun, timed), (StageRun, log), (Checkpoints, save)),
            *((ppo, score), (evaluate.HeldOut, answers)),
        ):
            real[hook.__name__] = getattr(owner, hook.__name__)
            setattr(owner, hook.__name__, hook)
        return stage(args, Path(folder), overrides)


def stage(args: argparse.Namespace, folder: Path, overrides: list[str]) -> int:
    """Adopt the anchor into `folder` and run stage 3 there."""
    from rlhf.adopt import adopt
    from rlhf.registry import Registry

    anchor, registry = Path(args.anchor), Registry(folder / "runs")
    adopt(registry, anchor / "sft", stage="sft", run_name="anchor", template="plain")
    if args.rm == "rm":
        adopt(
            registry,
            anchor / "rm",
            stage="rm",
            run_name="anchor",
            parent="sft/anchor",
            max_prompt_tokens=48,
            max_response_tokens=64,
        )
    else:  # trained from another checkpoint than sft/
        adopt(registry, anchor / args.rm, stage="rm", run_name="anchor", template="plain")
        overrides = [*overrides, "allow_foreign_rm=true"]
    data = folder / "data"
    data.mkdir(exist_ok=True)
    shutil.copyfile(anchor / "prompts_train.jsonl", data / "train.jsonl")
    shutil.copyfile(anchor / "prompts_val.jsonl", data / "validation.jsonl")
    wrapped = "\n\ndef scores(prompts, responses, rows):\n    return [gold(r) for r in responses]\n"
    (data / "gold.py").write_text((anchor / "gold.py").read_text() + wrapped)
    given = [
        *(f"runs_dir={registry.runs_dir}", f"data.path={data}"),
        *(f"data.gold={data / 'gold.py'}:scores", f"seed={args.seed}"),
        *(f"ppo.learning_rate={args.lr}", f"ppo.critic_learning_rate={args.lr}"),
        f"ppo.steps={args.updates}",
    ]
    sys.argv = ["stages/ppo.py", *SETTINGS, *given, *overrides]
    try:
        runpy.run_path(str(ROOT / "stages" / "ppo.py"), run_name="__main__")
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def gold_of(anchor: str) -> Callable[[str], float]:
    """`gold` of the anchor's gold.py."""
    spec = importlib.util.spec_from_file_location("anchor_gold", Path(anchor) / "gold.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.gold


def describe(answers: Any) -> dict[str, float]:
    """Held-out answers in the numbers that TRL's curve has."""
    words = [word for text in answers.texts for word in text.lower().split()]
    return {
        "gold": statistics.mean(answers.gold),
        "gold_std": statistics.stdev(answers.gold),
        "rm": statistics.mean(answers.scores),
        "rm_std": statistics.stdev(answers.scores),
        "eos": statistics.mean(map(float, answers.ended)),
        "length": statistics.mean(len(ids) for ids in answers.answer_ids),
        "distinct": len(set(words)) / max(1, len(words)),
        "pairs": len(set(answers.texts)) / len(answers.texts),
        "kl": statistics.mean(answers.kl),
    }


def rounded(value: Any) -> Any:
    """Floats to five digits after the point, inside dicts too."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return round(value, 5) if isinstance(value, float) else value


# ---------------------------------------------------------------- compare

MEAN, STD = -0.014, 1.366  # score of 1272 SFT samples, from the anchor's README
MARKS = (0.5, 1.0, 1.5, 2.0, 2.5)  # standard deviations above that mean
BINS = ((2, 4), (4, 8), (8, 12), (12, 16), (16, 20), (20, 26))  # nats per answer
UPDATES = (5, 10, 15, 20, 25, 30, 40, 45, 50, 60, 70, 80)  # shown side by side
LAST = 3  # evaluations that make "the end"

Numbers = list[float]


@dataclass
class Curve:
    """One run.

    Attributes:
        start: score of held-out answers before training.
        rows: of the updates from 1 on; numbers of the rollout made before each update.
        evals: (update, KL of the same weights, numbers on held-out prompts), from update 5 on.
    """

    seed: int
    lr: float
    rm: str
    start: float
    rows: list[dict[str, Any]]
    evals: list[tuple[int, float, dict[str, float]]]

    @classmethod
    def read(cls, path: str) -> Curve:
        opened = gzip.open if path.endswith(".gz") else open
        with opened(path, "rt", encoding="utf-8") as lines:
            first, *rows = [json.loads(line) for line in lines]
        # The rollout of the next update is drawn by the weights that an evaluation saw.
        after = [row["kl"] for row in rows[1:]] + [rows[-1]["kl"]]
        pairs = zip(rows, after, strict=True)
        evals = [(row["update"], kl, row["eval"]) for row, kl in pairs if "eval" in row]
        given = first["args"]
        start = first["eval"]["rm"]
        return cls(given["seed"], given["lr"], given.get("rm", "rm"), start, rows, evals)

    def reaches(self, score: float) -> dict[str, float] | None:
        """The first row whose batch and the two before it have this mean score."""
        for i in range(2, len(self.rows)):
            if statistics.mean(row["score"] for row in self.rows[i - 2 : i + 1]) >= score:
                return self.rows[i]
        return None

    def crosses(self, score: float) -> float | None:
        """The update at which held-out answers score this much, by straight lines."""
        points = [(0, self.start), *((update, numbers["rm"]) for update, _, numbers in self.evals)]
        for (before, low), (after, high) in itertools.pairwise(points):
            if low < score <= high:
                return before + (after - before) * (score - low) / (high - low)
        return None

    def trained(self, update: int, name: str) -> float | None:
        return next((row[name] for row in self.rows if row["update"] == update), None)

    def evaluated(self, update: int, name: str) -> float | None:
        return next((numbers[name] for at, _, numbers in self.evals if at == update), None)

    def held_out(self, name: str) -> list[tuple[float, float, int]]:
        """(KL, number, update) of each evaluation."""
        return [(kl, numbers[name], update) for update, kl, numbers in self.evals]

    def end(self, name: str) -> float:
        return statistics.mean(numbers[name] for _, _, numbers in self.evals[-LAST:])


def compare(args: argparse.Namespace) -> int:
    """Write the tables, and the plots where asked."""
    ours, trl = ([Curve.read(path) for path in paths] for paths in (args.ours, args.trl))
    out = [Path(args.preface).read_text(encoding="utf-8")] if args.preface else []
    for rm, lr in sorted({(c.rm, c.lr) for c in ours} & {(c.rm, c.lr) for c in trl}):
        pair = [[c for c in side if (c.rm, c.lr) == (rm, lr)] for side in (ours, trl)]
        if rm == "rm":
            out += [f"## Learning rate {lr:g}", ""]
            for section in (speed_table, score_table, held_out_tables, end_table, course_table):
                out += section(*pair)
            if args.plots:
                out += plot(*pair, folder=Path(args.plots), beside=Path(args.out).parent, lr=lr)
        else:
            out += [f"## The run that breaks: {rm}, learning rate {lr:g}", "", *course_table(*pair)]
    if args.ours_short:
        out += cost(*([Curve.read(path) for path in x] for x in (args.ours_short, args.trl_short)))
    Path(args.out).write_text("\n".join(out).rstrip() + "\n", encoding="utf-8")
    return 0


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def difference(ours: Numbers, trl: Numbers, *, digits: int) -> str:
    """Ours less TRL's, with 2 standard errors of independent numbers."""
    if not ours or not trl:
        return "–"
    off = statistics.mean(ours) - statistics.mean(trl)
    if min(len(ours), len(trl)) < 2:
        return f"{off:+.{digits}f}"
    error = math.sqrt(sum(statistics.variance(x) / len(x) for x in (ours, trl)))
    return f"{off:+.{digits}f} ± {2 * error:.{digits}f}"


def speed_table(ours: list[Curve], trl: list[Curve]) -> list[str]:
    """When each mark is reached, by the batches and by held-out answers."""
    batch, held_out = [], []
    for mark in MARKS:
        score = MEAN + mark * STD
        rows = [[curve.reaches(score) for curve in side] for side in (ours, trl)]
        found = [
            [None if row is None else [row[name] for name in SPEED] for row in side]
            for side in rows
        ]
        batch.append([f"+{mark:g} std ({score:.2f})", *marks(*found)])
        crossed = [[curve.crosses(score) for curve in side] for side in (ours, trl)]
        found = [[None if update is None else [update] for update in side] for side in crossed]
        held_out.append([f"+{mark:g} std ({score:.2f})", *marks(*found)])
    head = ["mark (score)", "ours, by seed", "mean", "TRL, by seed", "mean", "ours - TRL, updates"]
    seeds = ["; ".join(f"{c.seed}" for c in side) for side in (ours, trl)]
    return [
        "First update whose batch, with the two before it, has a mean score at the mark; means are "
        "update / answers / CPU s, the difference has 2 standard errors over seeds. Seeds: "
        f"{seeds[0]} (ours) and {seeds[1]} (TRL).",
        *("", *table(head, batch)),
        "The update at which the score of held-out answers is there, between evaluations by a "
        "straight line (128 prompts, the same noise each time within a run; every 5 updates).",
        *("", *table(head, held_out)),
    ]


SPEED = ("update", "episodes", "cpu_s")


def marks(ours: list[Numbers | None], trl: list[Numbers | None]) -> list[str]:
    """Updates by seed and means, of both sides, and the difference; only where all are there."""

    def cell(values: Iterable[float]) -> str:
        return " / ".join(f"{value:.0f}" if value > 30 else f"{value:.3g}" for value in values)

    cells, updates = [], []
    for side in (ours, trl):
        known = [values for values in side if values is not None]
        cells.append(" ".join("–" if values is None else cell(values[:1]) for values in side))
        means = (statistics.mean(column) for column in zip(*known, strict=True))
        cells.append(f"**{cell(means)}**" if len(known) == len(side) else "–")
        updates.append([values[0] for values in known] if len(known) == len(side) else [])
    return [*cells, difference(*updates, digits=1)]


def score_table(ours: list[Curve], trl: list[Curve]) -> list[str]:
    """Batches at equal KL."""
    rows = bins(
        ours, trl, lambda c: [(row["kl"], row["score"], row["update"]) for row in c.rows], digits=2
    )
    return [
        "Score at equal KL: mean over the training batches whose KL (nats per answer) lies in the "
        "bin; beside it how many there are, their mean KL and mean update. Difference ± 2 standard "
        "errors, over the means of seeds, and over batches (batches of one run follow one another, "
        "so that interval is too narrow).",
        *("", *table([*BIN_HEAD, "by batch"], rows)),
    ]


def held_out_tables(ours: list[Curve], trl: list[Curve]) -> list[str]:
    """Variety and gold at equal KL."""
    out = []
    for name, digits, text in (
        ("distinct", 3, "Variety at equal KL: distinct words / words of 128 held-out answers."),
        ("gold", 2, "Gold at equal KL, of the same answers."),
    ):
        rows = bins(ours, trl, partial(Curve.held_out, name=name), digits=digits)
        out += [text, "", *table([*BIN_HEAD, "by evaluation"], rows)]
    return out


BIN_HEAD = ["KL", "ours", "n, KL, update", "TRL", "n, KL, update", "ours - TRL, by seed"]


def bins(
    ours: list[Curve],
    trl: list[Curve],
    points: Callable[[Curve], list[tuple[float, float, int]]],
    *,
    digits: int,
) -> list[list[str]]:
    """A line per bin; `points` gives (KL, value, update). Seeds without any in it are left out."""
    rows = []
    for low, high in BINS:
        line, seeds, flat = [f"{low}-{high}"], [], []
        for side in (ours, trl):
            found = [[p for p in points(curve) if low <= p[0] < high] for curve in side]
            here = [point for seed in found for point in seed]
            if here:
                kl, value, update = (statistics.mean(column) for column in zip(*here, strict=True))
                line += [f"{value:.{digits}f}", f"{len(here)}, {kl:.1f}, {update:.0f}"]
            else:
                line += ["–", "0"]
            seeds.append([statistics.mean(p[1] for p in seed) for seed in found if seed])
            flat.append([point[1] for point in here])
        rows.append([*line, *(difference(*x, digits=digits) for x in (seeds, flat))])
    return rows


def end_table(ours: list[Curve], trl: list[Curve]) -> list[str]:
    """Held-out numbers of the last evaluations."""
    longest = max(len(curve.rows) for curve in (*ours, *trl))
    whole = [[curve for curve in side if len(curve.rows) == longest] for side in (ours, trl)]
    rows = []
    for name in ("gold", "rm", "eos", "length", "distinct"):
        ends = [[curve.end(name) for curve in side] for side in whole]
        line = [name]
        for side in ends:
            line += [" ".join(f"{value:.3f}" for value in side), f"{statistics.mean(side):.3f}"]
        rows.append([*line, difference(*ends, digits=3)])
    updates = ", ".join(str(update) for update, _, _ in whole[0][0].evals[-LAST:])
    return [
        f"The end: mean of the last {LAST} evaluations (updates {updates}), difference ± 2 "
        "standard errors over the seeds that went so far. One evaluation of gold has a standard "
        "error of 0.055.",
        "",
        *table(["held out", "ours", "mean", "TRL", "mean", "ours - TRL, by seed"], rows),
    ]


def course_table(ours: list[Curve], trl: list[Curve]) -> list[str]:
    """The same numbers at some updates, mean over seeds."""
    held_out = [("gold", 2), ("rm", 2), ("distinct", 3)]
    batch = [("score", 2), ("gold_train", 2), ("kl", 1), ("eos", 3), ("length", 1)]
    rows = []
    for update in UPDATES:
        if update > max(len(curve.rows) for curve in (*ours, *trl)):
            break
        line = [str(update), str(update * 64)]
        for names, take in ((held_out, Curve.evaluated), (batch, Curve.trained)):
            for name, digits in names:
                both = ([take(curve, update, name) for curve in side] for side in (ours, trl))
                line.append(" / ".join(mean_of(side, digits=digits) for side in both))
        rows.append(line)
    head = ["update", "answers", "gold", "rm", "distinct"]
    head += ["batch: score", "gold", "KL", "EOS rate", "length"]
    text = "Mean over seeds, ours / TRL; the first three are held out, the others of the batch."
    return [text, "", *table(head, rows)]


def mean_of(found: list[float | None], *, digits: int) -> str:
    """Of the runs that have the number; a dash where none has."""
    known = [value for value in found if value is not None]
    return f"{statistics.mean(known):.{digits}f}" if known else "–"


def cost(ours: list[Curve], trl: list[Curve]) -> list[str]:
    """What an update costs, from runs made in turns; the first update of each is left out."""
    updates, tokens = [], []
    for side in (ours, trl):
        seconds = [(c.rows[-1]["cpu_s"] - c.rows[0]["cpu_s"]) / (len(c.rows) - 1) for c in side]
        drawn = [statistics.mean(64 * row["length"] for row in c.rows[1:]) for c in side]
        updates.append(seconds)
        tokens.append([1000 * s / n for s, n in zip(seconds, drawn, strict=True)])
    rows = []
    for name, values in (("CPU s an update", updates), ("CPU ms an answer token", tokens)):
        each = [" ".join(f"{value:.2f}" for value in side) for side in values]
        mine, other = map(statistics.mean, values)
        rows.append([name, *each, f"{other / mine:.2f}"])
    return [
        *("## Cost of an update", ""),
        f"Runs of {updates_of(ours)} updates each, ours and TRL's in turns on one machine; the "
        "first update of each is left out.",
        *("", *table(["", "ours", "TRL", "TRL / ours"], rows)),
    ]


def updates_of(side: list[Curve]) -> str:
    return ", ".join(str(len(curve.rows)) for curve in side)


def plot(
    ours: list[Curve], trl: list[Curve], *, folder: Path, beside: Path, lr: float
) -> list[str]:
    """Four small plots in one SVG; needs matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "anchor"}
    panels: list[tuple[str, str, Callable[[Curve], tuple[Numbers, Numbers]]]] = [
        ("answers", "score of the batch", lambda c: columns(c, "episodes", "score")),
        ("KL, nats per answer", "score of the batch", lambda c: columns(c, "kl", "score")),
        (
            "answers",
            "gold, held out",
            lambda c: ([64.0 * u for u, _, _ in c.evals], [e["gold"] for _, _, e in c.evals]),
        ),
        (
            "KL, nats per answer",
            "distinct words, held out",
            lambda c: ([kl for _, kl, _ in c.evals], [e["distinct"] for _, _, e in c.evals]),
        ),
    ]
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    for axis, (x, y, points) in zip(axes.flat, panels, strict=True):
        for who, colour, side in (("TRL 1.12", "#c44e52", trl), ("ours", "#4c72b0", ours)):
            for n, curve in enumerate(side):
                dots = {"linestyle": "none", "marker": "o", "markersize": 3} if "KL" in x else {}
                label = {} if n else {"label": who}
                axis.plot(*points(curve), color=colour, alpha=0.7, linewidth=1.2, **label, **dots)
        axis.set(xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
    axes.flat[0].legend()
    path = folder / f"lr{lr:.0e}.svg".replace("e-0", "e-")
    figure.savefig(path, metadata={"Date": None})
    return [f"![learning rate {lr:g}]({os.path.relpath(path, beside)})", ""]


def columns(curve: Curve, x: str, y: str) -> tuple[Numbers, Numbers]:
    """Two columns of the rows."""
    return [row[x] for row in curve.rows], [row[y] for row in curve.rows]


# ---------------------------------------------------------------- command line


def main() -> int:
    """`run` or `compare`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="train, one JSON line per update; more: Hydra overrides")
    one.add_argument("--anchor", required=True, help="the anchor folder")
    one.add_argument("--out", required=True)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--lr", type=float, default=1e-4)
    one.add_argument("--updates", type=int, default=80)
    one.add_argument("--rm", default="rm", choices=("rm", "rm_polarity"))
    one.add_argument("--keep", metavar="FOLDER", help="runs and data stay there, for `rlhf report`")
    two = commands.add_parser("compare", help="lay curves over each other, by learning rate")
    two.add_argument("--ours", nargs="+", required=True)
    two.add_argument("--trl", nargs="+", required=True)
    two.add_argument("--out", required=True, help="a Markdown file")
    two.add_argument("--preface", help="a Markdown file that opens it")
    two.add_argument("--ours-short", nargs="+", help="runs made in turns with --trl-short")
    two.add_argument("--trl-short", nargs="+", help="see --ours-short")
    two.add_argument("--plots", metavar="FOLDER", help="for SVG files; needs matplotlib")
    args, more = parser.parse_known_args()
    if args.command == "run":
        return run(args, more)
    if more:
        parser.error(f"unknown: {' '.join(more)}")
    return compare(args)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `rlhf.launch` has it, before torch
    sys.exit(main())
