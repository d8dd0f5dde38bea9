"""Each op by each backend that is here, beside eager PyTorch.

`extra_info` of every benchmark has GB/s or TFLOP/s, the share of the machine's measured copy or
GEMM rate, and how many times faster than eager it ran (the median of ratios of paired runs).
SORA_BENCH_DEVICE=cuda runs on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shapes import DEVICE, DTYPE, SHAPES, Shape, paired_ratio, seconds, synchronise

import sora_kernels as sk

BACKENDS = {
    op: [name for name, why in reasons.items() if why is None and name != "reference"]
    for op, reasons in sk.backends(DEVICE).items()
}


def cases(op: str) -> list[Any]:
    return [
        pytest.param(shape, backend, id=f"{shape.name}-{backend}")
        for shape in SHAPES
        for backend in BACKENDS[op]
    ]


def randn(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def measure(
    benchmark: Any,
    machine: dict[str, float],
    call: Callable[[], object],
    eager: Callable[[], object],
    *,
    size_bytes: float = 0,
    flops: float = 0,
) -> None:
    def once() -> None:
        call()
        synchronise()

    with torch.inference_mode():
        benchmark.pedantic(once, rounds=5, warmup_rounds=1)
        took = seconds(call)
        info = benchmark.extra_info
        info["times eager"] = round(paired_ratio(eager, call), 2)
        if size_bytes:
            info["GB/s"] = round(size_bytes / took / 1e9, 1)
            info["% of copy"] = round(100 * size_bytes / took / machine["copy"])
        if flops:
            info["TFLOP/s"] = round(flops / took / 1e12, 4)
            info["% of GEMM"] = round(100 * flops / took / machine["gemm"])
        print(benchmark.name, info)


def modulated(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """As diffusers writes it: fp32 islands, one op at a time."""
    return (F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + scale) + shift).type_as(x)


@pytest.mark.parametrize(("shape", "backend"), cases("norm_modulate"))
def test_norm_modulate(benchmark, machine, shape: Shape, backend: str):
    x = randn(shape.tokens, shape.channels)
    scale, shift = (randn(1, shape.channels, dtype=torch.float32) for _ in range(2))
    measure(
        benchmark,
        machine,
        lambda: sk.norm_modulate(x, scale, shift, backend=backend),
        lambda: modulated(x, scale, shift),
        size_bytes=2 * x.nbytes,
    )


@pytest.mark.parametrize(("shape", "backend"), cases("gate_residual_norm_modulate"))
def test_gate_residual_norm_modulate(benchmark, machine, shape: Shape, backend: str):
    x, residual = (randn(shape.tokens, shape.channels) for _ in range(2))
    gate, scale, shift = (randn(1, shape.channels, dtype=torch.float32) for _ in range(3))

    def eager() -> torch.Tensor:
        stream = (residual.float() + x * gate).type_as(residual)
        return modulated(stream, scale, shift)

    measure(
        benchmark,
        machine,
        lambda: sk.gate_residual_norm_modulate(x, residual, gate, scale, shift, backend=backend),
        eager,
        size_bytes=4 * x.nbytes,
    )


@pytest.mark.parametrize(("shape", "backend"), cases("qk_norm_rope"))
def test_qk_norm_rope(benchmark, machine, shape: Shape, backend: str):
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

    measure(
        benchmark,
        machine,
        lambda: sk.qk_norm_rope(q, k, weight, weight, cos, sin, across_heads=True, backend=backend),
        lambda: (rotated(q), rotated(k)),
        size_bytes=4 * q.nbytes,
    )


@pytest.mark.parametrize(("shape", "backend"), cases("temporal_attention"))
def test_temporal_attention(benchmark, machine, shape: Shape, backend: str):
    q, k, v = (randn(shape.tokens, shape.heads, shape.head_dim) for _ in range(3))
    grid = (shape.frames, 1, shape.positions)

    def eager() -> torch.Tensor:
        """STDiT's own form: (T S) to (S T), SDPA, and back."""
        turned = [
            x.unflatten(0, grid[::2]).transpose(0, 1).contiguous().transpose(1, 2)
            for x in (q, k, v)
        ]
        return F.scaled_dot_product_attention(*turned).permute(2, 0, 1, 3).contiguous()

    measure(
        benchmark,
        machine,
        lambda: sk.temporal_attention(q, k, v, [grid], backend=backend),
        eager,
        flops=4 * shape.frames * shape.tokens * shape.channels,
    )


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


@pytest.mark.parametrize("backend", [b for b in BACKENDS["packed_attention"] if b != "native"])
def test_packed_attention(benchmark, machine, backend: str):
    """Useful FLOP/s of an uneven batch, beside dense SDPA on its longest segment alone."""
    heads, head_dim = 12, 128
    (q, k, v), lengths = packed(LENGTHS, heads, head_dim)
    longest = randn(1, heads, max(LENGTHS), head_dim)
    flops = 4 * heads * head_dim * sum(n * n for n in LENGTHS)
    dense_flops = 4 * heads * head_dim * max(LENGTHS) ** 2

    def dense() -> torch.Tensor:
        return F.scaled_dot_product_attention(longest, longest, longest)

    def call() -> torch.Tensor:
        return sk.packed_attention(q, k, v, **lengths, backend=backend)

    measure(benchmark, machine, call, dense, flops=flops)
    ratio = benchmark.extra_info.pop("times eager") * flops / dense_flops
    benchmark.extra_info["% of dense SDPA's rate"] = round(100 * ratio)


@pytest.mark.parametrize("backend", BACKENDS["packed_attention"])
def test_many_short_segments(benchmark, machine, backend: str):
    """Many segments of 34 tokens, which a kernel that scans its segments cannot bear."""
    count = 8192 if DEVICE.type == "cuda" else 240
    (q, k, v), lengths = packed([34] * count, 12, 64)

    def eager() -> torch.Tensor:
        dense = (x.unflatten(0, (count, 34)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*dense)

    measure(
        benchmark,
        machine,
        lambda: sk.packed_attention(q, k, v, **lengths, backend=backend),
        eager,
        flops=4 * 34 * q.numel(),
        size_bytes=4 * q.nbytes,
    )
