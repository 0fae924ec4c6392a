"""The report's texts and tables: what was collected, as the page's template wants it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from markupsafe import escape

from rlhf.manifest import Manifest
from rlhf.metrics import METRICS, find, headlines, order
from rlhf.report.collect import Report, Run
from rlhf.report.curves import GREY, style
from rlhf.report.files import Card, Evaluation, Interval, Row, Slice

STATES = {"stopped": "stopped by a guard"}
# Final numbers with an interval, and what to set beside each.
RESULTS = {
    "eval/accuracy": ("eval/accuracy_longer", "the longer one"),
    "eval/gold": ("eval/gold_sft", "SFT"),
    "eval/second": ("eval/second_sft", "SFT"),
    "eval/score": ("eval/score_sft", "SFT"),
    "eval/win_rate": ("", ""),
}
SORTS = [
    ("place", "order"),
    ("gain", "gain in score"),
    ("goldgain", "gain in gold"),
    ("score", "score"),
    ("gold", "gold"),
    ("length", "length"),
]
Bar = tuple[str, Interval, int | None, str]  # name, interval, place of the run, about
LONGEST = 6000  # characters of an answer, a prompt or a setting


@dataclass
class Group:
    """A prompt and answers to it, as the page lists them; `sort` holds numbers to order by."""

    prompt: str
    tag: str = ""
    answers: list[dict[str, Any]] = field(default_factory=list)
    sort: dict[str, float] = field(default_factory=dict)
    size: int = 0


# ---------------------------------------------------------------- numbers in words


def number(value: float | None) -> str:
    """Four digits; nothing for None."""
    return "" if value is None else f"{value:.4g}"


def interval(found: Interval) -> str:
    """A number and its 95 % interval."""
    if found.value is None:
        return "not measured"
    if found.low is None or found.high is None:
        return number(found.value)
    return f"{found.value:.3f} (95 % {found.low:.3f} to {found.high:.3f})"


def setting(value: Any) -> str:
    """A setting as it is written in a command; a sha256 is cut to 12 digits."""
    if isinstance(value, str):
        hexadecimal = len(value) == 64 and all(c in "0123456789abcdef" for c in value)
        return value[:12] if hexadecimal else _cut(value)
    return _cut(json.dumps(value, ensure_ascii=False, default=str))


def _cut(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]} ... (cut; {len(text):,} characters in all)"


def final(run: Run, name: str) -> Interval:
    """A final number of a run with its interval, as far as it has them."""
    found = run.metrics
    return Interval(*(found.get(key) for key in (name, f"{name}_ci_low", f"{name}_ci_high")))


# ---------------------------------------------------------------- lineage


def tree(report: Report) -> list[dict[str, Any]]:
    """Every run as a line, parents above their children, with the rails that join them.

    A parent has a lane of its own from its line down to its last child's. A rail's words: `up` and
    `down`, a line through the upper or lower part; `turn`, to the right from here; `across`, from
    a lane further left.
    """
    at = {run.reference: place for place, run in enumerate(report.runs)}
    parents = [
        [at[p] for p in dict.fromkeys(link.reference.partition("@")[0] for link in run.parents)
         if p in at and at[p] != place]
        for place, run in enumerate(report.runs)
    ]  # fmt: skip
    last = {p: child for child, above in enumerate(parents) for p in above}
    lanes: list[int] = []  # until which line each is taken
    lane_of: dict[int, int] = {}
    for place in range(len(report.runs)):
        if last.get(place, -1) > place:
            free = [n for n, until in enumerate(lanes) if until <= place]
            lane = free[0] if free else len(lanes)
            lanes[lane : lane + 1] = [last[place]]
            lane_of[place] = lane
    return [
        _node(run, place, parents[place], lane_of, last, len(lanes))
        for place, run in enumerate(report.runs)
    ]


def _node(
    run: Run, place: int, parents: list[int], lane_of: dict[int, int], last: dict[int, int], n: int
) -> dict[str, Any]:
    rails: list[set[str]] = [set() for _ in range(n)]
    for parent, lane in lane_of.items():
        if parent == place:
            rails[lane].add("down")
        elif parent < place <= last[parent]:
            rails[lane] |= {"up"} | ({"down"} if place < last[parent] else set())
    turns = [lane_of[each] for each in (*parents, place) if each in lane_of]
    for lane in range(min(turns, default=n), n):
        rails[lane].add("across" if lane not in turns or lane > min(turns) else "turn")
    made = run.manifest
    metrics = [f"{n} {interval(final(run, n))}" for n in headlines(run.metrics)]
    links = [f"{link.role} {link.reference}" for link in run.parents]
    lines = [
        f"from {', '.join(links)}" if links else _base(made),
        f"method {made.method.name}" if made else "",
        ", ".join(f"{p.split} {p.rows:,} rows" for p in made.data) if made else "",
        (", ".join(metrics) if made else "so far: " + ", ".join(metrics)) if metrics else "",
    ]
    return {
        "name": run.reference,
        "state": run.state,
        "state_text": STATES.get(run.state, run.state),
        "verdict": run.card.verdict if run.card else None,
        "color": style(place)["color"],
        "rails": ["".join(f" {word}" for word in sorted(rail)) for rail in rails],
        "lines": [line for line in lines if line],
    }


def _base(made: Manifest | None) -> str:
    if made is None:
        return ""
    return f"base model {made.base.name} {made.base.revision or ''}".strip()


def method(made: Manifest) -> str:
    """A run's fine-tuning method with its settings."""
    settings = " ".join(f"{key}={setting(value)}" for key, value in made.method.settings.items())
    return f"{made.method.name} {settings}".strip()


# ---------------------------------------------------------------- differences, numbers, costs


def differences(report: Report) -> list[dict[str, Any]]:
    """For each stage with several shown runs, a table of what they have differently."""
    out = []
    for stage, found in report.differences.items():
        members = [run.reference for run in report.shown if run.stage == stage]
        if len(members) > 1:
            rows: dict[bool, list[list[str]]] = {True: [], False: []}
            for d in found:
                cells = [setting(v) for v in d.values]
                name = d.name if d.part == "config" else f"{d.part}: {d.name}"
                rows[d.matters].append([name, *cells])
            out.append(
                {"stage": stage, "head": ["", *members], "rows": rows[True], "small": rows[False]}
            )
    return out


def finals(report: Report) -> list[dict[str, Any]]:
    """For each stage, every final number of its shown runs."""
    out = []
    for stage in dict.fromkeys(run.stage for run in report.shown):
        members = [run for run in report.shown if run.stage == stage]
        found = [run.metrics for run in members]
        names = dict.fromkeys(name for numbers in found for name in numbers)
        rows = []
        for name in sorted(names, key=order):
            metric = find(name)
            unit = metric.unit if metric else ""
            label = f"{name}, {unit}" if unit not in ("", "1") else name
            rows.append([label, *(number(numbers.get(name)) for numbers in found)])
        if rows:
            head = ["", *(run.reference for run in members)]
            out.append({"stage": stage, "head": head, "rows": rows})
    return out


def costs(report: Report) -> dict[str, Any]:
    """Seconds and peak memory of each phase, and the mean seconds of the parts of a step."""
    phases = dict.fromkeys(
        name for run in report.shown if run.manifest for name in run.manifest.phases
    )
    parts = [
        name
        for name in ("time/rollout", "time/score", "time/update", "perf/tokens_per_second")
        if any(name in run.curves for run in report.shown)
    ]
    labels = {"perf/tokens_per_second": "tokens/s"}
    head = [
        "",
        *(f"{name}, s" for name in phases),
        "peak memory, GB",
        *(labels.get(name, f"{name[5:]}, s per step") for name in parts),
    ]
    rows = []
    for run in report.shown:
        done = run.manifest.phases if run.manifest else {}
        peak = [p.peak_memory_gb for p in done.values() if p.peak_memory_gb is not None]
        if not peak and "perf/peak_memory_gb" in run.metrics:
            peak = [run.metrics["perf/peak_memory_gb"]]
        cells = [f"{done[name].seconds:.1f}" if name in done else "" for name in phases]
        cells.append(f"{max(peak):.2f}" if peak else "")
        cells += [_mean(run, name) for name in parts]
        if any(cells):
            rows.append([run.reference, *cells])
    return {"head": head, "rows": rows}


def _mean(run: Run, name: str) -> str:
    if name not in run.curves:
        return ""
    values = run.curves[name].values
    values = values[np.isfinite(values)]
    return number(float(values.mean())) if len(values) else ""


def details(report: Report) -> list[dict[str, Any]]:
    """The settings of each shown run, and where and with what it was made."""
    out = []
    for run in report.shown:
        rows: list[list[str]] = []
        if (made := run.manifest) is not None:
            where = made.environment
            rows += [
                ["command", " ".join(made.command)],
                ["finished", made.finished],
                ["code", f"rlhf {made.package_version}, commit {made.git_commit or 'unknown'}"],
                ["method", method(made)],
                ["base model", f"{made.base.name} {made.base.revision or ''}".strip()],
                *([f"data, {p.split}", f"{p.rows:,} rows of {p.source}"] for p in made.data),
                ["device", f"{where.world_size} x {where.device}, {where.dtype}"],
                ["libraries", " ".join(f"{n} {v}" for n, v in where.libraries.items())],
                ["model/ holds", made.model_is],
            ]
        rows += [[name, setting(value)] for name, value in run.config.items()]
        if rows:
            out.append({"name": run.reference, "rows": rows})
    return out


def warnings(report: Report) -> list[tuple[str, str]]:
    """What is wrong, or may be, with any run of the report."""
    return [(run.reference, text) for run in report.runs for text in (*run.problems, *run.warnings)]


# ---------------------------------------------------------------- intervals as bars


def scaled(rows: Sequence[Bar], least: float = 0.0, most: float = 1.0) -> list[dict[str, Any]]:
    """Bars with their places on a scale from 0 to 100 %; a scale from 0 to 1 marks its half.

    Args:
        least, most: what the scale covers at the least.
    """
    ends = [x for _, i, _, _ in rows for x in (i.value, i.low, i.high) if x is not None]
    bottom, top = min([least, *ends]), max([most, *ends])

    def place(x: float | None) -> float | None:
        return None if x is None else round(100 * (x - bottom) / ((top - bottom) or 1.0), 2)

    return [
        {
            "name": name,
            "run": run,
            "about": about,
            "at": place(i.value),
            "low": place(i.low) if i.high is not None else None,
            "high": place(i.high) if i.low is not None else None,
            "half": place(0.5) if (least, most) == (0.0, 1.0) else None,
            "text": interval(i),
        }
        for name, i, run, about in rows
    ]


def _of_slices(slices: Iterable[Slice], unit: str) -> list[Bar]:
    return [
        (s.name, s.interval, None, ", ".join(p for p in (s.about, _counted(s.count, unit)) if p))
        for s in slices
    ]


def _counted(count: int | None, unit: str) -> str:
    return "" if count is None else f"{count:,} {unit}"


def card(found: Card, name: str) -> dict[str, Any]:
    """A reward model's card as blocks of bars."""
    about = [_counted(found.pairs, f"{found.split} pairs".strip())]
    about += [f"calibration error (ECE) {found.ece:.3f}"] if found.ece is not None else []
    about += [f"Brier score {found.brier:.3f}"] if found.brier is not None else []
    first = [Slice("reward model", None, found.accuracy), *found.baselines]
    blocks = [("accuracy", "share of pairs that score the chosen answer higher", first, "pairs")]
    blocks += [(f"accuracy by {n}", "", slices, "pairs") for n, slices in found.slices.items()]
    blocks += [
        ("probes", "share of pairs whose chosen answer scores above the probe", found.probes, ""),
        ("agreement", "share of pairs ranked alike by another model", found.agreement, "pairs"),
    ]
    return {
        "name": name,
        "verdict": found.verdict,
        "reasons": found.reasons,
        "about": ", ".join(part for part in about if part),
        "blocks": [
            {"title": title, "about": what, "rows": scaled(_of_slices(slices, unit or "pairs"))}
            for title, what, slices, unit in blocks
            if slices
        ],
    }


def results(report: Report, place: dict[str, int]) -> list[dict[str, Any]]:
    """Final numbers that have an interval, each for all shown runs on one scale."""
    out = []
    for name, (beside, label) in RESULTS.items():
        rows: list[Bar] = []
        for run in report.shown:
            if (found := final(run, name)).value is None:
                continue
            other = run.metrics.get(beside)
            note = "" if other is None else f"({label} {other:.3f})"
            rows.append((run.reference, found, place[run.reference], note))
        if rows:
            values = [x for _, i, _, _ in rows for x in (i.value, i.low, i.high) if x is not None]
            least, most, scale = 0.0, 1.0, ""
            if METRICS[name].unit != "fraction":  # from 0: one bar alone would fill its own scale
                least, most = min(0.0, *values), max(0.0, *values)
                scale = f"; the line goes from {number(least)} to {number(most)}"
            out.append(
                {
                    "title": name,
                    "about": METRICS[name].meaning + scale,
                    "rows": scaled(rows, least, most),
                }
            )
    return out


def evaluation(found: Evaluation, key: str) -> dict[str, Any]:
    """A win rate with its parts."""
    rows: list[Bar] = [("win rate", found.wins, None, "a tie counts half")]
    if found.length_controlled:
        rows.append(("length-controlled", found.length_controlled, None, ""))
    rows += [
        (f"in {name}", i, run, about)
        for name, i, run, about in _of_slices(found.categories, "prompts")
    ]
    about = [f"judge {found.judge} ({found.calls})", _counted(found.prompts, "prompts")]
    about += [f"ties {found.ties:.1%}"] if found.ties is not None else []
    units = {"kl": "KL, nats per answer", "length": "length, tokens"}
    return {
        "key": key,
        "title": found.name,
        "about": ", ".join(part for part in about if part),
        "rows": scaled(rows),
        "measures": [
            [units.get(name, name), interval(ours), interval(theirs)]
            for name, ours, theirs in found.measures
        ],
    }


# ---------------------------------------------------------------- answers side by side


def samples(report: Report, place: dict[str, int]) -> list[Group]:
    """The answers of all shown PPO runs, and of the models they started from, by prompt."""
    groups: dict[tuple[str, int], Group] = {}
    for run in report.shown:
        started = [link.reference for link in run.parents if link.role == "policy"]
        names = {"sft": (started or ["sft"])[0], "ppo": run.reference}
        met: dict[str, int] = {}
        for row in run.samples:
            met[row.prompt] = met.get(row.prompt, 0) + 1  # the same prompt twice is two prompts
            group = groups.setdefault((row.prompt, met[row.prompt]), Group(row.prompt))
            for whose, text, measures in row.answers:
                own = place[run.reference] if whose == "ppo" else None
                answer = _answer(names.get(whose, whose), text, measures, own)
                if answer not in group.answers:
                    group.answers.append(answer)
            _count_gains(group, row)
    out = [_ordered(group) for group in groups.values()]
    return out


def _count_gains(group: Group, row: Row) -> None:
    """Add what sorting needs; of several runs the sums, which order as the means do."""
    found = {whose: (text, measures) for whose, text, measures in row.answers}
    if "ppo" not in found:
        return
    text, measures = found["ppo"]
    before = found.get("sft", ("", {}))[1]
    values = {"score": measures.get("score"), "gold": measures.get("gold"), "length": len(text)}
    for name, gain in (("score", "gain"), ("gold", "goldgain")):
        now, then = values[name], before.get(name)
        values[gain] = None if now is None or then is None else now - then
    for key, value in values.items():
        if value is not None:
            group.sort[key] = round(group.sort.get(key, 0.0) + value, 6)


def _ordered(group: Group) -> Group:
    """With the answers of SFT models first."""
    prompt = _cut(group.prompt)
    answers = sorted(group.answers, key=lambda answer: answer["run"] is not None)
    size = sum(_bytes(text) + 250 for text in (prompt, *(a["text"] for a in answers)))
    return replace(group, prompt=prompt, answers=answers, size=size)


def _bytes(text: str) -> int:
    """What a text takes in the page, where a quotation mark is five bytes."""
    return len(escape(text).encode("utf-8", "replace"))


def _answer(
    whose: str, text: str, measures: dict[str, float | None], run: int | None
) -> dict[str, Any]:
    said = [f"{n} {number(v)}" for n, v in measures.items() if v is not None and n != "ended"]
    said += ["cut off by the limit"] if measures.get("ended") is not None else []
    return {
        "whose": whose,
        "text": _cut(text),
        "measures": ", ".join(said),
        "run": run,
        "color": GREY if run is None else style(run)["color"],
    }


def rows_as_groups(rows: Sequence[Row]) -> list[Group]:
    """Rows as they are, such as those that a judge saw."""
    out = []
    for row in rows:
        group = Group(row.prompt, row.tag)
        group.answers = [_answer(whose, text, m, None) for whose, text, m in row.answers]
        scores = [m.get("score") for _, _, m in row.answers]
        if scores and scores[0] is not None:
            group.sort["score"] = scores[0]
            if len(scores) > 1 and scores[1] is not None:
                group.sort["gain"] = scores[0] - scores[1]
        group.sort["length"] = len(row.answers[0][1]) if row.answers else 0
        out.append(_ordered(group))
    return out


def over_training(report: Report, place: dict[str, int]) -> list[Group]:
    """The few prompts that were answered again and again, each with its answers by step."""
    groups: dict[tuple[str, str], Group] = {}
    for run in report.shown:
        for row in run.samples_log:
            key = (run.reference, row.prompt)
            group = groups.setdefault(key, Group(row.prompt, run.reference))
            for whose, text, measures in row.answers:
                group.answers.append(_answer(whose, text, measures, place[run.reference]))
    return [_ordered(group) for group in groups.values()]


def within(groups: Sequence[Group], most: float) -> list[Group]:
    """The first groups that fit into `most` bytes of text."""
    out: list[Group] = []
    for group in groups:
        most -= group.size
        if most < 0:
            break
        out.append(group)
    return out


def knees(report: Report) -> str:
    """Where over-optimisation begins, of each run that has a knee."""
    found = [
        f"{run.reference}: KL {knee[1]:.2f}" + ("" if knee[0] is None else f" at step {knee[0]}")
        for run in report.shown
        if run.over and (knee := run.over.knee) and math.isfinite(knee[1])
    ]
    return "; ".join(found)
