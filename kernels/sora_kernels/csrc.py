"""The library built from csrc, loaded on first use: `torch.ops.sora.native_*`."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from sora_kernels.dispatch import Case

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def problem() -> str | None:
    """Loads the library. Returns why it cannot be used, or None."""
    found = sorted(Path(__file__).parent.glob("_native*.so"))
    if not found:
        return "the native library is not built; run `python setup.py build_ext --inplace`"
    try:
        torch.ops.load_library(found[-1])
    except OSError as error:
        return f"{found[-1].name} does not load (built for another torch?): {error}"
    return None


def unsupported(case: Case) -> str | None:
    """What every native op needs."""
    if case.device_type != "cpu":
        return f"the native kernels run on the CPU, not on {case.device_type}"
    if case.dtype not in DTYPES:
        return f"{case.dtype} is not one of fp32, fp16 and bf16"
    return problem()


def instruction_set() -> str | None:
    """The instruction set that the native kernels use here: baseline, avx2 or avx512."""
    return torch.ops.sora.native_isa() if problem() is None else None
