"""`temporal_attention` and `spatial_attention`: what they take and check, and who serves them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sora_kernels import checks
from sora_kernels.attention.api import packed_attention
from sora_kernels.attention.operands import check_heads, check_scale
from sora_kernels.dispatch import Case, check_gradless, declare, needs_grad
from sora_kernels.grids import check_grids, check_tokens, flatten
from sora_kernels.library import register
from sora_kernels.transfer import to_device

OP = declare(
    "temporal_attention",
    modules={
        "reference": "sora_kernels.factorised.reference",
        "sdpa": "sora_kernels.factorised.sdpa",
        "native": "sora_kernels.factorised.native",
        "triton": "sora_kernels.factorised.triton",
    },
    order={"cpu": ("native", "sdpa"), "cuda": ("triton", "sdpa")},
)
SHORT = 64


def temporal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grids: Sequence[Sequence[int]],
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of each position over its own frames (ViViT's factorised form, arXiv 2103.15691).

    q, k, v: `[tokens, heads, head_dim]`, fp32, fp16 or bf16 (fp64 by the reference). grids: for
    each segment (frames, rows, columns), whose tokens lie in that order, frames outermost. A token
    attends to the tokens of its own row and column in all frames of its segment. Nothing is
    rearranged: a sequence is read with a stride of rows * columns tokens.

    Returns `[tokens, heads, head_dim]` in q's dtype. Raises ValueError for what does not fit and
    KernelUnavailableError when a named backend cannot serve.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    flat = flatten(OP.name, grids)
    if needs_grad(q, k, v):
        check_gradless(OP, backend)
        return run(q, k, v, flat, scale, "reference")
    return _op(q, k, v, flat, scale, backend)


def spatial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grids: Sequence[Sequence[int]],
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention inside each frame: packed attention whose segments are the frames.

    As `temporal_attention` in all else; the backends are those of `packed_attention`.
    """
    frames = [h * w for t, h, w in check_grids("spatial_attention", "grids", flatten(
        "spatial_attention", grids), None) for _ in range(t)]  # fmt: skip
    if sum(frames) != q.shape[0]:
        raise ValueError(f"spatial_attention: grids of {sum(frames)} tokens for {q.shape[0]}")
    frames = frames or [0]  # grids without a frame are a batch without a token
    longest = max(frames)
    offsets = torch.tensor([0, *frames]).cumsum(0).to(torch.int32)
    offsets = to_device(offsets, q.device)
    return packed_attention(
        q,
        k,
        v,
        offsets,
        offsets,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        scale=scale,
        backend=backend,
    )


def check(q: Tensor, k: Tensor, v: Tensor, flat: Sequence[int], scale: float) -> None:
    """Everything that metadata can tell."""
    op = OP.name
    check_heads(op, q, k, v)
    if k.shape != q.shape:
        raise ValueError(f"{op}: q {[*q.shape]}, k {[*k.shape]}; they must be equal")
    checks.check_device(op, q, k=k, v=v)
    check_tokens(op, check_grids(op, "grids", flat, None), q)
    check_scale(op, scale)


def run(q: Tensor, k: Tensor, v: Tensor, flat: Sequence[int], scale: float, backend: str) -> Tensor:
    """Validate, dispatch, run."""
    check(q, k, v, flat, scale)
    grids = check_grids(OP.name, "grids", flat, None)
    longest = max(t for t, _, _ in grids)
    module = OP.resolve(backend, Case.of(q, "short" if longest <= SHORT else ""))
    return module.run(q, k, v, grids, scale=scale)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, flat: Sequence[int], scale: float, backend: str
) -> Tensor:
    check(q, k, v, flat, scale)
    return q.new_empty(q.shape)


_op = register(
    OP.name,
    "(Tensor q, Tensor k, Tensor v, int[] grids, float scale, str backend) -> Tensor",
    run,
    _fake,
)
