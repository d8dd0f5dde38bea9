"""QK normalisation and rotary embedding by csrc/cuda: a block a token.

It compiles and its binding loads, but it **has never run on a GPU**: it serves when asked for by
name, and `auto` does not choose it.
"""

from __future__ import annotations

from torch import Tensor

from sora_kernels import csrc
from sora_kernels.dispatch import Case, KernelUnavailableError
from sora_kernels.rope import native
from sora_kernels.rope.operands import Operands

MAX_CHANNELS = 8192  # of all heads: four steps of 256 threads of eight channels


def unsupported(case: Case) -> str | None:
    if case.width % 16:
        return f"head_dim {case.width}; it takes multiples of 16"
    if "across heads" not in case.traits and case.width & (case.width - 1):
        return f"head_dim {case.width}; with a norm for each head it takes powers of two"
    return csrc.unsupported_on_cuda(case)


def run(call: Operands) -> tuple[Tensor, Tensor]:
    for x in (call.q, call.k):
        if x is not None and x.shape[1] * x.shape[2] > MAX_CHANNELS:
            raise KernelUnavailableError(
                f"qk_norm_rope: cuda cannot serve {x.shape[1]} heads of {x.shape[2]}; it takes "
                f"{MAX_CHANNELS} channels of all heads"
            )
    return native.run(call)
