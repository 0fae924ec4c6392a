"""The engine: schedules by hand, and the same weights as plain torch however a batch is split."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from launching import start_ranks
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from rlhf import engine
from rlhf.config import EngineConfig

LEARNING_RATE = 0.05


@pytest.fixture(scope="module", autouse=True)
def extensions(tmp_path_factory):
    """One process group for this file, and the folder where DeepSpeed would compile operators."""
    before = dict(os.environ)
    folder = tmp_path_factory.mktemp("extensions")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    engine.start(0)
    yield folder
    os.environ.clear()
    os.environ.update(before)


# schedules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "warmup", "total", "expected"),
    [
        ("constant", 0.0, 3, [1, 1, 1, 1]),
        ("linear", 0.0, 4, [1, 3 / 4, 2 / 4, 1 / 4, 0, 0]),
        # Two of eight steps warm up, by thirds; six are left.
        ("linear", 0.25, 8, [1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0, 0]),
        ("constant", 0.25, 8, [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1]),
        # cos(0), cos(60 degrees), cos(120), cos(180), and no rise after the end.
        ("cosine", 0.25, 4, [1 / 2, 1, 3 / 4, 1 / 4, 0, 0]),
        ("cosine", 0.0, 2, [1, 1 / 2, 0, 0]),
        ("linear", 1.0, 3, [1 / 4, 2 / 4, 3 / 4, 1]),
        ("cosine", 0.01, 1, [1 / 2, 1]),  # a part of a step is a step of warm-up
    ],
)
def test_learning_rate_factor_by_hand(schedule, warmup, total, expected):
    factor = engine.learning_rate_factor(schedule, warmup=warmup, total=total)
    assert [factor(step) for step in range(len(expected))] == pytest.approx(expected, abs=1e-12)


def test_no_step_of_training_is_wasted():
    """The first update learns, and so does the last."""
    for schedule in ("constant", "linear", "cosine"):
        for warmup in (0.0, 0.1, 0.5):
            factor = engine.learning_rate_factor(schedule, warmup=warmup, total=20)
            assert all(0 < factor(step) <= 1 for step in range(20))
            assert max(map(factor, range(20))) == 1


# deepspeed's config ------------------------------------------------------------------------------


def test_deepspeed_config(monkeypatch):
    """An optimizer block would compile FusedAdam for minutes; a scheduler block is ours too."""

    def config(**settings):
        return engine.deepspeed_config(
            EngineConfig(**settings), micro_batch_size=3, accumulation=5, max_grad_norm=0.7
        )

    given = config(zero_stage=1, dtype="bf16")
    assert not {"optimizer", "scheduler", "fp16"} & set(given)
    assert given["zero_optimization"]["stage"] == 1
    assert given["gradient_clipping"] == 0.7
    assert given["gradient_accumulation_steps"] == 5
    assert given["train_batch_size"] == 15
    assert given["bf16"]["enabled"] is True
    assert config(dtype="fp32")["bf16"]["enabled"] is False
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert config()["train_batch_size"] == 60
    json.dumps(config())


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_buckets_are_no_larger_than_what_is_trained(zero_stage):
    """Half a billion numbers, which DeepSpeed sets aside otherwise, are 2 GB for any adapter."""
    module = network()
    module[0].requires_grad_(False)
    cfg = EngineConfig(zero_stage=zero_stage, dtype="fp32")
    sizes = {"micro_batch_size": 1, "accumulation": 1, "max_grad_norm": 1.0}
    made = engine.Engine(module, cfg, learning_rate=1.0, factor=factor, **sizes)
    assert made._engine.optimizer.reduce_bucket_size == 8 * 8 + 8 + 8 + 1
    chosen = replace(cfg, deepspeed={"zero_optimization": {"reduce_bucket_size": 7}})
    config = engine.deepspeed_config(chosen, module, **sizes)
    assert config["zero_optimization"]["reduce_bucket_size"] == 7


# updates -----------------------------------------------------------------------------------------

# Three updates of four ragged rows. The sizes of their gradients differ by a lot: Adam does not
# see a common factor, so clipping, or a wrong average, shows only through what later steps keep.
UPDATES, ROWS, WIDTH = 3, 4, 5
SIZES = [1.0, 30.0, 3.0]
MAX_GRAD_NORM = 1.5  # norms are 1.3, 47 and 1.9: left alone, cut, cut


def factor(step):
    return 1 / (1 + step)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def batch():
    """x [UPDATES, ROWS, WIDTH, 6], y and mask without the 6; rows of 5, 1, 3 and 4 tokens."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(UPDATES, ROWS, WIDTH, 6, generator=generator)
    y = torch.randn(UPDATES, ROWS, WIDTH, generator=generator)
    mask = torch.arange(WIDTH) < torch.tensor([5, 1, 3, 4])[:, None]
    return x, y * torch.tensor(SIZES)[:, None, None], mask.expand(UPDATES, ROWS, WIDTH)


def squared_error(module, x, y, mask, count):
    """One part of the mean over all real tokens: what is handed to `Engine.backward`."""
    return ((module(x).squeeze(-1) - y).square() * mask).sum() / count


def by_torch():
    """Weights after each update, and norms of the gradients, by plain AdamW on whole batches."""
    module = network()
    module[0].requires_grad_(False)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, eps=1e-5)
    norms = []
    for step, (x, y, mask) in enumerate(zip(*batch(), strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * factor(step)
        optimizer.zero_grad()
        squared_error(module, x, y, mask, mask.sum()).backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in trained))
        for p in trained:
            p.grad *= min(1.0, MAX_GRAD_NORM / norm)
        optimizer.step()
        norms.append(norm)
    return dict(module.state_dict()), norms


def by_engine(zero_stage, micro, rows=slice(None)):
    """The same by our engine, `micro` rows at a time, of `rows` of every batch."""
    module = network()
    module[0].requires_grad_(False)
    x, y, mask = (tensor[:, rows] for tensor in batch())
    trainer = engine.Engine(
        module,
        EngineConfig(zero_stage=zero_stage, partition_threshold=0),
        learning_rate=LEARNING_RATE,
        factor=factor,
        micro_batch_size=micro,
        accumulation=x.shape[1] // micro,
        max_grad_norm=MAX_GRAD_NORM,
    )
    norms, rates = [], []
    for update in range(UPDATES):
        rates.append(trainer.learning_rate)
        count = engine.sum_over_ranks(mask[update].sum())
        for start in range(0, x.shape[1], micro):
            part = slice(start, start + micro)
            pieces = (tensor[update, part] for tensor in (x, y, mask))
            trainer.backward(squared_error(trainer.module, *pieces, count))
            trainer.step()
        norms.append(trainer.grad_norm)
    assert engine.is_split(trainer.module) == (zero_stage == 3)
    with engine.gathered(trainer.module):
        state = {name: tensor.clone() for name, tensor in trainer.module.state_dict().items()}
    return state, norms, rates


def test_clipping_matters_here():
    """It binds in some updates and not in others, or the next test could not fail for it."""
    _, norms = by_torch()
    assert min(norms) < 0.9 * MAX_GRAD_NORM
    assert max(norms) > 10 * MAX_GRAD_NORM


@pytest.mark.parametrize("micro", [4, 2, 1])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_weights_are_those_of_plain_torch(zero_stage, micro):
    expected, expected_norms = by_torch()
    state, norms, rates = by_engine(zero_stage, micro)
    assert torch.equal(state["0.weight"], network()[0].weight)  # frozen
    for name, tensor in expected.items():
        assert_close(state[name], tensor, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    assert rates == pytest.approx([LEARNING_RATE, LEARNING_RATE / 2, LEARNING_RATE / 3])


def test_every_accumulation_th_step_updates():
    module = network()
    trainer = engine.Engine(
        module,
        EngineConfig(zero_stage=2),
        learning_rate=LEARNING_RATE,
        factor=lambda step: 1.0,
        micro_batch_size=1,
        accumulation=3,
        max_grad_norm=1.0,
    )
    moved = []
    for _ in range(6):
        before = module[4].weight.detach().clone()
        trainer.backward(trainer.module(torch.ones(1, 6)).sum())
        trainer.step()
        moved.append(not torch.equal(module[4].weight, before))
    assert moved == [False, False, True, False, False, True]


def test_a_split_model_is_whole_and_without_hooks_for_a_while():
    """And learns on as if nothing had been."""
    x = torch.ones(2, 6)
    expected = network()(x).detach()

    def trained(look: bool) -> dict[str, torch.Tensor]:
        settings = EngineConfig(zero_stage=3, partition_threshold=0)
        options = {"learning_rate": 0.1, "factor": lambda step: 1.0, "max_grad_norm": 1.0}
        made = engine.Engine(network(), settings, micro_batch_size=1, accumulation=1, **options)
        module = made.module
        for update in range(2):
            if look:
                hooks = [dict(part._forward_pre_hooks) for part in module.modules()]
                with engine.whole(module), torch.no_grad():
                    assert not any(part._forward_pre_hooks for part in module.modules())
                    found = module(x)
                    assert all(p.numel() > 0 for p in module.parameters())
                assert [dict(part._forward_pre_hooks) for part in module.modules()] == hooks
                assert any(hooks)
                assert torch.equal(found, expected) is (update == 0)
            assert all(p.numel() == 0 for p in module.parameters())
            made.backward(module(x).sum())
            made.step()
        with engine.gathered(module):
            return {name: p.detach().clone() for name, p in module.named_parameters()}

    looked, plain = trained(look=True), trained(look=False)
    assert all(torch.equal(looked[name], plain[name]) for name in plain)


def test_parts_of_a_loaded_optimizer_count_their_own_steps():
    """One tensor for all of them would count each step as often as there are parts."""
    shared = torch.tensor(2.0)
    states = {"a": {"step": shared}, "b": {"step": shared}, "c": {"step": 2}}
    engine.separate_steps(
        SimpleNamespace(optimizer=SimpleNamespace(optimizer=SimpleNamespace(state=states)))
    )
    for name in "ab":
        states[name]["step"] += 1
    assert [float(state["step"]) for state in states.values()] == [3, 3, 2]
    engine.separate_steps(SimpleNamespace(optimizer=object()))  # ZeRO-0


def test_nothing_is_compiled_at_start(extensions):
    by_engine(2, 2)
    assert not list(extensions.rglob("*"))


# processes ---------------------------------------------------------------------------------------


def test_one_process_has_only_itself():
    value = torch.tensor([1.0, 2.0])
    assert engine.sum_over_ranks(value) is value
    assert engine.gather_objects({"a": 1}) == [{"a": 1}]


def worker(folder):
    """One of two processes: every second row of each batch, sharded and not."""
    engine.start(0)
    rank = int(os.environ["RANK"])
    value = torch.tensor([1.0 + rank])
    assert engine.sum_over_ranks(value).tolist() == [3.0]
    assert value.tolist() == [1.0 + rank], "the argument is left alone"
    assert engine.gather_objects(f"rank {rank}") == ["rank 0", "rank 1"]
    for zero_stage in (0, 2, 3):
        state, norms, _ = by_engine(zero_stage, 1, rows=slice(rank, None, 2))
        state |= {"norms": torch.tensor(norms)}
        save_file(state, os.path.join(folder, f"zero{zero_stage}-rank{rank}.safetensors"))


def test_two_processes_end_with_the_weights_of_one(tmp_path):
    folder = str(tmp_path / "extensions")
    env = {"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": folder}
    start_ranks(2, __file__, str(tmp_path), timeout=900, **env)
    expected, expected_norms = by_torch()
    for name in (f"zero{stage}-rank{rank}" for stage in (0, 2, 3) for rank in range(2)):
        state = load_file(tmp_path / f"{name}.safetensors")
        assert state.pop("norms").tolist() == pytest.approx(expected_norms, rel=1e-4)
        for name, tensor in expected.items():
            assert_close(state[name], tensor, rtol=0, atol=1e-5)
    assert not list((tmp_path / "extensions").rglob("*")), "something was compiled"


if __name__ == "__main__":
    worker(sys.argv[1])
