"""What PPO proves about itself, each proof with what it must refuse."""

from __future__ import annotations

import copy
from dataclasses import replace

import ppo_steps
import pytest
import torch
from test_ppo import FULL, LORA, judged, make_roles, ready, stage, updated
from test_roles import load, parents

from rlhf import models, proofs
from rlhf.errors import ConfigError, RegistryError, StoppedByGuard
from rlhf.text import Renderer

__all__ = ["load", "make_roles", "parents"]  # fixtures
pytestmark = pytest.mark.usefixtures("process_group")

# before the first update -------------------------------------------------------------------------


@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_fresh_policy_passes(make_roles, method, temperature):
    cfg = stage(temperature=temperature)
    roles = make_roles(method)
    roles.policy.eval()
    found = ppo_steps.start(roles, judged(roles, cfg), cfg)
    assert found["proof/kl"] <= 1e-5
    assert found["proof/ratio"] <= 1e-4
    said = proofs.in_words({"proof/kl": 2.5e-7, "proof/ratio": 1e-6, "other": 3.0})
    assert "|KL(policy, reference)| <= 2.5e-07 nats" in said
    assert "|ratio - 1| <= 1.0e-06" in said
    assert not roles.policy.training, "its mode is left as it was"


@pytest.mark.parametrize("settings", [{"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.5}])
def test_a_fresh_policy_passes_where_tokens_are_ruled_out(make_roles, settings):
    cfg = stage(**settings)
    roles = make_roles()
    batch = judged(roles, cfg)
    ppo_steps.start(roles, batch, cfg)
    with pytest.raises(StoppedByGuard, match="from what was sampled by a ratio"):
        ppo_steps.start(roles, batch, stage())  # as if all tokens had been possible
    batch = replace(batch, floors=batch.floors + 1.0)
    with pytest.raises(StoppedByGuard, match="from what was sampled by a ratio"):
        ppo_steps.start(roles, batch, cfg)


def test_a_policy_that_moved_is_refused(make_roles):
    cfg = stage()
    roles = make_roles(FULL)
    with torch.no_grad():
        for parameter in roles.policy.parameters():
            parameter += 1e-3
    with pytest.raises(StoppedByGuard, match="before the first update the policy differs"):
        ppo_steps.start(roles, judged(roles, cfg), cfg)


@pytest.mark.parametrize("shift", [1e-3, -1e-3, float("nan")])
def test_shifted_logprobs_are_refused(make_roles, shift):
    cfg = stage()
    roles = make_roles()
    batch = judged(roles, cfg)
    batch.old_logprobs[7, 0] += shift  # one token of the last row is enough
    with pytest.raises(StoppedByGuard, match="from what was sampled by a ratio"):
        ppo_steps.start(roles, batch, cfg)


def test_another_temperature_is_refused(make_roles):
    roles = make_roles()
    batch = judged(roles, stage(temperature=0.9))
    with pytest.raises(StoppedByGuard, match="from what was sampled"):
        ppo_steps.start(roles, batch, stage(temperature=1.0))


def test_dropout_is_refused(make_roles):
    """`update` trains in a mode in which dropout is alive, so the proof is made in that mode."""
    cfg = stage()
    roles = make_roles(FULL)
    for layer in roles.policy.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(StoppedByGuard, match="is dropout off"):
        ppo_steps.start(roles, judged(roles, cfg), cfg)


@pytest.mark.parametrize("row", range(8))
def test_a_policy_of_nan_is_refused(make_roles, row):
    """nan <= limit is False, but max(0, nan) is 0: no row's nan may get lost on the way."""
    cfg = stage()
    roles = make_roles(FULL)
    batch = judged(roles, cfg)
    token = int(batch.responses[row, 0])
    with torch.no_grad():
        roles.policy.lm_head.weight[token] = float("nan")
    with pytest.raises(StoppedByGuard, match="nan nats"):
        ppo_steps.start(roles, batch, cfg)


# after the first update --------------------------------------------------------------------------


def frozen(roles, cfg):
    batch = ready(roles, cfg)
    return ppo_steps.frozen(roles, {"rm/t": roles.reward_model}, batch, cfg), batch


@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
def test_an_update_moves_neither_reference_nor_reward_model(make_roles, method):
    roles, cfg = make_roles(method), stage(learning_rate=1e-2)
    proof, batch = frozen(roles, cfg)
    updated(roles, batch, cfg)
    said = "after the first update: reference, rm/t unmoved, in reach of no gradient"
    assert proof.prove() == said


@pytest.mark.parametrize("share", [True, False])
def test_nor_on_a_shared_backbone(load, share):
    roles, cfg = load(share), stage(learning_rate=1e-2)
    proof, batch = frozen(roles, cfg)
    updated(roles, batch, cfg)
    assert "unmoved" in proof.prove()
    if share:  # the backbone under all of them
        weight = next(
            p for n, p in models.whole(roles.policy).named_parameters() if "lora_" not in n
        )
        weight.requires_grad_(True)
        with pytest.raises(StoppedByGuard, match="moved reference, which is frozen"):
            proof.prove()


@pytest.mark.parametrize("role", ["reference", "reward_model"])
def test_a_frozen_role_that_moves_is_refused(make_roles, role):
    roles, cfg = make_roles(FULL), stage()
    proof, _ = frozen(roles, cfg)
    name = "reference" if role == "reference" else "rm/t"
    model = getattr(roles, role)
    with torch.no_grad():
        kept = next(model.parameters()).clone()
        next(model.parameters()).mul_(1.01)
    with pytest.raises(StoppedByGuard, match=f"moved {name}, which is frozen: its answers differ"):
        proof.prove()
    with torch.no_grad():
        next(model.parameters()).copy_(kept)
    proof.prove()
    next(model.parameters()).grad = torch.zeros_like(kept)
    with pytest.raises(StoppedByGuard, match=r"moved .*: 1 of its weights|, 1 of its weights"):
        proof.prove()


def test_a_reference_that_is_the_policy_itself_is_refused(make_roles):
    roles, cfg = make_roles(FULL), stage()
    roles = type(roles)(**(vars(roles) | {"reference": roles.policy}))
    proof, _ = frozen(roles, cfg)
    with pytest.raises(StoppedByGuard, match="moved reference"):
        proof.prove()


# text --------------------------------------------------------------------------------------------

ROWS = [{"prompt": [{"role": "user", "content": f"Tell me {n}"}]} for n in range(12)]


def test_the_reward_model_reads_what_the_policy_writes(tiny_tokenizer):
    renderer = Renderer(tiny_tokenizer)
    said = proofs.same_text(renderer, {"rm/t": Renderer(copy.deepcopy(tiny_tokenizer))}, ROWS)
    assert "padding '<pad>' is not the end '<eos>'" in said
    assert (
        "rm/t and the policy read '<bos><user>Tell me 0<assistant>This is an answer.<eos>'" in said
    )
    assert "policy read" not in proofs.same_text(renderer, {}, ROWS)


def test_a_reward_model_with_another_template_is_refused(tiny_tokenizer, new_tokenizer):
    template = new_tokenizer.chat_template
    new_tokenizer.chat_template = template.replace("{{ bos_token }}", "{{ bos_token }}Listen: ")
    with pytest.raises(RegistryError, match=r"rm/t: it was trained to read\n.*\nand would be"):
        proofs.same_text(Renderer(tiny_tokenizer), {"rm/t": Renderer(new_tokenizer)}, ROWS)


def test_padding_with_the_end_token_is_refused(new_tokenizer):
    new_tokenizer.pad_token = "<eos>"
    with pytest.raises(ConfigError, match="its pad token is its end token '<eos>'"):
        proofs.same_text(Renderer(new_tokenizer), {}, ROWS)


def test_bos_twice_is_refused(new_tokenizer):
    new_tokenizer.chat_template = "{{ bos_token }}" + new_tokenizer.chat_template
    with pytest.raises(ConfigError, match="beginning-of-sequence token twice"):
        proofs.same_text(Renderer(new_tokenizer), {}, ROWS)
