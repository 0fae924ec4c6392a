"""Whatever is loaded by a name or from a folder is JSON and safetensors: no code of its own, no
pickles, and no question about it. The one file that calls `from_pretrained` of transformers.

A model's folder may ask for Python of its own to be run (`auto_map`), and transformers, where it is
told nothing, asks on the terminal whether to. It may name an attention kernel, which is code that
is fetched from the model hub. Weights in .bin or .pt are pickles. None of them is ever taken; what
transformers knows by itself is loaded without the code that comes along.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf import libraries
from rlhf.errors import ConfigError
from rlhf.manifest import PICKLES

NO_CODE: dict[str, Any] = {"trust_remote_code": False}  # None would ask
KERNELS = ("attn_implementation", "_attn_implementation")


def changed() -> Iterator[str]:
    """What this file relies on in transformers, and is not there: lines."""
    yield from libraries.lacking(PreTrainedConfig, "get_config_dict")
    options = ("output_loading_info", "use_safetensors", "trust_remote_code")
    yield from libraries.unmentioned(PreTrainedModel, *options)


def tokenizer(
    path: str | Path, *, named: str, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`.

    Args:
        named: what an error begins with: a setting and its value.

    Raises:
        ConfigError: none could be loaded, or not without code of its own.
    """
    try:
        made = AutoTokenizer.from_pretrained(path, revision=revision, **NO_CODE)
    except (OSError, ValueError, KeyError) as error:
        raise _refusal(named, "tokenizer", path, error) from error
    made.init_kwargs.pop("auto_map", None)  # or what is published would ask for code
    return made


def model(auto: Any, path: str | Path, *, named: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model at `path`, and transformers' report of its weights.

    Args:
        auto: which Auto class of transformers.
        named: what an error begins with: a setting and its value.
        options: of `from_pretrained`.

    Raises:
        ConfigError: none could be loaded, or not without code of its own or pickles.
    """
    try:
        about, _ = PreTrainedConfig.get_config_dict(path, revision=options.get("revision"))
        for kernel in _kernels(about):
            raise ConfigError(
                f"{named}: its config.json names the attention kernel {kernel}: code that would be "
                "fetched from the model hub, and is never run here. Remove attn_implementation "
                "from config.json; model.attn chooses one that transformers has."
            )
        made, report = auto.from_pretrained(
            path, use_safetensors=True, output_loading_info=True, **NO_CODE, **options
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _refusal(named, "model", path, error) from error
    if hasattr(made.config, "auto_map"):
        del made.config.auto_map  # or what is published would ask for code
    return made, report


def _kernels(about: dict[str, Any]) -> Iterator[str]:
    """Kernels of the hub, by OWNER/NAME, that a config names for the model or a part of it."""
    for key, value in about.items():
        if isinstance(value, dict):
            yield from _kernels(value)
        elif key in KERNELS and "/" in str(value):
            yield str(value)


def _refusal(named: str, what: str, path: str | Path, error: Exception) -> ConfigError:
    text = str(error)
    if "trust_remote_code" in text:
        return ConfigError(
            f"{named}: it asks for Python code of its own to be run (auto_map in config.json or "
            "tokenizer_config.json), which is never done here. Take a model whose architecture "
            "transformers knows, or convert it to one and save that with save_pretrained."
        )
    folder = Path(path)
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix.lower() in PICKLES)
    if "named model.safetensors" in text and (pickles or not folder.is_dir()):
        listed = f" ({', '.join(pickles[:3])})" if pickles else ""
        return ConfigError(
            f"{named}: it has no safetensors. Weights in .bin or .pt{listed} are pickles, which "
            "can run code when they are loaded, and are never taken. Load it with transformers "
            "where you trust it, save_pretrained it to a new folder, and give that."
        )
    first = text.strip().partition("\n")[0]
    return ConfigError(f"{named}: no {what} could be loaded: {first}")
