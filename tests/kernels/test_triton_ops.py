"""Every op by its Triton kernel, interpreted, against fp64 under FlashAttention's error rule."""

from __future__ import annotations

import numpy as np
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
from hypothesis import given, settings
from linear_checks import check_linear, linear_cases
from lora_checks import check_lora, lora_cases
from norm_checks import (
    causal_cases,
    check_causal,
    check_gated,
    check_norm_modulate,
    check_rope,
    modulation_cases,
    plain_causal,
    rope_cases,
)
from quant_checks import FORMATS, check_quant, quant_cases

import sora_kernels as sk
from sora_kernels.testing import generator, offsets

# The interpreter takes about 10 ms for each tile of an attention kernel.
FEW = settings().max_examples // 2

pytestmark = pytest.mark.usefixtures("interpreter", "poisoned_outputs")


def test_the_mended_casts_round_as_pytorch_does():
    from interpreter import to_bfloat16, to_float32

    values = torch.cat(
        [torch.randn(4096, generator=generator(0)) * 100, torch.tensor([0.0, 1e-40])]
    )
    expected = values.to(torch.bfloat16)
    bits = to_bfloat16(values.numpy())
    assert np.array_equal(bits.view(np.int16), expected.view(torch.int16).numpy())
    assert np.array_equal(to_float32(bits), expected.float().numpy())


@given(modulation_cases(max_tokens=12))
def test_norm_modulate(case):
    check_norm_modulate(case, "triton")


@given(modulation_cases(max_tokens=12))
def test_gate_residual_norm_modulate(case):
    check_gated(case, "triton")


@given(causal_cases())
def test_causal_norm_silu(case):
    check_causal(plain_causal(case), "triton")


@given(rope_cases(max_tokens=10))
def test_qk_norm_rope(case):
    check_rope(case, "triton")


@pytest.mark.parametrize("weights", ["both", "both, of two dtypes", "q", "k", "none"])
def test_q_and_k_with_weights_of_their_own_kinds(weights):
    case = {
        "tokens": 5, "heads": 3, "k_heads": 2, "head_dim": 16, "across_heads": True,
        "interleaved": True, "rotate": True, "weights": weights, "dtype": torch.bfloat16,
        "seed": 0, "layout": "gaps", "magnitude": 1.0,
    }  # fmt: skip
    check_rope(case, "triton")


@settings(max_examples=FEW)
@given(linear_cases(max_rows=40))
def test_invariant_linear(case):
    check_linear(case, "triton")


@settings(max_examples=FEW)
@given(lora_cases(max_rows=40))
def test_lora_linear(case):
    check_lora(case, "triton")


@settings(max_examples=FEW)
@given(quant_cases(max_rows=20, max_blocks=3))
def test_quant_linear(case):
    check_quant(case, "triton")


@pytest.mark.parametrize("format", FORMATS)
def test_quant_linear_of_each_format(format):
    case = {"rows": 17, "ins": 256, "outs": 33, "scales": 4, "bias": True, "gelu": None,
            "layout": "rows", "seed": 3, "format": format, "dtype": torch.float32}  # fmt: skip
    check_quant(case, "triton", same_bits=False)


@settings(max_examples=FEW)
@given(linear_cases(max_rows=40, sizes=(16, 32, 40, 64)))
def test_invariant_linear_through_descriptors(case):
    from sora_kernels.invariant import triton as backend

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "has_tma", lambda arch: True)
        check_linear(case, "triton")


@settings(max_examples=FEW)
@given(attention_cases(max_length=40, max_segments=2))
def test_packed_attention(case):
    check_attention(case, "triton")


@settings(max_examples=FEW)
@given(attention_cases(max_length=40, max_segments=2, head_dims=(16, 40, 72)))
def test_packed_attention_through_descriptors(case):
    from sora_kernels.attention import triton as backend

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "has_tma", lambda arch: True)
        check_attention(case, "triton")


@settings(max_examples=FEW)
@given(grid_cases())
def test_temporal_attention(case):
    check_temporal(case, "triton")


def test_temporal_attention_over_several_tiles_of_frames():
    check_temporal(
        {"grids": [(70, 1, 2), (33, 1, 1)], "heads": 1, "head_dim": 16, "dtype": torch.bfloat16,
         "seed": 1, "layout": "rows", "magnitude": 1.0}, "triton"
    )  # fmt: skip


@settings(max_examples=FEW)
@given(grid_cases(max_segments=2, head_dims=(16, 40)))
def test_windowed_attention(case):
    check_windowed(case, "triton")


def test_a_thousand_segments_in_any_order():
    check_a_thousand_segments("triton", heads=1, longest=2, filled=0.1)


# A batch of unequal segments, and one of equal segments that takes the dense path.
@pytest.mark.parametrize("lens", [([5, 33, 7], [20, 3, 18]), ([6, 6, 6], [19, 19, 19])])
@pytest.mark.parametrize("descriptors", [False, True])
def test_neighbours_do_not_leak(lens, descriptors, monkeypatch):
    from sora_kernels.attention import triton as backend

    monkeypatch.setattr(backend, "has_tma", lambda arch: descriptors)
    check_neighbours_do_not_leak("triton", *lens)


def test_rows_that_begin_anywhere_are_copied_and_no_others():
    """Such rows would be read an element at a time. Parts of a fused projection are not copied."""
    from sora_kernels.attention.triton import _addressable

    fused = torch.randn(5, 6, 16, dtype=torch.bfloat16).split(2, dim=1)[1]
    wide = torch.randn(5, 2, 17, dtype=torch.bfloat16)[..., :16]
    narrow = torch.randn(5, 2, 12, dtype=torch.bfloat16)  # 24 bytes a row: a copy has them too
    assert _addressable(fused) is fused
    assert _addressable(narrow) is narrow
    copied = _addressable(wide)
    assert copied.is_contiguous()
    assert torch.equal(copied, wide)


def test_a_plan_serves_and_must_fit():
    rng = generator(5)
    lens = [3, 0, 70, 33]
    q, k, v = (torch.randn(sum(lens), 1, 16, generator=rng) for _ in range(3))
    cu = offsets(lens)
    plan = sk.plan_attention(cu, num_tokens=sum(lens), head_dim=16, dtype=q.dtype)
    live = plan.tiles[plan.tiles[:, 0] >= 0]
    assert live.tolist() == [[0, 0], [2, 0], [2, 32], [2, 64], [3, 0], [3, 32]]
    kwargs = {"max_seqlen_q": 70, "max_seqlen_k": 70, "backend": "triton"}
    planned = sk.packed_attention(q, k, v, cu, cu, plan=plan, **kwargs)
    assert torch.equal(planned, sk.packed_attention(q, k, v, cu, cu, **kwargs))
    with pytest.raises(ValueError, match="tiles of 64 queries, this kernel 32"):
        sk.packed_attention(q, k, v, cu, cu, plan=sk.AttentionPlan(plan.tiles, 64), **kwargs)
