"""What a report shows, read from the folders of runs into plain values. No plots and no HTML."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlhf import compare, lineage
from rlhf.errors import RegistryError
from rlhf.lineage import Link
from rlhf.manifest import Manifest, Parent, flat
from rlhf.registry import Absent, Registry, parse_reference
from rlhf.report import files
from rlhf.report.files import Card, Curve, Evaluation, OverOptimisation, Row


@dataclass
class Run:
    """A run as far as it can be read.

    Attributes:
        reference: without a checkpoint.
        state: "finished", "stopped", "unfinished", "damaged" or "missing".
        manifest: None where it is not finished or not sound.
        config: every setting, flat; {} where it cannot be known.
        parents: what it started from, and what became of that.
        problems: files that are damaged or missing.
        warnings: what a stage said about this run, and what its numbers say.
    """

    reference: str
    stage: str
    state: str
    manifest: Manifest | None = None
    config: dict[str, Any] = field(default_factory=dict)
    parents: list[Link] = field(default_factory=list)
    curves: dict[str, Curve] = field(default_factory=dict)
    samples: list[Row] = field(default_factory=list)
    samples_log: list[Row] = field(default_factory=list)
    card: Card | None = None
    evaluations: list[Evaluation] = field(default_factory=list)
    over: OverOptimisation | None = None
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, float]:
        """The final numbers; of a run that is not finished, the latest of each curve."""
        if self.manifest is not None:
            return {n: v for n, v in self.manifest.metrics.items() if v is not None}
        latest = {n: c.values[np.isfinite(c.values)] for n, c in self.curves.items()}
        return {name: float(values[-1]) for name, values in latest.items() if len(values)}


@dataclass(frozen=True)
class Difference:
    """A thing that runs of one stage have differently; `values` in the order of the runs."""

    part: str
    name: str
    values: list[Any]
    matters: bool


@dataclass(frozen=True)
class Report:
    """All that a report shows.

    Attributes:
        title: what was asked for.
        runs: those and all they came from, parents first.
        shown: whose curves and samples are shown: the whole line of one run, else those named.
        differences: stage -> what its shown runs have differently.
    """

    title: str
    runs: list[Run]
    shown: list[Run]
    differences: dict[str, list[Difference]]


def collect(registry: Registry, references: list[str]) -> Report:
    """Read what a report about these runs shows.

    Raises:
        RegistryError: one does not exist, or is no run.
    """
    names = list(dict.fromkeys(_run_name(registry, reference) for reference in references))
    runs: dict[str, Run] = {}
    for name in names:
        for run in _line(registry, name):
            runs.setdefault(run.reference, run)
    whole_line = len(names) == 1
    shown = [run for run in runs.values() if whole_line or run.reference in names]
    for run in runs.values():
        _read_files(registry, run, everything=run in shown)
    shown = [run for run in shown if run.state != "missing"]
    if not whole_line:
        shown.sort(key=lambda run: names.index(run.reference))
    stages = dict.fromkeys(run.stage for run in shown)
    differences = {s: differing([run for run in shown if run.stage == s]) for s in stages}
    return Report(", ".join(names), list(runs.values()), shown, differences)


def _run_name(registry: Registry, reference: str) -> str:
    wanted = parse_reference(reference)
    name = f"{wanted.stage}/{wanted.run_name}"
    if wanted.checkpoint:
        raise RegistryError(f"{wanted}: a report is about runs, not checkpoints. Name {name}.")
    if not registry.folder(wanted.stage, wanted.run_name).is_dir():
        registry.load(wanted)  # says what there is
    return name


# ---------------------------------------------------------------- a run and what it came from


def _line(registry: Registry, name: str, below: tuple[str, ...] = ()) -> list[Run]:
    """A run after all that it came from, finished or not; `below`: what names it as a parent."""
    wanted = parse_reference(name)
    try:
        registry.load(wanted)
    except Absent:
        parents = _configured_parents(registry, name)
        run = Run(name, wanted.stage, "unfinished", parents=[])
    except RegistryError as error:
        parents = _configured_parents(registry, name)
        run = Run(name, wanted.stage, "damaged", problems=[str(error)])
    else:
        return _merged([_from_ancestor(found) for found in lineage.ancestors(registry, name)])
    found = []
    for parent in parents:
        line, state = _line_of_parent(registry, parent.reference, (*below, name))
        run.parents.append(Link(parent.role, parent.reference, parent.digest, state))
        found += line
    return _merged([*found, run])


def _line_of_parent(
    registry: Registry, reference: str, below: tuple[str, ...]
) -> tuple[list[Run], str]:
    """The line of a parent that an unfinished run names, and the parent's state."""
    wanted = parse_reference(reference)
    name = f"{wanted.stage}/{wanted.run_name}"
    try:
        there = registry.folder(wanted.stage, wanted.run_name).is_dir()
    except RegistryError:
        there = False
    if not there:
        return [Run(name, wanted.stage, "missing")], "missing"
    if name in below:  # names that go round in a circle
        return [], "unfinished"
    line = _line(registry, name, below)
    state = line[-1].state
    return line, "sound" if state in ("finished", "stopped") else state


def _configured_parents(registry: Registry, name: str) -> list[Parent]:
    for member in lineage.survey(registry):
        if member.reference == name and member.parents:
            return [parent for parent in member.parents if parent.reference != name]
    return []


def _from_ancestor(found: lineage.Ancestor) -> Run:
    name, stage = found.reference, ""  # what a manifest names may be no reference
    with contextlib.suppress(RegistryError):
        wanted = parse_reference(found.reference)
        name, stage = f"{wanted.stage}/{wanted.run_name}", wanted.stage
    made = found.manifest
    state = {"sound": "finished"}.get(found.state, found.state)
    if state == "finished" and made is not None and made.stopped:
        state = "stopped"
    run = Run(name, stage, state, made, parents=found.parents)
    if found.problem:
        run.problems.append(found.problem)
    return run


def _merged(line: list[Run]) -> list[Run]:
    """Each run once: a run and a checkpoint of it are one."""
    found: dict[str, Run] = {}
    for run in line:
        found.setdefault(run.reference, run)
    return list(found.values())


# ---------------------------------------------------------------- what lies in its folder


def _read_files(registry: Registry, run: Run, *, everything: bool) -> None:
    """Fill in what the run's folder holds; of a run that is not shown, what its node tells."""
    made = run.manifest
    if made is not None:
        run.config = made.config
        run.warnings += [f"stopped by a guard: {made.stopped}"] if made.stopped else []
        run.warnings += [str(text) for text in getattr(made, "warnings", None) or []]
    run.warnings += [_link_text(link) for link in run.parents if link.state != "sound"]
    folder = registry.runs_dir / run.reference
    if run.state == "missing" or not run.stage or not folder.is_dir():
        return
    run.card = files.read(folder / "card.json", files.card, run.problems)
    if run.card is not None and run.card.verdict != "go":
        reasons = "; ".join(run.card.reasons)
        run.warnings.append(f"reward model card: {run.card.verdict}: {reasons}")
    if not everything:
        return
    if not run.config:
        run.config = _written_config(folder / "config.yaml", run.problems)
    run.curves = files.metrics(folder / "metrics.jsonl", run.problems)
    run.samples = files.read_lines(folder / "samples.jsonl", files.sample, run.problems)
    run.samples_log = files.read_lines(
        folder / "samples_log.jsonl", files.sample_in_time, run.problems
    )
    run.over = files.read(folder / "overoptimisation.json", files.over_optimisation, run.problems)
    if run.over is not None:
        run.warnings += [text for text in run.over.warnings if text not in run.warnings]
    for path in sorted((folder / "eval").glob("*.json")):
        found = files.read(path, files.evaluation, run.problems)
        run.evaluations += [] if found is None else [found]
    run.warnings += [text for n, c in run.curves.items() if (text := _not_finite(n, c))]


def _link_text(link: Link) -> str:
    if link.state == "changed":
        return f"{link.role} {link.reference} was changed since this run started from it"
    return f"{link.role} {link.reference} is {link.state}"


def _not_finite(name: str, curve: Curve) -> str | None:
    odd = ~np.isfinite(curve.values)
    if not odd.any():
        return None
    first = int(odd.argmax())
    return f"{name} is {curve.values[first]} at step {curve.steps[first]}" + (
        f", and no finite number at {int(odd.sum())} steps in all" if odd.sum() > 1 else ""
    )


def _written_config(path: Path, problems: list[str]) -> dict[str, Any]:
    """config.yaml of a run without a manifest, flat."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        found = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError, OmegaConfBaseException, YAMLError) as error:
        problems.append(f"{path.name}: cannot be read ({type(error).__name__})")
        return {}
    return flat(found) if isinstance(found, dict) else {}  # type: ignore[arg-type]


# ---------------------------------------------------------------- how runs of a stage differ


def differing(runs: list[Run]) -> list[Difference]:
    """What runs of one stage have differently: settings first, those that matter first of all.

    Of an unfinished run only the settings are known.
    """
    if len(runs) < 2:
        return []
    facts = [
        compare.facts(run.manifest) if run.manifest else {"config": run.config} for run in runs
    ]
    found = []
    for part in compare.PARTS:
        tables = [fact.get(part) for fact in facts]
        for name in dict.fromkeys(name for table in tables for name in table or {}):
            values = [
                "?" if table is None else table.get(name, compare.NOT_SET) for table in tables
            ]
            known = [value for value, table in zip(values, tables, strict=True) if table]
            if len({repr(value) for value in known}) > 1:
                counts = compare.matters(part, name, *(run.config for run in runs))
                found.append(Difference(part, name, values, counts))
    order = {part: place for place, part in enumerate(compare.PARTS)}
    return sorted(found, key=lambda d: (not d.matters, order[d.part]))
