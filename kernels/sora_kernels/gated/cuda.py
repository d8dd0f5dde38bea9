"""Gated residual, normalisation and modulation by the kernel of `sora_kernels.modulate.cuda`, which
has never run on a GPU."""

from __future__ import annotations

from sora_kernels.dispatch import Case
from sora_kernels.gated.native import run
from sora_kernels.modulate.cuda import unsupported as no_norm

__all__ = ["run", "unsupported"]


def unsupported(case: Case) -> str | None:
    if "residual torch.float64" in case.traits:
        return "a float64 residual"
    return no_norm(case)
