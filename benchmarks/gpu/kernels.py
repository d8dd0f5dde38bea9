"""Part 1: the kernels alone. Needs torch and triton, nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from run_all import checks
from shapes import DEVICE, DTYPE, SHAPES, Shape
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import FUSED, invariant_linear, packed, short_segments

import sora_kernels as sk
from gpu.timing import DRY, figure, gbytes, milliseconds, small_milliseconds, tflops
from sora_kernels.launch import architecture

ROOT = Path(__file__).parents[2]
Figures = Iterator[dict[str, Any]]
TOY = [Shape("toy", 2, 32, 2, 64)]
GLUON = ("gluon", "blackwell")
"""Backends that wait for barriers of their own, and may hang: they run apart from the others."""


def rates() -> Figures:
    """What the machine is, and what its products and copies reach."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    yield figure("commit", commit.stdout.strip() or "unknown")
    gpu = DEVICE.type != "cpu"
    yield figure("device", torch.cuda.get_device_name() if gpu else "no GPU")
    yield figure("architecture", architecture(torch.device(DEVICE.type, 0) if gpu else DEVICE))
    yield figure("torch", torch.__version__)
    try:
        import triton

        yield figure("triton", triton.__version__)
    except ImportError as error:
        yield figure("triton", str(error))
    n = 256 if DRY else 8192
    a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in range(2))
    yield figure(f"GEMM {n}, {DTYPE}", tflops(2 * n**3, milliseconds(lambda: a @ b)))
    source = torch.randn(1 << (16 if DRY else 28), device=DEVICE)
    target = torch.empty_like(source)
    took = milliseconds(lambda: target.copy_(source))
    yield figure("copy", gbytes(2 * source.nbytes, took))


def compile_all() -> Figures:
    """Every kernel of the launch table for this card, compiled ahead."""
    from sora_kernels import aot

    major, minor = (9, 0) if DEVICE.type == "cpu" else torch.cuda.get_device_capability()
    pattern = f"causal.*/sm_{major}{minor}" if DRY else f"/sm_{major}{minor}"
    began = time.monotonic()
    rows, problems = aot.compile_all(pattern, lambda _: None)
    yield figure(f"kernels for sm_{major}{minor}", len(rows), "compiled")
    yield figure("seconds", round(time.monotonic() - began, 1), "s")
    for problem in problems:
        yield figure("problem", problem)


def checked(op: str, name: str, backend: str, dtype: torch.dtype, found: str) -> dict[str, Any]:
    """The line of a check, with what `gpu.admission` reads of it."""
    short = str(dtype).removeprefix("torch.")
    read = {"op": op, "backend": backend, "dtype": short, "right": found == "right"}
    return {**figure(f"{name}, {backend}, {short}", found), **read}


def numerics() -> Figures:
    """Each op by each backend that serves it here, against fp64 with FlashAttention's budget."""
    report = sk.backends(DEVICE.type)
    dtypes = [DTYPE] if DRY else [torch.bfloat16, torch.float16, torch.float32]
    for op, name, check in checks():
        for backend, problem in report[op].items():
            if backend == "reference" or problem is not None or backend in GLUON:
                continue  # Gluon comes later, in a process of its own
            for dtype in dtypes:
                try:
                    check(backend, DEVICE.type, dtype)
                    found = "right"
                except sk.KernelUnavailableError as error:
                    found = f"refused: {error}"
                except Exception as error:
                    found = f"WRONG: {type(error).__name__}: {str(error)[:200]}"
                yield checked(op, name, backend, dtype, found)


def attention() -> Figures:
    """TFLOP/s over one segment, over an uneven batch and over short segments."""
    backends = [name for name, why in sk.backends(DEVICE.type)["packed_attention"].items()
                if why is None and name not in ("reference", *GLUON)]  # fmt: skip
    for shape in TOY if DRY else SHAPES:
        yield from _whole(shape, backends)
    if DRY:
        return
    work = short_segments()
    for backend in backends:
        took = _tried(lambda backend=backend: milliseconds(work.by(backend)))
        yield figure(f"segments of 34, {backend}", _rate(work.flops, took))


def _whole(shape: Shape, backends: list[str], beside: bool = True) -> Figures:
    (q, k, v), lengths = packed([shape.tokens], shape.heads, shape.head_dim)
    flops = 4 * shape.tokens**2 * shape.channels
    for backend in backends:
        took = _tried(lambda backend=backend: milliseconds(
            lambda: sk.packed_attention(q, k, v, **lengths, backend=backend)))  # fmt: skip
        line = figure(f"{shape.name}, {backend}", _rate(flops, took))
        if not isinstance(took, str):
            line |= {"op": "packed_attention", "backend": backend, "shape": shape.name}
            line |= {"head_dim": shape.head_dim, "tflops": flops / took / 1e9}
        yield line
    if not beside:
        return
    dense = [x.transpose(0, 1)[None] for x in (q, k, v)]
    for name, kind in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("cuDNN", SDPBackend.CUDNN_ATTENTION),
    ):

        def rival(kind: SDPBackend = kind) -> float:
            with sdpa_kernel(kind):
                return milliseconds(lambda: F.scaled_dot_product_attention(*dense))

        yield figure(f"{shape.name}, PyTorch's {name}", _rate(flops, _tried(rival)))


def _tried(measure: Callable[[], float]) -> float | str:
    try:
        return measure()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"


def _rate(flops: float, took: float | str) -> str:
    return took if isinstance(took, str) else tflops(flops, took)


def fused() -> Figures:
    """GB/s of the element-wise ops, inside a CUDA graph so that no launch is timed; and what a
    product with fixed tiles takes beside the library's."""
    for shape in TOY if DRY else SHAPES:
        exact = invariant_linear(shape)
        for name, call in (("by a library", exact.eager), ("exact", exact.by("auto"))):
            took = _tried(partial(milliseconds, call))
            yield figure(f"product with GELU, {shape.name}, {name}", _rate(exact.flops, took))
        for op, make in FUSED.items():
            work = make(shape)
            for backend, problem in sk.backends(DEVICE.type)[op].items():
                if backend == "reference" or problem is not None:
                    continue
                took = _tried(partial(small_milliseconds, work.by(backend)))
                rate = took if isinstance(took, str) else gbytes(work.size_bytes, took)
                yield figure(f"{op}, {shape.name}, {backend}", rate)
            del work


def gluon_small() -> Figures:
    """A Gluon kernel at sizes that end at once: if it hangs, this process is killed."""
    if DEVICE.type == "cpu":
        from sora_kernels.testing.gluon.cases import cases, check

        for kernel in GLUON:
            for number, case in enumerate(cases(2, kernel)):
                check(case)
                yield figure(f"{kernel}, case {number}, on the emulator", "right")
        return
    for op, name, check in checks():
        for backend in GLUON if op == "packed_attention" else ():
            if sk.backends("cuda")[op][backend] is None:
                check(backend, "cuda", torch.bfloat16)
                yield checked(op, name, backend, torch.bfloat16, "right")


def gluon_speed() -> Figures:
    """TFLOP/s of this card's Gluon kernel over whole videos."""
    if DEVICE.type == "cpu":
        yield figure("speed", "the emulator has none")
        return
    report = sk.backends("cuda")["packed_attention"]
    here = [backend for backend in GLUON if report[backend] is None]
    for shape in SHAPES:
        if shape.head_dim in (64, 128):
            yield from _whole(shape, here, beside=False)


def racecheck() -> Figures:
    """The Gluon kernel's barriers under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or DEVICE.type == "cpu":
        yield figure("compute-sanitizer", "not here" if tool is None else "needs a GPU")
        return
    command = [tool, "--tool", "racecheck", sys.executable, str(ROOT / "benchmarks" / "gpu_day.py")]
    run = subprocess.run(
        [*command, "--stage", "gpu.kernels:gluon_small"],
        capture_output=True,
        text=True,
        check=False,
    )
    last = [line for line in run.stdout.splitlines() if "RACECHECK" in line or "ERROR" in line]
    yield figure("racecheck", last[-1] if last else f"exit code {run.returncode}")


def cuda_sources() -> Figures:
    """csrc/cuda built for this card in a copy, and its ops against fp64."""
    if shutil.which("nvcc") is None or DEVICE.type == "cpu":
        yield figure("nvcc", "not here" if shutil.which("nvcc") is None else "needs a GPU")
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.so"))
        began = time.monotonic()
        subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=copy,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        yield figure("build", round(time.monotonic() - began, 1), "s")
        paths = os.pathsep.join(str(copy / part) for part in ("", "kernels", "benchmarks/kernels"))
        script = (
            "import torch, run_all\n"
            "for op, name, check in run_all.checks():\n"
            "    if op in ('norm_modulate', 'gate_residual_norm_modulate', 'qk_norm_rope'):\n"
            "        check('cuda', 'cuda', torch.bfloat16); print(name)\n"
        )
        run = subprocess.run(
            [sys.executable, "-c", script],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=False,
        )
        for name in run.stdout.split("\n"):
            if name:
                yield figure(name, "right")
        if run.returncode:
            yield figure("problem", run.stderr.strip().splitlines()[-1][:200])
