"""W&B: one run there, the account, and artifacts. The only file that imports wandb.

It does so when a tracker that needs it starts, not before.
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
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rlhf.errors import ConfigError
from rlhf.metrics import HISTOGRAMS, METRICS

if TYPE_CHECKING:
    from rlhf.registry import Published

# A cluster node with a key but no route out should lose seconds, not wandb's 90 (start) or forever
# (finish). What is not uploaded by then stays in the run folder for `wandb sync`.
START_TIMEOUT_SECONDS = 20.0
FINISH_TIMEOUT_SECONDS = 60.0
SYSTEM_METRICS_SECONDS = 30.0  # between two looks at CPU, memory and GPU

# W&B's limits.
TAG_CHARACTERS, ALERT_CHARACTERS, ARTIFACT_CHARACTERS = 64, 63, 128

# wandb answers to two host names and `wandb login` writes either into netrc.
WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
NO_NUMBER = ("nan", "inf", "-inf")  # as metrics.jsonl has them


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
            before = self._online_folders()
            try:
                named = {"api_key": key} if key else {}
                self._init(wandb, "online", about, init_timeout=START_TIMEOUT_SECONDS, **named)
                return f"online, {self._run.url}"
            except Exception as error:
                wandb.teardown()  # or the id of the run would count as in use
                for folder in self._online_folders() - before:  # `rlhf sync` would think it sent
                    shutil.rmtree(folder, ignore_errors=True)
                if mode == "online":
                    raise ConfigError(
                        f"tracking.mode=online: W&B did not start ({first_line(error)}). Check "
                        "the network and the key (`wandb login`), or use `tracking.mode=offline`."
                    ) from error
                why = f" (W&B did not start: {first_line(error)})"
        self._init(wandb, "offline", about)
        return f"offline{why}; upload later: rlhf sync {about['name']}"

    def _online_folders(self) -> set[Path]:
        """Where processes that went online kept their part of this run."""
        return set(self._noted.parent.glob(f"run-*-{self._id}*"))

    def _init(self, wandb: Any, mode: str, about: dict[str, Any], **more: Any) -> None:
        online = mode == "online"
        self._run = wandb.init(
            **about | {"tags": [tag[:TAG_CHARACTERS] for tag in about["tags"]]},
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
    """Under whose name W&B puts runs that name no entity.

    Raises:
        ConfigError: it does not say.
    """
    import wandb

    if key:
        os.environ.setdefault("WANDB_API_KEY", key)  # which may come from netrc's other name
    entity = wandb.Api().default_entity
    if entity is None:
        raise ConfigError("W&B has no default entity for this key. Name one: --entity.")
    return str(entity)


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


def first_line(error: Exception) -> str:
    """What an error says, or what it is."""
    return (str(error) or type(error).__name__).splitlines()[0]
