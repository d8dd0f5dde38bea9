"""Guidance: how the conditional and the unconditional prediction become one."""

from __future__ import annotations

import torch


def needs_unconditional(scale: float) -> bool:
    """Whether a guidance scale takes an unconditional prediction at all."""
    return scale > 1.0


def cfg(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance, `uncond + scale (cond - uncond)` (arXiv 2207.12598).

    cond, uncond: one shape, any layout. Written in diffusers' order of operations.
    """
    return uncond + scale * (cond - uncond)
