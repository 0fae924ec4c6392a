"""PPO-ptx: the SFT loss that is mixed in is that of SFT, whatever the batches."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import ppo_steps
import pytest
import torch
from test_ppo import (
    FULL,
    LORA,
    PAD,
    assert_same,
    judged,
    make_roles,
    ready,
    stage,
    weights,
)

from rlhf import data, ppo, ptx
from rlhf.errors import ConfigError, DataError

__all__ = ["make_roles"]  # fixtures
pytestmark = pytest.mark.usefixtures("process_group")

PROMPTS = [[1, 5], [1, 6, 7], [1, 8, 9, 10, 11], [1, 4], [1, 12, 13], [1, 3, 3], [1, 9], [1, 14, 5]]
ANSWERS = [[7, 2], [8, 9, 10, 2], [5, 2], [6, 6, 6, 6, 6, 2], [2], [11, 12, 2], [4, 4, 2], [13, 2]]
ROWS = [
    {"input_ids": p + a, "completion_mask": [0] * len(p) + [1] * len(a)}
    for p, a in zip(PROMPTS, ANSWERS, strict=True)
]


def demonstrations(micro=4, rows=ROWS):
    return ptx.Demonstrations(rows, seed=0, pad_id=PAD, micro_batch_size=micro)


def row_by_row(model, rows=ROWS):
    """-sum log p over the answers, one unpadded row at a time, and their tokens."""
    total, count = 0.0, 0
    for row in rows:
        ids, start = torch.tensor([row["input_ids"]]), row["completion_mask"].index(1)
        logprobs = torch.log_softmax(model(ids).logits[0], -1)
        for place in range(start, ids.shape[1]):
            total, count = total - logprobs[place - 1, ids[0, place]], count + 1
    return total, count


@pytest.mark.parametrize("micro", [1, 3, 8])
def test_the_loss_is_the_mean_over_answer_tokens(tiny_model, micro):
    model = tiny_model(vocab_size=24)
    found = sum(ptx.loss(model, part) for part in demonstrations(micro).parts(1, 8))
    total, count = row_by_row(model)
    assert count == sum(map(len, ANSWERS))
    assert float(found) == pytest.approx(float(total) / count, rel=1e-5)


def silent(batch):
    """Without a policy gradient: only what is mixed in moves the policy."""
    return replace(batch, advantages=torch.zeros_like(batch.advantages))


@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize(("minibatches", "micro"), [(1, 8), (1, 2), (2, 2)])
def test_alone_it_is_a_step_of_sft(make_roles, method, minibatches, micro):
    cfg = stage(epochs=1, minibatches=minibatches, micro_batch_size=micro, ptx_coef=0.5)
    roles = make_roles(method)
    batch = silent(ready(roles, cfg))
    policy, critic = ppo.engines(roles.policy, roles.critic, cfg.ppo, cfg.engine)
    stats = ppo_steps.update(
        policy,
        critic,
        batch,
        cfg,
        step=1,
        demonstrations=demonstrations(micro),
    )

    plain = make_roles(method).policy
    trained = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, eps=1e-5)
    places = data.PromptStream([row["input_ids"] for row in ROWS], 0)
    losses = []
    for turn in range(1, minibatches + 1):
        rows = [ROWS[place] for place in places.places(turn, 8 // minibatches)]
        total, count = row_by_row(plain, rows)
        optimizer.zero_grad()
        (0.5 * total / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(float(total) / count)
    assert stats["loss/ptx"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert_same(weights(roles.policy), weights(plain), rtol=0, atol=2e-5)


def test_it_keeps_the_policy_at_what_sft_taught(make_roles):
    """Turned up, the demonstrations stay likelier while PPO learns."""
    found = {}
    for coef in (0.0, 2.0):
        cfg = stage(epochs=2, minibatches=2, learning_rate=1e-2, ptx_coef=coef, kl_coef=0.0)
        roles = make_roles()
        policy, critic = ppo.engines(roles.policy, roles.critic, cfg.ppo, cfg.engine)
        shown = demonstrations() if coef else None
        for step in range(1, 6):
            batch, _ = ppo_steps.estimate_advantages(judged(roles, cfg), cfg)
            stats = ppo_steps.update(policy, critic, batch, cfg, step=step, demonstrations=shown)
            assert ("loss/ptx" in stats) == bool(coef)
        total, count = row_by_row(roles.policy)
        found[coef] = float(total) / count
    assert found[2.0] < found[0.0] - 0.3


def real(part):
    return [ids[mask].tolist() for ids, mask in zip(part.ids, part.mask, strict=True)]


def test_processes_share_one_order_and_one_count(monkeypatch):
    whole = [part for turn in (1, 2, 3) for part in demonstrations(8).parts(turn, 8)]
    seen = {0: [], 1: []}
    for rank in (0, 1):
        monkeypatch.setattr(ptx, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(ptx, "world_size", lambda: 2)
        for turn in (1, 2, 3):
            (part,) = demonstrations(4).parts(turn, 4)
            seen[rank].append(
                [ids[mask].tolist() for ids, mask in zip(part.ids, part.mask, strict=True)]
            )
    for turn, part in enumerate(whole):
        together = real(part)
        assert together[::2] == seen[0][turn]
        assert together[1::2] == seen[1][turn]
        assert int(part.count) == sum(map(len, ANSWERS))


def test_every_step_goes_on_where_the_last_one_ended(make_roles, monkeypatch):
    turns = []
    parts = ptx.Demonstrations.parts
    monkeypatch.setattr(
        ptx.Demonstrations,
        "parts",
        lambda self, turn, size: turns.append((turn, size)) or parts(self, turn, size),
    )
    cfg = stage(epochs=2, minibatches=2, ptx_coef=1.0)
    roles = make_roles()
    batch = ready(roles, cfg)
    policy, critic = ppo.engines(roles.policy, roles.critic, cfg.ppo, cfg.engine)
    for step in (1, 2):
        ppo_steps.update(
            policy,
            critic,
            batch,
            cfg,
            step=step,
            demonstrations=demonstrations(),
        )
    assert turns == [(n, 4) for n in range(1, 9)]


# where the rows come from ------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path):
    folder = tmp_path / "sft"
    folder.mkdir()
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    with gzip.open(folder / "train.jsonl.gz", "wt") as file:
        file.write(json.dumps({"talk": turns}) + "\n")
    (folder / "validation.jsonl").write_text(json.dumps({"talk": turns}) + "\n")
    return folder


def asking(**settings):
    cfg = stage(ptx_coef=0.5, **settings)
    return replace(cfg, policy_from="sft/t", data=data.DataConfig("prompts", max_rows=3))


def shown_by(cfg, parent):
    return data.demonstrations(cfg.ppo, cfg.data, parent, named=cfg.policy_from)


def test_without_a_coefficient_there_are_none():
    assert shown_by(stage(), {}) == {}


def test_the_rows_are_those_of_the_sft_run(rows):
    trained = {"stage": "sft", "data.path": str(rows), "data.columns.messages": "talk"}
    split = shown_by(asking(), trained)["ptx"]
    assert (split.name, len(split.rows)) == ("ptx", 1)
    assert split.rows[0]["response"] == "Hello."
    assert len(split.fingerprint) == 64


def test_rows_can_be_named(rows):
    cfg = asking(ptx_data=str(rows))
    cfg.data.columns.messages = "talk"
    assert len(shown_by(cfg, {"stage": "ppo"})["ptx"].rows) == 1


@pytest.mark.parametrize("parent", [{}, {"stage": "ppo", "data.path": "prompts"}])
def test_a_parent_that_names_no_rows_is_refused(parent):
    with pytest.raises(ConfigError, match=r"ppo\.ptx_coef=0\.5: sft/t does not tell which rows"):
        shown_by(asking(), parent)


def test_rows_that_are_gone_are_named(rows):
    trained = {"stage": "sft", "data.path": f"{rows}/gone"}
    with pytest.raises(DataError, match=r"ppo\.ptx_data=\S+/gone: .*no data there"):
        shown_by(asking(), trained)


def test_rows_without_a_coefficient_are_refused():
    with pytest.raises(ConfigError, match=r"ppo\.ptx_data=x with ppo\.ptx_coef=0"):
        stage(ptx_data="x")
