"""What every Triton backend needs: whether it can serve, and dense operands."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sora_kernels.dispatch import Case

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_CHANNELS = 16384  # a row is held in registers


@functools.cache
def problem(device_type: str) -> str | None:
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    if device_type == "cuda":
        if torch.cuda.get_device_capability()[0] < 8:
            return "it needs compute capability 8.0"
        return None
    if device_type == "cpu" and triton.knobs.runtime.interpret:
        return None
    return f"Triton does not run on {device_type} (on a CPU: with TRITON_INTERPRET=1, for tests)"


def unsupported(case: Case) -> str | None:
    if case.dtype not in DTYPES:
        return f"{case.dtype} is not one of fp32, fp16 and bf16"
    return problem(case.device_type)


def unsupported_row(case: Case) -> str | None:
    if case.width > MAX_CHANNELS:
        return f"{case.width} channels; up to {MAX_CHANNELS} fit"
    return unsupported(case)


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension is dense, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
