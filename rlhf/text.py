"""Conversations to token ids, by one renderer for all stages: what the RM scores is the string it
was trained on, and what PPO samples continues the string that SFT was trained on.

A prompt and its answer are tokenized apart and then joined, because that is what sampling does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rlhf import loading
from rlhf.config import DataConfig, ModelConfig, TemplateConfig
from rlhf.data import Message, Split, accept_bad
from rlhf.errors import ConfigError, DataError, RegistryError
from rlhf.registry import Published

PAD_CANDIDATES = (
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<|vision_pad|>",
    "<|endoftext|>",
    "<unk>",
)


def load_tokenizer(
    path: str, *, template: TemplateConfig, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer at `path` with its chat template settled and a pad token that is not EOS.

    Raises:
        ConfigError: no tokenizer there, no EOS, no usable pad token, or no chat template.
    """
    tokenizer = loading.tokenizer(path, named=f"model.path={path}", revision=revision)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model.path={path}: its tokenizer has no end-of-sequence token, so an answer could "
            "never end. Set eos_token in tokenizer_config.json."
        )
    if template.chat_template is not None:
        tokenizer.chat_template = template.chat_template
    if not tokenizer.chat_template:
        raise ConfigError(
            f"template={template.name}: the tokenizer of {path} has no chat template. Choose "
            "template=plain (prompt, newline, answer), or give template.chat_template."
        )
    _settle_pad(tokenizer, path)
    return tokenizer


def _settle_pad(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    vocabulary = tokenizer.get_vocab()
    spare = (t for t in (*PAD_CANDIDATES, tokenizer.unk_token) if t in vocabulary)
    pad = next((token for token in spare if token != tokenizer.eos_token), None)
    if pad is None:
        raise ConfigError(
            f"model.path={path}: its tokenizer has no pad token apart from the end-of-sequence "
            f"token {tokenizer.eos_token!r}. Padding with EOS would hide real ends of answers. Set "
            "pad_token in tokenizer_config.json to an unused token."
        )
    tokenizer.pad_token = pad


def load_renderer(model: ModelConfig, template: TemplateConfig) -> tuple[Renderer, list[str]]:
    """The renderer of a base model, and the tokens that the template made its tokenizer learn.

    Raises:
        ConfigError: see `load_tokenizer`.
    """
    tokenizer = load_tokenizer(model.path, template=template, revision=model.revision)
    added = add_tokens(tokenizer, template)
    return Renderer(tokenizer), added


def longest(rendered: Mapping[str, Sequence[Any]]) -> int:
    """Tokens of the longest sequence in splits as a `Renderer` gives them."""
    return max(map(len, sequences(rendered)))


def sequences(rendered: Mapping[str, Sequence[Any]]) -> list[list[int]]:
    """Every sequence of token ids in splits as a `Renderer` gives them."""
    names = ("input_ids", "chosen_ids", "rejected_ids")
    found = []
    for row in (row for split in rendered.values() for row in split):
        found += [row[name] for name in names if name in row] if isinstance(row, dict) else [row]
    return found


def add_tokens(tokenizer: PreTrainedTokenizerBase, template: TemplateConfig) -> list[str]:
    """Make special tokens, one id each, of `template.tokens`; those the tokenizer did not have."""
    known = set(tokenizer.get_vocab())
    plain = [token for token in template.tokens if token not in tokenizer.all_special_tokens]
    if plain:
        tokenizer.add_special_tokens(
            {"extra_special_tokens": plain}, replace_extra_special_tokens=False
        )
    return [token for token in plain if token not in known]


def written(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Sequence[int]]) -> list[str]:
    """The special tokens in rendered rows: what the template wrote, however it puts it together.

    Every base knows its own BOS and EOS: these two count only where the template spells them out.
    """
    there = {number for ids in rows for number in ids}
    template = str(tokenizer.chat_template)
    own = {tokenizer.bos_token, tokenizer.eos_token}
    special = {n: str(t) for n, t in tokenizer.added_tokens_decoder.items() if t.special}
    return [
        token
        for number, token in sorted(special.items())
        if number in there and (token not in own or token in template)
    ]


@dataclass(frozen=True)
class Renderer:
    """Turns conversations into token ids.

    Attributes:
        tokenizer: with a chat template, EOS, and a pad token that is not EOS.
    """

    tokenizer: PreTrainedTokenizerBase

    @property
    def eos_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def prompt(self, messages: list[Message]) -> list[int]:
        """Token ids of a conversation up to where the answer starts, BOS at most once."""
        text = self._text(messages, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        if bos is not None and bos != self.eos_id and ids[:2] == [bos, bos]:
            raise ConfigError("template: it renders the beginning-of-sequence token twice.")
        return list(ids)

    def response(self, messages: list[Message], answer: str) -> list[int]:
        """Token ids of an answer, ending with exactly one EOS."""
        before = self._text(messages, add_generation_prompt=True)
        turn = {"role": "assistant", "content": answer}
        full = self._text([*messages, turn], add_generation_prompt=False)
        if not full.startswith(before):
            raise ConfigError(
                "template: an answered conversation does not start with the text of the same "
                "conversation before its answer, so training and sampling would differ. Choose "
                "another template."
            )
        text = full[len(before) :]
        eos = str(self.tokenizer.eos_token)
        text = text[: text.rindex(eos)] if eos in text else text
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, self.eos_id]

    def decode(self, ids: list[int]) -> str:
        """The text of sampled tokens, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _text(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def _special_token_in(self, row: dict[str, Any]) -> str | None:
        texts = [message["content"] for message in row["prompt"]]
        texts += [row[name] for name in ("response", "chosen", "rejected") if name in row]
        special = self.tokenizer.all_special_tokens
        return next((token for token in special for text in texts if token in text), None)

    # ------------------------------------------------------------ whole splits

    def sft(self, split: Split, cfg: DataConfig) -> list[dict[str, list[int]]]:
        """{"input_ids", "completion_mask"} per row; mask 1 on the answer and its EOS."""

        def render(row: dict[str, Any]) -> dict[str, list[int]]:
            prompt = self.prompt(row["prompt"])
            answer = self.response(row["prompt"], row["response"])
            self._fits(prompt, [answer], cfg)
            return {
                "input_ids": prompt + answer,
                "completion_mask": [0] * len(prompt) + [1] * len(answer),
            }

        return self._render(split, cfg, render)

    def pairs(self, split: Split, cfg: DataConfig) -> list[dict[str, list[int]]]:
        """{"chosen_ids", "rejected_ids"} per row: prompt, answer, EOS."""

        def render(row: dict[str, Any]) -> dict[str, list[int]]:
            prompt = self.prompt(row["prompt"])
            chosen = self.response(row["prompt"], row["chosen"])
            rejected = self.response(row["prompt"], row["rejected"])
            self._fits(prompt, [chosen, rejected], cfg)
            return {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}

        return self._render(split, cfg, render)

    def prompts(self, split: Split, cfg: DataConfig) -> list[list[int]]:
        """Token ids of each prompt."""

        def render(row: dict[str, Any]) -> list[int]:
            prompt = self.prompt(row["prompt"])
            self._fits(prompt, [], cfg)
            return prompt

        return self._render(split, cfg, render)

    @staticmethod
    def _fits(prompt: list[int], answers: list[list[int]], cfg: DataConfig) -> None:
        if len(prompt) > cfg.max_prompt_tokens:
            raise _TooLong(f"prompt longer than data.max_prompt_tokens={cfg.max_prompt_tokens}")
        if any(len(answer) > cfg.max_response_tokens for answer in answers):
            raise _TooLong(f"answer longer than data.max_response_tokens={cfg.max_response_tokens}")

    def _render(self, split: Split, cfg: DataConfig, render: Any) -> list[Any]:
        """Render every row; what does not fit is taken out of `split` and counted there."""
        kept, out, bad, refused = [], [], [], 0
        dropped: Counter[str] = Counter()
        for number, row in enumerate(split.rows, start=1):
            if token := self._special_token_in(row):
                bad.append(f"{split.source}: row {number}: its text contains the token {token!r}")
                continue
            try:
                out.append(render(row))
                kept.append(row)
            except _TooLong as error:
                dropped[str(error)] += 1
            except TemplateError as error:  # its roles or their order
                bad.append(f"{split.source}: row {number}: the chat template refuses it: {error}")
                refused += 1
        accept_bad(bad, len(split.rows), cfg.max_bad_fraction)
        if refused:
            dropped["refused by the chat template"] += refused
        if len(bad) > refused:
            dropped["special token in the text"] += len(bad) - refused
        if not out:
            raise DataError(
                f"{split.source}: no row of {split.name} is left: {dict(dropped)}. Raise "
                "data.max_prompt_tokens or data.max_response_tokens."
            )
        split.rows = kept
        split.dropped += dropped
        return out


class _TooLong(Exception):
    """A row beyond the length limits: dropped and counted, not refused."""


def load_parent_tokenizer(
    parent: Published, *, template: TemplateConfig
) -> PreTrainedTokenizerBase:
    """The tokenizer that a run published, with the template it was trained with.

    Raises:
        ConfigError: `template` is given here and is another one.
        RegistryError: tokenizer or template are not those that the run recorded.
    """
    tokenizer = loading.tokenizer(parent.tokenizer_dir, named=parent.reference)
    recorded = dataclasses.asdict(parent.manifest.tokenizer)
    now = tokenizer_facts(tokenizer)
    off = [name.removesuffix("_hash") for name in recorded if recorded[name] != now[name]]
    if off:
        raise RegistryError(
            f"{parent.reference}: its {' and '.join(off)} in {parent.tokenizer_dir} changed after "
            "it was trained: other text would be read than it learnt on. Restore the files, or "
            f"train {parent.reference} again."
        )
    asked = template.chat_template
    if asked is None or asked == tokenizer.chat_template:
        return tokenizer
    raise ConfigError(
        f"template={template.name}: {parent.reference} was trained with another template, and all "
        "stages of a line must read the same text. Leave template out to inherit it, or train "
        f"the SFT run with template={template.name}."
    )


def renderers(
    sft: Published, rms: Sequence[Published], template: TemplateConfig
) -> tuple[Renderer, dict[str, Renderer]]:
    """The policy's renderer, and reference -> that of each reward model with its own tokenizer."""
    readers = {rm.reference: Renderer(load_parent_tokenizer(rm, template=template)) for rm in rms}
    return Renderer(load_parent_tokenizer(sft, template=template)), readers


def published_facts(model_dir: Path) -> dict[str, Any]:
    """`tokenizer_facts` of what was written, as every child will load it."""
    return tokenizer_facts(loading.tokenizer(model_dir, named=str(model_dir)))


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What two stages must have in common: hashes of tokenizer and template, special ids."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for passing in ("padding", "truncation"):  # left over from the last call
        state.pop(passing, None)
    return {
        "tokenizer_hash": _sha256(json.dumps(state)),
        "template_hash": _sha256(str(tokenizer.chat_template)),
        "pad_id": tokenizer.pad_token_id,
        "eos_id": tokenizer.eos_token_id,
        "bos_id": tokenizer.bos_token_id,
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
