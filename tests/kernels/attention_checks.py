"""Random cases of the attention ops, each by a backend and held against fp64 and plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import torch
from cases import SLACK, dtypes, layouts, seeds, wide
from hypothesis import strategies as st

import sora_kernels as sk
from sora_kernels.testing import check_within_budget, generator, guarded, offsets

magnitudes = st.sampled_from([1.0, 1.0, 1e-3, 30.0])
# One less and one more than the vectors and blocks of kernels.
lengths = st.one_of(st.sampled_from([0, 1, 2, 15, 16, 17, 31, 33, 37, 63]), st.integers(0, 70))


def turned(tensor, counts):
    """The segments of a packed tensor in reverse order."""
    return torch.cat(tensor.split(list(counts))[::-1])


@st.composite
def attention_cases(draw, max_length=70, max_segments=5, head_dims=(8, 16, 40, 64, 72, 128, 256)):
    q_lens = draw(st.lists(st.integers(0, max_length) | lengths.map(lambda n: min(n, max_length)),
                           min_size=1, max_size=max_segments))  # fmt: skip
    if draw(st.booleans()):
        k_lens = [draw(st.sampled_from([0, 1, n, max_length])) for n in q_lens]
    else:
        k_lens = list(q_lens)
    if draw(st.booleans()):  # a uniform batch
        q_lens, k_lens = [q_lens[0]] * len(q_lens), [k_lens[0]] * len(k_lens)
    counts = st.sampled_from([0, 1, 7, 472])
    padded = draw(st.booleans())
    return {
        "q_lens": q_lens,
        "k_lens": k_lens,
        "padding": [draw(counts) for _ in q_lens] if padded else None,
        "heads": draw(st.integers(1, 3)),
        "head_dim": draw(st.sampled_from(head_dims)),
        "dtype": draw(dtypes),
        "seed": draw(seeds),
        "layout": draw(layouts),
        "magnitude": draw(magnitudes),
        "scale": draw(st.sampled_from([None, 0.3])),
    }


def attention_inputs(case, device="cpu"):
    rng = generator(case["seed"])
    shape = (case["heads"], case["head_dim"])
    made = {"layout": case["layout"], "magnitude": case["magnitude"], "device": device}
    q = guarded((sum(case["q_lens"]), *shape), case["dtype"], rng, **made)
    k = guarded((sum(case["k_lens"]), *shape), case["dtype"], rng, **made)
    v = guarded((sum(case["k_lens"]), *shape), case["dtype"], rng, **made)
    return q, k, v, *(offsets(case[lens]).to(device) for lens in ("q_lens", "k_lens"))


def padding_of(case, device="cpu"):
    """Its key and value have NaN beside them in memory, as the rest has."""
    if case.get("padding") is None:
        return None
    rng = generator(case["seed"] + 1)
    made = {"layout": case["layout"], "magnitude": case["magnitude"], "device": device}
    shape = (1, case["heads"], case["head_dim"])
    key, value = (guarded(shape, case["dtype"], rng, **made)[0] for _ in range(2))
    return sk.Padding(key, value, torch.tensor(case["padding"], dtype=torch.int32, device=device))


def wide_padding(padding):
    return padding and sk.Padding(padding.key.double(), padding.value.double(), padding.counts)


def check_attention(case, backend, slack=None, device="cpu"):
    q, k, v, cu_q, cu_k = attention_inputs(case, device)
    padding = padding_of(case, device)
    kwargs = {
        "padding": padding,
        "max_seqlen_q": max(case["q_lens"]),
        "max_seqlen_k": max(case["k_lens"]),
        "scale": case["scale"],
        "return_lse": True,
    }
    slack = slack or SLACK[case["dtype"]]
    out, lse = sk.packed_attention(q, k, v, cu_q, cu_k, backend=backend, **kwargs)
    low, low_lse = sk.packed_attention(q, k, v, cu_q, cu_k, backend="reference", **kwargs)
    ref, ref_lse = sk.packed_attention(
        q.double(), k.double(), v.double(), cu_q, cu_k, backend="reference",
        **{**kwargs, "padding": wide_padding(padding)},
    )  # fmt: skip
    check_within_budget("out", out, ref, low, slack)
    # An lse that is off by half the inputs' epsilon moves each weight by less than its rounding.
    floor = torch.finfo(case["dtype"]).eps / 2
    check_within_budget("lse", lse, ref_lse, low_lse, max(slack, 8.0), floor)
    again, again_lse = sk.packed_attention(q, k, v, cu_q, cu_k, backend=backend, **kwargs)
    assert torch.equal(out, again)
    assert torch.equal(lse, again_lse)
    # Without the log-sum-exp another path may serve; and segments may come in another order.
    q_lens, k_lens = case["q_lens"], case["k_lens"]
    if padding is not None:
        padding = replace(padding, counts=padding.counts.flip(0))
    alone = sk.packed_attention(
        turned(q, q_lens),
        turned(k, k_lens),
        turned(v, k_lens),
        offsets(q_lens[::-1]).to(device),
        offsets(k_lens[::-1]).to(device),
        backend=backend,
        **{**kwargs, "return_lse": False, "padding": padding},
    )
    expected = turned(ref, q_lens), turned(low, q_lens)
    check_within_budget("out without lse, segments turned", alone, *expected, slack)


@st.composite
def grid_cases(draw, max_extent=5, max_segments=3, head_dims=(8, 16, 40, 72)):
    extent = st.integers(1, max_extent)
    count = draw(st.integers(1, max_segments))
    grids = [tuple(draw(extent) for _ in range(3)) for _ in range(count)]
    if draw(st.booleans()):
        grids.append((0, 2, 2))
    return {
        "grids": grids,
        "window": tuple(draw(st.sampled_from([-1, 1, 3, 5])) for _ in range(3)),
        # A shard: queries are frames `first` to `last` of a video whose keys are all there.
        "shard": draw(st.booleans()),
        "heads": draw(st.integers(1, 3)),
        "head_dim": draw(st.sampled_from(head_dims)),
        "dtype": draw(dtypes),
        "seed": draw(seeds),
        "layout": draw(layouts),
        "magnitude": draw(magnitudes),
    }


def grid_inputs(case, counts, device="cpu"):
    rng = generator(case["seed"])
    made = {"layout": case["layout"], "magnitude": case["magnitude"], "device": device}
    shape = (case["heads"], case["head_dim"])
    return [guarded((count, *shape), case["dtype"], rng, **made) for count in counts]


def tokens_of(grids):
    return [t * h * w for t, h, w in grids]


def check_temporal(case, backend, device="cpu"):
    counts = tokens_of(case["grids"])
    inputs = grid_inputs(case, [sum(counts)] * 3, device)

    def call(backend, cast=lambda t: t, inputs=inputs, grids=case["grids"]):
        return sk.temporal_attention(*map(cast, inputs), grids, backend=backend)

    out, slack = call(backend), SLACK[case["dtype"]]
    low, ref = call("reference"), call("reference", wide)
    check_within_budget("out", out, ref, low, slack)
    assert torch.equal(out, call(backend))
    other = call(backend, inputs=[turned(x, counts) for x in inputs], grids=case["grids"][::-1])
    check_within_budget("segments turned", turned(other, counts[::-1]), ref, low, slack)


def check_windowed(case, backend, device="cpu"):
    grids = case["grids"]
    queries, origins = grids, [(0, 0, 0)] * len(grids)
    if case["shard"]:
        origins = [(t // 2, 0, 0) for t, _, _ in grids]
        queries = [(t - t // 2, h, w) for t, h, w in grids]
    q_counts, k_counts = tokens_of(queries), tokens_of(grids)
    counts = q_counts, k_counts, k_counts
    inputs = grid_inputs(case, map(sum, counts), device)

    def call(backend, cast=lambda t: t, inputs=inputs, step=1):
        return sk.windowed_attention(
            *map(cast, inputs),
            offsets(q_counts[::step]).to(device),
            queries[::step],
            case["window"],
            key_grids=grids[::step],
            origins=origins[::step],
            backend=backend,
        )

    out, slack = call(backend), SLACK[case["dtype"]]
    low, ref = call("reference"), call("reference", wide)
    check_within_budget("out", out, ref, low, slack)
    assert torch.equal(out, call(backend))
    other = call(backend, inputs=list(map(turned, inputs, counts)), step=-1)
    check_within_budget("segments turned", turned(other, q_counts[::-1]), ref, low, slack)


def check_a_thousand_segments(backend, heads=2, longest=6, filled=1.0, device="cpu"):
    """Of few tokens or none, in another order than the reference has them. filled: the share of
    them that is drawn; the others are empty."""
    rng = generator(0)
    lens = torch.randint(0, longest + 1, (1000,), generator=rng)
    lens = (lens * (torch.rand(1000, generator=rng) < filled)).tolist()
    parts = [torch.randn(3, n, heads, 16, generator=rng).to(device) for n in lens]
    order = torch.randperm(1000, generator=rng).tolist()

    def run(backend, parts):
        q, k, v = torch.cat(parts, 1)
        counts = [part.shape[1] for part in parts]
        cu = offsets(counts).to(device)
        lengths = {"max_seqlen_q": longest, "max_seqlen_k": longest}
        return sk.packed_attention(q, k, v, cu, cu, backend=backend, **lengths).split(counts)

    expected = run("reference", [part.double() for part in parts])
    shuffled = run(backend, [parts[i] for i in order])
    for one, i in zip(shuffled, order, strict=True):
        torch.testing.assert_close(one, expected[i].float(), rtol=1e-5, atol=1e-6)


def check_neighbours_do_not_leak(backend, q_lens, k_lens, head_dim=16, device="cpu", counts=None):
    """A segment of NaN spoils its own result and no other; the others equal a run without it.

    counts: of padding, whose key and value are NaN too where no other segment has any.
    """
    rng = generator(7)
    q = torch.randn(sum(q_lens), 2, head_dim, generator=rng).to(device)
    k, v = (torch.randn(sum(k_lens), 2, head_dim, generator=rng).to(device) for _ in range(2))
    cu_q, cu_k = offsets(q_lens).to(device), offsets(k_lens).to(device)

    padding = None
    if counts is not None:
        key, value = (torch.randn(2, head_dim, generator=rng).to(device) for _ in range(2))
        padding = sk.Padding(key, value, torch.tensor(counts, device=device))

    def run(q, k, v, padding):
        lengths = {"max_seqlen_q": max(q_lens), "max_seqlen_k": max(k_lens), "padding": padding}
        return sk.packed_attention(q, k, v, cu_q, cu_k, backend=backend, **lengths)

    ref = sk.packed_attention(
        q.double(), k.double(), v.double(), cu_q, cu_k, max_seqlen_q=max(q_lens),
        max_seqlen_k=max(k_lens), padding=wide_padding(padding), backend="reference",
    )  # fmt: skip
    for spoilt in range(len(q_lens)):
        spoilt_padding = padding
        if counts is not None and not any(n for i, n in enumerate(counts) if i != spoilt):
            nothing = torch.full_like(padding.key, float("nan"))
            spoilt_padding = replace(padding, key=nothing, value=nothing)
        inputs = [x.clone() for x in (q, k, v)]
        for x, cu in zip(inputs, (cu_q, cu_k, cu_k), strict=True):
            x[cu[spoilt] : cu[spoilt + 1]] = float("nan")
        out = run(*inputs, spoilt_padding)
        for i in range(len(q_lens)):
            rows = slice(cu_q[i], cu_q[i + 1])
            if i != spoilt:
                torch.testing.assert_close(out[rows], ref[rows].float(), rtol=1e-4, atol=1e-5)
