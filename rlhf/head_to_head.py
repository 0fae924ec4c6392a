"""`rlhf eval`: two policies answer the same held-out prompts, and a judge says whose are better.

Everything that can be refused is refused before a weight is loaded. Then the policies answer one
after the other, with the same noise for the same prompt; then the references tell the KL; then the
judge decides. One model is in memory at a time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlhf import contract, data, judges, outcomes
from rlhf.config import DataConfig, SamplingConfig, TemplateConfig
from rlhf.data import Row, Split
from rlhf.errors import ConfigError, RegistryError
from rlhf.judges import Judge
from rlhf.outcomes import Result
from rlhf.registry import Published, Registry, parse_reference

if TYPE_CHECKING:
    import torch

    from rlhf.console import Console
    from rlhf.evaluate import Answers
    from rlhf.rollout import Rollout
    from rlhf.text import Renderer

POLICIES = ("sft", "ppo")  # stages whose runs answer
FEW = 30  # prompts below which an interval says little
CATEGORIES = ("category", "source")  # fields that are looked for by themselves


@dataclass(frozen=True)
class Options:
    """What `rlhf eval` was asked for; None: as the run whose prompts are used has it.

    Attributes:
        judge: gold, rm/NAME, FILE.py:function or openai:MODEL.
        prompts: how many, at most.
        data: a file (all its rows), or a folder (its `split`).
        split: of the data: validation or test.
        seed: of the sampling noise, and of the intervals.
        temperature: of the sampling.
        category: the field of a row to split results by.
        device: auto, cpu or cuda.
        judging: more keywords of `judges.find`, for an endpoint.
    """

    judge: str = "gold"
    prompts: int = 200
    data: str | None = None
    split: str = "validation"
    seed: int = 0
    temperature: float = 1.0
    category: str | None = None
    max_new_tokens: int | None = None
    batch_size: int | None = None
    device: str = "auto"
    judging: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prompts < 1:
            raise ConfigError(f"--prompts={self.prompts}: there is nothing to compare. Give 1 up.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed={self.seed}: must be a whole number from 0 to {2**32 - 1}.")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(
                f"--temperature={self.temperature:g}: must be above 0. 1.0 is what PPO trains; "
                "0.01 is close to always taking the likeliest token."
            )
        for name, value in (
            ("split", (self.split, ("validation", "test"))),
            ("device", (self.device, ("auto", "cpu", "cuda"))),
        ):
            if value[0] not in value[1]:
                raise ConfigError(f"--{name}={value[0]}: choose one of {', '.join(value[1])}.")
        for name in ("max_new_tokens", "batch_size"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ConfigError(f"--{name.replace('_', '-')}={number}: must be above 0.")


@dataclass(frozen=True)
class Player:
    """A policy in the comparison.

    Attributes:
        run: what answers.
        origin: the run that its KL is to; itself for SFT; None where it is not there any more.
        renderer: makes its prompts.
    """

    run: Published
    origin: Published | None
    renderer: Renderer

    @property
    def name(self) -> str:
        return self.run.reference


@dataclass(frozen=True)
class Plan:
    """A comparison that nothing stands against."""

    ours: list[Player]
    theirs: Player
    judge: Judge
    split: Split
    sampling: SamplingConfig
    options: Options
    category: str | None
    notes: list[str]

    @property
    def players(self) -> list[Player]:
        """Each once."""
        return list({player.name: player for player in (*self.ours, self.theirs)}.values())

    @property
    def rows(self) -> list[Row]:
        return self.split.rows


# ---------------------------------------------------------------- before a weight is loaded


def prepare(registry: Registry, references: Sequence[str], against: str, options: Options) -> Plan:
    """Find all that is needed, and refuse what cannot work. Loads tokenizers and no weight.

    Raises:
        RegistryError: no such run, or it is not what was published.
        ConfigError: no such judge, no gold, no endpoint, or settings that do not fit.
        DataError: no prompts.
    """
    runs = [_policy(registry, "REF", name) for name in references]
    runs = list({run.reference: run for run in runs}.values())
    other = _policy(registry, "--against", against)
    notes: list[str] = []
    host = next((run for run in (*runs, other) if run.stage == "ppo"), runs[0])
    cfg = _data(host, options)
    if options.data is not None and cfg.gold is not None:
        notes.append(f"gold is {host.reference}'s; the prompts are those of {options.data}")
    sampling = _sampling(host, options)
    judge = judges.find(
        options.judge,
        registry=registry,
        gold=cfg.gold,
        batch_size=sampling.batch_size,
        **options.judging,
    )
    split = data.held_out(cfg, options.split, whole=options.data is not None)
    category = _category(split, options.category)
    judge.rehearse(split.rows[:1])
    choose_device(options.device)  # before torch looks for one
    players = [_player(registry, run, notes) for run in (*runs, other)]
    if isinstance(judge, judges.RewardModelJudge):
        judge.renderer()  # refuses a tokenizer that changed
        notes += _optimised(judge.run, runs)
    before = len(split.rows)
    longest = {player.name: _fit(player, split, cfg, sampling) for player in players}
    if len(split.rows) < before:
        dropped = ", ".join(f"{count} {why}" for why, count in split.dropped.items())
        notes.append(f"prompts left out: {dropped}")
    for player in players:
        if isinstance(judge, judges.RewardModelJudge):
            judge.check_lengths(player.run, longest[player.name], sampling.max_new_tokens)
    notes += _changed(host, split, options)
    if options.temperature != 1:
        notes.append("no KL: it is a measure of answers at temperature 1")
    split.rows = split.rows[: options.prompts]
    if len(split.rows) < FEW:
        notes.append(f"{len(split.rows)} prompts: too few for an interval to mean much")
    *ours, theirs = players
    notes = list(dict.fromkeys(notes))
    return Plan(ours, theirs, judge, split, sampling, options, category, notes)


def _policy(registry: Registry, setting: str, reference: str) -> Published:
    stage = parse_reference(reference).stage
    if stage not in POLICIES:
        raise ConfigError(
            f"{setting}={reference}: a run of stage {stage} writes no answers. Name one of stage "
            f"{' or '.join(POLICIES)}" + (f"; --judge {reference} lets it judge." * (stage == "rm"))
        )
    return contract.parent(registry, "policy_from", reference)


def _data(host: Published, options: Options) -> DataConfig:
    """The data that a run was made with, or that was named instead."""
    config = host.manifest.config
    path = options.data or config.get("data.path")
    if path is None:
        raise ConfigError(
            f"{host.reference}: it does not tell which data it was made with. Give prompts: "
            "--data FILE."
        )
    limits = {
        name: config[f"data.{name}"]
        for name in ("max_bad_fraction", "max_prompt_tokens", "max_response_tokens")
        if config.get(f"data.{name}") is not None
    }
    return DataConfig(
        path=str(path), columns=data.columns_of(config), gold=config.get("data.gold"), **limits
    )


def _sampling(host: Published, options: Options) -> SamplingConfig:
    config, default = host.manifest.config, SamplingConfig()
    return SamplingConfig(
        temperature=options.temperature,
        max_new_tokens=options.max_new_tokens
        or config.get("sampling.max_new_tokens")
        or default.max_new_tokens,
        batch_size=options.batch_size or config.get("sampling.batch_size") or default.batch_size,
    )


def _category(split: Split, asked: str | None) -> str | None:
    """The field to split results by, where the rows have one."""
    names = {name for row in split.rows for name in row}
    if asked is None:
        return next((name for name in CATEGORIES if name in names), None)
    if asked not in names:
        raise ConfigError(
            f"--category={asked}: no row of {split.source} has that field. There are: "
            f"{', '.join(sorted(names))}."
        )
    return asked


def choose_device(device: str) -> None:
    """Hide GPUs for cpu; see to it that there is one for cuda.

    Raises:
        ConfigError: there is none.
    """
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("--device=cuda: torch sees no GPU here. Use --device auto or cpu.")


def _player(registry: Registry, run: Published, notes: list[str]) -> Player:
    from rlhf.text import Renderer, load_parent_tokenizer

    tokenizer = load_parent_tokenizer(run, template=TemplateConfig(name="inherit"))
    return Player(run, _origin(registry, run, notes), Renderer(tokenizer))


def _origin(registry: Registry, run: Published, notes: list[str]) -> Published | None:
    """The run that PPO's KL is to: the one it started from, if that is still the same."""
    if run.stage == "sft":
        return run
    for parent in run.manifest.parents:
        if parent.role == "policy":
            try:
                found = contract.parent(registry, "policy_from", parent.reference)
            except RegistryError as error:
                notes.append(f"no KL: {str(error).splitlines()[0]}")
                return None
            if found.digest == parent.digest:
                return found
            notes.append(f"no KL: {parent.reference} changed since {run.reference} started from it")
            return None
    notes.append(f"no KL: {run.reference} does not tell what it started from")
    return None


def _optimised(rm: Published, runs: Sequence[Published]) -> list[str]:
    """A reward model favours those that were trained to please it."""
    return [
        f"{rm.reference} is what {run.reference} was trained to please: this win rate tells how "
        "far that went, not whether its answers are better"
        for run in runs
        if any(parent.digest == rm.digest for parent in run.manifest.parents)
    ]


def _fit(player: Player, split: Split, cfg: DataConfig, sampling: SamplingConfig) -> int:
    """Leave out rows that a player cannot read; the tokens of its longest prompt."""
    from rlhf.models import read_method

    longest = max(map(len, player.renderer.prompts(split, cfg)))
    room = sampling.max_new_tokens + read_method(player.run).positions
    contract.check_positions(player.run, longest + room, "--max-new-tokens")
    return longest


def _changed(host: Published, split: Split, options: Options) -> list[str]:
    recorded = host.manifest.fingerprints.get(split.name)
    if options.data is None and recorded not in (None, split.fingerprint):
        return [f"{split.source} changed since {host.reference} was made: were these held out?"]
    return []


# ---------------------------------------------------------------- answers


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
    from rlhf import engine, rollout

    with _loaded(player.run, player) as model:
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
