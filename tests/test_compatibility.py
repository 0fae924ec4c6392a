"""What is gone from an outside library is said by the file that relies on it, in one line."""

from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf import compatibility, libraries
from rlhf.config import PROJECT
from rlhf.errors import ConfigError
from rlhf.methods.settings import FAMILIES, LoraConfig, PrefixConfig

CHECKED = [home.file for home in compatibility.HOMES if home.checks]


def test_nothing_has_changed_in_what_is_installed():
    assert compatibility.changed() == []


def without(owner: str, name: str) -> Any:
    """How to take a name off something in a library: "package.module:Class"."""

    def change(monkeypatch: pytest.MonkeyPatch) -> None:
        holder = found(owner)
        for one in getattr(holder, "__mro__", (holder,)):
            if name in vars(one):
                monkeypatch.delattr(one, name)

    return change


def renamed(function: str, old: str, new: str) -> Any:
    """How to let a function of a library take an argument by another name."""

    def change(monkeypatch: pytest.MonkeyPatch) -> None:
        owner, _, name = function.rpartition(".")
        original = getattr(found(owner), name)
        signature = inspect.signature(original)
        kept = [p.replace(name=new) if p.name == old else p for p in signature.parameters.values()]
        assert old in signature.parameters

        def stub(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs)

        stub.__signature__ = inspect.Signature(kept)  # type: ignore[attr-defined]
        stub.__module__, stub.__qualname__ = original.__module__, original.__qualname__
        monkeypatch.setattr(found(owner), name, stub)

    return change


def found(path: str) -> Any:
    module, _, name = path.partition(":")
    out = importlib.import_module(module)
    for part in filter(None, name.split(".")):
        out = getattr(out, part)
    return out


def cache_name() -> str:
    taken = inspect.signature(found("transformers:LlamaModel").forward).parameters
    return "cache" if "cache" in taken else "past_key_values"


STUBS = {  # file -> what is changed, and what is said of it
    "engine": (
        without("deepspeed.runtime.engine:DeepSpeedEngine", "clip_fp32_gradients"),
        "deepspeed {}: DeepSpeedEngine has no clip_fp32_gradients",
    ),
    "loading": (
        without("transformers:PreTrainedConfig", "get_config_dict"),
        "transformers {}: PreTrainedConfig has no get_config_dict",
    ),
    "models": (
        renamed("transformers:LlamaForCausalLM.forward", "logits_to_keep", "num_logits_to_keep"),
        "transformers {}: LlamaForCausalLM.forward takes no logits_to_keep",
    ),
    "supervised": (
        renamed("transformers:Trainer._get_train_sampler", "train_dataset", "dataset"),
        "transformers {}: Trainer._get_train_sampler takes no train_dataset",
    ),
    "rollout": (
        renamed("transformers:GenerationMixin.generate", "logits_processor", "processors"),
        "transformers {}: GenerationMixin.generate takes no logits_processor",
    ),
    "methods.lora": (
        renamed("peft:LoraConfig.__init__", "use_rslora", "rank_stabilized"),
        "peft {}: LoraConfig.__init__ takes no use_rslora",
    ),
    "methods.soft": (
        renamed("transformers:LlamaModel.forward", cache_name(), "memory"),
        "transformers {}: LlamaModel.forward takes no cache or past_key_values",
    ),
    "methods.own": (
        without("peft.tuners.tuners_utils:BaseTuner", "_replace_module"),
        "peft {}: BaseTuner has no _replace_module",
    ),
    "methods.unipelt": (
        renamed(
            "transformers.models.llama.modeling_llama:LlamaAttention.forward", "kwargs", "options"
        ),
        "transformers {}: LlamaAttention.forward takes no kwargs",
    ),
}


@pytest.mark.parametrize("file", CHECKED)
def test_a_library_that_changed_under_our_feet_is_one_line_of_its_home(file, monkeypatch):
    change, said = STUBS[file]
    change(monkeypatch)
    (home,) = [home for home in compatibility.HOMES if home.file == file]
    library = said.split(" ")[0]
    assert compatibility.changed([home]) == [
        f"{said.format(libraries.installed(library))} "
        f"(rlhf/{file.replace('.', '/')}.py: {home.feature})"
    ]


def test_a_stage_refuses_before_anything_is_loaded(monkeypatch):
    """And only what it would run: a method that is not used may have changed."""
    STUBS["methods.soft"][0](monkeypatch)
    cfg = SimpleNamespace(stage="sft", method=PrefixConfig(tokens=4))
    compatibility.check(SimpleNamespace(stage="sft", method=LoraConfig()))
    tested = libraries.tested()["transformers"]
    with pytest.raises(ConfigError) as refused:
        compatibility.check(cfg)
    assert str(refused.value) == (
        f"[library-changed] transformers {libraries.installed('transformers')}: LlamaModel.forward "
        "takes no cache or past_key_values (rlhf/methods/soft.py: prefix_tuning, prompt_tuning, "
        f"p_tuning, p_tuning_v2). Run `pip install 'transformers=={tested}'`, which was tested."
    )


def test_a_name_that_is_gone_where_a_file_is_imported_is_a_line_too(monkeypatch):
    def gone(name: str) -> Any:
        raise ImportError("cannot import name 'SFTConfig' from 'trl' (trl/__init__.py)", name="trl")

    monkeypatch.setattr(compatibility.importlib, "import_module", gone)
    (home,) = [home for home in compatibility.HOMES if home.file == "supervised"]
    (line,) = compatibility.changed([home])
    assert line.startswith(f"trl {libraries.installed('trl')}: cannot import name 'SFTConfig'")


def test_a_field_that_no_file_mentions_any_more_is_a_line():
    owner = found("trl:SFTTrainer")
    assert list(libraries.unmentioned(owner, "_metrics")) == []
    (line,) = libraries.unmentioned(owner, "_metrics", "_no_such_field_at_all")
    assert (
        line
        == f"trl {libraries.installed('trl')}: SFTTrainer no longer mentions _no_such_field_at_all"
    )


def test_every_library_that_is_needed_has_a_home_and_every_method_a_check():
    homes = {library for home in compatibility.HOMES for library in home.libraries}
    assert set(libraries.needed()) <= homes
    checked = [home for home in compatibility.HOMES if home.file.startswith("methods.")]
    of_weights = {"full", "freeze", "bitfit"}  # which lean on nothing
    for names in FAMILIES.values():
        for name in set(names) - of_weights:
            cfg = SimpleNamespace(stage="sft", method=SimpleNamespace(name=name))
            assert any(home.used(cfg) for home in checked), name
    for home in compatibility.HOMES:
        assert (PROJECT / "rlhf" / f"{home.file.replace('.', '/')}.py").is_file()
