"""The backends that a transformer names, and those that have served it."""

from __future__ import annotations

from typing import NamedTuple

import torch

import sora_kernels
from sora_engine.denoise.model import TransformerShape
from sora_engine.errors import BackendError
from sora_kernels.dispatch import OPS


class Backends(NamedTuple):
    """The backends of one forward pass: of the fused operations, and of attention."""

    fused: str
    attention: str


def served_backends(
    backends: Backends, shape: TransformerShape, device: torch.device, dtype: torch.dtype
) -> dict[str, list[str]]:
    """The backends of `sora_kernels` that have served such a transformer there, by op."""
    widths = {shape.inner_dim, shape.head_dim}
    found: dict[str, list[str]] = {}
    for name, op in OPS.items():
        wanted = backends.attention if "attention" in name else backends.fused
        served = {
            backend
            for asked, case, backend in op.served()
            if asked == wanted
            and case.device_type == device.type
            and case.dtype == dtype
            and case.width in widths
        }
        if served:
            found[name] = sorted(served)
    return found


def check_attention_backend(name: str, device: torch.device) -> None:
    """Raises BackendError unless attention can run there on this backend."""
    if name == "auto":  # and Triton need not be imported to be asked
        return
    found = sora_kernels.backends(device)["packed_attention"]
    if name not in found:
        raise BackendError(f"attention_backend must be auto, {', '.join(found)}, got {name!r}")
    reason = found[name]
    if reason is not None:
        raise BackendError(f"attention_backend {name!r} cannot serve on {device}: {reason}")


def exact_attention(device: torch.device, backend: str) -> str:
    """The attention that serves every batch alike, whatever its segments' lengths. Raises
    BackendError for a backend that does not promise that."""
    alike = ("sdpa", "reference") if device.type == "cpu" else ("triton", "gluon", "reference")
    if backend == "auto":  # it may choose by the length of what else is in the batch
        return alike[0]
    if backend not in alike:
        raise BackendError(
            f"exact=True: attention_backend {backend!r} promises no bits on {device.type}; auto, "
            f"{', '.join(alike)} do"
        )
    return backend
