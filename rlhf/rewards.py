"""What an answer is worth: reward models and functions of the user's, added by weight.

    score = sum over the terms of weight * term

A term is a reward model, an ensemble of several, or a Python function. Torch is imported where it
is used, so that a setting that cannot work is refused at once: a stage calls `load_functions` and
`rehearse` first, and makes `Rewards` once the models are loaded (`roles.load_reward_models`).
"""

from __future__ import annotations

import hashlib
import inspect
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config import RewardConfig
from rlhf.data import Row, Split, load_function
from rlhf.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from torch import Tensor, nn

LARGEST = (2 - 2**-23) * 2.0**127  # in fp32, beyond which a score would become inf


# ---------------------------------------------------------------- functions of the user's


@dataclass(frozen=True)
class Function:
    """A function of the user's, whose every value is checked.

    Attributes:
        setting: where it is named, such as reward.function.
        path: "path.py:function".
        call: (prompts, responses, rows) -> one number per response.
    """

    setting: str
    path: str
    call: Callable[..., Iterable[Any]]

    @property
    def fingerprint(self) -> str:
        """sha256 of its file: an edited reward is another run."""
        return hashlib.sha256(Path(self.path.rpartition(":")[0]).read_bytes()).hexdigest()

    def __call__(self, prompts: list[str], responses: list[str], rows: list[Row]) -> list[float]:
        """One finite number per response.

        Raises:
            ConfigError: it raises, or gives another number of values, or one that is no finite
                number. Names the function, the first row that is wrong, and the value.
        """
        asked = list(zip(prompts, responses, rows, strict=True))
        try:
            values = self._values(prompts, responses, rows)
        except (Exception, SystemExit) as error:  # an exit of its own would end the run as if well
            at = self._where(error)
            where = next((i for i, one in enumerate(asked) if self._fails(*one)), None)
            on = "on the rows together, on none alone" if where is None else _row(where, asked)
            raise self._refusal(f"raised {error!r}{at} {on}") from error
        if values is None or len(values) != len(asked):
            count = "no list" if values is None else f"{len(values)} values"
            raise self._refusal(f"gave {count} for {len(asked)} answers")
        numbers = [_number(value) for value in values]
        for i, number in enumerate(numbers):
            if number is None:
                raise self._refusal(f"gave {values[i]!r} {_row(i, asked)}")
        return [number for number in numbers if number is not None]

    def _values(
        self, prompts: list[str], responses: list[str], rows: list[Row]
    ) -> list[Any] | None:
        """What it gives, as a list; it gets lists of its own, to sort or empty as it likes."""
        values = self.call(list(prompts), list(responses), list(rows))
        return list(values) if isinstance(values, Iterable) else None

    def _fails(self, prompt: str, response: str, row: Row) -> bool:
        try:
            self._values([prompt], [response], [row])
        except (Exception, SystemExit):
            return True
        return False

    def _where(self, error: BaseException) -> str:
        """The last line of the function's own file that the error passed through."""
        file = Path(self.path.rpartition(":")[0])
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if _is(f, file)]
        return f" (line {lines[-1]})" if lines else ""

    def _refusal(self, what: str) -> ConfigError:
        return ConfigError(
            f"{self.setting}={self.path}: {what}. It is called with (prompts, responses, rows) and "
            "must give one number per response, finite in fp32; mend it."
        )


def _is(frame: traceback.FrameSummary, file: Path) -> bool:
    return Path(frame.filename).resolve() == file.resolve()


def _row(index: int, asked: list[tuple[str, str, Row]]) -> str:
    prompt, response, _ = asked[index]
    return f"for row {index} (prompt {_short(prompt)}, response {_short(response)})"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:40]} ... {text[-15:]}")


def _number(value: object) -> float | None:
    """A finite number, whatever it is made of (int, bool, numpy, a 0-d tensor); else None."""
    if isinstance(value, str | bytes):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if abs(number) <= LARGEST else None  # nan compares false


def load_functions(cfg: RewardConfig) -> dict[str, Function]:
    """term -> function. No torch, so a stage calls it first.

    Raises:
        ConfigError: no such file or function, or it cannot take (prompts, responses, rows).
    """
    functions = {}
    for name, (setting, path) in cfg.named_functions.items():
        function = Function(setting, path, load_function(setting, path))
        try:
            inspect.signature(function.call).bind([], [], [])
        except TypeError as error:
            raise function._refusal(f"cannot take three arguments: {error}") from error
        except ValueError:  # of a built-in, which does not tell
            pass
        functions[name] = function
    return functions


def rehearse(functions: dict[str, Function], rows: list[Row]) -> None:
    """Score an empty answer to each row, so that a missing column is found before any weight loads.

    Args:
        functions: as `load_functions` gives them.
        rows: of the data, with "prompt" messages; one is usually enough.

    Raises:
        ConfigError: a function fails, or gives no number.
    """
    for function in functions.values():
        function([last_turn(row) for row in rows], [""] * len(rows), rows)


def as_data(functions: dict[str, Function]) -> dict[str, Split]:
    """The files, as a run compares and records its data: an edited reward is another run."""
    return {f.setting: Split(f.setting, f.path, f.fingerprint, []) for f in functions.values()}


def last_turn(row: Row) -> str:
    """What a function sees as the prompt: the text of the last user turn."""
    return str(row["prompt"][-1]["content"])


# ---------------------------------------------------------------- scoring


@dataclass(frozen=True)
class Verdict:
    """What answers are worth; all in fp32.

    Attributes:
        scores: [B] the weighted sum.
        parts: term -> [B], before its weight.
        spread: [B] standard deviation over the ensemble's members; None without an ensemble.
    """

    scores: Tensor
    parts: dict[str, Tensor]
    spread: Tensor | None


@dataclass(frozen=True)
class Rewards:
    """Every term, ready to score.

    Attributes:
        cfg: the `reward` settings.
        functions: term -> function, by `load_functions`.
        models: reference -> frozen model with a scalar head, for all of `cfg.references`.
    """

    cfg: RewardConfig
    functions: dict[str, Function]
    models: dict[str, nn.Module]

    def __post_init__(self) -> None:
        assert list(self.functions) == list(self.cfg.named_functions), self.functions
        assert set(self.models) == set(self.cfg.references), self.models

    def score(
        self,
        ids: Tensor,
        mask: Tensor,
        prompts: list[str],
        responses: list[str],
        rows: list[Row],
        *,
        micro_batch_size: int,
    ) -> Verdict:
        """What this process's own rows are worth. All processes must call it together.

        Args:
            ids: [B, T] prompt and response.
            mask: [B, T] bool, True on real tokens.
            prompts: B texts, see `last_turn`.
            responses: B texts, as sampled.
            rows: B rows of the data, with all their columns.
            micro_batch_size: rows per forward pass of a reward model.

        Raises:
            ShapeError: not as many texts or rows as token sequences.
            ConfigError: a function fails, on any process, or gives what is no finite number.
        """
        import torch

        sizes = (len(ids), len(mask), len(prompts), len(responses), len(rows))
        if len(set(sizes)) > 1:
            raise ShapeError(
                f"ids, mask, prompts, responses and rows have {sizes} rows: must be as many."
            )
        parts = self._ask_functions(prompts, responses, rows, ids.device)
        said = {
            reference: _in_micro_batches(model, ids, mask, micro_batch_size)
            for reference, model in self.models.items()
        }
        spread = None
        for name, members in self.cfg.models.items():
            verdicts = torch.stack([said[reference] for reference in members])  # [M, B]
            parts[name] = combine(
                verdicts, ensemble=self.cfg.ensemble, std_coef=self.cfg.ensemble_std_coef
            )
            if len(members) > 1:
                spread = spread_of(verdicts)
        scores = torch.zeros(len(ids), device=ids.device)
        for name, part in parts.items():
            scores = scores + self.cfg.weights.get(name, 1.0) * part
        return Verdict(scores, parts, spread)

    def _ask_functions(
        self,
        prompts: list[str],
        responses: list[str],
        rows: list[Row],
        device: Any,
    ) -> dict[str, Tensor]:
        """term -> [B]. What fails on one process is refused on all: none waits, rank 0 says it."""
        import torch

        from rlhf import engine

        parts, problem = {}, None
        try:
            for name, function in self.functions.items():
                values = function(prompts, responses, rows)
                parts[name] = torch.tensor(values, dtype=torch.float32, device=device)
        except ConfigError as error:
            problem = error
        if self.functions:
            problems = [p for p in engine.gather_objects(problem and str(problem)) if p]
            if problems:
                raise ConfigError(problems[0]) from problem
        return parts


def _in_micro_batches(model: nn.Module, ids: Tensor, mask: Tensor, size: int) -> Tensor:
    """[B] the model's verdicts; columns that are padding in a whole micro-batch are left out."""
    import torch

    from rlhf import models

    out = torch.zeros(len(ids), device=ids.device)
    with torch.no_grad():
        for start in range(0, len(ids), size):
            rows = slice(start, start + size)
            real = mask[rows].any(0)
            out[rows] = models.scores(model, ids[rows][:, real], mask[rows][:, real])
    return out


def combine(verdicts: Tensor, *, ensemble: str, std_coef: float) -> Tensor:
    """One score [B] of the members' verdicts [M, B].

    "mean" and "min" are the mean and the worst case of Coste et al. 2023 ("Reward model ensembles
    help mitigate overoptimization"). "lower" is mean - std_coef * std, where they take off the
    variance: beside a standard deviation, std_coef has no unit.
    """
    if ensemble == "min":
        return verdicts.amin(0)
    if ensemble == "lower":
        return verdicts.mean(0) - std_coef * spread_of(verdicts)
    return verdicts.mean(0)


def spread_of(verdicts: Tensor) -> Tensor:
    """[B] standard deviation over the members of [M, B], which are all there are: divided by M."""
    return verdicts.std(0, correction=0)
