"""`torch.ops.sora.*`: schemas, fakes, and `torch.compile` of a block without a graph break."""

from __future__ import annotations

import pytest
import torch

import sora_kernels as sk
from sora_kernels.testing import generator, offsets

RNG = generator(0)
TOKENS, HEADS, WIDTH = 24, 2, 16
Q, K, V = (torch.randn(TOKENS, HEADS, WIDTH, generator=RNG) for _ in range(3))
X = torch.randn(TOKENS, HEADS * WIDTH, generator=RNG)
TABLE = torch.randn(3, HEADS * WIDTH, generator=RNG)
INDEX = torch.arange(TOKENS) % 3
CU = offsets([10, 0, 14])
GRIDS = [(2, 1, 5), (0, 1, 1), (2, 1, 7)]
FLAT = [extent for grid in GRIDS for extent in grid]
ANGLE = torch.randn(TOKENS, WIDTH // 2, generator=RNG)

CALLS = {
    "packed_attention": (
        Q, K, V, CU, CU, 14, 14, 0.25, None, 0, True, K[0], V[0], torch.tensor([5, 0, 1]), "auto",
    ),
    "norm_modulate": (X, TABLE, TABLE, INDEX, "layer", None, None, 1e-6, "auto"),
    "gate_residual_norm_modulate": (
        X, X, TABLE, TABLE, None, INDEX, "rms", TABLE[0], None, 1e-6, "auto",
    ),
    "causal_norm_silu": (
        X.view(2, 3, 4, -1), X.view(2, 3, 4, -1)[:, :2], TABLE[0], TABLE[1], 1e-6, 1, 1, 3, "auto",
    ),
    "group_norm": (X.view(2, 12, -1), 4, TABLE[0], TABLE[1], 1e-6, True, "auto"),
    "invariant_linear": (X, X[:3].contiguous(), X[0, :3].contiguous(), "tanh", "auto"),
    "lora_linear": (
        X, X, [TABLE, TABLE[:1]], [TABLE.T, TABLE[:1].T], [0, 9, 5, TOKENS], [1.0, 0.5], "auto",
    ),
    "quant_linear": (
        X, X[:3].to(torch.int8), TABLE[:3, :1].contiguous(), None, "int8", "", "auto",
    ),
    "qk_norm_rope": (Q, K, None, None, ANGLE.cos(), ANGLE.sin(), True, True, 1e-6, "auto"),
    "temporal_attention": (Q, K, V, FLAT, 0.25, "auto"),
    "windowed_attention": (
        Q, K, V, CU, FLAT, FLAT, [0] * 9, [3, 1, 3], 0.25, [], [], "auto",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.sora, name).default, CALLS[name])


def block(x, residual, q, k, v, table, index, cu, cos, sin):
    y = sk.norm_modulate(x, table, table, index)
    q, k = sk.qk_norm_rope(q, k, None, None, cos, sin, across_heads=False)
    a, lse = sk.packed_attention(q, k, v, cu, cu, max_seqlen_q=14, max_seqlen_k=14, return_lse=True)
    b = sk.temporal_attention(q, k, v, GRIDS) + sk.windowed_attention(q, k, v, cu, GRIDS, (3, 1, 3))
    residual, y = sk.gate_residual_norm_modulate(
        (a + b).flatten(1) + y, residual, table, table, table, index
    )
    return residual, y, lse


def test_a_block_compiles_whole_and_says_the_same():
    inputs = (X, X * 2, Q, K, V, TABLE, INDEX, CU, ANGLE.cos(), ANGLE.sin())
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for got, expected in zip(compiled(*inputs), block(*inputs), strict=True):
            torch.testing.assert_close(got, expected)


def test_ops_mutate_nothing():
    """Every schema is functional: Inductor may reorder and reuse calls."""
    for name in CALLS:
        schema = getattr(torch.ops.sora, name).default._schema
        assert not schema.is_mutable
