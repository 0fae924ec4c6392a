"""`rlhf eval`: two policies answer the same held-out prompts, and a judge says whose are better.

The policies answer one after the other, with the same noise for the same prompt; then the
references tell the KL; then the judge decides. One model is in memory at a time. `eval_plan.py`
has refused what cannot work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rlhf import judges, outcomes, threads
from rlhf.eval_plan import Plan, Player
from rlhf.outcomes import Result
from rlhf.registry import Published

if TYPE_CHECKING:
    import torch

    from rlhf.console import Console
    from rlhf.evaluate import Answers
    from rlhf.rollout import Rollout


def play(plan: Plan, console: Console) -> list[Result]:
    """Answer, judge and count: a result for each of `plan.ours`."""
    from rlhf import engine

    engine.start(plan.options.seed)
    for note in plan.notes:
        console.note(f"[eval] {note}")
    drawn = {player.name: _sample(plan, player, console) for player in plan.players}
    kl = _kl(plan, drawn, console)
    answers = {player.name: _answers(player, drawn[player.name], plan) for player in plan.players}
    sides = {p.name: judges.Side(answers[p.name], p.renderer, p.run) for p in plan.players}
    results = []
    for player in plan.ours:
        with console.progress(f"judging {player.name}", len(plan.rows), "prompts") as pace:
            verdicts = plan.judge.verdicts(
                plan.rows, sides[player.name], sides[plan.theirs.name], pace.advance
            )
        measured = {name: (answers[name], kl[name]) for name in (player.name, plan.theirs.name)}
        results.append(outcomes.result(plan, player, verdicts, measured))
    return results


def _sample(plan: Plan, player: Player, console: Console) -> list[Rollout]:
    """One answer to each prompt, in batches; the noise depends on seed and prompt alone."""
    from rlhf import engine, models, rollout

    with _loaded(player.run, player) as model:
        if player is plan.players[0]:
            console.note(f"[eval] {threads.settle(models.largest(model))}")
        out, size = [], plan.sampling.batch_size
        prompts = [player.renderer.prompt(row["prompt"]) for row in plan.rows]
        with console.progress(f"{player.name} answers", len(prompts), "prompts") as pace:
            for start in range(0, len(prompts), size):
                asked = prompts[start : start + size]
                out.append(
                    rollout.sample(
                        model,
                        asked,
                        keys=range(start, start + len(asked)),
                        seed=plan.options.seed,
                        cfg=plan.sampling,
                        pad_id=player.renderer.pad_id,
                        eos_id=player.renderer.eos_id,
                        device=engine.device(),
                    )
                )
                pace.advance(len(asked))
    return out


@contextmanager
def _loaded(run: Published, player: Player) -> Iterator[torch.nn.Module]:
    """A run's model, frozen, for as long as the block runs."""
    from rlhf import engine, models

    dtype = engine.dtype(judges.engine_of(run))
    model = models.load_parent(models.load_causal, run, player.renderer.tokenizer, dtype)
    threads.settle(models.largest(model))
    yield models.freeze(model).to(engine.device())


def _kl(
    plan: Plan, drawn: Mapping[str, list[Rollout]], console: Console
) -> dict[str, list[float] | None]:
    """player -> nats per answer to the run it started from; 0 for SFT; None where it is unknown."""
    from rlhf import evaluate

    out: dict[str, list[float] | None] = {player.name: None for player in plan.players}
    if plan.options.temperature != 1:
        return out
    waiting: dict[str, list[Player]] = {}
    for player in plan.players:
        if player.origin is player.run:
            out[player.name] = [0.0] * len(plan.rows)
        elif player.origin is not None:
            waiting.setdefault(player.origin.digest, []).append(player)
    for players in waiting.values():
        origin = players[0].origin
        assert origin is not None
        size = plan.sampling.batch_size
        total = len(plan.rows) * len(players)
        with (
            _loaded(origin, players[0]) as reference,
            console.progress(f"KL to {origin.reference}", total, "answers") as pace,
        ):
            for player in players:
                kl: list[float] = []
                for part in drawn[player.name]:
                    kl += evaluate.kl_to_reference(reference, part, size)
                    pace.advance(len(part.prompts))
                out[player.name] = kl
    return out


def _answers(player: Player, drawn: list[Rollout], plan: Plan) -> Answers:
    from rlhf.evaluate import Answers

    ids = [row for part in drawn for row in part.answer_ids()]
    return Answers(
        prompt_ids=[player.renderer.prompt(row["prompt"]) for row in plan.rows],
        answer_ids=ids,
        texts=[player.renderer.decode(row) for row in ids],
        ended=[ended for part in drawn for ended in part.ended.tolist()],
    )
