"""Stage 2, the reward model: the SFT model with a scalar head learns which answer people prefer.

python stages/rm.py run=tiny train.epochs=1
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rlhf import config, contract, data
from rlhf.launch import stage
from rlhf.registry import Published, Registry
from rlhf.stage_run import StageRun, open_run

if TYPE_CHECKING:  # these load torch
    from torch import nn

    from rlhf.supervised import Rows
    from rlhf.text import Renderer


@stage("rm")
def main(cfg: config.RMStage) -> None:
    registry = Registry(cfg.runs_dir)
    sft = contract.parent(registry, "policy_from", cfg.policy_from)
    contract.check_method(sft, cfg.method)
    others = contract.siblings(registry, sft, cfg.card, run_name=cfg.run_name)
    splits = data.load("rm", cfg.data)
    contract.check_rows(cfg.train, splits["train"])
    notes = contract.sibling_notes(registry, sft, cfg.card, run_name=cfg.run_name)
    with open_run(cfg, splits, {"policy": sft}, notes=notes) as run:
        if run.finished:
            return
        with run.loading():
            reward_model, renderer, pairs, steps = load(cfg, sft, splits, run)
        from rlhf import card, evaluate, golden, probes, supervised

        run.begin(reward_model, steps=steps, save_every=cfg.train.save_every)
        with run.phase("train"):
            metrics = supervised.train_rm(
                *(reward_model, renderer.tokenizer, pairs["train"], pairs["validation"]),
                *(cfg.train, cfg.engine, cfg.method),
                center_coef=cfg.center_coef,
                seed=cfg.seed,
                checkpoints=run.checkpoints,
                tracker=run.tracker,
                note=run.note,
            )
        held_out = "test" if "test" in pairs else "validation"
        with run.phase("evaluate"):
            asked = probes.HeldOutPairs(
                *(splits[held_out], pairs[held_out], renderer, cfg.card, cfg.engine),
                positions_taken=cfg.method.positions,
                max_response_tokens=cfg.data.max_response_tokens,
                batch_size=cfg.train.micro_batch_size,
            )
            measured, report = asked.measure(reward_model, others, contract.positions(sft))
            metrics |= measured
        run.keep_card(report)
        run.log_final(metrics)
        run.publish(
            reward_model,
            renderer.tokenizer,
            golden.write_scores,
            [row["chosen_ids"] for row in pairs[held_out]],
            base=sft.manifest.base,
            metrics=metrics,
            summary=evaluate.rm_summary(metrics, held_out) + card.summary(report),
        )


class Loaded(NamedTuple):
    """What the reward model's stage works with; `steps` of the optimizer there will be."""

    reward_model: nn.Module
    renderer: Renderer
    pairs: dict[str, Rows]
    steps: int


def load(
    cfg: config.RMStage, sft: Published, splits: dict[str, data.Split], run: StageRun
) -> Loaded:
    """Render the pairs, and make the SFT model with a scalar head ready to train by the method."""
    from rlhf import golden, models, supervised, text

    tokenizer = text.load_parent_tokenizer(sft, template=cfg.template)
    renderer = text.Renderer(tokenizer)
    pairs = {name: renderer.pairs(split, cfg.data) for name, split in splits.items()}
    contract.check_positions(sft, text.longest(pairs) + cfg.method.positions, data.LENGTHS)
    backbone = models.load_backbone(sft, tokenizer, cfg.engine)
    run.settle_threads(backbone)
    run.note(golden.check_start(backbone, sft))
    steps = supervised.optimizer_steps(cfg.train, len(pairs["train"]))
    reward_model = models.scalar_model(
        backbone, cfg.method, cfg.engine, tokenizer=tokenizer, steps=steps
    )
    return Loaded(reward_model, renderer, pairs, steps)


if __name__ == "__main__":
    main()
