"""Which file relies on which outside library, and what has changed there: checked before it hurts.

Libraries rename arguments and private fields between releases. Each file that leans on such names
is the only one to do so, and has a function `changed` that gives a line for each that is gone.
Stages ask the files that they use before a weight is loaded, `rlhf doctor` asks all of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rlhf import libraries
from rlhf.errors import ConfigError
from rlhf.methods.settings import (
    FAMILIES,
    BitFitConfig,
    BottleneckConfig,
    FreezeConfig,
    FullConfig,
    MethodConfig,
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
    UniPELTConfig,
)


@dataclass(frozen=True)
class Home:
    """A file that leans on outside libraries.

    Attributes:
        file: its module in this package.
        libraries: by the names that pip knows; the first is blamed where an error names none.
        feature: what stops working where one of them has changed.
        used: whether a stage of this config runs it.
        checks: it has a function `changed`; without, it keeps to what the library documents.
    """

    file: str
    libraries: tuple[str, ...]
    feature: str
    used: Callable[[Any], bool] = lambda cfg: True
    checks: bool = True


SOFT = (PrefixConfig, PromptConfig, PTuningConfig)
OWN = (BottleneckConfig, UniPELTConfig)
OF_WEIGHTS = (FullConfig, FreezeConfig, BitFitConfig)  # which lean on nothing
LOW_RANK = tuple(kind for kind in FAMILIES if kind not in (*SOFT, *OWN, *OF_WEIGHTS))


def _by(*kinds: type[MethodConfig]) -> Callable[[Any], bool]:
    """Whether a stage trains by a method with settings of these kinds."""
    names = {name for kind in kinds for name in FAMILIES[kind]}
    return lambda cfg: cfg.method.name in names


HOMES = (
    Home("engine", ("deepspeed", "torch"), "all stages: updates and checkpoints"),
    Home("models", ("transformers", "peft"), "all stages: models and adapters"),
    Home("loading", ("transformers", "safetensors"), "all stages: models from a folder or the hub"),
    Home("text", ("transformers", "jinja2"), "all stages: chat templates", checks=False),
    Home(
        "supervised",
        ("trl", "transformers", "accelerate", "datasets"),
        "SFT and reward models",
        used=lambda cfg: cfg.stage in ("sft", "rm"),
    ),
    Home("rollout", ("transformers",), "PPO and evaluation: sampling"),
    Home("methods.lora", ("peft",), "methods of the LoRA family", used=_by(*LOW_RANK)),
    Home(
        "methods.soft",
        ("transformers", "peft"),
        "prefix_tuning, prompt_tuning, p_tuning, p_tuning_v2",
        used=_by(*SOFT),
    ),
    Home(
        "methods.own",
        ("peft",),
        "houlsby, pfeiffer, unipelt",
        used=_by(*OWN),
    ),
    Home("methods.unipelt", ("transformers",), "unipelt", used=_by(UniPELTConfig)),
    Home("launch", ("hydra-core",), "all stages: settings", checks=False),
    Home("wandb_run", ("wandb",), "tracking=wandb, rlhf sync", checks=False),
    Home("dashboard", ("wandb-workspaces",), "rlhf dashboard", checks=False),
    Home("console", ("rich",), "what stages print", checks=False),
    Home("cli", ("typer",), "the command rlhf", checks=False),
    Home("report.curves", ("bokeh", "jinja2"), "reports", checks=False),
    Home("versus", ("numpy",), "win rates, intervals, reports", checks=False),
    Home("libraries", ("packaging",), "the check of versions", checks=False),
)


def features(library: str) -> list[str]:
    """What here touches a library."""
    return [home.feature for home in HOMES if library in home.libraries]


def changed(homes: Iterable[Home] = HOMES) -> list[str]:
    """A line for everything that these files rely on and that is gone; nothing as tested."""
    return [line for home in homes if home.checks for line in _changed(home)]


def _changed(home: Home) -> list[str]:
    try:
        lines = list(importlib.import_module(f"rlhf.{home.file}").changed())
    except (ImportError, AttributeError) as error:  # of a name that it takes as it is imported
        lines = [f"{libraries.named(_library(error, home))}: {str(error).splitlines()[0]}"]
    return [f"{line} (rlhf/{home.file.replace('.', '/')}.py: {home.feature})" for line in lines]


def _library(error: Exception, home: Home) -> str:
    """The library that an error is about: the one it names, else the first of the home."""
    root = (getattr(error, "name", None) or "").split(".")[0]
    return root if root in home.libraries else home.libraries[0]


def check(cfg: Any) -> None:
    """Refuse to run on a library of which something is gone that this stage relies on.

    Raises:
        ConfigError: what has changed, and the version that was tested.
    """
    lines = changed(home for home in HOMES if home.used(cfg))
    if lines:
        raise ConfigError(refusal(lines))


def refusal(lines: list[str]) -> str:
    """What has changed, and what to do about it."""
    tested = libraries.tested()
    about = {line.split(" ")[0] for line in lines}
    pins = [f"'{name}=={tested[name]}'" for name in sorted(about) if name in tested]
    way = f"Run `pip install {' '.join(pins)}`, which was tested." if pins else "Run `make setup`."
    return f"[library-changed] {'; '.join(lines)}. {way}"
