"""Stage 1, supervised fine-tuning: a base model learns to answer, from demonstrations.

python stages/sft.py run=tiny method=lora train.learning_rate=1e-3
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rlhf import config, contract, data
from rlhf.launch import stage
from rlhf.manifest import BaseModel
from rlhf.stage_run import StageRun, open_run

if TYPE_CHECKING:  # these load torch
    from torch import nn

    from rlhf.supervised import Rows
    from rlhf.text import Renderer


@stage("sft")
def main(cfg: config.SFTStage) -> None:
    splits = data.load("sft", cfg.data)
    contract.check_rows(cfg.train, splits["train"])
    gold = data.gold_function(cfg.data)
    with open_run(cfg, splits) as run:
        if run.finished:
            return
        with run.loading():
            policy, renderer, rows, base, steps = load(cfg, splits, run)
        from rlhf import evaluate, golden, supervised

        run.begin(policy, steps=steps, save_every=cfg.train.save_every)
        with run.phase("train"):
            metrics = supervised.train_sft(
                *(policy, renderer.tokenizer, rows["train"], rows["validation"]),
                *(cfg.train, cfg.engine, cfg.method),
                seed=cfg.seed,
                checkpoints=run.checkpoints,
                tracker=run.tracker,
                note=run.note,
            )
        held_out = splits["validation"].rows
        with run.phase("evaluate"):
            asked = held_out[: cfg.evaluation.prompts]
            metrics |= evaluate.ceiling(
                policy, renderer, asked, cfg=cfg.sampling, seed=cfg.seed, gold=gold
            )
        run.log_final(metrics)
        run.publish(
            policy,
            renderer.tokenizer,
            golden.write_logits,
            [renderer.prompt(row["prompt"]) for row in held_out],
            base=base,
            metrics=metrics,
            summary=evaluate.sft_summary(metrics),
        )


class Loaded(NamedTuple):
    """What SFT works with; `steps` of the optimizer there will be."""

    policy: nn.Module
    renderer: Renderer
    rows: dict[str, Rows]
    base: BaseModel
    steps: int


def load(cfg: config.SFTStage, splits: dict[str, data.Split], run: StageRun) -> Loaded:
    """Render the rows, load the base model, and make it ready to train by the method."""
    from rlhf import engine, models, supervised, text
    from rlhf.methods import tokens

    renderer, added = text.load_renderer(cfg.model, cfg.template)
    tokenizer, dtype = renderer.tokenizer, engine.dtype(cfg.engine)
    rows = {name: renderer.sft(split, cfg.data) for name, split in splits.items()}
    model = models.load_base(cfg.model, tokenizer, dtype=dtype, method=cfg.method, added=added)
    run.settle_threads(model)
    longest = text.longest(rows) + cfg.method.positions
    contract.refuse_beyond(models.max_positions(model), longest, cfg.model.path, data.LENGTHS)
    base = models.base_facts(cfg.model, model)
    new = tokens.make_room(
        model,
        tokenizer,
        text.written(tokenizer, text.sequences(rows)),
        added=added,
        method=cfg.method,
        engine=cfg.engine,
        note=run.note,
    )
    steps = supervised.optimizer_steps(cfg.train, len(rows["train"]))
    policy = models.trainable(model, cfg.method, tokenizer=tokenizer, steps=steps, tokens=new)
    return Loaded(policy, renderer, rows, base, steps)


if __name__ == "__main__":
    main()
