"""SFT and RM by TRL: the loss is the one that is meant, of every row, however it is split."""

from __future__ import annotations

import math
import os
import signal
from contextlib import nullcontext
from tempfile import TemporaryDirectory

import pytest
import torch
from rounding import TINY
from torch.testing import assert_close

from rlhf import interrupts, models, supervised
from rlhf.checkpointing import Checkpoints
from rlhf.config import EngineConfig, TrainConfig
from rlhf.console import Console
from rlhf.methods.settings import FullConfig, LoraConfig
from rlhf.metrics import METRICS
from rlhf.registry import Registry
from rlhf.run import open_run

pytestmark = pytest.mark.usefixtures("process_group")

# Prompt and answer lengths; rows of very different weight, so that a mean of means shows.
LENGTHS = [(3, 9), (8, 2), (2, 1), (5, 6), (4, 12), (6, 3), (2, 7), (9, 4)]


def tokens(n, generator):
    return torch.randint(6, 200, (n,), generator=generator).tolist()


def demonstrations(seed=0, eos=2):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt, answer in LENGTHS:
        ids = [1, *tokens(prompt + answer - 2, generator), eos]
        rows.append({"input_ids": ids, "completion_mask": [0] * prompt + [1] * answer})
    return rows


def preferences(seed=0, eos=2):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt, answer in LENGTHS:
        start = [1, *tokens(prompt, generator)]
        rows.append(
            {
                "chosen_ids": [*start, *tokens(answer, generator), eos],
                "rejected_ids": [*start, *tokens(14 - answer, generator), eos],
            }
        )
    return rows


class Tracker(list):
    lines, stop = 0, None  # the step whose numbers end the process

    def log(self, metrics, *, step):
        self.append((step, metrics))
        if step == self.stop:
            self.stop = None
            os.kill(os.getpid(), signal.SIGTERM)


def config(**settings):
    given = {"batch_size": 8, "micro_batch_size": 8, "max_steps": 1, "learning_rate": 1e-3}
    return TrainConfig(**given | {"warmup": 0.0, "schedule": "constant"} | settings)


def train(
    trainer,
    model,
    tokenizer,
    rows,
    held_out=None,
    *,
    engine_cfg=None,
    zero_stage=2,
    place=None,
    notes=None,
    stop=None,
    **settings,
):
    """Trains, and returns the numbers, the keeper and the tracker; goes on where `place` is."""
    more = {"center_coef": settings.pop("center_coef", 0.0)} if trainer is train_rm else {}
    cfg, tracker = config(**settings), Tracker()
    steps = supervised.optimizer_steps(cfg, len(rows))
    tracker.stop = stop
    folder = TemporaryDirectory() if place is None else nullcontext(place)
    with folder as runs, open_run(Registry(runs), "sft", "t", {}, {}) as run:
        keeper = Checkpoints(
            run,
            run.checkpoints_dir,
            Console(quiet=True),
            stage="sft",
            total=steps,
            every=cfg.save_every,
            keep=2,
        )
        metrics = trainer(
            model,
            tokenizer,
            rows,
            rows if held_out is None else held_out,
            cfg=cfg,
            engine_cfg=engine_cfg or EngineConfig(zero_stage=zero_stage),
            seed=0,
            checkpoints=keeper,
            tracker=tracker,
            note=(notes if notes is not None else []).append,
            **more,
        )
    return metrics, keeper, tracker


train_sft, train_rm = supervised.train_sft, supervised.train_rm


@pytest.fixture
def policy(tiny_model):
    """A factory; the model's logits are small, so that training has somewhere to go."""

    def make(method=None, **settings):
        torch.manual_seed(0)
        return models.trainable(
            tiny_model(initializer_range=0.1, **settings), method or FullConfig()
        )

    return make


@pytest.fixture
def reward_model(tiny_model, tiny_tokenizer, tmp_path):
    """A factory; `head` is the size of the head's weights."""

    def make(method=None, head=0.3):
        tiny_model(initializer_range=0.1).save_pretrained(tmp_path)
        model = models.load_scalar(tmp_path, tiny_tokenizer, dtype=torch.float32)
        torch.manual_seed(0)
        with torch.no_grad():
            model.score.weight.copy_(head * torch.randn(1, 32))
        return models.trainable(model, method or FullConfig(), head=True)

    return make


@torch.no_grad()
def answer_losses(model, rows):
    """-log p of each answer token, row by row, one row at a time: the definition."""
    model.eval()
    found = []
    for row in rows:
        ids, start = row["input_ids"], row["completion_mask"].index(1)
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        found.append([-float(logprobs[t - 1, ids[t]]) for t in range(start, len(ids))])
    return found


@torch.no_grad()
def leads(model, rows):
    """Score of chosen minus score of rejected, one answer at a time."""
    model.eval()

    def score(ids):
        ids = torch.tensor([ids])
        return float(models.token_values(model, ids, torch.ones_like(ids).bool())[0, -1])

    return [score(row["chosen_ids"]) - score(row["rejected_ids"]) for row in rows]


# SFT ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [FullConfig(), LoraConfig(rank=4)], ids=["full", "lora"])
def test_sft_loss_is_that_of_answer_tokens(policy, tiny_tokenizer, method):
    """The mean over tokens, not over rows, and nothing for the prompt."""
    rows = demonstrations()
    losses = answer_losses(policy(method), rows)
    by_token = sum(map(sum, losses)) / sum(map(len, losses))
    by_row = sum(sum(row) / len(row) for row in losses) / len(losses)
    assert abs(by_token - by_row) > 0.02, "the two could not be told apart"
    metrics, _, tracker = train(train_sft, policy(method), tiny_tokenizer, rows, eval_every=1)
    assert metrics["start/eval/loss"] == pytest.approx(by_token, abs=TINY)
    assert metrics["eval/loss"] < metrics["start/eval/loss"]
    first = next(numbers["train/loss"] for _, numbers in tracker if "train/loss" in numbers)
    assert first == pytest.approx(by_token, abs=1e-4)


def test_prompt_tokens_get_no_loss(policy, tiny_tokenizer):
    """One answer token after a long prompt: the loss is that token's alone."""
    row = demonstrations()[7]
    n = len(row["input_ids"])
    row = {"input_ids": row["input_ids"], "completion_mask": [0] * (n - 1) + [1]}
    ((expected,),) = answer_losses(policy(), [row])
    rows = [row] * 8
    metrics, *_ = train(train_sft, policy(), tiny_tokenizer, rows)
    assert metrics["start/eval/loss"] == pytest.approx(expected, abs=TINY)


def test_held_out_loss_does_not_depend_on_the_micro_batch(policy, tiny_tokenizer):
    """It is compared between runs as nats per answer token."""
    rows = demonstrations()
    held_out = rows[:7]  # a last batch of 3 or 1
    losses = answer_losses(policy(), held_out)
    by_token = sum(map(sum, losses)) / sum(map(len, losses))
    for micro in (4, 2):
        metrics, *_ = train(
            train_sft, policy(), tiny_tokenizer, rows, held_out, micro_batch_size=micro
        )
        assert metrics["start/eval/loss"] == pytest.approx(by_token, abs=TINY), micro


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one, other, *, moved_from):
    assert max(float((tensor - moved_from[n]).abs().max()) for n, tensor in one.items()) > 1e-3
    for name, tensor in one.items():
        assert_close(other[name], tensor, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_sft_accumulation_is_one_big_batch(policy, tiny_tokenizer, zero_stage):
    """2 rows at a time, 4 times, against 8 at once, though rows hold 1 to 12 answer tokens."""
    rows, after = demonstrations(), []
    for micro in (8, 3):
        model = policy(attention_dropout=0.3)  # which must be off in training
        start = weights(model)
        train(
            train_sft,
            model,
            tiny_tokenizer,
            rows,
            micro_batch_size=micro,
            zero_stage=zero_stage,
            max_steps=2,
        )
        after.append(weights(model))
    assert_same(*after, moved_from=start)


def test_three_steps_of_sft_lower_the_loss(policy, tiny_tokenizer):
    rows = demonstrations()
    model = policy(LoraConfig(rank=4))
    before = weights(model)
    metrics, keeper, tracker = train(
        train_sft, model, tiny_tokenizer, rows, max_steps=3, learning_rate=1e-2, eval_every=2
    )
    assert metrics["eval/loss"] < metrics["start/eval/loss"] - 0.1
    losses = answer_losses(model, rows)
    by_hand = sum(map(sum, losses)) / sum(map(len, losses))
    assert metrics["eval/loss"] == pytest.approx(by_hand, abs=1e-4), "of the weights at the end"
    assert keeper.step == 3
    evaluated = [step for step, numbers in tracker if "eval/loss" in numbers]
    assert evaluated == [0, 2, 3]
    assert {name for _, numbers in tracker for name in numbers} <= set(METRICS)
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}


def test_every_row_is_kept(policy, tiny_tokenizer):
    """No length limit of TRL's cuts or drops a row: the longest the model takes counts whole."""
    generator = torch.Generator().manual_seed(3)
    long = {"input_ids": [1, *tokens(249, generator)], "completion_mask": [0] * 5 + [1] * 245}
    rows = [*demonstrations(), long]
    losses = answer_losses(policy(), rows)
    by_token = sum(map(sum, losses)) / sum(map(len, losses))
    metrics, *_ = train(train_sft, policy(), tiny_tokenizer, rows, batch_size=9, micro_batch_size=9)
    assert metrics["start/eval/loss"] == pytest.approx(by_token, abs=TINY)


def test_a_row_that_trl_drops_is_noticed(reward_model, tiny_tokenizer, monkeypatch):
    """RewardTrainer filters out pairs beyond its max_length, without a word."""
    real = supervised.RewardConfig

    def short(**settings):
        return real(**settings | {"max_length": 15})

    monkeypatch.setattr(supervised, "RewardConfig", short)
    with pytest.raises(AssertionError, match="TRL kept"):
        train(train_rm, reward_model(), tiny_tokenizer, preferences())


# reward model ------------------------------------------------------------------------------------


def test_a_head_of_zero_starts_at_log_2(reward_model, tiny_tokenizer):
    metrics, *_ = train(train_rm, reward_model(head=0.0), tiny_tokenizer, preferences())
    assert metrics["start/eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["start/eval/margin"] == 0


@pytest.mark.parametrize("method", [FullConfig(), LoraConfig(rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize("center_coef", [0.0, 0.1])
def test_rm_loss_is_that_of_bradley_and_terry(reward_model, tiny_tokenizer, method, center_coef):
    rows = preferences()
    found = leads(reward_model(method), rows)
    expected = sum(math.log1p(math.exp(-lead)) for lead in found) / len(found)
    metrics, _, _ = train(
        train_rm, reward_model(method), tiny_tokenizer, rows, center_coef=center_coef
    )
    assert metrics["start/eval/accuracy"] == pytest.approx(sum(x > 0 for x in found) / len(found))
    assert metrics["start/eval/margin"] == pytest.approx(sum(found) / len(found), abs=TINY)
    if center_coef == 0:
        assert metrics["start/eval/loss"] == pytest.approx(expected, abs=TINY)
    else:
        assert metrics["start/eval/loss"] > expected + 1e-4


@pytest.mark.parametrize("micro", [8, 4, 2])
def test_held_out_pairs_count_alike_in_a_short_last_batch(reward_model, tiny_tokenizer, micro):
    rows = preferences()
    held_out = rows[:7]
    found = leads(reward_model(), held_out)
    model = reward_model()
    metrics, *_ = train(train_rm, model, tiny_tokenizer, rows, held_out, micro_batch_size=micro)
    assert metrics["start/eval/accuracy"] == pytest.approx(sum(x > 0 for x in found) / 7)
    assert metrics["start/eval/margin"] == pytest.approx(sum(found) / 7, abs=TINY)
    expected = sum(math.log1p(math.exp(-lead)) for lead in found) / 7
    assert metrics["start/eval/loss"] == pytest.approx(expected, abs=TINY)
    assert model.training


def test_an_epoch_leaves_a_rest_out_and_is_drawn_anew(policy, tiny_tokenizer, monkeypatch):
    """Eleven rows, four a step: two whole steps an epoch, whatever the micro-batch."""
    rows = [demonstrations()[i % 8] | {"input_ids": [1, 40 + i, 2]} for i in range(11)]
    rows = [row | {"completion_mask": [0, 1, 1]} for row in rows]
    orders = []
    for micro in (4, 2):
        seen: list[int] = []
        model = policy(vocab_size=64)
        monkeypatch.setattr(
            supervised._SFTTrainer,
            "training_step",
            lambda self, module, inputs, *args, seen=seen: (
                seen.extend(inputs["input_ids"][:, 1].tolist()) or torch.tensor(0.0)
            ),
        )
        train(
            train_sft,
            model,
            tiny_tokenizer,
            rows,
            epochs=2,
            max_steps=None,
            batch_size=4,
            micro_batch_size=micro,
        )
        orders.append(seen)
    first, second = orders[0][:8], orders[0][8:]
    assert orders[0] == orders[1]
    assert len(first) == len(set(first)) == len(second) == len(set(second)) == 8
    assert set(first) != set(second)


def test_rm_accumulation_is_one_big_batch(reward_model, tiny_tokenizer):
    rows, after = preferences(), []
    for micro in (8, 3):
        model = reward_model()
        start = weights(model)
        train(train_rm, model, tiny_tokenizer, rows, micro_batch_size=micro, max_steps=2)
        after.append(weights(model))
    assert_same(*after, moved_from=start)


def test_three_steps_of_rm_lower_the_loss_and_train_the_head(reward_model, tiny_tokenizer):
    rows = preferences()
    model = reward_model(LoraConfig(rank=4))
    before = weights(model)
    metrics, keeper, tracker = train(
        train_rm, model, tiny_tokenizer, rows, max_steps=3, learning_rate=1e-2
    )
    assert metrics["eval/loss"] < metrics["start/eval/loss"] - 0.1
    assert keeper.step == 3
    assert {name for _, numbers in tracker for name in numbers} <= set(METRICS)
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("score" in name for name in changed)
    found = leads(model, rows)
    expected = sum(math.log1p(math.exp(-lead)) for lead in found) / len(found)
    assert metrics["eval/loss"] == pytest.approx(expected, abs=1e-4)


# early stopping, noise ---------------------------------------------------------------------------

HARD = {"learning_rate": 0.03, "max_steps": 12, "eval_every": 1}  # held out, it soon gets worse


def held_out_losses(tracker):
    return {step: numbers["eval/loss"] for step, numbers in tracker if "eval/loss" in numbers}


def by_hand(losses, patience):
    """(the last step, the best one) of a run that gives up after so many without a better one."""
    best, worse = 1, 0
    for step in range(2, 13):
        worse = 0 if losses[step] < losses[best] else worse + 1
        best = step if worse == 0 else best
        if worse == patience:
            return step, best
    return 12, best


@pytest.mark.parametrize("patience", [1, 3])
def test_training_ends_where_nothing_better_is_found(policy, tiny_tokenizer, patience):
    """As the numbers of a run without patience say; the best is what is left in the model."""
    rows, other = demonstrations(), demonstrations(seed=1)
    _, _, whole = train(train_sft, policy(), tiny_tokenizer, rows, other, **HARD)
    losses = held_out_losses(whole)
    last, best = by_hand(losses, patience)
    assert last < 12, "it should give up"
    notes, model = [], policy()
    metrics, keeper, tracker = train(
        train_sft, model, tiny_tokenizer, rows, other, notes=notes, patience=patience, **HARD
    )
    assert held_out_losses(tracker) == {step: losses[step] for step in range(last + 1)}
    assert (keeper.step, keeper.best.step) == (last, best)
    assert not keeper.stopping
    assert keeper.stopped is None
    assert metrics["eval/loss"] == losses[best]
    found = answer_losses(model, other)
    mean = sum(map(sum, found)) / sum(map(len, found))
    assert mean == pytest.approx(losses[best], abs=TINY)
    assert notes == [
        f"stopped at step {last} of 12: {patience} evaluations in a row found nothing better "
        "(train.patience)"
    ]


def test_without_patience_training_goes_to_the_end(policy, tiny_tokenizer):
    notes = []
    rows, other = demonstrations(), demonstrations(seed=1)
    _, keeper, _ = train(train_sft, policy(), tiny_tokenizer, rows, other, notes=notes, **HARD)
    assert keeper.step == 12
    assert notes == []


def test_patience_is_counted_from_the_last_better_one(policy, tiny_tokenizer, monkeypatch):
    """Losses by hand: one that is worse, a better one, and then two that are not."""
    losses = iter([9.0, 5.0, 6.0, 4.0, 6.0, 5.0, 7.0, 7.0])

    def sums(self, inputs):
        return {"count": torch.tensor(1.0), "loss": torch.tensor(next(losses))}

    monkeypatch.setattr(supervised._SFTTrainer, "_sums", sums)
    _, keeper, tracker = train(
        train_sft, policy(), tiny_tokenizer, demonstrations(), patience=2, **HARD
    )
    assert list(held_out_losses(tracker).values()) == [9.0, 5.0, 6.0, 4.0, 6.0, 5.0]
    assert (keeper.step, keeper.best.step) == (5, 3)


def test_patience_is_counted_across_a_stop(policy, tiny_tokenizer, tmp_path):
    """Stopped between two evaluations of no avail, and again when it had given up already."""
    rows, other = demonstrations(), demonstrations(seed=1)
    _, _, whole = train(train_sft, policy(), tiny_tokenizer, rows, other, **HARD)
    last, best = by_hand(held_out_losses(whole), 3)
    given = HARD | {"patience": 3, "place": tmp_path}
    with pytest.raises(interrupts.Terminated):
        train(train_sft, policy(), tiny_tokenizer, rows, other, stop=last - 2, **given)
    model = policy()
    _, keeper, tracker = train(train_sft, model, tiny_tokenizer, rows, other, **given)
    assert min(held_out_losses(tracker)) == last, "it should go on just before it gives up"
    assert (keeper.step, keeper.best.step) == (last, best)
    again, notes = policy(), []  # ended before it was published
    metrics, keeper, tracker = train(
        train_sft, again, tiny_tokenizer, rows, other, notes=notes, **given
    )
    assert list(tracker) == []
    assert keeper.step == last
    assert len(notes) == 1
    assert metrics["eval/loss"] == held_out_losses(whole)[best]
    for name, tensor in weights(model).items():
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("method", "alpha"), [(FullConfig(), 5.0), (LoraConfig(rank=4), 15.0)], ids=["full", "lora"]
)
def test_noise_on_embeddings_in_training_alone(policy, tiny_tokenizer, method, alpha):
    """Uniform in +-alpha / sqrt(length * hidden), Jain et al. 2023; held-out numbers have none."""
    rows = demonstrations()
    found = {}
    for given in (None, alpha):
        model, seen = policy(method), []
        inner = models._inner(model)

        def look(module, inputs, inner=inner, seen=seen):
            seen.append((inner.training, inputs[0].detach().clone()))

        hook = inner.model.layers[0].register_forward_pre_hook(look)
        metrics, _, tracker = train(
            train_sft, model, tiny_tokenizer, rows, rows[:1], neftune_alpha=given, eval_every=1
        )
        hook.remove()
        first = next(numbers["train/loss"] for _, numbers in tracker if "train/loss" in numbers)
        found[given] = first, metrics["start/eval/loss"], next(x for on, x in seen if on), seen
        assert not inner.get_input_embeddings()._forward_hooks
        ids = torch.tensor([rows[0]["input_ids"]])
        with torch.no_grad():
            assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)
    assert abs(found[alpha][0] - found[None][0]) > 1e-4
    assert found[alpha][1] == found[None][1]
    noise = found[alpha][2] - found[None][2]
    bound = alpha / math.sqrt(noise.shape[1] * noise.shape[2])
    assert 0.98 * bound < float(noise.abs().max()) <= bound * (1 + 1e-5)
    assert float(noise.square().mean()) == pytest.approx(bound**2 / 3, rel=0.05)
    held_out = [x for on, x in found[alpha][3] if not on]
    plain = [x for on, x in found[None][3] if not on]
    assert torch.equal(held_out[0], plain[0])


def test_no_noise_is_left_where_training_breaks_off(policy, tiny_tokenizer, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("broken")

    monkeypatch.setattr(supervised._SFTTrainer, "training_step", fail)
    model = policy()
    with pytest.raises(RuntimeError, match="broken"):
        train(train_sft, model, tiny_tokenizer, demonstrations(), neftune_alpha=5.0)
    assert not model.get_input_embeddings()._forward_hooks


# settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "epochs", "max_steps", "expected"),
    [
        (8, 1.0, None, 1),
        (9, 1.0, None, 1),
        (15, 3.0, None, 3),
        (64, 2.0, None, 16),
        (64, 0.5, None, 4),
        (8, 0.01, None, 1),
        (64, 9.0, 3, 3),
    ],
)
def test_optimizer_steps_by_hand(rows, epochs, max_steps, expected):
    cfg = config(epochs=epochs, max_steps=max_steps)
    assert supervised.optimizer_steps(cfg, rows) == expected


def test_an_epoch_is_every_row_once(policy, tiny_tokenizer):
    """Eight rows, two a step: four steps, and the report of an epoch ends at 1."""
    _, keeper, tracker = train(
        train_sft,
        policy(),
        tiny_tokenizer,
        demonstrations(),
        max_steps=None,
        batch_size=2,
        micro_batch_size=1,
        eval_every=4,
    )
    assert keeper.step == 4
    assert [numbers["train/epoch"] for _, numbers in tracker if "train/loss" in numbers][-1] == 1
