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
    """The transformer's dtype by name; `"auto"` is bfloat16 on a GPU and float32 on a CPU, where
    `precision.settle_precision` may know better."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return _named("dtype", dtype)


def resolve_vae_dtype(
    vae_dtype: str | torch.dtype, device: torch.device, dtype: torch.dtype, backend: str
) -> torch.dtype:
    """The autoencoder's dtype by name. `"auto"` is `dtype`, the transformer's, on a GPU; and
    float32 on a CPU, where `precision.settle_precision` may know better, and for ONNX Runtime,
    whose graphs are in it.
    """
    if vae_dtype == "auto":
        return torch.float32 if device.type == "cpu" or backend == "onnx" else dtype
    found = _named("vae_dtype", vae_dtype)
    if backend == "onnx" and found != torch.float32:
        raise BackendError(
            f"vae_dtype {vae_dtype!r}: the graphs of vae_backend 'onnx' are in float32; "
            "vae_dtype='float32' would work"
        )
    return found


def _named(what: str, dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, str):
        dtype = DTYPES.get(_SHORT.get(dtype, dtype), dtype)
    if dtype not in DTYPES.values():
        kinds = ", as-stored or int8" if what == "dtype" else ""
        raise BackendError(
            f"{what} {dtype!r} is not supported; use auto, {', '.join(DTYPES)}{kinds}"
        )
    assert isinstance(dtype, torch.dtype)
    return dtype
