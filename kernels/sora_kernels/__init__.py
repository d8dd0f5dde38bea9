"""Packed spacetime attention and fused adaLN kernels, each beside its PyTorch reference.

Every op takes packed tensors (`[tokens, heads, head_dim]` or `[tokens, channels]`) and a `backend`:
`"auto"` picks the best that can serve, once per device and shape class, and logs it; a backend
asked for by name serves or raises `KernelUnavailableError`, and never falls back. Every op is also
registered as `torch.ops.sora.<op>`.

Gradients flow through `backend="reference"` alone; `"auto"` picks it when an input requires grad.
"""

from sora_kernels.attention.api import packed_attention, takes_plan
from sora_kernels.attention.operands import Padding
from sora_kernels.attention.plan import AttentionPlan, plan_attention
from sora_kernels.causal.api import causal_norm_silu
from sora_kernels.dispatch import KernelUnavailableError, backends
from sora_kernels.factorised.api import spatial_attention, temporal_attention
from sora_kernels.gated.api import gate_residual_norm_modulate
from sora_kernels.grouped.api import group_norm
from sora_kernels.invariant.api import invariant_linear
from sora_kernels.lora.api import lora_linear
from sora_kernels.modulate.api import norm_modulate
from sora_kernels.quant.api import quant_linear
from sora_kernels.rope.api import qk_norm_rope
from sora_kernels.windowed.api import windowed_attention
from sora_kernels.windowed.plan import BlockPlan

__all__ = [
    "AttentionPlan",
    "BlockPlan",
    "KernelUnavailableError",
    "Padding",
    "backends",
    "causal_norm_silu",
    "gate_residual_norm_modulate",
    "group_norm",
    "invariant_linear",
    "lora_linear",
    "norm_modulate",
    "packed_attention",
    "plan_attention",
    "qk_norm_rope",
    "quant_linear",
    "spatial_attention",
    "takes_plan",
    "temporal_attention",
    "windowed_attention",
]
