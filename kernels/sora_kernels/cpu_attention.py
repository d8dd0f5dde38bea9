"""Which backend of attention is the faster on a CPU: csrc's own or PyTorch's SDPA."""

from __future__ import annotations

import torch

from sora_kernels import csrc
from sora_kernels.dispatch import Case


def outrun_by_sdpa(case: Case) -> str | None:
    """Where SDPA's attention may be faster than csrc's on a CPU, of a case that both serve.

    Sequences to 64 tokens are the C++ kernel's anywhere. It is measured faster over long ones in
    fp32 with AVX-512; processors with products of bf16 have them in SDPA.
    """
    if "short" in case.traits or (
        case.dtype == torch.float32 and csrc.instruction_set() == "avx512"
    ):
        return None
    return f"SDPA may be faster over long sequences of {case.dtype} with {csrc.instruction_set()}"
