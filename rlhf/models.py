"""Models: loading, adapters, the scalar head, forward passes, publishing.

A published `model/` folder holds whole weights that plain transformers loads: adapters are merged
(in fp32), and kept beside them in `model/adapter/`. So the SFT run's folder *is* the frozen
reference, and an adapter trained by PPO is never put on the wrong base. What cannot be merged is
published as `model/base/` and `model/adapter/`, so that nobody loads the base alone by mistake; a
run that starts from it goes on with its adapter.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf import engine, libraries, loading, parts
from rlhf.config import EngineConfig, ModelConfig
from rlhf.errors import ConfigError, RegistryError, StoppedByGuard
from rlhf.manifest import BaseModel
from rlhf.masking import at_least_fp32
from rlhf.methods import families
from rlhf.methods import tokens as new_tokens
from rlhf.methods.settings import ADAPTER, METHOD_SETTINGS, LoraConfig, MethodConfig
from rlhf.ranks import is_main
from rlhf.registry import Published

# What switches `engine.checkpointing` on in a model: since transformers 5.24, and before.
_RECOMPUTING = ("activation_checkpointing_enable", "gradient_checkpointing_enable")


def changed() -> Iterator[str]:
    """What this file relies on in transformers and peft, and is not there: lines."""
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    passed = ("input_ids", "attention_mask", "position_ids", "use_cache")
    yield from libraries.refusing(LlamaForCausalLM.forward, *passed, "logits_to_keep")
    yield from libraries.unmentioned(LlamaForSequenceClassification, parts.HEAD.rstrip("."))
    yield from libraries.unmentioned(PreTrainedModel, "base_model_prefix")
    yield from libraries.lacking(
        PreTrainedModel, "can_generate", "|".join(_RECOMPUTING), "set_attn_implementation"
    )
    yield from libraries.lacking(BaseTunerLayer, "enable_adapters", "set_adapter")
    yield from libraries.lacking(peft.PeftModel, "get_base_model")
    yield from libraries.refusing(peft.LoraModel.merge_and_unload, "adapter_names")


# ---------------------------------------------------------------- loading


def load_causal(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    attn: str = "auto",
    method: MethodConfig | None = None,
    added: Collection[str] = (),
) -> PreTrainedModel:
    """A language model whose special ids are those of `tokenizer`.

    Args:
        method: what will train it, where that may ask for weights in 4 bits.
        added: tokens that it may lack embeddings for; `new_tokens.grow` makes them.

    Raises:
        ConfigError: no model there, some of its weights are missing (and would be random), or it
            has fewer embeddings than the tokenizer has tokens.
    """
    options: dict[str, Any] = {} if attn == "auto" else {"attn_implementation": attn}
    options |= _in_4_bits(method, dtype) | {"revision": revision, "dtype": dtype}
    model, missing = _load(AutoModelForCausalLM, path, **options)
    _refuse_missing(path, missing)
    _settle_ids(model, tokenizer)
    embeddings: Any = model.get_input_embeddings()
    size = embeddings.weight.shape[0]
    lacking = tokenizer.convert_ids_to_tokens(list(range(size, len(tokenizer))))
    if not set(lacking) <= set(added):
        raise ConfigError(
            f"model.path={path}: the tokenizer has {len(tokenizer)} tokens but the model has "
            f"embeddings for {size}. They do not belong together."
        )
    return model


def load_base(
    cfg: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    method: MethodConfig | None = None,
    added: Collection[str] = (),
) -> PreTrainedModel:
    """The base model of SFT, from the `model` settings, as it comes.

    Args:
        added: tokens that the tokenizer was given, and the base may lack.
    """
    if cfg.dtype != "auto":
        dtype = engine.DTYPES[cfg.dtype]
    return load_causal(
        cfg.path,
        tokenizer,
        dtype=dtype,
        revision=cfg.revision,
        attn=cfg.attn,
        method=method,
        added=added,
    )


def _in_4_bits(method: MethodConfig | None, dtype: torch.dtype) -> dict[str, Any]:
    """How transformers is asked for it; the head stays as it is, since an RM trains it."""
    if not isinstance(method, LoraConfig) or method.quantization is None:
        return {}
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=method.quantization,
        bnb_4bit_use_double_quant=method.double_quantization,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", parts.HEAD.rstrip(".")],
    )
    return {"quantization_config": config, "device_map": {"": engine.device()}}


def base_facts(cfg: ModelConfig, model: nn.Module) -> BaseModel:
    """What the manifest says of the base model."""
    return BaseModel(name=cfg.path, revision=cfg.revision, fingerprint=fingerprint(model))


def load_parent(
    load: Callable[..., PreTrainedModel],
    parent: Published,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """What a run published, or one of its checkpoints, by `load_causal` or `load_scalar`.

    An adapter that cannot be merged is on its base, frozen; the adapter of a checkpoint is put on
    the weights it was trained on, and merged in fp32.

    Raises:
        ConfigError: no model there, or it does not belong to the tokenizer.
        RegistryError: the weights under an adapter are not those it was trained on.
    """
    if parent.under is None:
        return load(parent.model_dir, tokenizer, dtype=dtype)
    adapter, name = parent.model_dir / "adapter", parent.manifest.method.name
    own = load_scalar if parent.stage == "rm" else load_causal
    if families.kept_apart(name):
        if parent.is_checkpoint:
            _refuse_another_base(parent, own(parent.under, tokenizer, dtype=torch.float32))
        below = load(parent.under, tokenizer, dtype=dtype)
        on = families.load(below, adapter, name, head=load is load_scalar, trained=False)
        return on  # type: ignore[return-value]
    made_by = read_method(parent)
    new = tokenizer.convert_ids_to_tokens(new_tokens.trained_in(adapter))
    more = {"added": new} if new else {}
    model = own(parent.under, tokenizer, dtype=torch.float32, method=made_by, **more)
    _refuse_another_base(parent, model)
    if new:
        new_tokens.grow(model, tokenizer)
    if _in_4_bits(made_by, dtype):
        model = model.dequantize()
    merged = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    if load is own:
        return merged.to(dtype)
    with tempfile.TemporaryDirectory() as folder:  # a scalar head on a language model
        merged.save_pretrained(folder)
        return load(folder, tokenizer, dtype=dtype)


def load_backbone(
    sft: Published, tokenizer: PreTrainedTokenizerBase, cfg: EngineConfig
) -> PreTrainedModel:
    """An SFT model with a new scalar head, from which a reward model starts."""
    return load_parent(load_scalar, sft, tokenizer, engine.dtype(cfg))


def scalar_model(
    backbone: PreTrainedModel,
    method: MethodConfig,
    cfg: EngineConfig,
    *,
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
) -> nn.Module:
    """A model with a scalar head made ready to train, in 4 bits where `method` asks for it."""
    backbone = quantized(backbone, tokenizer, method, engine.dtype(cfg))
    return trainable(backbone, method, head=True, tokenizer=tokenizer, steps=steps)


def max_positions(model: nn.Module) -> int | None:
    """How many positions a model has; None where its config does not say."""
    most = getattr(model.config, "max_position_embeddings", None)
    return most if isinstance(most, int) else None


def quantized(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: MethodConfig,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """A model with a scalar head, in the bits that `method` trains on; most methods change none."""
    if not _in_4_bits(method, dtype):
        return model
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_scalar(folder, tokenizer, dtype=dtype, method=method)


def read_method(run: Published) -> MethodConfig:
    """The settings of the method that made a run; those that its manifest lacks as they are now."""
    name = run.manifest.method.name
    kind = METHOD_SETTINGS[name]
    known = {field.name for field in dataclasses.fields(kind)}
    given = {key: value for key, value in run.manifest.method.settings.items() if key in known}
    return kind(**given | {"name": name})


def _refuse_another_base(run: Published, model: PreTrainedModel) -> None:
    base = run.manifest.base
    if not run.manifest.parents and fingerprint(model) != base.fingerprint:
        raise RegistryError(
            f"{run.reference}: an adapter on {base.name}, whose weights are other ones now. "
            f"Put them back, or use {run.stage}/{run.run_name}, which holds whole weights."
        )


def load_scalar(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    method: MethodConfig | None = None,
) -> PreTrainedModel:
    """A model with a scalar head. From a language model the head is new: N(0, 1/(hidden+1)).

    The width is that of Stiennon et al. 2020; a head that the folder holds is kept as it is.

    Raises:
        ConfigError: no model there, or weights are missing beside the head.
    """
    options = _in_4_bits(method, dtype) | {"num_labels": 1, "dtype": dtype}
    model, missing = _load(AutoModelForSequenceClassification, path, **options)
    head = {name for name in missing if name.startswith(parts.HEAD)}
    _refuse_missing(path, missing - head)
    _settle_ids(model, tokenizer)
    if head:
        score: Any = model.score
        nn.init.normal_(score.weight, std=(model.config.hidden_size + 1) ** -0.5)
    return model


def _load(auto: Any, path: str | Path, **options: Any) -> tuple[PreTrainedModel, set[str]]:
    """A model of transformers, and the names of the weights that the folder lacks."""
    model, report = loading.model(auto, path, named=f"model.path={path}", **options)
    for module in model.modules():  # of bitsandbytes: it packs weights in the first evaluation on
        if hasattr(module, "support_avx512bf16_for_cpu"):  # such a CPU, and then trains no more
            module.support_avx512bf16_for_cpu = False
    return model, set(report["missing_keys"])


def _refuse_missing(path: str | Path, missing: set[str]) -> None:
    if missing:
        listed = ", ".join(sorted(missing)[:4])
        raise ConfigError(
            f"model.path={path}: {len(missing)} weights are missing and would be random: {listed}. "
            "Save the whole model, with its language head, there."
        )


def _settle_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            config.pad_token_id = tokenizer.pad_token_id
            config.eos_token_id = tokenizer.eos_token_id
            config.bos_token_id = tokenizer.bos_token_id


def freeze(model: nn.Module) -> nn.Module:
    """No gradient, no dropout: a reference or a reward model."""
    return model.requires_grad_(False).eval()


def trainable(
    model: nn.Module,
    method: MethodConfig,
    *,
    head: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    steps: int | None = None,
    tokens: Collection[int] = (),
) -> nn.Module:
    """`model` made ready to train by `method`.

    Its outputs are unchanged at first, unless the method's row in the table says otherwise. A model
    that comes with an adapter, as a run published it that cannot be merged, goes on with that one.

    Args:
        head: it ends in a scalar head, which is trained in full.
        tokenizer, steps, tokens: what some methods need; see `families.attach`.

    Raises:
        ConfigError: the method cannot be used on this model.
    """
    no_dropout(model)
    if isinstance(model, peft.PeftModel):
        return families.go_on(model, ADAPTER)
    assert isinstance(model, PreTrainedModel)
    return families.attach(
        model, method, head=head, tokenizer=tokenizer, steps=steps, tokens=tokens
    )


def no_dropout(model: nn.Module) -> None:
    """Sampling and training must see the same network: ratio 1 before the first update."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):  # a bare number, as Llama's attention has
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def recompute(model: nn.Module, cfg: EngineConfig) -> None:
    """Recompute activations in the backward pass of a training model (`engine.checkpointing`).

    ZeRO-3 with frozen weights needs the reentrant kind: the other finds them split up again
    (huggingface/transformers#47254).
    """
    if not cfg.checkpointing:
        return
    inner = _inner(whole(model))
    frozen = any(not p.requires_grad for p in inner.parameters())
    reentrant = cfg.zero_stage == 3 and frozen
    enable = next(name for name in _RECOMPUTING if hasattr(inner, name))
    getattr(inner, enable)({"use_reentrant": reentrant})
    if reentrant:  # which has no gradient where no input asks for one
        inner.enable_input_require_grads()


class Backbone:
    """A frozen model that carries the adapters of several roles, one of them active at a time.

    Args:
        model: with every adapter on it; all that has requires_grad now stays trained.
    """

    def __init__(self, model: peft.PeftModel) -> None:
        self.model = model
        modules = model.get_base_model().modules()
        self._layers = [module for module in modules if isinstance(module, BaseTunerLayer)]
        self._trained = [(p, p.requires_grad) for layer in self._layers for p in layer.parameters()]
        self._active: str | None = "(unknown)"

    def use(self, adapter: str | None) -> peft.PeftModel:
        """The model with one adapter active; None: with none, as the reference is.

        Not between a forward pass and its backward pass: the gradient would go nowhere.
        """
        if adapter != self._active:
            for layer in self._layers:
                layer.enable_adapters(adapter is not None)
                if adapter is not None:
                    layer.set_adapter(adapter)
            for parameter, trained in self._trained:  # which switching changes
                parameter.requires_grad_(trained)
            self._active = adapter
        return self.model


class SharedRole(nn.Module):
    """One role on a shared backbone: its adapter and, for critic and reward model, its head.

    Only what this role trains is registered in it, so that an engine sees nothing of the others.

    Args:
        backbone: shared with other roles.
        adapter: None for the reference.
        score: the scalar head [H] -> [1].
    """

    def __init__(
        self, backbone: Backbone, adapter: str | None, score: nn.Module | None = None
    ) -> None:
        super().__init__()
        object.__setattr__(self, "backbone", backbone)  # not a part of this module
        self.adapter, self.score = adapter, score
        named = backbone.model.named_parameters()
        own = [p for name, p in named if f".{adapter}." in name and p.requires_grad]
        self.adapters = nn.ParameterList(own)

    def active(self) -> peft.PeftModel:
        """The backbone with this role's adapter active."""
        return self.backbone.use(self.adapter)  # type: ignore[operator, union-attr]

    def forward(self, **inputs: Any) -> Any:
        return self.active()(**inputs)

    def generate(self, **inputs: Any) -> Tensor:
        return self.active().generate(**inputs)

    def train(self, mode: bool = True) -> SharedRole:
        self.backbone.model.train(mode)  # type: ignore[union-attr]
        return super().train(mode)

    @property
    def device(self) -> torch.device:
        return self.backbone.model.device  # type: ignore[union-attr, return-value]

    @property
    def generation_config(self) -> Any:
        return self.backbone.model.generation_config  # type: ignore[union-attr]

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        inner: Any = self.backbone.model.get_base_model()  # type: ignore[operator, union-attr]
        inner.generation_config = config


def whole(model: nn.Module) -> nn.Module:
    """The model of a role, with what it shares."""
    return model.backbone.model if isinstance(model, SharedRole) else model  # type: ignore


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all); of a shared backbone all that lies on it, trained in this role."""
    trained = sum(engine.size_of(p) for p in model.parameters() if p.requires_grad)
    return trained, sum(engine.size_of(p) for p in whole(model).parameters())


def largest(*loaded: nn.Module) -> int:
    """The parameters of the largest of these models."""
    return max(count_parameters(model)[1] for model in loaded)


# ---------------------------------------------------------------- forward passes


def positions(mask: Tensor) -> Tensor:
    """Explicit position ids [B, T] under any padding: the count of real tokens so far."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def response_logits(model: nn.Module, ids: Tensor, mask: Tensor, response_length: int) -> Tensor:
    """Logits of the model for each response token, made before it is seen.

    Args:
        model: a language model.
        ids: [B, T] prompt and response.
        mask: [B, T] bool, True on real tokens.
        response_length: R, the last R columns are the response.

    Returns:
        [B, R, V].
    """
    out = model(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=positions(mask),
        use_cache=False,
        logits_to_keep=response_length + 1,
    )
    return out.logits[:, :-1]


def hidden_states(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """What the head of a model reads at every position: [B, T, H]."""
    active = model.active() if isinstance(model, SharedRole) else model
    inner = _inner(active)
    backbone = getattr(inner, inner.base_model_prefix)
    return backbone(
        input_ids=ids, attention_mask=mask.long(), position_ids=positions(mask), use_cache=False
    ).last_hidden_state


def token_values(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """What the scalar head says at every position: [B, T], in fp32 (fp64 for an fp64 model)."""
    head: Any = model.score if isinstance(model, SharedRole) else _inner(model).score
    return at_least_fp32(head(hidden_states(model, ids, mask)).squeeze(-1))


def _inner(model: nn.Module) -> Any:
    """The model of transformers, adapters inside it."""
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def scores(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """The reward model's verdict [B]: its head at the last real token of each row."""
    values = token_values(model, ids, mask)
    last = (mask.long() * torch.arange(mask.shape[1], device=mask.device)).argmax(-1)
    return values.gather(1, last[:, None]).squeeze(1)


# ---------------------------------------------------------------- publishing


def publish(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write whole weights, special ids and tokenizer to `folder`, adapters to `folder/adapter`.

    Every process calls it; rank 0 writes.

    Raises:
        StoppedByGuard: a tensor that was written holds a number that is not finite.
    """
    with engine.gathered(whole(model)):
        if is_main():
            _publish(whole(model), tokenizer, folder)
    if bad := engine.from_main(not_finite, folder):
        raise StoppedByGuard(
            f"{folder}: {len(bad)} of the tensors that were written hold nan or infinities "
            f"({', '.join(bad[:3])}): no model can be made of them, and nothing is published. "
            "Training diverged, or they overflow in engine.dtype: lower the learning rate, or use "
            "engine.dtype=fp32."
        )


def not_finite(folder: Path) -> list[str]:
    """Names of the tensors in a model's files, adapter included, with a nan or an infinity."""
    bad = []
    for part in (".", parts.BASE, "adapter"):
        for path in sorted((folder / part).glob("*.safetensors")):
            if path.name == parts.GOLDEN:
                continue
            with safe_open(path, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    if not bool(tensors.get_tensor(name).isfinite().all()):
                        bad.append(name)
    return bad


def _publish(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    adapted: set[str] = set()
    if isinstance(model, peft.PeftModel):
        _save_trained(model, folder)
        parts.refuse_empty(folder)
        if not families.mergeable(model):
            _save_base(model, tokenizer, folder / parts.BASE)
            tokenizer.save_pretrained(str(folder))
            parts.refuse_empty(folder)
            parts.record(folder)
            return
        adapted = _adapted(model)
        model = _merged(model, folder)
    _save_whole(model, tokenizer, folder)
    tokenizer.save_pretrained(str(folder))
    parts.refuse_empty(folder)
    parts.record(folder, adapted)


def _merged(model: peft.PeftModel, folder: Path) -> Any:
    """Whole weights, in memory; those in 4 bits as what these bits stand for."""
    copied: Any = copy.deepcopy(model).to("cpu")
    if getattr(model.get_base_model(), "is_quantized", False):
        plain = copied.unload().dequantize().float()
        copied = peft.PeftModel.from_pretrained(plain, str(folder / "adapter"))
        return copied.merge_and_unload().to(dtype=model.dtype)
    return copied.float().merge_and_unload(adapter_names=[ADAPTER]).to(dtype=model.dtype)


def _save_whole(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, **weights: Any
) -> None:
    model.config.use_cache = True
    if model.can_generate():
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    model.save_pretrained(str(folder), **weights)


def _save_base(model: peft.PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The weights under an adapter, by the names that plain transformers knows."""
    inner: Any = model.get_base_model()
    with torch.device("meta"):
        expected = type(inner)(inner.config).state_dict().keys()
    base = {}
    for name, tensor in inner.state_dict().items():
        plain = name.replace(".base_layer", "").replace(".original_module", "")
        if plain in expected:
            base[plain] = tensor
    assert base.keys() == expected, expected - base.keys()
    _save_whole(inner, tokenizer, folder, state_dict=base)


def save_trained(model: nn.Module, folder: Path) -> None:
    """What training changes, for a checkpoint: adapters in `folder/adapter`, or whole weights.

    Every process calls it; rank 0 writes.
    """
    with engine.gathered(whole(model)):
        if is_main():
            _save_trained(whole(model), folder)
            parts.refuse_empty(folder)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training changes of a model, as a part of a checkpoint."""

    model: nn.Module

    def save(self, folder: Path) -> None:
        save_trained(self.model, folder)


def _save_trained(model: nn.Module, folder: Path) -> None:
    if isinstance(model, peft.PeftModel):
        families.save(model, folder / "adapter", ADAPTER)
    else:
        model.save_pretrained(str(folder))  # type: ignore[operator]


def load_trained(model: nn.Module, folder: Path) -> None:
    """Put back, in place, what `save_trained` wrote of this model; every process calls it."""
    model = whole(model)
    with engine.gathered(model, write=True):
        if isinstance(model, peft.PeftModel):
            families.restore(model, folder / "adapter", ADAPTER)
            return
        weights: dict[str, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            weights |= load_file(path)
        missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    assert not unexpected, unexpected
    assert set(missing) <= tied, missing


def _adapted(model: peft.PeftModel) -> set[str]:
    """Names, as in the published weights, of the layers that carry an adapter."""
    named = model.get_base_model().named_modules()
    layers = {name for name, module in named if isinstance(module, BaseTunerLayer)}
    return {name.removesuffix(".token_adapter") for name in layers}  # trained rows of embeddings


def fingerprint(model: nn.Module) -> str:
    """sha256 over each weight's name, shape and up to 4,096 of its values, evenly spread.

    Small enough for any model, and two different trainings do not agree on it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 4096)].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample)
    return digest.hexdigest()
