"""The offline report: what is read, what is kept of long curves, and that no text is code."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reported
from reported import HOSTILE, STEPS, publish
from test_overoptimisation import evaluation
from test_registry import CONFIG, no_waiting_for_the_disk, published, registry

from rlhf import compare
from rlhf.cli import main
from rlhf.errors import ConfigError, RegistryError
from rlhf.manifest import Parent, seal
from rlhf.overoptimisation import GOLD, Course
from rlhf.registry import Registry
from rlhf.report import files, page, panels, thin, words
from rlhf.report.collect import Report, Run, collect

__all__ = ["no_waiting_for_the_disk", "registry"]  # fixtures


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Runs with everything a report shows; not to be changed."""
    made = Registry(tmp_path_factory.mktemp("demo") / "runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        reported.build(made)
    return made


@pytest.fixture(scope="module")
def html(demo: Registry) -> str:
    return page.build(demo, ["ppo/a", "ppo/b", "ppo/open"])


class Page(HTMLParser):
    """A page as a browser cuts it into elements."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._within: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._within = [tag]
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._within = []

    def handle_data(self, data: str) -> None:
        if self._within == ["script"]:
            self.scripts[-1] += data
        else:
            self.texts.append(data)

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


def unpacked(text: str) -> list[float]:
    """What page.js makes of packed numbers, written down once more."""
    raw = base64.b64decode(text[1:])
    letter, size = {"u": ("H", 2), "i": ("i", 4), "f": ("f", 4), "d": ("d", 8)}[text[0]]
    return list(struct.unpack(f"<{len(raw) // size}{letter}", raw))


# ---------------------------------------------------------------- fewer points


@pytest.mark.parametrize("odd", [0.0, 0.01, 0.6])
@pytest.mark.parametrize(("n", "most"), [(10_000, 150), (10_001, 24), (997, 100), (31, 30)])
def test_every_buckets_extremes_survive(n: int, most: int, odd: float):
    noise = np.random.default_rng(n + most)
    values = noise.standard_normal(n).cumsum()
    values[noise.integers(0, n, 5)] += 1000  # lone peaks
    values[noise.random(n) < odd] = np.nan
    kept = thin.keep(values, most)
    assert len(kept) <= most
    assert list(kept) == sorted(set(kept))
    assert (kept[0], kept[-1]) == (0, n - 1)
    per_bucket = 2 if np.isfinite(values).all() else 3
    width = math.ceil(n / ((most - 2) // per_bucket))
    for start in range(0, n, width):
        bucket = [values[i] for i in range(start, min(start + width, n))]
        finite = [value for value in bucket if math.isfinite(value)]
        left = [values[i] for i in kept if start <= i < start + width]
        assert not finite or (min(finite) in left and max(finite) in left)
        assert any(math.isnan(value) for value in left) == (len(finite) < len(bucket))


def test_few_points_are_left_alone():
    values = np.array([3.0, np.nan, 1.0])
    assert list(thin.keep(values, 5)) == [0, 1, 2]
    assert list(thin.keep(np.array([]), 5)) == []


def test_a_lone_peak_of_ten_thousand_steps_is_in_the_page(registry: Registry):
    values = [math.sin(n / 500) for n in range(10_000)]
    values[7776] = 123456.0
    values[2000:2010] = [math.nan] * 9 + [math.inf]
    publish(registry, "ppo/long", curves={"objective/scores": values})
    (panel,) = Page(page.build(registry, ["ppo/long"])).data["panels"]
    (series,) = panel["series"]
    steps, drawn = unpacked(series["x"]), unpacked(series["y"])
    assert (7777, 123456.0) in zip(steps, drawn, strict=True)
    assert len(drawn) < 2000
    assert any(math.isnan(value) for value in drawn)  # a gap, and no infinity
    assert not any(math.isinf(value) for value in drawn)


def test_numbers_are_packed_as_they_are():
    def packed(*values: float) -> list[float]:
        return unpacked(panels._packed(np.array(values)))

    for values in ([0, 65535], [0, 65536], [-1, 2**31 - 1], [2.0**31, 0.0], [0.5, -0.25], [1e300]):
        assert packed(*values) == values
    assert panels._packed(np.array([1.0, 2.0]))[0] == "u"
    assert math.isnan(packed(0.5, math.inf)[1])


# ---------------------------------------------------------------- what is read


def test_metrics_with_odd_numbers_and_broken_lines(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        '{"step": 1, "a": 1.5, "b": "nan"}',
        '{"step": 1, "c": 7}',
        "not json",
        '{"a": 1}',
        "[1]",
        '{"step": 2, "a": "-inf", "b": "inf", "c": null}',
        '{"step": 3, "a": "words", "c": [1]}',
        '{"step": Infinity, "a": 3}',
        f'{{"step": 3, "d": {10**400}}}',
        '{"step": 4, "a": 2',
    ]
    path.write_text("\n".join(lines))
    problems: list[str] = []
    found = files.metrics(path, problems)
    assert problems == ["metrics.jsonl: lines that cannot be read: 4, first line 3"]
    assert list(found["a"].steps) == [1, 2, 3]
    np.testing.assert_equal(found["a"].values, [1.5, -np.inf, np.nan])
    np.testing.assert_equal(found["b"].values, [np.nan, np.inf])
    np.testing.assert_equal(found["c"].values, [7, np.nan, np.nan])
    np.testing.assert_equal(found["d"].values, [np.nan])


GARBAGE = (
    "",
    "{",
    "[]",
    "3",
    '"x"',
    "null",
    "{}",
    '{"verdict": []}',
    "[" * 100_000,
    f'{{"step": {10**400}}}',
)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_damaged_files_are_told_and_end_nothing(registry: Registry, garbage: str):
    sft = published(registry)
    run = publish(registry, "ppo/x", {"policy": sft}, curves={"objective/kl": [1.0, 2.0]})
    names = ["card.json", "eval/x.json", "overoptimisation.json", "samples_log.jsonl"]
    (run.path / "eval").mkdir()
    for name in names:
        (run.path / name).write_text(garbage)
    report = collect(registry, ["ppo/x"])
    told = " ".join(report.runs[-1].problems)
    for name in ("card.json", "x.json"):
        assert name in told
    assert "objective/kl" in page.build(registry, ["ppo/x"])


@pytest.mark.parametrize("where", ["accuracy", "baselines", "slices", "calibration", "margins"])
@pytest.mark.parametrize("wrong", [3, "x", [], [3], {"x": 3}, [None]])
def test_a_card_with_a_wrong_part_is_left_out_or_shown_without_it(
    registry: Registry, where: str, wrong: Any
):
    publish(registry, "rm/x", files={"card.json": reported.card() | {where: wrong}})
    html = page.build(registry, ["rm/x"])
    assert "Reward-model card" in html or "card.json: is not what it should be" in html


def test_numbers_that_are_none_are_warned_of(demo: Registry):
    (run,) = [run for run in collect(demo, ["ppo/open"]).runs if run.reference == "ppo/open"]
    assert run.state == "unfinished"
    assert run.problems == ["metrics.jsonl: lines that cannot be read: 1, first line 121"]
    assert run.warnings == [
        "objective/scores is nan at step 51, and no finite number at 10 steps in all",
        "policy/approxkl is inf at step 31",
        f"loss/value is nan at step 1, and no finite number at {STEPS} steps in all",
    ]
    assert "loss/value" not in run.metrics  # of an unfinished run the latest number
    assert run.metrics["eval/score"] == pytest.approx(1.9)


def test_one_run_is_shown_with_its_line_and_several_by_themselves(demo: Registry):
    one = collect(demo, ["ppo/a"])
    assert [run.reference for run in one.runs] == ["sft/demo", "rm/demo", "ppo/a"]
    assert one.shown == one.runs
    both = collect(demo, ["ppo/b", "ppo/a", "ppo/b"])
    assert [run.reference for run in both.shown] == ["ppo/b", "ppo/a"]
    assert {run.reference for run in both.runs} == {"sft/demo", "rm/demo", "ppo/a", "ppo/b"}
    rm = next(run for run in both.runs if run.stage == "rm")
    assert rm.card is not None  # what compared runs came from is told, not drawn
    assert not rm.curves


def test_an_unfinished_run_has_the_line_that_its_settings_name(demo: Registry):
    report = collect(demo, ["ppo/open"])
    assert [run.reference for run in report.runs] == ["sft/demo", "rm/demo", "ppo/open"]
    links = [(link.role, link.reference, link.state) for link in report.runs[-1].parents]
    assert links == [("policy", "sft/demo", "sound"), ("reward_model", "rm/demo", "sound")]
    assert report.runs[-1].config == {
        "policy_from": "sft/demo",
        "rm_from": "rm/demo",
        "seed": 3,
    }


def test_unfinished_runs_that_name_each_other_are_shown_once(registry: Registry):
    for one, other in (("a", "b"), ("b", "a")):
        folder = registry.runs_dir / "ppo" / one
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(f"stage: ppo\npolicy_from: ppo/{other}\n")
    assert [run.reference for run in collect(registry, ["ppo/a"]).runs] == ["ppo/b", "ppo/a"]


def test_parents_that_are_missing_changed_or_damaged_are_told(registry: Registry):
    sft = published(registry)
    rm = publish(registry, "rm/x", {"policy": sft})
    publish(registry, "ppo/x", {"policy": sft, "reward_model": rm})
    published(registry, overwrite=True, metrics={"eval/loss": 9.0})
    shutil.rmtree(rm.path)
    report = collect(registry, ["ppo/x"])
    assert {run.reference: run.state for run in report.runs} == {
        "sft/tiny": "finished",
        "rm/x": "missing",
        "ppo/x": "finished",
    }
    assert report.runs[-1].warnings == [
        "policy sft/tiny was changed since this run started from it",
        "reward_model rm/x is missing",
    ]
    (registry.runs_dir / "ppo/x/manifest.json").write_text("{}")
    assert collect(registry, ["ppo/x"]).runs[-1].state == "damaged"
    assert "damaged" in page.build(registry, ["ppo/x"])


def test_a_run_that_was_over_optimised_says_so_once(registry: Registry):
    """By what the stage writes: the same words in the manifest and beside it."""
    course = Course(GOLD)
    for n, gold in enumerate([0, 1.0, 0.5]):
        now = evaluation(10 * n, n, gold)
        course.see(now)
    run = publish(registry, "ppo/over", warnings=course.said())
    (run.path / "overoptimisation.json").write_text(course.text())
    (shown,) = [run for run in collect(registry, ["ppo/over"]).runs if run.stage == "ppo"]
    assert shown.warnings == course.said()
    assert shown.warnings[0].startswith("over-optimised (step 20): since step 10 the held-out")
    assert shown.over is not None
    assert shown.over.knee == (10, 5.0)  # step, nats
    # Without a manifest, as while it runs, the file alone says it.
    (run.path / "manifest.json").unlink()
    (shown,) = collect(registry, ["ppo/over"]).runs
    assert shown.warnings == course.said()


def test_a_run_of_nothing_but_a_folder_has_a_page(registry: Registry):
    (registry.runs_dir / "rm" / "empty").mkdir(parents=True)
    html = page.build(registry, ["rm/empty"])
    assert "unfinished" in html
    assert Page(html).data["panels"] == []


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        ("ppo/none", "no such run"),
        ("ppo/../x", "not a reference"),
        ("sft/tiny@best", "about runs, not checkpoints"),
    ],
)
def test_what_is_no_run_is_refused(registry: Registry, reference: str, why: str):
    published(registry)
    with pytest.raises(RegistryError, match=why):
        collect(registry, ["sft/tiny", reference])


def test_differences_are_those_that_diff_tells(registry: Registry):
    sft = published(registry)
    for name, seed in (("a", 0), ("b", 1)):
        publish(registry, f"ppo/{name}", {"policy": sft}, config={"seed": seed, "run_name": name})
    found = compare.compare(registry, "ppo/a", "ppo/b")
    expected = {
        (part, d.name, str(d.left), str(d.right), d.matters)
        for part in compare.PARTS
        for d in getattr(found, part)
    }
    shown = collect(registry, ["ppo/a", "ppo/b"]).differences["ppo"]
    assert {(d.part, d.name, *map(str, d.values), d.matters) for d in shown} == expected
    assert ("config", "seed", "0", "1", True) in expected
    assert shown[0].matters >= shown[-1].matters


# ---------------------------------------------------------------- what is shown


def test_gold_and_score_stand_against_the_root_of_kl(demo: Registry):
    report = collect(demo, ["ppo/a"])
    place = {run.reference: n for n, run in enumerate(report.runs)}
    score, gold, train = panels.against_kl(report.shown, place)
    assert list(score.series[0].x) == pytest.approx([math.sqrt(1.2 * n) for n in range(1, 11)])
    assert list(gold.series[0].y) == pytest.approx(
        [0.45 + 0.07 * n * (1.1 - n / 10) for n in range(1, 11)]
    )
    assert score.knees == gold.knees == [(2, pytest.approx(math.sqrt(6.6)))]
    assert len(train.series[0].x) == STEPS
    # Without the monitor's file the evaluations in metrics.jsonl say the same.
    report.runs[-1].over = None
    plain = panels.against_kl(report.shown, place)
    assert list(plain[1].series[0].x) == pytest.approx(list(gold.series[0].x))
    assert list(plain[1].series[0].low) == pytest.approx(list(gold.series[0].low))
    assert plain[1].knees == []


def test_a_second_reward_model_is_not_called_gold(registry: Registry):
    """From the monitor's file, and from the evaluations where that is missing."""
    numbers = {"eval/kl": [1.0, 4.0], "eval/score": [1.0, 2.0], "eval/second": [0.5, 0.25]}
    watched = reported.over_optimisation(1.0) | {"measure": "second reward model"}
    publish(registry, "ppo/x", curves=numbers, files={"overoptimisation.json": watched})
    (run,) = collect(registry, ["ppo/x"]).shown
    for over in (run.over, None):
        run.over = over
        found = panels.against_kl([run], {"ppo/x": 0})
        assert [panel.key for panel in found] == ["kl-score", "kl-second"]
        assert "gold" not in f"{found[1].title} {found[1].about} {found[1].y_label}"
    assert list(found[1].series[0].y) == [0.5, 0.25]
    assert "gold" not in page.build(registry, ["ppo/x"]).split('id="kl"')[1].split("</section>")[0]


def test_intervals_are_drawn_with_their_metric_and_not_as_curves(demo: Registry):
    report = collect(demo, ["ppo/a"])
    place = {run.reference: n for n, run in enumerate(report.runs)}
    found = panels.curves(report.shown, "ppo", place)
    names = [panel.title for panel in found]
    assert names[:4] == ["objective/scores", "objective/kl", "eval/score", "eval/gold"]
    assert not [name for name in names if name.endswith(("_ci_low", "_ci_high"))]
    gold = found[3].series[0]
    assert gold.low is not None
    assert list(gold.y - gold.low) == pytest.approx([0.03] * 10)
    assert list(gold.x) == list(range(12, 121, 12))
    assert [panel.title for panel in found if not panel.first][:1] == ["loss/value"]


def test_the_terms_of_a_sum_have_plots_beside_the_score(registry: Registry):
    numbers = {
        f"objective/{name}": [1.0, 2.0]
        for name in ("scores/rm", "kl", "entropy_of_none", "scores", "scores/brief")
    }
    publish(registry, "ppo/x", curves=numbers)
    found = panels.curves(collect(registry, ["ppo/x"]).shown, "ppo", {"ppo/x": 0})
    assert [(panel.title, panel.first) for panel in found] == [
        ("objective/scores", True),
        ("objective/scores/brief", True),
        ("objective/scores/rm", True),
        ("objective/kl", True),
        ("objective/entropy_of_none", False),
    ]
    assert found[1].about == "mean of the reward's term brief, before its weight"
    assert found[1].y_label == "score"


def test_a_step_without_an_interval_borrows_none():
    steps = np.array([1, 2, 3, 4])
    curve = files.Curve(np.array([2, 2, 4]), np.array([0.1, 0.2, 0.4]))
    found = panels._at(steps, curve)  # of two at one step the last
    np.testing.assert_equal(found, [np.nan, 0.2, np.nan, 0.4])


def test_samples_of_several_runs_are_joined_by_prompt(demo: Registry):
    report = collect(demo, ["ppo/a", "ppo/b"])
    place = {run.reference: n for n, run in enumerate(report.runs)}
    groups = words.samples(report, place)
    assert len(groups) == 12
    assert [answer["whose"] for answer in groups[0].answers] == ["sft/demo", "ppo/a", "ppo/b"]
    rows = [run.samples[7].answers for run in report.shown]
    gains = [ppo[2]["score"] - sft[2]["score"] for sft, ppo in rows]
    assert groups[7].sort["gain"] == pytest.approx(sum(gains), abs=1e-5)
    assert "cut off by the limit" in groups[5].answers[1]["measures"]


def test_the_same_prompt_twice_is_two_samples(registry: Registry):
    rows = [{"prompt": "p", "sft": "s", "ppo": f"answer {n}"} for n in range(2)]
    publish(registry, "ppo/x", samples=rows)
    report = collect(registry, ["ppo/x"])
    assert len(words.samples(report, {"ppo/x": 0})) == 2


def test_rails_join_each_run_with_its_parents(demo: Registry):
    sft, rm, a, b = words.tree(collect(demo, ["ppo/a", "ppo/b"]))
    # Two lanes: of sft from its line to the last child's, of rm from its own.
    assert sft["rails"] == [" down turn", " across"]
    assert rm["rails"] == [" down turn up", " across down"]
    assert a["rails"] == [" down turn up", " across down up"]
    assert b["rails"] == [" turn up", " across up"]
    assert rm["verdict"] == "caution"


def test_bars_lie_on_one_scale():
    rows = [("a", files.Interval(0.5, 0.25, 0.75), None, ""), ("b", files.Interval(None), None, "")]
    a, b = words.scaled(rows)
    assert (a["low"], a["at"], a["high"], a["half"]) == (25.0, 50.0, 75.0, 50.0)
    assert (b["at"], b["text"]) == (None, "not measured")
    (wide,) = words.scaled([("c", files.Interval(3.0, -1.0, 3.0), None, "")])
    assert (wide["low"], wide["at"]) == (0.0, 100.0)


def test_one_final_score_does_not_fill_its_own_line():
    run = Run("ppo/x", "ppo", "unfinished")
    ends = {"eval/score": 3.0, "eval/score_ci_low": 2.5, "eval/score_ci_high": 4.0}
    run.curves = {n: files.Curve(np.array([1]), np.array([v])) for n, v in ends.items()}
    (block,) = words.results(Report("x", [run], [run], {}), {"ppo/x": 0})
    (bar,) = block["rows"]
    assert (bar["low"], bar["at"], bar["high"]) == (62.5, 75.0, 100.0)
    assert block["about"].endswith("; the line goes from 0 to 4")


# ---------------------------------------------------------------- texts are no code


def test_no_text_becomes_markup(html: str):
    found = Page(html)
    assert HOSTILE not in html
    assert sum(HOSTILE in text for text in found.texts) >= 5  # but all of it is there to be read
    assert [tag for tag, _ in found.elements].count("script") == 3
    assert not [tag for tag, _ in found.elements if tag in ("img", "iframe", "link", "object")]
    for tag, attributes in found.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith("#"), tag


def test_only_the_pages_own_scripts_may_run(html: str):
    found = Page(html)
    policy = next(
        a["content"] for _, a in found.elements if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    hashes = [
        base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in found.scripts[1:]
    ]
    assert rules["default-src"] == "'none'"
    assert rules["script-src"].split() == [f"'sha256-{each}'" for each in hashes]
    assert "http" not in policy


def test_a_name_in_the_data_cannot_end_its_element(registry: Registry):
    publish(registry, "ppo/x", curves={HOSTILE: [1.0, 2.0], "<!--<script>": [1.0, 2.0]})
    found = Page(page.build(registry, ["ppo/x"]))
    assert len(found.scripts) == 3
    assert HOSTILE in "".join(found.texts)
    data = {"name": f"<!-- {HOSTILE} &lt; \u2028"}
    text = page._json(data)
    assert not set(text) & set("<>&\u2028")
    assert json.loads(text) == data


def test_half_a_surrogate_pair_is_a_question_mark(registry: Registry, tmp_path: Path):
    rows = reported.samples(0, 2)
    rows[0]["ppo"] = rows[1]["prompt"] = "half \ud800 a pair"
    publish(registry, "ppo/x", samples=rows)
    page.write(registry, ["ppo/x"], tmp_path / "x.html")
    assert (tmp_path / "x.html").read_text(encoding="utf-8").count("half ? a pair") == 2


def test_a_parent_outside_of_the_registry_is_not_read(registry: Registry, tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "card.json").write_text(json.dumps(reported.card() | {"reasons": ["a secret"]}))
    run = publish(registry, "ppo/x")
    parents = [Parent("policy", up + str(outside)[1:], "0" * 64) for up in ("", "../")]
    (run.path / "manifest.json").write_text(seal(replace(run.manifest, parents=parents)))
    html = page.build(registry, ["ppo/x"])
    assert "a secret" not in html
    assert "is damaged" in html


def test_settings_nested_without_end_are_told(registry: Registry):
    (registry.runs_dir / "ppo/x").mkdir(parents=True)
    (registry.runs_dir / "ppo/x/config.yaml").write_text("[" * 20_000)
    (run,) = collect(registry, ["ppo/x"]).runs
    assert run.problems == ["config.yaml: cannot be read (RecursionError)"]


# ---------------------------------------------------------------- size, and where it goes


def test_it_is_made_to_fit(demo: Registry, html: str, monkeypatch: pytest.MonkeyPatch):
    assert len(html.encode()) < page.MOST_BYTES == 3_000_000
    least = len(html.encode()) - 15_000
    monkeypatch.setattr(page, "MOST_BYTES", least)
    smaller = page.build(demo, ["ppo/a", "ppo/b", "ppo/open"])
    assert len(smaller.encode()) <= least
    assert len(Page(smaller).data["panels"]) == len(Page(html).data["panels"])
    monkeypatch.setattr(page, "MOST_BYTES", 1_000_000)
    with pytest.raises(ConfigError, match=r"3 runs with their curves need .* Name fewer runs"):
        page.build(demo, ["ppo/a", "ppo/b", "ppo/open"])


def test_samples_that_do_not_fit_are_counted(registry: Registry):
    rows = reported.samples(0, 2000)
    for row in rows:
        row["ppo"] = "word " * 100
    publish(registry, "ppo/x", samples=rows)
    html = page.build(registry, ["ppo/x"])
    assert len(html.encode()) < page.MOST_BYTES
    (note,) = [text for text in Page(html).texts if "to keep this file small" in text]
    assert " of 2000, " in note


def test_texts_are_counted_as_the_page_has_them(registry: Registry):
    rows = reported.samples(0, 300)
    for row in rows:
        row["ppo"] = "'" * 5000  # five bytes each
        row["prompt"] += " " * 1_000_000  # which is cut
    publish(registry, "ppo/x", samples=rows[:30])
    publish(registry, "ppo/y", samples=[row | {"prompt": "p"} for row in rows])
    publish(registry, "ppo/z", config={"reward.note": "<" * 1_000_000})
    for reference in ("ppo/x", "ppo/y"):
        html = page.build(registry, [reference])
        assert len(html.encode()) < page.MOST_BYTES
        assert "&#39;" * 5000 in html
    assert "(cut; 1,000,000 characters in all)" in page.build(registry, ["ppo/z"])


def test_only_a_report_is_replaced(demo: Registry, tmp_path: Path):
    out = tmp_path / "r.html"
    out.write_text("a thesis")
    with pytest.raises(ConfigError, match="is no report"):
        page.write(demo, ["sft/demo"], out)
    assert out.read_text() == "a thesis"
    with pytest.raises(ConfigError, match="is a folder"):
        page.write(demo, ["sft/demo"], tmp_path)
    with pytest.raises(ConfigError, match="cannot be written"):
        page.write(demo, ["sft/demo"], tmp_path / "no" / "r.html")
    out.unlink()
    for _ in range(2):
        page.write(demo, ["sft/demo"], out)
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_a_full_disk_leaves_no_half_file(demo: Registry, tmp_path: Path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ConfigError, match="cannot be written: File too large"):
            page.write(demo, ["sft/demo"], tmp_path / "r.html")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def rlhf_report(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rlhf", "report", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_command(registry: Registry, tmp_path: Path, monkeypatch, capsys):
    for name in "ab":
        publish(registry, f"sft/{name}", curves={"train/loss": [2.0, 1.0]})
    monkeypatch.setenv("RLHF_RUNS", str(registry.runs_dir))
    monkeypatch.chdir(tmp_path)
    assert rlhf_report(monkeypatch, "sft/a") == 0
    own = registry.runs_dir / "sft/a/report.html"
    assert capsys.readouterr().out == f"{own}: {own.stat().st_size:,} bytes\n"
    assert rlhf_report(monkeypatch, "sft/a", "sft/b") == 0
    assert "sft/b" in (tmp_path / "report.html").read_text()
    assert rlhf_report(monkeypatch, "sft/a", "--out", "x.html") == 0
    assert (tmp_path / "x.html").exists()
    capsys.readouterr()
    assert rlhf_report(monkeypatch, "sft/a", "sft/none") == 2
    assert capsys.readouterr().err.startswith("refused: sft/none: no such run")
    assert registry.verify("sft/a") == []


def test_neither_torch_nor_bokeh_where_they_are_not_needed(registry: Registry):
    publish(registry, "sft/a", curves={"train/loss": [2.0, 1.0]})
    code = (
        "import sys; from pathlib import Path; import rlhf.cli; from rlhf.registry import Registry;"
        "from rlhf.report import collect; assert 'bokeh' not in sys.modules;"
        "from rlhf.report import page; page.write(Registry(sys.argv[1]), ['sft/a'], Path('r'));"
        "assert 'torch' not in sys.modules; assert 'wandb' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(registry.runs_dir.resolve())]
    subprocess.run(command, check=True, cwd=registry.runs_dir, timeout=900)


def test_settings_are_as_in_a_command():
    assert CONFIG["train"]["max_steps"] is None
    assert [words.setting(v) for v in (None, 1e-4, "x", ["a", 1])] == [
        "null", "0.0001", "x", '["a", 1]',
    ]  # fmt: skip
    assert words.setting("a" * 64) == "a" * 12
