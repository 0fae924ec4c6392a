"""What must hold between two stages, checked before any weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf import parts
from rlhf.config import CardConfig, EngineConfig, TrainConfig
from rlhf.data import Split
from rlhf.errors import ConfigError, RegistryError
from rlhf.methods.settings import MethodConfig
from rlhf.methods.table import METHODS
from rlhf.ranks import is_main
from rlhf.registry import Published, Registry, parse_reference

PLAYED_BY = {  # stages that may stand there
    "policy_from": ("sft", "ppo"),
    "rm_from": ("rm",),
    "evaluation.second_rm": ("rm",),
    "card.agree_with": ("rm",),
}

WATCHER = "watching_reward_model"  # the role of the one that PPO does not optimise


def parent(registry: Registry, setting: str, reference: str) -> Published:
    """The run that a stage starts from: finished, and every byte of it what was published.

    Args:
        setting: one of PLAYED_BY.
        reference: its value.

    Raises:
        ConfigError: a run of a stage that cannot stand there.
        RegistryError: missing, unfinished, damaged, or made by a method this version lacks.
    """
    stage = parse_reference(reference).stage
    if stage not in PLAYED_BY[setting]:
        raise ConfigError(
            f"{setting}={reference}: a run of stage {stage} cannot stand there. Name one of stage "
            f"{' or '.join(PLAYED_BY[setting])}."
        )
    run = registry.resolve(reference, contents=is_main())
    if run.manifest.method.name not in METHODS:
        raise RegistryError(
            f"{reference}: made by method={run.manifest.method.name}, which this version does not "
            f"know ({', '.join(METHODS)}). Install the version that made it "
            f"({run.manifest.package_version})."
        )
    recorded = f"model/{parts.FILE}" in run.manifest.files and not run.is_checkpoint
    if is_main() and recorded and (off := parts.changed(run.model_dir)):
        raise RegistryError(
            f"{reference}: its weights are not those that were trained: {', '.join(off)}. Restore "
            f"{run.model_dir}, or make the run again with overwrite=true."
        )
    return run


@dataclass(frozen=True)
class Reading:
    """What PPO asks of whoever reads its policy's answers.

    Attributes:
        max_prompt_tokens: `data.max_prompt_tokens`.
        max_new_tokens: `sampling.max_new_tokens`.
        foreign: `allow_foreign_rm`.
    """

    max_prompt_tokens: int
    max_new_tokens: int
    foreign: bool = False


def ppo_parents(
    registry: Registry, policy_from: str, reward_models: Sequence[str], reading: Reading
) -> tuple[Published, list[Published]]:
    """The SFT run and the reward models of PPO, which fit together.

    Raises:
        ConfigError, RegistryError: they do not.
    """
    sft = parent(registry, "policy_from", policy_from)
    rms = [parent(registry, "rm_from", name) for name in reward_models]
    for rm in rms:
        check_pair(sft, rm, reading)
    return sft, rms


def check_beginning(
    sft: Published,
    rms: Sequence[Published],
    method: MethodConfig,
    engine: EngineConfig,
    *,
    share_backbone: bool | None,
) -> None:
    """PPO can go on from these runs with this method.

    Raises:
        ConfigError: it cannot, or the roles cannot share a backbone where that is asked for.
    """
    check_method(sft, method)
    _check_neutral(sft, rms, method)
    check_sharing(sft, rms[0] if rms else None, method, engine, share_backbone)


def watcher(
    registry: Registry,
    name: str | None,
    sft: Published,
    rms: Sequence[Published],
    reading: Reading,
) -> list[Published]:
    """The reward model that only watches (`evaluation.second_rm`), as a list of one or none.

    Raises:
        ConfigError, RegistryError: it does not fit, or it is what PPO optimises.
    """
    if name is None:
        return []
    second = parent(registry, "evaluation.second_rm", name)
    if second.digest in [rm.digest for rm in rms]:
        raise ConfigError(
            f"evaluation.second_rm={name}: PPO optimises this reward model, so it cannot tell when "
            "it is exploited. Train another one (`make rm RM_ARGS='run_name=second seed=1'`), or "
            "leave evaluation.second_rm out."
        )
    check_pair(sft, second, reading)
    return [second]


def siblings(
    registry: Registry, sft: Published, cfg: CardConfig, *, run_name: str
) -> list[Published]:
    """The reward models of `card.agree_with`: trained from the same SFT run, so that they read the
    same text.

    Args:
        run_name: of the reward model that is being made.

    Raises:
        ConfigError: one of another SFT run, or the very run that is being made.
        RegistryError: missing, unfinished or damaged.
    """
    found = []
    for name in cfg.agree_with if cfg.enabled else ():
        run = parent(registry, "card.agree_with", name)
        if run.stage == "rm" and run.run_name == run_name:
            raise ConfigError(
                f"card.agree_with: {name} is the run that is being made. Name other ones, such as "
                "those of other seeds."
            )
        if not _comes_from(run, sft):
            raise ConfigError(
                f"card.agree_with: {name} was not trained from {sft.reference} as it is now, so "
                "the two may not read the same text. Name reward models of that SFT run."
            )
        found.append(run)
    return found


def sibling_notes(
    registry: Registry, sft: Published, cfg: CardConfig, *, run_name: str
) -> list[str]:
    """A hint where other reward models of this SFT run could be compared with, and are not."""
    if not cfg.enabled or cfg.agree_with:
        return []
    there = [
        run.reference
        for run in registry.runs("rm")
        if run.manifest
        and run.run_name != run_name
        and sft.digest in (parent.digest for parent in run.manifest.parents)
    ]
    if not there:
        return []
    return [
        f"trained from {sft.reference} too: {', '.join(there)}. "
        f"card.agree_with=[{','.join(there)}] would measure how often they prefer the same answers."
    ]


def _comes_from(reward_model: Published, sft: Published) -> bool:
    parents = reward_model.manifest.parents
    return [parent.digest for parent in parents if parent.role == "policy"] == [sft.digest]


def card_notes(rms: Sequence[Published]) -> list[str]:
    """What PPO says first: the verdict on each reward model's report card, and its reasons."""
    return [_card_note(rm) for rm in rms]


def _card_note(rm: Published) -> str:
    card = rm.manifest.card
    if card is None:
        return f"reward model {rm.reference}: it has no report card, so what it goes by is unknown"
    of = f" (card of {rm.stage}/{rm.run_name})" if rm.is_checkpoint else ""
    said = f"reward model {rm.reference}{of}: {card.verdict.upper()}"
    if card.verdict == "no-go":
        said += ": PPO will climb a score that does not show which answer people prefer"
    return "\n  - ".join([said, *card.reasons])


def check_method(parent: Published, method: MethodConfig) -> None:
    """Refuse another method on an adapter that cannot be merged: only that adapter can go on.

    Raises:
        ConfigError: another method, or one of another size.
    """
    made = parent.manifest.method
    if not METHODS[made.name].adapter or METHODS[made.name].mergeable:
        return
    if method.name != made.name:
        raise ConfigError(
            f"method={method.name}: {parent.reference} was trained by method={made.name}, which "
            "cannot be merged into the weights, and two kinds of adapters are not stacked here. "
            f"Use method={made.name}, which goes on with its adapter, or start from a run whose "
            "method can be merged (`rlhf doctor` lists them)."
        )
    for name in ("tokens", "size", "rank"):
        asked, has = getattr(method, name, None), made.settings.get(name)
        if asked != has:
            raise ConfigError(
                f"method.{name}={asked}: the adapter of {parent.reference}, which this run goes on "
                f"with, has {name}={has}. Set method.{name}={has}."
            )


def _check_neutral(sft: Published, rms: Sequence[Published], method: MethodConfig) -> None:
    """Policy and critic begin as the SFT model and the reward model."""
    if METHODS[method.name].neutral:
        return
    for run in (sft, *rms[:1]):
        if run.manifest.method.name != method.name:
            raise ConfigError(
                f"method={method.name} on {run.reference}, which was trained by method="
                f"{run.manifest.method.name}: what it adds changes the model before anything is "
                f"learnt, so PPO would not begin as {run.reference}. Use method=lora, or train "
                f"{run.reference} by method={method.name} too."
            )


def check_sharing(
    sft: Published,
    rm: Published | None,
    method: MethodConfig,
    engine: EngineConfig,
    share_backbone: bool | None,
) -> bool:
    """Whether the roles of PPO go on one frozen backbone.

    Raises:
        ConfigError: share_backbone=true, and they cannot.
    """
    reason = why_apart(sft, rm, method, engine)
    if share_backbone and reason is not None:
        raise ConfigError(
            f"share_backbone=true: {reason}. Use share_backbone=null, or false: a model for each "
            "role."
        )
    return share_backbone is not False and reason is None


def why_apart(
    sft: Published, rm: Published | None, method: MethodConfig, engine: EngineConfig
) -> str | None:
    """Why the roles cannot share one frozen backbone; None where they can."""
    row = METHODS[method.name]
    if not row.adapter:
        return f"method={method.name} trains the backbone itself"
    if not row.shares:
        return f"method={method.name} has one adapter to a model here"
    if engine.zero_stage == 3:
        return "engine.zero_stage=3 splits what a role trains, and would leave the backbone whole"
    if rm is None:
        return "there is no reward model, with whose adapter the critic would go on"
    if not is_adapter_on(sft, rm):
        return f"{rm.reference} is not a LoRA adapter on {sft.reference}, but another model"
    return None


def is_adapter_on(sft: Published, rm: Published) -> bool:
    """Whether the reward model was trained as a LoRA adapter on this very SFT model."""
    return _comes_from(rm, sft) and METHODS[rm.manifest.method.name].shares


def check_pair(policy: Published, reward_model: Published, reading: Reading) -> None:
    """Refuse a reward model that does not read what the policy writes. Loads no weights.

    With allow_foreign_rm=true it may come from another SFT run and another base; tokenizer and
    template must be the same all the same, since it is given token ids.

    Raises:
        RegistryError: tokenizer, template or base differ, or the reward model comes from another
            SFT run. Names every difference, both values, the way out.
        ConfigError: PPO may write longer texts than the reward model was trained on.
    """
    ours, theirs = policy.manifest, reward_model.manifest
    make = f"`make rm RUN={policy.run_name}` trains a reward model from {policy.reference}"
    bases = f"base model ({ours.base.name}, {theirs.base.name})"
    compared = [
        ("tokenizer", ours.tokenizer.tokenizer_hash, theirs.tokenizer.tokenizer_hash),
        ("template", ours.tokenizer.template_hash, theirs.tokenizer.template_hash),
    ]
    if not reading.foreign:
        compared.append((bases, ours.base.fingerprint, theirs.base.fingerprint))
    wrong = [f"{what}: {one} and {other}" for what, one, other in compared if one != other]
    if wrong:
        listed = "\n  ".join(wrong)
        raise RegistryError(
            f"{policy.reference} and {reward_model.reference} differ in:\n  {listed}\n"
            f"The scores would be of other text, or of another model's. {make}."
        )
    if not reading.foreign:
        _check_descent(policy, reward_model, make)
    _check_limits(reward_model, reading)


def reward_roles(
    runs: Sequence[Published], watching: Sequence[Published] = ()
) -> dict[str, Published]:
    """role -> run: reward_model, reward_model_2, and so on; watching_reward_model."""
    names = ["reward_model", *(f"reward_model_{n + 2}" for n in range(len(runs) - 1))]
    roles = dict(zip(names, runs, strict=False))
    return roles | {WATCHER: run for run in watching}  # noqa: B035  # one or none


def _check_descent(policy: Published, reward_model: Published, make: str) -> None:
    parents = reward_model.manifest.parents
    origin = next((p for p in parents if p.role == "policy"), None)
    if origin is not None and origin.digest == policy.digest:
        return
    came = "no SFT run of this registry" if origin is None else origin.reference
    if origin is not None and origin.reference == policy.reference:
        came = f"an earlier {came} (manifest {origin.digest[:12]}, now {policy.digest[:12]})"
    raise RegistryError(
        f"{reward_model.reference} was trained from {came}, the policy is {policy.reference}: "
        f"its scores were learnt on another model's answers. {make}; rm_from= names another "
        "one; allow_foreign_rm=true uses it all the same."
    )


def _check_limits(reward_model: Published, reading: Reading) -> None:
    trained: dict[str, Any] = reward_model.manifest.config
    for setting, asked, limit in (
        ("data.max_prompt_tokens", reading.max_prompt_tokens, "data.max_prompt_tokens"),
        ("sampling.max_new_tokens", reading.max_new_tokens, "data.max_response_tokens"),
    ):
        most = trained.get(limit)  # not known of a model made elsewhere
        if most is not None and asked > most:
            raise ConfigError(
                f"{setting}={asked}: {reward_model.reference} was trained with {limit}={most}, so "
                "it never saw texts as long as PPO could write, and its scores of them mean "
                f"nothing. Set {setting}={most}, or train the reward model with {limit}={asked}."
            )


def check_positions(run: Published, longest: int, lower: str) -> None:
    """Refuse sequences beyond the positions that a run's model has.

    Args:
        run: holds config.json.
        longest: tokens of the longest prompt and answer there will be.
        lower: the settings that shorten them.

    Raises:
        ConfigError: they do not fit.
    """
    refuse_beyond(positions(run), longest, run.reference, lower)


def positions(run: Published) -> int | None:
    """How many positions a run's model has; None where its config does not say."""
    folder = run.tokenizer_dir if run.is_checkpoint else run.model_dir
    folder = folder / parts.BASE if (folder / parts.BASE).is_dir() else folder
    most = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
    return most if isinstance(most, int) else None


def check_rows(cfg: TrainConfig, train: Split) -> None:
    """Refuse fewer rows than a step takes.

    Raises:
        ConfigError: there is no whole batch.
    """
    if cfg.batch_size > len(train.rows):
        raise ConfigError(
            f"train.batch_size={cfg.batch_size} with {len(train.rows)} rows of training data: "
            "steps take whole batches, and there is none. Set train.batch_size to that number or "
            "a lower one."
        )


def refuse_beyond(most: Any, longest: int, name: str, lower: str) -> None:
    """The same for a model that is known by its number of positions; None: without end."""
    if isinstance(most, int) and longest > most:
        raise ConfigError(
            f"{name}: a prompt and its answer have up to {longest} tokens, but the model has "
            f"positions for {most}. Lower {lower}."
        )
