"""What `rlhf eval` found: counted, stored beside the run, shown as a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rlhf
from rlhf import versus
from rlhf.data import Row
from rlhf.errors import RegistryError
from rlhf.judges import Verdicts
from rlhf.manifest import now, write_last
from rlhf.registry import Registry, parse_reference
from rlhf.rewards import last_turn
from rlhf.tables import print_table

if TYPE_CHECKING:
    from rlhf.console import Console
    from rlhf.eval_plan import Plan, Player
    from rlhf.evaluate import Answers

SCHEMA = 1

Result = dict[str, Any]  # what eval/<name>.json holds


def result(
    plan: Plan,
    ours: Player,
    verdicts: Verdicts,
    measured: Mapping[str, tuple[Answers, list[float] | None]],
) -> Result:
    """What is stored and shown of one comparison. Prompts without a verdict are left out."""
    (a, a_kl), (b, b_kl) = measured[ours.name], measured[plan.theirs.name]
    judged = [i for i, winner in enumerate(verdicts.winners) if winner is not None]
    winners = [str(verdicts.winners[i]) for i in judged]
    outcomes = [versus.outcome(winner) for winner in winners]
    seed = plan.options.seed
    categories = [_name(plan.rows[i], plan.category) for i in judged]

    def both(one: Sequence[float] | None, other: Sequence[float] | None) -> dict[str, Any] | None:
        if one is None or other is None:
            return None
        values = {"ours": [one[i] for i in judged], "theirs": [other[i] for i in judged]}
        return {who: asdict(versus.mean(own, seed=seed)) for who, own in values.items()}

    notes = list(plan.notes)
    if missing := len(verdicts.winners) - len(judged):
        notes.append(f"{missing} of {len(verdicts.winners)} prompts have no verdict: left out")
    controlled = versus.length_controlled(
        outcomes, [len(a.texts[i]) - len(b.texts[i]) for i in judged], seed=seed
    )
    parts = versus.by_category(outcomes, categories, seed=seed) if plan.category else []
    return {
        "schema": SCHEMA,
        "reference": ours.name,
        "against": plan.theirs.name,
        "judge": {"name": plan.judge.name, **verdicts.facts},
        "prompts": len(judged),
        "seed": seed,
        "wins": asdict(versus.mean(outcomes, seed=seed)),
        "ties": winners.count("tie") / len(winners),
        "length_controlled": None if controlled is None else asdict(controlled),
        "by_category": [
            {"name": name, "prompts": size, **asdict(rate)} for name, size, rate in parts
        ],
        "score": both(verdicts.ours, verdicts.theirs),
        "kl": both(a_kl, b_kl),
        "length": both([len(x) for x in a.answer_ids], [len(x) for x in b.answer_ids]),
        "rows": [
            {
                "prompt": last_turn(plan.rows[i]),
                "category": categories[place] if plan.category else None,
                "ours": a.texts[i],
                "theirs": b.texts[i],
                "ours_score": None if verdicts.ours is None else verdicts.ours[i],
                "theirs_score": None if verdicts.theirs is None else verdicts.theirs[i],
                "winner": winners[place],
            }
            for place, i in enumerate(judged)
        ],
        "temperature": plan.options.temperature,
        "max_new_tokens": plan.sampling.max_new_tokens,
        "data": {
            "source": plan.split.source,
            "split": plan.split.name,
            "fingerprint": plan.split.fingerprint,
        },
        "digests": {"ours": ours.run.digest, "theirs": plan.theirs.run.digest},
        "notes": notes,
        "finished": now(),
        "package_version": rlhf.__version__,
    }


def _name(row: Row, category: str | None) -> str:
    value = row.get(category) if category else None
    return "(none)" if value is None else str(value)


def file_name(result: Result) -> str:
    """`<against>-<judge>.json`; / becomes ~, which no run name holds, so that no two are one.

    What a checkpoint of the run says begins with its name, as in step-000010~sft~tiny-gold.json.
    """
    _, _, checkpoint = str(result["reference"]).partition("@")
    name = f"{result['against']}-{result['judge']['name']}.json"
    name = (f"{checkpoint}/" if checkpoint else "") + name
    return "".join(c if (c.isalnum() and c.isascii()) or c in "._=+,@-" else "~" for c in name)


def store(registry: Registry, result: Result) -> Path:
    """Write a result beside its run, whole or not at all; an older one of that name goes.

    Raises:
        RegistryError: it cannot be written.
    """
    wanted = parse_reference(result["reference"])
    folder = registry.folder(wanted.stage, wanted.run_name) / "eval"
    path = folder / file_name(result)
    try:
        if folder.is_symlink():
            raise OSError("the folder is a link")
        folder.mkdir(exist_ok=True)
        write_last(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise RegistryError(f"{path}: cannot be written: {error.strerror or error}.") from error
    return path


def store_all(registry: Registry, results: Sequence[Result], console: Console) -> None:
    """Store what can be stored; a folder that can only be read takes no result away."""
    for result in results:
        try:
            console.note(f"stored: {store(registry, result)}")
        except RegistryError as error:
            console.note(f"not stored: {error}")


# ---------------------------------------------------------------- what is shown


def table(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """A header and a row for each run, that which they are compared with last."""
    shown = ["win rate", "ties", "at equal length", "score", "KL, nats", "length, tokens"]
    rows = []
    for result in results:
        measures = [_interval(result[name], "ours") for name in ("score", "kl", "length")]
        rates = (_interval(result["wins"]), f"{result['ties']:.3f}")
        controlled = _interval(result["length_controlled"])
        rows.append((result["reference"], *rates, controlled, *measures))
    last = results[-1]
    measures = [_interval(last[name], "theirs") for name in ("score", "kl", "length")]
    rows.append((f"against {last['against']}", "", "", "", *measures))
    return [("run", *shown), *rows]


def categories(result: Result) -> list[tuple[str, str, str]]:
    """A header, and the win rate in each category; [] without any."""
    rows = [(p["name"], str(p["prompts"]), _interval(p)) for p in result["by_category"]]
    return [("category", "prompts", f"win rate of {result['reference']}"), *rows] if rows else []


def in_words(result: Result) -> list[str]:
    """What the numbers are of, and what the judge did."""
    judge, part = result["judge"], result["data"]
    said = f"{result['prompts']} prompts of {part['source']} ({part['split']}), seed "
    said += f"{result['seed']}, temperature {result['temperature']:g}; 95 % intervals over prompts"
    lines = [said, f"judge {judge['name']}: " + ", ".join(_asked(judge))]
    return lines


def _asked(judge: Mapping[str, Any]) -> Iterator[str]:
    """What an endpoint was asked and cost; how much a scorer scored."""
    if "prompt_tokens" not in judge:
        yield f"{judge['calls']} answers scored"
        if judge["failures"]:
            yield f"{judge['failures']} prompts left out, since a score of theirs is no number"
        return
    yield f"{judge['calls']} requests ({judge['retries']} of them retries)"
    yield f"{judge['failures']} failures"
    yield f"{judge['unparsed']} replies without a verdict"
    yield f"{judge['disagreements']} prompts judged otherwise when swapped (ties)"
    yield f"{judge['prompt_tokens']:,} tokens in, {judge['completion_tokens']:,} out"
    yield "no price given" if judge["cost"] is None else f"cost {judge['cost']:.4f}"
    if judge["given_up"]:
        yield "given up, since it failed again and again"


def _interval(value: Mapping[str, Any] | None, who: str | None = None) -> str:
    part = value[who] if value is not None and who is not None else value
    return "" if part is None else str(versus.Interval(part["value"], part["low"], part["high"]))


def show(results: Sequence[Result]) -> None:
    """Print results as a person reads them."""
    header, *rows = table(results)
    print_table(header, rows)
    for result in results:
        if parts := categories(result):
            print()
            print_table(parts[0], parts[1:])
    print()
    for line in dict.fromkeys(line for result in results for line in in_words(result)):
        print(line)
