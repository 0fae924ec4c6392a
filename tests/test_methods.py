"""Every fine-tuning method through every stage: one table, and what must hold for each row.

On the project's own small base model and its tiny world: trained by SFT and as a reward model,
published, loaded as another process loads it, asked under padding, and handed on to PPO.
"""

from __future__ import annotations

import dataclasses
import gc
import re
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import ppo_steps
import pytest
import torch

from rlhf import contract, data, golden, guards, models, ppo, rollout, supervised
from rlhf.checkpointing import Checkpoints
from rlhf.config import (
    PROJECT,
    DataConfig,
    EngineConfig,
    ModelConfig,
    TemplateConfig,
    TrainConfig,
)
from rlhf.console import Console
from rlhf.errors import ConfigError
from rlhf.methods.settings import FAMILIES, METHOD_SETTINGS
from rlhf.methods.table import METHODS
from rlhf.registry import Registry
from rlhf.roles import load_roles
from rlhf.run import open_run
from rlhf.text import Renderer, load_tokenizer

pytestmark = pytest.mark.usefixtures("process_group")

BASE = PROJECT / "data/tiny/base"
STEPS, ROWS = 24, 8  # at most so many optimizer steps of SFT, rows of each
HELD_OUT = 32


@dataclass(frozen=True)
class Row:
    """How a method is tried.

    Attributes:
        learning_rate: of SFT.
        falls: the held-out SFT loss falls by this much at least, in nats, within `steps`.
        merge: the largest difference of a logit between what was trained and what was published.
        rm_rate: of the reward model, whose head is new, as a share of SFT's learning rate.
        settings: of the method, small, so that a small model has room for it.
        steps: optimizer steps of SFT, and twice as many as of the reward model.
    """

    learning_rate: float
    falls: float
    merge: float = 1e-4
    settings: dict[str, Any] = field(default_factory=dict)
    zero_stage: int = 2
    rm_rate: float = 0.3
    steps: int = STEPS // 2


RANK = {"rank": 4}
TOKENS = {"tokens": 8}
TABLE = {
    "full": Row(1e-3, 0.02, steps=STEPS),
    "freeze": Row(1e-3, 0.003, settings={"layers": 2}, steps=STEPS),
    "lora": Row(5e-3, 0.02, settings=RANK),
    "rslora": Row(2e-3, 0.02, settings=RANK),
    "dora": Row(5e-3, 0.02, settings=RANK),
    "pissa": Row(2e-3, 0.02, settings=RANK, steps=STEPS),
    "qlora": Row(5e-3, 0.02, settings=RANK | {"quantization": "nf4"}, steps=STEPS),
    "adalora": Row(2e-2, 0.003, settings=RANK | {"every": 2}, zero_stage=0, steps=STEPS),
    "lora_plus": Row(5e-4, 0.02, settings=RANK, steps=STEPS),
    "lora_fa": Row(5e-3, 0.02, settings=RANK, steps=STEPS),
    "vera": Row(5e-2, 0.005, settings={"rank": 32}, steps=STEPS),
    "lora_drop": Row(5e-3, 0.02, settings=RANK | {"sample_steps": 4, "threshold": 0.7}),
    "plora": Row(5e-3, 0.005, settings={"rank": 2, "phases": 2}),
    "relora": Row(5e-3, 0.02, settings={"rank": 2, "phases": 2}),
    "prefix_tuning": Row(1e-2, 0.003, settings=TOKENS | {"hidden": 32}),
    "prompt_tuning": Row(5e-2, 0.003, settings=TOKENS, rm_rate=0.03),
    "p_tuning": Row(5e-3, 0.005, settings=TOKENS),
    "p_tuning_v2": Row(1e-1, 0.003, settings=TOKENS, steps=STEPS),
    "houlsby": Row(5e-3, 0.008, settings={"size": 16}, steps=STEPS),
    "pfeiffer": Row(5e-3, 0.005, settings={"size": 16}, steps=STEPS),
    "bitfit": Row(1e-2, 0.01, settings={"add_biases": True}, steps=STEPS),
    "ia3": Row(2e-2, 0.005),
    "unipelt": Row(5e-3, 0.01, settings={"rank": 4, "tokens": 4, "size": 16}, steps=STEPS),
}


def test_the_table_has_every_method_and_the_project_the_same_names_everywhere():
    names = {name for names in FAMILIES.values() for name in names}
    assert set(TABLE) == names == set(METHODS) == set(METHOD_SETTINGS)
    assert names == {file.stem for file in (PROJECT / "conf/method").glob("*.yaml")}
    readme = (PROJECT / "README.md").read_text()
    line = next(line for line in readme.splitlines() if line.startswith("| `method` |"))
    assert names == set(re.findall(r"`(\w+)`", line)) - {"method"}


@pytest.fixture(scope="module")
def renderer():
    return Renderer(load_tokenizer(str(BASE), template=TemplateConfig(name="chat")))


def split(stage, cfg, part):
    return data.load(stage, cfg)[part]


@pytest.fixture(scope="module")
def rows(renderer):
    """Token ids for SFT and for the reward model: training and held-out."""
    found = {}
    for stage, render in (("sft", renderer.sft), ("rm", renderer.pairs)):
        cfg = DataConfig(path=str(PROJECT / f"data/tiny/{stage}"))
        splits = data.load(stage, cfg)
        train, held_out = (render(splits[part], cfg) for part in ("train", "validation"))
        found[stage] = train[: STEPS * ROWS], held_out[:HELD_OUT]
    return found


def settings_of(name):
    return METHOD_SETTINGS[name](name=name, **TABLE[name].settings)


def train(stage, model, rows, renderer, method, row):
    steps = row.steps if stage == "sft" else row.steps // 2
    learnt, held_out = rows
    cfg = TrainConfig(
        learning_rate=row.learning_rate * (1.0 if stage == "sft" else row.rm_rate),
        max_steps=steps,
        batch_size=ROWS,
        micro_batch_size=ROWS,
        warmup=0.1,
        schedule="linear",
        eval_every=steps,
    )
    more = {"center_coef": 0.0} if stage == "rm" else {}
    with TemporaryDirectory() as runs, open_run(Registry(runs), stage, "t", {}, {}) as run:
        keeper = Checkpoints(
            run,
            run.checkpoints_dir,
            Console(quiet=True),
            stage=stage,
            total=steps,
            every=10**6,
            keep=1,
        )
        return getattr(supervised, f"train_{stage}")(
            model,
            renderer.tokenizer,
            learnt[: row.steps * ROWS],
            held_out,
            cfg=cfg,
            method=method,
            engine_cfg=EngineConfig(zero_stage=row.zero_stage, dtype="fp32"),
            seed=0,
            checkpoints=keeper,
            **more,
        )


def asked(renderer, text):
    return renderer.prompt([{"role": "user", "content": text}])


def publish(stage, model, renderer, name, folder, parents=()):
    """A stand-in for the run that a stage publishes; loaded by what the stages load it with."""
    folder.mkdir()
    models.publish(model, renderer.tokenizer, folder)
    prompts = [asked(renderer, text) for text in ("Write a short poem.", "Hello, my friend!")]
    write = golden.write_logits if stage == "sft" else golden.write_scores
    facts = write(model.eval(), prompts, renderer.pad_id, folder, torch.float32)
    made_by = SimpleNamespace(name=name, settings=dataclasses.asdict(settings_of(name)))
    base = folder / "base"
    return SimpleNamespace(
        reference=f"{stage}/{name}",
        stage=stage,
        run_name=name,
        path=folder.parent,
        model_dir=folder,
        under=str(base) if base.is_dir() else None,
        is_checkpoint=False,
        digest=f"digest of {stage}",
        manifest=SimpleNamespace(
            method=made_by,
            parents=list(parents),
            golden=facts | {"file": f"{folder.name}/golden.safetensors"},
        ),
    )


def loaded(run, renderer):
    load = models.load_causal if run.stage == "sft" else models.load_scalar
    return models.load_parent(load, run, renderer.tokenizer, torch.float32).eval()


SEQUENCES = [list(range(20, 20 + n)) for n in (3, 9, 5, 14)]


def padded(side):
    """ids and mask of SEQUENCES in one batch, and where the last real token is."""
    width = max(map(len, SEQUENCES)) + 2
    ids = torch.zeros(len(SEQUENCES), width, dtype=torch.long)
    mask = torch.zeros_like(ids).bool()
    for at, sequence in enumerate(SEQUENCES):
        place = slice(0, len(sequence)) if side == "right" else slice(width - len(sequence), width)
        ids[at, place], mask[at, place] = torch.tensor(sequence), True
    return ids, mask


def alone(sequence):
    ids = torch.tensor([sequence])
    return ids, torch.ones_like(ids).bool()


@torch.no_grad()
def last_logits(model, ids, mask):
    """[B, V] at the last real token of each row."""
    out = model(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=models.positions(mask),
        use_cache=False,
    ).logits
    last = (mask.long() * torch.arange(mask.shape[1])).argmax(-1)
    return out[torch.arange(len(ids)), last]


@torch.no_grad()
def apart(model, ask):
    """How far padding moves what `ask` says, at most."""
    expected = torch.cat([ask(model, *alone(sequence)) for sequence in SEQUENCES])
    return max(
        float((ask(model, *padded(side)) - expected).abs().max()) for side in ("left", "right")
    )


@torch.no_grad()
def greedy(model, sequences, steps=8):
    """The likeliest tokens, but the end: by whole forward passes, without cache and padding."""
    out = []
    for sequence in sequences:
        ids = list(sequence)
        for _ in range(steps):
            logits = last_logits(model, *alone(ids))
            logits[:, model.config.eos_token_id] = -torch.inf
            ids.append(int(logits.argmax()))
        out.append(ids[len(sequence) :])
    return out


@torch.no_grad()
def generated(model, sequences, renderer, steps=8):
    ids, mask = rollout.pad_left(sequences, renderer.pad_id, torch.device("cpu"))
    out = model.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        do_sample=False,
        max_new_tokens=steps,
        min_new_tokens=steps,
        pad_token_id=renderer.pad_id,
    )
    return out[:, ids.shape[1] :].tolist()


def in_ppo(name, sft, rm, renderer):
    """The proof of the first step in words, or why the method is refused there."""
    from test_ppo import drawn, judge, stage

    cfg = dataclasses.replace(stage(new=8), method=settings_of(name))
    cfg.engine.zero_stage = TABLE[name].zero_stage
    try:
        guards.check(cfg)
        contract.check_method(sft, cfg.method)
    except ConfigError as refusal:
        return str(refusal).split(":")[0]
    roles = load_roles(sft, rm, renderer.tokenizer, cfg.method, EngineConfig(dtype="fp32"))
    golden.check_roles(roles, {rm.reference: roles.reward_model}, sft, [rm])
    prompts = [asked(renderer, text) for text in ("Hello.", "Tell me about the red fox, please.")]
    with torch.no_grad():
        batch = judge(drawn(roles.policy, cfg, prompts=prompts * 4), roles, cfg)
        stats = ppo_steps.start(roles, batch, cfg)
    pair = ppo.engines(roles.policy, roles.critic, cfg.ppo, cfg.engine, cfg.method)
    before = {n: p.clone() for n, p in roles.policy.named_parameters() if p.requires_grad}
    batch = ppo_steps.estimate_advantages(batch, cfg)[0]
    ppo_steps.update(*pair, batch, cfg, step=1)
    after = dict(roles.policy.named_parameters())
    assert any(not torch.equal(before[n], after[n]) for n in before), "nothing was learnt"
    shared = "one backbone" if isinstance(roles.policy, models.SharedRole) else "separate models"
    return f"KL {stats['proof/kl']:.0e}, |ratio - 1| {stats['proof/ratio']:.0e}, {shared}"


# Near-equal: each goes the way of another one, by the same code, and has tests of what it adds.
LIKE_ANOTHER = ("rslora", "lora_plus", "lora_fa", "relora", "pfeiffer", "ia3")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in LIKE_ANOTHER else n for n in TABLE],
)
def test_a_method_through_every_stage(name, rows, renderer, tmp_path):
    row, method = TABLE[name], settings_of(name)
    if name == "qlora":
        pytest.importorskip("bitsandbytes")
    said = [name]
    torch.manual_seed(0)

    # SFT: it learns, and what is published says what was trained.
    base = models.load_causal(BASE, renderer.tokenizer, dtype=torch.float32, method=method)
    facts = models.base_facts(ModelConfig(path=str(BASE)), base)
    policy = models.trainable(base, method, tokenizer=renderer.tokenizer, steps=row.steps)
    said.append(f"{models.count_parameters(policy)[0]:,} trained")
    found = train("sft", policy, rows["sft"], renderer, method, row)
    first, last = found["start/eval/loss"], found["eval/loss"]
    said.append(f"loss {first:.3f} -> {last:.3f}")
    assert last < first - row.falls
    sft = publish("sft", policy.eval(), renderer, name, tmp_path / "sft")
    again = loaded(sft, renderer)
    merged = float(
        (last_logits(again, *padded("left")) - last_logits(policy, *padded("left"))).abs().max()
    )
    said.append(f"published {merged:.0e}")
    assert merged <= (row.merge if METHODS[name].mergeable else 0.0)
    (tmp_path / "own").mkdir()
    models.save_trained(policy, tmp_path / "own")
    kept = last_logits(policy, *padded("left"))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.5)
    models.load_trained(policy, tmp_path / "own")
    reload = float((last_logits(policy.eval(), *padded("left")) - kept).abs().max())
    said.append(f"checkpoint {reload:.0e}")
    assert reload == 0.0
    if METHODS[name].adapter:  # a later stage may start from the checkpoint
        sft_then = SimpleNamespace(**vars(sft) | {"model_dir": tmp_path / "own"})
        sft_then.under, sft_then.is_checkpoint, sft_then.manifest.base = str(BASE), True, facts
        again = loaded(sft_then, renderer)
        moved = float((last_logits(again, *padded("left")) - kept).abs().max())
        assert moved <= (row.merge if METHODS[name].mergeable else 0.0)
    again = loaded(sft, renderer)
    padding = apart(again, last_logits)
    said.append(f"padding {padding:.0e}")
    assert padding < 1e-4
    assert generated(again, SEQUENCES, renderer) == greedy(again, SEQUENCES)
    del policy, base, again

    # The reward model: its head is trained, published and found again.
    torch.manual_seed(1)
    scalar = models.load_parent(models.load_scalar, sft, renderer.tokenizer, torch.float32)
    golden_start = golden.check_start(scalar, sft)
    assert sft.reference in golden_start
    scalar = models.quantized(scalar, renderer.tokenizer, method, torch.float32)
    reward_model = models.trainable(
        scalar, method, head=True, tokenizer=renderer.tokenizer, steps=row.steps // 2
    )
    found = train("rm", reward_model, rows["rm"], renderer, method, row)
    said.append(f"RM {found['start/eval/loss']:.3f} -> {found['eval/loss']:.3f}")
    assert found["eval/loss"] < found["start/eval/loss"]
    parent = SimpleNamespace(role="policy", digest=sft.digest)
    rm = publish("rm", reward_model.eval(), renderer, name, tmp_path / "rm", [parent])
    torch.manual_seed(2)  # another head, were it not found
    again = loaded(rm, renderer)
    ids, mask = padded("left")
    with torch.no_grad():
        head = float(
            (models.scores(again, ids, mask) - models.scores(reward_model, ids, mask)).abs().max()
        )
    said.append(f"head {head:.0e}")
    assert head <= (row.merge if METHODS[name].mergeable else 0.0)
    padding = apart(again, models.scores)
    said.append(f"padding {padding:.0e}")
    assert padding < 1e-4
    del reward_model, scalar, again
    gc.collect()

    # PPO: the policy begins as the reference, the reference is the SFT model; or it is refused.
    torch.manual_seed(3)
    said.append(in_ppo(name, sft, rm, renderer))
    refused = bool(METHODS[name].ppo_reason)
    assert said[-1].startswith("[method-stage]" if refused else "KL ")
    print(" | ".join(said))
