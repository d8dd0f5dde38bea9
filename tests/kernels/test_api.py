"""What the ops refuse, how they pick a backend, and that gradients are never lost silently."""

from __future__ import annotations

import logging

import pytest
import torch

import sora_kernels as sk
from sora_kernels.dispatch import Case, Op


def attention_inputs(q_lens=(3, 4), k_lens=(5, 2), heads=2, head_dim=16):
    def cu(lens):
        return torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], dtype=torch.int32)

    q = torch.randn(sum(q_lens), heads, head_dim)
    k, v = (torch.randn(sum(k_lens), heads, head_dim) for _ in range(2))
    return q, k, v, cu(q_lens), cu(k_lens)


def attend(q, k, v, cu_q, cu_k, **kwargs):
    kwargs = {"max_seqlen_q": 8, "max_seqlen_k": 8, **kwargs}
    return sk.packed_attention(q, k, v, cu_q, cu_k, **kwargs)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"q": torch.randn(7, 32)}, "[7, 32]"),
        ({"q": torch.randn(7, 3, 16)}, "[7, 3, 16]"),
        ({"q": torch.randn(7, 2, 257)}, "257"),
        ({"q": torch.randn(7, 0, 16)}, "[7, 0, 16]"),
        ({"v": torch.randn(6, 2, 16)}, "[6, 2, 16]"),
        ({"k": torch.randn(7, 2, 16).half()}, "float16"),
        ({"q": torch.zeros(7, 2, 16, dtype=torch.int32)}, "int32"),
        ({"cu_q": torch.tensor([0, 3, 7]).float()}, "float32"),
        ({"cu_q": torch.tensor([0, 5, 3])}, "0 to 7"),
        ({"cu_q": torch.tensor([0, 8, 7])}, "falls from 8 to 7"),
        ({"cu_q": torch.tensor([0, 3, 8])}, "from 0 to 8"),
        ({"cu_q": torch.tensor([1, 3, 7])}, "from 1 to 7"),
        ({"cu_q": torch.tensor([0, 7])}, "2 offsets"),
        ({"cu_k": torch.tensor([], dtype=torch.int32)}, "[0], an empty batch"),
        ({"q": torch.randn(0, 2, 16), "cu_q": torch.tensor([0])}, "[1], an empty batch"),
        ({"max_seqlen_k": 4}, "5 tokens"),
        ({"max_seqlen_q": -1}, "-1"),
        ({"backend": "cutlass"}, "cutlass"),
        ({"q": torch.randn(7, 2, 16, device="meta")}, "meta"),
    ],
)
def test_attention_refuses(change, named):
    names = ("q", "k", "v", "cu_q", "cu_k")
    inputs = dict(zip(names, attention_inputs(), strict=True))
    with pytest.raises(ValueError, match=r".") as caught:
        attend(**{**inputs, **change})
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.randn(4, 8, 1)}, "[4, 8, 1]"),
        ({"scale": torch.randn(3, 7)}, "[3, 7]"),
        ({"shift": torch.randn(2, 8)}, "2 rows"),
        ({"index": None}, "3 modulation rows"),
        ({"index": torch.tensor([0, 1, 2, 3])}, "0 to 3"),
        ({"index": torch.tensor([0, -1, 2, 0])}, "-1"),
        ({"index": torch.tensor([0.0, 1, 2, 0])}, "float32"),
        ({"index": torch.tensor([0, 1, 2])}, "[3]"),
        ({"kind": "batch"}, "batch"),
        ({"kind": "rms", "bias": torch.zeros(8)}, "no bias"),
        ({"weight": torch.zeros(9)}, "[9]"),
        ({"backend": "nope"}, "nope"),
    ],
)
@pytest.mark.parametrize("gated", [False, True])
def test_modulation_refuses(change, named, gated):
    inputs = {
        "x": torch.randn(4, 8),
        "scale": torch.randn(3, 8),
        "shift": torch.randn(3, 8),
        "index": torch.tensor([0, 1, 2, 0]),
        **change,
    }
    call = sk.norm_modulate
    if gated:
        call = sk.gate_residual_norm_modulate
        inputs["residual"] = torch.randn(inputs["x"].shape)
    with pytest.raises(ValueError, match=r".") as caught:
        call(**inputs)
    assert named in str(caught.value)


def test_gated_refuses_a_residual_of_another_shape():
    with pytest.raises(ValueError, match=r"\[4, 9\]"):
        sk.gate_residual_norm_modulate(torch.randn(4, 8), torch.randn(4, 9))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k": torch.randn(5, 2, 8)}, "[5, 2, 8]"),
        ({"k": torch.randn(6, 2, 8).bfloat16()}, "bfloat16"),
        ({"k": None}, "k_weight without k"),
        ({"q_weight": torch.ones(8)}, "[16] is due"),
        ({"cos": None}, "together"),
        ({"cos": torch.randn(6, 8)}, "[6, 8]"),
        ({"sin": torch.randn(6, 4).half()}, "float16"),
        ({"q": torch.randn(6, 2, 7), "k": torch.randn(6, 2, 7), "q_weight": None,
          "k_weight": None}, "odd"),
    ],
)  # fmt: skip
def test_rope_refuses(change, named):
    inputs = {
        "q": torch.randn(6, 2, 8),
        "k": torch.randn(6, 2, 8),
        "q_weight": torch.ones(16),
        "k_weight": torch.ones(16),
        "cos": torch.randn(6, 4),
        "sin": torch.randn(6, 4),
        **change,
    }
    with pytest.raises(ValueError, match=r".") as caught:
        sk.qk_norm_rope(**inputs, across_heads=True)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.randn(6, 2, 8)}, "[6, 2, 8]"),
        ({"x": torch.ones(6, 8, dtype=torch.int8)}, "int8"),
        ({"weight": torch.randn(3, 9)}, "[out, 8] is due"),
        ({"weight": torch.randn(8)}, "[8]"),
        ({"weight": torch.randn(3, 8).half()}, "float16"),
        ({"bias": torch.randn(4)}, "[3] is due"),
        ({"gelu": "erf"}, "'erf'"),
        ({"weight": torch.randn(3, 8, device="meta")}, "meta"),
        ({"backend": "cublas"}, "'cublas'"),
    ],
)
def test_invariant_linear_refuses(change, named):
    inputs = {"x": torch.randn(6, 8), "weight": torch.randn(3, 8), **change}
    with pytest.raises(ValueError, match=r".") as caught:
        sk.invariant_linear(**inputs)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.randn(6, 2, 8)}, "[6, 2, 8]"),
        ({"x": torch.ones(6, 8, dtype=torch.int8)}, "int8"),
        ({"base": torch.randn(5, 3)}, "base has 5 rows and x 6"),
        ({"base": torch.randn(6, 3).half()}, "float16"),
        ({"down": [torch.randn(2, 9)]}, "[rank, 8] is due"),
        ({"down": [torch.randn(0, 8)]}, "[0, 8]"),
        ({"up": [torch.randn(3, 4)]}, "[3, 2] is due"),
        ({"up": [torch.randn(3, 2).bfloat16()]}, "bfloat16"),
        ({"up": [torch.randn(3, 2, device="meta")]}, "meta"),
        ({"up": []}, "1 down, 0 up"),
        ({"rows": [(0, 7)]}, "rows 0 are 0 to 7; x has 6"),
        ({"rows": [(3, 2)]}, "rows 0 are 3 to 2"),
        ({"rows": [(-1, 2)]}, "rows 0 are -1"),
        ({"scale": [1.0, 2.0]}, "2 scale"),
        ({"backend": "cublas"}, "'cublas'"),
    ],
)
def test_lora_linear_refuses(change, named):
    inputs = {"x": torch.randn(6, 8), "base": torch.randn(6, 3), "down": [torch.randn(2, 8)]}
    inputs |= {"up": [torch.randn(3, 2)], "rows": [(0, 6)], "scale": [1.0], **change}
    with pytest.raises(ValueError, match=r".") as caught:
        sk.lora_linear(**inputs)
    assert named in str(caught.value)


@pytest.mark.parametrize("op", [sk.temporal_attention, sk.spatial_attention])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"q": torch.randn(12, 32)}, "[12, 32]"),
        ({"q": torch.randn(11, 2, 16)}, "11"),
        ({"k": torch.randn(12, 2, 16).half()}, "float16"),
        ({"v": torch.randn(12, 3, 16)}, "[12, 3, 16]"),
        ({"grids": []}, "an empty batch"),
        ({"grids": [(3, 2)]}, "(3, 2)"),
        ({"grids": [(3, -2, -2)]}, "[3, -2, -2]"),
        ({"grids": [(3, 2, 3)]}, "18 tokens"),
        ({"scale": float("nan")}, "nan"),
        ({"backend": "nope"}, "nope"),
    ],
)
def test_factorised_attention_refuses(op, change, named):
    inputs = {**{name: torch.randn(12, 2, 16) for name in "qkv"}, "grids": [(3, 2, 2)], **change}
    with pytest.raises(ValueError, match=r".") as caught:
        op(**inputs)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"q": torch.randn(12, 2, 300)}, "300"),
        ({"v": torch.randn(12, 3, 16)}, "[12, 3, 16]"),
        ({"k": torch.randn(11, 2, 16), "v": torch.randn(11, 2, 16)}, "tensor 11"),
        ({"cu_seqlens": torch.tensor([0, 6, 12])}, "2 segments"),
        ({"cu_seqlens": torch.tensor([0])}, "an empty batch"),
        ({"cu_seqlens": torch.tensor([0, 11])}, "0 to 11"),
        ({"grids": []}, "an empty batch"),
        ({"grids": [(3, 2, 3)]}, "18 tokens"),
        ({"key_grids": [(3, 2, 1)]}, "6 tokens"),
        ({"origins": [(0, 0, 0)] * 2}, "2 origins"),
        ({"window": (2, 1, 1)}, "[2, 1, 1]"),
        ({"window": (3, 1)}, "[3, 1]"),
        ({"scale": 0.0}, "0.0"),
        ({"backend": "native"}, "native"),
    ],
)
def test_windowed_attention_refuses(change, named):
    inputs = {
        **{name: torch.randn(12, 2, 16) for name in "qkv"},
        "cu_seqlens": torch.tensor([0, 12]),
        "grids": [(3, 2, 2)],
        "window": (3, 1, 1),
        **change,
    }
    with pytest.raises(ValueError, match=r".") as caught:
        sk.windowed_attention(**inputs)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.randn(1, 3, 8)}, "[1, 3, 8]"),
        ({"past": torch.randn(2, 2, 5, 8)}, "[2, 2, 5, 8]"),
        ({"past": torch.randn(1, 2, 5, 8).half()}, "float16"),
        ({"weight": torch.ones(7)}, "[7]"),
        ({"bias": torch.ones(9)}, "[9]"),
        ({"before": -1}, "-1 frames before"),
        ({"x": torch.randn(1, 0, 5, 8), "past": torch.randn(1, 0, 5, 8), "after": 1}, "1 behind 0"),
        ({"keep": 8, "before": 1, "after": 1}, "keep is 8; 0 to 7"),
        ({"backend": "nope"}, "nope"),
    ],
)
def test_causal_norm_silu_refuses(change, named):
    inputs = {
        "x": torch.randn(1, 3, 5, 8),
        "past": torch.randn(1, 2, 5, 8),
        "weight": torch.ones(8),
        **change,
    }
    with pytest.raises(ValueError, match=r".") as caught:
        sk.causal_norm_silu(**inputs)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.randn(1, 3, 5, 8)}, "[1, 3, 5, 8]"),
        ({"x": torch.ones(1, 5, 8, dtype=torch.int64)}, "int64"),
        ({"groups": 3}, "3 groups"),
        ({"groups": 0}, "0 groups"),
        ({"weight": torch.ones(7)}, "[7]"),
        ({"bias": torch.ones(9)}, "[9]"),
        ({"backend": "triton"}, "triton"),
    ],
)
def test_group_norm_refuses(change, named):
    inputs = {"x": torch.randn(1, 5, 8), "groups": 2, **change}
    with pytest.raises(ValueError, match=r".") as caught:
        sk.group_norm(**inputs)
    assert named in str(caught.value)


def test_what_triton_lacks_of_causal_norm_silu_is_refused_by_name():
    x = torch.randn(1, 1, 5, 8)
    with pytest.raises(sk.KernelUnavailableError, match="repeats no frames"):
        sk.causal_norm_silu(x, x, torch.ones(8), before=1, backend="triton")


def test_gradients_flow_through_the_reference_alone():
    q, k, v, cu_q, cu_k = attention_inputs()
    q.requires_grad_()
    out, lse = attend(q, k, v, cu_q, cu_k, return_lse=True)
    (out.square().sum() + lse.sum()).backward()
    assert q.grad is not None
    assert q.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="'sdpa' has no gradient"):
        attend(q, k, v, cu_q, cu_k, backend="sdpa")
    with pytest.raises(ValueError, match="no gradient"):
        torch.ops.sora.packed_attention(
            q, k, v, cu_q, cu_k, 8, 8, 0.25, None, 0, False, *[None] * 3, "sdpa"
        )
    with torch.no_grad():
        attend(q, k, v, cu_q, cu_k, backend="sdpa")
    shift = torch.zeros(1, 8, requires_grad=True)
    assert sk.norm_modulate(torch.randn(4, 8), None, shift).requires_grad


def test_attention_gradients_match_finite_differences():
    q, k, v, cu_q, cu_k = attention_inputs((3, 0, 2), (2, 4, 0), head_dim=4)
    q, k, v = (t.double().requires_grad_() for t in (q, k, v))

    def loss(q, k, v):
        out, lse = attend(q, k, v, cu_q, cu_k, return_lse=True)
        return out, lse[:3]

    assert torch.autograd.gradcheck(loss, (q, k, v))


def test_auto_is_resolved_once_and_logged(caplog):
    class Never:
        @staticmethod
        def unsupported(case):
            return "never"

    class Counting:
        asked = 0

        @classmethod
        def unsupported(cls, case):
            cls.asked += 1

    op = Op("toy", {"a": "", "b": "", "reference": ""}, {"cpu": ("a", "b")})
    object.__setattr__(op, "load", lambda name: {"a": Never, "b": Counting}[name])
    case = Case.of(torch.zeros(2, 8), "rms")
    with caplog.at_level(logging.INFO, logger="sora_kernels"):
        assert op.resolve("auto", case) is Counting
        assert op.resolve("auto", case) is Counting
    assert Counting.asked == 1
    assert [r.message for r in caplog.records] == ["toy on cpu float32 width 8, rms: b"]
    with pytest.raises(sk.KernelUnavailableError, match=r"a cannot serve .*: never"):
        op.resolve("a", case)


def test_auto_goes_on_where_another_is_faster_and_a_name_does_not():
    class Outrun:
        unsupported = staticmethod(lambda case: None)
        outrun = staticmethod(lambda case: "b is faster" if case.width > 8 else None)

    class Other:
        unsupported = staticmethod(lambda case: None)

    op = Op("toy", {"a": "", "b": "", "reference": ""}, {"cpu": ("a", "b")})
    object.__setattr__(op, "load", lambda name: {"a": Outrun, "b": Other}[name])
    assert op.resolve("auto", Case.of(torch.zeros(2, 8))) is Outrun
    assert op.resolve("auto", Case.of(torch.zeros(2, 9))) is Other
    assert op.resolve("a", Case.of(torch.zeros(2, 9))) is Outrun


def test_a_named_backend_never_falls_back():
    q, k, v, cu_q, cu_k = attention_inputs()
    with pytest.raises(sk.KernelUnavailableError, match="float64"):
        attend(q.double(), k.double(), v.double(), cu_q, cu_k, backend="sdpa")


def test_backends_reports_every_op():
    report = sk.backends("cpu")
    assert report["packed_attention"]["sdpa"] is None
    assert all(entry["reference"] is None for entry in report.values())
