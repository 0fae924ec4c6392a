"""LoRA+, ReLoRA, PLoRA and AdaLoRA in training: each is what its slow definition says it is."""

from __future__ import annotations

import math
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import peft
import pytest
import torch
from covering import pairwise
from launching import start_ranks
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from rounding import TINY
from torch.testing import assert_close

from rlhf import engine, interrupts, ranks, supervised
from rlhf.checkpointing import Checkpoints
from rlhf.config import EngineConfig, TrainConfig
from rlhf.console import Console
from rlhf.errors import ConfigError
from rlhf.methods import courses, lora
from rlhf.methods.settings import (
    AdaLoraConfig,
    LoraPlusConfig,
    PhasedLoraConfig,
)
from rlhf.registry import Registry
from rlhf.run import open_run

pytestmark = pytest.mark.usefixtures("process_group")

PLUS = LoraPlusConfig(rank=2, ratio=8.0)
RELORA = PhasedLoraConfig(name="relora", rank=2, phases=3, rewarm=0.5)
PLORA = PhasedLoraConfig(name="plora", rank=2, phases=3)
ADALORA = AdaLoraConfig(rank=2, initial_rank=3, begin=0.1, end=0.7, every=2)
MANY = AdaLoraConfig(rank=2, initial_rank=8, begin=0.1, end=0.7, every=2)


def demonstrations(count=8):
    """Rows of one length, so that a batch weighs all alike."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(6, 60, (11,), generator=generator).tolist() for _ in range(count)]
    return [{"input_ids": [1, *row], "completion_mask": [0] * 4 + [1] * 8} for row in rows]


def preferences(count=8):
    rows = [row["input_ids"] for row in demonstrations(2 * count)]
    pairs = zip(rows[:count], rows[count:], strict=True)
    return [{"chosen_ids": a, "rejected_ids": b} for a, b in pairs]


def config(**settings):
    given = {"batch_size": 8, "micro_batch_size": 8, "max_steps": 10, "learning_rate": 1e-2}
    given |= {"warmup": 0.0, "schedule": "constant", "eval_every": 4, "save_every": 100}
    return TrainConfig(**given | settings)


class Last(Checkpoints):
    """Leaves the weights of the last step in the model, whichever was best."""

    def best_folder(self):
        return None


class Tracker(list):
    lines = 0

    def __init__(self, stop=None):
        self.stop = stop

    def log(self, metrics, *, step):
        self.append((step, metrics))
        if step == self.stop:
            self.stop = None
            os.kill(os.getpid(), signal.SIGTERM)

    def losses(self):
        return {step: numbers["train/loss"] for step, numbers in self if "train/loss" in numbers}


def tiny(head=False, layers=2):
    """The model of all tests here; small enough to write the training out by hand."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    kind = LlamaForSequenceClassification if head else LlamaForCausalLM
    return kind(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.15,
            attn_implementation="eager",
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **({"num_labels": 1} if head else {}),
        )
    )


def attach(method, head=False, steps=10, layers=2):
    base = tiny(head, layers)
    torch.manual_seed(1)
    return lora.attach(base, method, head=head, steps=steps)


def train(
    model, method, tokenizer, place, *, rows=None, zero=0, stop=None, cfg=None, engine_cfg=None
):
    """Trains in the folder `place`, or goes on there; returns the tracker."""
    cfg, tracker = cfg or config(), Tracker(stop)
    head = "score" in str(list(dict(model.named_parameters())))
    rows = rows or (preferences() if head else demonstrations())
    options = {"center_coef": 0.0} if head else {}
    place.mkdir(parents=True, exist_ok=True)
    alone = open_run(Registry(place), "sft", "t", {}, {}) if ranks.is_main() else nullcontext()
    with alone as run:
        checkpoints = Last(
            run,
            place / "sft" / "t" / "checkpoints",
            Console(quiet=True),
            stage="sft",
            total=supervised.optimizer_steps(cfg, len(rows)),
            every=cfg.save_every,
            keep=9,
        )
        (supervised.train_rm if head else supervised.train_sft)(
            model,
            tokenizer,
            rows,
            rows,
            cfg=cfg,
            engine_cfg=engine_cfg or EngineConfig(zero_stage=zero),
            seed=0,
            checkpoints=checkpoints,
            tracker=tracker,
            method=method,
            **options,
        )
    return tracker


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def worst(found, expected):
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def batch_of(rows):
    ids = torch.tensor([row["input_ids"] for row in rows])
    labels = torch.where(torch.tensor([row["completion_mask"] for row in rows]) == 1, ids, -100)
    return {"input_ids": ids, "labels": labels}


def plain_loss(run, head):
    """The mean loss of all rows, by a function that runs a model."""
    if not head:
        batch = batch_of(demonstrations())
        logits = run(input_ids=batch["input_ids"]).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.mT, batch["labels"][:, 1:])
    ids = [torch.tensor([row[n] for row in preferences()]) for n in ("chosen_ids", "rejected_ids")]
    chosen, rejected = (run(input_ids=part).logits.squeeze(-1) for part in ids)
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


# LoRA+ ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0, 2])
def test_lora_plus_is_adam_with_two_rates(tiny_tokenizer, tmp_path, zero):
    """Against torch's own AdamW over two lists of weights, batch of all rows each step."""
    model = attach(PLUS)
    cfg = config(max_steps=4, learning_rate=1e-3, max_grad_norm=0.5, schedule="linear")
    tracker = train(model, PLUS, tiny_tokenizer, tmp_path, zero=zero, cfg=cfg)
    slow = attach(PLUS)
    low = [p for n, p in slow.named_parameters() if "lora_A" in n]
    high = [p for n, p in slow.named_parameters() if "lora_B" in n]
    for step in range(4):
        rate = 1e-3 * (1 - step / 4)
        if step == 0:
            made = [torch.optim.AdamW(ps, weight_decay=0.0) for ps in (low, high)]
        for optimizer, factor in zip(made, (1, 8), strict=True):
            optimizer.param_groups[0]["lr"] = factor * rate
            optimizer.zero_grad()
        loss = slow(**batch_of(demonstrations())).loss
        loss.backward()
        assert tracker.losses()[step + 1] == pytest.approx(float(loss.detach()), abs=TINY)
        torch.nn.utils.clip_grad_norm_(low + high, 0.5)
        for optimizer in made:
            optimizer.step()
    assert worst(trained(model), trained(slow)) < 1e-4
    one_rate = attach(PLUS)
    train(one_rate, None, tiny_tokenizer, tmp_path / "other", zero=zero, cfg=cfg)
    assert worst(trained(one_rate), trained(slow)) > 5e-3


# phases ---------------------------------------------------------------------------------------


def test_phases_share_the_steps_and_the_last_takes_the_rest():
    assert courses.lengths(10, 3) == [3, 3, 4]
    assert courses.lengths(4, 4) == [1, 1, 1, 1]


def test_fewer_steps_than_phases_are_refused(tiny_tokenizer, tmp_path):
    model = attach(RELORA)
    with pytest.raises(ConfigError, match=r"method\.phases=3: training has 2 optimizer steps"):
        train(model, RELORA, tiny_tokenizer, tmp_path, cfg=config(max_steps=2))


def test_schedules_by_hand(tiny_tokenizer):
    """Ten steps in phases of 3, 3 and 4. relora comes back over ceil(.5 * 3) = 2 of them."""

    def factors(method, **settings):
        model = attach(method)
        factor = courses.of(method, model, config(**settings), 10).factor()
        return [round(factor(step), 6) for step in range(10)]

    third = 1 / 3
    back = [third, 2 * third, 1]
    assert factors(RELORA) == pytest.approx([1, 1, 1, *back, *back, 1], abs=1e-6)
    linear = [1 - step / 10 for step in range(10)]
    jagged = [a * b for a, b in zip(linear, [1, 1, 1, *back, *back, 1], strict=True)]
    assert factors(RELORA, schedule="linear") == pytest.approx(jagged, abs=1e-6)
    assert factors(PLORA) == [1] * 10
    falls = [1, 2 * third, third]
    anew = [*falls, *falls, 1, 0.75, 0.5, 0.25]
    assert factors(PLORA, schedule="linear") == pytest.approx(anew, abs=1e-6)
    # warm-up of ceil(.4 * 3) = 2 steps, then one; and of 2, then two
    warm = [third, 2 * third, 1]
    expected = [*warm, *warm, *warm, 1]
    assert factors(PLORA, warmup=0.4) == pytest.approx(expected, abs=1e-6)


class Merging:
    """The slow definition: B A is added to the weight after each phase, and a new pair drawn.

    Adam is written out; its moments are new in each phase, its count of steps goes on.
    """

    def __init__(self, model, draws, scale, head):
        self.model, self.scale = model, scale
        self.draws = draws  # layer -> A of all phases
        self.layers = {n: dict(model.named_modules())[n] for n in draws}
        self.base = {n: layer.weight.detach().clone() for n, layer in self.layers.items()}
        self.head = [model.score.weight.requires_grad_(True)] if head else []
        self.moments = {}
        self.step = 0

    def begin(self, phase, rank):
        if phase:
            for n in self.base:
                self.base[n] = self.base[n] + self.scale * (self.b[n] @ self.a[n]).detach()
        block = slice(phase * rank, (phase + 1) * rank)
        self.a = {n: a[block].clone().requires_grad_(True) for n, a in self.draws.items()}
        self.b = {n: torch.zeros(len(self.base[n]), rank, requires_grad=True) for n in self.draws}
        head = [id(p) for p in self.head]
        self.moments = {key: value for key, value in self.moments.items() if key in head}

    def update(self, loss, rate, max_norm):
        params = [*self.a.values(), *self.b.values(), *self.head]
        weights = {
            f"{n}.weight": self.base[n] + self.scale * self.b[n] @ self.a[n] for n in self.base
        }
        weights |= {"score.weight": self.head[0]} if self.head else {}
        value = loss(lambda **inputs: torch.func.functional_call(self.model, weights, (), inputs))
        grads = torch.autograd.grad(value, params)
        norm = torch.sqrt(sum(g.square().sum() for g in grads))
        self.step += 1
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                g = g * min(1.0, max_norm / (float(norm) + 1e-6))
                m, v = self.moments.get(id(p), (torch.zeros_like(p), torch.zeros_like(p)))
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                self.moments[id(p)] = m, v
                hat = v.sqrt() / math.sqrt(1 - 0.999**self.step) + 1e-8
                p -= rate * m / (1 - 0.9**self.step) / hat
        return float(value)


@pytest.mark.parametrize(
    ("zero", "name", "head"), pairwise([0, 1, 2], ["relora", "plora"], [False, True])
)
def test_phases_are_merging_and_starting_anew(tiny_tokenizer, tmp_path, zero, name, head):
    method = RELORA if name == "relora" else PLORA
    model = attach(method, head)
    draws = {
        name.removeprefix("base_model.model."): module.lora_A["default"].weight.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    score = model.get_base_model().score.weight.detach().clone() if head else None
    cfg = config(max_grad_norm=0.7, schedule="linear")
    tracker = train(model, method, tiny_tokenizer, tmp_path, zero=zero, cfg=cfg)
    factor = courses.of(method, model, cfg, 10).factor()

    base = tiny(head).requires_grad_(False)
    if head:
        base.score.weight.copy_(score)
    slow = Merging(base, draws, scale=16.0, head=head)

    def loss(run):
        return plain_loss(run, head)

    expected = []
    for phase, steps in enumerate([3, 3, 4]):
        slow.begin(phase, 2)
        for _ in range(steps):
            expected.append(slow.update(loss, 1e-2 * factor(slow.step), 0.7))
    found = tracker.losses()
    assert list(found) == list(range(1, 11))
    assert max(abs(found[k + 1] - value) for k, value in enumerate(expected)) < TINY
    assert expected[0] - expected[-1] > 0.05
    slow.begin(2, 2)  # merges the last pair
    with torch.no_grad():
        whole = model.merge_and_unload().state_dict()
    for name, weight in slow.base.items():
        assert_close(whole[f"{name}.weight"], weight, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("zero", "dtype"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (2, "bf16"), (0, "bf16")]
)
def test_a_finished_block_stays_bit_for_bit(tiny_tokenizer, tmp_path, zero, dtype, monkeypatch):
    seen = []
    real = courses.Phases.end_step

    def end_step(self, step):
        seen.append(trained(self.model))
        real(self, step)

    monkeypatch.setattr(courses.Phases, "end_step", end_step)
    made = EngineConfig(zero_stage=zero, dtype=dtype)
    train(attach(RELORA), RELORA, tiny_tokenizer, tmp_path, engine_cfg=made)
    first = trained(attach(RELORA))
    if dtype == "bf16":
        first = {name: value.bfloat16() for name, value in first.items()}
    ends = [3, 6, 10]
    for name, start in first.items():
        axis = 0 if "lora_A" in name else 1
        for phase, end in enumerate(ends):

            def block(tensor, axis=axis, phase=phase):
                return tensor.narrow(axis, 2 * phase, 2)

            begin = [0, *ends][phase]
            for step, now in enumerate(seen, start=1):
                if step <= begin:
                    assert torch.equal(block(now[name]), block(start)), (name, phase, step)
                elif step > end:
                    assert torch.equal(block(now[name]), block(seen[end - 1][name]))
            assert not torch.equal(block(seen[end - 1][name]), block(start))


@pytest.mark.parametrize(
    ("method", "zero", "stop"),
    [
        *((RELORA, 2, stop) for stop in (3, 4)),
        (PLORA, 0, 3),
        (PLUS, 2, 3),
        *((MANY, 0, stop) for stop in (3, 4, 8)),
    ],
)
def test_a_resumed_run_is_the_unbroken_one(tiny_tokenizer, tmp_path, method, zero, stop):
    """Stopped inside a phase and at its end, between two prunings, at one and after the last."""
    head = stop == 3
    cfg = config(schedule="linear", batch_size=4)  # other rows in each step
    unbroken = attach(method, head)
    whole = train(unbroken, method, tiny_tokenizer, tmp_path / "a", zero=zero, cfg=cfg)
    model = attach(method, head)
    with pytest.raises(interrupts.Terminated):
        train(model, method, tiny_tokenizer, tmp_path / "b", zero=zero, cfg=cfg, stop=stop - 1)
    names = [p.name for p in (tmp_path / "b/sft/t/checkpoints").iterdir()]
    assert any(name.endswith(f"{stop}") for name in names), names
    again = attach(method, head)
    rest = train(again, method, tiny_tokenizer, tmp_path / "b", zero=zero, cfg=cfg)
    assert_equal(trained(again), trained(unbroken))
    found, expected = rest.losses(), whole.losses()
    assert min(found) == stop + 1
    assert found == {k: expected[k] for k in found}
    if method is MANY:
        patterns = [m.peft_config["default"].rank_pattern for m in (again, unbroken)]
        assert patterns[0] == patterns[1]
        assert patterns[0]


# AdaLoRA --------------------------------------------------------------------------------------


def ranks_of(model):
    return [
        int((m.lora_E["default"] != 0).sum())
        for m in model.modules()
        if isinstance(m, AdaLoraLayer)
    ]


def test_ranks_are_pruned_to_the_target_on_average(tiny_tokenizer, tmp_path):
    model = attach(ADALORA)
    seen = []
    real = courses.Pruning._prune

    def prune(self):
        real(self)
        seen.append(sum(ranks_of(model)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(courses.Pruning, "_prune", prune)
        train(model, ADALORA, tiny_tokenizer, tmp_path)
    layers = len(ranks_of(model))
    assert len(seen) == 10
    assert seen[0] == 3 * layers
    assert seen[6:] == [2 * layers] * 4, "after the seventh step, and so it stays"
    # a cubic curve from 3 to 2 ranks a layer, between steps 1 and 7 (eq. 12)
    for step in (2, 4, 6):
        part = (1 - (step - 1) / 6) ** 3
        assert seen[step - 1] == pytest.approx(int(layers * part + 2 * layers), abs=1)
    assert len(set(ranks_of(model))) > 1, "layers should differ"


def test_adalora_is_the_loop_of_peft(tiny_tokenizer, tmp_path):
    """peft's documented loop, in plain torch: the importance is of real gradients, clipped ones."""
    model = attach(ADALORA)
    cfg = config(max_grad_norm=0.5)
    tracker = train(model, ADALORA, tiny_tokenizer, tmp_path, cfg=cfg)
    slow = attach(ADALORA)
    weights = [p for p in slow.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    inputs = batch_of(demonstrations())
    for step in range(10):
        loss = slow(**inputs).loss  # peft adds the penalty where there are labels
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 0.5)
        assert tracker.losses()[step + 1] == pytest.approx(float(loss.detach()), abs=TINY)
        optimizer.step()
        slow.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    assert ranks_of(model) == ranks_of(slow)
    assert worst(trained(model), trained(slow)) < 1e-4


@pytest.mark.parametrize("head", [False, True], ids=["sft", "rm"])
def test_the_penalty_is_part_of_the_training_loss_alone(tiny_tokenizer, tmp_path, head):
    """Written out matrix by matrix; one step, whatever the micro-batch."""
    found = {}
    for coefficient in (1e-6, 0.5):
        for micro in (8, 2):
            method = AdaLoraConfig(rank=2, end=0.7, every=2, orthogonality=coefficient)
            model = attach(method, head)
            cfg = config(micro_batch_size=micro, max_steps=4)
            place = tmp_path / f"{coefficient}{micro}"
            tracker = train(model, method, tiny_tokenizer, place, cfg=cfg)
            held_out = next(n["eval/loss"] for _, n in tracker if "eval/loss" in n)
            norm = next(n["train/grad_norm"] for _, n in tracker if "train/grad_norm" in n)
            found[coefficient, micro] = tracker.losses()[1], norm, held_out
    fresh = attach(ADALORA, head)
    norms = []
    for layer in (m for m in fresh.modules() if isinstance(m, AdaLoraLayer)):
        for p in (layer.lora_A["default"], layer.lora_B["default"].T):
            squares = [(p[i] @ p[j] - float(i == j)).square() for i in range(3) for j in range(3)]
            norms.append(torch.stack(squares).sum().sqrt())
    penalty = 0.5 * sum(norms) / len(norms)
    (plain_loss(fresh, head) + penalty).backward()
    norm = torch.nn.utils.clip_grad_norm_(
        [p for p in fresh.parameters() if p.grad is not None], 1e9
    )
    for micro in (8, 2):
        loss, found_norm, held_out = found[0.5, micro]
        without, flat, same = found[1e-6, micro]
        assert loss - without == pytest.approx(float(penalty.detach()), abs=1e-4)
        assert held_out == same
        assert found_norm == pytest.approx(float(norm), rel=1e-5)
        assert abs(flat - float(norm)) > 1e-4 * flat, "the penalty has no gradient to see"


def test_a_saved_pruned_model_is_the_one_in_memory(tiny_tokenizer, tmp_path):
    """Whenever: between two prunings E has grown again, and must be in the file."""
    for steps, name in ((5, "between"), (10, "after")):
        model = attach(ADALORA)
        seen, ids = [], batch_of(demonstrations())["input_ids"]

        def end_step(self, step, at=steps, seen=seen, name=name, ids=ids):
            if step == at:
                lora.save(self.model, tmp_path / f"{name}-adapter")
                seen.append(self.model(input_ids=ids).logits.detach())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(courses.Pruning, "end_step", end_step)
            train(model, ADALORA, tiny_tokenizer, tmp_path / name)
        folder = tmp_path / f"{name}-adapter"
        again = peft.PeftModel.from_pretrained(tiny(), folder)
        assert_close(again(input_ids=ids).logits, seen[0], atol=TINY, rtol=0)
        merged = again.merge_and_unload()
        assert_close(merged(input_ids=ids).logits, seen[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "engine_cfg",
    [EngineConfig(zero_stage=2), EngineConfig(zero_stage=0, dtype="bf16")],
    ids=["zero2", "bf16"],
)
def test_adalora_on_copies_of_the_weights_is_refused(tiny_tokenizer, tmp_path, engine_cfg):
    model = attach(ADALORA)
    if engine_cfg.dtype == "bf16":
        model = model.to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"engine=zero0 with engine\.dtype=fp32"):
        train(model, ADALORA, tiny_tokenizer, tmp_path, engine_cfg=engine_cfg)


# processes ------------------------------------------------------------------------------------

WORLDS = {
    "lora_plus": (PLUS, 2),
    "relora": (RELORA, 2),
    "plora": (PLORA, 1),
    "adalora": (ADALORA, 0),
}


def work(place: Path, stop: str) -> None:
    """One process of several: begins each of WORLDS and is stopped."""
    given = dict(os.environ)
    from conftest import build_tokenizer  # which forgets that there are several processes

    os.environ.update(given)
    engine.start(0)
    for name, (method, zero) in WORLDS.items():
        model, tokenizer = attach(method), build_tokenizer()
        cfg = config(micro_batch_size=4, schedule="linear", learning_rate=1e-3)
        with pytest.raises(interrupts.Terminated):
            train(model, method, tokenizer, place / name, zero=zero, cfg=cfg, stop=int(stop))
        engine.barrier()


@pytest.mark.slow
def test_one_process_ends_what_two_began(tiny_tokenizer, tmp_path):
    """Also where each holds a part of the optimizer's state; stopped at the end of a phase."""
    start_ranks(2, __file__, str(tmp_path), "2")
    for name, (method, zero) in WORLDS.items():
        cfg = config(schedule="linear", learning_rate=1e-3)
        expected = attach(method)
        whole = train(
            expected, method, tiny_tokenizer, tmp_path / "alone" / name, zero=zero, cfg=cfg
        )
        model = attach(method)
        tracker = train(model, method, tiny_tokenizer, tmp_path / name, zero=zero, cfg=cfg)
        found, losses = tracker.losses(), whole.losses()
        assert min(found) == 4, name
        assert max(abs(found[step] - losses[step]) for step in found) < 1e-5, name
        assert worst(trained(model), trained(expected)) < 1e-5, name


if __name__ == "__main__":
    work(Path(sys.argv[1]), *sys.argv[2:])
