"""How stages time and tell: medians by Triton's own benchmark, with the L2 cache flushed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch

DRY = bool(os.environ.get("GPU_DAY_DRY_RUN"))


def figure(what: str, value: object, unit: str = "") -> dict[str, Any]:
    """A line of a result."""
    return {"what": what, "figure": f"{value} {unit}".strip()}


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call on the device, its launches included."""
    if not torch.cuda.is_available():
        return _on_the_host(call)
    from triton.testing import do_bench

    return float(do_bench(call, warmup=25, rep=200, return_mode="median"))


def small_milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call inside a CUDA graph: launches take longer than small ops do."""
    if not torch.cuda.is_available():
        return _on_the_host(call)
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(call, rep=100, return_mode="median"))


def _on_the_host(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return sorted(times)[1] * 1e3


def tflops(flops: float, took_ms: float) -> str:
    return f"{flops / took_ms / 1e9:.4g} TFLOP/s, {took_ms:.4g} ms"


def gbytes(size_bytes: float, took_ms: float) -> str:
    return f"{size_bytes / took_ms / 1e6:.4g} GB/s, {took_ms:.4g} ms"
