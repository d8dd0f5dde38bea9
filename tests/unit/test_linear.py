"""Linear layers in oneDNN's layout against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sora_engine.models.linear import BlockedLinear, block_linears, can_block, linear_gelu

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


def frozen(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(in_features)
    return nn.Linear(in_features, out_features, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("rows", [1, 7, 64, 333])
@pytest.mark.parametrize("bias", [True, False])
def test_it_equals_float64(rows, bias):
    linear = frozen(200, 130, bias)
    x = torch.randn(rows, 200)
    expected = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    blocked = BlockedLinear(linear)
    with torch.inference_mode():
        assert (blocked(x) - expected).abs().max() < 2e-6
        for approximate in ("tanh", "none"):
            wanted = F.gelu(expected, approximate=approximate)
            # oneDNN's tanh is a polynomial.
            assert (linear_gelu(blocked, x, approximate) - wanted).abs().max() < 5e-6
            # A plain layer is PyTorch's own, to the bit; its sums' order is the processor's choice.
            plain = F.gelu(linear(x), approximate=approximate)
            assert torch.equal(linear_gelu(linear, x, approximate), plain)


def test_company_changes_nothing():
    """A row's result does not depend on how many rows there are beside it."""
    blocked = BlockedLinear(frozen(768, 192))
    x = torch.randn(500, 768)
    with torch.inference_mode():
        together = blocked(x)
        alone = torch.cat([blocked(x[i : i + 1]) for i in (0, 17, 499)])
    assert (together[[0, 17, 499]] - alone).abs().max() < 1e-5 * together.abs().max()


def test_small_and_trainable_layers_stay():
    model = nn.Sequential(frozen(256, 256), frozen(8, 8), nn.Linear(256, 256))
    assert not can_block(model[1].weight)
    assert not can_block(model[2].weight)
    assert not can_block(model[0].weight.bfloat16())
    wanted = can_block(model[0].weight)
    block_linears(model)
    assert [isinstance(layer, BlockedLinear) for layer in model] == [wanted, False, False]
