"""What `rlhf eval` is about to do, and all that can be refused before a weight is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlhf import contract, data, judges
from rlhf.config import DataConfig, SamplingConfig, TemplateConfig
from rlhf.data import Row, Split
from rlhf.errors import ConfigError, DataError, RegistryError
from rlhf.judges import Judge
from rlhf.registry import Published, Registry, parse_reference

if TYPE_CHECKING:
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
    split = _prompts(cfg, options)
    category = _category(split, options.category)
    judge.rehearse(split.rows[:1])
    choose_device(options.device)  # before torch looks for one
    players = [_player(registry, run, notes) for run in (*runs, other)]
    if isinstance(judge, judges.RewardModelJudge):
        judge.renderer()  # refuses a tokenizer that changed
        notes += _optimised(judge.run, (*runs, other))
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


def _prompts(cfg: DataConfig, options: Options) -> Split:
    try:
        return data.held_out(cfg, options.split, whole=options.data is not None)
    except DataError as error:
        if options.data is None:
            raise
        raise DataError(str(error).replace("data.path=", "--data=")) from error


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
    """A reward model favours those that were trained to please it, and not those it watched."""
    return [
        f"{rm.reference} is what {run.reference} was trained to please: this win rate tells how "
        "far that went, not whether its answers are better"
        for run in runs
        if any(p.digest == rm.digest and p.role != contract.WATCHER for p in run.manifest.parents)
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
