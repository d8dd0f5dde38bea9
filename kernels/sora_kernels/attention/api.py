"""`packed_attention`: what it takes, what it checks, and who serves it."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from sora_kernels import checks
from sora_kernels.attention.plan import AttentionPlan
from sora_kernels.dispatch import Case, check_gradless, declare, needs_grad
from sora_kernels.library import register
from sora_kernels.segments import offsets_of

OP = declare(
    "packed_attention",
    modules={
        "reference": "sora_kernels.attention.reference",
        "sdpa": "sora_kernels.attention.sdpa",
        "native": "sora_kernels.attention.native",
        "triton": "sora_kernels.attention.triton",
        "gluon": "sora_kernels.attention.gluon",
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
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each segment's queries over the same segment's keys, without a mask.

    q: `[tokens_q, heads, head_dim]`; k, v: `[tokens_k, heads, head_dim]`, fp32, fp16 or bf16
    (fp64 by the reference), head_dim to 256; strided views serve without a copy where the last
    dimension is dense. cu_seqlens_q, cu_seqlens_k: int32 or int64 `[segments + 1]`, from 0 to the
    number of tokens. max_seqlen_*: at least the longest segment. scale: by default
    head_dim ** -0.5. plan: of `plan_attention`, for calls that share offsets (backends that make
    none of their own ignore it).

    Returns `[tokens_q, heads, head_dim]` in q's dtype, and with `return_lse` the natural
    log-sum-exp of the scaled scores, float32 `[tokens_q, heads]` (float64 for float64 inputs).
    A query whose segment has no keys gives 0 and -inf.

    Raises ValueError for shapes, dtypes, devices and offsets that do not fit (offsets are read on
    the CPU alone) and KernelUnavailableError when a named backend cannot serve.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    tiles, block = (None, 0) if plan is None else (plan.tiles, plan.block)
    if needs_grad(q, k, v):
        check_gradless(OP, backend)
        backend = "reference"
        call = run
    else:
        call = _op
    out, lse = call(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale,
        tiles,
        block,
        return_lse,
        backend,
    )
    return (out, lse) if return_lse else out


def takes_plan(q: Tensor, backend: str = "auto") -> bool:
    """Whether the backend that serves q's kind reads a plan, so that making one pays."""
    return bool(getattr(OP.resolve(backend, Case.of(q)), "TAKES_PLAN", False))


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    tiles: Tensor | None,
) -> None:
    """Everything that metadata can tell."""
    op = OP.name
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.check_packed_heads(op, name, tensor)
        checks.check_float(op, name, tensor, like=q)
    if k.shape != v.shape or k.shape[1:] != q.shape[1:]:
        raise ValueError(
            f"{op}: q {[*q.shape]}, k {[*k.shape]}, v {[*v.shape]}; "
            "k and v must be equal in shape, and equal to q in heads and head_dim"
        )
    checks.check_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q)
    checks.check_cu_seqlens(op, "cu_seqlens_k", cu_seqlens_k)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"{op}: cu_seqlens_q has {cu_seqlens_q.shape[0]} offsets, "
            f"cu_seqlens_k {cu_seqlens_k.shape[0]}; they must be as many"
        )
    checks.check_device(op, q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if max_seqlen_q < 0 or max_seqlen_k < 0:
        raise ValueError(f"{op}: max_seqlen_q {max_seqlen_q}, max_seqlen_k {max_seqlen_k} below 0")
    if not 0 < scale < float("inf"):
        raise ValueError(f"{op}: scale {scale}; a positive number is due")
    if tiles is not None:
        checks.check_device(op, q, plan=tiles)
        if tiles.dtype != torch.int32 or tiles.dim() != 2 or tiles.shape[1] != 2:
            raise ValueError(
                f"{op}: a plan of {tiles.dtype} {[*tiles.shape]}; int32 [tiles, 2] is due"
            )


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    tiles: Tensor | None,
    block: int,
    return_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Validate, dispatch, run. Returns an empty lse unless it was asked for."""
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, tiles)
    q_offsets = k_offsets = None
    if q.device.type == "cpu":
        q_offsets, k_offsets = offsets_of(cu_seqlens_q), offsets_of(cu_seqlens_k)
        checks.check_offsets(OP.name, "cu_seqlens_q", q_offsets, q.shape[0], max_seqlen_q)
        checks.check_offsets(OP.name, "cu_seqlens_k", k_offsets, k.shape[0], max_seqlen_k)
    short = max(max_seqlen_q, max_seqlen_k) <= SHORT
    case = Case.of(q, "lse" if return_lse else "", "short" if short else "")
    module = OP.resolve(backend, case)
    return module.run(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        scale=scale,
        return_lse=return_lse,
        q_offsets=q_offsets,
        k_offsets=k_offsets,
        tiles=tiles,
        block=block,
    )


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    tiles: Tensor | None,
    block: int,
    return_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, tiles)
    lse = q.new_empty(q.shape[:2] if return_lse else (0,), dtype=lse_dtype(q.dtype))
    return q.new_empty(q.shape), lse


_op = register(
    OP.name,
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, Tensor? tiles, int block, "
    "bool return_lse, str backend)"
    " -> (Tensor, Tensor)",
    run,
    _fake,
)
