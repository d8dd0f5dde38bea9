"""Block masks: plans for windowed attention in which any blocks of tokens see any others."""

from __future__ import annotations

import pytest
import torch
from attention_checks import grid_inputs, tokens_of
from cases import SLACK, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

import sora_kernels as sk
from sora_kernels.testing import check_within_budget, generator, offsets

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def cells(grid, cell):
    """The cell of each token of a grid, from the words of the definition."""
    t, h, w = grid
    size = [n if c == -1 else c for n, c in zip(grid, cell, strict=True)]
    down, across = (-(-n // max(1, c)) for n, c in zip((h, w), size[1:], strict=True))
    return [
        (a // size[0] * down + b // size[1]) * across + c // size[2]
        for a in range(t)
        for b in range(h)
        for c in range(w)
    ]


def count_of(grid, cell):
    return max(cells(grid, cell), default=-1) + 1


def dense_mask(grid, key_grid, origin, window, mask, cell):
    """bool [queries, keys] by a loop over pairs of tokens."""
    q_cells, k_cells = cells(grid, cell), cells(key_grid, cell)
    places = [
        [(a + o[0], b + o[1], c + o[2])
         for a in range(of[0]) for b in range(of[1]) for c in range(of[2])]
        for of, o in ((grid, origin), (key_grid, (0, 0, 0)))
    ]  # fmt: skip
    seen = torch.zeros(len(q_cells), len(k_cells), dtype=torch.bool)
    for i, p in enumerate(places[0]):
        for j, s in enumerate(places[1]):
            near = (n == -1 or abs(x - y) <= n // 2 for x, y, n in zip(p, s, window, strict=True))
            seen[i, j] = bool(mask[q_cells[i], k_cells[j]]) and all(near)
    return seen


def attend(q, k, v, seen):
    """One segment by masked softmax in the inputs' precision (fp32 at least)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("qhd,khd->hqk", (q * q.shape[-1] ** -0.5), k).to(wide)
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights.to(v.dtype), v)


@st.composite
def mask_cases(draw, max_extent=5):
    extent = st.integers(1, max_extent)
    count = draw(st.integers(1, 2))
    cell = draw(st.sampled_from([(1, -1, -1), (2, -1, -1), (1, 2, 3), (2, 3, -1), (1, 1, 1)]))
    return {
        "grids": [tuple(draw(extent) for _ in range(3)) for _ in range(count)]
        + ([(0, 2, 2)] if draw(st.booleans()) else []),
        "cell": cell,
        "density": draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])),
        "window": draw(st.sampled_from([(-1, -1, -1), (3, -1, -1), (-1, 3, 1)])),
        "shard": draw(st.booleans()),
        "heads": draw(st.integers(1, 2)),
        "head_dim": draw(st.sampled_from([8, 16, 40])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        "seed": draw(seeds),
        "layout": draw(st.sampled_from(["dense", "rows", "gaps"])),
        "magnitude": 1.0,
    }


def check_masked(case, backend):
    grids = case["grids"]
    queries, origins = grids, [(0, 0, 0)] * len(grids)
    if case["shard"]:
        origins = [(t // 2, 0, 0) for t, _, _ in grids]
        queries = [(t - t // 2, h, w) for t, h, w in grids]
    rng = generator(case["seed"])
    masks = [
        torch.rand(count_of(a, case["cell"]), count_of(b, case["cell"]), generator=rng)
        < case["density"]
        for a, b in zip(queries, grids, strict=True)
    ]
    q, k, v = grid_inputs(case, [sum(tokens_of(of)) for of in (queries, grids, grids)])
    cu, cu_k = offsets(tokens_of(queries)), offsets(tokens_of(grids))
    plan = sk.plan_attention(
        cu, num_tokens=q.shape[0], head_dim=case["head_dim"], dtype=case["dtype"], grids=queries,
        window=case["window"], key_grids=grids, origins=origins, masks=masks, cell=case["cell"],
    )  # fmt: skip

    def call():
        return sk.windowed_attention(
            q, k, v, cu, queries, case["window"], key_grids=grids, origins=origins, plan=plan,
            backend=backend,
        )  # fmt: skip

    ref, low = [], []
    for i in range(len(grids)):
        seen = dense_mask(queries[i], grids[i], origins[i], case["window"], masks[i], case["cell"])
        parts = q[cu[i] : cu[i + 1]], k[cu_k[i] : cu_k[i + 1]], v[cu_k[i] : cu_k[i + 1]]
        ref.append(attend(*(x.double() for x in parts), seen))
        low.append(attend(*parts, seen))
    out = call()
    check_within_budget(
        "out", out, torch.cat(ref), torch.cat(low).to(out.dtype), SLACK[case["dtype"]]
    )
    assert torch.equal(out, call())


@given(mask_cases())
def test_reference(case):
    check_masked(case, "reference")


@given(mask_cases())
def test_sdpa(case):
    check_masked(case, "sdpa")


@pytest.mark.usefixtures("interpreter")
@settings(max_examples=settings().max_examples // 2)
@given(mask_cases(max_extent=4))
def test_triton(case):
    check_masked(case, "triton")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("cell", [(1, 2, 3), (2, 8, 8), (3, -1, -1)])
def test_triton_masks_inside_whole_tiles(cell):
    """Tiles of 32 tokens fill this grid, so what is not full is so by the mask alone."""
    check_masked(
        {"grids": [(4, 4, 8)], "cell": cell, "density": 0.7, "window": (-1, -1, -1),
         "shard": False, "heads": 1, "head_dim": 16, "dtype": torch.float32, "seed": 3,
         "layout": "dense", "magnitude": 1.0}, "triton",
    )  # fmt: skip


def key_frame_mask(frames, reach, key_frames):
    """Each frame sees its window, the first frame and some key frames."""
    at = torch.arange(frames)
    seen = (at[:, None] - at[None]).abs() <= reach
    seen[:, [0, *key_frames]] = True
    return seen


def test_time_follows_the_mask():
    """Frames seen whole or not at all: full tiles but for those that stick out of a frame."""
    grid = (12, 8, 16)
    mask = key_frame_mask(12, 1, [6])
    plan = sk.plan_attention(
        offsets(tokens_of([grid])), num_tokens=12 * 128, head_dim=16, dtype=torch.float32,
        grids=[grid], masks=mask,
    )  # fmt: skip
    assert plan.shape == (1, 1, 32)
    assert plan.tiles[:, 3].sum() == 0
    assert plan.tiles[:, 4].sum() == int(mask.sum()) * 4 * 4
    assert plan.blocks.shape[0] == int(mask.sum()) * 4  # a frame's four tiles share a list


def test_a_mask_that_admits_everything_lists_what_the_window_lists():
    grid = (5, 6, 7)
    common = {"num_tokens": 210, "head_dim": 16, "dtype": torch.float32, "grids": [grid]}
    cu = offsets([210])
    plain = sk.plan_attention(cu, window=(3, 3, 3), **common)
    masked = sk.plan_attention(
        cu, window=(3, 3, 3), masks=torch.ones(210, 210, dtype=torch.bool), cell=(1, 1, 1), **common
    )
    assert plain.shape == masked.shape
    assert torch.equal(plain.tiles, masked.tiles)
    assert torch.equal(plain.blocks, masked.blocks)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"masks": torch.ones(4, 3, dtype=torch.bool)}, "[4, 3]"),
        ({"masks": torch.ones(4, 4)}, "float32"),
        ({"masks": [torch.ones(4, 4, dtype=torch.bool)] * 2}, "2 masks for 1 segments"),
        ({"cell": (0, 1, 1)}, "[0, 1, 1]"),
        ({"window": (2, 1, 1)}, "[2, 1, 1]"),
        ({"grids": [(4, 2, 3)]}, "24 tokens"),
        ({"origins": [(0, 0, 0)] * 2}, "2 origins"),
        ({"head_dim": 300}, "300"),
    ],
)
def test_plan_attention_refuses(change, named):
    fine = {
        "num_tokens": 16, "head_dim": 16, "dtype": torch.float32, "grids": [(4, 2, 2)],
        "masks": torch.ones(4, 4, dtype=torch.bool),
    }  # fmt: skip
    sk.plan_attention(offsets([16]), **fine)
    with pytest.raises(ValueError, match=r".") as caught:
        sk.plan_attention(offsets([16]), **{**fine, **change})
    assert named in str(caught.value)


def test_a_plan_for_another_call_is_refused():
    q = torch.randn(16, 1, 16)
    cu, grids = offsets([16]), [(4, 2, 2)]
    plan = sk.plan_attention(
        cu, num_tokens=16, head_dim=16, dtype=q.dtype, grids=grids, window=(3, -1, -1)
    )
    sk.windowed_attention(q, q, q, cu, grids, (3, -1, -1), plan=plan)
    with pytest.raises(ValueError, match=r"window \[1, -1, -1\]; the plan was made for \[3"):
        sk.windowed_attention(q, q, q, cu, grids, (1, -1, -1), plan=plan)
    with pytest.raises(ValueError, match=r"grids \[2, 2, 4\]; the plan was made for \[4"):
        sk.windowed_attention(q, q, q, cu, [(2, 2, 4)], (3, -1, -1), plan=plan)


def sight_of(plan, grid, key_grid, masked):
    """bool [queries, keys] that a plan of one segment lists, in tiles along a row."""
    tokens, reach = plan.shape[2], plan.window[0] // 2
    (frames, length), (key_frames, key_length) = ((g[0], g[1] * g[2]) for g in (grid, key_grid))
    across, key_across = -(-length // tokens), -(-key_length // tokens)
    seen = torch.zeros(frames * length, key_frames * key_length, dtype=torch.bool)
    for _, number, start, partial, full in plan.tiles.tolist():
        f, first = number // across, number % across * tokens
        for i in range(start, start + partial + full):
            g, first_key = (
                int(plan.blocks[i]) // key_across,
                int(plan.blocks[i]) % key_across * tokens,
            )
            for q in range(min(tokens, length - first)):
                for k in range(min(tokens, key_length - first_key)):
                    if i >= start + partial:
                        sees = True
                    elif masked:
                        sees = int(plan.bits[plan.patterns[i], q]) >> k & 1
                    else:
                        sees = plan.window[0] == -1 or abs(f + plan.origins[0][0] - g) <= reach
                    assert not seen[f * length + first + q, g * key_length + first_key + k]
                    seen[f * length + first + q, g * key_length + first_key + k] = bool(sees)
    return seen


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("window", [(-1, -1, -1), (3, -1, -1)])
@pytest.mark.parametrize(
    ("grid", "key_grid", "origin", "cell"),
    [
        ((4, 5, 7), (4, 5, 7), 0, 1),  # 35 tokens a frame: tiles of 32 stick out
        ((5, 8, 8), (5, 8, 8), 0, 2),  # 64: none does
        ((2, 4, 10), (5, 4, 10), 3, 1),  # a shard of whole frames
        ((3, 1, 63), (3, 1, 63), 0, -1),  # one cell for all
    ],
)
def test_whole_frames_in_closed_form(masked, window, grid, key_grid, origin, cell):
    """The lists say what the mask and the window say, by a loop over pairs; a frame has one."""
    frames, key_frames = (1, 1) if cell == -1 else (-(-n // cell) for n in (grid[0], key_grid[0]))
    mask = torch.rand(frames, key_frames, generator=generator(7)) < 0.6
    mask[0, 0] = True
    plan = sk.plan_attention(
        offsets(tokens_of([grid])), num_tokens=tokens_of([grid])[0], head_dim=16,
        dtype=torch.float32, grids=[grid], key_grids=[key_grid], origins=[(origin, 0, 0)],
        window=window, masks=mask if masked else None, cell=(cell, -1, -1),
    )  # fmt: skip
    assert plan.shape == (1, 1, 32)
    allowed = mask if masked else torch.ones_like(mask)
    seen = dense_mask(grid, key_grid, (origin, 0, 0), window, allowed, (cell, -1, -1))
    assert torch.equal(sight_of(plan, grid, key_grid, masked), seen)
    tiles = -(-key_grid[1] * key_grid[2] // 32)
    assert plan.blocks.shape[0] <= grid[0] * key_grid[0] * tiles
