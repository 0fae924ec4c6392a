"""Stage 3, PPO: the SFT model learns to score well without drifting from where it started.

python stages/ppo.py run=tiny run_name=kl01 ppo.kl_coef=0.1
"""

from functools import partial
from typing import Any

from rlhf import compatibility, config, contract, data, guards, rewards, threads
from rlhf.launch import stage
from rlhf.registry import Registry
from rlhf.session import open_session


@stage("ppo")
def main(cfg: config.PPOStage) -> None:
    functions = rewards.load_functions(cfg.reward)
    sft, rms = contract.ppo_parents(Registry(cfg.runs_dir), cfg)
    second = contract.watcher(Registry(cfg.runs_dir), cfg, sft, rms)
    splits = data.load("ppo", cfg.data)
    shown = data.demonstrations(cfg, sft.manifest.config)
    gold = data.gold_function(cfg.data)
    rewards.rehearse(functions, splits["train"].rows[:1])
    used = splits | shown | rewards.as_data(functions)
    parents = {"policy": sft} | contract.reward_roles(rms, second)
    with open_session(cfg, used, parents) as session:
        if session.finished:
            return
        compatibility.check(cfg)
        for note in contract.card_notes([*rms, *second]):
            session.note(note)
        from rlhf import (
            engine,
            evaluate,
            golden,
            models,
            monitor,
            overoptimisation,
            ppo,
            proofs,
            ptx,
            rollout,
            text,
        )
        from rlhf.roles import load_all, load_watcher

        with session.phase("load"):
            engine.start(cfg.seed)
            for note in guards.check_device(cfg):
                session.note(note)
            engine.rehearse(cfg.engine)
            renderer, readers = text.renderers(sft, [*rms, *second], cfg.template)
            prompts = {name: renderer.prompts(split, cfg.data) for name, split in splits.items()}
            train = splits["train"].rows
            session.note(proofs.same_text(renderer, readers, train))
            longest = max(len(ids) for split in prompts.values() for ids in split)
            lower = "sampling.max_new_tokens or data.max_prompt_tokens"
            contract.check_positions(sft, longest + cfg.room, lower)
            stream = data.PromptStream(prompts["train"], cfg.seed)
            demonstrations = ptx.load(shown, renderer, cfg)
            roles, reward_models = load_all(sft, rms, renderer.tokenizer, cfg)
            reward = rewards.Rewards(cfg.reward, functions, reward_models)
            seconds = load_watcher(second, renderer.tokenizer, cfg.engine)
            scoring = [*reward_models.values(), *seconds.values()]
            session.note(threads.settle(models.largest(roles.policy, *scoring)))
            rows = splits["validation"].rows
            held_out = evaluate.HeldOut(rows, renderer, cfg, gold, reward, *seconds.values())
            each = cfg.sampling.per_prompt or 1
            policy, critic = ppo.engines(
                roles.policy, roles.critic, cfg.ppo, cfg.engine, cfg.method
            )
        session.opening(splits | shown, *models.count_parameters(roles.policy))
        session.note(golden.check_roles(roles, reward_models | seconds, sft, [*rms, *second]))

        keeper = session.keeper(cfg.ppo.steps, cfg.ppo.save_every)
        if keeper.folder is not None:
            ppo.load(policy, critic, keeper.folder)
        price = ppo.kl_controller(cfg.ppo)
        price.load(keeper.state.get("price", price.state()))
        watch = monitor.Monitor(cfg, session.path, renderer, keeper.state.get("watch"))
        course = overoptimisation.Course.of(held_out.measure, keeper.state.get("course"))
        with session.tracker(keeper) as tracker:
            before = held_out.answers(roles.reference, roles)
            held_out.expect_numbers(before)
            held_out.follow(course, before, step=0)
            standard = ppo.standard_scores(before.scores, cfg.ppo)
            watching = watch.explaining(roles.policy)
            with session.phase("train"), keeper.working(), watching:
                for step in keeper.steps(partial(ppo.save, policy, critic)):
                    with session.timed("time/rollout"):
                        asked = stream.batch(step, cfg.ppo.batch_size // each)
                        drawn = rollout.draw(roles.policy, asked, cfg, renderer, step=step)
                    with session.timed("time/score"):
                        rows = [train[place] for place in stream.places(step, len(asked))]
                        rows = rollout.share(rows, cfg)
                        verdict, spread = ppo.score(drawn, reward, rows, renderer, cfg)
                        batch = ppo.judge(drawn, verdict.scores, roles, cfg, **standard)
                        coef = price.coef
                        batch, stats = ppo.estimate_advantages(batch, cfg, kl_coef=coef)
                        stats |= spread | {"episode": step * cfg.ppo.batch_size}
                        watch.see(batch, stats, step=step)
                    if step == 1:
                        stats |= proofs.start(roles, batch, cfg)
                        session.note(proofs.in_words(stats))
                        frozen = proofs.Frozen(roles, reward_models, batch, cfg)
                    with session.timed("time/update"):
                        ratios: list[Any] = []
                        learn = partial(ppo.update, kl_coef=coef, demonstrations=demonstrations)
                        stats |= learn(policy, critic, batch, cfg, step=step, ratios=ratios)
                        price.update(stats["objective/kl"], cfg.ppo.batch_size)
                    if step == 1:
                        session.note(frozen.prove())
                    watch.check(stats, step=step)
                    if keeper.at(step, cfg.ppo.eval_every):
                        answers = held_out.answers(roles.policy, roles)
                        now = held_out.compare(before, answers)
                        watch.held_out(now, step=step)
                        keeper.consider(ppo.worth(now, cfg.ppo))
                        stats |= now
                        for warning in held_out.follow(course, answers, step=step):
                            session.note(warning)
                        session.write(overoptimisation.FILE, course.text())
                        kept = held_out.progress(before, answers)
                        session.log_detail(tracker, kept, ppo.distributions(batch, ratios), step)
                    session.log(tracker, stats, step=step, tokens=ppo.tokens(batch))
                    keeper.state |= {"stats": stats, "price": price.state()}
                    if keeper.is_best:
                        keeper.state["best"] = stats
                    keeper.state |= {"watch": watch.state, "course": course.state}
            if best := keeper.best_folder():
                models.load_trained(roles.policy, best / "model")
            after = held_out.answers(roles.policy, roles)
            published = keeper.state.get("best", keeper.state["stats"])
            metrics = published | held_out.compare(before, after)
            ppo.expect_publishable(metrics, step=keeper.step)
            session.log_final(tracker, metrics, step=keeper.step)

        samples = held_out.samples(before, after)
        session.show_samples(samples)
        with session.phase("publish"):
            session.publish_model(models.publish, roles.policy, renderer.tokenizer)
            facts = golden.write_logits(
                roles.policy,
                prompts["validation"],
                renderer.pad_id,
                session.model_dir,
                engine.dtype(cfg.engine),
            )
        session.publish(
            base=sft.manifest.base,
            tokenizer=engine.from_main(text.published_facts, session.model_dir),
            splits=used,
            metrics=metrics,
            golden=facts,
            where=engine.where(cfg.engine),
            summary=evaluate.ppo_summary(metrics),
            warnings=course.said(),
        )


if __name__ == "__main__":
    main()
