"""`packed_attention`: what it takes, what it checks, and who serves it."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from sora_kernels.attention.operands import Operands, Padding
from sora_kernels.attention.plan import AttentionPlan
from sora_kernels.dispatch import Case, check_gradless, declare, needs_grad
from sora_kernels.library import register

OP = declare(
    "packed_attention",
    modules={
        "reference": "sora_kernels.attention.reference",
        "sdpa": "sora_kernels.attention.sdpa",
        "native": "sora_kernels.attention.native",
        "triton": "sora_kernels.attention.triton",
        "gluon": "sora_kernels.attention.gluon",
        "blackwell": "sora_kernels.attention.blackwell",
        "flash": "sora_kernels.attention.flash",
        "xformers": "sora_kernels.attention.xformers",
        "flex": "sora_kernels.attention.flex",
    },
    order={"cpu": ("native", "sdpa"), "cuda": ("triton", "sdpa")},
)

# Segments to this length are one (segment, head) a task, and not blocks of a long row.
SHORT = 64


@overload
def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
    plan: AttentionPlan | None = None,
    padding: Padding | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
    plan: AttentionPlan | None = None,
    padding: Padding | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
    plan: AttentionPlan | None = None,
    padding: Padding | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each segment's queries over the same segment's keys, without a mask.

    q: `[tokens_q, heads, head_dim]`; k, v: `[tokens_k, heads, head_dim]`, fp32, fp16 or bf16
    (fp64 by the reference), head_dim to 256; strided views serve without a copy where the last
    dimension is dense (and, by Triton, rows begin at multiples of 16 bytes). cu_seqlens_q,
    cu_seqlens_k: int32 or int64 `[segments + 1]`, from 0 to the number of tokens. max_seqlen_*: at
    least the longest segment. scale: by default head_dim ** -0.5. plan: of `plan_attention`, for
    calls that share offsets (backends that make none of their own ignore it). padding: one key
    more, which each segment sees as often as `Padding.counts` says.

    Returns `[tokens_q, heads, head_dim]` in q's dtype, and with `return_lse` the natural
    log-sum-exp of the scaled scores, float32 `[tokens_q, heads]` (float64 for float64 inputs).
    A query whose segment has no keys gives 0 and -inf; padding counts as keys.

    Raises ValueError for shapes, dtypes, devices and offsets that do not fit (offsets are read on
    the CPU alone) and KernelUnavailableError when a named backend cannot serve.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    tiles, block = (None, 0) if plan is None else (plan.tiles, plan.block)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    more = (None, None, None) if padding is None else (padding.key, padding.value, padding.counts)
    call = _op
    if needs_grad(q, k, v, *more):
        check_gradless(OP, backend)
        call, backend = run, "reference"
    out, lse = call(q, k, v, *lengths, scale, tiles, block, return_lse, *more, backend)
    return (out, lse) if return_lse else out


def takes_plan(q: Tensor, backend: str = "auto") -> bool:
    """Whether the backend that serves q's kind reads a plan, so that making one pays."""
    if q.device.type == "meta":  # no backend serves there: a named one would refuse
        return False
    return bool(getattr(OP.resolve(backend, Case.of(q)), "TAKES_PLAN", False))


def run(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Validate, dispatch, run: what the schema takes, the backend's name last. Returns an empty
    lse unless it was asked for."""
    *operands, backend = arguments
    call = Operands.of(*operands)
    call.check(OP.name)
    if call.q.device.type == "cpu":
        call.check_values(OP.name)
    short = max(call.max_seqlen_q, call.max_seqlen_k) <= SHORT
    case = Case.of(call.q, "lse" if call.return_lse else "", "short" if short else "")
    return OP.resolve(backend, case).run(call)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = Operands.of(*arguments[:-1])
    call.check(OP.name)
    dtype = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    return call.q.new_empty(call.q.shape), call.lse(dtype)


_op = register(
    OP.name,
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, Tensor? tiles, int block, "
    "bool return_lse, Tensor? padding_key, Tensor? padding_value, Tensor? padding_counts, "
    "str backend)"
    " -> (Tensor, Tensor)",
    run,
    _fake,
)
