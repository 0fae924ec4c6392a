"""`rlhf ...`: look at runs, compare their answers, adopt what was made elsewhere, remove what
nothing needs; `doctor`.

Only `adopt` and `eval` load a weight; only they and `doctor` import torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Annotated, Any

import typer

import rlhf
from rlhf.errors import ConfigError, RegistryError, RLHFError
from rlhf.manifest import Manifest, checkpoint_folders
from rlhf.registry import Registry, RunInfo, default_runs_dir

if TYPE_CHECKING:  # what only some commands need is imported there
    from rlhf.cleanup import Item
    from rlhf.compare import Comparison
    from rlhf.lineage import Ancestor, Child

# What tells most about a run of a stage, in reading order; `ls` shows those that were measured.
HEADLINES = ("eval/loss", "eval/accuracy", "eval/gold", "eval/win_rate", "objective/kl")

app = typer.Typer(
    help="Look at runs: what there is, how each was made, whether it is sound, what may go.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RunsDir = Annotated[
    str | None,
    typer.Option("--runs-dir", metavar="DIR", help="Folder of runs [RLHF_RUNS, else runs]."),
]


def main() -> None:
    """Entry point: what is refused is one message on stderr and exit code 2."""
    try:
        app()
    except RLHFError as error:
        print(f"refused: {error}", file=sys.stderr)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"rlhf {rlhf.__version__}")
        raise typer.Exit


@app.command("ls")
def list_runs(
    stage: Annotated[str | None, typer.Option(help="Only sft, rm or ppo.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list on stdout.")] = False,
    runs_dir: RunsDir = None,
) -> None:
    """List runs, finished or not."""
    registry = _registry(runs_dir)
    runs = registry.runs(stage)
    if as_json:
        _print_json_list(_as_dict(run) for run in runs)
        return
    if not runs:
        print(f"No {stage + ' ' if stage else ''}runs in {registry.runs_dir}. `make` lists how.")
        return
    shown = [name for name in HEADLINES if any(name in _metrics(run) for run in runs)]
    rows = []
    for run in runs:
        made = run.manifest
        rows.append(
            (
                run.reference,
                _state(run),
                _when(made.finished) if made else "",
                ", ".join(parent.reference for parent in made.parents) if made else "",
                made.method.name if made else "",
                *(_number(_metrics(run).get(name)) for name in shown),
            )
        )
    _print_table(("run", "state", "finished", "from", "method", *shown), rows)
    for run in runs:
        if run.problem:
            print(f"damaged: {run.problem}", file=sys.stderr)


@app.command()
def show(
    reference: Annotated[str, typer.Argument(metavar="REF", help="As in sft/tiny.")],
    runs_dir: RunsDir = None,
) -> None:
    """Show what a finished run recorded about itself."""
    from rlhf import card

    run = _registry(runs_dir).resolve(reference)
    made = run.manifest
    facts = [*_facts(made).items(), ("folder", str(run.path)), ("manifest sha256", run.digest)]
    _print_table(("", run.reference), facts)
    if made.metrics:
        print()
        _print_table(("metric", "value"), [(n, _number(v)) for n, v in made.metrics.items()])
    if measured := card.read(run.path):
        print()
        _print_table(("report card", "pairs", "value", "95 %"), card.table(measured))
    if made.data:
        rows = []
        for part in made.data:
            dropped = ", ".join(f"{count} {reason}" for reason, count in part.dropped.items())
            rows.append((part.source, part.split, str(part.rows), dropped or "0", part.fingerprint))
        print()
        _print_table(("data", "split", "rows used", "dropped", "fingerprint"), rows)
    files = [(name, f"{file.size:,}", file.sha256) for name, file in made.files.items()]
    print()
    _print_table(("file", "bytes", "sha256"), files)


@app.command()
def verify(
    reference: Annotated[str | None, typer.Argument(metavar="[REF]")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every finished run.")] = False,
    runs_dir: RunsDir = None,
) -> None:
    """Hash every immutable file of a run, and compare it and its parents with its manifest."""
    registry = _registry(runs_dir)
    if (reference is None) is not every:
        raise RegistryError("verify: name one run (rlhf verify sft/tiny), or give --all.")
    runs = [run for run in registry.runs() if run.state != "unfinished"] if every else []
    names = [run.reference for run in runs] if reference is None else [reference]
    damaged = 0
    for name in names:
        problems = registry.verify(name)
        damaged += bool(problems)
        print(f"{name}: {'damaged' if problems else 'sound'}")
        for problem in problems:
            print(f"  {problem}")
    if damaged:
        raise RegistryError(f"{damaged} of {len(names)} runs are not what was published.")
    if not names:
        print(f"No finished runs in {registry.runs_dir}.")


@app.command()
def lineage(
    reference: Annotated[str, typer.Argument(metavar="REF", help="As in ppo/tiny.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    runs_dir: RunsDir = None,
) -> None:
    """Show what a run came from, from the base model down, and which runs started from it."""
    from rlhf import lineage

    registry = _registry(runs_dir)
    line = lineage.ancestors(registry, reference)
    run = line[-1]
    members = lineage.survey(registry)
    users = lineage.children(members, run.reference, run.digest)
    blind = lineage.unreadable(members, besides=run.reference)
    if as_json:
        _print_json(
            {
                "reference": run.reference,
                "runs": [_ancestor_dict(each) for each in line],
                "used_by": users,
                "unreadable": blind,
            }
        )
        return
    print("\n".join(_tree(line)))
    print(f"\nused by{'' if users else ' no run'}")
    for user in users:
        print(f"  {_user_text(user)}")
    if blind:
        print(f"cannot be read, and might use it: {', '.join(blind)}")


@app.command()
def diff(
    left: Annotated[str, typer.Argument(metavar="REF", help="As in ppo/tiny.")],
    right: Annotated[str, typer.Argument(metavar="REF", help="As in ppo/kl01.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    runs_dir: RunsDir = None,
) -> None:
    """Show how two finished runs differ: settings, parents, data, environment, metrics."""

    from rlhf.compare import compare

    found = compare(_registry(runs_dir), left, right)
    if as_json:
        metrics = [vars(pair) | {"change": pair.change} for pair in found.metrics]
        _print_json(vars(found) | {"metrics": metrics, "same": found.same})
        return
    _print_comparison(found)


@app.command("eval")
def evaluate(
    references: Annotated[
        list[str], typer.Argument(metavar="REF...", help="As in ppo/tiny, or ppo/tiny@step-10.")
    ],
    against: Annotated[str, typer.Option(metavar="REF", help="As in sft/tiny.")],
    judge: Annotated[
        str, typer.Option(help="gold, rm/NAME, FILE.py:function, or openai:MODEL.")
    ] = "gold",
    prompts: Annotated[int, typer.Option(help="How many, at most.")] = 200,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Rows with prompts [held-out ones of the run's data]."),
    ] = None,
    split: Annotated[str, typer.Option(help="Of the data: validation or test.")] = "validation",
    category: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="Of a row, to split by [category, source]."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling, and of the intervals.")] = 0,
    temperature: Annotated[float, typer.Option(help="Of the sampling.")] = 1.0,
    max_new_tokens: Annotated[int | None, typer.Option(help="Of an answer [as the run's].")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Drawn at once [as the run's].")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    judge_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Of an endpoint [OPENAI_BASE_URL].")
    ] = None,
    judge_key_env: Annotated[
        str, typer.Option(metavar="NAME", help="The environment variable that holds its key.")
    ] = "OPENAI_API_KEY",
    judge_timeout: Annotated[float, typer.Option(help="Seconds for one reply.")] = 60.0,
    concurrency: Annotated[int, typer.Option(help="Questions to an endpoint at once.")] = 4,
    price_in: Annotated[float | None, typer.Option(help="For a million tokens.")] = None,
    price_out: Annotated[float | None, typer.Option(help="For a million tokens.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list on stdout.")] = False,
    runs_dir: RunsDir = None,
) -> None:
    """Let two policies answer the same held-out prompts, and a judge say whose are better."""
    from rlhf import head_to_head, outcomes
    from rlhf.console import Console

    registry, console = _registry(runs_dir), Console()
    options = head_to_head.Options(
        judge=judge,
        prompts=prompts,
        data=data,
        split=split,
        category=category,
        seed=seed,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        device=device,
        judging={
            "url": judge_url,
            "key_variable": judge_key_env,
            "timeout": judge_timeout,
            "concurrency": concurrency,
            "prices": (price_in, price_out),
        },
    )
    plan = head_to_head.prepare(registry, references, against, options)
    results = head_to_head.play(plan, console)
    if as_json:
        _print_json_list(results)
    else:
        outcomes.show(results, _print_table)
    outcomes.store_all(registry, results, console)


@app.command()
def report(
    references: Annotated[
        list[str], typer.Argument(metavar="REF...", help="One: its whole line. Several: compared.")
    ],
    out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="[report.html, of one run in its folder, else here]"),
    ] = None,
    runs_dir: RunsDir = None,
) -> None:
    """Write one HTML file: curves, samples, cards, differences, warnings; it needs no network."""
    from pathlib import Path

    from rlhf.report import page

    registry = _registry(runs_dir)
    path = Path(out) if out is not None else page.usual_path(registry, references)
    size = page.write(registry, references, path)
    print(f"{path}: {size:,} bytes")


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show it.")] = False,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Also runs that could go on from a checkpoint.")
    ] = False,
    replaced: Annotated[
        bool, typer.Option("--replaced", help="Also runs that overwrite=true moved aside.")
    ] = False,
    runs_dir: RunsDir = None,
) -> None:
    """Remove what nothing needs: superseded checkpoints, leftovers, unfinished runs without one.

    Of a finished run the best and the last checkpoint stay, and any that a run started from.
    """

    from rlhf import cleanup

    registry = _registry(runs_dir)
    found = cleanup.sweep(registry, unfinished=unfinished, replaced=replaced)
    left = [] if dry_run else cleanup.discard(registry, found.remove)
    skipped = {item.path for item in left}
    gone = [item for item in found.remove if item.path not in skipped]
    _print_items("would be removed" if dry_run else "removed", gone)
    _print_items("kept", [*found.keep, *left])
    for name in found.unreadable:
        print(
            f"{name}: what it started from cannot be read, so only leftovers go. Restore its "
            f"manifest.json, or remove it (rlhf rm {name}).",
            file=sys.stderr,
        )
    verb = "--dry-run: nothing was removed; it would be" if dry_run else "removed:"
    print(f"{verb} {_sum(gone)}")


@app.command()
def rm(
    reference: Annotated[
        str, typer.Argument(metavar="REF", help="A run, or a checkpoint as in sft/tiny@step-40.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show it.")] = False,
    runs_dir: RunsDir = None,
) -> None:
    """Remove one run or one checkpoint, unless a run started from it or a process holds it."""

    from rlhf import cleanup

    item = cleanup.remove(_registry(runs_dir), reference, dry_run=dry_run)
    verb = "--dry-run: nothing was removed; it would be" if dry_run else "removed:"
    print(f"{verb} {item.name}, {_bytes(item.bytes)}")


@app.command("export-run")
def export_run(
    reference: Annotated[str, typer.Argument(metavar="REF", help="As in ppo/tiny.")],
    target: Annotated[str, typer.Argument(help="A new .tar, .tar.gz or .tgz, else a new folder.")],
    parents: Annotated[
        bool, typer.Option("--parents/--no-parents", help="The runs it came from, too.")
    ] = True,
    runs_dir: RunsDir = None,
) -> None:
    """Copy a finished run, and the runs it came from, to where import-run can fetch it."""
    from rlhf import sharing

    for run in sharing.export_run(_registry(runs_dir), reference, target, parents=parents):
        print(f"{run.reference}: {run.state}, {run.size:,} bytes")


@app.command("import-run")
def import_run(
    source: Annotated[str, typer.Argument(help="What export-run made.")],
    runs_dir: RunsDir = None,
) -> None:
    """Check exported runs, and add them to the folder of runs; changes none that is there."""
    from rlhf import sharing

    for run in sharing.import_run(_registry(runs_dir), source):
        print(f"{run.reference}: {run.state}, {run.size:,} bytes")


@app.command()
def adopt(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="As save_pretrained wrote it.")],
    stage: Annotated[str, typer.Option(help="sft: a language model; rm: a reward model.")],
    run_name: Annotated[str, typer.Option(help="It becomes STAGE/RUN_NAME.")],
    parent: Annotated[
        str | None, typer.Option(metavar="REF", help="The run a reward model was trained from.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="chat, plain, inherit (from the parent), or a file.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="What children compute in: fp32, bf16 or fp16.")
    ] = "auto",
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="The longest prompt it was trained on.")
    ] = None,
    max_response_tokens: Annotated[
        int | None, typer.Option(help="The longest answer it was trained on.")
    ] = None,
    runs_dir: RunsDir = None,
) -> None:
    """Publish a model made elsewhere as a run, so that the other stages can start from it."""
    from pathlib import Path

    from rlhf import adopt

    done = adopt.adopt(
        _registry(runs_dir),
        Path(folder),
        stage=stage,
        run_name=run_name,
        parent=parent,
        template=template,
        dtype=dtype,
        max_prompt_tokens=max_prompt_tokens,
        max_response_tokens=max_response_tokens,
    )
    for note in done.notes:
        print(note)
    said = "adopted" if done.new else "adopted before from the same files: nothing to do"
    print(f"{done.run.reference}: {said}")


@app.command()
def sync(
    references: Annotated[
        list[str] | None, typer.Argument(metavar="[REF ...]", help="As in ppo/tiny.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every run, finished or not.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show it.")] = False,
    runs_dir: RunsDir = None,
) -> None:
    """Upload to W&B what was tracked offline; the parts of an interrupted run go in order."""
    from rlhf import sync

    if bool(references) is every:
        raise RegistryError("sync: name runs (rlhf sync ppo/tiny), or give --all.")
    registry = _registry(runs_dir)
    found = sync.parts(registry, sync.choose(registry, references or []))
    if dry_run or not any(part.state == "to upload" for part in found):
        _print_table(
            ("run", "tracked offline", ""),
            [(part.reference, part.folder.name, part.state) for part in found],
        )
        if not found:
            print("Nothing was tracked offline.")
        return
    sync.upload(found, print)


@app.command()
def dashboard(
    project: Annotated[str, typer.Option(help="As in tracking.project.")] = "rlhf",
    entity: Annotated[str | None, typer.Option(help="User or team; the key's by default.")] = None,
    name: Annotated[str, typer.Option(help="Of the saved view.")] = "RLHF",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what it has.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="W&B's definition of it on stdout; saves nothing.")
    ] = False,
) -> None:
    """Save a W&B workspace that compares runs: reward against KL, gold, win rates, cost."""
    from rlhf import dashboard

    if as_json:
        print(dashboard.as_json(project, entity, name))
    elif dry_run:
        rows = [(one.section, one.title, ", ".join(one.y), one.x) for one in dashboard.PANELS]
        _print_table(("section", "panel", "shows", "against"), rows)
    else:
        print(dashboard.save(project, entity, name))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Only the rules, as in docs/guards.md.")
    ] = False,
    runs_dir: RunsDir = None,
) -> None:
    """Look at this machine: libraries, device, disk, W&B; and list what stages refuse, and why."""
    from rlhf import doctor

    if as_markdown:
        print(doctor.as_markdown(), end="")
        return
    found = doctor.examine(runs_dir if runs_dir is not None else default_runs_dir())
    if as_json:
        _print_json(found)
    else:
        libraries = [
            (one.name, one.installed or "missing", one.needs, "" if one.fits else "does not fit")
            for one in found.libraries
        ]
        _print_table(("library", "installed", "needed", ""), libraries)
        print()
        _print_table(("this machine", ""), list(found.machine.items()))
        print()
        rules = [
            (rule["name"], rule["does"], rule["what"], rule["way_out"], "\n".join(rule["issues"]))
            for rule in found.rules
        ]
        _print_table(("rule", "", "what is set", "way out", "public reports"), rules)
        print()
    if found.problems:
        raise ConfigError(" ".join(found.problems))
    if not as_json:
        print("Sound: nothing here would stop every run. Why each rule: docs/guards.md.")


# ---------------------------------------------------------------- how things are shown


def _registry(runs_dir: str | None) -> Registry:
    return Registry(runs_dir if runs_dir is not None else default_runs_dir())


def _as_dict(run: RunInfo) -> dict[str, Any]:
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


def _ancestor_dict(run: Ancestor) -> dict[str, Any]:
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


def _tree(line: list[Ancestor]) -> list[str]:
    """The base model and under it what was made of it; what is met again is a name and (above)."""
    below: dict[str, list[str]] = {run.reference: [] for run in line}
    for run in line:
        for name in dict.fromkeys(link.reference for link in run.parents):
            below[name].append(run.reference)
    about = {run.reference: run for run in line}
    corner, tee, bar = _glyphs("└── ", "├── ", "│   ")
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
    return [_printable(text) for text in lines]


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
    metrics = [f"{n} {_number(made.metrics[n])}" for n in HEADLINES if n in made.metrics]
    data = [f"data     {p.source}, {p.split}: {p.rows:,} rows" for p in made.data]
    return [
        *problem,
        *([f"from     {', '.join(parents)}"] if parents else []),
        f"method   {_method_text(made)}",
        *data,
        *([f"metrics  {', '.join(metrics)}"] if metrics else []),
    ]


def _user_text(user: Child) -> str:
    words = [f"as {user.role}" if user.role else ""]
    words += [f"from {user.parent}"] if "@" in user.parent else []
    words += [user.state] if user.state != "finished" else []
    words += ["which was another then"] if user.stale else []
    return f"{user.reference} {', '.join(words)}"


def _print_comparison(found: Comparison) -> None:
    """Each part of two runs: a table of what differs, or that it is the same."""
    if found.same:
        print(f"{found.left} and {found.right} are the same in all that can change results.\n")
    for part in ("config", "parents", "data", "environment"):
        rows = [
            (d.name, _value(d.left), _value(d.right), "" if d.matters else "no change of results")
            for d in getattr(found, part)
        ]
        if rows:
            _print_table((part, found.left, found.right, ""), rows)
        else:
            print(f"{part}: the same")
        print()
    metrics = [
        (m.name, _number(m.left), _number(m.right), "" if m.change is None else f"{m.change:+.4g}")
        for m in found.metrics
    ]
    if metrics:
        _print_table(("metric", found.left, found.right, "difference"), metrics)
    if all(m.left == m.right for m in found.metrics):
        print("metrics: the same" if metrics else "metrics: none")


def _value(value: Any) -> str:
    """A setting as it is written in a command."""
    import json

    return _short(value) if isinstance(value, str) else json.dumps(value)


def _short(text: str) -> str:
    """`text` with each sha256 in it cut to 12 digits."""
    import re

    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", text)


def _print_items(title: str, items: list[Item]) -> None:
    if items:
        rows = [(item.name, item.kind, f"{item.bytes:,}", item.why) for item in items]
        _print_table((title, "what", "bytes", "why"), rows)
        print()


def _sum(items: list[Item]) -> str:
    if not items:
        return "nothing"
    count = f"{len(items)} thing{'s' if len(items) > 1 else ''}"
    return f"{count}, {_bytes(sum(item.bytes for item in items))}"


def _bytes(count: int) -> str:
    return f"{count:,} bytes" + (f" ({count / 1e9:.2f} GB)" if count >= 1e7 else "")


def _state(run: RunInfo) -> str:
    """Finished or not, or stopped by itself; of an unfinished run, where it could go on."""
    steps = checkpoint_folders(run.path / "checkpoints") if run.state == "unfinished" else []
    if run.manifest and run.manifest.stopped:
        return "stopped by a guard"
    return f"{run.state} at {steps[-1].name}" if steps else run.state


def _metrics(run: RunInfo) -> dict[str, float | None]:
    return run.manifest.metrics if run.manifest else {}


def _facts(made: Manifest) -> dict[str, str]:
    """What `show` prints of a run beside its tables."""
    tokenizer, environment = made.tokenizer, made.environment
    parents = [f"{p.role} {p.reference} (manifest {p.digest[:12]})" for p in made.parents]
    phases = [
        f"{name} {phase.seconds:.1f} s"
        + ("" if phase.peak_memory_gb is None else f" {phase.peak_memory_gb:.2f} GB")
        for name, phase in made.phases.items()
    ]
    return {
        "created": _when(made.created),
        "finished": _when(made.finished),
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


def _when(stamp: str) -> str:
    return stamp[:16].replace("T", " ") + " UTC"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=1, default=vars))


def _print_json_list(values: Iterable[Any]) -> None:
    """One item a line: json lays out large values slowly."""
    import json

    lines = ",\n".join(json.dumps(value, default=vars) for value in values)
    print(f"[\n{lines}\n]" if lines else "[]")


def _glyphs(*texts: str) -> Sequence[str]:
    """Lines and corners as this output can show them."""
    try:
        "".join(texts).encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return [
            text.translate({ord(a): b for a, b in zip("└├│─", "`||-", strict=True)})
            for text in texts
        ]
    return texts


def _printable(text: str) -> str:
    """`text` with what could steer a terminal spelled out; line ends stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns under headers, folded where a terminal is too narrow for them.

    Off a terminal text is never cut, so that it can be searched. Without rich, which needs more
    than a second for a thousand rows.
    """
    (rule,), gap = _glyphs("─"), "   "
    cells = [[_printable(cell).split("\n") for cell in row] for row in (headers, *rows)]
    widths = [
        max(len(text) for cell in column for text in cell) for column in zip(*cells, strict=True)
    ]
    if sys.stdout.isatty():
        from shutil import get_terminal_size

        widths = _narrowed(widths, get_terminal_size().columns - len(gap) * (len(widths) - 1))
        cells = [
            [_folded(cell, size) for cell, size in zip(row, widths, strict=True)] for row in cells
        ]
    lines = []
    for row in cells:
        for parts in zip_longest(*row, fillvalue=""):
            lines.append(gap.join(map(str.ljust, parts, widths)).rstrip())
    lines.insert(max(map(len, cells[0])), rule * (sum(widths) + len(gap) * (len(widths) - 1)))
    print("\n".join(lines))


def _narrowed(widths: list[int], room: int) -> list[int]:
    """`widths` with the widest made narrower, the first one last, until all fit into `room`."""
    widths = list(widths)
    for first in (1, 0):
        while sum(widths) > room and max(widths[first:], default=0) > 8:
            widths[widths.index(max(widths[first:]), first)] -= 1
    return widths


def _folded(lines: list[str], width: int) -> list[str]:
    """`lines` with the long ones going on in the next line."""
    from textwrap import wrap

    return [part for line in lines for part in (wrap(line, width) if len(line) > width else [line])]


if __name__ == "__main__":
    main()
