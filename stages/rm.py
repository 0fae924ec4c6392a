"""Stage 2, the reward model: the SFT model with a scalar head learns which answer people prefer.

python stages/rm.py run=tiny train.epochs=1
"""

from rlhf import compatibility, config, contract, data, guards, threads
from rlhf.launch import stage
from rlhf.registry import Registry
from rlhf.session import open_session


@stage("rm")
def main(cfg: config.RMStage) -> None:
    registry = Registry(cfg.runs_dir)
    sft = contract.parent(registry, "policy_from", cfg.policy_from)
    contract.check_method(sft, cfg.method)
    others = contract.siblings(registry, sft, cfg)
    splits = data.load("rm", cfg.data)
    contract.check_rows(cfg.train, splits["train"])
    with open_session(cfg, splits, {"policy": sft}) as session:
        if session.finished:
            return
        compatibility.check(cfg)
        for note in contract.sibling_notes(registry, sft, cfg):
            session.note(note)
        from rlhf import card, engine, evaluate, golden, models, probes, supervised, text

        with session.phase("load"):
            engine.start(cfg.seed)
            for note in guards.check_device(cfg):
                session.note(note)
            engine.rehearse(cfg.engine)
            tokenizer = text.load_parent_tokenizer(sft, template=cfg.template)
            renderer = text.Renderer(tokenizer)
            pairs = {name: renderer.pairs(split, cfg.data) for name, split in splits.items()}
            longest = max(
                len(ids) for rows in pairs.values() for row in rows for ids in row.values()
            )
            contract.check_positions(sft, longest + cfg.method.positions, data.LENGTHS)
            dtype = engine.dtype(cfg.engine)
            backbone = models.load_parent(models.load_scalar, sft, tokenizer, dtype)
            session.note(threads.settle(models.largest(backbone)))
            session.note(golden.check_start(backbone, sft))
            backbone = models.quantized(backbone, tokenizer, cfg.method, dtype)
            steps = supervised.optimizer_steps(cfg.train, len(pairs["train"]))
            reward_model = models.trainable(
                backbone, cfg.method, head=True, tokenizer=tokenizer, steps=steps
            )
        session.opening(splits, *models.count_parameters(reward_model))

        keeper = session.keeper(steps, cfg.train.save_every)
        with session.tracker(keeper) as tracker:
            with session.phase("train"):
                metrics = supervised.train_rm(
                    reward_model,
                    tokenizer,
                    pairs["train"],
                    pairs["validation"],
                    center_coef=cfg.center_coef,
                    cfg=cfg.train,
                    method=cfg.method,
                    engine_cfg=cfg.engine,
                    seed=cfg.seed,
                    keeper=keeper,
                    tracker=tracker,
                    note=session.note,
                )
            with session.phase("evaluate"), engine.whole(reward_model):
                held_out = "test" if "test" in pairs else "validation"
                asked = probes.HeldOutPairs(splits[held_out], pairs[held_out], renderer, cfg)
                scores = asked.scores(reward_model)
                metrics |= evaluate.pairs(pairs[held_out], *scores)
                report = asked.card(reward_model, scores, others, contract.positions(sft))
                if report is not None:
                    metrics |= report.metrics
                session.keep_card(report)
            session.log_final(tracker, metrics, step=keeper.step)

        with session.phase("publish"):
            session.publish_model(models.publish, reward_model, tokenizer)
            answers = [row["chosen_ids"] for row in pairs[held_out]]
            facts = golden.write_scores(
                reward_model, answers, renderer.pad_id, session.model_dir, dtype
            )
        session.publish(
            base=sft.manifest.base,
            tokenizer=engine.from_main(text.published_facts, session.model_dir),
            splits=splits,
            metrics=metrics,
            golden=facts,
            where=engine.where(cfg.engine),
            summary=evaluate.rm_summary(metrics, held_out) + card.summary(report),
        )


if __name__ == "__main__":
    main()
