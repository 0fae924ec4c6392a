"""Optimizer states in host memory: DeepSpeed's CPU Adam against torch's AdamW.

What is marked slow compiles it, for one to three minutes, into a folder of its own; where
TORCH_EXTENSIONS_DIR holds it already, it is taken from there.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_engine
import torch
from launching import start_ranks
from safetensors.torch import load_file, save_file
from test_engine import LEARNING_RATE, MAX_GRAD_NORM, batch, by_torch
from test_supervised import demonstrations, policy, train, train_sft
from torch.testing import assert_close

from rlhf import engine, guards, supervised
from rlhf.config import EngineConfig
from rlhf.errors import ConfigError

__all__ = ["policy"]  # a fixture
pytestmark = pytest.mark.usefixtures("process_group")

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
SIZES = {"micro_batch_size": 1, "accumulation": 1, "max_grad_norm": 1.0}


@pytest.fixture(scope="module")
def said(process_group, tmp_path_factory):
    """CPU Adam is ready; what was said on the way."""
    if lacks := guards.lacking():
        pytest.skip(f"without {' and '.join(lacks)}")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
    there = any(Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("cpu_adam/*.so"))
    with contextlib.redirect_stderr(io.StringIO()) as err:
        engine.rehearse(EngineConfig(offload=True))
    return "" if there else err.getvalue()


def settings(zero_stage):
    return EngineConfig(zero_stage=zero_stage, offload=True, partition_threshold=0)


# what is asked of DeepSpeed ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zero_stage", "parts"),
    [(1, ["optimizer"]), (2, ["optimizer"]), (3, ["optimizer", "param"])],
)
def test_the_config_names_what_lies_in_host_memory(monkeypatch, zero_stage, parts):
    def place(cuda):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        cfg = EngineConfig(zero_stage=zero_stage, offload=True, dtype="fp32")
        zero = engine.deepspeed_config(cfg, **SIZES)["zero_optimization"]
        return {name: value for name, value in zero.items() if name.startswith("offload_")}

    expected = {"device": "cpu", "pin_memory": False}
    assert place(cuda=False) == {f"offload_{part}": expected for part in parts}
    assert place(cuda=True) == {f"offload_{p}": expected | {"pin_memory": True} for p in parts}


def test_without_offloading_nothing_lies_there_and_the_optimizer_is_torchs():
    for zero_stage in range(4):
        zero = engine.deepspeed_config(EngineConfig(zero_stage=zero_stage), **SIZES)
        assert not [name for name in zero["zero_optimization"] if "offload" in name]
    weights = [torch.nn.Parameter(torch.zeros(2))]
    found = engine.adamw(weights, EngineConfig(), learning_rate=0.1, eps=1e-5)
    assert type(found) is torch.optim.AdamW
    assert {k: found.defaults[k] for k in ("lr", "eps", "weight_decay", "betas")} == {
        "lr": 0.1,
        "eps": 1e-5,
        "weight_decay": 0.0,
        "betas": (0.9, 0.999),
    }


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("Unable to JIT load the cpu_adam op.\nand more"), "the cpu_adam op"),
        (RuntimeError("[1/3] c++ x\nx.h:1: fatal error: no omp.h.\n[2/3]"), "error: no omp.h"),
        (subprocess.CalledProcessError(1, ["c++"]), r"Command .* returned non-zero exit status 1"),
    ],
)
def test_a_compiler_that_fails_is_refused_with_its_words(monkeypatch, tmp_path, error, words):
    from deepspeed.ops.op_builder import CPUAdamBuilder

    def load(self):
        raise error

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(CPUAdamBuilder, "load", load)
    message = rf"^engine\.offload=true: .* could not be compiled: .*{words}\. Use engine\.offl"
    with pytest.raises(ConfigError, match=message):
        engine.rehearse(EngineConfig(offload=True))


def test_ninja_of_an_environment_that_is_not_activated_is_used(monkeypatch, tmp_path):
    from deepspeed.ops.op_builder import CPUAdamBuilder

    for folder, programs in (("path", ()), ("scripts", ("ninja",))):
        (tmp_path / folder).mkdir()
        for program in programs:
            (tmp_path / folder / program).write_text("")
            (tmp_path / folder / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "scripts/python"))
    found = []
    monkeypatch.setattr(CPUAdamBuilder, "load", lambda self: found.append(shutil.which("ninja")))
    engine.rehearse(EngineConfig(offload=True))
    assert found == [str(tmp_path / "scripts/ninja")]


# compiled ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiling_is_announced_once(said, capsys):
    if said:
        assert said.startswith("building DeepSpeed's CPU Adam in ")
        assert said.endswith("cpu_adam, one to three minutes, once\n")
    engine.rehearse(EngineConfig(offload=True))
    assert "building" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("said")
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_optimizer_is_adamw(decay):
    """Weight decay is decoupled, and every number is the one that was given."""
    found = {}
    for offload in (False, True):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(40))
        optimizer = engine.adamw(
            [weight],
            EngineConfig(offload=offload),
            learning_rate=0.05,
            eps=1e-3,
            weight_decay=decay,
            betas=(0.8, 0.95),
        )
        for _ in range(5):
            weight.grad = torch.randn(40)
            optimizer.step()
        found[offload] = weight.detach()
    assert_close(found[True], found[False], **CLOSE)


def by_engine(zero_stage, micro, rows=slice(None)):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_engine, "EngineConfig", lambda **given: settings(given["zero_stage"]))
        return test_engine.by_engine(zero_stage, micro, rows)


@pytest.mark.slow
@pytest.mark.usefixtures("said")
@pytest.mark.parametrize("micro", [4, 1])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_weights_are_those_of_plain_torch(zero_stage, micro):
    expected, expected_norms = by_torch()
    state, norms, rates = by_engine(zero_stage, micro)
    for name, tensor in expected.items():
        assert_close(state[name], tensor, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    assert rates == pytest.approx([LEARNING_RATE, LEARNING_RATE / 2, LEARNING_RATE / 3])


@pytest.mark.slow
@pytest.mark.usefixtures("said")
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_resumed_run_goes_on_as_the_unbroken_one(tmp_path, zero_stage):
    """Up to rounding: CPU Adam multiplies powers of beta up, and after a resume computes them."""

    def trainer():
        return engine.Engine(
            test_engine.network(),
            settings(zero_stage),
            learning_rate=LEARNING_RATE,
            factor=test_engine.factor,
            micro_batch_size=4,
            accumulation=1,
            max_grad_norm=MAX_GRAD_NORM,
        )

    def update(each, number):
        x, y, mask = (tensor[number] for tensor in batch())
        each.backward(test_engine.squared_error(each.module, x, y, mask, mask.sum()))
        each.step()
        with engine.gathered(each.module):
            return {name: tensor.clone() for name, tensor in each.module.state_dict().items()}

    unbroken, resumed = trainer(), trainer()
    for number in (0, 1):
        update(unbroken, number)
    unbroken.save(tmp_path)
    resumed.load(tmp_path)
    assert resumed.learning_rate == unbroken.learning_rate
    expected, found = update(unbroken, 2), update(resumed, 2)
    assert resumed.grad_norm == unbroken.grad_norm
    for name, tensor in expected.items():
        assert_close(found[name], tensor, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.usefixtures("said")
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_sft_by_trl_is_the_same(policy, tiny_tokenizer, monkeypatch, zero_stage):
    """And it is our optimizer that works there, not one that accelerate makes of torch's."""
    made = []
    monkeypatch.setattr(
        supervised._Report,
        "on_train_begin",
        lambda self, *args, **kwargs: made.append(self.trainer.deepspeed.basic_optimizer),
    )
    found = {}
    for cfg in (EngineConfig(zero_stage=zero_stage), settings(zero_stage)):
        model = policy()
        given = {"max_steps": 3, "eval_every": 3, "engine_cfg": cfg}
        _, _, tracker = train(train_sft, model, tiny_tokenizer, demonstrations(), **given)
        with engine.gathered(model):
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        numbers = [line[k] for _, line in tracker for k in sorted(line)]
        found[cfg.offload] = state, numbers
    assert [type(optimizer).__name__ for optimizer in made] == ["AdamW", "DeepSpeedCPUAdam"]
    assert made[1].adam_w_mode is True
    assert made[1].defaults["eps"] == made[0].defaults["eps"]
    (expected, numbers), (state, others) = found[False], found[True]
    assert others == pytest.approx(numbers, rel=1e-5)
    for name, tensor in expected.items():
        assert_close(state[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def worker(folder):
    """One of two processes: every second row of each batch."""
    engine.start(0)
    engine.rehearse(EngineConfig(offload=True))
    rank = int(os.environ["RANK"])
    for zero_stage in (2, 3):
        state, norms, _ = by_engine(zero_stage, 1, rows=slice(rank, None, 2))
        state |= {"norms": torch.tensor(norms)}
        save_file(state, os.path.join(folder, f"zero{zero_stage}-rank{rank}.safetensors"))


@pytest.mark.slow
@pytest.mark.usefixtures("said")
def test_two_processes_end_with_the_weights_of_one(tmp_path):
    output = start_ranks(2, __file__, str(tmp_path), timeout=900)
    assert "building" not in "".join(output)
    expected, expected_norms = by_torch()
    for name in (f"zero{stage}-rank{rank}" for stage in (2, 3) for rank in range(2)):
        state = load_file(tmp_path / f"{name}.safetensors")
        assert state.pop("norms").tolist() == pytest.approx(expected_norms, rel=1e-4)
        for weight, tensor in expected.items():
            assert_close(state[weight], tensor, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    worker(sys.argv[1])
