"""Linear layers in oneDNN's layout against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sora_engine.models import linear as layers
from sora_engine.models.linear import (
    BlockedLinear,
    WidenedLinear,
    block_linears,
    can_block,
    lay_out_like,
    linear_gelu,
)

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


BF16, FP32 = torch.bfloat16, torch.float32
needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 here"
)
DTYPES = [FP32, pytest.param(BF16, marks=needs_bf16)]


def frozen(
    in_features: int, out_features: int, bias: bool = True, dtype: torch.dtype = FP32
) -> nn.Linear:
    torch.manual_seed(in_features)
    linear = nn.Linear(in_features, out_features, bias=bias).requires_grad_(False)
    return linear.to(dtype)


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


@needs_bf16
@pytest.mark.parametrize("rows", [1, 7, 333])
@pytest.mark.parametrize("bias", [True, False])
def test_in_bfloat16_it_is_float64_rounded_once(rows, bias):
    """Sums, bias and GELU are in float32: what comes out is half a unit in the last place off."""
    linear = frozen(200, 130, bias, BF16)
    x = torch.randn(rows, 200).bfloat16()
    expected = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    blocked = BlockedLinear(linear)
    with torch.inference_mode():
        found = {"": (blocked(x), expected)}
        for name in ("tanh", "none"):
            found[name] = blocked.with_gelu(x, name), F.gelu(expected, approximate=name)
    for result, wanted in found.values():
        assert result.dtype == BF16
        # Half a unit of 8 bits, and float32's own error beside it.
        assert ((result.double() - wanted).abs() <= wanted.abs() * 2**-8 + 5e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gelu", [False, True])
def test_no_number_of_rows_changes_a_row(dtype, gelu):
    """To the bit, over 1 to 2,000 rows."""
    blocked = BlockedLinear(frozen(200, 130, dtype=dtype))
    x = torch.randn(2000, 200).to(dtype)

    def run(rows):
        return blocked.with_gelu(rows, "tanh") if gelu else blocked(rows)

    with torch.inference_mode():
        together = run(x)
        for rows in range(1, 2001, 7 if gelu else 1):
            assert torch.equal(run(x[:rows]), together[:rows]), rows
            assert torch.equal(run(x[-rows:]), together[-rows:]), rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_nor_does_it_where_sums_are_long(dtype):
    """Long sums are those that a library cuts up, where there are few rows to share out."""
    blocked = BlockedLinear(frozen(8960, 256, dtype=dtype))
    x = torch.randn(2000, 8960).to(dtype)
    with torch.inference_mode():
        together = blocked(x)
        for rows in (1, 2, 3, 5, 8, 17, 32, 63, 129, 500, 1999):
            assert torch.equal(blocked(x[:rows]), together[:rows]), rows


def test_small_and_trainable_layers_stay():
    model = nn.Sequential(frozen(256, 256), frozen(8, 8), nn.Linear(256, 256))
    assert not can_block(model[1].weight)
    assert not can_block(model[2].weight)
    assert not can_block(model[0].weight.double())
    assert not can_block(model[0].weight.half())
    wanted = can_block(model[0].weight)
    block_linears(model)
    assert [isinstance(layer, BlockedLinear) for layer in model] == [wanted, False, False]


# A processor without products of bfloat16.


@pytest.mark.parametrize("rows", [1, 7, 333])
@pytest.mark.parametrize("bias", [True, False])
def test_widened_it_is_float64_rounded_once(rows, bias):
    linear = frozen(200, 130, bias, BF16)
    x = torch.randn(rows, 200).bfloat16()
    expected = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    linear.__class__ = WidenedLinear
    with torch.inference_mode():
        found = {"": (linear(x), expected)}
        for name in ("tanh", "none"):
            found[name] = linear_gelu(linear, x, name), F.gelu(expected, approximate=name)
    for result, wanted in found.values():
        assert result.dtype == BF16
        assert result.shape == wanted.shape
        assert ((result.double() - wanted).abs() <= wanted.abs() * 2**-8 + 5e-6).all()


@pytest.mark.parametrize("sizes", [(200, 130), (8960, 256)])
def test_nor_does_a_number_of_rows_change_a_widened_row(sizes):
    linear = frozen(*sizes, dtype=BF16)
    linear.__class__ = WidenedLinear
    x = torch.randn(2000, sizes[0]).bfloat16()
    with torch.inference_mode():
        together = linear_gelu(linear, x, "tanh")
        for rows in (1, 2, 3, 5, 8, 17, 32, 63, 129, 500, 1999):
            assert torch.equal(linear_gelu(linear, x[:rows], "tanh"), together[:rows]), rows


def test_nor_is_a_single_widened_row_another():
    """Each by itself: of a sum in another order, rounding to bfloat16 shows one value in ten
    thousand."""
    linear = frozen(200, 130, dtype=BF16)
    linear.__class__ = WidenedLinear
    x = torch.randn(2000, 200).bfloat16()
    with torch.inference_mode():
        assert torch.equal(torch.cat([linear(row[None]) for row in x]), linear(x))


@pytest.mark.parametrize("lacks", [True, False])
def test_bfloat16_is_widened_where_the_processor_has_no_products_of_it(monkeypatch, lacks):
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("products go another way here")
    if not lacks and layers.multiplies_as_float32():
        pytest.skip("this processor has none")
    monkeypatch.setattr(layers, "multiplies_as_float32", lambda: lacks)
    model = nn.Sequential(frozen(256, 256, dtype=BF16), frozen(8, 8, dtype=BF16), frozen(256, 256))
    weight = model[0].weight
    block_linears(model)
    assert [type(layer) for layer in model] == [
        WidenedLinear if lacks else BlockedLinear,
        nn.Linear,
        BlockedLinear,
    ]
    if lacks:
        assert model[0].weight is weight  # no second copy, and no wider one
        with torch.device("meta"):
            hollow = nn.Sequential(nn.Linear(256, 256), nn.Linear(8, 8), nn.Linear(256, 256))
        lay_out_like(hollow, model)
        assert type(hollow[0]) is WidenedLinear
