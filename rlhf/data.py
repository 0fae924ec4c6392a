"""Rows from disk: found, checked, brought to one shape. A bad row is never trained on in silence.

A row is one JSON object a line (.jsonl, .jsonl.gz) in TRL's conversational formats:
`messages` (SFT), `prompt` + `chosen` + `rejected` (RM), `prompt` (PPO). A plain string stands for
one message. No torch here: bad data is refused before a model is loaded.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import math
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from rlhf.config import ColumnsConfig, DataConfig, PPOConfig
from rlhf.errors import ConfigError, DataError

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": ...}
Row = dict[str, Any]  # of the data, with every column it had
ROLES = ("system", "user", "assistant")
LENGTHS = "data.max_prompt_tokens or data.max_response_tokens: longer rows are dropped and counted"
SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass
class Split:
    """The usable rows of one split and what became of the others.

    Attributes:
        name: train, validation or test.
        source: the file the rows came from.
        fingerprint: sha256 of that file.
        rows: in one shape per stage (see `READERS`), with every other column kept as it was.
        dropped: reason -> how many rows were not used.
    """

    name: str
    source: str
    fingerprint: str
    rows: list[dict[str, Any]]
    dropped: Counter[str] = field(default_factory=Counter)


def load(stage: str, cfg: DataConfig) -> dict[str, Split]:
    """Every split found at `data.path`, with at least train and validation.

    Args:
        stage: "sft", "rm" or "ppo"; it decides which columns a row must have.
        cfg: the `data` settings.

    Returns:
        {"train": ..., "validation": ..., and "test" for a reward model where there is one}.

    Raises:
        DataError: nothing at that path, or more bad rows than `data.max_bad_fraction`.
    """
    files = _files(Path(cfg.path))
    if stage != "rm":
        files.pop("test", None)  # nothing there looks at it
    splits = {name: _read(stage, name, file, cfg) for name, file in files.items()}
    if "validation" not in splits:
        splits["train"], splits["validation"] = _set_aside(splits["train"])
    if cfg.max_rows is not None:
        left_out = len(splits["train"].rows) - cfg.max_rows
        if left_out > 0:
            splits["train"].dropped["beyond data.max_rows"] += left_out
            splits["train"].rows = splits["train"].rows[: cfg.max_rows]
    for name in ("train", "validation"):
        if not splits[name].rows:
            raise DataError(f"data.path={cfg.path}: no usable row for {name}.")
    return splits


def demonstrations(
    ppo: PPOConfig, cfg: DataConfig, parent: Mapping[str, Any], *, named: str
) -> dict[str, Split]:
    """{"ptx": rows of SFT for PPO-ptx}; {} where `ppo.ptx_coef` is 0.

    Args:
        ppo: the `ppo` settings; without `ptx_data` the rows that the SFT run was trained on.
        cfg: the `data` settings of PPO.
        parent: the settings of the run that the policy comes from, flat.
        named: that run's reference.

    Raises:
        ConfigError: no rows are named, and the parent names none.
        DataError: there are none at that path, or they cannot be used.
    """
    if ppo.ptx_coef == 0:
        return {}
    path, columns = ppo.ptx_data, cfg.columns
    if path is None and parent.get("stage") == "sft" and parent.get("data.path"):
        path = str(parent["data.path"])
        columns = columns_of(parent)
    if path is None:
        raise ConfigError(
            f"ppo.ptx_coef={ppo.ptx_coef:g}: {named} does not tell which rows it was "
            "fine-tuned on. Name them: ppo.ptx_data=PATH."
        )
    own = replace(cfg, path=path, columns=columns, max_rows=None)
    try:
        split = load("sft", own)["train"]
    except DataError as error:
        raise DataError(f"ppo.ptx_data={path}: {error}") from error
    return {"ptx": replace(split, name="ptx")}


def held_out(cfg: DataConfig, split: str, *, whole: bool = False) -> Split:
    """Prompts that PPO did not learn from, to compare policies on.

    Args:
        split: validation or test.
        whole: `data.path` was named for this, so all rows of a single file are taken.

    Raises:
        DataError: there is no such split, or no usable row in it.
    """
    path = Path(cfg.path)
    files = _files(path)
    if whole and path.is_file():
        found = _read("ppo", "all", path, cfg)
    elif split in files:
        found = _read("ppo", split, files[split], cfg)
    elif split == "validation":
        found = _set_aside(_read("ppo", "train", files["train"], cfg))[1]
    else:
        raise DataError(f"data.path={cfg.path}: it has no {split} split, but {', '.join(files)}.")
    if not found.rows:
        raise DataError(f"data.path={cfg.path}: no usable row for {found.name}.")
    return found


def columns_of(config: Mapping[str, Any]) -> ColumnsConfig:
    """`data.columns` of a run's settings, flat."""
    names = {f.name: config.get(f"data.columns.{f.name}") for f in fields(ColumnsConfig)}
    return ColumnsConfig(**{name: value for name, value in names.items() if value})


def _files(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {"train": path}
    found = {}
    for split in ("train", "validation", "test"):
        names = [path / f"{split}{end}" for end in SUFFIXES]
        names += [path.parent / f"{path.name}.{split}{end}" for end in SUFFIXES]
        if file := next((name for name in names if name.is_file()), None):
            found[split] = file
    if "train" not in found:
        raise DataError(
            f"data.path={path}: no data there. Expected a .jsonl or .jsonl.gz file, a folder with "
            f"train.jsonl in it, or the start of file names such as {path}.train.jsonl."
        )
    return found


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error


def _read(stage: str, name: str, file: Path, cfg: DataConfig) -> Split:
    rows, bad = [], []
    reader = READERS[stage]
    for number, line in _lines(file):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise _Bad("the line", "is not a JSON object")
            rows.append({**row, **reader(row, cfg.columns)})
        except json.JSONDecodeError as error:
            bad.append(f"{file}:{number}: not JSON: {error.msg} at column {error.colno}")
        except _Bad as error:
            bad.append(f"{file}:{number}: {error}")
    accept_bad(bad, len(rows) + len(bad), cfg.max_bad_fraction)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Split(name, str(file), digest, rows, Counter({"bad row": len(bad)} if bad else {}))


def accept_bad(bad: list[str], total: int, max_bad_fraction: float) -> None:
    """Refuse when more than `max_bad_fraction` of `total` rows are bad.

    Raises:
        DataError: names the first rows, each with file, line, field and reason.
    """
    if bad and len(bad) > max_bad_fraction * total:
        shown = "\n  ".join(bad[:5])
        more = f"\n  ... and {len(bad) - 5} more" if len(bad) > 5 else ""
        enough = math.ceil(len(bad) / total * 1e6) / 1e6  # rounded up, so that it is
        raise DataError(
            f"{len(bad)} of {total} rows cannot be used:\n  {shown}{more}\n"
            f"Mend them, or drop them with data.max_bad_fraction={enough:g} or more "
            f"(now {max_bad_fraction:g})."
        )


def _set_aside(train: Split) -> tuple[Split, Split]:
    """A tenth of the prompts for validation, chosen by their hash: the same rows every time."""

    def held_out(row: dict[str, Any]) -> bool:
        text = row["prompt"][-1]["content"].casefold()
        return int(hashlib.sha256(" ".join(text.split()).encode()).hexdigest(), 16) % 10 == 0

    keep = [row for row in train.rows if not held_out(row)]
    aside = [row for row in train.rows if held_out(row)]
    validation = Split("validation", train.source, train.fingerprint, aside)
    return Split("train", train.source, train.fingerprint, keep, train.dropped), validation


# ---------------------------------------------------------------- one row


class _Bad(Exception):
    """Why one row cannot be used: field, reason."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field} {reason}")


def _messages(value: object, name: str, role: str) -> list[Message]:
    """Messages whose last one is by `role`; a string stands for one such message."""
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise _Bad(name, "is missing or is neither text nor a list of messages")
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise _Bad(name, f"has a message whose role is not one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise _Bad(name, "has a message without text content")
        if not message["content"].isascii() and re.search("[\ud800-\udfff]", message["content"]):
            raise _Bad(name, "has half a surrogate pair, which is no character")
    if value[-1]["role"] != role:
        raise _Bad(name, f"ends with the {value[-1]['role']}; the last turn must be the {role}'s")
    if not value[-1]["content"].strip():
        raise _Bad(name, "is empty" if len(value) == 1 else f"ends with an empty {role} turn")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _sft_row(row: dict[str, Any], columns: ColumnsConfig) -> dict[str, Any]:
    messages = _messages(row.get(columns.messages), columns.messages, "assistant")
    if len(messages) < 2:
        raise _Bad(columns.messages, "has an answer but no question")
    return {"prompt": messages[:-1], "response": messages[-1]["content"]}


def _preference_row(row: dict[str, Any], columns: ColumnsConfig) -> dict[str, Any]:
    chosen = _messages(row.get(columns.chosen), columns.chosen, "assistant")
    rejected = _messages(row.get(columns.rejected), columns.rejected, "assistant")
    if columns.prompt in row:
        prompt = _messages(row[columns.prompt], columns.prompt, "user")
    else:  # the prompt is what both conversations share
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        if shared == 0:
            raise _Bad(columns.prompt, "is missing, and the two answers share no first turn")
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        prompt = _messages(prompt, columns.prompt, "user")
    for name, turns in ((columns.chosen, chosen), (columns.rejected, rejected)):
        if len(turns) != 1:
            raise _Bad(name, "has more than the one answer after the prompt")
    if chosen == rejected:
        raise _Bad(columns.rejected, "is the same text as the chosen answer")
    return {
        "prompt": prompt,
        "chosen": chosen[0]["content"],
        "rejected": rejected[0]["content"],
    }


def _prompt_row(row: dict[str, Any], columns: ColumnsConfig) -> dict[str, Any]:
    if columns.prompt not in row and columns.messages in row:  # a file for SFT has prompts too
        return {"prompt": _sft_row(row, columns)["prompt"]}
    return {"prompt": _messages(row.get(columns.prompt), columns.prompt, "user")}


Reader = Callable[[dict[str, Any], ColumnsConfig], dict[str, Any]]
READERS: dict[str, Reader] = {"sft": _sft_row, "rm": _preference_row, "ppo": _prompt_row}


# ---------------------------------------------------------------- a function of the user's


def load_function(setting: str, value: str) -> Callable[..., list[float]]:
    """The function named by "path.py:function", such as a gold score.

    Args:
        setting: the name of the setting, for the error.
        value: its value.

    Raises:
        ConfigError: no such file, or no such function in it.
    """
    path, _, name = value.rpartition(":")
    file = Path(path)
    if file.suffix != ".py" or not file.is_file():
        raise ConfigError(f"{setting}={value}: no file {path or value}. Write path.py:function.")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{setting}={value}: {path} fails: {error!r}. Mend it.") from error
    if not callable(getattr(module, name, None)):
        raise ConfigError(f"{setting}={value}: {path} has no function {name}.")
    return getattr(module, name)


Gold = Callable[[list[str], list[str], list[dict[str, Any]]], list[float]]


def gold_function(cfg: DataConfig) -> Gold | None:
    """The measure that training never sees: (prompts, responses, rows) -> scores, if there is one.

    Raises:
        ConfigError: `data.gold` names no function.
    """
    return None if cfg.gold is None else load_function("data.gold", cfg.gold)


# ---------------------------------------------------------------- order


@dataclass(frozen=True, eq=False)
class PromptStream:
    """Prompts in an order that depends on seed and step alone: a resumed run goes on where it was.

    Attributes:
        prompts: token ids.
        seed: of the order; every pass over the prompts is shuffled anew.
    """

    prompts: list[list[int]]
    seed: int

    def batch(self, step: int, size: int) -> list[list[int]]:
        """The prompts of step 1, 2, ...: `size` of them, over all processes."""
        return [self.prompts[place] for place in self.places(step, size)]

    def places(self, step: int, size: int) -> list[int]:
        """Where each prompt of that batch stands in `prompts`, and its row in the data."""
        return [self._place(index) for index in range((step - 1) * size, step * size)]

    def _place(self, index: int) -> int:
        epoch, turn = divmod(index, len(self.prompts))
        return self._order(epoch)[turn]

    @cache  # noqa: B019  one stream lives as long as the process
    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.prompts)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order
