"""`qk_norm_rope`: what it takes, what it checks, and who serves it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sora_kernels.dispatch import Case, check_gradless, declare, needs_grad
from sora_kernels.library import register
from sora_kernels.rope.operands import Operands

OP = declare(
    "qk_norm_rope",
    modules={
        "reference": "sora_kernels.rope.reference",
        "native": "sora_kernels.rope.native",
        "triton": "sora_kernels.rope.triton",
        "cuda": "sora_kernels.rope.cuda",
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


def run(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Validate, dispatch, run: what the schema takes, the backend's name last. Returns an empty k
    when there is none."""
    *operands, backend = arguments
    call = Operands(*operands)
    call.check(OP.name)
    return OP.resolve(backend, Case.of(call.q, "across heads" if call.across_heads else "")).run(
        call
    )


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = Operands(*arguments[:-1])
    call.check(OP.name)
    return call.each(lambda x, _: x.new_empty(x.shape))


_op = register(
    OP.name,
    "(Tensor q, Tensor? k, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, "
    "bool across_heads, bool interleaved, float eps, str backend) -> (Tensor, Tensor)",
    run,
    _fake,
)
