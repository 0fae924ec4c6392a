"""Stage 3, PPO: the SFT model learns to score well without drifting from where it started.

python stages/ppo.py run=tiny run_name=kl01 ppo.kl_coef=0.1
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rlhf import config, contract, overoptimisation
from rlhf.inputs import PPOInputs, prepare_ppo
from rlhf.launch import stage
from rlhf.registry import Registry
from rlhf.rewards import Rewards
from rlhf.stage_run import StageRun, open_run

if TYPE_CHECKING:  # these load torch
    from rlhf.controllers import AdaptiveKL, FixedKL
    from rlhf.evaluate import HeldOut
    from rlhf.monitor import StoppingRules
    from rlhf.ppo import Judge, Learner
    from rlhf.proofs import Invariants
    from rlhf.roles import Roles
    from rlhf.rollout import Prompts, Sampler


@stage("ppo")
def main(cfg: config.PPOStage) -> None:
    inputs = prepare(cfg)
    with open_run(cfg, inputs.data, inputs.parents, notes=inputs.notes) as run:
        if run.finished:
            return
        with run.loading():
            parts = load(cfg, inputs, run)
        from rlhf import evaluate, golden, ppo

        roles, prompts, sampler, judge, learner, kl, held_out, stopping, invariants = parts
        run.begin(roles.policy, steps=cfg.ppo.steps, save_every=cfg.ppo.save_every)
        run.track(learner=learner, kl=kl, stopping=stopping, course=held_out.course)
        judge.standardize(held_out.baseline().scores)
        with run.training() as steps, stopping.explaining(roles.policy):
            for step in steps:
                with run.timed("time/rollout"):
                    asked = prompts.batch(step)
                    rollout = sampler.rollout(asked, step=step)
                with run.timed("time/score"):
                    judged, terms = judge(rollout, [prompt.row for prompt in asked])
                    batch, objective = ppo.estimate_advantages(
                        judged, cfg.ppo, cfg.algorithm, cfg.sampling, kl_coef=kl.coef
                    )
                    stats = terms | objective
                    stopping.observe(batch, stats, step=step)
                with invariants.around(step, batch) as proof, run.timed("time/update"):
                    stats |= proof | learner.update(batch, step=step, kl_coef=kl.coef)
                    kl.update(stats["objective/kl"], cfg.ppo.batch_size)
                stopping.check(stats, step=step)
                if run.due(step, cfg.ppo.eval_every):
                    stats |= held_out.evaluate()
                    stopping.check_held_out(stats, step=step)
                    run.consider(ppo.worth(stats, cfg.ppo), stats)
                    run.note(*held_out.follow(step))
                    run.write(overoptimisation.FILE, held_out.course.text())
                    shown = ppo.distributions(batch, learner.ratios)
                    run.log_evaluation(held_out.progress(), shown, step=step)
                run.log(stats, step=step, tokens=ppo.tokens(batch))
        run.load_best(roles.policy)
        metrics = run.published_numbers() | held_out.evaluate()
        run.log_final(ppo.expect_publishable(metrics, step=run.step))
        run.show_samples(held_out.samples())
        run.publish(
            roles.policy,
            held_out.renderer.tokenizer,
            golden.write_logits,
            held_out.prompts,
            base=inputs.sft.manifest.base,
            metrics=metrics,
            summary=evaluate.ppo_summary(metrics),
            warnings=held_out.course.said(),
        )


def prepare(cfg: config.PPOStage) -> PPOInputs:
    """Parents, rows and reward functions: found and checked, without torch."""
    reading = contract.Reading(
        cfg.data.max_prompt_tokens, cfg.sampling.max_new_tokens, cfg.allow_foreign_rm
    )
    return prepare_ppo(
        Registry(cfg.runs_dir),
        cfg.policy_from,
        reward=cfg.reward,
        data_cfg=cfg.data,
        ppo=cfg.ppo,
        evaluation=cfg.evaluation,
        method=cfg.method,
        engine=cfg.engine,
        reading=reading,
        share_backbone=cfg.share_backbone,
    )


class Parts(NamedTuple):
    """What takes part in PPO, in the order of a step."""

    roles: Roles
    prompts: Prompts
    sampler: Sampler
    judge: Judge
    learner: Learner
    kl: FixedKL | AdaptiveKL
    held_out: HeldOut
    stopping: StoppingRules
    invariants: Invariants


def load(cfg: config.PPOStage, inputs: PPOInputs, run: StageRun) -> Parts:
    """Render the prompts, load every model, and prove that they are what their runs published."""
    from rlhf import engine, evaluate, golden, monitor, ppo, proofs, ptx, rollout
    from rlhf.roles import load_all

    texts = inputs.render(cfg.template, cfg.data, room=cfg.room)
    renderer, micro = texts.renderer, cfg.ppo.micro_batch_size
    run.note(texts.proof)
    demonstrations = ptx.load(
        inputs.demonstrations, renderer, cfg.data, seed=cfg.seed, micro_batch_size=micro
    )
    models = load_all(
        *(inputs.sft, inputs.reward_runs, inputs.watching, renderer.tokenizer),
        *(cfg.method, cfg.engine),
        share_backbone=cfg.share_backbone,
        needs_critic=cfg.algorithm.critic,
    )
    roles, rows = models.roles, {name: split.rows for name, split in inputs.splits.items()}
    run.settle_threads(roles.policy, *models.readers.values())
    reward = Rewards(cfg.reward, inputs.functions, models.reward_models)
    policy, critic = ppo.engines(roles.policy, roles.critic, cfg.ppo, cfg.engine, cfg.method)
    run.note(golden.check_roles(roles, models.readers, inputs.sft, inputs.readers))
    return Parts(
        roles=roles,
        prompts=rollout.Prompts(
            texts.prompts["train"],
            rows["train"],
            seed=cfg.seed,
            answers=cfg.ppo.batch_size,
            per_prompt=cfg.sampling.per_prompt or 1,
        ),
        sampler=rollout.Sampler(roles.policy, renderer, cfg.sampling, cfg.seed),
        judge=ppo.Judge(reward, roles, renderer, cfg.ppo, cfg.sampling),
        learner=ppo.Learner(policy, critic, cfg.ppo, cfg.sampling, cfg.seed, demonstrations),
        kl=ppo.kl_controller(cfg.ppo),
        held_out=evaluate.HeldOut(
            rows["validation"],
            texts.prompts["validation"],
            renderer,
            roles,
            reward,
            gold=inputs.gold,
            second=next(iter(models.watching.values()), None),
            cfg=cfg.evaluation,
            sampling=cfg.sampling,
            seed=cfg.seed,
            gold_path=cfg.data.gold,
        ),
        stopping=monitor.StoppingRules(
            *(cfg.stop, cfg.ppo, cfg.sampling, run.path, renderer),
            dtype=cfg.engine.dtype,
            foreign=cfg.allow_foreign_rm,
        ),
        invariants=proofs.Invariants(
            *(roles, models.reward_models, cfg.sampling),
            micro_batch_size=micro,
            dtype=engine.dtype(cfg.engine),
            note=run.note,
        ),
    )


if __name__ == "__main__":
    main()
