"""Losses: by hand, from slow loops in float64, from torch.distributions, by what cannot matter."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import Categorical, kl_divergence

from rlhf import losses
from rlhf.errors import ConfigError, ShapeError
from rlhf.losses import (
    entropy_of,
    kl_estimate,
    kl_loss,
    logprobs_of,
    pairwise_loss,
    ppo_policy_loss,
    ppo_value_loss,
)

EXACT = {"rtol": 1e-9, "atol": 1e-9}
FILLS = [1e30, math.nan, math.inf, -math.inf]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask_of(lengths, columns):
    return torch.arange(columns) < torch.tensor(lengths).unsqueeze(1)


MASK = mask_of([1, 4, 7, 0, 3, 5], 7)  # [6, 7] rows of all lengths, an empty one too


def policy_batch(seed=0):
    """logprobs, old_logprobs, advantages, mask with ratios on both sides of the clip range."""
    old = -randn(6, 7, seed=seed).abs() - 0.5
    return old + 0.3 * randn(6, 7, seed=seed + 10), old, randn(6, 7, seed=seed + 20), MASK


def value_batch(seed=0):
    """values, old_values, returns, mask with values moved past the clip range both ways."""
    old = randn(6, 7, seed=seed)
    return old + 0.3 * randn(6, 7, seed=seed + 10), old, randn(6, 7, seed=seed + 20), MASK


def policy(*tensors, **options):
    return ppo_policy_loss(*tensors, **{"cliprange": 0.2, **options})


def value(*tensors, **options):
    return ppo_value_loss(*tensors, **{"cliprange_value": 0.2, **options})


def policy_all_clips(*tensors, **options):
    return policy(*tensors, **{"cliprange_high": 0.28, "dual_clip": 1.3, **options})


PPO_LOSSES = [pytest.param(policy, policy_batch, id="policy")]
PPO_LOSSES += [pytest.param(policy_all_clips, policy_batch, id="policy with all clips")]
PPO_LOSSES += [pytest.param(value, value_batch, id="value")]


# logprobs_of and entropy_of ----------------------------------------------------------------------


def test_logprobs_by_hand():
    # softmax of log(1, 2, 5) is (1, 2, 5) / 8
    logits = torch.tensor([[[1.0, 2.0, 5.0], [2.0, 1.0, 1.0]]]).log()
    logprobs = logprobs_of(logits, torch.tensor([[2, 0]]))
    expected = torch.tensor([[math.log(5 / 8), math.log(2 / 4)]])
    torch.testing.assert_close(logprobs, expected, rtol=1e-6, atol=1e-6)


def test_logprobs_and_entropy_against_torch_distributions():
    logits, tokens = randn(3, 4, 11) * 3, torch.arange(12).reshape(3, 4) % 11
    torch.testing.assert_close(
        logprobs_of(logits, tokens), Categorical(logits=logits).log_prob(tokens), **EXACT
    )
    torch.testing.assert_close(entropy_of(logits), Categorical(logits=logits).entropy(), **EXACT)


def test_entropy_ends_at_zero_and_log_v():
    uniform, certain = torch.zeros(8), torch.tensor([200.0] + [0.0] * 7)
    entropy = entropy_of(torch.stack([uniform, certain]).unsqueeze(0))
    torch.testing.assert_close(entropy, torch.tensor([[math.log(8), 0.0]]), rtol=1e-6, atol=1e-6)


def test_tokens_ruled_out_by_top_k_add_nothing_to_entropy():
    logits = torch.tensor([[[1.0, 1.0, -math.inf, -math.inf]]], requires_grad=True)
    entropy = entropy_of(logits)
    entropy.sum().backward()
    assert entropy.item() == pytest.approx(math.log(2), abs=1e-6)
    torch.testing.assert_close(logits.grad, torch.zeros(1, 1, 4))
    assert logprobs_of(logits, torch.tensor([[0]])).item() == pytest.approx(-math.log(2), abs=1e-6)


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[[1e4, 1e4 - 1.0]]])
    logprobs = logprobs_of(logits, torch.tensor([[1]]))
    assert logprobs.item() == pytest.approx(-1 - math.log1p(math.exp(-1)), abs=1e-3)
    assert entropy_of(logits).isfinite().all()


@pytest.mark.parametrize("chunk", [1, 2 * 4 * 11, 10**9])
def test_gradients_of_logprobs_and_entropy(monkeypatch, chunk):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk)  # one, two, all sequences at a time
    logits, tokens = randn(3, 4, 11).requires_grad_(), torch.arange(12).reshape(3, 4) % 11
    assert gradcheck(lambda x: logprobs_of(x, tokens), (logits,))
    assert gradcheck(entropy_of, (logits,))
    expected = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(logprobs_of(logits, tokens), expected, **EXACT)


def test_a_chunk_holds_as_many_sequences_as_fit(monkeypatch):
    logits, tokens = torch.zeros(5, 4, 11), torch.zeros(5, 4)
    for elements, sizes in ((2 * 4 * 11, [2, 2, 1]), (1, [1] * 5), (10**9, [5])):
        monkeypatch.setattr(losses, "CHUNK_ELEMENTS", elements)
        chunks = list(losses._chunks(logits, tokens))
        assert [(len(x), len(y)) for x, y in chunks] == [(size, size) for size in sizes]


def test_logits_may_be_a_slice():
    full, tokens = randn(2, 9, 5).requires_grad_(), torch.arange(8).reshape(2, 4) % 5
    assert gradcheck(lambda x: logprobs_of(x[:, 4:-1], tokens), (full,))


@pytest.mark.parametrize("function", ["logprobs_of", "entropy_of"])
def test_backward_keeps_no_second_tensor_of_the_size_of_the_logits(function):
    logits = torch.randn(2, 5, 300, dtype=torch.bfloat16, requires_grad=True)
    arguments = (torch.zeros(2, 5, dtype=torch.long),) if function == "logprobs_of" else ()
    kept = []

    def remember(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        out = getattr(losses, function)(logits, *arguments)
    big = [tensor for tensor in kept if tensor.numel() >= logits.numel()]
    assert [tensor.data_ptr() for tensor in big] == [logits.data_ptr()]
    out.sum().backward()
    assert logits.grad.dtype == torch.bfloat16


def test_bf16_logits_give_fp32_numbers():
    logits, tokens = randn(2, 5, 50).bfloat16(), torch.arange(10).reshape(2, 5)
    exact = Categorical(logits=logits.double())
    logprobs, entropy = logprobs_of(logits, tokens), entropy_of(logits)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), exact.log_prob(tokens), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), exact.entropy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", [policy, "entropy"])
def test_nan_logits_on_padding_do_not_reach_the_gradient(function):
    _, old, advantages, mask = policy_batch()
    logits, tokens = randn(6, 7, 4), torch.zeros(6, 7, dtype=torch.long)
    grads = []
    for fill in (0.0, math.nan):
        x = torch.where(mask.unsqueeze(-1), logits, fill).requires_grad_()
        if function == "entropy":
            loss = losses.masked_mean(entropy_of(x), mask)
        else:
            loss, _ = policy(logprobs_of(x, tokens), old, advantages, mask)
        loss.backward()
        grads.append(x.grad)
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)


def test_an_entropy_bonus_is_a_masked_mean_of_the_entropy():
    # entropies log 2, 0 (p = 1 on one token), and padding that would add log 2
    logits = torch.tensor([[[0.0, 0.0], [900.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    mask = mask_of([2], 3)
    bonus = losses.masked_mean(entropy_of(logits), mask)
    assert bonus.item() == pytest.approx(math.log(2) / 2, abs=1e-12)
    part = losses.masked_mean(entropy_of(logits), mask, count=8)  # 8 tokens on all processes
    assert part.item() == pytest.approx(math.log(2) / 8, abs=1e-12)
    logits = randn(1, 3, 5).requires_grad_()
    (grad,) = torch.autograd.grad(-0.1 * losses.masked_mean(entropy_of(logits), mask), logits)
    with torch.no_grad():
        assert (entropy_of(logits - 0.1 * grad) > entropy_of(logits)).tolist() == [[1, 1, 0]]


def test_logprobs_refuse_what_does_not_fit():
    with pytest.raises(ShapeError, match=r"logits \[2, 3, 5\], tokens \[2, 4\]"):
        logprobs_of(torch.zeros(2, 3, 5), torch.zeros(2, 4).long())
    with pytest.raises(ShapeError, match=r"logits \[3, 5\]"):
        logprobs_of(torch.zeros(3, 5), torch.zeros(3).long())
    with pytest.raises(ShapeError, match=r"logits \[3, 5\]"):
        logprobs_of(torch.zeros(3, 5), torch.zeros(3, 5).long())
    with pytest.raises(ShapeError, match=r"logits \[3, 5\]"):
        entropy_of(torch.zeros(3, 5))


# kl_estimate -------------------------------------------------------------------------------------


def test_kl_estimates_by_hand():
    logprobs, ref = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    # log ratios 0.5 and -1
    k1, k2, k3 = (kl_estimate(logprobs, ref, estimator=name) for name in ("k1", "k2", "k3"))
    torch.testing.assert_close(k1, torch.tensor([[0.5, -1.0]]))
    torch.testing.assert_close(k2, torch.tensor([[0.125, 0.5]]))
    expected = torch.tensor([[math.exp(-0.5) - 0.5, math.e - 2]])
    torch.testing.assert_close(k3, expected)


@pytest.mark.parametrize("seed", range(3))
def test_k1_and_k3_are_unbiased_by_enumeration(seed):
    # the expectation over the policy, summed over the whole vocabulary instead of sampled
    policy_, reference = (
        Categorical(logits=randn(6, seed=seed)),
        Categorical(logits=randn(6, seed=seed + 9)),
    )
    exact = kl_divergence(policy_, reference)
    for estimator in ("k1", "k3"):
        per_token = kl_estimate(policy_.logits, reference.logits, estimator=estimator)
        torch.testing.assert_close((policy_.probs * per_token).sum(), exact, **EXACT)
    k2 = (policy_.probs * kl_estimate(policy_.logits, reference.logits, estimator="k2")).sum()
    assert abs(k2 - exact) > 1e-3  # k2 is the biased one


def test_k2_is_close_to_the_kl_when_policies_are_close():
    logits = randn(6)
    nearby = logits + 1e-3 * randn(6, seed=1)
    policy_, reference = Categorical(logits=logits), Categorical(logits=nearby)
    k2 = (policy_.probs * kl_estimate(policy_.logits, reference.logits, estimator="k2")).sum()
    assert k2.item() == pytest.approx(kl_divergence(policy_, reference).item(), rel=1e-2)


def test_k2_and_k3_are_never_negative_and_zero_at_equality():
    logprobs, ref = -randn(50, 20).abs(), -randn(50, 20, seed=1).abs()
    assert (kl_estimate(logprobs, ref, estimator="k1") < 0).any()
    for estimator in ("k2", "k3"):
        assert (kl_estimate(logprobs, ref, estimator=estimator) >= 0).all()
    for estimator in ("k1", "k2", "k3"):
        assert (kl_estimate(ref, ref, estimator=estimator) == 0).all()


def test_k3_of_a_tiny_difference_keeps_its_digits():
    # exp(-x) - 1 + x of x = 1e-3 is 5e-7; computed as written in fp32 most digits are lost
    k3 = kl_estimate(torch.tensor([1e-3]), torch.tensor([0.0]), estimator="k3")
    assert k3.item() == pytest.approx(4.99833e-7, rel=1e-3)


def test_expected_gradients_of_the_estimators():
    # on-policy: k2's expected gradient is that of the exact KL, k1's is 0
    logits, reference = randn(6).requires_grad_(), randn(6, seed=1).log_softmax(-1)
    grads = {}
    for estimator in ("k1", "k2"):
        logprobs = logits.log_softmax(-1)
        per_token = kl_estimate(logprobs, reference, estimator=estimator)
        (grads[estimator],) = torch.autograd.grad(
            (logprobs.exp().detach() * per_token).sum(), logits
        )
    exact = kl_divergence(Categorical(logits=logits), Categorical(logits=reference))
    (expected,) = torch.autograd.grad(exact, logits)
    torch.testing.assert_close(grads["k2"], expected, **EXACT)
    torch.testing.assert_close(grads["k1"], torch.zeros(6, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("fill", FILLS)
def test_padding_does_not_reach_the_kl(fill, estimator):
    logprobs, ref = randn(6, 7), randn(6, 7, seed=1)
    grads = []
    for padding in (0.0, fill):
        x = torch.where(MASK, logprobs, padding).requires_grad_()
        kl = kl_estimate(x, ref, estimator=estimator, response_mask=MASK)
        assert (kl[~MASK] == 0).all()
        kl.sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)
    assert (grads[1][~MASK] == 0).all()


def test_kl_of_bf16_is_fp32_and_reference_gets_no_gradient():
    logprobs = torch.tensor([[-1.0]], dtype=torch.bfloat16, requires_grad=True)
    ref = torch.tensor([[-1.0078125]], dtype=torch.bfloat16, requires_grad=True)
    k3 = kl_estimate(logprobs, ref, estimator="k3")
    assert k3.dtype == torch.float32
    assert k3.item() == pytest.approx(math.expm1(-0.0078125) + 0.0078125, rel=1e-4)
    k3.sum().backward()
    assert ref.grad is None


def test_kl_refuses_what_it_does_not_know():
    with pytest.raises(ConfigError, match=r"'k4'.*k1, k2, k3"):
        kl_estimate(torch.zeros(1, 2), torch.zeros(1, 2), estimator="k4")
    with pytest.raises(ShapeError, match=r"logprobs \[1, 2\], ref_logprobs \[1, 3\]"):
        kl_estimate(torch.zeros(1, 2), torch.zeros(1, 3), estimator="k1")
    with pytest.raises(ShapeError, match=r"response_mask \[1, 3\]"):
        kl_estimate(
            torch.zeros(1, 2), torch.zeros(1, 2), estimator="k1", response_mask=torch.ones(1, 3) > 0
        )
    with pytest.raises(ShapeError, match="must be bool"):
        kl_estimate(
            torch.zeros(1, 2), torch.zeros(1, 2), estimator="k1", response_mask=torch.ones(1, 2)
        )


# kl_loss -----------------------------------------------------------------------------------------


def test_kl_loss_by_hand():
    logprobs = torch.tensor([[-1.0, -2.0, 7.0]], dtype=torch.float64)
    ref = torch.tensor([[-1.5, -1.0, 3.0]], dtype=torch.float64)
    mask = mask_of([2], 3)  # log ratios 0.5 and -1
    expected = {
        "k1": (0.5 - 1) / 2,
        "k2": (0.125 + 0.5) / 2,
        "k3": (math.exp(-0.5) - 0.5 + math.e - 2) / 2,
    }
    for estimator, number in expected.items():
        loss, stats = kl_loss(logprobs, ref, mask, estimator=estimator)
        assert loss.item() == pytest.approx(number, abs=1e-12)
        assert stats["policy/kl"].item() == pytest.approx(-0.25, abs=1e-12)
        part, stats = kl_loss(logprobs, ref, mask, estimator=estimator, count=8)
        assert part.item() == pytest.approx(number / 4, abs=1e-12)
        assert stats["policy/kl"].item() == pytest.approx(-0.25 / 4, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_expected_gradients_of_the_kl_loss(seed):
    # on-policy, every token of the vocabulary as often as the policy draws it: nothing for k1,
    # KL(policy || reference) for k2, KL(reference || policy) for k3
    logits, reference = randn(6, seed=seed).requires_grad_(), randn(6, seed=seed + 9).log_softmax(0)
    reference_ = Categorical(logits=reference)
    forward = kl_divergence(Categorical(logits=logits), reference_)
    backward = kl_divergence(reference_, Categorical(logits=logits))
    expected = {
        "k1": torch.zeros(6, dtype=torch.float64),
        "k2": torch.autograd.grad(forward, logits)[0],
        "k3": torch.autograd.grad(backward, logits)[0],
    }
    assert (expected["k2"] - expected["k3"]).abs().max() > 0.01
    for estimator, gradient in expected.items():
        found = torch.zeros(6, dtype=torch.float64)
        for token in range(6):
            loss, _ = kl_loss(
                logits.log_softmax(0)[token].reshape(1, 1),
                reference[token].reshape(1, 1),
                torch.ones(1, 1).bool(),
                estimator=estimator,
            )
            weight = logits.softmax(0)[token].detach()
            found += weight * torch.autograd.grad(loss, logits)[0]
        torch.testing.assert_close(found, gradient, **EXACT)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("fill", FILLS)
def test_padding_does_not_reach_the_kl_loss(fill, estimator):
    logprobs, ref = -randn(6, 7).abs(), (-randn(6, 7, seed=1).abs()).requires_grad_()
    results = []
    for padding in (0.0, fill):
        x = torch.where(MASK, logprobs, padding).requires_grad_()
        loss, stats = kl_loss(x, torch.where(MASK, ref, padding), MASK, estimator=estimator)
        loss.backward()
        assert not stats["policy/kl"].requires_grad
        results.append((loss.detach(), stats, x.grad))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert (results[1][2][~MASK] == 0).all()
    assert (results[1][2][MASK] != 0).all()
    assert ref.grad is None


def test_kl_loss_refuses_what_does_not_fit():
    x, mask = torch.zeros(1, 2), torch.ones(1, 2).bool()
    with pytest.raises(ConfigError, match=r"'k4'.*k1, k2, k3"):
        kl_loss(x, x, mask, estimator="k4")
    with pytest.raises(ShapeError, match=r"logprobs \[1, 2\], ref_logprobs \[1, 1\]"):
        kl_loss(x, x[:, :1], mask, estimator="k2")
    with pytest.raises(ShapeError, match=r"response_mask \[1, 1\]"):
        kl_loss(x, x, mask[:, :1], estimator="k2")
    with pytest.raises(ShapeError, match="must be bool"):
        kl_loss(x, x, mask.float(), estimator="k2")


# both PPO losses ---------------------------------------------------------------------------------


def policy_by_definition(logprobs, old, advantages, mask, cliprange=0.2):
    """Equation 7 of Schulman 2017 in plain Python, minimised."""
    objective, kl, clipped, ratios = [], [], [], []
    for b, r in mask.nonzero().tolist():
        difference, a = (logprobs[b, r] - old[b, r]).item(), advantages[b, r].item()
        ratio = math.exp(difference)
        bounded = min(max(ratio, 1 - cliprange), 1 + cliprange)
        objective.append(min(ratio * a, bounded * a))
        kl.append(difference**2 / 2)
        clipped.append(1.0 if (a > 0 and ratio > 1.2) or (a < 0 and ratio < 0.8) else 0.0)
        ratios.append(ratio)
    n = len(objective)
    return {
        "loss": -sum(objective) / n,
        "policy/approxkl": sum(kl) / n,
        "policy/clipfrac": sum(clipped) / n,
        "policy/ratio": sum(ratios) / n,
    }


def value_by_definition(values, old, returns, mask, cliprange_value=0.2):
    total, clipped, squares = [], [], []
    for b, r in mask.nonzero().tolist():
        v, o, ret = values[b, r].item(), old[b, r].item(), returns[b, r].item()
        near = min(max(v, o - cliprange_value), o + cliprange_value)
        total.append(0.5 * max((v - ret) ** 2, (near - ret) ** 2))
        clipped.append(1.0 if (near - ret) ** 2 > (v - ret) ** 2 else 0.0)
        squares.append((v - ret) ** 2)
    n = len(total)
    return {
        "loss": sum(total) / n,
        "val/clipfrac": sum(clipped) / n,
        "val/error": sum(squares) / n,
    }


@pytest.mark.parametrize(
    ("function", "batch", "definition"),
    [(policy, policy_batch, policy_by_definition), (value, value_batch, value_by_definition)],
    ids=["policy", "value"],
)
@pytest.mark.parametrize("seed", range(3))
def test_ppo_loss_and_stats_against_a_loop(function, batch, definition, seed):
    tensors = batch(seed)
    tensors[0].requires_grad_()
    loss, stats = function(*tensors)
    expected = definition(*tensors)
    found = {"loss": loss.item(), **{name: number.item() for name, number in stats.items()}}
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert 0 < expected[next(name for name in expected if "clipfrac" in name)] < 1
    for number in stats.values():
        assert number.shape == ()
        assert not number.requires_grad


@pytest.mark.parametrize(("function", "batch"), PPO_LOSSES)
@pytest.mark.parametrize("fill", FILLS)
def test_padding_reaches_no_ppo_loss_statistic_or_gradient(function, batch, fill):
    *tensors, mask = batch()
    results = []
    for padding in (0.0, fill):
        first, *others = (torch.where(mask, tensor, padding) for tensor in tensors)
        first.requires_grad_()
        loss, stats = function(first, *others, mask)
        with torch.autograd.set_detect_anomaly(True):  # no nan on the way to the gradient either
            loss.backward()
        results.append((loss.detach(), stats, first.grad))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert (results[1][2][~mask] == 0).all()
    assert results[1][2][mask].abs().sum() > 0


@pytest.mark.parametrize(("function", "batch"), PPO_LOSSES)
def test_ppo_losses_ignore_more_padding_and_row_order(function, batch):
    *tensors, mask = batch()
    whole = function(*tensors, mask)
    wide = [torch.cat([tensor, torch.full((6, 3), math.nan)], dim=1) for tensor in tensors]
    padded = function(*wide, torch.cat([mask, torch.zeros(6, 3).bool()], dim=1))
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    shuffled = function(*(tensor[order] for tensor in tensors), mask[order])
    torch.testing.assert_close(padded, whole, **EXACT)
    torch.testing.assert_close(shuffled, whole, **EXACT)


@pytest.mark.parametrize(("function", "batch"), PPO_LOSSES)
@pytest.mark.parametrize("layout", [[6], [3, 3], [1, 1, 1, 1, 1, 1], [1, 4, 1]])
def test_micro_batches_add_up_to_the_whole(function, batch, layout):
    *tensors, mask = batch()
    whole_input = tensors[0].clone().requires_grad_()
    whole_loss, whole_stats = function(whole_input, *tensors[1:], mask)
    whole_loss.backward()
    accumulated = tensors[0].clone().requires_grad_()
    total, sums, start = 0.0, dict.fromkeys(whole_stats, 0.0), 0
    for size in layout:
        rows = slice(start, start + size)
        start += size
        loss, stats = function(
            accumulated[rows], *(tensor[rows] for tensor in tensors[1:]), mask[rows], count=20
        )  # 1 + 4 + 7 + 0 + 3 + 5 tokens
        loss.backward()
        total += loss.item()
        sums = {name: sums[name] + stats[name].item() for name in sums}
    assert total == pytest.approx(whole_loss.item(), abs=1e-9)
    assert sums == pytest.approx({name: s.item() for name, s in whole_stats.items()}, abs=1e-9)
    torch.testing.assert_close(accumulated.grad, whole_input.grad, **EXACT)


@pytest.mark.parametrize(("function", "batch"), PPO_LOSSES)
def test_only_the_first_tensor_gets_a_gradient(function, batch):
    *tensors, mask = batch()
    tensors = [tensor.requires_grad_() for tensor in tensors]
    function(*tensors, mask)[0].backward()
    assert tensors[0].grad is not None
    assert tensors[1].grad is None
    assert tensors[2].grad is None


@pytest.mark.parametrize(("function", "batch"), PPO_LOSSES)
def test_gradients_of_ppo_losses(function, batch):
    first, *others = batch()
    assert gradcheck(lambda x: function(x, *others)[0], (first.requires_grad_(),))


@pytest.mark.parametrize(("function", "batch"), PPO_LOSSES)
def test_bf16_is_computed_in_fp32(function, batch):
    *tensors, mask = batch()
    low = [tensor.bfloat16() for tensor in tensors]
    loss, stats = function(*low, mask)
    exact, exact_stats = function(*(tensor.double() for tensor in low), mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    for name, number in stats.items():
        assert number.dtype == torch.float32
        torch.testing.assert_close(number.double(), exact_stats[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("function", "batch"), PPO_LOSSES)
def test_a_batch_without_tokens_adds_nothing(function, batch):
    first, *others, _ = batch()
    first.requires_grad_()
    loss, stats = function(first, *others, torch.zeros(6, 7).bool())
    loss.backward()
    assert loss.item() == 0
    assert (first.grad == 0).all()
    assert all(number.item() == 0 for number in stats.values())


@pytest.mark.parametrize(("function", "batch"), PPO_LOSSES)
def test_ppo_losses_refuse_what_does_not_fit(function, batch):
    *tensors, mask = batch()
    for broken in range(3):
        changed = list(tensors)
        changed[broken] = changed[broken][:, :1]
        with pytest.raises(ShapeError, match=r"\[6, 1\].*must have one shape"):
            function(*changed, mask)
    with pytest.raises(ShapeError, match=r"response_mask \[6, 1\]"):
        function(*tensors, mask[:, :1])
    with pytest.raises(ShapeError, match=r"response_mask is torch\.float32.*must be bool"):
        function(*tensors, mask.float())


# ppo_policy_loss ---------------------------------------------------------------------------------


def test_policy_loss_by_hand():
    # ratios 1.5, 0.5, 1.5, 0.5 with A = 2, 2, -2, -2; objective min(ratio*A, clipped*A):
    # 1.2*2 = 2.4 (clipped), 0.5*2 = 1, 1.5*-2 = -3, 0.8*-2 = -1.6 (clipped); loss = 1.2/4
    logprobs = torch.tensor([[1.5, 0.5, 1.5, 0.5]], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([[2.0, 2.0, -2.0, -2.0]], dtype=torch.float64)
    old = torch.zeros(1, 4, dtype=torch.float64)
    loss, stats = policy(logprobs, old, advantages, torch.ones(1, 4).bool())
    assert loss.item() == pytest.approx(0.3)
    assert stats["policy/clipfrac"].item() == 0.5
    assert stats["policy/ratio"].item() == 1.0
    assert stats["policy/approxkl"].item() == pytest.approx(
        (math.log(1.5) ** 2 + math.log(0.5) ** 2) / 4
    )
    # gradient -A * ratio / 4 where not clipped; nothing where clipping stops it, either way
    loss.backward()
    expected = torch.tensor([[0.0, -0.25, 0.75, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(logprobs.grad, expected, **EXACT)


def test_clip_higher_by_hand():
    # ratios 1.25, 1.5, 0.7, 1.5 with A = 2, 2, -2, -2
    # up to 1.2: 2.4 and 2.4 (both clipped); up to 1.28: 2.5 and 2.56 (clipped)
    # down to 0.8, either way: -1.6 (clipped); 1.5 * -2 = -3 has no upper clip
    logprobs = torch.tensor([[1.25, 1.5, 0.7, 1.5]], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([[2.0, 2.0, -2.0, -2.0]], dtype=torch.float64)
    tensors = (logprobs, torch.zeros_like(advantages), advantages, torch.ones(1, 4).bool())
    loss, stats = policy(*tensors)
    assert loss.item() == pytest.approx(-(2.4 + 2.4 - 1.6 - 3) / 4, abs=1e-12)
    assert stats["policy/clipfrac"].item() == 0.75
    loss, stats = policy(*tensors, cliprange_high=0.28)
    assert loss.item() == pytest.approx(-(2.5 + 2.56 - 1.6 - 3) / 4, abs=1e-12)
    assert stats["policy/clipfrac"].item() == 0.5
    loss.backward()
    expected = torch.tensor([[-2 * 1.25 / 4, 0.0, 0.0, 2 * 1.5 / 4]], dtype=torch.float64)
    torch.testing.assert_close(logprobs.grad, expected, **EXACT)


def test_dual_clip_by_hand():
    # ratios 4, 2, 4, 0.5, 4 with A = -2, -2, 2, -2, -1: losses 8, 4, -2.4 (clipped), 1.6 (clipped)
    # and 4; none of those with A < 0 may be above 3 * 2, and 3 * 1: 6 for 8, 3 for 4
    ratios = torch.tensor([[4.0, 2.0, 4.0, 0.5, 4.0]], dtype=torch.float64)
    logprobs = ratios.log().requires_grad_()
    advantages = torch.tensor([[-2.0, -2.0, 2.0, -2.0, -1.0]], dtype=torch.float64)
    tensors = (logprobs, torch.zeros_like(advantages), advantages, torch.ones(1, 5).bool())
    loss, stats = policy(*tensors)
    assert loss.item() == pytest.approx((8 + 4 - 2.4 + 1.6 + 4) / 5, abs=1e-12)
    assert stats["policy/clipfrac"].item() == pytest.approx(0.4)
    loss, stats = policy(*tensors, dual_clip=3.0)
    assert loss.item() == pytest.approx((6 + 4 - 2.4 + 1.6 + 3) / 5, abs=1e-12)
    assert stats["policy/clipfrac"].item() == pytest.approx(0.8)
    loss.backward()
    expected = torch.tensor([[0.0, 2 * 2 / 5, 0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(logprobs.grad, expected, **EXACT)


def test_clips_at_their_neutral_values_change_nothing():
    batch = policy_batch()
    plain = policy(*batch)
    for options in ({"cliprange_high": 0.2}, {"dual_clip": 1e9}):
        torch.testing.assert_close(policy(*batch, **options), plain, rtol=0, atol=0)


@pytest.mark.parametrize("dual_clip", [1.0, 0.5, -3.0, math.nan])
def test_a_dual_clip_that_stops_the_first_step_is_refused(dual_clip):
    with pytest.raises(ConfigError, match=rf"dual_clip={dual_clip}: must be above 1"):
        policy(*policy_batch(), dual_clip=dual_clip)


def test_a_ratio_that_overflows_shows_beneath_the_dual_clip():
    logprobs = torch.tensor([[100.0]], requires_grad=True)
    tensors = (logprobs, torch.tensor([[0.0]]), torch.tensor([[-1.0]]), torch.ones(1, 1).bool())
    loss, stats = policy(*tensors, dual_clip=3.0)
    assert loss.item() == 3.0
    assert stats["policy/ratio"].item() == math.inf
    loss.backward()
    assert not logprobs.grad.isfinite().any()


def test_gradient_at_ratio_one_is_the_policy_gradient():
    _, _, advantages, mask = policy_batch()
    logits, tokens = randn(6, 7, 5).requires_grad_(), torch.arange(42).reshape(6, 7) % 5
    logprobs = logprobs_of(logits, tokens)
    loss, stats = policy(logprobs, logprobs.detach(), advantages, mask)
    (found,) = torch.autograd.grad(loss, logits)
    # -mean(A * grad logprob), one token at a time from torch.distributions
    expected = torch.zeros_like(found)
    for b, r in mask.nonzero().tolist():
        logprob = Categorical(logits=logits[b, r]).log_prob(tokens[b, r])
        (grad,) = torch.autograd.grad(logprob, logits)
        expected -= advantages[b, r] * grad / mask.sum()
    torch.testing.assert_close(found, expected, **EXACT)
    assert loss.item() == pytest.approx(-advantages[mask].mean().item(), abs=1e-9)
    assert stats["policy/approxkl"].item() == 0
    assert stats["policy/clipfrac"].item() == 0
    assert stats["policy/ratio"].item() == 1


def test_a_descent_step_makes_good_tokens_likelier():
    logprobs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0]])
    loss, _ = policy(logprobs, logprobs.detach(), advantages, torch.ones(1, 2).bool())
    loss.backward()
    assert logprobs.grad[0, 0] < 0 < logprobs.grad[0, 1]  # minus the gradient: up, down


def test_bf16_logprobs_are_subtracted_in_fp32():
    # bf16 holds 1 and 0.01 (as 0.010009765625) but not their difference
    logprobs, old = torch.tensor([[-0.010009765625]]), torch.tensor([[-1.0]])
    _, stats = policy(logprobs.bfloat16(), old.bfloat16(), torch.ones(1, 1), torch.ones(1, 1) > 0)
    assert stats["policy/ratio"].item() == pytest.approx(math.exp(1 - 0.010009765625), rel=1e-6)


def test_the_ratio_is_not_clamped():
    logprobs, old = torch.tensor([[100.0]]), torch.tensor([[0.0]])
    loss, stats = policy(logprobs, old, torch.tensor([[-1.0]]), torch.ones(1, 1).bool())
    assert loss.item() == math.inf
    assert stats["policy/ratio"].item() == math.inf


# ppo_value_loss ----------------------------------------------------------------------------------


def test_value_loss_by_hand():
    # old 0, range 0.2, value 1 -> clipped 0.2 and value -1 -> clipped -0.2
    # returns 0.9: max(.01, .49) clipped; -1: max(4, 1.44) not; and the mirror image of both
    values = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    returns = torch.tensor([[0.9, -1.0, -0.9, 1.0]], dtype=torch.float64)
    old = torch.zeros(1, 4, dtype=torch.float64)
    loss, stats = value(values, old, returns, torch.ones(1, 4).bool())
    assert loss.item() == pytest.approx(0.5 * (0.49 + 4 + 0.49 + 4) / 4)
    assert stats["val/clipfrac"].item() == 0.5
    assert stats["val/error"].item() == pytest.approx((0.01 + 4 + 0.01 + 4) / 4)
    # gradient (value - return) / 4 where not clipped
    loss.backward()
    expected = torch.tensor([[0.0, 0.5, 0.0, -0.5]], dtype=torch.float64)
    torch.testing.assert_close(values.grad, expected, **EXACT)


def test_infinite_value_range_is_half_the_squared_error():
    values, old, returns, mask = value_batch()
    loss, stats = value(values, old, returns, mask, cliprange_value=math.inf)
    errors = [((values - returns)[b, r].item()) ** 2 for b, r in mask.nonzero().tolist()]
    assert loss.item() == pytest.approx(0.5 * sum(errors) / len(errors), abs=1e-9)
    assert stats["val/clipfrac"].item() == 0


# pairwise_loss -----------------------------------------------------------------------------------


def test_pairwise_loss_by_hand():
    chosen, rejected = torch.tensor([2.0, 1.0, 0.0, 5.0]), torch.tensor([1.0, 1.0, 3.0, 4.0])
    loss, stats = pairwise_loss(chosen, rejected)
    leads = [1.0, 0.0, -3.0, 1.0]
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-x)) for x in leads) / 4, rel=1e-6)
    assert stats["accuracy"].item() == 0.625  # two right, one tie, one wrong
    assert stats["margin"].item() == -0.25
    for number in stats.values():
        assert number.shape == ()


def test_pairwise_margin_and_centring_by_hand():
    chosen, rejected = torch.tensor([2.0, 0.5]), torch.tensor([1.0, 0.0])
    loss, stats = pairwise_loss(chosen, rejected, margin=torch.tensor([3.0, 0.5]), center_coef=0.01)
    # leads less margins: -2 and 0;  sums 3 and 0.5
    expected = (math.log1p(math.exp(2)) + math.log(2)) / 2 + 0.01 * (9 + 0.25) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert stats["accuracy"].item() == 1.0  # which answer scores higher: no margin in it
    assert stats["margin"].item() == 0.75


def test_pairwise_loss_knows_only_differences_until_it_is_centred():
    chosen, rejected = randn(8), randn(8, seed=1)
    loss, _ = pairwise_loss(chosen, rejected)
    shifted, _ = pairwise_loss(chosen + 7, rejected + 7)
    torch.testing.assert_close(shifted, loss, **EXACT)
    centred, _ = pairwise_loss(chosen + 7, rejected + 7, center_coef=0.01)
    assert centred > loss + 1


def test_pairwise_gradient_and_extremes():
    chosen, rejected = randn(5).requires_grad_(), randn(5, seed=1).requires_grad_()
    margin = randn(5, seed=2).abs()
    assert gradcheck(
        lambda c, r: pairwise_loss(c, r, margin=margin, center_coef=0.1)[0], (chosen, rejected)
    )
    far, stats = pairwise_loss(torch.tensor([-500.0]), torch.tensor([500.0]))
    assert far.item() == 1000.0  # no overflow in log sigmoid
    assert stats["accuracy"].item() == 0.0
    loss, stats = pairwise_loss(chosen, rejected)
    assert loss.requires_grad
    assert not any(number.requires_grad for number in stats.values())


def test_pairwise_bf16_is_computed_in_fp32():
    # 100 - 0.01 rounds to 100 in bf16: the pair would look like a tie
    chosen = torch.tensor([100.0], dtype=torch.bfloat16)
    rejected = torch.tensor([0.01], dtype=torch.bfloat16)
    loss, stats = pairwise_loss(chosen, rejected)
    assert loss.dtype == torch.float32
    assert stats["margin"].item() == pytest.approx(100 - 0.01, abs=1e-3)


def test_pairwise_refuses_what_does_not_fit():
    with pytest.raises(ShapeError, match=r"chosen_scores \[3\], rejected_scores \[3, 1\]"):
        pairwise_loss(torch.zeros(3), torch.zeros(3, 1))
    with pytest.raises(ShapeError, match=r"margin \[1\]"):
        pairwise_loss(torch.zeros(3), torch.zeros(3), margin=torch.zeros(1))
    with pytest.raises(ShapeError, match="no pair"):
        pairwise_loss(torch.zeros(0), torch.zeros(0))


@pytest.mark.parametrize("center_coef", [None, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
def test_pairwise_loss_is_the_one_that_trl_trains_by(center_coef, with_margin):
    """Reward models are trained by TRL's trainer; LoRA-drop's first training by ours."""
    from trl import RewardTrainer

    def gathered(x):
        return x

    scores = torch.randn(10, requires_grad=True)  # chosen, then rejected
    margin = {"margin": torch.rand(5)} if with_margin else {}
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=center_coef),
        accelerator=SimpleNamespace(gather=gathered, gather_for_metrics=gathered),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    theirs = RewardTrainer.compute_loss(
        trainer, lambda **_: SimpleNamespace(logits=scores[:, None]), dict(margin)
    )
    ours, stats = pairwise_loss(*scores.chunk(2), center_coef=center_coef or 0.0, **margin)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for name in ("accuracy", "margin"):
        assert trainer._metrics["eval"][name] == [pytest.approx(float(stats[name]), rel=1e-6)]
    grads = [torch.autograd.grad(loss, scores)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)
