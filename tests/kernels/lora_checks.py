"""Random cases of adapters on a linear layer, by a backend: held against fp64, and each row against
itself among other rows."""

from __future__ import annotations

import torch
from cases import SLACK, dtypes, layouts, seeds, wide
from hypothesis import strategies as st

import sora_kernels as sk
from sora_kernels.testing import check_within_budget, generator, guarded


@st.composite
def lora_cases(draw, max_rows=70, sizes=(1, 7, 16, 33, 64, 100, 530)):
    rows = draw(st.integers(0, max_rows))
    place = st.integers(0, rows)
    return {
        "rows": rows,
        "ins": draw(st.sampled_from(sizes)),
        "outs": draw(st.sampled_from(sizes)),
        "adapters": draw(
            st.lists(
                st.tuples(
                    st.sampled_from([1, 3, 4, 16, 20, 33]),
                    st.tuples(place, place).map(lambda pair: tuple(sorted(pair))),
                    st.sampled_from([1.0, -0.25, 3.0, 0.0]),
                ),
                max_size=5,
            )
        ),
        "dtype": draw(dtypes),
        "layout": draw(layouts),
        "seed": draw(seeds),
    }


def lora_inputs(case, device="cpu"):
    rng, dtype = generator(case["seed"]), case["dtype"]
    ins, outs = case["ins"], case["outs"]
    made = {"layout": case["layout"], "device": device}
    x = guarded((case["rows"], ins), dtype, rng, **made)
    base = guarded((case["rows"], outs), dtype, rng, **made)
    ranks = [rank for rank, _, _ in case["adapters"]]
    down = [guarded((rank, ins), dtype, rng, device=device) for rank in ranks]
    up = [guarded((outs, rank), dtype, rng, device=device) for rank in ranks]
    return x, base, down, up


def row_by_row(case, x, base, down, up):
    """As the formula has it, for each row alone."""
    out = []
    for i, (row, sums) in enumerate(zip(x, base, strict=True)):
        for a, b, (_, (start, stop), scale) in zip(down, up, case["adapters"], strict=True):
            if start <= i < stop:
                sums = sums + scale * (b @ (a @ row))
        out.append(sums)
    return torch.stack(out) if out else torch.empty_like(base)


def check_lora(case, backend, device="cpu", *, same_bits=True):
    x, base, down, up = lora_inputs(case, device)
    rows = [pair for _, pair, _ in case["adapters"]]
    scales = [scale for _, _, scale in case["adapters"]]
    before = base.clone()
    y = sk.lora_linear(x, base, down, up, rows, scales, backend=backend)
    assert (y.shape, y.dtype) == (base.shape, case["dtype"])
    assert torch.equal(base, before)
    exact = row_by_row(case, wide(x), wide(base), list(map(wide, down)), list(map(wide, up)))
    plain = row_by_row(case, x, base, down, up)
    check_within_budget("y", y, exact, plain, SLACK[case["dtype"]])
    if not same_bits:
        return
    for i in {0, case["rows"] // 2, case["rows"] - 1} if case["rows"] else ():
        own = [k for k, (start, stop) in enumerate(rows) if start <= i < stop]
        alone = sk.lora_linear(
            x[i : i + 1],
            base[i : i + 1],
            [down[k] for k in own],
            [up[k] for k in own],
            [(0, 1)] * len(own),
            [scales[k] for k in own],
            backend=backend,
        )
        assert torch.equal(alone[0], y[i])
