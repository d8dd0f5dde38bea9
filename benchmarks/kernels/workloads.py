"""What the benchmarks time: each op at a shape of `shapes.py`, beside eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from shapes import DEVICE, DTYPE, Shape

import sora_kernels as sk

Call = Callable[[], object]


@dataclass(frozen=True)
class Work:
    """One op's call by a backend, the same in eager PyTorch, and the least bytes and FLOPs."""

    by: Callable[[str], Call]
    eager: Call
    size_bytes: float = 0
    flops: float = 0


def randn(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def modulated(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """As diffusers writes it: fp32 islands, one op at a time."""
    return (F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + scale) + shift).type_as(x)


def norm_modulate(shape: Shape) -> Work:
    x = randn(shape.tokens, shape.channels)
    scale, shift = (randn(1, shape.channels, dtype=torch.float32) for _ in range(2))
    return Work(
        lambda backend: lambda: sk.norm_modulate(x, scale, shift, backend=backend),
        lambda: modulated(x, scale, shift),
        size_bytes=2 * x.nbytes,
    )


def gate_residual_norm_modulate(shape: Shape) -> Work:
    x, residual = (randn(shape.tokens, shape.channels) for _ in range(2))
    tables = [randn(1, shape.channels, dtype=torch.float32) for _ in range(3)]
    gate, scale, shift = tables

    def eager() -> torch.Tensor:
        stream = (residual.float() + x * gate).type_as(residual)
        return modulated(stream, scale, shift)

    return Work(
        lambda backend: (
            lambda: sk.gate_residual_norm_modulate(x, residual, *tables, backend=backend)
        ),
        eager,
        size_bytes=4 * x.nbytes,
    )


def qk_norm_rope(shape: Shape) -> Work:
    q, k = (randn(shape.tokens, shape.heads, shape.head_dim) for _ in range(2))
    weight = randn(shape.channels)
    angle = randn(shape.tokens, shape.head_dim // 2, dtype=torch.float32)
    cos, sin = angle.cos(), angle.sin()

    def rotated(x: torch.Tensor) -> torch.Tensor:
        y = F.rms_norm(x.flatten(1), (shape.channels,), weight, 1e-6).view(x.shape)
        a, b = y.unflatten(-1, (-1, 2)).unbind(-1)
        out = torch.empty_like(y)
        out[..., 0::2] = a * cos[:, None] - b * sin[:, None]
        out[..., 1::2] = a * sin[:, None] + b * cos[:, None]
        return out

    return Work(
        lambda backend: (
            lambda: sk.qk_norm_rope(
                q, k, weight, weight, cos, sin, across_heads=True, backend=backend
            )
        ),
        lambda: (rotated(q), rotated(k)),
        size_bytes=4 * q.nbytes,
    )


def invariant_linear(shape: Shape) -> Work:
    """The feed-forward's first product with its GELU, beside the library's."""
    hidden = 4 * shape.channels
    x, weight, bias = (
        randn(shape.tokens, shape.channels),
        randn(hidden, shape.channels),
        randn(hidden),
    )
    return Work(
        lambda backend: lambda: sk.invariant_linear(x, weight, bias, gelu="tanh", backend=backend),
        lambda: F.gelu(F.linear(x, weight, bias), approximate="tanh"),
        flops=2 * shape.tokens * weight.numel(),
    )


def lora_linear(shape: Shape) -> Work:
    """An adapter of rank 32 for each half of the tokens, on a projection's result."""
    x, base = randn(shape.tokens, shape.channels), randn(shape.tokens, shape.channels)
    down, up = randn(32, shape.channels), randn(shape.channels, 32)
    half = shape.tokens // 2
    rows = [(0, half), (half, shape.tokens)]
    return Work(
        lambda backend: (
            lambda: sk.lora_linear(
                x, base, [down, down], [up, up], rows, [1.0, 0.5], backend=backend
            )
        ),
        lambda: torch.cat([x[a:b] @ down.T @ up.T for a, b in rows]).add_(base),
        flops=4 * shape.tokens * down.numel(),
    )


def quant_linear(shape: Shape) -> Work:
    """A feed-forward's first product, of a weight in blocks of Q8_0."""
    x = randn(shape.tokens, shape.channels)
    rows = torch.randint(0, 50, (4 * shape.channels, shape.channels // 32, 34), dtype=torch.uint8)
    raw = rows.flatten(1).to(x.device)
    dense = randn(4 * shape.channels, shape.channels)
    return Work(
        lambda backend: lambda: sk.quant_linear(x, raw, format="Q8_0", backend=backend),
        lambda: F.linear(x, dense),
        flops=2 * shape.tokens * dense.numel(),
    )


def temporal_attention(shape: Shape) -> Work:
    q, k, v = (randn(shape.tokens, shape.heads, shape.head_dim) for _ in range(3))
    grid = (shape.frames, 1, shape.positions)

    def eager() -> torch.Tensor:
        """STDiT's own form: (T S) to (S T), SDPA, and back."""
        turned = [
            x.unflatten(0, grid[::2]).transpose(0, 1).contiguous().transpose(1, 2)
            for x in (q, k, v)
        ]
        return F.scaled_dot_product_attention(*turned).permute(2, 0, 1, 3).contiguous()

    return Work(
        lambda backend: lambda: sk.temporal_attention(q, k, v, [grid], backend=backend),
        eager,
        flops=4 * shape.frames * shape.tokens * shape.channels,
    )


FUSED = {
    "norm_modulate": norm_modulate,
    "gate_residual_norm_modulate": gate_residual_norm_modulate,
    "qk_norm_rope": qk_norm_rope,
}
BY_SHAPE = {
    **FUSED,
    "invariant_linear": invariant_linear,
    "lora_linear": lora_linear,
    "quant_linear": quant_linear,
    "temporal_attention": temporal_attention,
}


def packed(lengths: list[int], heads: int, head_dim: int) -> tuple[list[torch.Tensor], Any]:
    tensors = [randn(sum(lengths), heads, head_dim) for _ in range(3)]
    cu = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
    return tensors, {
        "cu_seqlens_q": cu,
        "cu_seqlens_k": cu,
        "max_seqlen_q": max(lengths),
        "max_seqlen_k": max(lengths),
    }


LENGTHS = [300, 1100, 512, 37, 800] if torch.float32 == DTYPE else [4096, 16384, 8192, 333, 12000]


def packed_attention() -> tuple[Work, float]:
    """An uneven batch, beside dense SDPA on its longest segment alone; and the FLOPs of that."""
    heads, head_dim = 12, 128
    (q, k, v), lengths = packed(LENGTHS, heads, head_dim)
    longest = [randn(1, heads, max(LENGTHS), head_dim) for _ in range(3)]
    work = Work(
        lambda backend: lambda: sk.packed_attention(q, k, v, **lengths, backend=backend),
        lambda: F.scaled_dot_product_attention(*longest),
        flops=4 * heads * head_dim * sum(n * n for n in LENGTHS),
    )
    return work, 4 * heads * head_dim * max(LENGTHS) ** 2


def short_segments() -> Work:
    """Many segments of 34 tokens, which a kernel that scans its segments cannot bear."""
    count = 8192 if DEVICE.type == "cuda" else 240
    (q, k, v), lengths = packed([34] * count, 12, 64)

    def eager() -> torch.Tensor:
        dense = (x.unflatten(0, (count, 34)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*dense)

    return Work(
        lambda backend: lambda: sk.packed_attention(q, k, v, **lengths, backend=backend),
        eager,
        flops=4 * 34 * q.numel(),
        size_bytes=4 * q.nbytes,
    )
