"""Four roles on one backbone are four models, to the last digit but rounding."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from types import SimpleNamespace

import ppo_steps
import pytest
import torch
from rounding import TINY
from safetensors.torch import load_file
from test_ppo import drawn, judge, noisy, stage
from torch.testing import assert_close

from rlhf import models, ppo
from rlhf.config import EngineConfig
from rlhf.errors import ConfigError
from rlhf.methods.settings import FullConfig, LoraConfig
from rlhf.roles import load_roles

pytestmark = pytest.mark.usefixtures("process_group")


CLOSE = {"rtol": 0, "atol": TINY}
LORA = LoraConfig(rank=4)


def moved(model, seed):
    """Trained, as far as these tests care."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def parents(tmp_path, tiny_model, tiny_tokenizer):
    """A factory: (sft, rm) as their runs published them."""
    numbers = itertools.count()

    def make(method=LORA, *, trained_on="digest of sft"):
        place = tmp_path / str(next(numbers))
        sft, rm = place / "sft", place / "rm"
        tiny_model(initializer_range=0.1).save_pretrained(sft)
        torch.manual_seed(1)
        scalar = models.load_scalar(sft, tiny_tokenizer, dtype=torch.float32)
        models.publish(moved(models.trainable(scalar, method, head=True), 2), tiny_tokenizer, rm)
        parent = SimpleNamespace(role="policy", digest=trained_on)

        def run(name, folder, parents):
            made_by = SimpleNamespace(name=method.name, settings=asdict(method))
            manifest = SimpleNamespace(parents=parents, method=made_by)
            return SimpleNamespace(
                reference=name,
                model_dir=folder,
                under=None,
                digest=f"digest of {name[:3].strip('/')}",
                manifest=manifest,
            )

        return run("sft/t", sft, []), run("rm/t", rm, [parent])

    return make


@pytest.fixture
def load(parents, tiny_tokenizer):
    """A factory: the roles of the same two runs, on one backbone or on four."""
    made = parents()

    def make(share):
        torch.manual_seed(3)  # the policy's new adapter
        return load_roles(*made, tiny_tokenizer, LORA, EngineConfig(), share_backbone=share)

    return make


def judged(roles, cfg):
    return judge(drawn(roles.policy, cfg), roles, cfg)


def test_one_backbone_says_what_four_models_say(load):
    one, four = load(True), load(False)
    cfg = stage()
    shared, separate = judged(one, cfg), judged(four, cfg)
    assert torch.equal(shared.responses, separate.responses)
    for name in ("old_logprobs", "ref_logprobs", "old_values", "scores", "kl"):
        assert_close(getattr(shared, name), getattr(separate, name), **CLOSE)
    assert float(shared.scores.std()) > 0.01
    first = shared.old_values[:, 0]
    assert float(first.std()) > 0.01
    assert_close(shared.old_logprobs, shared.ref_logprobs, **CLOSE)


def trained(role):
    """What an update changes, by a name that both layouts share."""
    out = {}
    for name, parameter in models.whole(role).named_parameters():
        name = name.removeprefix("base_model.model.").replace(".critic.", ".default.")
        if parameter.requires_grad and ".modules_to_save." not in name:
            out[name] = parameter
    return out


def head(role):
    score = role.score if isinstance(role, models.SharedRole) else role.get_base_model().score
    found = [p for p in score.parameters() if p.requires_grad]
    return found[0]


def test_updates_are_the_same(load):
    """Policy, critic and head after three updates; reward model and reference as they were."""
    after = []
    for share in (True, False):
        roles, cfg = load(share), stage(minibatches=2, epochs=2, learning_rate=1e-2)
        policy, critic = ppo.engines(roles.policy, roles.critic, cfg.ppo, cfg.engine)
        before = judged(roles, cfg)
        for step in (1, 2, 3):
            batch = noisy(judged(roles, cfg))
            batch = ppo_steps.estimate_advantages(batch, cfg)[0]
            ppo_steps.update(policy, critic, batch, cfg, step=step)
        again = judge(drawn(roles.policy, cfg), roles, cfg)
        after.append((before, again, head(roles.critic).detach().clone()))
        probe = before  # the same tokens, seen again after training
        now = ppo.logprobs(roles.policy, probe, cfg.sampling)
        values = ppo.values(roles.critic, probe)
        ref = ppo.logprobs(roles.reference, probe, cfg.sampling)
        scores = models.scores(roles.reward_model, probe.ids, probe.mask)
        assert float((now - probe.old_logprobs).abs().max()) > 0.01, "the policy moved"
        assert float((values - probe.old_values).abs().max()) > 0.01, "the critic moved"
        assert_close(ref, probe.ref_logprobs, **CLOSE)
        assert_close(scores, probe.scores + cfg.ppo.missing_eos_penalty * ~probe.ended, **CLOSE)
    (_, one, head_one), (_, four, head_four) = after
    for name in ("old_logprobs", "old_values", "scores"):
        assert_close(getattr(one, name), getattr(four, name), rtol=0, atol=2e-4)
    assert_close(head_one, head_four, rtol=0, atol=2e-5)


def test_gradients_go_to_the_role_that_was_asked_and_nowhere_else(load):
    roles = load(True)
    batch = judged(roles, stage())
    named = dict(models.whole(roles.policy).named_parameters())
    for role, name in ((roles.policy, ".default."), (roles.critic, ".critic.")):
        for parameter in named.values():
            parameter.grad = None
        if role is roles.policy:
            loss = ppo.logprobs(role, batch, stage().sampling).sum()
        else:
            loss = ppo.values(role, batch).sum()
        loss.backward()
        touched = {n for n, p in named.items() if p.grad is not None and bool(p.grad.any())}
        assert touched
        assert all(name in n for n in touched)
    for role in (roles.reference, roles.reward_model):
        assert not any(p.requires_grad for p in role.parameters())
        out = models.hidden_states(role, batch.ids, batch.mask)
        assert not out.requires_grad


def test_roles_can_be_asked_in_any_order(load):
    """Each call sees its own adapter, whoever was asked before."""
    roles = load(True)
    moved(roles.policy, 5)
    batch = judged(roles, stage())
    asked = {
        "policy": lambda: ppo.logprobs(roles.policy, batch, stage().sampling),
        "reference": lambda: ppo.logprobs(roles.reference, batch, stage().sampling),
        "critic": lambda: ppo.values(roles.critic, batch),
        "reward_model": lambda: models.scores(roles.reward_model, batch.ids, batch.mask),
    }
    with torch.no_grad():
        first = {name: ask() for name, ask in asked.items()}
        for name in ("critic", "policy", "reward_model", "reference", "policy", "critic"):
            assert torch.equal(asked[name](), first[name]), name
    assert not torch.allclose(first["policy"], first["reference"])


def test_what_is_published_is_the_policy_and_nothing_else(load, tiny_tokenizer, tmp_path):
    roles = load(True)
    moved(roles.policy, 5)
    moved(roles.critic, 6)
    batch = judged(roles, stage())
    models.publish(roles.policy, tiny_tokenizer, tmp_path / "out")
    adapter = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    assert not any("critic" in name or "reward" in name for name in adapter)
    loaded = models.load_causal(tmp_path / "out", tiny_tokenizer, dtype=torch.float32).eval()
    now = ppo.logprobs(loaded, batch, stage().sampling)
    assert_close(now, batch.old_logprobs, **CLOSE)
    # and the roles are as before
    assert_close(ppo.values(roles.critic, batch), batch.old_values, **CLOSE)


def test_a_checkpoint_of_a_role_comes_back(load, tmp_path):
    roles = load(True)
    moved(roles.policy, 5)
    batch = judged(roles, stage())
    models.save_trained(roles.policy, tmp_path / "kept")
    moved(roles.policy, 7)
    assert not torch.allclose(
        ppo.logprobs(roles.policy, batch, stage().sampling), batch.old_logprobs
    )
    models.load_trained(roles.policy, tmp_path / "kept")
    again = ppo.logprobs(roles.policy, batch, stage().sampling)
    assert_close(again, batch.old_logprobs, **CLOSE)


def test_one_backbone_holds_one_backbone(load):
    """Its weights once, and three adapters and two heads."""
    roles = load(True)
    _, everything = models.count_parameters(roles.policy)
    base = sum(
        p.numel() for n, p in models.whole(roles.policy).named_parameters() if ".lora_" not in n
    )
    adapters = everything - base
    mine, _ = models.count_parameters(roles.policy)
    assert adapters == 3 * mine
    four = load(False)
    apart = sum(models.count_parameters(getattr(four, r))[1] for r in vars(four))
    assert apart > 3.5 * base


def test_a_reward_model_that_is_no_adapter_on_this_model_stands_apart(parents, tiny_tokenizer):
    for made, method, why in (
        (parents(), FullConfig(), "method=full trains the backbone itself"),
        (parents(FullConfig()), LORA, "rm/t is not a LoRA adapter on sft/t"),
        (parents(trained_on="another"), LORA, "rm/t is not a LoRA adapter on sft/t"),
    ):
        roles = load_roles(*made, tiny_tokenizer, method, EngineConfig())
        assert not isinstance(roles.policy, models.SharedRole)
        with pytest.raises(ConfigError, match=f"share_backbone=true: {why}"):
            load_roles(*made, tiny_tokenizer, method, EngineConfig(), share_backbone=True)
