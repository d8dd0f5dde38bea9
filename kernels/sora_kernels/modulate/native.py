"""Normalisation and modulation by csrc/cpu: one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from sora_kernels import csrc
from sora_kernels.dispatch import Case


def unsupported(case: Case) -> str | None:
    return csrc.unsupported(case)


def run(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    *,
    kind: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    return torch.ops.sora.native_norm_modulate(x, scale, shift, index, kind, weight, bias, eps)
