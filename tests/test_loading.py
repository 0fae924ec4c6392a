"""No code out of a folder is run, no pickle is read, and nobody is asked whether to."""

from __future__ import annotations

import ast
import builtins
import json
import shutil
from pathlib import Path

import pytest
import torch
from small_line import ROOT, SMALL, run_stage
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf import loading, models, text
from rlhf.config import TemplateConfig
from rlhf.errors import ConfigError

CHAT = TemplateConfig("chat")
CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers import PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "mine"
class Model(LlamaForCausalLM):
    config_class = Config
class Scorer(LlamaForSequenceClassification):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {
    "AutoConfig": "code.Config",
    "AutoModelForCausalLM": "code.Model",
    "AutoModelForSequenceClassification": "code.Scorer",
}


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def folder(tiny_model_dir, tmp_path, monkeypatch):
    """A sound model, with code beside it that leaves a mark where it is run; anyone asked: yes."""
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked whether to run code"))
    (tiny_model_dir / "code.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    yield tiny_model_dir
    assert not list(tmp_path.rglob("ran")), "its code was run"


def load(folder, tokenizer, kind="causal"):
    how = models.load_causal if kind == "causal" else models.load_scalar
    return how(folder, tokenizer, dtype=torch.float32)


REFUSED = r"^model\.path=.*: it asks for Python code of its own to be run \(auto_map.*never done"


@pytest.mark.parametrize("kind", ["causal", "scalar"])
def test_a_model_that_needs_code_of_its_own_is_refused(folder, tiny_tokenizer, kind):
    edit(folder / "config.json", auto_map=AUTO_MAP, model_type="mine", architectures=["Model"])
    with pytest.raises(ConfigError, match=REFUSED):
        load(folder, tiny_tokenizer, kind)


@pytest.mark.parametrize("kind", ["causal", "scalar"])
def test_code_of_another_repository_is_refused_without_looking_there(folder, tiny_tokenizer, kind):
    elsewhere = {name: f"someone/else--{value}" for name, value in AUTO_MAP.items()}
    edit(folder / "config.json", auto_map=elsewhere, model_type="mine")
    with pytest.raises(ConfigError, match=REFUSED):
        load(folder, tiny_tokenizer, kind)


@pytest.mark.parametrize(
    "auto_map", [{"AutoTokenizer": [None, "code.Tokenizer"]}, ["code.T", None]]
)
def test_a_tokenizer_that_needs_code_of_its_own_is_refused(folder, auto_map):
    edit(folder / "config.json", model_type="mine", auto_map=AUTO_MAP)
    edit(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Tokenizer")
    with pytest.raises(ConfigError, match=REFUSED):
        text.load_tokenizer(str(folder), template=CHAT)


@pytest.mark.parametrize("kind", ["causal", "scalar"])
def test_what_transformers_knows_is_loaded_without_the_code(folder, tiny_tokenizer, kind, tmp_path):
    plain = load(folder, tiny_tokenizer, kind)
    edit(folder / "config.json", auto_map=AUTO_MAP)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "code.Tokenizer"]})
    tokenizer = text.load_tokenizer(str(folder), template=CHAT)
    model = load(folder, tokenizer, kind)
    assert type(model) is type(plain)
    assert tokenizer.get_vocab() == tiny_tokenizer.get_vocab()
    ids = torch.tensor([[1, 9, 10]])
    if kind == "causal":
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    models.publish(model, tokenizer, tmp_path / "published")
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((tmp_path / "published" / name).read_text())


@pytest.mark.parametrize(
    "values",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel@main:attend"},
        {"text_config": {"attn_implementation": "paged|someone/kernel"}},
    ],
)
def test_a_kernel_of_the_hub_is_refused(folder, tiny_tokenizer, values):
    edit(folder / "config.json", **values)
    with pytest.raises(ConfigError, match=r"model\.path=.*names the attention kernel .*someone/k"):
        load(folder, tiny_tokenizer)


def test_an_attention_that_transformers_has_is_no_kernel(folder, tiny_tokenizer):
    edit(folder / "config.json", attn_implementation="eager")
    load(folder, tiny_tokenizer)


@pytest.mark.parametrize("kind", ["causal", "scalar"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin"])
def test_weights_that_are_pickles_alone_are_refused(folder, tiny_tokenizer, kind, name):
    weights = load(folder, tiny_tokenizer).state_dict()
    torch.save(weights, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, name)})
    )
    load(folder, tiny_tokenizer, kind)  # beside safetensors they are let be
    (folder / "model.safetensors").unlink()
    said = rf"^model\.path=.*: it has no safetensors\. .*{name}.*are pickles.*save_pretrained"
    with pytest.raises(ConfigError, match=said):
        load(folder, tiny_tokenizer, kind)


def test_no_weights_at_all_are_no_pickles(folder, tiny_tokenizer):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no model could be loaded: .*model\.safetensors"):
        load(folder, tiny_tokenizer)


def test_a_stage_refuses_in_one_line(folder, tmp_path, monkeypatch, capfd):
    shutil.copytree(ROOT / "data/tiny/base", tmp_path / "base")
    shutil.copy(folder / "code.py", tmp_path / "base")
    edit(tmp_path / "base/config.json", auto_map=AUTO_MAP, model_type="mine")
    given = [f"runs_dir={tmp_path / 'runs'}", "tracking=off", *SMALL["sft"]]
    assert run_stage(monkeypatch, "sft", *given, f"model.path={tmp_path / 'base'}") == 2
    (line,) = [one for one in capfd.readouterr().err.splitlines() if one.startswith("refused:")]
    assert f"model.path={tmp_path / 'base'}: it asks for Python code of its own" in line


def calls(source: str) -> list[str]:
    """What each call of from_pretrained and torch.load in a file is made on."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = ast.unparse(node.func)
            if node.func.attr in ("from_pretrained", "from_config") or name == "torch.load":
                found.append(name)
    return found


def test_one_file_alone_loads_by_transformers():
    """peft's read JSON, and adapters that a manifest lists, which are safetensors."""
    files = [
        file for part in ("rlhf", "stages", "benchmarks") for file in (ROOT / part).rglob("*.py")
    ]
    assert len(files) > 80
    others = {}
    for file in files:
        made = [name for name in calls(file.read_text()) if not name.startswith("peft.")]
        if made and file.name != "loading.py":
            others[file.name] = made
    assert others == {}
    home = calls((ROOT / "rlhf/loading.py").read_text())
    assert sorted(home) == ["AutoTokenizer.from_pretrained", "auto.from_pretrained"]
    assert calls("AutoModel.from_pretrained(x)\ntorch.load(y)") == [
        "AutoModel.from_pretrained",
        "torch.load",
    ]


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_that_file_says_no(monkeypatch, folder, auto):
    seen = []
    monkeypatch.setattr(auto, "from_pretrained", lambda *_, **options: seen.append(options))
    with pytest.raises(TypeError):
        loading.model(auto, folder, named="x")
    assert seen[0]["trust_remote_code"] is False
    assert seen[0]["use_safetensors"] is True
