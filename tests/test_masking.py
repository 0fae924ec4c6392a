"""Means and whitening: against plain loops, and against what must not matter."""

import math

import pytest
import torch

from rlhf.errors import ShapeError
from rlhf.masking import at_least_fp32, expect_bool, expect_same_shape, masked_mean, masked_whiten

EXACT = {"rtol": 1e-9, "atol": 1e-9}
FILLS = [0.0, 1e30, math.nan, math.inf, -math.inf]


def ragged(rows=5, columns=7, seed=0):
    """x [B, R] in float64 and a mask with rows of every kind, one empty, holes allowed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 3 + 2
    mask = torch.rand(rows, columns, generator=generator) < 0.6
    mask[1] = False
    return x, mask


def kept(x, mask):
    """The True positions as a plain list of floats."""
    return [
        x[b, r].item() for b in range(x.shape[0]) for r in range(x.shape[1]) if mask[b, r].item()
    ]


def test_expect_same_shape_names_every_tensor():
    with pytest.raises(ShapeError, match=r"rewards \[2, 3\], values \[2, 4\].*one shape"):
        expect_same_shape(rewards=torch.zeros(2, 3), values=torch.zeros(2, 4))
    expect_same_shape(rewards=torch.zeros(2, 3), values=torch.ones(2, 3))


def test_expect_same_shape_refuses_what_would_broadcast():
    with pytest.raises(ShapeError, match=r"scores \[3, 1\], values \[3\]"):
        expect_same_shape(scores=torch.zeros(3, 1), values=torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8])
def test_a_mask_of_numbers_is_refused(dtype):
    mask = torch.ones(2, 3, dtype=dtype)
    with pytest.raises(ShapeError, match=r"response_mask is torch\.\w+: a mask must be bool"):
        expect_bool(response_mask=mask)
    with pytest.raises(ShapeError, match="must be bool"):
        masked_mean(torch.ones(2, 3), mask)
    with pytest.raises(ShapeError, match="must be bool"):
        masked_whiten(torch.ones(2, 3), mask, subtract_mean=True)


def test_at_least_fp32_never_loses_precision():
    seen = {t: at_least_fp32(torch.ones(1, dtype=t)).dtype for t in (torch.bfloat16, torch.half)}
    assert set(seen.values()) == {torch.float32}
    assert at_least_fp32(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
    assert at_least_fp32(torch.ones(1, dtype=torch.bool)).dtype == torch.float32


def test_masked_mean_by_hand():
    x = torch.tensor([[1.0, 2.0, 100.0], [6.0, 100.0, 100.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert masked_mean(x, mask).item() == 3.0  # (1 + 2 + 6) / 3
    assert masked_mean(x, mask).shape == ()
    assert masked_mean(x, mask, count=9).item() == 1.0
    assert masked_mean(x, mask, count=torch.tensor(9)).item() == 1.0
    assert masked_mean(x > 1.5, mask).item() == pytest.approx(2 / 3)  # bool: a fraction


@pytest.mark.parametrize("seed", range(3))
def test_masked_mean_against_a_loop(seed):
    x, mask = ragged(seed=seed)
    numbers = kept(x, mask)
    torch.testing.assert_close(masked_mean(x, mask).item(), sum(numbers) / len(numbers), **EXACT)


@pytest.mark.parametrize("fill", FILLS)
def test_padding_reaches_neither_mean_nor_gradient(fill):
    x, mask = ragged()
    padded = torch.where(mask, x, fill).requires_grad_()
    mean = masked_mean(padded, mask)
    mean.backward()
    torch.testing.assert_close(mean, masked_mean(x, mask), rtol=0, atol=0)
    torch.testing.assert_close(padded.grad, mask.double() / mask.sum(), **EXACT)


def test_mean_over_nothing_is_zero_with_zero_gradient():
    x = torch.full((2, 3), math.nan, requires_grad=True)
    for count in (None, 5):
        x.grad = None
        mean = masked_mean(x, torch.zeros(2, 3, dtype=torch.bool), count=count)
        mean.backward()
        assert mean.item() == 0
        assert x.grad.tolist() == [[0.0] * 3] * 2


def test_parts_divided_by_the_global_count_add_up():
    x, mask = ragged(rows=6)
    parts = [masked_mean(x[i : i + 2], mask[i : i + 2], count=mask.sum()) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), masked_mean(x, mask), **EXACT)


def test_bf16_is_summed_in_fp32():
    # 1.0 added 1000 times in bf16 sticks at 256; in fp32 the mean is exact
    x = torch.ones(1, 1000, dtype=torch.bfloat16)
    x[0, 0] = 1001.0  # bf16 holds 1000
    mean = masked_mean(x, torch.ones(1, 1000, dtype=torch.bool))
    assert mean.dtype == torch.float32
    assert mean.item() == pytest.approx(1.999, abs=1e-6)


def test_count_keeps_the_dtype_of_x():
    mean = masked_mean(
        torch.ones(2), torch.ones(2).bool(), count=torch.tensor(2.0, dtype=torch.float64)
    )
    assert mean.dtype == torch.float32


@pytest.mark.parametrize(
    ("count", "message"),
    [(0, "count=0"), (-3, "count=-3"), (math.nan, "count=nan"), (torch.ones(1), r"count \[1\]")],
)
def test_a_count_that_cannot_be_one_is_refused(count, message):
    with pytest.raises(ShapeError, match=message):
        masked_mean(torch.ones(2), torch.ones(2).bool(), count=count)


def test_masked_mean_refuses_another_shape():
    with pytest.raises(ShapeError, match=r"x \[2, 3\], mask \[3\]"):
        masked_mean(torch.zeros(2, 3), torch.ones(3).bool())


def test_whiten_by_hand():
    # kept 1, 3, 5, 7: mean 4, population variance (9 + 1 + 1 + 9) / 4 = 5
    x = torch.tensor([[1.0, 3.0, 99.0], [5.0, 7.0, 99.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, False]])
    by_hand = torch.tensor([[-3.0, -1.0], [1.0, 3.0]], dtype=torch.float64) / math.sqrt(5 + 1e-8)
    centred = masked_whiten(x, mask, subtract_mean=True)
    torch.testing.assert_close(centred[:, :2], by_hand, **EXACT)
    assert centred[:, 2].tolist() == [0.0, 0.0]
    scaled = masked_whiten(x, mask, subtract_mean=False)
    torch.testing.assert_close(scaled[:, :2], by_hand + 4, **EXACT)
    assert scaled[:, 2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("seed", range(3))
def test_whiten_against_a_loop(seed):
    x, mask = ragged(seed=seed)
    numbers = kept(x, mask)
    mean = sum(numbers) / len(numbers)
    var = sum((n - mean) ** 2 for n in numbers) / len(numbers)
    whitened = kept(masked_whiten(x, mask, subtract_mean=True), mask)
    expected = [(n - mean) / math.sqrt(var + 1e-8) for n in numbers]
    torch.testing.assert_close(torch.tensor(whitened), torch.tensor(expected), **EXACT)


@pytest.mark.parametrize("subtract_mean", [True, False])
@pytest.mark.parametrize("fill", FILLS)
def test_padding_does_not_reach_whitening(fill, subtract_mean):
    x, mask = ragged()
    clean = x.clone().requires_grad_()
    padded = torch.where(mask, x, fill).requires_grad_()
    weights = torch.arange(x.numel(), dtype=torch.float64).reshape(x.shape)
    for tensor in (clean, padded):
        out = masked_whiten(tensor, mask, subtract_mean=subtract_mean)
        assert (out[~mask] == 0).all()
        (out * weights).sum().backward()
    assert clean.grad.isfinite().all()
    torch.testing.assert_close(padded.grad, clean.grad, rtol=0, atol=0)


@pytest.mark.parametrize("subtract_mean", [True, False])
def test_whitening_with_global_moments_does_not_depend_on_the_split(subtract_mean):
    x, mask = ragged(rows=6)
    parts, count = [slice(0, 1), slice(1, 4), slice(4, 6)], mask.sum()
    mean = sum(masked_mean(x[p], mask[p], count=count) for p in parts)
    var = sum(masked_mean((x[p] - mean) ** 2, mask[p], count=count) for p in parts)
    pieces = [
        masked_whiten(x[p], mask[p], subtract_mean=subtract_mean, mean=mean, var=var) for p in parts
    ]
    whole = masked_whiten(x, mask, subtract_mean=subtract_mean)
    torch.testing.assert_close(torch.cat(pieces), whole, **EXACT)


def test_whitening_ignores_more_padding_and_row_order():
    x, mask = ragged()
    whole = masked_whiten(x, mask, subtract_mean=True)
    wider = torch.cat([x, torch.full((5, 4), math.nan)], dim=1)
    wider_mask = torch.cat([mask, torch.zeros(5, 4, dtype=torch.bool)], dim=1)
    out = masked_whiten(wider, wider_mask, subtract_mean=True)
    torch.testing.assert_close(out[:, :7], whole, **EXACT)
    order = torch.tensor([3, 1, 4, 0, 2])
    out = masked_whiten(x[order], mask[order], subtract_mean=True)
    torch.testing.assert_close(out, whole[order], **EXACT)


@pytest.mark.parametrize("value", [0.1, 1000.1, -7.3])
def test_equal_numbers_whiten_to_zero(value):
    # variance 0: a rounding error in the mean would be blown up 10000-fold by 1 / sqrt(1e-8)
    x, mask = torch.full((3, 37), value), torch.ones(3, 37).bool()
    assert (masked_whiten(x, mask, subtract_mean=True) == 0).all()


def test_whitening_nothing_gives_zeros():
    out = masked_whiten(torch.full((2, 2), math.nan), torch.zeros(2, 2).bool(), subtract_mean=False)
    assert out.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_one_global_moment_alone_is_refused():
    x, mask = torch.ones(2, 2), torch.ones(2, 2).bool()
    for moments in ({"mean": torch.tensor(0.0)}, {"var": torch.tensor(1.0)}):
        with pytest.raises(ShapeError, match="both or neither"):
            masked_whiten(x, mask, subtract_mean=True, **moments)


def test_whiten_refuses_another_shape():
    with pytest.raises(ShapeError, match=r"x \[2, 3\], mask \[2, 1\]"):
        masked_whiten(torch.zeros(2, 3), torch.ones(2, 1).bool(), subtract_mean=True)
