"""Devices and dtypes by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sora_engine.errors import BackendError


def resolve_device(device: str | torch.device) -> torch.device:
    """A device by name; `"auto"` is the GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        raise BackendError(f"device {device!r} is not one; use auto, cpu, cuda or cuda:N") from None
    if resolved.type not in ("cpu", "cuda"):
        raise BackendError(f"device {device!r} is not supported; use auto, cpu, cuda or cuda:N")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise BackendError(
            f"device {device!r} is not there: torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} GPUs"
        )
    return resolved


@contextmanager
def own_device() -> Iterator[None]:
    """Work, in this thread, as if its host had called no `torch.set_default_device`.

    What the engine makes without a word of where is on the CPU. (A default dtype is one for all
    threads: each tensor of floats that the engine makes says its own.)
    """
    if torch.get_default_device().type == "cpu":
        yield
    else:
        with torch.device("cpu"):
            yield


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """A dtype by name; `"auto"` is bfloat16 on a GPU and float32 on a CPU."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(dtype, str):
        dtype = DTYPES.get(_SHORT.get(dtype, dtype), dtype)
    if dtype not in DTYPES.values():
        raise BackendError(f"dtype {dtype!r} is not supported; use auto, {', '.join(DTYPES)}")
    assert isinstance(dtype, torch.dtype)
    return dtype
