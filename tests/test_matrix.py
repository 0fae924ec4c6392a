"""Stages x ZeRO stages x processes: the same losses, gradient norms and sampled tokens.

One launch per number of processes and method loops over the engines, since loading libraries costs
more than the few steps that are compared. Partition threshold 0: ZeRO-3 splits every weight, also
the small ones that it would leave whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from launching import start_ranks
from safetensors.torch import load_file
from small_line import ROOT, numbers

# Fifty rows are three steps and a rest; two processes share 200 held-out rows in parts of 8.
ROWS = ["train.max_steps=4", "data.max_rows=50", "train.batch_size=16"]
ROWS += ["train.eval_every=2", "train.max_grad_norm=0.5", "train.learning_rate=1e-3"]
SIZES = {
    "sft": [*ROWS, "train.micro_batch_size=5", "evaluation.prompts=0"],
    "rm": ROWS,
    "ppo": [
        *("ppo.steps=5", "ppo.batch_size=16", "ppo.micro_batch_size=3", "ppo.minibatches=2"),
        *("ppo.epochs=2", "sampling.max_new_tokens=10", "evaluation.prompts=4"),
        *("ppo.learning_rate=3e-4", "ppo.critic_learning_rate=3e-4", "ppo.eval_every=5"),
        *("ppo.max_grad_norm=0.5", "stop.patience=99"),
    ],
}
ENGINES = {"full": (2, 0, 1, 3), "lora": (2, 0, 1, 3)}


def work(folder: Path, method: str, engines: list[str]) -> None:
    """One process: all stages under each engine; the tokens that PPO drew, by step."""
    from rlhf import engine, rollout

    draw, drawn = rollout.Sampler.rollout, []

    def note(sampler, prompts, *, step):
        found = draw(sampler, prompts, step=step)
        drawn.append(engine.gather_objects(found.answer_ids()))
        return found

    rollout.Sampler.rollout = note
    for zero in engines:
        drawn.clear()
        for stage, sizes in SIZES.items():
            given = [f"runs_dir={folder}/zero{zero}", "tracking=off", f"method={method}"]
            given += [f"engine=zero{zero}", "engine.partition_threshold=0", *sizes]
            given += ["engine.allow_zero3_adapters=true"]
            sys.argv = [f"stages/{stage}.py", *given]
            with contextlib.suppress(SystemExit):
                runpy.run_path(str(ROOT / "stages" / f"{stage}.py"), run_name="__main__")
            engine.barrier()
            assert (folder / f"zero{zero}" / stage / "tiny/manifest.json").exists()
        # Rows go to processes by turns; put them back in one order.
        rows = [[row for rows in zip(*step, strict=True) for row in rows] for step in drawn]
        if os.environ["RANK"] == "0":
            (folder / f"zero{zero}" / "tokens.json").write_text(json.dumps(rows))


def launch(folder: Path, method: str, processes: int, engines: tuple[int, ...] = ()) -> Path:
    folder.mkdir(parents=True)
    start_ranks(processes, __file__, str(folder), method, *map(str, engines or ENGINES[method]))
    return folder


# what is compared --------------------------------------------------------------------------------

REFERENCE = "zero2"
BOUND = 1e-4  # relative, in fp32, after up to four updates of Adam, which magnifies rounding


def worst(one: list[dict], other: list[dict], names: tuple[str, ...]) -> float:
    """The largest relative difference of the named numbers; each must be there as often."""
    assert [line["step"] for line in one] == [line["step"] for line in other]
    pairs = [
        (line[name], again[name])
        for line, again in zip(one, other, strict=True)
        for name in names
        if name in line or name in again
    ]
    assert len(pairs) >= 4
    return max(abs(a - b) / max(abs(a), 1e-2) for a, b in pairs)


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def made(request, tmp_path_factory) -> dict[str, Path]:
    """method -> folder with a line of work under each engine."""
    place = tmp_path_factory.mktemp(f"matrix{request.param}")
    return {method: launch(place / method, method, request.param) for method in ENGINES}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, Path]:
    """One process, ZeRO-2."""
    place = tmp_path_factory.mktemp("alone")
    return {method: launch(place / method, method, 1, (2,)) for method in ENGINES}


CASES = [(method, zero) for method, engines in ENGINES.items() for zero in engines]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "zero"), CASES)
@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_losses_and_gradient_norms_are_the_same(made, alone, stage, method, zero, capsys):
    expected = numbers(alone[method] / REFERENCE, stage)
    found = numbers(made[method] / f"zero{zero}", stage)
    off = worst(expected, found, ("train/loss", "train/grad_norm", "eval/loss"))
    with capsys.disabled():
        print(f"\n{stage} {method} zero{zero}: {off:.1e}")
    assert off < BOUND


@pytest.mark.slow
@pytest.mark.parametrize(("method", "zero"), CASES)
def test_ppo_draws_the_same_tokens_and_learns_the_same(made, alone, method, zero, capsys):
    one, other = alone[method] / REFERENCE, made[method] / f"zero{zero}"
    drawn, again = (json.loads((folder / "tokens.json").read_text()) for folder in (one, other))
    assert len(drawn) == 5
    assert again == drawn
    expected, found = numbers(one, "ppo"), numbers(other, "ppo")
    names = ("loss/policy", "loss/value", "policy/grad_norm", "val/grad_norm", "objective/scores")
    first = max(abs(expected[0][n] - found[0][n]) for n in ("loss/policy", "policy/approxkl"))
    off = worst(expected, found, names)
    with capsys.disabled():
        print(f"\nppo {method} zero{zero}: first update {first:.1e}, five {off:.1e}")
    assert first < 1e-5
    assert off < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_zero3_published_is_what_zero2_published(made, method, stage):
    """Whole, loadable without DeepSpeed, and the same weights; of an adapter, merged."""
    weights = [
        load_file(made[method] / f"zero{zero}" / stage / "tiny/model/model.safetensors")
        for zero in (2, 3)
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert tensor.numel() > 0
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=2e-3, msg=name)


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
