"""The backends that a transformer names, and those that have served it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sora_engine.denoise.model import TransformerShape
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
