"""Soft prompts: trained vectors before the text, of which the model's weights know nothing.

prompt_tuning (Lester et al. 2021) and p_tuning (Liu et al. 2021) put P embeddings before the first
token's; prefix_tuning (Li and Liang 2021) and p_tuning_v2 (Liu et al. 2022) put P keys and values
before those of every layer. The vectors, and the networks that make them, are peft's. How they
enter is ours: peft's forward drops position ids, pools a reward at a pad, and is passed by whenever
the decoder is called directly. Here they enter at the door of the decoder, by hooks, and every way
of running the model is right under any padding:

    attention   P ones before the mask: every token sees the prompt, and pads stay unseen
    positions   0 .. P-1 for prompt embeddings, and P more for text; keys and values have none
    outputs     those of the text alone, [B, T, ...]
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from rlhf import libraries
from rlhf.errors import ConfigError, ShapeError
from rlhf.methods.settings import ADAPTER, PrefixConfig, PromptConfig, PTuningConfig

SMALL = 0.02  # standard deviation of a fresh prefix; as weights of transformers are drawn
Settings = PrefixConfig | PromptConfig | PTuningConfig
KeysAndValues = list[tuple[Tensor, Tensor]]  # of each layer, [1, heads, P, width of a head]

# What decoders call the keys and values of the text so far: since transformers 5.24, and before.
CACHE_NAMES = ("cache", "past_key_values")


def changed() -> Iterator[str]:
    """What soft prompts rely on in peft and transformers, and is not there: lines."""
    from transformers import LlamaModel

    arguments = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "use_cache")
    yield from libraries.refusing(LlamaModel.forward, *arguments, "|".join(CACHE_NAMES))
    yield from libraries.refusing(DynamicCache.__init__, "config")
    yield from libraries.refusing(DynamicCache.update, "key_states", "value_states", "layer_idx")
    yield from libraries.refusing(peft.PeftModel.get_prompt, "batch_size")
    yield from libraries.refusing(peft.PeftModel.get_prompt_embedding_to_save, "adapter_name")
    yield from libraries.unmentioned(peft.PeftModel, "prompt_encoder", "active_peft_config")
    yield from libraries.refusing(ModulesToSaveWrapper.enable_adapters, "enabled")
    yield from libraries.unmentioned(PreTrainedModel, "gradient_checkpointing")


# ---------------------------------------------------------------- on a model


def attach(
    model: PreTrainedModel,
    cfg: Settings,
    *,
    head: bool,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> peft.PeftModel:
    """Freeze `model` and put a new soft prompt before its text.

    Args:
        model: a transformers model; its decoder gets the hooks.
        cfg: the `method` settings.
        head: the model ends in a scalar head (`score`), which is then trained in full.
        tokenizer: reads `method.text`; not needed without.

    Raises:
        ConfigError: the model cannot take a soft prompt, or `method.text` cannot be read.
    """
    tokens = _tokens_of(cfg, tokenizer)
    prompted = _put_on(model, _peft_config(cfg), head=head, name=cfg.name)
    if isinstance(cfg, PromptConfig):
        _begin_as(prompted, tokens, cfg.tokens)
    elif isinstance(cfg, PrefixConfig) and cfg.name == "p_tuning_v2":
        _begin_small(prompted)
    return prompted


def _peft_config(cfg: Settings) -> peft.PromptLearningConfig:
    if isinstance(cfg, PrefixConfig):
        return peft.PrefixTuningConfig(
            num_virtual_tokens=cfg.tokens,
            encoder_hidden_size=cfg.hidden,
            prefix_projection=cfg.name == "prefix_tuning",
        )
    if isinstance(cfg, PromptConfig):
        return peft.PromptTuningConfig(
            num_virtual_tokens=cfg.tokens, prompt_tuning_init=peft.PromptTuningInit.RANDOM
        )
    return peft.PromptEncoderConfig(
        num_virtual_tokens=cfg.tokens,
        encoder_reparameterization_type=cfg.encoder.upper(),
        encoder_hidden_size=cfg.hidden,  # type: ignore[arg-type]  # None: that of the model
    )


def _put_on(
    model: PreTrainedModel, config: peft.PromptLearningConfig, *, head: bool, name: str
) -> SoftPrompt:
    _refuse_unfit(model, config, name)
    kind, task = (SoftPromptWithHead, "SEQ_CLS") if head else (SoftPromptCausalLM, "CAUSAL_LM")
    config.task_type = peft.TaskType(task)
    prompted: SoftPrompt = kind(model, config, ADAPTER)  # which freezes the model
    prompted.rehearse(name)
    return prompted


def _tokens_of(cfg: Settings, tokenizer: PreTrainedTokenizerBase | None) -> list[int] | None:
    """The token ids of `method.text`, None where there is no text."""
    text = cfg.text if isinstance(cfg, PromptConfig) else None
    if text is None:
        return None
    if tokenizer is None:
        raise ConfigError(
            f"method.text={text!r}: no tokenizer is at hand to read it. Use method.text=null, "
            "which begins with tokens drawn at random."
        )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigError(
            f"method.text={text!r}: the tokenizer makes no token of it. Use a text with words, or "
            "null to begin with tokens drawn at random."
        )
    return ids


@torch.no_grad()
def _begin_as(prompted: SoftPrompt, ids: list[int] | None, count: int) -> None:
    """Let the prompt begin as embeddings of the model: of these tokens, or of random ones."""
    words: Any = prompted.backbone.get_input_embeddings()
    if ids is None:
        chosen = torch.randint(words.weight.shape[0], (count,))
    else:
        chosen = torch.tensor(ids).repeat(-(-count // len(ids)))[:count]
    encoder: Any = prompted.encoder
    encoder.embedding.weight.copy_(words(chosen.to(words.weight.device)))


@torch.no_grad()
def _begin_small(prompted: SoftPrompt) -> None:
    """Let a prefix begin near zero: it takes a share of the attention, and adds nothing yet.

    peft draws its keys and values from N(0, 1), which can be so long that nothing else is attended
    to: a small Llama began at a loss of 7.0 instead of 1.4.
    """
    encoder: Any = prompted.encoder
    encoder.embedding.weight.normal_(0, SMALL)


def _refuse_unfit(model: PreTrainedModel, config: peft.PromptLearningConfig, name: str) -> None:
    """Say why this model cannot take a soft prompt, before anything is changed."""
    backbone = getattr(model, model.base_model_prefix, None)
    taken = arguments_of(backbone) if backbone is not None else ()
    why = ""
    if missing := lacking(taken):
        why = f"its decoder takes no {', '.join(missing)}"
    elif any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        why = (
            "some of its layers do not see the whole text (a sliding window, say), and would lose "
            "the prompt at a place that depends on padding"
        )
    elif not _is_prefix(config) and _embedding_width(model) != model.config.hidden_size:
        why = (
            f"its embeddings have {_embedding_width(model)} numbers, its hidden states "
            f"{model.config.hidden_size}"
        )
    if why:
        raise _unfit(model, name, why)


def arguments_of(decoder: nn.Module | type[nn.Module]) -> tuple[str, ...]:
    """What the forward pass of a decoder takes, in order."""
    return tuple(name for name in inspect.signature(decoder.forward).parameters if name != "self")


def lacking(taken: Collection[str]) -> list[str]:
    """What a soft prompt enters by, and these arguments of a decoder are without."""
    needed = ("inputs_embeds", "attention_mask", "position_ids")
    missing = [name for name in needed if name not in taken]
    return missing if cache_argument(taken) else [*missing, " or ".join(CACHE_NAMES)]


def cache_argument(taken: Collection[str]) -> str | None:
    """The one of these names that is of the keys and values of the text so far."""
    return next((name for name in CACHE_NAMES if name in taken), None)


def _embedding_width(model: PreTrainedModel) -> int:
    words: Any = model.get_input_embeddings()
    return words.weight.shape[1]


def _unfit(model: PreTrainedModel, name: str, why: str) -> ConfigError:
    return ConfigError(
        f"method.name={name}: {type(model).__name__} cannot take a soft prompt: {why}. "
        "Use another method; method=lora asks nothing of the kind."
    )


def _is_prefix(config: Any) -> bool:
    return config.peft_type == peft.PeftType.PREFIX_TUNING


# ---------------------------------------------------------------- the model with its prompt


class SoftPrompt(peft.PeftModel):
    """peft's model, with its prompt at the door of the decoder rather than in `forward`."""

    def __init__(self, model: PreTrainedModel, config: Any, name: str, **options: Any) -> None:
        super().__init__(model, config, name, **options)
        self.prompted = True  # off inside disable_adapter
        self.added = 0  # embeddings put before the text in the pass that is under way
        self.keeps_cache = True  # False: its caller asked for none, and gets none back
        self.arguments = arguments_of(self.backbone)
        self.cache_argument = cache_argument(self.arguments) or CACHE_NAMES[0]
        # Methods rather than functions: a deep copy of the model then has hooks of its own.
        self.backbone.register_forward_pre_hook(self._enter, with_kwargs=True)
        self.backbone.register_forward_hook(self._leave)

    @property
    def backbone(self) -> PreTrainedModel:
        """The decoder, without its head."""
        inner: Any = self.get_base_model()
        return getattr(inner, inner.base_model_prefix)

    @property
    def encoder(self) -> nn.Module:
        """What is trained: the prompt, or the network that makes it."""
        encoders: Any = self.prompt_encoder
        return encoders[ADAPTER]

    @property
    def tokens(self) -> int:
        """P."""
        return self.active_peft_config.num_virtual_tokens

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_model()(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        inner: Any = self.get_base_model()
        own = inner.generation_config
        inner.generation_config = self.generation_config  # which a caller may have replaced
        try:
            return inner.generate(*args, **kwargs)
        finally:
            inner.generation_config = own

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The model as it was before `attach`, its head too, bit for bit."""
        heads = [part for part in self.modules() if isinstance(part, ModulesToSaveWrapper)]
        trained = [(weight, weight.requires_grad) for part in heads for weight in part.parameters()]
        before, self.prompted = self.prompted, False
        for part in heads:
            part.enable_adapters(False)
        try:
            yield
        finally:
            self.prompted = before
            for part in heads:
                part.enable_adapters(before)
            for weight, was in trained:  # which switching changes
                weight.requires_grad_(was)

    # The prompt is always computed in one way: an LSTM rounds differently with and without
    # gradients, and a product with the size of the batch. So what is saved is what was used.

    def embeddings(self) -> Tensor:
        """[1, P, H] of virtual tokens."""
        with torch.enable_grad():
            prompt: Tensor = self.get_prompt(1)
        return prompt if torch.is_grad_enabled() else prompt.detach()

    def keys_and_values(self) -> KeysAndValues:
        """Of virtual tokens, for each layer."""
        with torch.enable_grad():
            found = [(keys, values) for keys, values, *_ in self.get_prompt(1)]
        if torch.is_grad_enabled():
            return found
        return [(keys.detach(), values.detach()) for keys, values in found]

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        with torch.enable_grad():
            return super().get_prompt_embedding_to_save(adapter_name)

    def rehearse(self, name: str) -> None:
        """One pass over two tokens.

        Raises:
            ConfigError: it fails; the prompt has not the shape that this model wants.
        """
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.device)
        try:
            with torch.no_grad():
                self.backbone(input_ids=ids)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            base: Any = self.get_base_model()
            reason = f"a pass with {self.tokens} virtual tokens fails: {str(error).rstrip('.')}"
            raise _unfit(base, name, reason) from error

    # ------------------------------------------------------------ the door

    def _enter(
        self, backbone: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """The decoder's inputs, with the prompt in them; with a cache that is begun, it is there
        already, and only counts."""
        self.added, self.keeps_cache = 0, True
        if not self.prompted:
            return None
        kwargs = dict(zip(self.arguments, args, strict=False)) | kwargs
        # By the name the decoder knows now, whichever its caller has used.
        caches = [kwargs.pop(name, None) for name in CACHE_NAMES]
        past = next((cache for cache in caches if cache is not None), None)
        kwargs[self.cache_argument] = past
        seen = 0 if past is None else int(past.get_seq_length())  # P virtual tokens included
        mask, positions = self._mask_and_positions(kwargs, text_seen=seen and seen - self.tokens)
        ones = mask.new_ones(len(mask), self.tokens)
        kwargs["attention_mask"] = torch.cat([ones, mask], dim=1)  # [B, P + S]
        if _is_prefix(self.active_peft_config):
            kwargs["position_ids"] = positions
            if not seen:
                self._fill_cache(backbone, kwargs, rows=len(mask))
        else:
            kwargs["position_ids"] = positions + self.tokens
            if not seen:
                self._prepend(backbone, kwargs)
        return (), kwargs

    def _mask_and_positions(
        self, kwargs: dict[str, Any], *, text_seen: int
    ) -> tuple[Tensor, Tensor]:
        """The mask [B, S] of all text so far, and positions [B, T] of the tokens given now."""
        given = kwargs.get("input_ids")
        given = kwargs["inputs_embeds"] if given is None else given
        rows, width = given.shape[:2]
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is None:  # generate drops it where nothing is padded
            mask = torch.ones(rows, text_seen + width, dtype=torch.long, device=given.device)
        if mask.shape != (rows, text_seen + width):
            raise ShapeError(
                f"attention_mask of shape {tuple(mask.shape)}: with a soft prompt it must be "
                f"{(rows, text_seen + width)}, a number for each token of the text so far."
            )
        if positions is None:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -width:]
        return mask, positions.expand(rows, -1)

    def _prepend(self, backbone: PreTrainedModel, kwargs: dict[str, Any]) -> None:
        """Embeddings of virtual tokens before those of the text."""
        text, positions = kwargs.get("inputs_embeds"), kwargs["position_ids"]
        if text is None:
            words: Any = backbone.get_input_embeddings()
            text = words(kwargs["input_ids"])  # [B, T, H]
        prompt = self.embeddings().to(text.dtype).expand(len(text), -1, -1)  # [B, P, H]
        own = torch.arange(self.tokens, device=positions.device).expand(len(text), -1)
        kwargs["input_ids"] = None
        kwargs["inputs_embeds"] = torch.cat([prompt, text], dim=1)
        kwargs["position_ids"] = torch.cat([own, positions], dim=1)
        self.added = self.tokens

    def _fill_cache(self, backbone: PreTrainedModel, kwargs: dict[str, Any], *, rows: int) -> None:
        """Keys and values of virtual tokens, as if the model had seen them before the text."""
        recomputed = any(
            getattr(part, "gradient_checkpointing", False) for part in backbone.modules()
        )
        if backbone.training and recomputed:
            raise ConfigError(
                "engine.checkpointing=true: a prefix is keys and values in a cache, and layers "
                "that are computed again have none. Use engine.checkpointing=false."
            )
        if kwargs[self.cache_argument] is None:
            kwargs[self.cache_argument] = DynamicCache()
            wanted = kwargs.get("use_cache")
            self.keeps_cache = backbone.config.use_cache if wanted is None else wanted
        for layer, (keys, values) in enumerate(self.keys_and_values()):
            kwargs[self.cache_argument].update(
                keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer
            )

    def _leave(self, backbone: PreTrainedModel, args: tuple[Any, ...], output: Any) -> Any:
        """The decoder's outputs at the text alone: [B, T, H]."""
        changes: dict[str, Any] = {}
        if self.added:
            # Contiguous: else a head rounds differently where it is trained and where it is frozen.
            changes["last_hidden_state"] = output.last_hidden_state[:, self.added :].contiguous()
            if output.hidden_states is not None:
                changes["hidden_states"] = tuple(x[:, self.added :] for x in output.hidden_states)
            if output.attentions is not None:  # [B, heads, T, P + T]
                changes["attentions"] = tuple(x[:, :, self.added :] for x in output.attentions)
        if not self.keeps_cache:
            changes[cache_argument(output.keys()) or self.cache_argument] = None
        return type(output)(**(dict(output) | changes)) if changes else output


class SoftPromptCausalLM(SoftPrompt, peft.PeftModelForCausalLM):
    """A language model with a soft prompt."""


class SoftPromptWithHead(SoftPrompt, peft.PeftModelForSequenceClassification):
    """A model with a scalar head and a soft prompt."""


# ---------------------------------------------------------------- saved, and put back


def load(model: PreTrainedModel, folder: Path, *, head: bool, trained: bool) -> peft.PeftModel:
    """`model` with the prompt that was saved in `folder`, the same to the bit.

    peft saves the vectors, not the network that made them. So they go on as they are: what p_tuning
    made as prompt_tuning, what prefix_tuning made as p_tuning_v2.

    Args:
        model: what the prompt was trained on, with or without a scalar head.
        folder: as `save_pretrained` wrote it.
        head: `model` ends in a scalar head. It becomes the one in the folder; where there is none,
            as after SFT, it stays as it is. Without `head` one in the folder is left there.
        trained: prompt and head are to be trained further; else all is frozen.

    Raises:
        ConfigError: the folder holds no soft prompt, or one that does not fit the model.
    """
    saved = peft.PeftConfig.from_pretrained(str(folder))
    if not isinstance(saved, peft.PromptLearningConfig):
        raise ConfigError(f"{folder}: an adapter of type {saved.peft_type}, not a soft prompt.")
    name = "p_tuning_v2" if _is_prefix(saved) else "prompt_tuning"
    kind = PrefixConfig if _is_prefix(saved) else PromptConfig
    config = _peft_config(kind(name=name, tokens=saved.num_virtual_tokens))
    prompted = _put_on(model, config, head=head, name=name)
    own = peft.get_peft_model_state_dict(prompted, save_embedding_layers=False)
    found = load_file(Path(folder) / "adapter_model.safetensors")
    found = {key: weight for key, weight in found.items() if key in own}
    for key, weight in found.items():
        if weight.shape != own[key].shape:
            raise ConfigError(
                f"{folder}: {key} has shape {tuple(weight.shape)}, and {type(model).__name__} "
                f"needs {tuple(own[key].shape)}. It was trained on another model: use that one."
            )
    peft.set_peft_model_state_dict(prompted, own | found, adapter_name=ADAPTER)
    if not trained:
        prompted.requires_grad_(False)
    return prompted


def state(model: nn.Module) -> dict[str, Tensor]:
    """All that is trained, by name: the prompt or the network that makes it, and the head.

    For going on in the middle of a run. The files of `save_pretrained` hold less than that.
    """
    return {
        name: weight.detach().clone()
        for name, weight in model.state_dict().items()
        if name.startswith("prompt_encoder.") or ".modules_to_save." in name
    }


def restore(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Put back, in place, what `state` gave.

    Raises:
        ConfigError: it is of a model with another soft prompt.
    """
    own = state(model)
    differ = sorted(own.keys() ^ saved.keys())
    differ += [key for key in own.keys() & saved.keys() if own[key].shape != saved[key].shape]
    if differ:
        raise ConfigError(
            f"method: what was saved is of another soft prompt, it differs in {differ[0]}. Go on "
            "with the settings of `method` that the run began with."
        )
    model.load_state_dict(saved, strict=False)
