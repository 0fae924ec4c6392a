"""The LoRA family by peft: fresh adapters, what files hold, and whose learning rate is whose."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from rounding import TINY
from safetensors.torch import load_file
from torch.testing import assert_close

from rlhf import engine, models
from rlhf.config import EngineConfig
from rlhf.errors import ConfigError
from rlhf.methods import lora
from rlhf.methods.settings import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    LoraDropConfig,
    LoraPlusConfig,
    PhasedLoraConfig,
    VeraConfig,
)

pytestmark = pytest.mark.usefixtures("process_group")

METHODS = {
    "lora": LoraConfig(rank=4),
    "rslora": LoraConfig(name="rslora", rank=4),
    "dora": LoraConfig(name="dora", rank=4),
    "pissa": LoraConfig(name="pissa", rank=4),
    "lora_fa": LoraConfig(name="lora_fa", rank=4),
    "qlora": LoraConfig(name="qlora", rank=4),
    "lora_plus": LoraPlusConfig(rank=4),
    "adalora": AdaLoraConfig(rank=4),
    "lora_drop": LoraDropConfig(rank=4),
    "relora": PhasedLoraConfig(name="relora", rank=2, phases=2),
    "plora": PhasedLoraConfig(name="plora", rank=2, phases=2),
    "vera": VeraConfig(rank=8),
    "ia3": IA3Config(),
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
NONE = torch.tensor([[1, 50, 60, 70, 80, 90, 100]])


@pytest.fixture
def build(tiny_model, tiny_tokenizer, tmp_path):
    """A factory of bases: the same weights each time, with a head or without."""
    folder = tmp_path / "base"
    tiny_model(initializer_range=0.1).save_pretrained(folder)

    def make(head=False):
        if not head:
            return models.load_causal(folder, tiny_tokenizer, dtype=torch.float32)
        torch.manual_seed(5)
        return models.load_scalar(folder, tiny_tokenizer, dtype=torch.float32)

    return make


def attach(base, method, head=False, steps=10):
    torch.manual_seed(0)
    return lora.attach(base, method, head=head, steps=steps).eval()


@torch.no_grad()
def perturb(model):
    """As training would: every trained number moves."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def said(model, ids=NONE):
    return model(input_ids=ids).logits


@torch.no_grad()
def head_values(model, ids=NONE):
    return models.token_values(model, ids, torch.ones_like(ids).bool())


def off(found, expected):
    return float((found - expected).abs().max())


# fresh ----------------------------------------------------------------------------------------


@each_method
def test_a_fresh_adapter_says_nothing_and_only_it_is_trained(build, method):
    before = said(build())
    model = attach(build(), method)
    assert isinstance(model, peft.PeftModel)
    close = TINY if method.name == "pissa" else 0
    assert off(said(model), before) <= close
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    part = "ia3_" if method.name == "ia3" else "vera_lambda" if method.name == "vera" else "lora_"
    assert all(part in name for name in trained)
    perturb(model)
    assert off(said(model), before) > 0.1
    if method.name != "pissa":  # whose base is another one
        with model.disable_adapter():
            assert torch.equal(said(model), before)


@each_method
def test_a_head_is_trained_with_it(build, method):
    model = attach(build(head=True), method, head=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum("score" in name for name in trained) == 1
    assert len(trained) > 1


@each_method
def test_padding_changes_nothing_in_any_way_of_running_it(build, method):
    """Rows of other lengths beside it, padded left or right; sampling with the cache too."""
    model = perturb(attach(build(), method))
    ids = NONE
    for left in (True, False):
        pad = torch.zeros(1, 3, dtype=torch.long)
        row = torch.cat([pad, ids] if left else [ids, pad], 1)
        batch = torch.cat([row, torch.full((1, 10), 44)])
        mask = torch.ones_like(batch).bool()
        mask[0] = row[0] != 0
        places = mask[0].nonzero().squeeze(1)
        with torch.no_grad():
            hidden = models.hidden_states(model, batch, mask)[0, places]
            alone = models.hidden_states(model, ids, torch.ones_like(ids).bool())[0]
            assert off(hidden, alone) < 1e-4
            if left:
                found = models.response_logits(model, batch, mask, 4)[0]
                assert off(found, said(model)[0, -5:-1]) < 1e-4
                new = model.generate(
                    input_ids=batch, attention_mask=mask.long(), max_new_tokens=4, do_sample=False
                )
                slow = ids
                for _ in range(4):
                    slow = torch.cat([slow, said(model, slow)[:, -1].argmax(-1, True)], 1)
                assert new[0, -4:].tolist() == slow[0, -4:].tolist()


def test_settings_arrive_at_peft(build):
    def config(method):
        return attach(build(), method).peft_config["default"]

    plain, rslora, dora = (config(METHODS[name]) for name in ("lora", "rslora", "dora"))
    assert (plain.use_rslora, rslora.use_rslora) == (False, True)
    assert (plain.use_dora, dora.use_dora) == (False, True)
    ada = config(AdaLoraConfig(rank=4, begin=0.1, end=0.5, every=3, orthogonality=0.2))
    found = (ada.target_r, ada.init_r, ada.tinit, ada.tfinal, ada.deltaT, ada.total_step)
    assert found == (4, 6, 1, 5, 3, 10)
    assert ada.orth_reg_weight == 0.2
    assert config(VeraConfig(rank=8, d_initial=0.3)).d_initial == 0.3
    assert config(LoraConfig(rank=4, dropout=0.25)).lora_dropout == 0.25


@pytest.mark.parametrize(
    ("name", "scale"), [("lora", 6 / 4), ("rslora", 6 / 2), ("relora", 6 / 4), ("plora", 6 / 4)]
)
def test_the_scale_is_alpha_over_rank(build, name, scale):
    kind = PhasedLoraConfig if name in ("relora", "plora") else LoraConfig
    model = attach(build(), kind(name=name, rank=4, alpha=6.0))
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
    assert layer.scaling["default"] == pytest.approx(scale)
    ranks = {len(m.lora_A["default"].weight) for m in model.modules() if isinstance(m, LoraLayer)}
    assert ranks == {16 if kind is PhasedLoraConfig else 4}


def test_vera_takes_layers_of_any_shape(build):
    model = attach(build(), VeraConfig(rank=8))
    shapes = [tuple(p.shape) for n, p in model.named_parameters() if "vera_lambda_b" in n]
    assert sorted(shapes) == [(16,)] * 4 + [(32,)] * 6 + [(64,)] * 4


def test_ia3_targets_are_those_of_the_model_type(build):
    def scaled(model):
        return {n.split(".")[-3] for n, _ in model.named_parameters() if ".ia3_l." in n}

    assert scaled(attach(build(), IA3Config())) == {"k_proj", "v_proj", "down_proj"}
    unknown = build()
    unknown.config.model_type = "something_new"
    model = attach(unknown, IA3Config())
    assert scaled(model) == {"k_proj", "v_proj", "down_proj"}
    assert model.peft_config["default"].feedforward_modules == {"down_proj"}
    assert scaled(attach(build(), IA3Config(targets="q_proj, v_proj"))) == {"q_proj", "v_proj"}
    given = attach(build(), IA3Config(targets="q_proj,up_proj", feedforward="up_proj"))
    assert given.peft_config["default"].feedforward_modules == {"up_proj"}


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (LoraConfig(targets="q_proj,nonsense"), "method.targets=q_proj,nonsense.*q_proj, up_proj"),
        (VeraConfig(targets="nonsense"), "method.targets=nonsense.*down_proj"),
        (IA3Config(targets="nonsense"), "method.targets=nonsense.*down_proj"),
        (IA3Config(feedforward="up_proj"), "method.feedforward=up_proj.*method.targets"),
        (LoraConfig(name="pissa", rank=17), "method.rank=17.*k_proj has 16"),
        (AdaLoraConfig(rank=4, initial_rank=4), "method.initial_rank=4.*nothing to prune"),
        (AdaLoraConfig(rank=4, begin=0.5, end=0.5), "method.begin=0.5.*of 10 optimizer steps none"),
    ],
)
def test_what_cannot_be_is_refused_by_name(build, method, said):
    with pytest.raises(ConfigError, match=said):
        attach(build(), method)


def test_adalora_must_know_the_number_of_steps(build):
    with pytest.raises(ConfigError, match="number is not known"):
        attach(build(), METHODS["adalora"], steps=None)


# LoRA-FA --------------------------------------------------------------------------------------


def trained_matrices(model):
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return {part for name in names for part in ("lora_A", "lora_B") if part in name}


def test_the_a_of_lora_fa_stays_frozen(build, tmp_path):
    """What makes adapters trainable makes A trainable too; `settle` is how it is put right."""
    method = METHODS["lora_fa"]
    model = attach(build(), method)
    assert trained_matrices(model) == {"lora_B"}
    with model.disable_adapter():
        pass
    assert trained_matrices(model) == {"lora_A", "lora_B"}, "peft changed: settle is not needed"
    assert trained_matrices(lora.settle(model, method)) == {"lora_B"}
    lora.save(model, tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(build(), tmp_path / "adapter", is_trainable=True)
    assert trained_matrices(lora.settle(again, method)) == {"lora_B"}
    other = attach(build(), METHODS["lora"])
    assert trained_matrices(lora.settle(other, METHODS["lora"])) == {"lora_A", "lora_B"}


def test_a_backbone_keeps_the_a_of_lora_fa_frozen(build):
    model = attach(build(), METHODS["lora_fa"])
    backbone = models.Backbone(model)
    for adapter in ("default", None, "default"):
        backbone.use(adapter)
        assert trained_matrices(model) == {"lora_B"}


# files ----------------------------------------------------------------------------------------


@each_method
@pytest.mark.parametrize("head", [False, True], ids=["causal", "scalar"])
def test_a_saved_adapter_is_the_same_on_a_fresh_base(build, method, head, tmp_path):
    model = perturb(attach(build(head), method, head))
    says = head_values if head else said
    lora.save(model, tmp_path / "adapter")
    assert {p.name for p in (tmp_path / "adapter").iterdir()} <= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    other = build(head)
    if head:
        torch.nn.init.zeros_(other.score.weight)  # the head comes from the file
    again = peft.PeftModel.from_pretrained(other, tmp_path / "adapter").eval()
    close = TINY if method.name == "pissa" else 0
    assert off(says(again), says(model)) <= close
    with again.disable_adapter():
        if not head:
            assert torch.equal(said(again), said(build()))
    assert off(says(again.merge_and_unload()), says(model)) < 1e-4
    whole = copy.deepcopy(model).merge_and_unload()
    assert off(says(whole), says(model)) < 1e-4


@each_method
def test_weights_are_put_back_in_place(build, method, tmp_path):
    model = perturb(attach(build(head=True), method, head=True))
    lora.save(model, tmp_path / "adapter")
    before = head_values(model)
    shapes = [p.shape for p in model.parameters()]
    perturb(model)
    assert off(head_values(model), before) > 1e-3
    lora.restore(model, tmp_path / "adapter")
    assert torch.equal(head_values(model), before)
    assert [p.shape for p in model.parameters()] == shapes


def test_a_vera_file_is_small(build, tmp_path):
    lora.save(attach(build(), METHODS["vera"]), tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all("vera_lambda" in name for name in weights)


# PiSSA ----------------------------------------------------------------------------------------


def test_pissa_starts_from_the_largest_singular_vectors(build):
    base = build()
    weight = base.model.layers[1].mlp.up_proj.weight.detach().clone()
    layer = attach(base, METHODS["pissa"]).get_base_model().model.layers[1].mlp.up_proj
    u, s, v = torch.linalg.svd(weight)
    expected = u[:, :4] @ torch.diag(s[:4]) @ v[:4]
    assert_close(layer.get_delta_weight("default"), expected, atol=1e-5, rtol=1e-4)
    assert_close(layer.get_base_layer().weight, weight - expected, atol=1e-5, rtol=1e-4)


def test_a_pissa_file_is_an_ordinary_lora_of_twice_the_rank(build, tmp_path):
    """By the slow way: what the merged weights are, less what they were."""
    model = perturb(attach(build(), METHODS["pissa"]))
    lora.save(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (8, True)
    whole = copy.deepcopy(model).merge_and_unload().state_dict()
    again = peft.PeftModel.from_pretrained(build(), tmp_path / "adapter")
    for name, module in again.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            moved = whole[f"{name}.weight"] - module.get_base_layer().weight
            assert_close(module.get_delta_weight("default"), moved, atol=1e-5, rtol=1e-4)
    ids = torch.randint(6, 200, (4, 12), generator=torch.Generator().manual_seed(0))
    assert off(said(again.eval(), ids), said(model, ids)) <= TINY
    with again.disable_adapter():
        assert torch.equal(said(again, ids), said(build(), ids))


# AdaLoRA --------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [False, True], ids=["causal", "scalar"])
def test_a_layer_that_lost_its_whole_rank_is_still_in_the_file(build, tmp_path, head):
    """No tensor of a file may be empty: `parts.refuse_empty` takes that for a lost weight."""
    says = head_values if head else said
    model = perturb(attach(build(head), METHODS["adalora"], head))
    shapes = [p.shape for p in model.parameters()]
    inner = model.get_base_model()
    pattern = {n: [True] * 6 for n, _ in inner.named_parameters() if "lora_E" in n}
    lost, *_ = pattern
    pattern[lost] = [False] * 6
    pattern[list(pattern)[1]] = [True, False, True, False, False, True]
    model.peft_config["default"].rank_pattern = pattern
    model.base_model.rankallocator.mask_using_rank_pattern(inner, pattern)
    before = says(model)
    lora.save(model, tmp_path / "adapter")
    assert model.peft_config["default"].rank_pattern == pattern
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(0 not in tensor.shape for tensor in weights.values())
    assert sorted({len(t) for n, t in weights.items() if "lora_E" in n}) == [1, 3, 6]
    again = peft.PeftModel.from_pretrained(build(head), tmp_path / "adapter").eval()
    assert off(says(again), before) <= TINY
    perturb(model)
    lora.restore(model, tmp_path / "adapter")
    assert torch.equal(says(model), before)
    assert [p.shape for p in model.parameters()] == shapes, "an optimizer holds these"


# learning rates -------------------------------------------------------------------------------


def test_lora_plus_gives_b_a_higher_rate(build):
    """Every trained weight once: B in the second group, A and the head in the first."""
    model = attach(build(head=True), LoraPlusConfig(rank=4, ratio=8.0), head=True)
    slow, fast = lora.groups(model, LoraPlusConfig(rank=4, ratio=8.0), 1e-3)
    assert (slow["lr"], fast["lr"]) == (1e-3, 8e-3)
    assert slow["weight_decay"] == fast["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert {id(p) for g in (slow, fast) for p in g["params"]} == set(names)
    assert len(slow["params"]) + len(fast["params"]) == len(names)
    layers = sum(isinstance(m, LoraLayer) for m in model.modules())
    assert ["lora_B" in names[id(p)] for p in fast["params"]] == [True] * layers
    assert sum("score" in names[id(p)] for p in slow["params"]) == 1


def test_other_methods_have_one_rate(build):
    for name in ("lora", "dora", "lora_fa", "adalora", "vera", "ia3"):
        assert lora.groups(attach(build(), METHODS[name]), METHODS[name], 1e-3) is None


def test_groups_of_a_role_on_a_shared_backbone(build):
    method = METHODS["lora_plus"]
    model = attach(build(), method)
    head = torch.nn.Linear(32, 1, bias=False)
    role = models.SharedRole(models.Backbone(model), "default", head)
    slow, fast = lora.groups(role, method, 1e-3, inside=models.whole(role))
    layers = sum(isinstance(m, LoraLayer) for m in model.modules())
    assert (len(slow["params"]), len(fast["params"])) == (layers + 1, layers)
    assert any(p is head.weight for p in slow["params"])


@pytest.mark.parametrize("zero", [0, 2])
def test_an_engine_moves_b_faster(build, zero):
    """The first step of Adam moves a weight by its learning rate, whatever its gradient."""
    method = LoraPlusConfig(rank=4, ratio=8.0)
    torch.manual_seed(0)
    model = attach(build(), method)
    perturb(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    made = engine.Engine(
        model,
        EngineConfig(zero_stage=zero),
        learning_rate=1e-3,
        factor=lambda step: 0.5,
        micro_batch_size=1,
        accumulation=1,
        max_grad_norm=1e9,
        epsilon=1e-12,
        groups=lora.groups(model, method, 1e-3),
    )
    made.backward(model(input_ids=NONE, labels=NONE).loss)
    made.step()
    for name, p in model.named_parameters():
        if name in before:
            rate = 0.5 * (8e-3 if "lora_B" in name else 1e-3)
            moved = (p.detach() - before[name]).abs()
            assert_close(moved.median(), torch.tensor(rate), rtol=0.02, atol=0)
