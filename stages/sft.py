"""Stage 1, supervised fine-tuning: a base model learns to answer, from demonstrations.

python stages/sft.py run=tiny method=lora train.learning_rate=1e-3
"""

from rlhf import compatibility, config, contract, data, guards, threads
from rlhf.launch import stage
from rlhf.session import open_session


@stage("sft")
def main(cfg: config.SFTStage) -> None:
    splits = data.load("sft", cfg.data)
    contract.check_rows(cfg.train, splits["train"])
    gold = data.gold_function(cfg.data)
    with open_session(cfg, splits) as session:
        if session.finished:
            return
        compatibility.check(cfg)
        from rlhf import engine, evaluate, golden, models, supervised, text
        from rlhf.methods import tokens

        with session.phase("load"):
            engine.start(cfg.seed)
            for note in guards.check_device(cfg):
                session.note(note)
            engine.rehearse(cfg.engine)
            tokenizer = text.load_tokenizer(
                cfg.model.path, template=cfg.template, revision=cfg.model.revision
            )
            added = text.add_tokens(tokenizer, cfg.template)
            renderer = text.Renderer(tokenizer)
            train_rows = renderer.sft(splits["train"], cfg.data)
            eval_rows = renderer.sft(splits["validation"], cfg.data)
            dtype = engine.dtype(cfg.engine)
            base = models.load_base(
                cfg.model, tokenizer, dtype=dtype, method=cfg.method, added=added
            )
            session.note(threads.settle(models.largest(base)))
            rendered = [row["input_ids"] for row in (*train_rows, *eval_rows)]
            longest = max(map(len, rendered))
            positions = getattr(base.config, "max_position_embeddings", None)
            contract.refuse_beyond(
                positions, longest + cfg.method.positions, cfg.model.path, data.LENGTHS
            )
            base_facts = models.base_facts(cfg.model, base)
            names = text.written(tokenizer, rendered)
            if new := tokens.unseen(base, tokenizer, names, added=added):
                session.note(tokens.check(new, tokenizer, cfg.method, cfg.engine))
                tokens.grow(base, tokenizer)
            steps = supervised.optimizer_steps(cfg.train, len(train_rows))
            policy = models.trainable(
                base, cfg.method, tokenizer=tokenizer, steps=steps, tokens=new
            )
        session.opening(splits, *models.count_parameters(policy))

        keeper = session.keeper(steps, cfg.train.save_every)
        with session.tracker(keeper) as tracker:
            with session.phase("train"):
                metrics = supervised.train_sft(
                    policy,
                    tokenizer,
                    train_rows,
                    eval_rows,
                    cfg=cfg.train,
                    method=cfg.method,
                    engine_cfg=cfg.engine,
                    seed=cfg.seed,
                    keeper=keeper,
                    tracker=tracker,
                    note=session.note,
                )
            with session.phase("evaluate"):
                metrics |= evaluate.ceiling(
                    policy, renderer, splits["validation"].rows, cfg=cfg, gold=gold
                )
            session.log_final(tracker, metrics, step=keeper.step)

        with session.phase("publish"):
            session.publish_model(models.publish, policy, tokenizer)
            probes = [renderer.prompt(row["prompt"]) for row in splits["validation"].rows]
            facts = golden.write_logits(policy, probes, renderer.pad_id, session.model_dir, dtype)
        session.publish(
            base=base_facts,
            tokenizer=engine.from_main(text.published_facts, session.model_dir),
            splits=splits,
            metrics=metrics,
            golden=facts,
            where=engine.where(cfg.engine),
            summary=evaluate.sft_summary(metrics),
        )


if __name__ == "__main__":
    main()
