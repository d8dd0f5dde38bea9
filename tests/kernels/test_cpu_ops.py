"""Every op by every CPU backend against fp64, under FlashAttention's error rule."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_checks import (
    attention_cases,
    check_a_thousand_segments,
    check_attention,
    check_neighbours_do_not_leak,
    check_temporal,
    check_windowed,
    grid_cases,
)
from cases import SLACK
from hypothesis import given, settings
from linear_checks import check_linear, linear_cases
from lora_checks import check_lora, lora_cases
from norm_checks import (
    causal_cases,
    check_causal,
    check_gated,
    check_group_norm,
    check_norm_modulate,
    check_rope,
    group_cases,
    modulation_cases,
    rope_cases,
)

import sora_kernels as sk
from sora_kernels import csrc, winograd
from sora_kernels.testing import check_within_budget, generator, guarded, offsets

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_attention_at_every_length(dtype):
    """Each number of keys leaves another tail to mask."""
    lens = list(range(1, 65))
    case = {"q_lens": [3] * 64, "k_lens": lens, "heads": 1, "head_dim": 16, "dtype": dtype,
            "seed": 11, "layout": "dense", "magnitude": 1.0, "scale": None}  # fmt: skip
    check_attention(case, "native")


@given(attention_cases(max_length=150))
def test_sdpa_attention(case):
    check_attention(case, "sdpa")


@pytest.mark.usefixtures("native_library")
@given(attention_cases(max_length=64))
def test_native_attention(case):
    check_attention(case, "native")


@pytest.mark.usefixtures("native_library")
@settings(max_examples=settings().max_examples // 4)
@given(attention_cases(max_length=700, max_segments=2))
def test_native_attention_in_shares_and_blocks(case):
    """256 queries are a share, 512 keys a block."""
    check_attention(case, "native")


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("keys", [511, 512, 513, 1024, 1031])
@pytest.mark.parametrize("queries", [255, 257])
def test_native_attention_at_the_edges_of_blocks(queries, keys):
    """Greatest scores in the first block, in the last, and falling or rising over all of them."""
    rng = generator(keys)
    q = torch.randn(queries, 2, 24, generator=rng)
    k, v = (torch.randn(keys, 2, 24, generator=rng) for _ in range(2))
    cu = offsets([queries]), offsets([keys])
    kwargs = {"max_seqlen_q": queries, "max_seqlen_k": keys, "return_lse": True}
    rising = torch.linspace(0.1, 8, keys)[:, None, None]
    for size in (rising, rising.flip(0)):
        args = q, k * size, v
        out, lse = sk.packed_attention(*args, *cu, backend="native", **kwargs)
        low, _ = sk.packed_attention(*args, *cu, backend="reference", **kwargs)
        wide = (t.double() for t in args)
        ref, ref_lse = sk.packed_attention(*wide, *cu, backend="reference", **kwargs)
        check_within_budget("out", out, ref, low, SLACK[torch.float32])
        torch.testing.assert_close(lse, ref_lse.float(), rtol=1e-5, atol=1e-5)


@given(linear_cases(max_rows=300))
def test_invariant_linear(case):
    check_linear(case, "reference")


@given(lora_cases())
def test_lora_linear(case):
    check_lora(case, "reference", same_bits=False)


@pytest.mark.usefixtures("native_library")
@given(lora_cases())
def test_native_lora_linear(case):
    check_lora(case, "native")


@pytest.mark.usefixtures("native_library")
@given(modulation_cases())
def test_native_norm_modulate(case):
    check_norm_modulate(case, "native")


@pytest.mark.usefixtures("native_library")
@given(modulation_cases())
def test_native_gate_residual_norm_modulate(case):
    check_gated(case, "native")


@pytest.mark.usefixtures("native_library")
@given(causal_cases())
def test_native_causal_norm_silu(case):
    check_causal(case, "native")


@pytest.mark.usefixtures("native_library")
@given(group_cases())
def test_native_group_norm(case):
    check_group_norm(case, "native")


@pytest.mark.parametrize("silu", [False, True])
def test_group_norms_reference_is_pytorchs(silu):
    rng = generator(5)
    x = torch.randn(2, 6, 24, generator=rng, dtype=torch.float64) * 3 + 7
    weight, bias = torch.randn(2, 24, generator=rng, dtype=torch.float64)
    expected = torch.nn.functional.group_norm(x.transpose(1, 2), 4, weight, bias, 1e-6)
    expected = expected * expected.sigmoid() if silu else expected
    out = sk.group_norm(x, 4, weight, bias, silu=silu, backend="reference")
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("native_library")
def test_native_group_norm_of_a_far_mean():
    """A mean 10,000 times the deviation leaves the variance its digits."""
    x = torch.randn(1, 5000, 8, generator=generator(6)) + 1e4
    out = sk.group_norm(x, 2, backend="native")
    exact = sk.group_norm(x.double(), 2, backend="reference")
    assert (out - exact).abs().max() < 2e-3  # by half a unit of x in its last place, over deviation
    assert abs(out.std().item() - 1) < 1e-4


@pytest.mark.usefixtures("native_library")
def test_native_group_norm_adds_eps_to_the_variance():
    x = 1e-3 * torch.randn(1, 100, 8, generator=generator(8))
    out, exact = (
        sk.group_norm(t, 2, eps=1e-6, backend=b)
        for t, b in ((x, "native"), (x.double(), "reference"))
    )
    assert (out - exact).abs().max() < 1e-5


@pytest.mark.usefixtures("native_library")
def test_native_group_norms_bits_are_the_same_on_any_number_of_threads():
    x = torch.randn(3, 3000, 64, generator=generator(7))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(sk.group_norm(x, 8, silu=True, backend="native"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.usefixtures("native_library")
@given(rope_cases())
def test_native_qk_norm_rope(case):
    check_rope(case, "native")


@pytest.mark.usefixtures("native_library")
@given(grid_cases())
def test_native_temporal_attention(case):
    check_temporal(case, "native")


@given(grid_cases())
def test_sdpa_temporal_attention(case):
    check_temporal(case, "sdpa")


@given(grid_cases(max_extent=6))
def test_sdpa_windowed_attention(case):
    check_windowed(case, "sdpa")


def neighbours(grid, token, window):
    """The keys that one token sees, from the words of the definition."""
    t, h, w = grid
    place = (token // (h * w), token // w % h, token % w)
    return [
        (a * h + b) * w + c
        for a in range(t)
        for b in range(h)
        for c in range(w)
        if all(
            extent == -1 or abs(x - y) <= extent // 2
            for x, y, extent in zip(place, (a, b, c), window, strict=True)
        )
    ]


@pytest.mark.parametrize("window", [(3, 3, 3), (1, -1, -1), (-1, 1, 1), (5, 1, 3)])
def test_the_reference_sees_the_window_and_nothing_else(window):
    rng = generator(2)
    grid = (4, 3, 5)
    q, k, v = (torch.randn(60, 2, 8, generator=rng, dtype=torch.float64) for _ in range(3))
    out = sk.windowed_attention(q, k, v, offsets([60]), [grid], window, backend="reference")
    for token in range(60):
        keys = neighbours(grid, token, window)
        weights = torch.softmax(torch.einsum("hd,nhd->hn", q[token], k[keys]) / 8**0.5, dim=-1)
        torch.testing.assert_close(out[token], torch.einsum("hn,nhd->hd", weights, v[keys]))


def test_factorised_forms_are_windows_over_a_whole_axis():
    rng = generator(4)
    grids = [(3, 2, 4), (2, 3, 3)]
    q, k, v = (torch.randn(42, 2, 16, generator=rng) for _ in range(3))
    cu = offsets([24, 18])
    expected = sk.windowed_attention(q, k, v, cu, grids, (-1, 1, 1), backend="reference")
    torch.testing.assert_close(sk.temporal_attention(q, k, v, grids), expected)
    expected = sk.windowed_attention(q, k, v, cu, grids, (1, -1, -1), backend="reference")
    torch.testing.assert_close(sk.spatial_attention(q, k, v, grids), expected)


BACKENDS = ["reference", "sdpa", "native"]


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_thousand_segments_in_any_order(backend):
    check_a_thousand_segments(backend)


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("lens", [([5, 33, 7], [20, 3, 18]), ([6, 6, 6], [19, 19, 19])])
@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbours_do_not_leak(backend, lens):
    check_neighbours_do_not_leak(backend, *lens)


@pytest.mark.usefixtures("native_library")
@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("channels", [(1, 3), (16, 16), (37, 20)])
@pytest.mark.parametrize("size", [(1, 1), (5, 8), (6, 3)])
def test_native_winograds_ends_make_a_convolution(size, channels):
    """With their products in float64's place between them, whole and in rows of tiles."""
    torch.manual_seed(0)
    (height, width), (ins, outs), frames = size, channels, 2
    x, weight = torch.randn(frames, height, width, ins), torch.randn(outs, ins, 1, 3, 3)
    bias, beside = torch.randn(outs), torch.randn(frames, height, width, outs)
    pictures = x.permute(0, 3, 1, 2).double()
    want = torch.nn.functional.conv2d(pictures, weight[:, :, 0].double(), bias.double(), padding=1)
    want = want.permute(0, 2, 3, 1) + beside
    down, across = (height + 1) // 2, (width + 1) // 2
    planes = winograd.filters(weight).view(16, outs, ins)
    for strip in (down, 1):
        y = torch.full_like(beside, torch.nan)
        for first in range(0, down, strip):
            tiles = torch.full((frames, strip, across, 16, ins), torch.nan)
            winograd.split(x, tiles, first)
            assert not tiles.isnan().any()
            products = torch.einsum("trcpi,poi->trcpo", tiles, planes)
            winograd.join(products.contiguous(), bias, beside, y, first)
        assert float((y - want).abs().max()) < 1e-5 * float(want.abs().max())


@pytest.mark.usefixtures("native_library")
def test_native_winograd_refuses_what_does_not_fit():
    x, tiles = torch.zeros(1, 4, 4, 2), torch.zeros(1, 2, 2, 16, 2)
    with pytest.raises(RuntimeError, match=r"\[1, 2, 2, 16, 2\] from row 1 on of \[1, 4, 4, 2\]"):
        winograd.split(x, tiles, 1)
    with pytest.raises(RuntimeError, match=r"tiles \[1, 2, 1, 16, 2\] from row 0 on"):
        winograd.split(x, tiles[:, :, :1].contiguous(), 0)
    with pytest.raises(RuntimeError, match=r"tiles \[1, 2, 2, 15, 2\] from row 0 on"):
        winograd.join(tiles[:, :, :, :15].contiguous(), None, None, x, 0)
    with pytest.raises(RuntimeError, match=r"what is added to \[1, 4, 4, 2\]"):
        winograd.join(tiles, torch.zeros(3), None, x, 0)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set_keeps_the_budget(isa):
    """The kernels of lesser instruction sets, in a process that is held to them."""
    environment = {**os.environ, "SORA_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    chosen = subprocess.run(
        [sys.executable, "-c", "from sora_kernels import csrc; print(csrc.instruction_set())"],
        env={**environment, "PYTHONPATH": str(ROOT / "kernels")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    if chosen != isa:
        pytest.skip(f"this processor has no {isa}")
    if isa == csrc.instruction_set():
        return  # the other tests of this file have just run it
    # AVX512-BF16 has an attention of its own, and else AVX-512's code.
    same = isa == "avx512" and csrc.instruction_set() == "avx512bf16"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            __file__,
            "-k",
            "test_native_attention" if same else "test_native",
        ],
        env=environment,
        cwd=ROOT,
        check=True,
    )


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_native_rounds_every_half_as_pytorch_does(dtype):
    """All 65,536 bit patterns through a load and a store; NaN stays NaN."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).view(-1, 64)
    zero = torch.zeros_like(x)
    total, _ = sk.gate_residual_norm_modulate(zero, x, backend="native")
    assert torch.equal(total.isnan(), x.isnan())
    assert torch.equal(total.nan_to_num(), x.nan_to_num())
    # From fp32, values between two halves.
    finite = torch.randn(1000, 64, generator=generator(1)) * 10
    total, _ = sk.gate_residual_norm_modulate(finite, finite.new_zeros(1000, 64).to(dtype),
                                              backend="native")  # fmt: skip
    assert torch.equal(total, finite.to(dtype))


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize(("heads", "head_dim"), [(12, 128), (15, 100)])
@pytest.mark.parametrize("op", ["norm", "gated norm", "rope", "rope, split", "attention"])
def test_native_results_past_the_caches_are_those_of_their_parts(op, heads, head_dim):
    """From 32 MiB on, results are written past the caches: other stores, the same values. Widths
    of whole vectors and of others; the parts go the way that every other test checks."""
    tokens, channels = 5800, heads * head_dim
    rng = generator(7)
    x, residual = (torch.randn(tokens, channels, generator=rng) for _ in range(2))
    scale, shift, gate = (torch.randn(1, channels, generator=rng) for _ in range(3))
    angles = torch.randn(tokens, head_dim // 2, generator=rng)
    lens = [tokens // 50] * 50

    def run(rows):
        heads_of = x[rows].view(-1, heads, head_dim)
        if op == "norm":
            return (sk.norm_modulate(x[rows], scale, shift, backend="native"),)
        if op == "gated norm":
            return sk.gate_residual_norm_modulate(
                x[rows], residual[rows], gate, scale, shift, backend="native"
            )
        if op == "attention":
            cu = offsets(lens[: len(heads_of) // lens[0]])
            return (
                sk.packed_attention(
                    heads_of, heads_of, heads_of, cu, cu, max_seqlen_q=lens[0],
                    max_seqlen_k=lens[0], backend="native",
                ),
            )  # fmt: skip
        rotated, _ = sk.qk_norm_rope(
            heads_of, None, scale[0], None, angles[rows].cos(), angles[rows].sin(),
            across_heads=True, interleaved=op == "rope", backend="native",
        )  # fmt: skip
        return (rotated,)

    whole = run(slice(None))
    assert whole[0].nbytes >= 32 << 20
    parts = [run(slice(i, i + tokens // 10)) for i in range(0, tokens, tokens // 10)]
    for got, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(got, torch.cat(pieces))


@pytest.mark.usefixtures("native_library")
def test_native_refuses_what_would_read_past_the_tokens():
    q = torch.randn(4, 1, 16)
    for spans in ([[0, 1, 5, 0, 1, 4]], [[0, 2, 3, 0, 1, 4]], [[-1, 1, 2, 0, 1, 4]]):
        with pytest.raises(RuntimeError, match="past the tokens"):
            torch.ops.sora.native_attention(q, q, q, torch.tensor(spans), 1.0, False)


@pytest.mark.usefixtures("native_library")
def test_the_budget_catches_a_wrong_scale_and_an_unmasked_tail():
    """The rule itself: results that are off by what a typical fault costs do not pass."""
    rng = generator(3)
    q, k, v = (guarded((40, 2, 64), torch.float32, rng) for _ in range(3))
    cu = offsets([17, 23])
    kwargs = {"max_seqlen_q": 40, "max_seqlen_k": 40, "backend": "reference"}
    low = sk.packed_attention(q, k, v, cu, cu, **kwargs)
    ref = sk.packed_attention(q.double(), k.double(), v.double(), cu, cu, **kwargs)
    check_within_budget("right", low, ref, low)
    wrong = [
        sk.packed_attention(q, k, v, cu, cu, scale=1.001 / 8, **kwargs),
        sk.packed_attention(q, k, v, offsets([16, 24]), offsets([17, 23]), **kwargs),
        sk.packed_attention(q, k, v, offsets([40]), offsets([40]), **kwargs),
    ]
    for result in wrong:
        with pytest.raises(AssertionError, match="budget"):
            check_within_budget("wrong", result, ref, low, 8.0)
