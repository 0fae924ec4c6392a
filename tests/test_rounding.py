"""The bounds of other tests: more than rounding moves a number by, less than any fault does."""

import pytest
import torch
from rounding import bound


def chain(weights, x, dtype):
    """As many products as the layers of a model have, each of which keeps the size of a number."""
    x = x.to(dtype)
    for weight in weights:
        x = x @ weight.to(dtype)
    return x.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_stays_within_and_a_lost_product_does_not(dtype):
    layers, width = 2, 64
    weights = [torch.randn(width, width).double() / width**0.5 for _ in range(5 * layers + 1)]
    x = torch.randn(100, width).double()
    exact = chain(weights, x, torch.float64)
    allowed = bound(dtype, layers=layers, width=width, scale=exact, rounded=1)
    found = float((chain(weights, x, dtype) - exact).abs().max())
    assert allowed / 1000 < found < allowed
    lost = chain(weights[:-1], x, torch.float64)
    assert float((lost - exact).abs().max()) > 3 * allowed
