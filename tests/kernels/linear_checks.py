"""Random cases of the linear layer, by a backend: held against fp64, and each row against itself
among other rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases import SLACK, dtypes, layouts, seeds, wide
from hypothesis import strategies as st

import sora_kernels as sk
from sora_kernels.testing import check_within_budget, generator, guarded


@st.composite
def linear_cases(draw, max_rows=90, sizes=(1, 7, 16, 33, 64, 100)):
    return {
        "rows": draw(st.integers(0, max_rows)),
        "ins": draw(st.sampled_from(sizes)),
        "outs": draw(st.sampled_from(sizes)),
        "bias": draw(st.booleans()),
        "gelu": draw(st.sampled_from([None, "none", "tanh"])),
        "dtype": draw(dtypes),
        "layout": draw(layouts),
        "magnitude": draw(st.sampled_from([1.0, 1e-3, 30.0])),
        "seed": draw(seeds),
    }


def linear_inputs(case, device="cpu"):
    rng, dtype = generator(case["seed"]), case["dtype"]
    made = {"layout": case["layout"], "magnitude": case["magnitude"], "device": device}
    x = guarded((case["rows"], case["ins"]), dtype, rng, **made)
    weight = guarded((case["outs"], case["ins"]), dtype, rng, device=device)
    bias = guarded((case["outs"],), dtype, rng, device=device) if case["bias"] else None
    return x, weight, bias


def same(tensor):
    return tensor


def torchs_own(case, x, weight, bias):
    y = F.linear(x, weight, bias)
    return y if case["gelu"] is None else F.gelu(y, approximate=case["gelu"])


def check_linear(case, backend, device="cpu"):
    x, weight, bias = linear_inputs(case, device)

    def call(x):
        return sk.invariant_linear(x, weight, bias, gelu=case["gelu"], backend=backend)

    y = call(x)
    assert (y.shape, y.dtype) == ((case["rows"], case["outs"]), case["dtype"])
    exact, plain = (torchs_own(case, cast(x), cast(weight), cast(bias)) for cast in (wide, same))
    check_within_budget("y", y, exact, plain, SLACK[case["dtype"]])
    rows = case["rows"]
    for part in (slice(0, 1), slice(rows // 2, rows), slice(rows // 3, rows // 3 + 2)):
        assert torch.equal(call(x[part]), y[part])
    order = torch.randperm(rows, generator=generator(rows))
    assert torch.equal(call(x[order.to(device)]), y[order.to(device)])
