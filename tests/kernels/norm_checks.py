"""Random cases of the ops that normalise, each by a backend and held against fp64 and PyTorch."""

from __future__ import annotations

import torch
from cases import SLACK, dtypes, layouts, seeds, wide
from hypothesis import strategies as st

import sora_kernels as sk
from sora_kernels.testing import check_within_budget, generator, guarded

# Where norms follow, values may be far from 1.
far_magnitudes = st.sampled_from([1.0, 1.0, 1e-6, 30.0, 1e3])


def order_of(count):
    """An order that leaves few in their places."""
    return torch.randperm(count, generator=generator(count))


@st.composite
def modulation_cases(draw, max_tokens=40, channels=(1, 7, 16, 33, 64, 200, 384)):
    return {
        "tokens": draw(st.integers(0, max_tokens)),
        "channels": draw(st.sampled_from(channels)),
        "rows": draw(st.sampled_from(["one", "token", "index", "none"])),
        "parts": draw(st.sets(st.sampled_from(["gate", "scale", "shift", "weight", "bias"]))),
        "kind": draw(st.sampled_from(["layer", "rms"])),
        "dtype": draw(dtypes),
        "residual_dtype": draw(dtypes),
        "table_dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])),
        "seed": draw(seeds),
        "layout": draw(layouts),
        "table_layout": draw(layouts),
        "magnitude": draw(far_magnitudes),
        "index_dtype": draw(st.sampled_from([torch.int32, torch.int64])),
    }


def modulation_inputs(case, device="cpu"):
    rng = generator(case["seed"])
    tokens, channels, parts = case["tokens"], case["channels"], case["parts"]
    made = {"layout": case["layout"], "magnitude": case["magnitude"], "device": device}
    beside = {"layout": case["table_layout"], "device": device}
    x = guarded((tokens, channels), case["dtype"], rng, **made)
    residual = guarded((tokens, channels), case["residual_dtype"], rng, **made)
    rows = {"one": 1, "token": tokens, "index": 3, "none": 0}[case["rows"]]
    tables = {
        name: guarded((rows, channels), case["table_dtype"], rng, **beside)
        if name in parts and case["rows"] != "none"
        else None
        for name in ("gate", "scale", "shift")
    }
    index = None
    if case["rows"] == "index":
        index = torch.randint(0, 3, (tokens,), generator=rng).to(device, case["index_dtype"])
    norm = {
        "kind": case["kind"],
        "weight": guarded((channels,), case["table_dtype"], rng, device=device)
        if "weight" in parts
        else None,
        "bias": guarded((channels,), case["table_dtype"], rng, device=device)
        if "bias" in parts and case["kind"] == "layer"
        else None,
        "eps": 1e-6,
    }
    return x, residual, tables, index, norm


def shuffled_tokens(case, order, inputs):
    """`modulation_inputs` with their tokens in another order."""
    x, residual, tables, index, norm = inputs
    if case["rows"] == "token":
        tables = {name: None if t is None else t[order] for name, t in tables.items()}
    return x[order], residual[order], tables, None if index is None else index[order], norm


def check_norm_modulate(case, backend, device="cpu"):
    inputs = modulation_inputs(case, device)
    x = inputs[0]

    def call(backend, cast=lambda t: t, inputs=inputs):
        x, _, tables, index, norm = inputs
        return sk.norm_modulate(
            cast(x),
            cast(tables["scale"]),
            cast(tables["shift"]),
            index,
            backend=backend,
            **{key: cast(v) if isinstance(v, torch.Tensor) else v for key, v in norm.items()},
        )

    out = call(backend)
    check_within_budget("y", out, call("reference", wide), call("reference"), SLACK[case["dtype"]])
    assert torch.equal(out, call(backend))
    order = order_of(len(x))
    shuffled = call(backend, inputs=shuffled_tokens(case, order, inputs))
    assert torch.equal(shuffled, out[order])


def check_gated(case, backend, device="cpu"):
    inputs = modulation_inputs(case, device)
    x, _, tables, index, norm = inputs

    def call(backend, cast=lambda t: t, inputs=inputs):
        x, residual, tables, index, norm = inputs
        return sk.gate_residual_norm_modulate(
            cast(x),
            cast(residual),
            *(cast(tables[name]) for name in ("gate", "scale", "shift")),
            index,
            backend=backend,
            **{key: cast(v) if isinstance(v, torch.Tensor) else v for key, v in norm.items()},
        )

    out, y = call(backend)
    low, _ = call("reference")
    ref, _ = call("reference", wide)
    check_within_budget("residual", out, ref, low, SLACK[case["residual_dtype"]])

    # y is a function of the residual as it was returned.
    def norm_of(cast):
        return sk.norm_modulate(
            cast(out),
            cast(tables["scale"]),
            cast(tables["shift"]),
            index,
            backend="reference",
            **{key: cast(v) if isinstance(v, torch.Tensor) else v for key, v in norm.items()},
        )

    y_ref = norm_of(wide)
    y_low = norm_of(lambda t: None if t is None else t.float()).to(x.dtype)
    check_within_budget("y", y, y_ref, y_low, SLACK[case["dtype"]])
    again, y_again = call(backend)
    assert torch.equal(out, again)
    assert torch.equal(y, y_again)
    order = order_of(len(x))
    shuffled = call(backend, inputs=shuffled_tokens(case, order, inputs))
    assert all(map(torch.equal, shuffled, (out[order], y[order])))


@st.composite
def causal_cases(draw, max_pixels=12, channels=(1, 7, 16, 33, 64, 96, 200)):
    return {
        "batch": draw(st.integers(1, 2)),
        "frames": draw(st.integers(0, 4)),
        "kept": draw(st.integers(0, 3)),
        "around": draw(st.sampled_from([(0, 0), (1, 0), (2, 1), (0, 1)])),
        "keep": draw(st.sampled_from([None, 0, 1, 2])),
        "rows": draw(st.sampled_from(["weight", "both", "bias", "none"])),
        "pixels": draw(st.integers(0, max_pixels)),
        "channels": draw(st.sampled_from(channels)),
        "dtype": draw(dtypes),
        "seed": draw(seeds),
        "layout": draw(layouts),
        "magnitude": draw(far_magnitudes),
    }


def plain_causal(case):
    """A case of what every backend has: a weight, nothing repeated, as much kept as was given."""
    return {**case, "around": (0, 0), "keep": None, "rows": "weight"}


def check_causal(case, backend, device="cpu"):
    rng = generator(case["seed"])
    made = {"layout": case["layout"], "magnitude": case["magnitude"], "device": device}
    inside = (case["pixels"], case["channels"])
    x = guarded((case["batch"], case["frames"], *inside), case["dtype"], rng, **made)
    past = guarded((case["batch"], case["kept"], *inside), case["dtype"], rng, **made)
    weight, bias = (
        guarded((case["channels"],), torch.float32, rng, device=device) for _ in range(2)
    )
    weight = weight if case["rows"] in ("weight", "both") else None
    bias = bias if case["rows"] in ("bias", "both") else None
    frames = case["frames"] + case["kept"]
    before, after = case["around"] if frames else (0, 0)
    total = before + frames + after
    keep = case["kept"] if case["keep"] is None else min(case["keep"], total)

    def call(backend, cast=lambda t: t, x=x, past=past):
        return sk.causal_norm_silu(
            cast(x), cast(past), cast(weight), bias=cast(bias), before=before, after=after,
            keep=keep, backend=backend,
        )  # fmt: skip

    outs, lows, refs = call(backend), call("reference"), call("reference", wide)
    for name, out, low, ref in zip(("joined", "cache"), outs, lows, refs, strict=True):
        check_within_budget(name, out, ref, low, SLACK[case["dtype"]])
    # The past is copied, not computed, and so are frames that repeat.
    joined, cache = outs
    assert torch.equal(joined[:, before : before + case["kept"]], past)
    assert torch.equal(joined[:, total - keep :], cache)
    assert torch.equal(
        joined[:, :before], joined[:, before : before + 1].expand(-1, before, -1, -1)
    )
    last = joined[:, total - after - 1 : total - after]
    assert torch.equal(joined[:, total - after :], last.expand(-1, after, -1, -1))
    assert all(map(torch.equal, outs, call(backend)))
    order = order_of(case["pixels"])
    shuffled = call(backend, x=x[:, :, order], past=past[:, :, order])
    assert all(map(torch.equal, shuffled, (out[:, :, order] for out in outs)))


@st.composite
def group_cases(draw, max_pixels=150):
    """Pictures of more than one share of pixels, too, with a tail."""
    groups = draw(st.sampled_from([1, 2, 3, 8]))
    return {
        "pictures": draw(st.integers(0, 3)),
        "pixels": draw(st.integers(0, max_pixels)),
        "groups": groups,
        "channels": groups * draw(st.sampled_from([1, 4, 7, 16])),
        "parts": draw(st.sets(st.sampled_from(["weight", "bias"]))),
        "silu": draw(st.booleans()),
        "dtype": draw(dtypes),
        "seed": draw(seeds),
        "layout": draw(layouts),
        "magnitude": draw(far_magnitudes),
        "mean": draw(st.sampled_from([0.0, 0.0, 100.0])),
    }


def check_group_norm(case, backend, device="cpu"):
    rng = generator(case["seed"])
    channels, dtype = case["channels"], case["dtype"]
    shape = (case["pictures"], case["pixels"], channels)
    made = {"layout": case["layout"], "magnitude": case["magnitude"], "device": device}
    x = guarded(shape, dtype, rng, **made)
    x += case["mean"]
    weight, bias = (
        guarded((channels,), torch.float32, rng, device=device) if name in case["parts"] else None
        for name in ("weight", "bias")
    )

    def call(backend, cast=lambda t: t, x=x):
        return sk.group_norm(
            cast(x), case["groups"], cast(weight), cast(bias), silu=case["silu"], backend=backend
        )

    out = call(backend)
    check_within_budget("y", out, call("reference", wide), call("reference"), SLACK[dtype])
    assert torch.equal(out, call(backend))
    for picture in range(len(x)):
        assert torch.equal(call(backend, x=x[picture : picture + 1])[0], out[picture])


BOTH_WEIGHTS = ("both", "both, of two dtypes")


@st.composite
def rope_cases(draw, max_tokens=30, head_dims=(2, 8, 16, 40, 64, 72, 128)):
    return {
        "tokens": draw(st.integers(0, max_tokens)),
        "heads": draw(st.integers(1, 4)),
        "k_heads": draw(st.sampled_from([None, 1, 2, 3])),
        "head_dim": draw(st.sampled_from(head_dims)),
        "across_heads": draw(st.booleans()),
        "interleaved": draw(st.booleans()),
        "rotate": draw(st.booleans()),
        "weights": draw(st.sampled_from([*BOTH_WEIGHTS, "q", "k", "none"])),
        "dtype": draw(dtypes),
        "seed": draw(seeds),
        "layout": draw(layouts),
        "magnitude": draw(far_magnitudes),
    }


def check_rope(case, backend, device="cpu"):
    rng = generator(case["seed"])
    tokens, head_dim = case["tokens"], case["head_dim"]
    made = {"layout": case["layout"], "magnitude": case["magnitude"], "device": device}

    def stream(heads, weighted, dtype=torch.float32):
        x = guarded((tokens, heads, head_dim), case["dtype"], rng, **made)
        width = heads * head_dim if case["across_heads"] else head_dim
        return x, guarded((width,), dtype, rng, device=device) if weighted else None

    weights, k_dtype = case["weights"], torch.float32
    if "two dtypes" in weights:
        k_dtype = torch.float16 if case["dtype"] == torch.float32 else case["dtype"]
    q, q_weight = stream(case["heads"], weights in ("q", *BOTH_WEIGHTS))
    k, k_weight = None, None
    if case["k_heads"]:
        k, k_weight = stream(case["k_heads"], weights in ("k", *BOTH_WEIGHTS), k_dtype)
    cos = sin = None
    if case["rotate"]:
        angle = torch.randn(tokens, head_dim // 2, generator=rng).to(device)
        cos, sin = angle.cos(), angle.sin()

    def call(backend, cast=lambda t: t, order=slice(None)):
        q_here, k_here, cos_here, sin_here = (
            None if t is None else t[order] for t in (q, k, cos, sin)
        )
        return sk.qk_norm_rope(
            *(cast(t) for t in (q_here, k_here, q_weight, k_weight, cos_here, sin_here)),
            across_heads=case["across_heads"],
            interleaved=case["interleaved"],
            backend=backend,
        )

    outs, lows, refs = call(backend), call("reference"), call("reference", wide)
    order = order_of(tokens)
    again, shuffled = call(backend), call(backend, order=order)
    for name, out, low, ref, same, moved in zip(
        "qk", outs, lows, refs, again, shuffled, strict=True
    ):
        if out is None:
            assert ref is None
            continue
        check_within_budget(name, out, ref, low, SLACK[case["dtype"]])
        assert torch.equal(out, same)
        assert torch.equal(out[order], moved)
