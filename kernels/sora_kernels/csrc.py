"""The library built from csrc, loaded on first use: `torch.ops.sora.native_*`."""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path

import torch

from sora_kernels.dispatch import Case
from sora_kernels.sources import digest

logger = logging.getLogger("sora_kernels")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PACKAGE = Path(__file__).parent
SOURCES = PACKAGE.parents[1] / "csrc"  # of a source tree; an installed package has none
BUILD = "python setup.py build_ext --inplace"
INSTALL = (
    "in an environment with torch, setuptools and a C++ compiler, `pip install "
    "--no-build-isolation .` in the project's sources builds it"
)
# csrc/bindings.cpp writes this and the digest of its sources into the library.
MARK = rb"sora_kernels csrc ([0-9a-f]{16})\0"


@functools.cache
def problem() -> str | None:
    """Loads the library. Returns why it cannot be used, or None.

    A library that was built from other sources than csrc has now is not loaded: ops that it lacks,
    or that take other arguments, would fail in the middle of a run.
    """
    found = sorted(PACKAGE.glob("_native*.so"))
    if not found:
        if not SOURCES.is_dir():
            return f"the native library is not in this installation; {INSTALL}"
        return f"the native library is not built; run `{BUILD}`"
    if is_stale(found[-1], SOURCES):
        why = f"{found[-1].name} was built from other sources than csrc has now; run `{BUILD}`"
        logger.warning("sora_kernels: the native library is left out: %s", why)
        return why
    try:
        torch.ops.load_library(found[-1])
    except OSError as error:
        mend = f"run `{BUILD}`" if SOURCES.is_dir() else INSTALL
        return f"{found[-1].name} does not load (built for another torch?): {error}; {mend}"
    return None


def is_stale(library: Path, sources: Path) -> bool:
    """Whether `library` was built from something else than `sources` hold. Without sources there
    is nothing to differ from: an installed package comes with its own library."""
    if not sources.is_dir():
        return False
    built_from = re.search(MARK, library.read_bytes())
    return built_from is None or built_from[1].decode() != digest(sources)


def unsupported(case: Case) -> str | None:
    """What every native op on the CPU needs."""
    if case.device_type != "cpu":
        return f"the native kernels run on the CPU, not on {case.device_type}"
    if case.dtype not in DTYPES:
        return f"{case.dtype} is not one of fp32, fp16 and bf16"
    return problem()


def unsupported_on_cuda(case: Case) -> str | None:
    """What every op of csrc/cuda needs."""
    if case.device_type != "cuda":
        return f"the CUDA kernels run on CUDA devices, not on {case.device_type}"
    if case.dtype not in DTYPES:
        return f"{case.dtype} is not one of fp32, fp16 and bf16"
    why = problem()
    if why is not None:
        return why
    if not has_cuda():
        return "the native library was built without nvcc, or for a CPU build of torch"
    if torch.cuda.get_device_capability(case.device_index)[0] < 8:
        return "it needs compute capability 8.0"
    return None


def has_cuda() -> bool:
    """Whether the library, which is loaded, holds the CUDA kernels."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("sora::native_norm_modulate", "CUDA")


def instruction_set() -> str | None:
    """The instruction set that the native kernels use here: baseline, avx2 or avx512."""
    return torch.ops.sora.native_isa() if problem() is None else None


def num_threads() -> int:
    """On how many threads the native kernels run, of those that PyTorch has; 0 without them."""
    return torch.ops.sora.native_threads() if problem() is None else 0
