"""Runs in words: what commands say of a run, of the line it came from, and of how two differ."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from rlhf.manifest import Manifest, checkpoint_folders
from rlhf.metrics import headlines
from rlhf.registry import RunInfo
from rlhf.tables import glyphs, print_table, printable

if TYPE_CHECKING:
    from rlhf.cleanup import Item
    from rlhf.compare import Comparison
    from rlhf.lineage import Ancestor, Child


def as_dict(run: RunInfo) -> dict[str, Any]:
    """A run for a script."""
    return {
        "reference": run.reference,
        "stage": run.stage,
        "run_name": run.run_name,
        "path": str(run.path),
        "state": run.state,
        "problem": run.problem,
        "manifest": run.manifest,
    }


def ancestor_dict(run: Ancestor) -> dict[str, Any]:
    """A run of a line for a script; the whole manifest is in `ls --json`."""
    made = run.manifest
    return {
        "reference": run.reference,
        "state": run.state,
        "problem": run.problem,
        "parents": run.parents,
        "base": made.base if made else None,
        "method": made.method if made else None,
        "data": made.data if made else None,
        "metrics": made.metrics if made else None,
        "finished": made.finished if made else None,
    }


def tree(line: list[Ancestor]) -> list[str]:
    """The base model and under it what was made of it; what is met again is a name and (above)."""
    below: dict[str, list[str]] = {run.reference: [] for run in line}
    for run in line:
        for name in dict.fromkeys(link.reference for link in run.parents):
            below[name].append(run.reference)
    about = {run.reference: run for run in line}
    corner, tee, bar = glyphs("└── ", "├── ", "│   ")
    lines: list[str] = []
    seen: set[str] = set()
    tops = [run for run in line if not run.parents]
    for top in [*tops, *line]:  # all of them are below the tops, but for names in a circle
        if top.reference in seen:
            continue
        made = top.manifest or line[-1].manifest
        if made and (base := f"base model {_short(_base_text(made))}") not in lines:
            lines.append(base)
        waiting = [(top.reference, "", top not in tops[:-1])]
        while waiting:
            name, indent, is_last = waiting.pop()
            lines.append(indent + (corner if is_last else tee) + _title(about[name], line, seen))
            if name in seen:
                continue
            seen.add(name)
            indent += "    " if is_last else bar
            more = bar if below[name] else "    "
            lines += [indent + more + text for text in _details(about[name])]
            kids = [(kid, indent, kid == below[name][-1]) for kid in below[name]]
            waiting += reversed(kids)
    return [printable(text) for text in lines]


def _title(run: Ancestor, line: list[Ancestor], seen: set[str]) -> str:
    """A run's line in the tree: its name and, in words, what is wrong with it."""
    if run.reference in seen:
        return f"{run.reference} (above)"
    words = [] if run.state == "sound" else [run.state]
    words += [
        f"changed since {child.reference} started from it"
        for child in line
        for link in child.parents
        if link.reference == run.reference and link.state == "changed"
    ]
    return run.reference + (f"  ({'; '.join(words)})" if words else "")


def _details(run: Ancestor) -> list[str]:
    made = run.manifest
    problem = [(run.problem or "").replace("\n", " ")] if run.state == "damaged" else []
    if made is None:
        return problem
    parents = [
        f"{link.role} {link.reference}" + ("" if link.state == "sound" else f" ({link.state})")
        for link in run.parents
    ]
    metrics = [f"{n} {number(made.metrics[n])}" for n in headlines(made.metrics)]
    data = [f"data     {p.source}, {p.split}: {p.rows:,} rows" for p in made.data]
    return [
        *problem,
        *([f"from     {', '.join(parents)}"] if parents else []),
        f"method   {_method_text(made)}",
        *data,
        *([f"metrics  {', '.join(metrics)}"] if metrics else []),
    ]


def user_text(user: Child) -> str:
    words = [f"as {user.role}" if user.role else ""]
    words += [f"from {user.parent}"] if "@" in user.parent else []
    words += [user.state] if user.state != "finished" else []
    words += ["which was another then"] if user.stale else []
    return f"{user.reference} {', '.join(words)}"


def print_comparison(found: Comparison) -> None:
    """Each part of two runs: a table of what differs, or that it is the same."""
    if found.same:
        print(f"{found.left} and {found.right} are the same in all that can change results.\n")
    for part in ("config", "parents", "data", "environment"):
        rows = [
            (d.name, _value(d.left), _value(d.right), "" if d.matters else "no change of results")
            for d in getattr(found, part)
        ]
        if rows:
            print_table((part, found.left, found.right, ""), rows)
        else:
            print(f"{part}: the same")
        print()
    metrics = [
        (m.name, number(m.left), number(m.right), "" if m.change is None else f"{m.change:+.4g}")
        for m in found.metrics
    ]
    if metrics:
        print_table(("metric", found.left, found.right, "difference"), metrics)
    if all(m.left == m.right for m in found.metrics):
        print("metrics: the same" if metrics else "metrics: none")


def _value(value: Any) -> str:
    """A setting as it is written in a command."""
    return _short(value) if isinstance(value, str) else json.dumps(value)


def _short(text: str) -> str:
    """`text` with each sha256 in it cut to 12 digits."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", text)


def print_items(title: str, items: list[Item]) -> None:
    if items:
        rows = [(item.name, item.kind, f"{item.bytes:,}", item.why) for item in items]
        print_table((title, "what", "bytes", "why"), rows)
        print()


def total(items: list[Item]) -> str:
    if not items:
        return "nothing"
    count = f"{len(items)} thing{'s' if len(items) > 1 else ''}"
    return f"{count}, {bytes_text(sum(item.bytes for item in items))}"


def bytes_text(count: int) -> str:
    return f"{count:,} bytes" + (f" ({count / 1e9:.2f} GB)" if count >= 1e7 else "")


def state(run: RunInfo) -> str:
    """Finished or not, or stopped by itself; of an unfinished run, where it could go on."""
    steps = checkpoint_folders(run.path / "checkpoints") if run.state == "unfinished" else []
    if run.manifest and run.manifest.stopped:
        return "stopped by a guard"
    return f"{run.state} at {steps[-1].name}" if steps else run.state


def metrics(run: RunInfo) -> dict[str, float | None]:
    return run.manifest.metrics if run.manifest else {}


def facts(made: Manifest) -> dict[str, str]:
    """What `show` prints of a run beside its tables."""
    tokenizer, environment = made.tokenizer, made.environment
    parents = [f"{p.role} {p.reference} (manifest {p.digest[:12]})" for p in made.parents]
    phases = [
        f"{name} {phase.seconds:.1f} s"
        + ("" if phase.peak_memory_gb is None else f" {phase.peak_memory_gb:.2f} GB")
        for name, phase in made.phases.items()
    ]
    return {
        "created": when(made.created),
        "finished": when(made.finished),
        "command": " ".join(made.command),
        "code": f"rlhf {made.package_version}, commit {made.git_commit or 'unknown'}",
        "config": f"config.yaml (hash {made.config_hash[:12]})",
        "parents": "\n".join(parents) or "none",
        "base model": _base_text(made),
        "tokenizer": tokenizer.tokenizer_hash,
        "template": tokenizer.template_hash,
        "special ids": f"pad {tokenizer.pad_id} eos {tokenizer.eos_id} bos {tokenizer.bos_id}",
        "method": _method_text(made),
        "model/ holds": made.model_is,
        **({"stopped by a guard": made.stopped} if made.stopped else {}),
        **({"warnings": "\n".join(made.warnings)} if made.warnings else {}),
        **(
            {"report card": "\n- ".join([card.verdict, *card.reasons])}
            if (card := made.card)
            else {}
        ),
        "golden": " ".join(f"{key}={value}" for key, value in made.golden.items()) or "none",
        "environment": (
            f"seed {environment.seed}, {environment.world_size} x {environment.device}, "
            f"ZeRO {environment.zero_stage}, {environment.dtype}"
        ),
        "libraries": " ".join(f"{n} {v}" for n, v in environment.libraries.items()),
        "phases": "\n".join(phases) or "none",
    }


def _base_text(made: Manifest) -> str:
    base = made.base
    return f"{base.name} {base.revision or ''}".strip() + f" ({base.fingerprint})"


def _method_text(made: Manifest) -> str:
    settings = " ".join(f"{key}={value}" for key, value in made.method.settings.items())
    chain = " > ".join(made.method.adapter_chain)
    return f"{made.method.name} {settings}".strip() + (f", on {chain}" if chain else "")


def when(stamp: str) -> str:
    return stamp[:16].replace("T", " ") + " UTC"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
