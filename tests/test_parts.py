"""Which part of a model changed: told from the files alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf import parts
from rlhf.errors import RegistryError

TENSORS = {
    "model.embed_tokens.weight": torch.arange(12.0).reshape(4, 3),
    "model.layers.0.mlp.up_proj.weight": torch.arange(6.0).reshape(2, 3),
    "score.weight": torch.tensor([[1.0, 2.0, 3.0]]),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    parts.record(tmp_path, {"model.layers.0.mlp.up_proj"})
    return tmp_path


def test_an_unchanged_folder_has_nothing_off(folder):
    assert parts.changed(folder) == []
    known = json.loads((folder / parts.FILE).read_text())
    assert {name: about["part"] for name, about in known.items()} == {
        "model.embed_tokens.weight": "base",
        "model.layers.0.mlp.up_proj.weight": "adapter",
        "score.weight": "head",
    }


@pytest.mark.parametrize(
    ("tensor", "off"),
    [
        ("model.embed_tokens.weight", "base (model.embed_tokens.weight)"),
        ("model.layers.0.mlp.up_proj.weight", "adapter (model.layers.0.mlp.up_proj.weight)"),
        ("score.weight", "head (score.weight)"),
    ],
)
@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, name: tensors[name].view(-1)[-1:].add_(1e-3),
        lambda tensors, name: tensors.update({name: tensors[name].reshape(-1)}),
        lambda tensors, name: tensors.update({name: tensors[name].half()}),
        lambda tensors, name: tensors.pop(name),
    ],
    ids=["value", "shape", "type", "gone"],
)
def test_the_part_of_a_changed_tensor_is_named(folder, tensor, off, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors, tensor)
    save_file(tensors, folder / "model.safetensors")
    assert parts.changed(folder) == [off]


def test_a_tensor_too_many_is_named(folder):
    tensors = TENSORS | {"lm_head.weight": torch.ones(2)}
    save_file(tensors, folder / "model.safetensors")
    assert parts.changed(folder) == ["base (lm_head.weight)"]


def test_many_tensors_are_counted(folder):
    save_file({f"w{n}": torch.ones(1) for n in range(5)} | TENSORS, folder / "model.safetensors")
    assert parts.changed(folder) == ["base (w0, w1 and 3 more)"]


def test_other_metadata_or_another_cut_into_files_changes_nothing(folder):
    names = list(TENSORS)
    (folder / "model.safetensors").unlink()
    save_file({n: TENSORS[n] for n in names[:1]}, folder / "model-00001-of-00002.safetensors")
    save_file({n: TENSORS[n] for n in names[1:]}, folder / "model-00002-of-00002.safetensors")
    assert parts.changed(folder) == []


def test_golden_values_are_no_weights(folder):
    save_file({"values": torch.ones(2)}, folder / parts.GOLDEN)
    assert parts.changed(folder) == []


def test_the_adapter_beside_the_merged_weights_is_watched_too(folder):
    """Both are read: a shared backbone takes the adapter, a model of its own the merged weights."""
    (folder / "adapter").mkdir()
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = {"base_model.model.up_proj.lora_A.weight": torch.ones(2)}
    tensors["base_model.model.score.weight"] = torch.ones(3)
    save_file(tensors, file)
    parts.record(folder)
    assert parts.changed(folder) == []
    for name, part in zip(tensors, ("adapter", "head"), strict=True):
        save_file(tensors | {name: 2 * tensors[name]}, file)
        assert parts.changed(folder) == [f"{part} (adapter/{name})"]


@pytest.mark.parametrize("size", [0, 4, 60, 200, -5])
def test_a_file_cut_short_is_named_not_raised(folder, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    (said,) = parts.changed(folder)
    assert said.startswith("weights (model.safetensors: not whole safetensors")


@pytest.mark.parametrize("place", ["model.safetensors", "adapter/adapter_model.safetensors"])
def test_weights_that_were_never_gathered_are_refused(tmp_path, place):
    """What ZeRO-3 leaves of a weight that is saved without being gathered: a name, no value."""
    (tmp_path / "adapter").mkdir()
    save_file({"a": torch.ones(2, 3), "b": torch.ones(1)}, tmp_path / place)
    parts.refuse_empty(tmp_path)
    save_file({"a": torch.ones(2, 3), "b": torch.empty(0)}, tmp_path / place)
    with pytest.raises(RegistryError, match=r"1 of the tensors that were written are empty \(b,"):
        parts.refuse_empty(tmp_path)


def test_a_lost_record_is_named(folder):
    (folder / parts.FILE).unlink()
    (said,) = parts.changed(folder)
    assert parts.FILE in said


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("model/tokenizer.json", "tokenizer"),
        ("model/tokenizer_config.json", "tokenizer"),
        ("model/special_tokens_map.json", "tokenizer"),
        ("model/chat_template.jinja", "template"),
        ("model/adapter/adapter_model.safetensors", "adapter"),
        ("model/adapter/adapter_config.json", "adapter"),
        ("model/model.safetensors", "weights"),
        ("model/model-00001-of-00002.safetensors", "weights"),
        ("model/tensors.json", "weights"),
        ("model/golden.safetensors", "golden values"),
        ("model/config.json", "model settings"),
        ("metrics.jsonl", "metrics.jsonl"),
        ("config.yaml", "config.yaml"),
    ],
)
def test_the_part_of_a_file(file, part):
    assert parts.of_file(file) == part


def test_no_torch_is_needed():
    code = "import rlhf.parts, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
