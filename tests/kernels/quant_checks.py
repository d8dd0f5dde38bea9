"""Random cases of quantised linear layers, by a backend: held against fp64 on weights that the gguf
package and the formulas decode, and each row against itself among other rows."""

from __future__ import annotations

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from cases import SLACK, dtypes, layouts, seeds, wide
from hypothesis import strategies as st

import sora_kernels as sk
from sora_kernels.testing import check_within_budget, generator, guarded

PLAIN = {
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
# The float16 fields of a block, whose other bytes may be anything.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
FORMATS = (*PLAIN, *HALVES)


@st.composite
def quant_cases(draw, max_rows=40, max_blocks=9):
    format = draw(st.sampled_from(FORMATS))
    block = 1
    if format in HALVES:
        block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[format]][0]
    blocks = {1: st.sampled_from([1, 7, 33, 64, 200]), 32: st.integers(1, max_blocks)}
    ins = block * draw(blocks.get(block, st.integers(1, 2)))
    whole = [n for n in (1, 2, 5, 8) if ins % n == 0]
    return {
        "format": format,
        "rows": draw(st.integers(0, max_rows)),
        "ins": ins,
        "outs": draw(st.sampled_from([1, 5, 33, 100])),
        "scales": draw(st.sampled_from([None, "tensor", *whole])),
        "bias": draw(st.booleans()),
        "gelu": draw(st.sampled_from([None, None, "none", "tanh"])),
        "dtype": draw(dtypes),
        "layout": draw(layouts),
        "seed": draw(seeds),
    }


def quantised(format, outs, ins, scales, rng):
    """A weight, its scales and, in fp64, the values that an independent reader makes of them."""
    if format in HALVES:
        kind = gguf.GGMLQuantizationType[format]
        values, size = gguf.GGML_QUANT_SIZES[kind]
        raw = torch.randint(0, 256, (outs, ins // values, size), generator=rng, dtype=torch.uint8)
        for at in HALVES[format]:
            half = torch.rand(outs, ins // values, 1, generator=rng, dtype=torch.float64) * 0.02
            raw[..., at : at + 2] = half.half().view(torch.uint8)
        raw = raw.view(outs, -1)
        decoded = gguf.quants.dequantize(raw.numpy(), kind)
        return raw, None, torch.from_numpy(np.ascontiguousarray(decoded)).double()
    values = torch.randn(outs, ins, generator=rng)
    weight = (values * 40).round().clamp(-127, 127).to(PLAIN[format])
    if scales is None:
        return weight, None, weight.float().double()
    shape = (1, 1) if scales == "tensor" else (outs, scales)
    scale = torch.rand(shape, generator=rng) * 0.05 + 0.001
    repeated = scale.repeat_interleave(ins // shape[1], dim=1) if shape[1] > 1 else scale
    return weight, scale, weight.float().double() * repeated.double()


def check_quant(case, backend, device="cpu", *, same_bits=True, loss=0.0):
    """loss: relative error, of the largest value, that a backend which quantises x may have."""
    rng, dtype = generator(case["seed"]), case["dtype"]
    made = {"layout": case["layout"], "device": device}
    x = guarded((case["rows"], case["ins"]), dtype, rng, **made)
    weight, scale, values = quantised(
        case["format"], case["outs"], case["ins"], case["scales"], rng
    )
    bias = guarded((case["outs"],), dtype, rng, device=device) if case["bias"] else None
    operands = [None if t is None else t.to(device) for t in (weight, scale)]

    def call(x):
        return sk.quant_linear(
            x, *operands, bias, format=case["format"], gelu=case["gelu"], backend=backend
        )

    def formula(x, weight, bias):
        y = F.linear(x, weight, bias)
        return F.gelu(y, approximate=case["gelu"]) if case["gelu"] else y

    y = call(x)
    assert (y.shape, y.dtype) == ((case["rows"], case["outs"]), dtype)
    # A dense weight in x's dtype is what the rounded values are.
    dense = values.to(device).to(dtype)
    exact, plain = formula(wide(x), wide(dense), wide(bias)), formula(x, dense, bias)
    most = float(exact.abs().max()) if exact.numel() else 0.0
    if loss:
        sums = F.linear(wide(x), wide(dense), wide(bias))
        most = float(sums.abs().max()) if sums.numel() else 0.0
        assert not exact.numel() or float((y.double() - exact).abs().max()) <= loss * most
        return
    # In half precision a value halfway between two neighbours may be rounded either way; sums of
    # float32 products of any order differ by an ulp for each doubling.
    floor = most * (4e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)
    check_within_budget("y", y, exact, plain, SLACK[dtype], floor)
    assert torch.equal(call(x), y)
    # A product of the smallest weights is summed by where a row lies (MKL); no model has such.
    if same_bits and min(case["ins"], case["outs"]) >= 16:
        for i in {0, case["rows"] // 2, case["rows"] - 1} if case["rows"] else ():
            assert torch.equal(call(x[i : i + 1])[0], y[i])
