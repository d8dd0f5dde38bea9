"""Normalisation and modulation by csrc/cuda: a block a token, its row in registers.

It compiles and its binding loads, but it **has never run on a GPU**: it serves when asked for by
name, and `auto` does not choose it.
"""

from __future__ import annotations

from sora_kernels import csrc
from sora_kernels.dispatch import Case
from sora_kernels.modulate.native import run

__all__ = ["run", "unsupported"]

MAX_CHANNELS = 8192  # kMaxChannels of csrc/cuda/norm.h


def unsupported(case: Case) -> str | None:
    if case.width % 8 or case.width > MAX_CHANNELS:
        return f"{case.width} channels; it takes multiples of 8 up to {MAX_CHANNELS}"
    return csrc.unsupported_on_cuda(case)
