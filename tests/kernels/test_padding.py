"""Padding's key in packed attention: what it means, what it refuses, and that it spoils nothing.

Every backend's random cases (`attention_checks.py`) have it too, held against the reference in
fp64. Here the reference is held against keys that are there as often as they count.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_checks import check_neighbours_do_not_leak

import sora_kernels as sk
from sora_kernels.attention.operands import Operands
from sora_kernels.attention.padding import ROWS, joined, laid_out
from sora_kernels.testing import generator, offsets

BACKENDS = ("reference", "native", "sdpa", "auto")
Q_LENS, K_LENS, COUNTS = (5, 0, 3, 70, 4, 4), (3, 2, 0, 40, 0, 9), (509, 4, 7, 0, 0, 1)


def operands(dtype=torch.float64, q_lens=Q_LENS, k_lens=K_LENS, head_dim=24):
    rng = generator(3)
    q = torch.randn(sum(q_lens), 2, head_dim, generator=rng).to(dtype)
    k, v = (torch.randn(sum(k_lens), 2, head_dim, generator=rng).to(dtype) for _ in range(2))
    key, value = (torch.randn(2, head_dim, generator=rng).to(dtype) for _ in range(2))
    lengths = {"max_seqlen_q": max(q_lens), "max_seqlen_k": max(k_lens)}
    return (q, k, v, offsets(q_lens), offsets(k_lens)), key, value, lengths


def in_full(q, k, v, key, value):
    """Softmax over all keys, padding's among them as often as it counts; and its log-sum-exp."""
    outs, lses = [], []
    parts = zip(q.split(Q_LENS), k.split(K_LENS), v.split(K_LENS), COUNTS, strict=True)
    for q_part, k_part, v_part, count in parts:
        keys = torch.cat([k_part, *[key[None]] * count])
        values = torch.cat([v_part, *[value[None]] * count])
        for query in q_part:
            scores = torch.einsum("hd,khd->hk", query, keys) / query.shape[1] ** 0.5
            outs.append(torch.einsum("hk,khd->hd", scores.softmax(1), values))
            lses.append(scores.logsumexp(1))
    return torch.stack(outs), torch.stack(lses)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_the_reference_sees_padding_as_often_as_it_counts(index):
    inputs, key, value, lengths = operands()
    padding = sk.Padding(key, value, torch.tensor(COUNTS, dtype=index))
    out, lse = sk.packed_attention(
        *inputs, **lengths, padding=padding, return_lse=True, backend="reference"
    )
    due, due_lse = in_full(*inputs[:3], key, value)
    torch.testing.assert_close(out, due, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, due_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_segments_without_padding_are_as_without_the_argument(backend):
    """Bit for bit, whatever company they have, and NaN in a key that they do not read."""
    inputs, key, value, lengths = operands(torch.float32)
    plain, plain_lse = sk.packed_attention(*inputs, **lengths, return_lse=True, backend=backend)
    padding = sk.Padding(key, value, torch.tensor(COUNTS))
    out, lse = sk.packed_attention(
        *inputs, **lengths, padding=padding, return_lse=True, backend=backend
    )
    bare = torch.tensor(COUNTS).repeat_interleave(torch.tensor(Q_LENS)) == 0
    assert torch.equal(out[bare], plain[bare])
    assert torch.equal(lse[bare], plain_lse[bare])
    assert not torch.isclose(out[~bare], plain[~bare]).all(dim=2).any()
    nothing = torch.full_like(key, float("nan"))
    none = sk.Padding(nothing, nothing, torch.zeros(len(COUNTS), dtype=torch.int32))
    out, lse = sk.packed_attention(
        *inputs, **lengths, padding=none, return_lse=True, backend=backend
    )
    assert torch.equal(out, plain)
    assert torch.equal(lse, plain_lse)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_neighbour_of_nan_does_not_leak_beside_padding(backend):
    for counts in ([3, 0, 500], [0, 9, 0], [1, 1, 1]):
        check_neighbours_do_not_leak(backend, [5, 9, 3], [4, 0, 12], counts=counts)


def test_gradients_of_padding_match_finite_differences():
    inputs, key, value, lengths = operands(q_lens=(3, 1, 2), k_lens=(2, 2, 0), head_dim=4)
    q, k, v = (tensor.requires_grad_() for tensor in inputs[:3])
    key.requires_grad_()
    value.requires_grad_()

    def loss(q, k, v, key, value):
        padding = sk.Padding(key, value, torch.tensor([5, 0, 2]))
        return sk.packed_attention(
            q, k, v, *inputs[3:], **lengths, padding=padding, return_lse=True
        )

    assert torch.autograd.gradcheck(loss, (q, k, v, key, value))


def test_padding_that_wants_a_gradient_is_served_by_the_reference():
    inputs, key, value, lengths = operands(torch.float32)
    padding = sk.Padding(key.requires_grad_(), value, torch.tensor(COUNTS))
    out = sk.packed_attention(*inputs, **lengths, padding=padding)
    out.sum().backward()
    assert key.grad is not None
    assert key.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="'sdpa' has no gradient"):
        sk.packed_attention(*inputs, **lengths, padding=padding, backend="sdpa")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"key": torch.randn(24)}, "padding.key has shape [24]; [2, 24] is due"),
        ({"value": torch.randn(2, 23)}, "padding.value has shape [2, 23]; [2, 24] is due"),
        ({"key": torch.randn(2, 24).half()}, "padding.key is torch.float16 beside torch.float32"),
        ({"counts": torch.ones(5, dtype=torch.int32)}, "padding.counts is torch.int32 [5]"),
        (
            {"counts": torch.ones(6)},
            "padding.counts is torch.float32 [6]; int32 or int64 [6] is due",
        ),
        ({"counts": torch.tensor([1, 2, 0, -1, 0, 0])}, "padding.counts [1, 2, 0, -1, 0, 0]; none"),
        ({"counts": torch.ones(6, dtype=torch.int32, device="meta")}, "padding.counts is on meta"),
        ({"value": torch.randn(2, 24, device="meta")}, "padding.value is on meta"),
    ],
)
def test_padding_that_does_not_fit_is_refused(change, named):
    inputs, key, value, lengths = operands(torch.float32)
    padding = replace(sk.Padding(key, value, torch.tensor(COUNTS)), **change)
    with pytest.raises(ValueError, match=r".") as caught:
        sk.packed_attention(*inputs, **lengths, padding=padding)
    assert named in str(caught.value)


def test_padding_comes_whole():
    (q, k, v, cu_q, cu_k), key, value, _ = operands(torch.float32)
    with pytest.raises(ValueError, match="one is missing"):
        torch.ops.sora.packed_attention(
            q, k, v, cu_q, cu_k, 70, 40, 0.2, None, 0, False, key, value, None, "auto"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["joined", "laid out"])
def test_two_ways_for_libraries_without_it(way, dtype):
    """Through the log-sum-exp, or as keys like the others. Both are the reference's result."""
    inputs, key, value, lengths = operands(dtype)
    padding = sk.Padding(key, value, torch.tensor(COUNTS, dtype=torch.int32))
    call = Operands(*inputs, *lengths.values(), 0.2, return_lse=True, padding=padding)

    def attend(call):
        assert call.padding is None
        return sk.packed_attention(
            call.q, call.k, call.v, call.cu_seqlens_q, call.cu_seqlens_k, scale=call.scale,
            max_seqlen_q=call.max_seqlen_q, max_seqlen_k=call.max_seqlen_k, return_lse=True,
            backend="reference",
        )  # fmt: skip

    out, lse = joined(attend, call) if way == "joined" else attend(laid_out(call))
    due, due_lse = sk.packed_attention(
        *(x.double() for x in inputs[:3]), *inputs[3:], **lengths, scale=0.2, return_lse=True,
        padding=sk.Padding(key.double(), value.double(), padding.counts), backend="reference",
    )  # fmt: skip
    error = 2e-6 if dtype == torch.float32 else 2e-2
    if way == "laid out" and dtype == torch.float32:
        # 509 equal addends are all rounded one way; how many in a row is the library's affair.
        error = max(COUNTS) * torch.finfo(dtype).eps / 4
    torch.testing.assert_close(out.double(), due, rtol=error, atol=error)
    torch.testing.assert_close(lse.double(), due_lse, rtol=error, atol=error)


def test_padding_is_joined_a_stretch_of_queries_at_a_time():
    """As in one piece: what is held in fp32 does not grow with the tokens."""
    rng = generator(5)
    lens = (ROWS - 3, 2 * ROWS - 90)
    q = torch.randn(sum(lens), 1, 4, generator=rng)
    k = torch.randn(4, 1, 4, generator=rng)
    padding = sk.Padding(k[0], k[1], torch.tensor([2, 300], dtype=torch.int32))
    call = Operands(q, k, k, offsets(lens), offsets([3, 1]), max(lens), 3, 1.0, padding=padding)

    def attend(call):
        return sk.packed_attention(
            call.q, call.k, call.v, call.cu_seqlens_q, call.cu_seqlens_k, scale=1.0,
            max_seqlen_q=max(lens), max_seqlen_k=3, return_lse=True,
        )  # fmt: skip

    out, lse = joined(attend, call)
    assert lse.numel() == 0
    due = sk.packed_attention(
        q, k, k, offsets(lens), offsets([3, 1]), scale=1.0, max_seqlen_q=max(lens), max_seqlen_k=3,
        padding=padding, backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(out, due)
