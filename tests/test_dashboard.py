"""The W&B workspace: its definition against our list of metrics, and against W&B's own model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from rlhf import cli, dashboard, wandb_run
from rlhf.errors import ConfigError
from rlhf.metrics import METRICS


@pytest.fixture(scope="module")
def spec() -> dict:
    """What W&B would be given, as JSON."""
    text = CliRunner().invoke(cli.app, ["dashboard", "--json", "--entity", "team"]).stdout
    return json.loads(text)


def sections(spec: dict) -> dict[str, list[dict]]:
    found = spec["spec"]["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in found}


def lines(spec: dict, section: str) -> set[tuple[str, str]]:
    """(x, y) of the line plots of a section."""
    plots = [
        p["config"] for p in sections(spec)[section] if p["viewType"] == "Run History Line Plot"
    ]
    return {(plot["xAxis"], y) for plot in plots for y in plot["metrics"]}


def test_every_name_is_a_metric():
    for panel in dashboard.PANELS:
        names = {*panel.y, panel.x} - {"step", "samples"}
        assert names <= METRICS.keys(), panel
    for column in dashboard.COLUMNS:
        kind, name = column.split(":")
        assert kind in ("run", "config") or name in METRICS


def test_what_comparisons_are_made_for_is_there(spec):
    assert (spec["entity"], spec["project"], spec["displayName"]) == ("team", "rlhf", "RLHF")
    assert lines(spec, "Reward against KL") == {
        ("eval/kl", "eval/score"),
        ("objective/kl", "objective/scores"),
    }
    assert {("eval/kl", "eval/gold"), ("eval/score", "eval/gold")} <= lines(
        spec, "Gold against proxy"
    )
    assert ("step", "eval/win_rate") in lines(spec, "Win rates")
    assert ("step", "perf/peak_memory_gb") in lines(spec, "Speed and memory")
    assert {"SFT", "Reward model", "PPO: objective", "PPO: policy"} <= sections(spec).keys()


def test_each_panel_is_in_the_definition_with_its_unit(spec):
    found = [panel for panels in sections(spec).values() for panel in panels]
    assert len(found) == len(dashboard.PANELS)
    by_title = {p["config"].get("chartTitle"): p for p in found}
    accuracy = by_title["held-out accuracy"]["config"]
    assert accuracy["metrics"] == ["eval/accuracy", "eval/accuracy_longer"]
    assert accuracy["yAxisTitle"] == "fraction"
    scatter = by_title["published runs: gold and score"]["config"]
    assert (scatter["xAxis"], scatter["yAxis"]) == ("summary:eval/score", "summary:eval/gold")
    assert by_title["published runs: wins over SFT"]["viewType"] == "Bar Chart"
    assert any(p["viewType"] == "Weave" for p in found)  # the table of samples


def test_the_definition_is_read_back_by_the_library(spec):
    """What it cannot read it would not show either."""
    from wandb_workspaces.workspaces import Workspace

    made = dashboard.workspace("rlhf", "team", "RLHF")
    again = Workspace._from_model(made._to_model())
    assert [section.name for section in again.sections] == list(sections(spec))
    assert [len(s.panels) for s in again.sections] == [len(p) for p in sections(spec).values()]


def test_dry_run_lists_the_panels():
    result = CliRunner().invoke(cli.app, ["dashboard", "--dry-run"])
    assert result.exit_code == 0
    assert result.stdout.count("\n") > len(dashboard.PANELS)
    assert "held-out score against KL" in result.stdout


def test_without_a_key_it_is_refused(monkeypatch):
    monkeypatch.setattr(wandb_run, "account", lambda: ("https://api.wandb.ai", None))
    with pytest.raises(ConfigError, match=r"no W&B key.*wandb login.*--dry-run"):
        dashboard.save("rlhf", None, "RLHF")


def test_without_the_extra_it_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(ConfigError, match=r"not installed.*rlhf\[dashboard\]"):
        dashboard.save("rlhf", None, "RLHF")


def test_what_wandb_refuses_is_no_traceback(monkeypatch):
    from wandb_workspaces.workspaces import Workspace

    saved = []

    def save(self: Workspace) -> None:
        saved.append((self.entity, self.project, self.name))
        raise ValueError("project not found\nand more")

    monkeypatch.setattr(wandb_run, "account", lambda: ("https://api.wandb.ai", "key"))
    monkeypatch.setattr(wandb_run, "default_entity", lambda key: "me")
    monkeypatch.setattr(Workspace, "save", save)
    with pytest.raises(ConfigError, match=r"project not found\).*--project=mine"):
        dashboard.save("mine", None, "RLHF")
    assert saved == [("me", "mine", "RLHF")]


def test_the_list_of_panels_needs_no_library():
    code = (
        "import sys, rlhf.dashboard; print({'wandb', 'torch', 'wandb_workspaces'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
