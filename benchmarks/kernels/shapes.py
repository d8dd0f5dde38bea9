"""Shapes that the kernels meet in video models, and the machine's own rates to measure against."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

DEVICE = torch.device(os.environ.get("SORA_BENCH_DEVICE", "cpu"))
ON_CPU = DEVICE.type == "cpu"
DTYPE = torch.float32 if ON_CPU else torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """Tokens of one video and the model's heads. `frames` divide the tokens."""

    name: str
    frames: int
    positions: int
    heads: int
    head_dim: int

    @property
    def tokens(self) -> int:
        return self.frames * self.positions

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim


# 50 MB tensors on a CPU; whole videos on a device.
SHAPES = (
    [
        Shape("wan-1.3b", 16, 512, 12, 128),
        Shape("ltx", 16, 392, 32, 64),
        Shape("open-sora", 16, 672, 16, 72),
    ]
    if ON_CPU
    else [
        Shape("wan-1.3b-480p", 21, 1560, 12, 128),
        Shape("wan-14b-720p", 21, 3600, 40, 128),
        Shape("ltx-704x480", 21, 330, 32, 64),
        Shape("open-sora-720p", 16, 3600, 16, 72),
    ]
)


def synchronise() -> None:
    if not ON_CPU:
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], rounds: int = 7) -> float:
    """Median wall time of a call, warmed up."""
    call()
    times = []
    for _ in range(rounds):
        synchronise()
        start = time.perf_counter()
        call()
        synchronise()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def paired_ratio(
    baseline: Callable[[], object], candidate: Callable[[], object], rounds: int = 9
) -> float:
    """How many times faster the candidate is: the median of ratios of runs side by side."""
    baseline(), candidate()
    ratios = []
    for _ in range(rounds):
        ratios.append(seconds(baseline, 1) / seconds(candidate, 1))
    return sorted(ratios)[len(ratios) // 2]


def copy_rate() -> float:
    """Bytes a second, read plus write, of copying a large tensor onto another."""
    source = torch.randn(64 << 20 if not ON_CPU else 16 << 20, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def gemm_rate() -> float:
    """FLOP a second of a large product of random matrices."""
    n = 8192 if not ON_CPU else 1536
    a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b)
