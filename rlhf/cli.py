"""`rlhf ...`: look at runs, compare their answers, adopt what was made elsewhere, remove what
nothing needs; `doctor`.

What only some commands need is imported there. Only `adopt` and `eval` load a weight; only they and
`doctor` import torch.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import rlhf
from rlhf import describe
from rlhf.errors import ConfigError, RegistryError, RLHFError
from rlhf.metrics import headlines
from rlhf.registry import Registry, default_runs_dir
from rlhf.tables import print_json, print_json_list, print_table

app = typer.Typer(
    help="Look at runs: what there is, how each was made, whether it is sound, what may go.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RunsDir = Annotated[
    str | None,
    typer.Option("--runs-dir", metavar="DIR", help="Folder of runs; else RLHF_RUNS, else runs."),
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
        print_json_list(describe.as_dict(run) for run in runs)
        return
    if not runs:
        print(f"No {stage + ' ' if stage else ''}runs in {registry.runs_dir}. `make` lists how.")
        return
    shown = headlines(*map(describe.metrics, runs))
    rows = []
    for run in runs:
        made = run.manifest
        rows.append(
            (
                run.reference,
                describe.state(run),
                describe.when(made.finished) if made else "",
                ", ".join(parent.reference for parent in made.parents) if made else "",
                made.method.name if made else "",
                *(describe.number(describe.metrics(run).get(name)) for name in shown),
            )
        )
    print_table(("run", "state", "finished", "from", "method", *shown), rows)
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
    facts = [
        *describe.facts(made).items(),
        ("folder", str(run.path)),
        ("manifest sha256", run.digest),
    ]
    print_table(("", run.reference), facts)
    if made.metrics:
        print()
        print_table(("metric", "value"), [(n, describe.number(v)) for n, v in made.metrics.items()])
    if measured := card.read(run.path):
        print()
        print_table(("report card", "pairs", "value", "95 %"), card.table(measured))
    if made.data:
        rows = []
        for part in made.data:
            dropped = ", ".join(f"{count} {reason}" for reason, count in part.dropped.items())
            rows.append((part.source, part.split, str(part.rows), dropped or "0", part.fingerprint))
        print()
        print_table(("data", "split", "rows used", "dropped", "fingerprint"), rows)
    files = [(name, f"{file.size:,}", file.sha256) for name, file in made.files.items()]
    print()
    print_table(("file", "bytes", "sha256"), files)


@app.command()
def verify(
    reference: Annotated[str | None, typer.Argument(metavar="REF")] = None,
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
        print_json(
            {
                "reference": run.reference,
                "runs": [describe.ancestor_dict(each) for each in line],
                "used_by": users,
                "unreadable": blind,
            }
        )
        return
    print("\n".join(describe.tree(line)))
    print(f"\nused by{'' if users else ' no run'}")
    for user in users:
        print(f"  {describe.user_text(user)}")
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
        print_json(vars(found) | {"metrics": metrics, "same": found.same})
        return
    describe.print_comparison(found)


@app.command("eval")
def evaluate(
    references: Annotated[
        list[str], typer.Argument(metavar="REF", help="As in ppo/tiny, or ppo/tiny@step-10.")
    ],
    against: Annotated[str, typer.Option(metavar="REF", help="As in sft/tiny.")],
    judge: Annotated[
        str, typer.Option(help="gold, rm/NAME, FILE.py:function, or openai:MODEL.")
    ] = "gold",
    prompts: Annotated[int, typer.Option(help="How many, at most.")] = 200,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Rows with prompts; else the run's held-out ones."),
    ] = None,
    split: Annotated[str, typer.Option(help="Of the data: validation or test.")] = "validation",
    category: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="Of a row, to split by; else category or source."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling, and of the intervals.")] = 0,
    temperature: Annotated[float, typer.Option(help="Of the sampling.")] = 1.0,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Of an answer; else the run's.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Drawn at once; else the run's.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    judge_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Of an endpoint; else OPENAI_BASE_URL.")
    ] = None,
    judge_key_env: Annotated[
        str, typer.Option(metavar="NAME", help="The environment variable that holds its key.")
    ] = "OPENAI_API_KEY",
    judge_timeout: Annotated[float, typer.Option(help="Seconds for one reply.")] = 60.0,
    concurrency: Annotated[int, typer.Option(help="Questions to an endpoint at once.")] = 4,
    price_in: Annotated[float | None, typer.Option(help="Of a million tokens asked.")] = None,
    price_out: Annotated[float | None, typer.Option(help="Of a million tokens replied.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list on stdout.")] = False,
    runs_dir: RunsDir = None,
) -> None:
    """Let two policies answer the same held-out prompts, and a judge say whose are better."""
    from rlhf import eval_plan, head_to_head, outcomes
    from rlhf.console import Console

    registry, console = _registry(runs_dir), Console()
    options = eval_plan.Options(
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
    plan = eval_plan.prepare(registry, references, against, options)
    results = head_to_head.play(plan, console)
    outcomes.store_all(registry, results, console)  # first: who reads stdout may be gone
    if as_json:
        print_json_list(results)
    else:
        outcomes.show(results)


@app.command()
def report(
    references: Annotated[
        list[str], typer.Argument(metavar="REF", help="One: its whole line. Several: compared.")
    ],
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Else report.html: of one run in its folder, of several here."
        ),
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
    describe.print_items("would be removed" if dry_run else "removed", gone)
    describe.print_items("kept", [*found.keep, *left])
    for name in found.unreadable:
        print(
            f"{name}: what it started from cannot be read, so only leftovers go. Restore its "
            f"manifest.json, or remove it (rlhf rm {name}).",
            file=sys.stderr,
        )
    verb = "--dry-run: nothing was removed; it would be" if dry_run else "removed:"
    print(f"{verb} {describe.total(gone)}")


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
    print(f"{verb} {item.name}, {describe.bytes_text(item.bytes)}")


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
        list[str] | None, typer.Argument(metavar="REF", help="As in ppo/tiny.")
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
        print_table(
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
        print_table(("section", "panel", "shows", "against"), rows)
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
        print_json(found)
    else:
        libraries = [
            (one.name, one.installed or "missing", one.needs, one.tested or "", one.standing)
            for one in found.libraries
        ]
        print_table(("library", "installed", "allowed", "tested", ""), libraries)
        for note in found.notes:
            print(note)
        print()
        print_table(("this machine", ""), list(found.machine.items()))
        print()
        rules = [
            (rule["name"], rule["does"], rule["what"], rule["way_out"], "\n".join(rule["issues"]))
            for rule in found.rules
        ]
        print_table(("rule", "", "what is set", "way out", "public reports"), rules)
        print()
    if found.problems:
        raise ConfigError(" ".join(found.problems))
    if not as_json:
        print("Sound: nothing here would stop every run. Why each rule: docs/guards.md.")


def _registry(runs_dir: str | None) -> Registry:
    return Registry(runs_dir if runs_dir is not None else default_runs_dir())


if __name__ == "__main__":
    main()
