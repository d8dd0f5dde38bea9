"""QK normalisation and rotary embedding in plain PyTorch, in fp32 or fp64. Differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels.dispatch import Case
from sora_kernels.rope.operands import Operands


def unsupported(case: Case) -> str | None:
    return None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate channel pairs. x: `[tokens, heads, head_dim]`; cos, sin: `[tokens, head_dim / 2]`."""
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)
    half = x.shape[-1] // 2
    if interleaved:
        a, b = x.unflatten(-1, (half, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def _norm_rope(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    across_heads: bool,
    interleaved: bool,
    eps: float,
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = None if weight is None else weight.to(wide)
    if across_heads:
        y = x.to(wide).flatten(1)
        y = F.rms_norm(y, y.shape[-1:], weight, eps).unflatten(1, x.shape[1:])
    else:
        y = F.rms_norm(x.to(wide), x.shape[-1:], weight, eps)
    if cos is not None and sin is not None:
        y = rotate(y, cos, sin, interleaved)
    return y.to(x.dtype).contiguous()


def run(call: Operands) -> tuple[Tensor, Tensor]:
    rotation = call.cos, call.sin, call.across_heads, call.interleaved, call.eps
    return call.each(lambda x, weight: _norm_rope(x, weight, *rotation))
