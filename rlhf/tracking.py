"""The numbers of a run: one list of names, written to metrics.jsonl, the console and W&B alike.

The only file that imports wandb, and it does so when a tracker that needs it starts: with
`tracking=off` this file imports nothing outside the standard library. The names are exact and
spelled as the field spells them (TRL, OpenRLHF), so that a curve means the same in every run.
`METRICS` is also the documentation of the numbers; units are nats, tokens, seconds and rows.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import netrc
import operator
import os
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rlhf.errors import ConfigError

if TYPE_CHECKING:
    from rlhf.console import Console

MODES = ("auto", "online", "offline", "off")

# A cluster node with a key but no route out should lose seconds, not wandb's 90 (start) or forever
# (finish). What is not uploaded by then stays in the run folder for `wandb sync`.
START_TIMEOUT_SECONDS = 20.0
FINISH_TIMEOUT_SECONDS = 60.0

# wandb answers to two host names and `wandb login` writes either into netrc.
WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")


@dataclass(frozen=True)
class Metric:
    """One number that a stage may log: how to read it, and which way is good (None: neither)."""

    name: str
    unit: str
    meaning: str
    higher_is_better: bool | None = None


HIGH, LOW, NEITHER = True, False, None  # which way is good

# The order is the order of the keys in metrics.jsonl. Means and sums over tokens count response
# tokens only, over all processes; "a response's KL" is the sum of its tokens' estimates.
METRICS: dict[str, Metric] = {
    name: Metric(name, unit, meaning, higher_is_better)
    for name, unit, higher_is_better, meaning in (
        ("episode", "rows", NEITHER, "responses sampled since the run began"),
        ("train/loss", "nats", LOW, "last update: per answer token (SFT), per pair (RM)"),
        ("train/accuracy", "fraction", HIGH, "RM: training pairs that score chosen higher"),
        ("train/margin", "score", HIGH, "RM: mean chosen - rejected score, training pairs"),
        ("train/epoch", "epochs", NEITHER, "passes over the training rows so far"),
        ("train/learning_rate", "1", NEITHER, "learning rate of the last update"),
        ("train/grad_norm", "1", NEITHER, "L2 norm of the gradient before clipping"),
        ("eval/loss", "nats", LOW, "train/loss on held-out rows"),
        ("eval/accuracy", "fraction", HIGH, "RM: held-out pairs that score chosen higher"),
        ("eval/accuracy_ci_low", "fraction", HIGH, "lower end of its 95 % interval"),
        ("eval/accuracy_ci_high", "fraction", HIGH, "upper end of its 95 % interval"),
        ("eval/accuracy_longer", "fraction", NEITHER, "what 'the longer one wins' would get"),
        ("eval/margin", "score", HIGH, "RM: mean chosen - rejected score, held-out pairs"),
        ("eval/ece", "fraction", LOW, "RM: calibration error of sigmoid(margin), held out"),
        ("eval/brier", "1", LOW, "RM: mean of (1 - sigmoid(margin))^2, held out; 0.25: no idea"),
        ("objective/kl", "nats", LOW, "mean over responses of a response's KL to the reference"),
        ("objective/kl_max", "nats", LOW, "largest |log policy - log reference| of a token"),
        ("objective/kl_coef", "score/nat", NEITHER, "weight of the KL penalty in the reward"),
        ("objective/scores", "score", HIGH, "mean score of the answers, penalties taken off"),
        ("objective/scores_std", "score", NEITHER, "standard deviation of the scores of a step"),
        ("objective/scores_spread", "score", LOW, "mean std of a score over an ensemble's members"),
        ("objective/non_score_reward", "score", HIGH, "mean over responses of -kl_coef * its KL"),
        ("objective/rlhf_reward", "score", HIGH, "scores + non_score_reward: what PPO maximises"),
        ("objective/entropy", "nats", NEITHER, "mean over tokens of -log prob, sampling policy"),
        ("policy/approxkl", "nats", NEITHER, "mean over tokens of (log ratio)^2 / 2, new to old"),
        ("policy/clipfrac", "fraction", NEITHER, "tokens on which the policy clip was active"),
        ("policy/ratio", "1", NEITHER, "mean over tokens of new prob / old prob"),
        ("policy/kl", "nats", LOW, "mean over tokens of log policy - log reference, in training"),
        ("policy/entropy", "nats", NEITHER, "mean over tokens of the entropy, in training"),
        ("policy/learning_rate", "1", NEITHER, "of the policy, at the step's first update"),
        ("policy/grad_norm", "1", NEITHER, "L2 norm of the policy's gradient before clipping"),
        (
            "loss/policy",
            "1",
            NEITHER,
            "clipped policy loss, mean over tokens, no other term",
        ),
        ("loss/kl", "nats", LOW, "KL as a term of the loss, mean over tokens, before kl_coef"),
        ("loss/ptx", "nats", LOW, "SFT loss mixed in (PPO-ptx), per answer token, before ptx_coef"),
        ("loss/value", "score^2", LOW, "clipped value loss: half the mean square, no vf_coef"),
        ("val/clipfrac", "fraction", NEITHER, "tokens on which the value clip was active"),
        ("val/explained_variance", "fraction", HIGH, "1 - Var(return - value) / Var(return)"),
        ("val/error", "score^2", LOW, "mean over tokens of (value - return)^2, unclipped"),
        ("val/learning_rate", "1", NEITHER, "of the critic, at the step's first update"),
        ("val/grad_norm", "1", NEITHER, "L2 norm of the critic's gradient before clipping"),
        ("response/length", "tokens", NEITHER, "mean response length, EOS included"),
        ("response/eos_rate", "fraction", HIGH, "responses that ended by EOS, not by the limit"),
        ("response/distinct", "fraction", HIGH, "distinct bigrams / all bigrams of a batch"),
        ("eval/gold", "score", HIGH, "mean gold score, held-out prompts; never trained on"),
        ("eval/gold_sft", "score", NEITHER, "mean gold score of the SFT model, same prompts"),
        ("eval/gold_best_of_8", "score", NEITHER, "mean of the best gold of 8 SFT samples"),
        ("eval/gold_ci_low", "score", HIGH, "lower end of the 95 % interval of eval/gold"),
        ("eval/gold_ci_high", "score", HIGH, "upper end of the 95 % interval of eval/gold"),
        ("eval/win_rate", "fraction", HIGH, "prompts where gold beats the SFT answer's; ties 1/2"),
        ("eval/win_rate_ci_low", "fraction", HIGH, "lower end of its 95 % interval"),
        ("eval/win_rate_ci_high", "fraction", HIGH, "upper end of its 95 % interval"),
        ("eval/score", "score", HIGH, "mean score of answers to held-out prompts, temperature 1"),
        ("eval/score_ci_low", "score", HIGH, "lower end of its 95 % interval"),
        ("eval/score_ci_high", "score", HIGH, "upper end of its 95 % interval"),
        ("eval/score_sft", "score", NEITHER, "the same of the SFT model's answers"),
        ("eval/second", "score", HIGH, "mean score of a reward model that only watches"),
        ("eval/second_ci_low", "score", HIGH, "lower end of its 95 % interval"),
        ("eval/second_ci_high", "score", HIGH, "upper end of its 95 % interval"),
        ("eval/second_sft", "score", NEITHER, "the same of the SFT model's answers"),
        ("eval/length", "tokens", NEITHER, "mean length of held-out answers, EOS included"),
        ("eval/eos_rate", "fraction", HIGH, "held-out answers that ended by EOS"),
        ("eval/distinct", "fraction", HIGH, "distinct bigrams / all bigrams of held-out answers"),
        ("eval/repetition", "fraction", LOW, "bigrams that an answer had before, mean of answers"),
        ("eval/kl", "nats", LOW, "objective/kl on held-out prompts at temperature 1"),
        ("proof/kl", "nats", LOW, "largest |KL(policy, reference)| of a token before any update"),
        ("proof/ratio", "1", LOW, "largest |ratio - 1| of a token before any update"),
        ("time/rollout", "seconds", LOW, "sampling the responses of this step"),
        ("time/score", "seconds", LOW, "reference, critic and reward passes of this step"),
        ("time/update", "seconds", LOW, "optimising policy and critic in this step"),
        ("time/total", "seconds", LOW, "wall time since the stage began"),
        ("perf/tokens_per_second", "tokens/s", HIGH, "prompt and response tokens by step time"),
        ("perf/peak_memory_gb", "GB", LOW, "peak memory of the main process, or of its GPU"),
    )
}


class Tracker:
    """Writes each number once to metrics.jsonl, the console and W&B. Main process only.

    Args:
        stage, run, run_name: W&B shows job type = stage, group = run, name = stage/run_name.
        config: the composed settings, as plain JSON values.
        metrics_path: the metrics.jsonl to write; replaced unless `append`.
        directory: the run folder; W&B files land in `directory`/wandb.
        project, entity: where W&B puts the run; entity None is the key's default.
        mode: "auto" (online when a key is at hand, else offline), "online", "offline" or "off".
        console: shown every line of numbers; None for silence.
        append: an interrupted run goes on: keep the finished lines of metrics.jsonl. In W&B the
            rest is a second run of the same name and group.
        total: steps of the stage, for the console.

    Raises:
        ConfigError: an unknown mode; "online" without key or network; wandb not installed.
    """

    def __init__(
        self,
        *,
        stage: str,
        run: str,
        run_name: str,
        config: dict[str, Any],
        metrics_path: Path,
        directory: Path,
        project: str,
        entity: str | None,
        mode: str,
        console: Console | None,
        append: bool = False,
        total: int | None = None,
    ) -> None:
        self.stage = stage
        self.total = total
        self._console = console
        self._closed = False
        self._step: int | None = None
        self._lines = 0
        self._names: set[str] = set()
        if mode not in MODES:
            raise ConfigError(
                f"tracking.mode={mode!r}: not one of {', '.join(MODES)}. `auto` is online when a "
                "W&B key is at hand and offline otherwise; `tracking=off` silences it."
            )
        directory.mkdir(parents=True, exist_ok=True)
        self._wandb = self._start_wandb(
            mode,
            directory,
            project=project,
            entity=entity,
            group=run,
            name=f"{stage}/{run_name}",
            job_type=stage,
            config=config,
        )
        try:
            metrics_path.parent.mkdir(parents=True, exist_ok=True)
            self._file = metrics_path.open("r+b" if append and metrics_path.exists() else "w+b")
            self._keep_lines(None)
        except BaseException:
            self._finish_wandb(exit_code=1)
            raise

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Record the numbers of one step; several calls may share a step, none may go back.

        Raises:
            KeyError: a name that is not in METRICS; nothing is written then.
            ValueError: `step` is before the last one (W&B would drop the numbers in silence).
        """
        numbers = in_table_order(metrics)
        if self._step is not None and step < self._step:
            raise ValueError(f"step={step} comes after step {self._step}: steps never go back")
        if self._closed:
            raise ValueError(f"log(step={step}) after close()")
        self._step = step
        line = {"step": step} | {name: _json_value(value) for name, value in numbers.items()}
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()
        self._lines += 1
        self._names |= line.keys()
        if self._wandb is not None:
            self._to_wandb(lambda run: run.log(numbers, step=step))
        if self._console is not None:
            self._console.metrics(self.stage, step, self.total, numbers)

    @property
    def names(self) -> frozenset[str]:
        """What metrics.jsonl has a number of."""
        return frozenset(self._names)

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Set the numbers W&B shows for the run as a whole (the manifest keeps its own)."""
        numbers = in_table_order(metrics)
        self._to_wandb(lambda run: run.summary.update(numbers))

    @property
    def lines(self) -> int:
        """How many lines metrics.jsonl has."""
        return self._lines

    def rewind(self, lines: int) -> None:
        """Keep the first `lines`: a resumed run logs again what came after its checkpoint."""
        self._keep_lines(lines)

    def close(self, exit_code: int = 0) -> None:
        """Finish W&B and the file; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self._finish_wandb(exit_code)
        finally:
            self._file.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self.close(exit_code=0 if kind is None else 1)

    # -- metrics.jsonl

    def _keep_lines(self, most: int | None) -> None:
        """Keep the whole lines, `most` of them (None: all), and stand at their end."""
        self._file.seek(0)
        end, self._step, self._lines, self._names = 0, None, 0, set()
        for line in self._file:
            if not line.endswith(b"}\n") or self._lines == most:  # cut off by a crash; enough
                break
            numbers = json.loads(line)
            end, self._step = end + len(line), numbers["step"]
            self._lines += 1
            self._names |= numbers.keys()
        self._file.seek(end)
        self._file.truncate()

    # -- W&B

    def _note(self, text: str) -> None:
        if self._console is not None:
            self._console.note(f"[{self.stage}] tracking: {text}")

    def _start_wandb(self, mode: str, directory: Path, **about: Any) -> Any:
        """The W&B run, or None when tracking is off."""
        if mode == "auto":  # what the user told W&B itself comes before our choice
            wish = os.environ.get("WANDB_MODE", "").lower()
            mode = {"disabled": "off", "offline": "offline", "dryrun": "offline"}.get(wish, mode)
        if mode == "off":
            return None
        try:
            return self._init_wandb(mode, directory, about)
        except ConfigError:
            raise
        except Exception as error:  # a missing package, a broken setting, a dead service
            missing = isinstance(error, ModuleNotFoundError) and error.name == "wandb"
            reason = "wandb is not installed" if missing else _first_line(error)
            if mode == "auto":
                self._note(f"off ({reason})")
                return None
            raise ConfigError(
                f"tracking.mode={mode}: W&B did not start ({reason}). "
                + ("`pip install wandb`" if missing else "Mend that")
                + ", or do without: `tracking=off`."
            ) from error

    def _init_wandb(self, mode: str, directory: Path, about: dict[str, Any]) -> Any:
        """Decide between online and offline first: without a key, wandb asks or raises."""
        # wandb reports its own errors to its makers, and looks up their host even when offline.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        logging.getLogger("wandb").propagate = False  # it keeps debug.log in its own folder
        quiet: dict[str, Any] = {"silent": True, "quiet": True}
        settings = wandb.setup(settings=wandb.Settings(**quiet)).settings
        key = find_key(settings.base_url, settings.api_key)
        if mode == "online" and key is None:
            raise ConfigError(
                "tracking.mode=online: no W&B key at hand. Set WANDB_API_KEY or run "
                "`wandb login`, or use `tracking.mode=offline` and `wandb sync` later."
            )

        def start(mode: Any, **more: Any) -> Any:
            return wandb.init(
                **about,
                dir=str(directory),
                mode=mode,
                reinit="create_new",  # ours alone: no library finds it and adds its own names
                settings=wandb.Settings(
                    **quiet,
                    **more,
                    console="off",
                    disable_git=True,
                    disable_code=True,
                    finish_timeout=FINISH_TIMEOUT_SECONDS,
                ),
            )

        why = "" if mode == "offline" else " (no W&B key at hand)"
        if key is not None and mode != "offline":
            try:
                named = {"api_key": key} if key else {}
                online = start("online", init_timeout=START_TIMEOUT_SECONDS, **named)
                self._note(f"online, {online.url}")
                return online
            except Exception as error:
                if mode == "online":
                    raise ConfigError(
                        f"tracking.mode=online: W&B did not start ({_first_line(error)}). Check "
                        "the network and the key (`wandb login`), or use `tracking.mode=offline`."
                    ) from error
                why = f" (W&B did not start: {_first_line(error)})"
        offline = start("offline")
        self._note(f"offline{why}; upload later: wandb sync {Path(offline.dir).parent}")
        return offline

    def _to_wandb(self, action: Any) -> None:
        """Do `action` with the W&B run; a dashboard that fails must not end a training run."""
        if self._wandb is None:
            return
        try:
            action(self._wandb)
        except Exception as error:
            self._wandb = None
            self._note(f"W&B failed and is left out from here on ({error!r})")

    def _finish_wandb(self, exit_code: int) -> None:
        self._to_wandb(lambda run: run.finish(exit_code=exit_code))
        self._wandb = None


def in_table_order(metrics: Mapping[str, float]) -> dict[str, float]:
    """The same numbers as plain int or float, in the order of METRICS.

    Raises:
        KeyError: a name that is not in METRICS, with the nearest ones.
    """
    for name in metrics:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "see METRICS for the names."
            raise KeyError(f"metric {name!r} is not in rlhf.tracking.METRICS: {hint}")
    return {name: _plain_number(metrics[name]) for name in METRICS if name in metrics}


def find_key(base_url: str, configured: str | None = None) -> str | None:
    """The W&B key at hand for a host: environment, wandb's settings, netrc; None without one.

    "" stands for a token file (WANDB_IDENTITY_TOKEN_FILE), which wandb reads by itself.
    """
    if key := os.environ.get("WANDB_API_KEY") or configured:
        return key
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return ""
    named = os.environ.get("NETRC")
    paths = [Path(named)] if named else [Path("~/.netrc"), Path("~/_netrc")]
    host = urlsplit(base_url).netloc
    hosts = (host, *WANDB_HOSTS) if host in WANDB_HOSTS else (host,)
    for path in paths:
        try:
            entries = netrc.netrc(path.expanduser()).hosts
        except (OSError, RuntimeError, netrc.NetrcParseError):
            continue
        for name in hosts:
            if name in entries and entries[name][2]:
                return entries[name][2]
    return None


def _plain_number(value: Any) -> float:
    """An int stays an int; numpy's and torch's scalars become Python's, every digit kept."""
    try:
        return operator.index(value)
    except TypeError:
        return float(value)


def _json_value(value: float) -> float | str:
    """JSON has no nan and no infinity: they are written as "nan", "inf" and "-inf"."""
    return value if math.isfinite(value) else str(value)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
