"""What this machine has, what the project needs, and what stages refuse: `rlhf doctor`."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import compatibility, guards, libraries, threads, wandb_run
from rlhf.methods.table import METHODS, Method

WANDB_URL = "https://api.wandb.ai"


@dataclass(frozen=True)
class Library:
    """One line of the table of libraries.

    Attributes:
        installed: its version; None where it is missing.
        needs: the versions that are allowed.
        tested: the version that the tests ran with; None where they ran without it.
        standing: how `installed` stands to both, in words of `libraries.standing`.
        fits: whether a stage can run with it.
        features: what here touches it, where it is newer than tested.
    """

    name: str
    installed: str | None
    needs: str
    tested: str | None
    standing: str
    fits: bool
    features: list[str]


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        problems: what would stop every run, and what to do; empty where nothing would.
        notes: what was not tested as it is here, and what that touches.
        libraries: python first, then those of pyproject.toml.
        machine: device, cores, threads, runs, W&B, in words.
        rules: the table of guards, in words.
    """

    problems: list[str]
    notes: list[str]
    libraries: list[Library]
    machine: dict[str, str]
    rules: list[dict[str, Any]]


def examine(runs_dir: str) -> Report:
    """Look at this machine. Imports torch, and writes nothing that stays."""
    found = _libraries()
    runs, unwritable = _runs(Path(runs_dir))
    device, broken = _device()
    machine = {
        "device": device,
        "cores": _cores(),
        "threads": _threads(),
        "runs": runs,
        "W&B": _wandb(),
    }
    misfits = _misfits(found)
    # A missing or a broken library has been named, and would be again, line after line.
    lines = [] if misfits or broken else compatibility.changed()
    changed = [compatibility.refusal(lines)] if lines else []
    problems = [*misfits, *broken, *changed, *unwritable]
    return Report(problems, _notes(found), found, machine, rules_in_words())


def _libraries() -> list[Library]:
    optional = libraries.needed("qlora") | libraries.needed("dashboard")
    needs = {"python": libraries.needed_python(), **libraries.needed(), **optional}
    return [_library(name, needs[name], optional=name in optional) for name in needs]


def _library(name: str, needs: str, *, optional: bool) -> Library:
    version = libraries.installed(name)
    tested = libraries.tested().get(name)
    standing = libraries.standing(version, needs, tested)
    if name == "python" and version is not None:
        tested = ", ".join(libraries.tested_pythons())
        standing = libraries.standing_of_python(version, needs)
    fits = optional if version is None else libraries.within(version, needs)
    features = compatibility.features(name) if standing == libraries.NEWER else []
    return Library(name, version, needs, tested, standing, fits, features)


def _notes(found: list[Library]) -> list[str]:
    notes = [
        f"{one.name} {one.installed} is newer than tested ({one.tested}); it touches: "
        f"{'; '.join(one.features) or 'nothing by itself'}."
        for one in found
        if one.standing == libraries.NEWER
    ]
    if notes:
        notes.append("`make setup` installs what was tested; docs/compatibility.md says what ran.")
    return notes


def _misfits(found: list[Library]) -> list[str]:
    wrong = {one.name: one.installed or "missing" for one in found if not one.fits}
    if not wrong:
        return []
    texts = guards.misfits(wrong, {one.name: one.needs for one in found})
    if "python" in wrong:
        return [f"[library-bounds] {texts['found']}. Make an environment with that python."]
    return [f"[library-bounds] {texts['found']}. Run `pip install {texts['wanted']}`."]


def _device() -> tuple[str, list[str]]:
    """The device in words, and what is wrong with it."""
    try:
        device = guards.device()
    except Exception as error:  # a broken build, a missing driver: a doctor says so
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return f"not known: {reason}", [f"torch cannot be used: {reason}. Install it again."]
    if device.gpus == 0:
        return "CPU (no CUDA device is seen): fp32; bf16 works and is slow", []
    dtypes = ["fp32", *(["bf16"] if device.bf16 else []), *(["fp16"] if device.fp16 else [])]
    return f"{device.gpus} x {device.name}: {', '.join(dtypes)}", []


def _cores() -> str:
    there = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there
    return f"{usable}" if usable == there else f"{usable} of {there} may be used"


def _threads() -> str:
    waiting = os.environ.get("OMP_WAIT_POLICY")
    each = threads.given() or threads.in_words()
    return f"{each}; OMP_WAIT_POLICY={waiting or 'PASSIVE, as stages set it'}"


def _runs(folder: Path) -> tuple[str, list[str]]:
    """Free disk in words, and whether no run could be written."""
    folder = folder.expanduser().absolute()
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free / 1e9
        with tempfile.TemporaryFile(dir=there):
            return f"{folder}: {free:.1f} GB free, can be written", []
    except OSError as error:
        said = f"cannot be written: {error.strerror}"
        way = "Name another folder with runs_dir= or RLHF_RUNS."
        return f"{folder}: {said}", [f"runs_dir={folder}: {said}. {way}"]


def _wandb() -> str:
    if mode := os.environ.get("WANDB_MODE"):
        return f"WANDB_MODE={mode}"
    if wandb_run.find_key(os.environ.get("WANDB_BASE_URL") or WANDB_URL) is None:
        return "no key at hand: offline (`wandb login` makes it online, tracking=off leaves it out)"
    return "a key is at hand: online"


# ---------------------------------------------------------------- the rules, in words


def rules_in_words() -> list[dict[str, Any]]:
    """The table of guards; what differs from run to run is left open as `...`."""
    return [
        {
            "name": rule.name,
            "does": "refuses" if rule.refuses else "notes",
            "when": "started" if rule.on_device else "composed",
            "what": _open(rule.what),
            "why": _open(rule.why),
            "way_out": _open(rule.way_out),
            "library": " ".join(rule.library or ()),
            "issues": list(rule.issues),
        }
        for rule in guards.RULES
    ]


def _open(text: str) -> str:
    return re.sub(r"\{[^}]*\}", "...", text)


HEAD = """\
# What is refused, and the way out

Made by `rlhf doctor --markdown > docs/guards.md` from the tables in `rlhf/guards.py` and
`rlhf/methods/table.py`. A rule is looked at when a stage is composed, before torch is imported; or,
where it says *started*, when a process knows its device, before a weight is loaded. A refusal is
one message and exit code 2; a note is printed, and the stage goes on. `...` stands for a value.
"""

METHOD_HEAD = """
## Methods

What each method allows; docs/methods.md says which to take. *Merges*: it is published as whole
weights; otherwise as a base and an adapter, and a run that starts from it goes on with the latter.
*Shares*: in PPO all roles can be adapters on one model. *PPO*: "after itself" where it changes the
model before anything is learnt, so that SFT and reward model must have been trained by it too.
*Recomputes*: `engine.checkpointing=true` is possible. *4 bits*: `method.quantization` is possible.
*New tokens*: a base learns tokens that it never saw, such as those of a chat template; the others
refuse a template that writes some. Adapters learn them in ZeRO stages 0 to 2.
`method-zero-stage` refuses the ZeRO stages that are not in a row; for adapters `zero3-adapter`
refuses stage 3 all the same, unless `engine.allow_zero3_adapters=true`.

| method | trains | from | merges | PPO | shares | recomputes | 4 bits | new tokens | ZeRO stages |
|---|---|---|---|---|---|---|---|---|---|
"""

REASONS_HEAD = """
## Why a method is refused in a stage

"""


def as_markdown() -> str:
    """docs/guards.md."""
    rules = map(_section, rules_in_words())
    rows = map(_method_row, METHODS.values())
    return "".join([HEAD, *rules, METHOD_HEAD, *rows, REASONS_HEAD, *_reasons()])


def _method_row(row: Method) -> str:
    ppo = "no" if row.ppo_reason else "yes" if row.neutral else "after itself"
    switches = (row.shares, row.checkpointing, row.quantization, row.new_tokens)
    flags = (
        "yes" if row.mergeable or not row.adapter else "no",
        ppo,
        *("yes" if flag else "no" for flag in switches),
        ", ".join(map(str, row.zero_stages)),
    )
    return f"| {' | '.join((f'`{row.name}`', row.title, row.paper, *flags))} |\n"


def _reasons() -> list[str]:
    """Each reason once, with the methods it is about."""
    about: dict[tuple[str, str], list[str]] = {}
    for row in METHODS.values():
        left = ", ".join(str(stage) for stage in range(4) if stage not in row.zero_stages)
        for where, reason in (
            ("reward model", row.rm_reason),
            ("PPO", row.ppo_reason),
            (f"ZeRO {left}", row.zero_reason if left else ""),
        ):
            if reason:
                about.setdefault((where, reason), []).append(f"`{row.name}`")
    lines = [f"{where}: {', '.join(who)}: {why}." for (where, why), who in about.items()]
    return [
        textwrap.fill(
            line, 100, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False
        )
        + "\n"
        for line in lines
    ]


def _section(rule: dict[str, Any]) -> str:
    about = f"{rule['does']}, {rule['when']}" + (f", {rule['library']}" if rule["library"] else "")
    lines = [f"`{rule['what']}` ({about})", rule["why"][0].upper() + rule["why"][1:]]
    lines.append(f"Way out: `{rule['way_out']}`")
    if rule["issues"]:
        lines.append(f"Public reports: {', '.join(map(_link, rule['issues']))}")
    text = "\n\n".join(textwrap.fill(line, 100, break_on_hyphens=False) for line in lines)
    return f"\n## {rule['name']}\n\n{text}\n"


def _link(issue: str) -> str:
    repository, number = issue.split("#")
    return f"[{issue}](https://github.com/{repository}/issues/{number})"
