"""`qk_norm_rope`: what it takes, what it checks, and who serves it."""

from __future__ import annotations

import torch
from torch import Tensor

from sora_kernels import checks
from sora_kernels.dispatch import Case, check_gradless, declare, needs_grad
from sora_kernels.library import register

OP = declare(
    "qk_norm_rope",
    modules={
        "reference": "sora_kernels.rope.reference",
        "native": "sora_kernels.rope.native",
        "triton": "sora_kernels.rope.triton",
    },
    order={"cpu": ("native",), "cuda": ("triton",)},
)


def qk_norm_rope(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    across_heads: bool,
    interleaved: bool = True,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """RMS-normalise queries and keys and rotate them (QK norm, arXiv 2010.04245; RoPE, 2104.09864).

    q, k: `[tokens, heads, head_dim]`, fp32, fp16 or bf16 (fp64 by the reference), strided views
    allowed; k None normalises the queries alone. q_weight, k_weight: `[heads * head_dim]` with
    `across_heads` (one norm over all heads, as Wan has it), else `[head_dim]`; None is 1.
    cos, sin: float32 `[tokens, head_dim / 2]`, shared by all heads; None leaves the rotation out.
    interleaved rotates channels (2i, 2i + 1); otherwise (i, i + head_dim / 2).

    Returns new q and k in their dtypes, dense; arithmetic is fp32, rounded once.
    Raises ValueError for what does not fit and KernelUnavailableError when a named backend
    cannot serve.
    """
    if needs_grad(q, k, q_weight, k_weight, cos, sin):
        check_gradless(OP, backend)
        call, backend = run, "reference"
    else:
        call = _op
    q_out, k_out = call(q, k, q_weight, k_weight, cos, sin, across_heads, interleaved, eps, backend)
    return q_out, None if k is None else k_out


def check(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    across_heads: bool,
) -> None:
    """Everything that metadata can tell."""
    op = OP.name
    checks.check_packed_heads(op, "q", q)
    checks.check_float(op, "q", q)
    head_dim = q.shape[2]
    checks.check_vector(op, "q_weight", q_weight, head_dim * (q.shape[1] if across_heads else 1))
    if k is None:
        if k_weight is not None:
            raise ValueError(f"{op}: k_weight without k")
    else:
        checks.check_packed_heads(op, "k", k)
        checks.check_float(op, "k", k, like=q)
        if k.shape[0] != q.shape[0] or k.shape[2] != head_dim:
            raise ValueError(
                f"{op}: q {[*q.shape]}, k {[*k.shape]}; tokens and head_dim must be equal"
            )
        checks.check_vector(
            op, "k_weight", k_weight, head_dim * (k.shape[1] if across_heads else 1)
        )
    if (cos is None) != (sin is None):
        raise ValueError(f"{op}: cos and sin come together or not at all")
    if cos is not None and sin is not None:
        if head_dim % 2:
            raise ValueError(f"{op}: head_dim {head_dim} is odd; rotation pairs channels")
        for name, table in (("cos", cos), ("sin", sin)):
            if table.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"{op}: {name} is {table.dtype}; float32 is due")
            if table.dim() != 2 or tuple(table.shape) != (q.shape[0], head_dim // 2):
                raise ValueError(
                    f"{op}: {name} has shape {[*table.shape]}; "
                    f"[{q.shape[0]}, {head_dim // 2}] is due"
                )
    checks.check_device(op, q, k=k, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin)


def run(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    across_heads: bool,
    interleaved: bool,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Validate, dispatch, run. Returns an empty k when there is none."""
    check(q, k, q_weight, k_weight, cos, sin, across_heads)
    module = OP.resolve(backend, Case.of(q, "across heads" if across_heads else ""))
    return module.run(
        q,
        k,
        q_weight,
        k_weight,
        cos,
        sin,
        across_heads=across_heads,
        interleaved=interleaved,
        eps=eps,
    )


def _fake(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    across_heads: bool,
    interleaved: bool,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check(q, k, q_weight, k_weight, cos, sin, across_heads)
    return q.new_empty(q.shape), q.new_empty((0,) if k is None else k.shape)


_op = register(
    OP.name,
    "(Tensor q, Tensor? k, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, "
    "bool across_heads, bool interleaved, float eps, str backend) -> (Tensor, Tensor)",
    run,
    _fake,
)
