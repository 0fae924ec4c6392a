"""LoRA-drop: what is measured, which layers share, and that shared weights train and come back."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import test_courses
import torch
from peft.tuners.lora import LoraLayer
from rounding import TINY
from test_courses import (
    assert_equal,
    config,
    demonstrations,
    plain_loss,
    preferences,
    train,
    trained,
    worst,
)
from torch.testing import assert_close

from rlhf import interrupts, supervised
from rlhf.methods import lora, lora_drop
from rlhf.methods.settings import LoraDropConfig

pytestmark = pytest.mark.usefixtures("process_group")

DROP = LoraDropConfig(rank=2, threshold=0.4, sample=0.5, sample_steps=3)


def attach(method, head=False):
    return test_courses.attach(method, head, layers=4)


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


@torch.no_grad()
def perturb(model):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def rows_of_all_lengths(head):
    """Lengths differ, so that batches are padded."""
    if head:
        rows = preferences(6)
        return [
            {"chosen_ids": row["chosen_ids"][: 3 + i], "rejected_ids": row["rejected_ids"][: 9 - i]}
            for i, row in enumerate(rows)
        ]
    rows = demonstrations(6)
    return [{name: ids[: 7 + i] for name, ids in row.items()} for i, row in enumerate(rows)]


# what is measured -----------------------------------------------------------------------------


@pytest.mark.parametrize("head", [False, True], ids=["sft", "rm"])
def test_importance_is_what_each_layer_adds_and_padding_adds_nothing(tiny_tokenizer, head):
    """Row by row without padding, and B A x by hand from what each layer is given."""
    model = perturb(attach(DROP, head))
    rows = rows_of_all_lengths(head)
    expected = dict.fromkeys(layers(model), 0.0)
    hooks = []
    for name, layer in layers(model).items():

        def hook(module, given, out, name=name, layer=layer):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            for x in given[0].reshape(-1, a.shape[1]):
                expected[name] += float((16.0 * b @ (a @ x)).square().sum())

        hooks.append(layer.register_forward_hook(hook))
    with torch.no_grad():
        for row in rows:
            for name in ("chosen_ids", "rejected_ids") if head else ("input_ids",):
                model(input_ids=torch.tensor([row[name]]))
    for hook in hooks:
        hook.remove()
    loss = supervised._plain_loss(model, tiny_tokenizer)
    for micro in (1, 4):
        found = lora_drop.importance(model, rows, loss, micro_batch_size=micro)
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("head", [False, True], ids=["sft", "rm"])
def test_the_first_training_minimises_the_loss_of_training(tiny_tokenizer, head):
    """Its loss is the one that the trainers have, however the rows are split."""
    model = perturb(attach(DROP, head))
    rows = preferences() if head else demonstrations()
    loss = supervised._plain_loss(model, tiny_tokenizer)
    for size in (8, 3):
        parts = [loss(rows[start : start + size]) for start in range(0, 8, size)]
        mean = sum(part[0] for part in parts) / sum(part[1] for part in parts)
        assert_close(mean, plain_loss(model, head), atol=TINY, rtol=0)


@pytest.mark.parametrize("micro", [8, 3])
def test_a_step_of_it_follows_the_gradient_of_the_mean(tiny_tokenizer, micro):
    """With plain descent in place of Adam, which does not see how large a gradient is."""
    model = perturb(attach(DROP))
    weights = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in weights]
    grads = torch.autograd.grad(plain_loss(model, False), weights)
    descent = torch.optim.SGD(weights, lr=1.0)
    loss = supervised._plain_loss(model, tiny_tokenizer)
    lora_drop._step(weights, descent, demonstrations(), loss, micro, 1e9)
    for parameter, start, grad in zip(weights, before, grads, strict=True):
        assert_close(parameter.detach(), start - grad, atol=1e-5, rtol=1e-4)


def test_the_first_training_leaves_nothing_behind(tiny_tokenizer):
    """But for the plan: weights, gradients and generators are as they were; and it is seeded."""
    plans = []
    for _ in range(2):
        model = attach(DROP)
        before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        seen = []
        loss = supervised._plain_loss(model, tiny_tokenizer)

        def listening(rows, loss=loss, model=model, seen=seen, before=before):
            seen.append([row["input_ids"] for row in rows])
            if len(seen) == 4:  # of importance: after three steps of training
                moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
                assert moved == set(trained(model))
            return loss(rows)

        plans.append(
            lora_drop.choose(
                model,
                DROP,
                demonstrations(),
                listening,
                batch_size=4,
                micro_batch_size=4,
                learning_rate=1e-2,
                max_grad_norm=1.0,
                seed=3,
            )
        )
        assert len(seen) == 4
        assert all(sorted(batch) == sorted(seen[0]) for batch in seen), "half of the rows: four"
        assert torch.equal(torch.get_rng_state(), state)
        assert_equal(dict(model.state_dict()), dict(before))
        assert all(p.grad is None for p in model.parameters())
    assert plans[0] == plans[1]


# the plan -------------------------------------------------------------------------------------


def test_a_plan_by_hand():
    """Three kinds of layers with the same shapes in four layers; shares of each kind alone."""
    model = peft.get_peft_model(
        torch.nn.ModuleDict(
            {
                f"l{i}": torch.nn.ModuleDict({k: torch.nn.Linear(4, 4) for k in "qv"})
                for i in range(4)
            }
        ),
        peft.LoraConfig(r=2, target_modules=["q", "v"]),
    )
    name = "base_model.model.l{}.{}".format
    q, v = [1.0, 5.0, 3.0, 1.0], [100.0, 0.0, 0.0, 0.0]
    found = {name(i, k): part[i] for i in range(4) for k, part in (("q", q), ("v", v))}

    def plan(threshold):
        return lora_drop.plan(model, found, threshold=threshold)

    assert plan(0.8) == {  # 5 + 3 of 10
        "kept": [name(1, "q"), name(2, "q"), name(0, "v")],
        "q 4x4": [name(0, "q"), name(3, "q")],
        "v 4x4": [name(1, "v"), name(2, "v"), name(3, "v")],
    }
    assert plan(0.81)["kept"] == [name(1, "q"), name(2, "q"), name(0, "q"), name(0, "v")]
    assert plan(0.5)["kept"] == [name(1, "q"), name(0, "v")]
    assert plan(0.0)["kept"] == []
    assert sorted(plan(1.0)["kept"]) == sorted(found)


def shared_with(model):
    """Layers whose A is another layer's too, and the number of trained tensors."""
    seen = {}
    for name, layer in layers(model).items():
        seen.setdefault(id(layer.lora_A["default"].weight), []).append(name)
    return [names for names in seen.values() if len(names) > 1]


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_shared_weights_train_as_in_plain_torch(tiny_tokenizer, tmp_path, zero):
    """The slow way: one pair of matrices by hand, put in both layers by functional_call."""
    model = attach(DROP)
    cfg = config(max_steps=4, learning_rate=1e-3, schedule="linear")
    tracker = train(model, DROP, tiny_tokenizer, tmp_path, zero=zero, cfg=cfg)
    groups = shared_with(model)
    assert groups, "nothing is shared"
    assert any(len(names) == 2 for names in groups), "some kinds should keep two layers"

    slow = attach(DROP)
    weights = trained(slow)
    owner = {name: name for name in weights}
    for first, *others in groups:
        for other in others:
            for part in ("lora_A", "lora_B"):
                owner[f"{other}.{part}.default.weight"] = f"{first}.{part}.default.weight"
    free = {name: weights[name].requires_grad_(True) for name in set(owner.values())}
    optimizer = torch.optim.AdamW(free.values(), weight_decay=0.0)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 4)
        given = {name: free[mine] for name, mine in owner.items()}
        loss = plain_loss(
            lambda given=given, **inputs: torch.func.functional_call(slow, given, (), inputs), False
        )
        assert tracker.losses()[step + 1] == pytest.approx(float(loss.detach()), abs=TINY)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(free.values()), 1.0)
        optimizer.step()
    found = {name: dict(model.named_parameters(remove_duplicate=False))[name] for name in owner}
    assert worst(found, {name: free[mine].detach() for name, mine in owner.items()}) < 1e-5


def test_files_hold_a_copy_for_each_layer_and_the_plan(tiny_tokenizer, tmp_path):
    model = attach(DROP)
    train(model, DROP, tiny_tokenizer, tmp_path / "run", cfg=config(max_steps=2))
    ids = torch.tensor([row["input_ids"] for row in demonstrations()])
    folder = tmp_path / "adapter"
    lora.save(model, folder)
    assert json.loads((folder / "lora_drop.json").read_text()) == model.lora_drop_plan
    checkpoint = next((tmp_path / "run").rglob("lora_drop.json"))
    assert json.loads(checkpoint.read_text()) == model.lora_drop_plan
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        again = peft.PeftModel.from_pretrained(test_courses.tiny(layers=4), folder).eval()
        assert torch.equal(again(input_ids=ids).logits, expected)
        with again.disable_adapter():
            assert torch.equal(
                again(input_ids=ids).logits,
                test_courses.tiny(layers=4).eval()(input_ids=ids).logits,
            )
        merged = again.merge_and_unload()
        assert_close(merged(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
        perturb(model)
        lora.restore(model, folder)
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert shared_with(model), "restoring must not part what is shared"


def test_a_resumed_run_shares_without_measuring_again(tiny_tokenizer, tmp_path, monkeypatch):
    zero = 2
    whole = attach(DROP)
    expected = train(whole, DROP, tiny_tokenizer, tmp_path / "a", zero=zero)
    with pytest.raises(interrupts.Terminated):
        train(attach(DROP), DROP, tiny_tokenizer, tmp_path / "b", zero=zero, stop=3)
    monkeypatch.setattr(lora_drop, "choose", None)
    model = attach(DROP)
    tracker = train(model, DROP, tiny_tokenizer, tmp_path / "b", zero=zero)
    assert_equal(trained(model), trained(whole))
    assert shared_with(model) == shared_with(whole)
    losses = expected.losses()
    assert tracker.losses() == {step: losses[step] for step in range(5, 11)}


def test_a_reward_model_is_measured_by_its_pairs(tiny_tokenizer, tmp_path):
    model = attach(DROP, head=True)
    tracker = train(model, DROP, tiny_tokenizer, tmp_path)
    assert shared_with(model)
    losses = tracker.losses()
    assert losses[10] < losses[1] - 0.1
