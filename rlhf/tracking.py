"""The numbers of a run, as they come: to metrics.jsonl, the console and W&B alike.

Which numbers there are is said in `rlhf.metrics`. The only file that imports wandb, and it does so
when a tracker that needs it starts: with `tracking=off` this file imports nothing outside the
standard library.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import netrc
import os
import re
import secrets
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rlhf.errors import ConfigError, StoppedByGuard
from rlhf.journal import Journal
from rlhf.metrics import HISTOGRAMS, METRICS, in_table_order

if TYPE_CHECKING:
    from rlhf.console import Console
    from rlhf.registry import Published

MODES = ("auto", "online", "offline", "off")

# A cluster node with a key but no route out should lose seconds, not wandb's 90 (start) or forever
# (finish). What is not uploaded by then stays in the run folder for `wandb sync`.
START_TIMEOUT_SECONDS = 20.0
FINISH_TIMEOUT_SECONDS = 60.0
SYSTEM_METRICS_SECONDS = 30.0  # between two looks at CPU, memory and GPU

# W&B's limits.
TAG_CHARACTERS, ALERT_CHARACTERS, ARTIFACT_CHARACTERS = 64, 63, 128

# wandb answers to two host names and `wandb login` writes either into netrc.
WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")


# What the table of samples shows of a line of samples_log.jsonl, in order.
SAMPLE_COLUMNS = (
    "step",
    "prompt",
    "sft",
    "ppo",
    "sft_score",
    "ppo_score",
    "sft_gold",
    "ppo_gold",
    "ppo_kl",
    "ppo_length",
)
TABLE_ROWS = 10_000  # that W&B shows of a table; the newest are taken
SAMPLES_LOG = "samples_log.jsonl"
NO_NUMBER = ("nan", "inf", "-inf")  # as metrics.jsonl has them


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
        append: an interrupted run goes on: keep the finished lines of metrics.jsonl, and the W&B
            run, which gets what it lacks of them and no step twice.
        total: steps of the stage, for the console.
        tags: of the W&B run.

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
        tags: Sequence[str] = (),
    ) -> None:
        self.stage = stage
        self.total = total
        self._reference = f"{stage}/{run_name}"
        self._console = console
        self._closed = False
        self._exit_code = 0
        self._append = self._behind = append
        self._samples_path = directory / SAMPLES_LOG
        self._samples: Journal | None = None
        self._samples_shown = 0  # rows of the table that W&B was given last
        if mode not in MODES:
            raise ConfigError(
                f"tracking.mode={mode!r}: not one of {', '.join(MODES)}. `auto` is online when a "
                "W&B key is at hand and offline otherwise; `tracking=off` silences it."
            )
        directory.mkdir(parents=True, exist_ok=True)
        self._wandb = self._start_wandb(
            mode,
            WandbRows(directory, resume=append),
            project=project,
            entity=entity,
            group=run,
            name=self._reference,
            job_type=stage,
            tags=[tag[:TAG_CHARACTERS] for tag in dict.fromkeys(tags)],
            config=config,
        )
        try:
            self._metrics = Journal(metrics_path, append=append)
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
        last = self._metrics.step
        if last is not None and step < last:
            raise ValueError(f"step={step} comes after step {last}: steps never go back")
        if self._closed:
            raise ValueError(f"log(step={step}) after close()")
        self._catch_up()
        self._metrics.write(
            {"step": step} | {name: _json_value(value) for name, value in numbers.items()}
        )
        self._to_wandb(lambda rows: rows.add(step, numbers))
        if self._console is not None:
            self._console.metrics(self.stage, step, self.total, numbers)

    def histograms(self, values: Mapping[str, Sequence[float]], *, step: int) -> None:
        """Show how numbers are distributed at a step, in W&B.

        Args:
            values: by name of HISTOGRAMS; what is not finite is left out.

        Raises:
            KeyError: another name.
        """
        for name in values:
            if name not in HISTOGRAMS:
                raise KeyError(f"histogram {name!r} is not one of {', '.join(HISTOGRAMS)}")
        self._catch_up()
        self._to_wandb(lambda rows: rows.add_histograms(step, values))

    def samples(self, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
        """Keep a few answers of an evaluation in samples_log.jsonl and in a growing W&B table.

        A W&B table cannot be added to: it is logged whole, each time it has doubled and at the
        end, which costs at most twice the last one.

        Args:
            rows: as SAMPLE_COLUMNS names them; other values are kept in the file only.
        """
        if not rows:
            return
        self._catch_up()
        if self._samples is None:
            self._samples = Journal(self._samples_path, append=self._append)
        for row in rows:
            whole = {"step": step, **row}
            self._samples.write({name: _json_value(value) for name, value in whole.items()})
        if self._samples.lines >= 2 * self._samples_shown:
            self._show_samples(step)

    def _show_samples(self, step: int) -> None:
        if self._samples is None or self._samples.lines == self._samples_shown:
            return
        shown = self._samples.rows()[-TABLE_ROWS:]
        self._samples_shown = self._samples.lines
        self._to_wandb(lambda rows: rows.add_table(step, "samples", SAMPLE_COLUMNS, shown))

    @property
    def names(self) -> frozenset[str]:
        """What metrics.jsonl has a number of."""
        return frozenset(self._metrics.names)

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Set the numbers W&B shows for the run as a whole (the manifest keeps its own)."""
        numbers = in_table_order(metrics)
        self._to_wandb(lambda rows: rows.summarise(numbers))

    def stop(self, reason: str) -> None:
        """A guard ended the run: W&B tells whoever asked for alerts, and shows it as failed."""
        self._exit_code = 3
        self._note_failure(lambda rows: rows.alert(f"{self._reference}: stopped", reason))

    def publish(self, made: Published, parents: Sequence[Published]) -> None:
        """Record a published run as a W&B artifact, with what it came from."""
        self._note_failure(lambda rows: rows.publish(made, parents))

    @property
    def lines(self) -> int:
        """How many lines metrics.jsonl has."""
        return self._metrics.lines

    def rewind(self, lines: int, *, step: int | None = None) -> None:
        """Keep the first `lines` of metrics.jsonl, and the samples up to `step`: a resumed run
        logs again what came after its checkpoint."""
        self._metrics.rewind(lines=lines)
        if self._samples_path.exists():
            self._samples = Journal(self._samples_path, append=True)
            self._samples.rewind(step=step)

    def close(self, exit_code: int = 0) -> None:
        """Finish W&B and the files; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self._catch_up()
            if self._metrics.step is not None:
                self._show_samples(self._metrics.step)
            self._finish_wandb(exit_code or self._exit_code)
        finally:
            self._metrics.close()
            if self._samples is not None:
                self._samples.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if isinstance(error, StoppedByGuard):
            self.stop(str(error))
        self.close(exit_code=0 if kind is None else self._exit_code or 1)

    # -- W&B

    def _catch_up(self) -> None:
        """Give W&B the lines of an interrupted run that it lacks, before there are new ones."""
        if not self._behind:
            return
        self._behind = False
        for row in self._metrics.rows() if self._wandb is not None else ():
            step = row.pop("step")
            numbers = {name: float(v) if isinstance(v, str) else v for name, v in row.items()}
            self._to_wandb(partial(WandbRows.add, step=step, values=numbers))

    def _note(self, text: str) -> None:
        if self._console is not None:
            self._console.note(f"[{self.stage}] tracking: {text}")

    def _start_wandb(self, mode: str, rows: WandbRows, **about: Any) -> WandbRows | None:
        """The W&B run, or None when tracking is off."""
        if mode == "auto":  # what the user told W&B itself comes before our choice
            wish = os.environ.get("WANDB_MODE", "").lower()
            mode = {"disabled": "off", "offline": "offline", "dryrun": "offline"}.get(wish, mode)
        if mode == "off":
            return None
        try:
            self._note(rows.start(mode, about))
            return rows
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

    def _to_wandb(self, action: Callable[[WandbRows], object]) -> None:
        """Do `action` with the W&B run; a dashboard that fails must not end a training run."""
        if self._wandb is None:
            return
        try:
            action(self._wandb)
        except Exception as error:
            self._wandb = None
            self._note(f"W&B failed and is left out from here on ({error!r})")

    def _note_failure(self, action: Callable[[WandbRows], object]) -> None:
        """The same for what the numbers do not need: they go on."""
        if self._wandb is None:
            return
        try:
            action(self._wandb)
        except Exception as error:
            self._note(f"W&B did not take it ({_first_line(error)})")

    def _finish_wandb(self, exit_code: int) -> None:
        self._to_wandb(lambda rows: rows.finish(exit_code))
        self._wandb = None


class WandbRows:
    """One W&B run, written by one process after another: every number of a step goes there once.

    W&B has one row a step and takes none back. So a row leaves when the next step begins, or at
    the end, and what left is noted beside W&B's files, with the id of the run. A process that goes
    on from a checkpoint keeps the id and leaves out what was sent before; what it does again has
    the same values, but for its times.

    Args:
        directory: the run folder.
        resume: the run was started by an earlier process.
    """

    def __init__(self, directory: Path, *, resume: bool) -> None:
        self._directory = directory.absolute()
        self._noted = self._directory / "wandb" / "sent.json"
        self._resume = resume
        self._run: Any = None
        self._online = False
        self._row: dict[str, Any] = {}
        self._step: int | None = None
        self._summary: dict[str, float] = {}
        self._id, self._sent = secrets.token_hex(4), -1  # the last step that W&B has
        self._sent_names: set[str] = set()  # what W&B has of it
        if resume:
            with contextlib.suppress(OSError, ValueError, KeyError):  # it ran with tracking=off
                noted = json.loads(self._noted.read_text(encoding="utf-8"))
                self._sent_names = set(noted["names"])
                self._id, self._sent = noted["id"], noted["step"]

    def start(self, mode: str, about: dict[str, Any]) -> str:
        """Begin; decide between online and offline first: without a key, wandb asks or raises.

        Returns:
            How it went, in words.
        """
        _, key = account()
        import wandb

        if mode == "online" and key is None:
            raise ConfigError(
                "tracking.mode=online: no W&B key at hand. Set WANDB_API_KEY or run "
                "`wandb login`, or use `tracking.mode=offline` and `rlhf sync` later."
            )
        why = "" if mode == "offline" else " (no W&B key at hand)"
        if key is not None and mode != "offline":
            try:
                named = {"api_key": key} if key else {}
                self._init(wandb, "online", about, init_timeout=START_TIMEOUT_SECONDS, **named)
                return f"online, {self._run.url}"
            except Exception as error:
                if mode == "online":
                    raise ConfigError(
                        f"tracking.mode=online: W&B did not start ({_first_line(error)}). Check "
                        "the network and the key (`wandb login`), or use `tracking.mode=offline`."
                    ) from error
                why = f" (W&B did not start: {_first_line(error)})"
                wandb.teardown()  # or the id of the run would count as in use
        self._init(wandb, "offline", about)
        return f"offline{why}; upload later: rlhf sync {about['name']}"

    def _init(self, wandb: Any, mode: str, about: dict[str, Any], **more: Any) -> None:
        online = mode == "online"
        self._run = wandb.init(
            **about,
            id=self._id,
            resume="allow" if online and self._resume else None,
            dir=str(self._directory),
            mode=mode,
            reinit="create_new",  # ours alone: no library finds it and adds its own names
            settings=wandb.Settings(
                silent=True,
                quiet=True,
                console="off",
                disable_git=True,
                disable_code=True,
                finish_timeout=FINISH_TIMEOUT_SECONDS,
                x_stats_sampling_interval=SYSTEM_METRICS_SECONDS,
                **more,
            ),
        )
        self._online = online
        if online and self._resume:  # the server knows best what it has
            self._sent = self._run.starting_step - 1
            self._sent_names = {*METRICS, *HISTOGRAMS}  # it takes no more of that step
        self._run.define_metric("step", hidden=True)
        for pattern in dict.fromkeys(_pattern(name) for name in (*METRICS, *HISTOGRAMS)):
            self._run.define_metric(pattern, step_metric="step")
        self._note_sent()

    # -- rows

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """More of the row of a step."""
        if step != self._step:
            self._send()
        self._step = step
        self._row |= values

    def add_histograms(self, step: int, values: Mapping[str, Sequence[float]]) -> None:
        """Distributions, each of 64 bins."""
        import wandb

        finite = {name: [x for x in found if math.isfinite(x)] for name, found in values.items()}
        self.add(step, {name: wandb.Histogram(found) for name, found in finite.items() if found})

    def add_table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """A whole table; of several in a row the last counts."""
        import wandb

        data = [[_table_value(row.get(column)) for column in columns] for row in rows]
        self.add(step, {name: wandb.Table(columns=list(columns), data=data)})

    def _send(self) -> None:
        """Give W&B the row at hand, but for what it has."""
        row, step = self._row, self._step
        self._row = {}
        if step is None or not row or step < self._sent:
            return
        if step == self._sent:
            row = {name: value for name, value in row.items() if name not in self._sent_names}
        if not row:
            return
        with self._staging():
            self._run.log({"step": step} | row, step=step, commit=True)
        self._sent_names = row.keys() | (self._sent_names if step == self._sent else set())
        self._sent = step
        self._note_sent()

    def _note_sent(self) -> None:
        """What a process that goes on with this run must know."""
        noted = {"id": self._id, "step": self._sent, "names": sorted(self._sent_names)}
        temporary = self._noted.with_suffix(".tmp")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(noted) + "\n", encoding="utf-8")
        os.replace(temporary, self._noted)

    @contextlib.contextmanager
    def _staging(self) -> Iterator[None]:
        """Copies that W&B makes of tables lie in the run, not in the user's home."""
        if "WANDB_DATA_DIR" in os.environ:
            yield
            return
        os.environ["WANDB_DATA_DIR"] = str(self._noted.parent)
        try:
            yield
        finally:
            del os.environ["WANDB_DATA_DIR"]

    # -- what is said of the run as a whole

    def summarise(self, numbers: Mapping[str, float]) -> None:
        """Numbers in the table of runs; rows that are yet to come do not stand instead."""
        self._summary |= numbers

    def alert(self, title: str, text: str) -> None:
        """A message to those who asked W&B for them."""
        self._run.alert(title[:ALERT_CHARACTERS], text, level="ERROR")

    def publish(self, made: Published, parents: Sequence[Published]) -> None:
        """The artifact of a run; online also that it used its parents'.

        Offline W&B takes no used artifacts; the lineage is in the metadata.
        """
        with self._staging():
            for parent in parents if self._online else ():
                artifact, _ = _artifact(parent)
                self._run.use_artifact(artifact)  # W&B knows it by its content
            artifact, aliases = _artifact(made)
            self._run.log_artifact(artifact, aliases=aliases)

    def finish(self, exit_code: int) -> None:
        """Send what is at hand, and end this part of the run."""
        self._send()
        self._run.summary.update(self._summary)
        self._run.finish(exit_code=exit_code)


def _artifact(made: Published) -> tuple[Any, list[str]]:
    """A run or checkpoint as a W&B artifact, and its aliases: the manifest, and the files of the
    model by reference, or, where it was made with tracking.upload=true, the files themselves."""
    import wandb

    manifest, folder = made.manifest, made.model_dir.absolute().parent
    name = re.sub(r"[^A-Za-z0-9._-]", "-", f"{made.stage}-{made.run_name}")[:ARTIFACT_CHARACTERS]
    about = {
        "reference": made.reference,
        "manifest_sha256": made.digest,
        "parents": [vars(parent) for parent in manifest.parents],
        "base": vars(manifest.base),
        "method": manifest.method.name,
        "metrics": manifest.metrics,
        "package_version": manifest.package_version,
        "git_commit": manifest.git_commit,
        "path": str(folder),
    }
    artifact = wandb.Artifact(name, type="model", metadata=about)
    upload = manifest.config.get("tracking.upload") is True
    fixed: dict[str, Any] = {"policy": "immutable", "skip_cache": True}  # as published: no copy
    artifact.add_file(str(folder / "manifest.json"), name="manifest.json", **fixed)
    for path in sorted(made.model_dir.absolute().rglob("*")):
        if path.is_file() and upload:
            artifact.add_file(str(path), name=path.relative_to(folder).as_posix(), **fixed)
        elif path.is_file():
            where = path.relative_to(folder).as_posix()
            artifact.add_reference(path.as_uri(), name=where, checksum=False)
    return artifact, [folder.name if made.is_checkpoint else manifest.model_is]


def _pattern(name: str) -> str:
    """ "objective/kl" -> "objective/*", as W&B defines axes."""
    return name.split("/")[0] + "/*" if "/" in name else name


def _table_value(value: Any) -> Any:
    """A number, text that can be written, or None ("nan" is no number: a column has one type)."""
    if isinstance(value, str):
        return None if value in NO_NUMBER else value.encode("utf-8", "replace").decode()
    return value


def account() -> tuple[str, str | None]:
    """W&B's server and the key at hand for it (see `find_key`), by all that W&B reads."""
    # wandb reports its own errors to its makers, and looks up their host even when offline.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    logging.getLogger("wandb").propagate = False  # it keeps debug.log in its own folder
    settings = wandb.setup(settings=wandb.Settings(silent=True, quiet=True)).settings
    return settings.base_url, find_key(settings.base_url, settings.api_key)


def default_entity(key: str) -> str:
    """Under whose name W&B puts runs that name no entity."""
    import wandb

    if key:
        os.environ.setdefault("WANDB_API_KEY", key)  # which may come from netrc's other name
    return str(wandb.Api().default_entity)


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


def _json_value(value: Any) -> Any:
    """JSON has no nan and no infinity: they are written as "nan", "inf" and "-inf"."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
