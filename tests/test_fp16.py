"""fp16: loss scaling, updates that are skipped, and what they must not look like.

There is no GPU here. torch's CPU kernels do compute in fp16, so DeepSpeed is told that the device
can: the scale, the checks for overflow and the fp32 masters are its own.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

import ppo_steps
import pytest
import test_engine
import torch
from test_engine import LEARNING_RATE, MAX_GRAD_NORM, ROWS, UPDATES, batch, by_torch, factor
from test_ppo import make_roles, ready, stage
from test_supervised import demonstrations, policy, train, train_sft

from rlhf import engine, golden, models, ppo, proofs
from rlhf.config import EngineConfig, ModelConfig
from rlhf.errors import StoppedByGuard

__all__ = ["make_roles", "policy"]  # fixtures

HALF = EngineConfig(zero_stage=2, dtype="fp16")


@pytest.fixture(scope="module", autouse=True)
def process_group():
    before = dict(os.environ)
    engine.start(0)
    from deepspeed.accelerator import get_accelerator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
        yield
    os.environ.clear()
    os.environ.update(before)


# what is asked of DeepSpeed ----------------------------------------------------------------------


def test_the_config_asks_for_dynamic_loss_scaling():
    sizes = {"micro_batch_size": 1, "accumulation": 1, "max_grad_norm": 1.0}
    given = engine.deepspeed_config(HALF, **sizes)
    assert given["fp16"]["enabled"] is True
    assert given["fp16"]["initial_scale_power"] == 16
    assert given["fp16"]["loss_scale_window"] == 1000
    assert "loss_scale" not in given["fp16"], "a fixed scale"
    assert given["bf16"]["enabled"] is False
    for dtype in ("fp32", "bf16"):
        assert "fp16" not in engine.deepspeed_config(replace(HALF, dtype=dtype), **sizes)


def test_every_dtype_has_a_name_and_its_tolerances():
    names = ("fp32", "fp16", "bf16")  # the finest first
    assert set(names) == set(engine.DTYPES)
    for table in (golden.TOLERANCE, {t: max(v) for t, v in proofs.TOLERANCE.items()}):
        bounds = [table[engine.DTYPES[name]] for name in names]
        assert bounds == sorted(bounds)
        assert len(set(bounds)) == 3
    for name in names:
        assert engine.dtype(EngineConfig(dtype=name)) == engine.DTYPES[name]
        assert ModelConfig(path="somewhere", dtype=name).dtype == name


@pytest.mark.parametrize(("hardware", "expected"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_that_only_emulates_bf16_trains_in_fp32(monkeypatch, hardware, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    if hardware:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert engine.dtype(EngineConfig()) == engine.DTYPES[expected]


# updates -----------------------------------------------------------------------------------------


class Run:
    """What updates by our engine looked like, one after another."""

    def __init__(self, zero_stage, micro, dtype="fp16", updates=UPDATES, spoilt=None):
        cfg = EngineConfig(zero_stage=zero_stage, dtype=dtype, partition_threshold=0)
        self.rates, self.norms, self.scales, self.weights = [], [], [], []
        module = test_engine.network().to(engine.DTYPES[dtype])
        module[0].requires_grad_(False)
        self.trainer = engine.Engine(
            module,
            cfg,
            learning_rate=LEARNING_RATE,
            factor=factor,
            micro_batch_size=micro,
            accumulation=ROWS // micro,
            max_grad_norm=MAX_GRAD_NORM,
        )
        self.weights.append(self.state())
        for update in range(updates):
            self.step(update, micro, math.nan if update == spoilt else 1.0)

    def step(self, update, micro, spoil=1.0):
        trainer = self.trainer
        self.rates.append(trainer.learning_rate)
        x, y, mask = (tensor[update] for tensor in batch())
        for start in range(0, ROWS, micro):
            part = slice(start, start + micro)
            out = trainer.module(x[part].to(trainer.module[2].weight.dtype)).squeeze(-1).float()
            error = (out - y[part]).square() * mask[part]
            trainer.backward(error.sum() / mask.sum() * spoil)
            trainer.step()
        self.norms.append(trainer.grad_norm)
        self.scales.append(getattr(trainer._engine.optimizer, "loss_scale", None))
        self.weights.append(self.state())

    def state(self):
        with engine.gathered(self.trainer.module):
            named = self.trainer.module.state_dict().items()
            return {name: tensor.float().clone() for name, tensor in named}

    def moved(self, update):
        before, after = self.weights[update : update + 2]
        return any(not torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("micro", [4, 1])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_weights_are_those_of_fp32(monkeypatch, zero_stage, micro):
    """Three updates move a weight by up to 0.09; fp16 gives gradients to one part in 2000."""
    monkeypatch.setattr(test_engine, "SIZES", [0.02, 0.6, 0.06])  # nothing overflows
    expected, norms = by_torch()
    run = Run(zero_stage, micro)
    assert run.norms == pytest.approx(norms, rel=5e-3)
    assert run.rates == pytest.approx([LEARNING_RATE, LEARNING_RATE / 2, LEARNING_RATE / 3])
    assert set(run.scales) == {2**16}
    for name, tensor in expected.items():
        off = (run.weights[-1][name] - tensor).abs()
        assert float(off.max()) < 5e-3, name
        assert float(off.mean()) < 5e-4, name


@pytest.mark.parametrize("micro", [4, 1])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_an_overflow_skips_the_update_and_halves_the_scale(zero_stage, micro):
    """The second batch is 30 times as large: its gradients, times 65536, are beyond fp16."""
    run = Run(zero_stage, micro)
    assert [run.moved(update) for update in range(UPDATES)] == [True, False, True]
    assert [norm is None for norm in run.norms] == [False, True, False]
    assert run.scales == [2**16, 2**15, 2**15]
    # The schedule counts updates that were made.
    assert run.rates == pytest.approx([LEARNING_RATE, LEARNING_RATE / 2, LEARNING_RATE / 2])


def test_zero0_is_as_wrong_as_its_rule_says(monkeypatch):
    """[fp16-zero0] goes when this fails."""
    monkeypatch.setattr(test_engine, "SIZES", [0.02, 0.6, 0.06])
    expected, _ = by_torch()
    run, start = Run(0, 4), test_engine.network().state_dict()
    for name in ("2.weight", "4.weight"):
        moved = (run.weights[-1][name] - start[name].half().float()).abs().mean()
        assert moved < 0.1 * (expected[name] - start[name]).abs().mean(), name


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_gradients_that_overflow_at_any_scale_stop_the_run(zero_stage):
    run = Run(zero_stage, 4)

    def spoilt():
        for _ in range(20):  # the scale is halved 15 times, then it is 1
            run.step(0, 4, math.nan)

    message = r"overflow in fp16 even where .* engine\.dtype=fp32"
    with pytest.raises(StoppedByGuard, match=message):
        spoilt()
    assert run.scales[-1] == 1
    assert not run.moved(len(run.weights) - 2)


def test_in_bf16_what_is_no_number_is_shown():
    """There is no scale to halve: the norm says so, and PPO's guard stops the run."""
    run = Run(2, 4, dtype="bf16", spoilt=1)
    assert not math.isfinite(run.norms[1])


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_resumed_run_goes_on_with_the_scale(tmp_path, zero_stage):
    run, resumed = Run(zero_stage, 4), Run(zero_stage, 4, updates=0)
    run.trainer.save(tmp_path)
    resumed.trainer.load(tmp_path)
    for each in (run, resumed):
        each.step(0, 4)
    assert resumed.scales == [2**15]
    assert resumed.rates[-1] == run.rates[-1]
    assert resumed.norms[-1] == run.norms[-1]
    for name, tensor in run.weights[-1].items():
        assert torch.equal(resumed.weights[-1][name], tensor), name


# the stages' loops -------------------------------------------------------------------------------


def columns(tracker, name):
    """{step: value} of what was logged."""
    return {step: line[name] for step, line in tracker if name in line}


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_sft_in_fp16_follows_that_in_fp32(policy, tiny_tokenizer, zero_stage):
    settings = {"max_steps": 3, "eval_every": 3}
    found = {}
    for dtype in ("fp32", "fp16"):
        cfg = EngineConfig(zero_stage=zero_stage, dtype=dtype)
        model = policy().to(engine.DTYPES[dtype])
        rows = demonstrations()
        _, _, tracker = train(train_sft, model, tiny_tokenizer, rows, engine_cfg=cfg, **settings)
        found[dtype] = [columns(tracker, f"train/{name}") for name in ("loss", "grad_norm")]
    (losses, norms), (half_losses, half_norms) = found["fp32"], found["fp16"]
    assert len(losses) == len(half_norms) == 3
    assert half_losses == pytest.approx(losses, rel=1e-3)
    assert half_norms == pytest.approx(norms, rel=1e-2)


def test_sft_waits_with_its_schedule_until_the_scale_is_small_enough(
    policy, tiny_tokenizer, monkeypatch
):
    monkeypatch.setitem(engine.LOSS_SCALING, "initial_scale_power", 20)
    settings = {"max_steps": 8, "eval_every": 4, "schedule": "linear"}
    model = policy().half()
    rows = demonstrations()
    _, _, tracker = train(train_sft, model, tiny_tokenizer, rows, engine_cfg=HALF, **settings)
    norms, rates = (columns(tracker, f"train/{name}") for name in ("grad_norm", "learning_rate"))
    skipped = 8 - len(norms)
    assert 2 <= skipped <= 6
    assert all(map(math.isfinite, norms.values()))
    assert sorted(norms) == list(range(skipped + 1, 9)), "the first ones"
    expected = [1e-3 * (1 - max(0, step - skipped) / 8) for step in range(8)]
    assert list(rates.values()) == pytest.approx(expected)


def test_sft_stops_where_no_scale_is_small_enough(policy, tiny_tokenizer):
    model = policy().half()
    model.lm_head.weight.register_hook(lambda grad: grad * math.nan)  # the loss itself is finite
    with pytest.raises(StoppedByGuard, match=r"overflow in fp16 even where"):
        train(train_sft, model, tiny_tokenizer, demonstrations(), engine_cfg=HALF, max_steps=20)


def test_ppo_takes_an_overflow_for_no_divergence(make_roles, tmp_path):
    cfg = replace(stage(epochs=3), engine=HALF)
    roles = make_roles()
    batch = ready(roles, cfg)
    batch = replace(batch, advantages=3000 * batch.advantages)
    engines = ppo.engines(roles.policy, roles.critic, cfg.ppo, cfg.engine)
    stats = ppo_steps.update(*engines, batch, cfg, step=1)
    assert engines[0]._engine.skipped_steps > 0
    ppo_steps.stopping(cfg, tmp_path, None).observe(
        batch, stats, step=1
    )  # which stops at an infinite norm
    assert engines[1]._engine.skipped_steps == 0
    assert "val/grad_norm" in stats


def test_weights_are_loaded_and_published_in_fp16(tiny_model_dir, tiny_tokenizer, tmp_path):
    cfg = ModelConfig(path=str(tiny_model_dir), dtype="fp16")
    model = models.load_base(cfg, tiny_tokenizer, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    models.publish(model, tiny_tokenizer, tmp_path / "model")
    again = models.load_causal(tmp_path / "model", tiny_tokenizer, dtype=torch.float16)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
