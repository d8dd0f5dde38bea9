"""`quant_linear` by every CPU backend: each format's values as the gguf package and formulas have
them, each row's bits whatever rows are beside it."""

from __future__ import annotations

import gguf
import pytest
import torch
from hypothesis import given
from quant_checks import FORMATS, HALVES, check_quant, quant_cases, quantised

import sora_kernels as sk
from sora_kernels.quant import int8
from sora_kernels.quant.formats import dequantise
from sora_kernels.testing import generator

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

CASE = {"rows": 21, "ins": 512, "outs": 100, "scales": 8, "bias": True, "gelu": "tanh",
        "layout": "rows", "seed": 3}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_dequantised_values_are_those_of_gguf_and_the_formula(format):
    weight, scale, values = quantised(format, 7, 512, 4, generator(5))
    read = dequantise(weight, scale, format, torch.float64)
    torch.testing.assert_close(read, values, rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("format", FORMATS)
def test_unpacked_values_are_the_reference_s(format):
    weight, scale, values = quantised(format, 7, 512, 4, generator(5))
    number = sorted(FORMATS, key=list(sk.quant.formats.FORMATS).index).index(format)
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)):
        out = torch.ops.sora.native_unpack(weight, scale, number, 512, 2, 4, dtype)
        torch.testing.assert_close(out.double(), values[2:6], rtol=bound, atol=1e-7)


@given(quant_cases())
def test_quant_linear(case):
    check_quant(case, "reference", same_bits=False)


@pytest.mark.usefixtures("native_library")
@given(quant_cases())
def test_native_quant_linear(case):
    check_quant(case, "native")


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_native_quant_linear_of_each_format(format, dtype):
    check_quant({**CASE, "format": format, "dtype": dtype}, "native")


@pytest.mark.usefixtures("native_library")
def test_rows_do_not_depend_on_company_by_tiles(monkeypatch):
    """Of 1 to 300 rows, where the weight takes several tiles."""
    from sora_kernels.quant import native

    monkeypatch.setattr(native, "TILE_BYTES", 1 << 16)
    weight, _, _ = quantised("Q8_0", 200, 256, None, generator(1))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(300, 256, generator=generator(2)).to(dtype)
        whole = sk.quant_linear(x, weight, format="Q8_0", backend="native")
        for rows in (1, 2, 3, 7, 15, 16, 17, 63, 200):
            part = sk.quant_linear(x[:rows], weight, format="Q8_0", backend="native")
            assert torch.equal(part, whole[:rows]), (rows, dtype)


LONG = {**CASE, "rows": 103, "ins": 2304, "outs": 70, "scales": 12, "dtype": torch.bfloat16}
"""Several stretches of inputs, more rows than wait for the next, columns of a second panel."""


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("format", FORMATS)
def test_native_quant_linear_of_long_rows(format):
    check_quant({**LONG, "format": format, "gelu": None}, "native")


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize(("format", "ins"), [("Q4_K", 2304), ("Q8_0", 96), ("int8", 2112)])
def test_rows_do_not_depend_on_company_or_threads(format, ins):
    """Of 1 to 2,000 rows in bf16, by the number of threads."""
    weight, scale, _ = quantised(format, 200, ins, 1, generator(1))
    x = torch.randn(2000, ins, generator=generator(2)).bfloat16()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = sk.quant_linear(x, weight, scale, format=format, backend="native")
        for count, rows in ((1, 1), (1, 2), (2, 5), (1, 6), (3, 7), (2, 97), (1, 289), (5, 2000)):
            torch.set_num_threads(count)
            for first in (0, 2000 - rows):
                part = x[first : first + rows]
                part = sk.quant_linear(part, weight, scale, format=format, backend="native")
                assert torch.equal(part, whole[first : first + rows]), (rows, first, count)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("native_library")
@pytest.mark.skipif(int8.problem() is not None, reason=str(int8.problem()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", ["int8", "float8_e4m3fn", "Q8_0", "Q4_K"])
def test_int8_products_lose_what_levels_of_rows_lose(format, dtype):
    """255 levels a row: an error of 1/254 of its largest value in each factor, which averages out
    over the width; 2% of the largest sum is twice what comes of it."""
    case = {**CASE, "rows": 40, "format": format, "dtype": dtype, "scales": 1}
    check_quant(case, "int8", loss=0.02)


@pytest.mark.usefixtures("native_library")
@pytest.mark.skipif(int8.problem() is not None, reason=str(int8.problem()))
def test_int8_products_are_exact_sums_of_their_levels():
    """On values that are levels already nothing is lost; rows have their own scales."""
    rng = generator(4)
    levels = torch.randint(-127, 128, (19, 96), generator=rng).float()
    levels[:, 0] = 127.0
    rows = torch.rand(19, 1, generator=rng) * 10 + 0.1
    weight = torch.randint(-127, 128, (33, 96), generator=rng).to(torch.int8)
    scale, bias = torch.rand(33, 1, generator=rng), torch.randn(33, generator=rng)
    packed = int8.pack(weight, scale)
    y = int8.multiply(levels * rows, packed, bias)
    exact = (levels.double() @ weight.T.double()) * rows.double() * scale.T.double() + bias
    torch.testing.assert_close(y.double(), exact, rtol=2e-6, atol=1e-4)
    for n in (1, 2, 7, 18):
        assert torch.equal(int8.multiply((levels * rows)[:n], packed, bias), y[:n])
    gelu = torch.nn.functional.gelu(exact, approximate="tanh")
    y = int8.multiply(levels * rows, packed, bias, "tanh")
    torch.testing.assert_close(y.double(), gelu, rtol=1e-5, atol=1e-4)


def test_a_row_of_zeros_is_quantised_to_zeros():
    if sk.csrc.problem() is not None:
        pytest.skip("native library not built")
    codes, scale = torch.ops.sora.native_quantise_rows(torch.zeros(3, 5))
    assert (codes == 128).all()
    assert (scale == 0).all()


def test_scaled_mm_is_torch_s_own_on_rows_of_e4m3():
    """On a CPU, where PyTorch has it too: what a GPU does is the same call."""
    case = {**CASE, "format": "float8_e4m3fn", "dtype": torch.bfloat16, "scales": 1, "outs": 96}
    try:
        check_quant(case, "scaled_mm", loss=0.05)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this PyTorch has no fp8 product here: {error}")


@pytest.mark.parametrize("backend", ["int8", "scaled_mm"])
def test_lossy_backends_are_in_no_list(backend):
    assert all(backend not in order for order in sk.dispatch.OPS["quant_linear"].order.values())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.randn(6, 2, 8)}, "[6, 2, 8]"),
        ({"weight": torch.randn(3, 64)}, "'none'"),
        ({"format": "Q4_X"}, "'Q4_X'"),
        ({"format": "Q8_0"}, "weight is torch.int8; Q8_0 is torch.uint8"),
        ({"weight": torch.ones(3, 63, dtype=torch.int8)}, "rows of 63 values; 64 are due"),
        ({"weight": torch.ones(64, 3, dtype=torch.int8).T}, "strides"),
        ({"scale": torch.ones(3)}, "[3, 1]"),
        ({"scale": torch.ones(3, 5)}, "[3, 5]"),
        ({"scale": torch.ones(3, 1).half()}, "float16"),
        ({"bias": torch.randn(4)}, "[3] is due"),
        ({"gelu": "erf"}, "'erf'"),
        ({"scale": torch.ones(3, 1, device="meta")}, "meta"),
        ({"backend": "cublas"}, "'cublas'"),
        (
            {"weight": torch.ones(3, 68).byte(), "format": "Q8_0", "scale": torch.ones(3, 1)},
            "scale=None is due",
        ),
        ({"weight": torch.ones(3, 67, dtype=torch.uint8), "format": "Q8_0"}, "34 bytes"),
    ],
)  # fmt: skip
def test_quant_linear_refuses(change, named):
    inputs = {"x": torch.randn(6, 64), "weight": torch.ones(3, 64, dtype=torch.int8), **change}
    with pytest.raises(ValueError, match=r".") as caught:
        sk.quant_linear(**inputs)
    assert named in str(caught.value)


def test_every_format_of_the_reader_has_its_sizes():
    for name in HALVES:
        block = sk.quant.formats.BLOCKS[name]
        kind = gguf.GGMLQuantizationType[name]
        assert (block.values, block.size_bytes) == gguf.GGML_QUANT_SIZES[kind]
