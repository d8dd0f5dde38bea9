"""Each op by each backend that is here, beside eager PyTorch.

`extra_info` of every benchmark has GB/s or TFLOP/s, the share of the machine's measured copy or
GEMM rate, and how many times faster than eager it ran (the median of ratios of paired runs).
SORA_BENCH_DEVICE=cuda runs on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shapes import DEVICE, SHAPES, Shape, paired_ratio, seconds, synchronise
from workloads import BY_SHAPE, Work, packed_attention, short_segments

import sora_kernels as sk

BACKENDS = {
    op: [name for name, why in reasons.items() if why is None and name != "reference"]
    for op, reasons in sk.backends(DEVICE).items()
}


def measure(benchmark: Any, machine: dict[str, float], work: Work, backend: str) -> None:
    call = work.by(backend)

    def once() -> None:
        call()
        synchronise()

    with torch.inference_mode():
        benchmark.pedantic(once, rounds=5, warmup_rounds=1)
        took = seconds(call)
        info = benchmark.extra_info
        info["times eager"] = round(paired_ratio(work.eager, call), 2)
        if work.size_bytes:
            info["GB/s"] = round(work.size_bytes / took / 1e9, 1)
            info["% of copy"] = round(100 * work.size_bytes / took / machine["copy"])
        if work.flops:
            info["TFLOP/s"] = round(work.flops / took / 1e12, 4)
            info["% of GEMM"] = round(100 * work.flops / took / machine["gemm"])
        print(benchmark.name, info)


@pytest.mark.parametrize(
    ("op", "shape", "backend"),
    [
        pytest.param(op, shape, backend, id=f"{op}-{shape.name}-{backend}")
        for op in BY_SHAPE
        for shape in SHAPES
        for backend in BACKENDS[op]
    ],
)
def test_op(benchmark, machine, op: str, shape: Shape, backend: str):
    measure(benchmark, machine, BY_SHAPE[op](shape), backend)


@pytest.mark.parametrize("backend", BACKENDS["packed_attention"])
def test_packed_attention(benchmark, machine, backend: str):
    """Useful FLOP/s of an uneven batch, beside dense SDPA on its longest segment alone."""
    work, dense_flops = packed_attention()
    measure(benchmark, machine, work, backend)
    ratio = benchmark.extra_info.pop("times eager") * work.flops / dense_flops
    benchmark.extra_info["% of dense SDPA's rate"] = round(100 * ratio)


@pytest.mark.parametrize("backend", BACKENDS["packed_attention"])
def test_many_short_segments(benchmark, machine, backend: str):
    measure(benchmark, machine, short_segments(), backend)
