"""Which backend of attention is the faster on a CPU: csrc's own or PyTorch's SDPA."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sora_kernels import csrc
from sora_kernels.dispatch import OPS, Case

_preferred: dict[torch.dtype, str] = {}


def prefer(backends: Mapping[torch.dtype, str]) -> None:
    """Have `auto` take these backends ("native" or "sdpa") for sequences of more than 64 tokens of
    those dtypes, from now on: what a measurement on this machine has shown."""
    for dtype, backend in backends.items():
        if backend not in ("native", "sdpa"):
            raise ValueError(f"attention of {dtype} by {backend!r}; native and sdpa are known")
    if {**_preferred, **backends} == _preferred:
        return
    _preferred.update(backends)
    for op in OPS.values():
        if "attention" in op.name:
            op.choose_again()


def outrun_by_sdpa(case: Case) -> str | None:
    """Where SDPA's attention is, or may be, faster than csrc's on a CPU, of a case that both serve.

    Sequences to 64 tokens are the C++ kernel's anywhere. Over long ones `prefer` has the word.
    Without it: the C++ kernel's in fp32 with AVX-512, and in bf16 with AVX512-BF16 where the
    processor has no AMX, whose products of bf16 are in SDPA.
    """
    if "short" in case.traits:
        return None
    preferred = _preferred.get(case.dtype)
    if preferred is not None:
        return f"SDPA is measured faster here in {case.dtype}" if preferred == "sdpa" else None
    found = csrc.instruction_set() or ""
    if case.dtype == torch.float32 and found.startswith("avx512"):
        return None
    if case.dtype == torch.bfloat16 and found == "avx512bf16" and not _has_amx():
        return None
    return f"SDPA may be faster over long sequences of {case.dtype} with {found}"


def _has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())
