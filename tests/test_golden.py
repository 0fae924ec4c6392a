"""Golden values: what was published passes, and any change by hand is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from rounding import TINY, bound
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf import golden, models
from rlhf.errors import RegistryError
from rlhf.methods.settings import FullConfig, LoraConfig
from rlhf.roles import Roles

PAD = 0
SEQUENCES = [[1, *range(9, 9 + n)] for n in (3, 7, 1, 5)]
REFUSED = r"sft/t: loaded from .*does not say what it said when it was published.*"


@pytest.fixture
def run(tmp_path):
    """Stands in for a session and for the run it becomes: a folder, and facts in a manifest."""
    (tmp_path / "model").mkdir()
    return SimpleNamespace(
        path=tmp_path,
        model_dir=tmp_path / "model",
        reference="sft/t",
        is_checkpoint=False,
        manifest=SimpleNamespace(golden=None),
    )


@pytest.fixture
def base(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model(initializer_range=0.1).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trained(base, tokenizer, method, *, head):
    torch.manual_seed(1)
    load = models.load_scalar if head else models.load_causal
    model = models.trainable(load(base, tokenizer, dtype=torch.float32), method, head=head)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval()


@pytest.fixture
def publish(run, base, tiny_tokenizer):
    """A factory: publishes a trained model as `run`, with its golden values; returns `run`."""

    def make(*, head, method=None, sequences=SEQUENCES):
        model = trained(base, tiny_tokenizer, method or LoraConfig(rank=4), head=head)
        models.publish(model, tiny_tokenizer, run.model_dir)
        write = golden.write_scores if head else golden.write_logits
        run.manifest.golden = write(model, sequences, PAD, run.model_dir, torch.float32)
        return run

    return make


def check(run, tokenizer, *, head):
    load = models.load_scalar if head else models.load_causal
    model = load(run.model_dir, tokenizer, dtype=torch.float32).eval()
    return (golden.check_scores if head else golden.check_logits)(model, run)


def edit(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("method", [LoraConfig(rank=4), FullConfig()], ids=["lora", "full"])
@pytest.mark.parametrize("head", [False, True], ids=["logits", "scores"])
def test_what_was_published_passes(publish, tiny_tokenizer, head, method):
    run = publish(head=head, method=method)
    assert run.manifest.golden["file"] == "model/golden.safetensors"
    assert check(run, tiny_tokenizer, head=head) <= TINY


def test_values_are_those_of_the_last_token(publish, base, tiny_tokenizer):
    run = publish(head=False)
    model = trained(base, tiny_tokenizer, LoraConfig(rank=4), head=False)
    values = load_file(run.path / "model/golden.safetensors")["values"]
    assert values.shape == (4, len(tiny_tokenizer))
    for row, sequence in enumerate(SEQUENCES):
        with torch.no_grad():
            alone = model(torch.tensor([sequence])).logits[0, -1]
        torch.testing.assert_close(values[row], alone, rtol=0, atol=TINY)
    assert float(values.abs().max()) < 30  # or the tolerance of 1e-3 would be too strict


def test_values_do_not_depend_on_padding(run, tiny_tokenizer):
    """Of a GPT-2, which knows where a token stands."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tiny_tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4
    )
    model = GPT2LMHeadModel(config).eval()
    run.manifest.golden = golden.write_logits(model, SEQUENCES, PAD, run.model_dir, torch.float32)
    values = load_file(run.path / "model/golden.safetensors")["values"]
    for row, sequence in enumerate(SEQUENCES):
        with torch.no_grad():
            alone = model(torch.tensor([sequence])).logits[0, -1]
        torch.testing.assert_close(values[row], alone, rtol=0, atol=TINY)


@pytest.mark.parametrize("head", [False, True], ids=["logits", "scores"])
def test_only_the_first_rows_are_kept(publish, tiny_tokenizer, head):
    run = publish(head=head, sequences=[[1, 9 + i] for i in range(20)])
    stored = load_file(run.path / "model/golden.safetensors")
    names = {"values", "ids", "mask"} | (set() if head else {"hidden"})
    assert {name: len(tensor) for name, tensor in stored.items()} == dict.fromkeys(names, 8)
    assert check(run, tiny_tokenizer, head=head) <= TINY


@pytest.mark.parametrize("head", [False, True], ids=["logits", "scores"])
def test_a_dropped_adapter_is_refused(publish, base, tiny_tokenizer, head):
    """Whole weights without what was trained: the base, saved in place of the merged model."""
    run = publish(head=head)
    load = models.load_scalar if head else models.load_causal
    bare = load(base, tiny_tokenizer, dtype=torch.float32)
    if head:
        bare.score.weight.data = load_file(run.model_dir / "model.safetensors")["score.weight"]
    bare.save_pretrained(run.model_dir)
    with pytest.raises(RegistryError, match=REFUSED + r"changed on disk: adapter \("):
        check(run, tiny_tokenizer, head=head)


def test_one_changed_head_weight_is_refused(publish, tiny_tokenizer):
    run = publish(head=True)

    def change(tensors):
        tensors["score.weight"][0, 5] += 0.05

    edit(run.model_dir / "model.safetensors", change)
    with pytest.raises(RegistryError, match=REFUSED + r"on disk: head \(score.weight\)\."):
        check(run, tiny_tokenizer, head=True)


def test_a_lost_head_is_refused(publish, tiny_tokenizer):
    """A folder without its head loads, with a new head: the bug this file is for."""
    run = publish(head=True)
    edit(run.model_dir / "model.safetensors", lambda tensors: tensors.pop("score.weight"))
    with pytest.raises(RegistryError, match=REFUSED + r"on disk: head \(score.weight\)\."):
        check(run, tiny_tokenizer, head=True)


@pytest.mark.parametrize("head", [False, True], ids=["logits", "scores"])
def test_other_ids_for_the_same_words_are_refused(publish, tiny_tokenizer, head):
    """As a tokenizer whose ids were shuffled would give them."""
    run = publish(head=head)

    def change(tensors):
        ids = tensors["ids"]
        tensors["ids"] = torch.where(ids > 8, ids + 1, ids)

    edit(run.path / "model/golden.safetensors", change)
    with pytest.raises(RegistryError, match=REFUSED + "golden values of another run"):
        check(run, tiny_tokenizer, head=head)


@pytest.mark.parametrize("head", [False, True], ids=["logits", "scores"])
def test_nan_weights_are_refused(publish, tiny_tokenizer, head):
    run = publish(head=head)
    edit(run.model_dir / "model.safetensors", lambda t: t["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(RegistryError, match="off by nan"):
        check(run, tiny_tokenizer, head=head)


def test_another_base_under_the_same_head_is_refused(publish, base, tiny_tokenizer, tiny_model):
    """Also by the stage that leaves the language head out."""
    run = publish(head=False)
    tiny_model(seed=5).save_pretrained(run.model_dir)
    bare = models.load_scalar(run.model_dir, tiny_tokenizer, dtype=torch.float32).eval()
    with pytest.raises(RegistryError, match=REFUSED + r"on disk: adapter .*base \("):
        golden.check_backbone(bare, run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_backbone_says_what_it_said_under_its_language_head(publish, tiny_tokenizer, dtype):
    """Of hidden states that a norm has brought to size 1; what was stored is of fp32."""
    run = publish(head=False)
    run.manifest.golden["tolerance"] = golden.TOLERANCE[dtype]
    bare = models.load_scalar(run.model_dir, tiny_tokenizer, dtype=dtype).eval()
    rounded = 2 if dtype == torch.float32 else 1
    allowed = bound(dtype, layers=2, width=64, scale=1.0, rounded=rounded)
    assert allowed < golden.TOLERANCE[dtype]
    assert golden.check_backbone(bare, run) <= allowed
    assert "start = sft/t" in golden.check_start(bare, run)


def test_a_checkpoint_has_no_golden_values_and_says_so(publish):
    run = publish(head=False)
    run.is_checkpoint = True
    assert "without golden values" in golden.check_start(None, run)
    assert golden.check_roles(None, {}, run, [run]).count("without golden values") == 2


def test_roles_are_held_against_both_parents(tmp_path, base, tiny_tokenizer):
    parents = []
    for name, head in (("sft/t", False), ("rm/t", True)):
        folder = tmp_path / name
        (folder / "model").mkdir(parents=True)
        parent = SimpleNamespace(
            path=folder, model_dir=folder / "model", reference=name, is_checkpoint=False
        )
        model = trained(base, tiny_tokenizer, LoraConfig(rank=4), head=head)
        models.publish(model, tiny_tokenizer, parent.model_dir)
        write = golden.write_scores if head else golden.write_logits
        facts = write(model, SEQUENCES, PAD, parent.model_dir, torch.float32)
        parent.manifest = SimpleNamespace(golden=facts)
        parents.append(parent)
    sft, rm = parents
    reference = models.load_causal(sft.model_dir, tiny_tokenizer, dtype=torch.float32)
    reward_model = models.load_scalar(rm.model_dir, tiny_tokenizer, dtype=torch.float32)

    def roles():
        return Roles(
            policy=None, critic=None, reference=reference.eval(), reward_model=reward_model.eval()
        )

    scorers = {"rm/t": reward_model}
    line = golden.check_roles(roles(), scorers, sft, [rm])
    assert "reference = sft/t" in line
    assert "reward model = rm/t" in line
    with torch.no_grad():
        reward_model.score.weight += 0.1
    with pytest.raises(RegistryError, match="rm/t: loaded from"):
        golden.check_roles(roles(), scorers, sft, [rm])
    with torch.no_grad():
        reward_model.score.weight -= 0.1
        reference.lm_head.weight[3] += 0.1
    with pytest.raises(RegistryError, match="sft/t: loaded from"):
        golden.check_roles(roles(), scorers, sft, [rm])
