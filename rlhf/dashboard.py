"""`rlhf dashboard`: a saved W&B workspace that compares runs; its definition is `PANELS`.

The only file that imports wandb_workspaces (the extra `dashboard`), in the functions that need it.
Names are those of `metrics.METRICS`, and so are units.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from rlhf import wandb_run
from rlhf.errors import ConfigError
from rlhf.metrics import METRICS

# The columns of the table of runs, beside their names.
COLUMNS = (
    "run:group",
    "run:job_type",
    "config:ppo.kl_coef",
    "summary:eval/score",
    "summary:eval/gold",
    "summary:eval/kl",
    "summary:eval/win_rate",
    "summary:eval/accuracy",
    "summary:time/total",
)


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        y: names of METRICS; of a table its name.
        x: "step", or a name of METRICS.
        kind: "line" (over training), "scatter" (a point for each run), "bar" (a bar for each run)
            or "table".
    """

    section: str
    title: str
    y: tuple[str, ...]
    x: str = "step"
    kind: str = "line"

    @property
    def unit(self) -> str:
        """Of what is shown; "" where it is several."""
        units = {METRICS[name].unit for name in self.y if name in METRICS}
        return units.pop() if len(units) == 1 else ""


def with_interval(name: str) -> tuple[str, ...]:
    """A number and both ends of its 95 % interval."""
    return (name, f"{name}_ci_low", f"{name}_ci_high")


def _line(section: str, title: str, *y: str, x: str = "step") -> Panel:
    return Panel(section, title, y, x)


REWARD, GOLD, WINS = "Reward against KL", "Gold against proxy", "Win rates"
SFT, RM = "SFT", "Reward model"
OBJECTIVE, POLICY, CRITIC = "PPO: objective", "PPO: policy", "PPO: critic"
ANSWERS, COST = "PPO: answers", "Speed and memory"

# Sections and panels in reading order; what every comparison begins with comes first.
PANELS: tuple[Panel, ...] = (
    _line(REWARD, "held-out score against KL", "eval/score", x="eval/kl"),
    _line(REWARD, "score of rollouts against KL", "objective/scores", x="objective/kl"),
    Panel(REWARD, "published runs: score and KL", ("eval/score",), "eval/kl", "scatter"),
    _line(GOLD, "gold against KL", "eval/gold", x="eval/kl"),
    _line(GOLD, "second reward model against KL", "eval/second", x="eval/kl"),
    _line(GOLD, "gold against the score that is trained on", "eval/gold", x="eval/score"),
    _line(GOLD, "held-out gold, 95 % interval", *with_interval("eval/gold")),
    _line(GOLD, "held-out score, 95 % interval", *with_interval("eval/score")),
    Panel(GOLD, "published runs: gold and score", ("eval/gold",), "eval/score", "scatter"),
    _line(WINS, "wins over SFT by gold, 95 % interval", *with_interval("eval/win_rate")),
    Panel(WINS, "published runs: wins over SFT", ("eval/win_rate",), kind="bar"),
    _line(SFT, "training loss (RM: per pair)", "train/loss"),
    _line(SFT, "held-out loss (RM: per pair)", "eval/loss"),
    _line(SFT, "learning rate", "train/learning_rate"),
    _line(SFT, "gradient norm", "train/grad_norm"),
    _line(RM, "held-out accuracy", "eval/accuracy", "eval/accuracy_longer"),
    _line(RM, "training accuracy", "train/accuracy"),
    _line(RM, "margin: chosen - rejected score", "train/margin", "eval/margin"),
    Panel(RM, "published runs: accuracy", ("eval/accuracy",), kind="bar"),
    _line(OBJECTIVE, "score of rollouts", "objective/scores"),
    _line(OBJECTIVE, "score by answers sampled", "objective/scores", x="episode"),
    _line(OBJECTIVE, "score less the price of KL", "objective/rlhf_reward"),
    _line(OBJECTIVE, "KL to the reference", "objective/kl", "eval/kl"),
    _line(OBJECTIVE, "price of KL", "objective/kl_coef"),
    _line(OBJECTIVE, "entropy", "objective/entropy"),
    _line(POLICY, "approximate KL of an update", "policy/approxkl"),
    _line(POLICY, "tokens clipped", "policy/clipfrac"),
    _line(POLICY, "probability ratio", "policy/ratio"),
    _line(POLICY, "policy loss", "loss/policy"),
    _line(POLICY, "gradient norm", "policy/grad_norm"),
    _line(CRITIC, "explained variance", "val/explained_variance"),
    _line(CRITIC, "value loss", "loss/value"),
    _line(CRITIC, "gradient norm", "val/grad_norm"),
    _line(ANSWERS, "length", "response/length"),
    _line(ANSWERS, "share that ends", "response/eos_rate"),
    _line(ANSWERS, "distinct bigrams", "response/distinct"),
    Panel(ANSWERS, "samples of every evaluation", ("samples",), kind="table"),
    _line(COST, "tokens per second", "perf/tokens_per_second"),
    _line(COST, "peak memory", "perf/peak_memory_gb"),
    _line(COST, "seconds of a step", "time/rollout", "time/score", "time/update"),
    _line(COST, "score by wall time", "objective/scores", x="time/total"),
)


def workspace(project: str, entity: str, name: str) -> Any:
    """The workspace as wandb_workspaces has it; nothing is asked of W&B.

    Raises:
        ConfigError: wandb_workspaces is not installed.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"dashboard: {error.name} is not installed. `pip install 'rlhf[dashboard]'`, or "
            "`pip install wandb-workspaces`; `rlhf report` needs neither that nor a network."
        ) from error

    def plot(panel: Panel) -> Any:
        if panel.kind == "table":
            return wr.WeavePanelSummaryTable(table_name=panel.y[0])
        if panel.kind == "scatter":
            return wr.ScatterPlot(title=panel.title, x=panel.x, y=panel.y[0])
        if panel.kind == "bar":
            return wr.BarPlot(title=panel.title, metrics=list(panel.y), title_x=panel.unit)
        return wr.LinePlot(
            title=panel.title,
            x=panel.x,
            y=list(panel.y),
            title_x=panel.x,
            title_y=panel.unit,
        )

    sections = dict.fromkeys(panel.section for panel in PANELS)
    opened = (REWARD, GOLD, WINS)
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            ws.Section(
                name=section,
                panels=[plot(panel) for panel in PANELS if panel.section == section],
                is_open=section in opened,
            )
            for section in sections
        ],
        settings=ws.WorkspaceSettings(x_axis="step", max_runs=20),
        runset_settings=ws.RunsetSettings(pinned_columns=list(COLUMNS)),
    )


def as_json(project: str, entity: str | None, name: str) -> str:
    """The definition that W&B would be given."""
    made = workspace(project, entity or "", name)
    return str(made._to_model().model_dump_json(by_alias=True, indent=1))


def save(project: str, entity: str | None, name: str) -> str:
    """Save it, as a new view of the project; returns where it is.

    Raises:
        ConfigError: no W&B key, wandb_workspaces is not installed, or W&B refuses.
    """
    workspace(project, entity or "", name)  # is it installed?
    _, key = wandb_run.account()
    if key is None:
        raise ConfigError(
            "dashboard: no W&B key at hand. Set WANDB_API_KEY or run `wandb login`; --dry-run "
            "shows what it would have, and `rlhf report` compares runs without W&B."
        )
    try:
        made = workspace(project, entity or wandb_run.default_entity(key), name)
        made.save()
        return str(made.url)
    except ConfigError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"dashboard: W&B did not save it ({reason}). Check the network, the key, --entity "
            f"and --project={project}; a run that was tracked online, or synced, makes a project."
        ) from error
