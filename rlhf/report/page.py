"""A report as one HTML file: no network, at most 3 MB, whatever the runs hold.

Texts of models, data and settings are untrusted. The template escapes all of them, the page's
script never makes HTML of data, and a content security policy lets nothing run but the page's two
scripts, by their hashes, and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from rlhf import __version__
from rlhf.errors import ConfigError
from rlhf.manifest import now
from rlhf.registry import Registry, parse_reference
from rlhf.report import curves, panels, words
from rlhf.report.collect import Report, collect
from rlhf.report.panels import Panel

MOST_BYTES = 3_000_000
MOST_POINTS, LEAST_POINTS = 1500, 24  # of a line
MARKER = "<!-- written by rlhf report -->"
NAME = "report.html"
HERE = Path(__file__).parent


def usual_path(registry: Registry, references: list[str]) -> Path:
    """Where a report goes that was not told: one run's into its folder, others here."""
    if len(set(references)) > 1:
        return Path(NAME)
    wanted = parse_reference(references[0])
    return registry.folder(wanted.stage, wanted.run_name) / NAME


def write(registry: Registry, references: list[str], out: Path) -> int:
    """Write the report about runs to `out`; how many bytes it has.

    Raises:
        RegistryError: a run does not exist.
        ConfigError: `out` is something else, cannot be written, or would be too large.
    """
    if out.is_dir():
        raise ConfigError(f"{out}: is a folder. Name a file with --out, such as {out / NAME}.")
    if out.exists() and MARKER.encode() not in _start_of(out):
        raise ConfigError(f"{out}: is there, and is no report. Name another file with --out.")
    text = build(registry, references).encode()
    try:
        handle, name = tempfile.mkstemp(dir=out.parent, prefix=".report-")
        try:
            with open(handle, "wb") as file:
                file.write(text)
            os.chmod(name, 0o644)
            os.replace(name, out)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise ConfigError(
            f"{out}: cannot be written: {error.strerror}. Name another file with --out."
        ) from error
    return len(text)


def _start_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(200)
    except OSError:
        return b""


def build(registry: Registry, references: list[str]) -> str:
    """The report about runs: the whole line of one, several compared.

    Raises:
        RegistryError: a run does not exist.
        ConfigError: it would be too large with the least that makes sense.
    """
    report = collect(registry, references)
    parts = _Parts(report)
    points, text_bytes = min(MOST_POINTS, parts.longest), 600_000.0
    while True:
        html = parts.render(points, text_bytes)
        size = len(html.encode())
        if size <= MOST_BYTES:
            return html
        if points <= LEAST_POINTS:
            raise ConfigError(
                f"report: {len(report.shown)} runs with their curves need {size / 1e6:.1f} MB, and "
                f"a report has at most {MOST_BYTES / 1e6:.0f}. Name fewer runs."
            )
        room = max(MOST_BYTES - parts.fixed, MOST_BYTES / 10)
        points = max(LEAST_POINTS, int(points * min(0.9, room / (size - parts.fixed))))
        text_bytes *= 0.75


class _Parts:
    """All of a page that does not depend on how many points and texts fit."""

    def __init__(self, report: Report) -> None:
        import jinja2

        self.report = report
        self.place = {run.reference: place for place, run in enumerate(report.runs)}
        stages = dict.fromkeys(run.stage for run in report.shown)
        self.curves = {
            stage: panels.curves(report.shown, stage, self.place)
            for stage in stages
            if stage in panels.FIRST
        }
        self.kl = panels.against_kl(report.shown, self.place)
        cards = [run for run in report.runs if run.card is not None]
        self.cards: list[tuple[dict[str, Any], list[Panel]]] = [
            (
                words.card(run.card, run.reference),
                panels.of_card(run.card, f"card-{n}", self.place[run.reference]),
            )
            for n, run in enumerate(cards)
            if run.card is not None
        ]
        self.panels = [panel for found in self.curves.values() for panel in found]
        self.panels += [*self.kl, *(panel for _, found in self.cards for panel in found)]
        self.longest = max(
            (len(series.x) for panel in self.panels for series in panel.series), default=0
        )
        self.samples = words.samples(report, self.place)
        self.growth = words.over_training(report, self.place)
        found = [each for run in report.shown for each in run.evaluations]
        self.evaluations = [
            (words.evaluation(each, f"judged-{n}"), words.rows_as_groups(each.rows))
            for n, each in enumerate(found)
        ]
        self.library = curves.library()
        self.script = (HERE / "page.js").read_text(encoding="utf-8")
        self.css = (HERE / "page.css").read_text(encoding="utf-8")
        self.figure = json.dumps(curves.figure())
        self.fixed = len(self.library) + len(self.script) + len(self.css)
        self.template = jinja2.Environment(
            loader=jinja2.FileSystemLoader(HERE),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        ).get_template("page.html")
        self.context = {
            "title": report.title if len(report.title) < 120 else f"{len(report.shown)} runs",
            "warnings": words.warnings(report),
            "tree": words.tree(report),
            "differences": words.differences(report),
            "results": words.results(report, self.place),
            "knees": words.knees(report),
            "costs": words.costs(report),
            "finals": words.finals(report),
            "details": words.details(report),
            "sorts": words.SORTS,
            "toggles": [
                {"name": run.reference, "place": place} | curves.style(place)
                for run in report.shown
                for place in (self.place[run.reference],)
            ],
            "footer": f"rlhf {__version__}, {now()}",
        }

    def render(self, points: int, text_bytes: float) -> str:
        """The page with at most `points` a line and about `text_bytes` of answers."""
        from markupsafe import Markup

        every = self.panels
        cut = self.longest > points
        data = {
            "runs": [
                {"name": run.reference} | curves.style(place)
                for place, run in enumerate(self.report.runs)
            ],
            "figure": self.figure,
            "panels": [panels.pack(panel, points) for panel in every],
        }
        judged = []
        for each, groups in self.evaluations:
            kept = words.within(groups, text_bytes / 4 / len(self.evaluations))
            judged.append(each | {"groups": kept, "total": len(groups)})
        context = self.context | {
            "marker": Markup(MARKER),
            "css": Markup(self.css),
            "library": Markup(_script(self.library)),
            "script": Markup(_script(self.script)),
            "policy": _policy(self.library, self.script),
            "data": Markup(_json(data)),
            "thinned": (
                f"Longer lines are drawn with at most {points} points: least and greatest of each "
                "stretch, so that no peak is lost; metrics.jsonl has all of them."
                if cut
                else "Every point that was logged is drawn."
            ),
            "curves": [
                {
                    "stage": stage,
                    "first": [panel for panel in found if panel.first],
                    "more": [panel for panel in found if not panel.first],
                }
                for stage, found in self.curves.items()
                if found
            ],
            "kl": self.kl,
            "cards": [each | {"panels": found} for each, found in self.cards],
            "evaluations": judged,
            "samples": words.within(self.samples, text_bytes),
            "samples_total": len(self.samples),
            "growth": words.within(self.growth, text_bytes / 4),
            "growth_total": len(self.growth),
        }
        context["contents"] = [
            (key, name)
            for key, name, there in (
                ("warnings", "Warnings", context["warnings"]),
                ("lineage", "Lineage", True),
                ("differences", "What differs", context["differences"]),
                ("curves", "Curves", context["curves"]),
                ("kl", "Reward against KL", context["kl"]),
                ("cards", "Reward-model card", context["cards"]),
                ("evaluation", "Evaluation", context["results"] or context["evaluations"]),
                ("samples", "Samples", context["samples"]),
                ("growth", "Answers over training", context["growth"]),
                ("costs", "Time and memory", self.context["costs"]["rows"]),  # type: ignore[index]
                ("details", "Details", True),
            )
            if there
        ]
        return self.template.render(context).encode("utf-8", "replace").decode()


def _json(data: Any) -> str:
    """JSON that can stand in a <script>: no character of it can end the element."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _script(text: str) -> str:
    """Code of ours, which must not end its element either."""
    assert "</script" not in text.lower()
    assert "<!--" not in text
    return text


def _policy(*scripts: str) -> str:
    """A content security policy under which these scripts run, and nothing is fetched."""
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{each}'" for each in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "font-src data:; base-uri 'none'; form-action 'none'"
    )
