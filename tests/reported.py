"""Runs with all that a report can show, made of made-up numbers; and a text that attacks it."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from test_registry import CONFIG, facts, fill

from rlhf.manifest import TOP_FILES
from rlhf.registry import Published, Registry
from rlhf.run import open_run

HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=2>{{ 7*7 }}"
STEPS = 120


def publish(
    registry: Registry,
    reference: str,
    parents: dict[str, Published] | None = None,
    *,
    curves: dict[str, list[Any]] | None = None,
    samples: list[dict[str, Any]] | None = None,
    files: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    **changes: Any,
) -> Published:
    """A finished run; of `files` what may change later is written after it is published.

    Args:
        curves: name -> its values at steps 1, 2, ...; None is a step without one.
        files: name -> what it holds, as JSON; a list is one object a line.
    """
    stage, run_name = reference.split("/")
    settings = CONFIG | {"stage": stage} | (config or {})
    with open_run(registry, stage, run_name, settings, parents or {}) as run:
        fill(run)
        write_metrics(run.metrics_path, curves or {})
        if samples is None:
            run.samples_path.unlink()
        else:
            run.samples_path.write_text("".join(json.dumps(row) + "\n" for row in samples))
        given = files or {}
        _write(run.path, {name: held for name, held in given.items() if name in TOP_FILES})
        run.publish(**facts(**({"metrics": {}} | changes)))
    _write(run.path, {name: held for name, held in given.items() if name not in TOP_FILES})
    return registry.resolve(reference)


def _write(folder: Path, files: dict[str, Any]) -> None:
    for name, held in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        lines = held if isinstance(held, list) else [held]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_metrics(path: Path, curves: dict[str, list[Any]]) -> None:
    """metrics.jsonl as the tracker writes it."""
    with path.open("w") as file:
        for at in range(max(map(len, curves.values()), default=0)):
            row = {n: v[at] for n, v in curves.items() if at < len(v) and v[at] is not None}
            odd = {n: str(v) for n, v in row.items() if not math.isfinite(v)}
            file.write(json.dumps({"step": at + 1} | row | odd) + "\n")


def card(verdict: str = "caution") -> dict[str, Any]:
    """A reward model's card."""

    def about(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.04, "high": value + 0.04}

    return {
        "schema": 1,
        "split": "test",
        "pairs": 520,
        "verdict": verdict,
        "reasons": ["flattery raises the score of 38 % of the answers", HOSTILE],
        "accuracy": about(0.74),
        "baselines": {
            "longer": about(0.61), "prompt_removed": about(0.66), "random": about(0.5)
        },
        "slices": {
            "length": [
                {"name": f"quarter {n}", "pairs": 130} | about(0.7 + n / 50) for n in range(4)
            ],
            "source": [{"name": HOSTILE, "pairs": 260} | about(0.7)],
        },
        "calibration": {
            "ece": 0.043,
            "brier": 0.181,
            "bins": [
                {
                    "low": 0.5 + n / 20,
                    "high": 0.55 + n / 20,
                    "confidence": 0.525 + n / 20,
                    "accuracy": 0.52 + n / 22,
                    "pairs": 52,
                }
                for n in range(10)
            ],
        },
        "margins": {"edges": list(range(-3, 6)), "counts": [3, 20, 80, 140, 150, 90, 30, 7]},
        "probes": [
            {"name": "empty", "what": "an empty answer", "pairs": 520} | about(0.97),
            {"name": "flattery", "what": "praise in front", "pairs": 520} | about(0.62),
        ],
        "agreement": [{"reference": "rm/seed1", "pairs": 520} | about(0.83)],
    }  # fmt: skip


def ppo_curves(seed: int, *, kl: float = 1.0) -> dict[str, list[Any]]:
    """Score and KL that rise, gold that rises and falls."""
    noise = random.Random(seed)
    curves: dict[str, list[Any]] = {}
    for step in range(1, STEPS + 1):
        t = step / STEPS
        values = {
            "objective/scores": 2 * t + noise.gauss(0, 0.2),
            "objective/kl": kl * 12 * t + noise.gauss(0, 0.4),
            "objective/entropy": 2 - t + noise.gauss(0, 0.05),
            "policy/approxkl": 0.02 + abs(noise.gauss(0, 0.01)),
            "policy/clipfrac": 0.1 + abs(noise.gauss(0, 0.03)),
            "response/length": 30 + 20 * t + noise.gauss(0, 2),
            "response/eos_rate": 1 - 0.1 * t,
            "val/explained_variance": t - 0.3,
            "loss/value": 1 / (1 + 5 * t),
            "time/rollout": 1.5 + noise.random(),
            "time/update": 2.5 + noise.random(),
            "perf/tokens_per_second": 900 + noise.random(),
        }
        if step % 12 == 0:
            gold = 0.45 + 0.7 * t * (1.1 - t)
            values |= {"eval/score": 1.9 * t, "eval/gold": gold, "eval/kl": kl * 12 * t}
            values |= {"eval/score_ci_low": 1.9 * t - 0.1, "eval/score_ci_high": 1.9 * t + 0.1}
            values |= {"eval/gold_ci_low": gold - 0.03, "eval/gold_ci_high": gold + 0.03}
        for name in (*curves, *(n for n in values if n not in curves)):
            curves.setdefault(name, [None] * (step - 1)).append(values.get(name))
    return curves


def over_optimisation(kl: float = 1.0) -> dict[str, Any]:
    """overoptimisation.json: gold turns at half of the run."""
    points = []
    for n in range(1, 11):
        t = n / 10
        score, gold = 1.9 * t, 0.45 + 0.7 * t * (1.1 - t)
        points.append(
            {"step": 12 * n, "kl": kl * 12 * t, "score": score, "gold": gold}
            | {"score_low": score - 0.1, "score_high": score + 0.1}
            | {"gold_low": gold - 0.03, "gold_high": gold + 0.03}
            | {"length": 30 + 20 * t, "eos_rate": 0.9, "distinct": 0.5}
            | {"repetition": 0.1, "entropy": 1.5}
        )
    return {
        "schema": 1,
        "measure": "gold",
        "points": points,
        "knee": {"step": 66, "kl": 6.6 * kl},
        "warnings": [
            {"step": 96, "name": "length", "text": f"length is up 60 %, gold is flat {HOSTILE}"}
        ],
    }  # fmt: skip


def samples(seed: int, count: int = 12) -> list[dict[str, Any]]:
    """samples.jsonl of PPO; the prompts are the same for every seed."""
    noise = random.Random(seed)
    rows = []
    for n in range(count):
        prompt = HOSTILE if n == 3 else f"Write a note about thing number {n}."
        rows.append(
            {
                "prompt": prompt,
                "sft": f"Dear Ann, here is thing {n}. I hope you like it.",
                "ppo": f"Dear Ann, here is the lovely thing {n}, by seed {seed}.\nBest wishes!",
                "sft_score": n / 10,
                "ppo_score": n / 10 + noise.random(),
                "sft_gold": 0.4,
                "ppo_gold": 0.4 + noise.random() / 2,
                "sft_ended": True,
                "ppo_ended": n != 5,
            }
        )
    return rows


def judged(reference: str) -> dict[str, Any]:
    """eval/sft.json."""

    def about(value: float, half: float = 0.05) -> dict[str, float]:
        return {"value": value, "low": value - half, "high": value + half}

    return {
        "schema": 1,
        "reference": reference,
        "against": "sft/demo",
        "judge": {"name": "gold", "calls": 200, "failures": 1, "cost": 0},
        "prompts": 200,
        "seed": 0,
        "wins": about(0.71),
        "ties": 0.06,
        "length_controlled": about(0.66),
        "by_category": [
            {"name": HOSTILE, "prompts": 50} | about(0.6),
            {"name": "thanks", "prompts": 150} | about(0.75),
        ],
        "score": {"ours": about(1.2), "theirs": about(0.3)},
        "kl": None,
        "length": {"ours": about(44.0, 2), "theirs": about(31.0, 2)},
        "rows": [
            {
                "prompt": f"prompt {n} {HOSTILE if n == 1 else ''}",
                "category": "thanks",
                "ours": f"our answer {n}",
                "theirs": f"their answer {n}",
                "ours_score": n / 3,
                "theirs_score": 0.5,
                "winner": "ours" if n else "tie",
            }
            for n in range(4)
        ],
    }


def build(registry: Registry) -> None:
    """sft/demo, rm/demo, ppo/a, ppo/b with everything; ppo/open unfinished, with odd numbers."""
    fall = [2.5 / (1 + n / 20) for n in range(STEPS)]
    sft = publish(
        registry,
        "sft/demo",
        curves={"train/loss": fall, "eval/loss": fall[::-1][:1] * 2, "train/grad_norm": fall},
        metrics={"eval/loss": 0.49, "eval/gold": 0.45, "eval/gold_ci_low": 0.42}
        | {"eval/gold_ci_high": 0.48},
    )
    rm = publish(
        registry,
        "rm/demo",
        {"policy": sft},
        curves={"train/loss": fall, "eval/accuracy": [0.5 + n / 500 for n in range(STEPS)]},
        metrics={"eval/accuracy": 0.74, "eval/accuracy_ci_low": 0.7, "eval/accuracy_ci_high": 0.78},
        files={"card.json": card()},
    )
    log = [
        {"prompt": "Say hello.", "ppo": f"Hello {'very ' * n}much!", "step": 12 * n, "ppo_kl": n}
        | {"ppo_score": n / 2, "ppo_gold": 0.5, "ppo_length": 4 + n}
        for n in range(4)
    ]
    for seed, name in enumerate("ab"):
        kl = 1.0 + seed
        publish(
            registry,
            f"ppo/{name}",
            {"policy": sft, "reward_model": rm},
            config={"ppo": {"kl_coef": 0.1 / kl}, "run_name": name},
            curves=ppo_curves(seed, kl=kl),
            samples=samples(seed),
            metrics={"eval/score": 1.9, "eval/score_ci_low": 1.8, "eval/score_ci_high": 2.0}
            | {"eval/gold": 0.6, "eval/gold_ci_low": 0.55, "eval/gold_ci_high": 0.65}
            | {"eval/score_sft": 0.1, "eval/gold_sft": 0.45},
            files={
                "overoptimisation.json": over_optimisation(kl),
                "eval/sft.json": judged(f"ppo/{name}"),
                "samples_log.jsonl": log,
            },
        )
    unfinished(registry)


def unfinished(registry: Registry) -> None:
    """ppo/open: interrupted, with numbers that are none, a broken line and a line being written."""
    with open_run(
        registry,
        "ppo",
        "open",
        CONFIG,
        {},
        config_text="policy_from: sft/demo\nrm_from: rm/demo\nseed: 3\n",
    ) as run:
        curves = ppo_curves(7)
        curves["objective/scores"][50:60] = [math.nan] * 10
        curves["policy/approxkl"][30] = math.inf
        curves["loss/value"] = [math.nan] * STEPS
        write_metrics(run.metrics_path, curves)
        with run.metrics_path.open("a") as file:
            file.write('{"step": 121, "objective/scores": 1.0,\n{"step": 122, "objective/sc')
