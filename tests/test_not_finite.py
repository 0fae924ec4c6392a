"""What is no number is never the best and never published: the run stops, and says so."""

from __future__ import annotations

import math
from types import SimpleNamespace

import ppo_steps
import pytest
import torch
from small_line import SMALL, run_stage
from test_ppo import stage
from test_supervised import Tracker as Numbers
from test_supervised import demonstrations, policy, preferences, reward_model, train

from rlhf import engine, evaluate, golden, models, ppo, supervised
from rlhf.adopt import adopt
from rlhf.checkpointing import Best, Checkpoints
from rlhf.config import EvaluationConfig, PPOConfig, SamplingConfig
from rlhf.console import Console
from rlhf.errors import ConfigError, StoppedByGuard
from rlhf.evaluate import Answers, HeldOut
from rlhf.methods.settings import BitFitConfig, BottleneckConfig, FullConfig, LoraConfig
from rlhf.registry import Registry
from rlhf.run import open_run

__all__ = ["policy", "reward_model"]  # fixtures
NO_NUMBER = (math.nan, math.inf, -math.inf)
grouped = pytest.mark.usefixtures("process_group")


def keeper_of(run, total=4):
    return Checkpoints(
        run, run.checkpoints_dir, Console(quiet=True), stage="sft", total=total, every=1, keep=2
    )


# the best ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", NO_NUMBER)
def test_it_is_never_the_best(tmp_path, value):
    with open_run(Registry(tmp_path), "sft", "t", {}, {}) as run:
        keeper = keeper_of(run)
        assert not keeper.consider(value, {"eval/loss": 1.0})
        assert keeper.best == Best()
        assert keeper.consider(-2.0, {"eval/loss": 2.0})
        keeper._improved = False
        assert not keeper.consider(value, {"eval/loss": 3.0})
        assert keeper.best == Best(0, -2.0, {"eval/loss": 2.0})


# SFT and RM --------------------------------------------------------------------------------------

LEARNERS = {
    "sft": (supervised.train_sft, "policy", demonstrations),
    "rm": (supervised.train_rm, "reward_model", preferences),
}


@pytest.fixture(params=LEARNERS)
def learner(request):
    """`train` for each of the two, on rows of its own: (how, model, rows)."""
    how, model, rows = LEARNERS[request.param]
    return how, request.getfixturevalue(model)(), rows()


@grouped
def test_a_loss_that_is_no_number_stops_training(learner, tiny_tokenizer):
    how, model, rows = learner
    said = r"train/loss is (nan|inf).* in step 2: .*train\.learning_rate=1e\+25 .*overwrite=true"
    with pytest.raises(StoppedByGuard, match=said):
        train(how, model, tiny_tokenizer, rows, max_steps=3, learning_rate=1e25)


@grouped
def test_so_does_a_held_out_loss(learner, tiny_tokenizer):
    how, model, rows = learner
    with pytest.raises(StoppedByGuard, match=r"eval/loss is (nan|inf).* in step 1: .*1e\+25"):
        train(how, model, tiny_tokenizer, rows, max_steps=1, learning_rate=1e25)


@grouped
def test_so_does_a_model_that_gives_no_number_at_the_start(learner, tiny_tokenizer):
    how, model, rows = learner
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(StoppedByGuard, match=r"eval/loss is nan.* before the first update"):
        train(how, model, tiny_tokenizer, rows)


@grouped
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_does_a_gradient(policy, tiny_tokenizer, dtype):
    model = policy().to(dtype)
    model.lm_head.weight.register_hook(lambda grad: grad * math.nan)
    cfg = supervised.EngineConfig(dtype={torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype])
    with pytest.raises(StoppedByGuard, match=r"^train/grad_norm is (nan|inf) in step 1"):
        train(supervised.train_sft, model, tiny_tokenizer, demonstrations(), engine_cfg=cfg)


class Spoiler(Numbers):
    """Spoils the model once the numbers of a step are logged."""

    model, at = None, None

    def log(self, metrics, *, step):
        super().log(metrics, step=step)
        if step == self.at and "train/loss" in metrics:
            with torch.no_grad():
                next(self.model.parameters()).fill_(math.nan)


@grouped
@pytest.mark.parametrize("at", [2, 3])  # the held-out loss of that step is the first to show it
def test_the_best_before_it_is_what_is_left(learner, tiny_tokenizer, monkeypatch, at):
    how, model, rows = learner
    monkeypatch.setattr("test_supervised.Tracker", Spoiler)
    monkeypatch.setattr(Spoiler, "model", model)
    monkeypatch.setattr(Spoiler, "at", at)
    metrics, keeper, tracker = train(how, model, tiny_tokenizer, rows, max_steps=4, eval_every=1)
    assert f"eval/loss is nan in step {at}" in keeper.stopped.replace(", eval/margin is nan", "")
    assert keeper.best.step < at
    assert all(map(math.isfinite, metrics.values()))
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert math.isnan(tracker[-1][1]["eval/loss"]), "it is logged"


def test_a_norm_that_deepspeed_has_no_number_for():
    def norm(value, fp16=False, overflow=False):
        optimizer = SimpleNamespace(overflow=overflow)
        return engine.last_grad_norm(
            SimpleNamespace(
                get_global_grad_norm=lambda: value,
                fp16_enabled=lambda: fp16,
                optimizer=optimizer,
            )
        )

    assert math.isnan(norm(-1.0))
    assert math.isnan(norm(torch.tensor(-1.0)))
    assert math.isnan(norm(math.nan))
    assert norm(math.inf) == math.inf
    assert (norm(0.0), norm(2.5), norm(None)) == (0.0, 2.5, None)
    assert norm(-1.0, fp16=True, overflow=True) is None


def test_the_stage_publishes_nothing(tmp_path, monkeypatch, capfd):
    given = [f"runs_dir={tmp_path}", "tracking=off", *SMALL["sft"], "train.learning_rate=1e25"]
    assert run_stage(monkeypatch, "sft", *given) == 3
    said = capfd.readouterr().err
    assert "train.learning_rate=1e+25 is too high" in said
    assert "Traceback" not in said
    assert not list(tmp_path.rglob("manifest.json"))


# PPO ---------------------------------------------------------------------------------------------


def test_a_kl_that_is_no_number_is_within_no_budget():
    assert ppo.worth({"eval/gold": 1.0, "eval/kl": math.nan}, PPOConfig(kl_budget=4.0)) is None


@pytest.mark.parametrize("name", ["eval/score", "eval/kl"])
@pytest.mark.parametrize("value", NO_NUMBER)
def test_a_held_out_score_or_kl_stops_ppo(tmp_path, name, value):
    watch = ppo_steps.stopping(stage(), tmp_path, None)
    good = {"eval/score": 1.0, "eval/kl": 2.0, "eval/gold": math.nan}
    watch.check_held_out(good, step=3)
    with pytest.raises(StoppedByGuard, match=rf"{name} is {value} in step 4"):
        watch.check_held_out(good | {name: value}, step=4)


@grouped
def test_the_learning_rate_is_named_where_the_models_lost_their_numbers(tmp_path, tiny_model):
    watch = ppo_steps.stopping(stage(learning_rate=1e25), tmp_path, None)
    said = r"eval/kl is nan in step 1(.|\n)*ppo\.learning_rate=1e\+25"
    with pytest.raises(StoppedByGuard, match=said), watch.explaining(tiny_model()):
        watch.check_held_out({"eval/kl": math.nan}, step=1)


def answers(**measures):
    return Answers([[1]] * 3, [[2]] * 3, ["a", "b", "c"], [True] * 3, **measures)


def held_out(*found, gold=None, second=None):
    """Whose answers are these, one after the other."""
    given = iter(found)
    out = HeldOut(
        *([], [], None, SimpleNamespace(policy=None, reference=None), None),
        gold=None,
        second=None,
        cfg=EvaluationConfig(second_rm=second),
        sampling=SamplingConfig(),
        seed=0,
        gold_path=gold,
    )
    out.answers = lambda policy: next(given)
    return out


def test_what_is_compared_with_the_sft_model_needs_its_numbers():
    fine = {"scores": [1.0, 2.0, 3.0], "second": [1.0, 2.0, 3.0], "kl": [0.0] * 3}
    held_out(answers(**fine)).baseline()
    held_out(Answers([], [], [], [])).baseline()
    with pytest.raises(StoppedByGuard, match="2 of 3 held-out answers of the SFT model get a sc"):
        held_out(answers(**fine | {"scores": [math.nan, 1.0, math.inf]})).baseline()
    bad = [1.0, math.nan, 2.0]
    with pytest.raises(ConfigError, match=r"^data\.gold=mine\.py:f: .* 1 of 3"):
        held_out(answers(**fine, gold=bad), gold="mine.py:f").baseline()
    with pytest.raises(ConfigError, match=r"^evaluation\.second_rm=rm/b: .* 1 of 3"):
        held_out(answers(**fine | {"second": bad}), second="rm/b").baseline()


def test_a_measure_that_is_none_later_is_told():
    fine = {"scores": [1.0, 2.0, 3.0], "kl": [0.0] * 3}
    measures = ([1.0, 2.0, 3.0], [1.0, math.nan, 2.0])
    ours = held_out(*(answers(**fine, gold=gold) for gold in measures))
    ours.course.measure = "gold"
    ours.baseline()
    ours.evaluate()
    (line,) = ours.follow(5)
    assert "gold is no finite number on 1 of 3 held-out answers at step 5" in line


@pytest.mark.parametrize(
    ("metrics", "bad"),
    [
        ({}, None),
        ({"eval/score": 1.0, "eval/kl": 1.0}, None),
        ({"eval/score": 1.0, "eval/kl": 1.0, "eval/gold": 0.5, "eval/second": math.nan}, None),
        ({"eval/score": 1.0, "eval/kl": math.inf}, "eval/kl is inf"),
        ({"eval/score": 1.0, "eval/kl": 1.0, "eval/second": math.nan}, "eval/second is nan"),
        ({"eval/score": math.nan, "eval/kl": 1.0, "eval/gold": 0.5}, "eval/score is nan"),
    ],
)
def test_what_is_published_was_measured(metrics, bad):
    if bad is None:
        ppo.expect_publishable(metrics, step=7)
        return
    with pytest.raises(StoppedByGuard, match=f"{bad} for the policy of step 7, .*nothing is publ"):
        ppo.expect_publishable(metrics, step=7)


# what is published -------------------------------------------------------------------------------


@grouped
@pytest.mark.parametrize("value", NO_NUMBER)
@pytest.mark.parametrize(
    ("method", "name"),
    [
        (FullConfig(), "model.layers.0.mlp.up_proj.weight"),
        (BitFitConfig(), "model.layers.0.mlp.up_proj.bias"),
        (LoraConfig(rank=2), "lora_B"),
        (BottleneckConfig(size=2), "bottleneck"),  # published as model/base and model/adapter
    ],
    ids=lambda case: getattr(case, "name", ""),
)
def test_weights_that_are_none_are_not_published(
    tiny_model, tiny_tokenizer, tmp_path, method, name, value
):
    model = models.trainable(tiny_model(), method, tokenizer=tiny_tokenizer, steps=1)
    models.publish(model, tiny_tokenizer, tmp_path / "fine")
    (spoilt, *_) = [p for n, p in model.named_parameters() if name in n]
    with torch.no_grad():
        spoilt.view(-1)[-1] = value
    with pytest.raises(StoppedByGuard, match="tensors that were written hold nan or infinities"):
        models.publish(model, tiny_tokenizer, tmp_path / "model")


@pytest.mark.parametrize("write", [golden.write_logits, golden.write_scores])
def test_nor_is_a_model_that_overflows(tiny_model, tiny_tokenizer, tmp_path, write):
    tiny_model().save_pretrained(tmp_path)
    load = models.load_scalar if write is golden.write_scores else models.load_causal
    model = load(tmp_path, tiny_tokenizer, dtype=torch.float32)
    write(model, [[1, 9, 10]], 0, tmp_path, torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(3e38)  # a number, and times 2 it is none
    with pytest.raises(StoppedByGuard, match="says nan or infinities of the first 1"):
        write(model, [[1, 9, 10]], 0, tmp_path, torch.float32)


@pytest.mark.parametrize(
    ("fill", "said"), [(math.nan, "1 of its tensors hold nan"), (3e38, "the model in it is not so")]
)
def test_nor_is_one_adopted(tiny_model, tiny_tokenizer, tmp_path, fill, said):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(fill)
    model.save_pretrained(tmp_path / "made")
    tiny_tokenizer.save_pretrained(tmp_path / "made")
    registry = Registry(tmp_path / "runs")
    with pytest.raises(ConfigError, match=said):
        adopt(registry, tmp_path / "made", stage="sft", run_name="new")
    assert not list(registry.runs_dir.rglob("manifest.json"))


def test_pairs_of_scores_that_are_none_have_an_accuracy():
    """Why accuracy alone cannot be the test."""
    rows = [{"chosen_ids": [1], "rejected_ids": [2]}]
    found = evaluate.pairs(rows, [math.nan], [math.nan])
    assert math.isfinite(found["eval/accuracy"])
    assert math.isnan(found["eval/margin"])
