"""Tokens that a base model never saw, such as those of a chat template: found, and given rows.

With LoRA only their rows are trained, in the embedding and in the head (one and the same where the
two are tied), by peft. Methods that train neither refuse a template that writes such tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import EngineConfig
from rlhf.errors import ConfigError
from rlhf.methods.settings import MethodConfig
from rlhf.methods.table import METHODS

SMALL = 0.1  # of the median length of all rows
CLOSE = 0.05  # of the row's own length

# ---------------------------------------------------------------- which they are


def unseen(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Iterable[str],
    *,
    added: Collection[str] = (),
) -> list[int]:
    """Ids, in order, of the tokens that the base never saw.

    Those in `added`, and of `names` those whose row of the embedding looks untrained. A token that
    never occurs gets no gradient as an input: weight decay then shrinks its row towards 0. Where
    the head is the same matrix, all such tokens get the same gradient instead, and their rows end
    up as nearly one (Land and Bartolo 2024, "Fishing for Magikarp", look for the same two signs).
    So a row counts that is shorter than a tenth of the median row, or nearer to another one than a
    twentieth of its own length.

    Measured on two small Llamas with tied weights: of the tokens that never occur it finds 245 of
    276 and 449 of 550 (lengths alone: none). Of those that occur more than 100 times it takes 5 of
    214 and 2 of 730, all bytes of quotation marks or brackets, which come together; the nearest
    row to a special token that occurs is 0.28 of its length away. A row that stayed as it was drawn
    looks like any other and is not found: with untied weights and no weight decay, or after little
    training.

    Args:
        names: special tokens that the rows of training hold.
        added: tokens that the tokenizer was given just now.
    """
    weight = _rows(model)
    lengths = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
    median = lengths.median()

    def untrained(number: int) -> bool:
        if number >= len(weight) or lengths[number] < SMALL * median:
            return True
        return bool(_distance_to_another(weight, number) < CLOSE * lengths[number])

    ids = {name: _id(tokenizer, name) for name in dict.fromkeys([*added, *names])}
    return sorted({n for name, n in ids.items() if name in added or untrained(n)})


def _id(tokenizer: PreTrainedTokenizerBase, name: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(name))  # type: ignore[arg-type]


def _rows(model: PreTrainedModel) -> Tensor:
    """The embedding [V, H]."""
    embedding: Any = model.get_input_embeddings()
    weight: Tensor = embedding.weight.detach()
    return weight


def _distance_to_another(weight: Tensor, number: int) -> Tensor:
    """How far the nearest other row of `weight` [V, H] is from this one."""
    parts = []
    for start in range(0, len(weight), 8192):  # differences of all rows at once may be gigabytes
        part = weight[start : start + 8192].float() - weight[number].float()
        parts.append(torch.linalg.vector_norm(part, dim=1))
    distances = torch.cat(parts)
    distances[number] = torch.inf
    return distances.min()


def make_room(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Iterable[str],
    *,
    added: Collection[str],
    method: MethodConfig,
    engine: EngineConfig,
    note: Callable[[str], None],
) -> list[int]:
    """Find the tokens that the base never saw, say so, and give rows to those that have none.

    Args:
        names, added: as in `unseen`.

    Returns:
        Their ids, for `models.trainable`.

    Raises:
        ConfigError: the method cannot learn them.
    """
    if new := unseen(model, tokenizer, names, added=added):
        note(check(new, tokenizer, method, engine))
        grow(model, tokenizer)
    return new


def check(
    ids: Collection[int],
    tokenizer: PreTrainedTokenizerBase,
    method: MethodConfig,
    engine: EngineConfig,
) -> str:
    """What is done about the tokens that the base never saw, in words.

    Raises:
        ConfigError: the method, or its ZeRO stage, cannot learn them.
    """
    named = ", ".join(tokenizer.convert_ids_to_tokens(sorted(ids)))
    row = METHODS[method.name]
    if not row.new_tokens:
        raise ConfigError(
            f"method={method.name}: the template writes {named}, which the base model never saw, "
            "and this method trains neither embeddings nor the rows of the head, so they would "
            "mean nothing to it. Use method=lora or method=full, which learn them, or "
            "template=plain, which is written in words that the base knows."
        )
    if row.adapter and engine.zero_stage == 3:
        raise ConfigError(
            f"engine.zero_stage=3 with method={method.name}: the template writes {named}, which "
            "the base model never saw. peft copies their rows out of weights that are split over "
            "the processes, which fails without CUDA and again when they are saved "
            "(huggingface/peft#2603, huggingface/peft#2946). Use engine=zero2, or method=full, or "
            "template=plain."
        )
    return f"new tokens: {named}: their embeddings and head rows are trained"


# ---------------------------------------------------------------- rows for them


def grow(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Rows for the tokens that have none: near the mean of the others, drawn by torch's generator.

    A matrix that already has as many rows, or more, is left as it is.
    """
    if len(tokenizer) > len(_rows(model)):
        model.resize_token_embeddings(len(tokenizer))


def layers(model: PreTrainedModel, ids: Collection[int]) -> dict[str, list[int]] | None:
    """Layer -> trained rows, as peft's `trainable_token_indices` wants them; None without ids.

    Embedding and head are both named: peft knows by itself when they are one.

    Raises:
        ConfigError: the head has biases, which peft would drop.
    """
    if not ids:
        return None
    head: Any = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ConfigError(
            f"method: the template writes tokens that {type(model).__name__} never saw, and rows "
            "of its head cannot be trained alone, since it is no plain matrix "
            "(huggingface/peft#3649). Use method=full, or template=plain."
        )
    embedding = model.get_input_embeddings()
    return {
        name: sorted(ids) for name, module in model.named_modules() if module in (embedding, head)
    }


def mend(model: nn.Module) -> None:
    """TRL's loss asks the head for its bias, which peft's layer around it does not answer."""
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper):
            module.bias = None  # type: ignore[assignment]


def trained_in(adapter: Path) -> list[int]:
    """The ids whose rows an adapter's folder holds."""
    found: Any = getattr(
        peft.PeftConfig.from_pretrained(str(adapter)), "trainable_token_indices", None
    )
    lists = found.values() if isinstance(found, dict) else [found or []]
    return sorted({number for ids in lists for number in ids})
