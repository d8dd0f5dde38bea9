"""`windowed_attention`: what it takes, what it checks, and who serves it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sora_kernels import checks
from sora_kernels.attention.operands import check_heads, check_scale
from sora_kernels.dispatch import Case, check_gradless, declare, needs_grad
from sora_kernels.grids import check_grids, check_tokens, flatten
from sora_kernels.library import register
from sora_kernels.segments import offsets_of
from sora_kernels.windowed.operands import Operands
from sora_kernels.windowed.plan import BlockPlan, check_window

OP = declare(
    "windowed_attention",
    modules={
        "reference": "sora_kernels.windowed.reference",
        "sdpa": "sora_kernels.windowed.sdpa",
        "triton": "sora_kernels.windowed.triton",
    },
    order={"cpu": ("sdpa",), "cuda": ("triton", "sdpa")},
)


def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    grids: Sequence[Sequence[int]],
    window: Sequence[int],
    *,
    key_grids: Sequence[Sequence[int]] | None = None,
    origins: Sequence[Sequence[int]] | None = None,
    scale: float | None = None,
    plan: BlockPlan | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of each token over a 3-D neighbourhood of itself, inside its segment.

    q: `[tokens_q, heads, head_dim]`; k, v: `[tokens_k, heads, head_dim]`, fp32, fp16 or bf16 (fp64
    by the reference). cu_seqlens: int32 or int64 `[segments + 1]` of the queries. grids: for each
    segment (frames, rows, columns), whose tokens lie in that order. window: odd extents in frames,
    rows and columns; a key counts if it is at most `extent // 2` away on every axis; -1 is the
    whole axis. Windows are cut off at the edges.

    Where queries are a shard of a video, `key_grids` are the grids of k and v, and `origins` the
    coordinates of each query grid's first token in them. plan: of `plan_attention` with the same
    grids and window, for calls that share them; if it was made with masks, they hold here.

    Returns `[tokens_q, heads, head_dim]` in q's dtype; a query without keys gives 0. Raises
    ValueError for what does not fit and KernelUnavailableError when a named backend cannot serve.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    flat = flatten(OP.name, grids)
    flat_keys = flat if key_grids is None else flatten(OP.name, key_grids)
    flat_origins = [0] * len(flat) if origins is None else flatten(OP.name, origins)
    tables: list[Tensor] = []
    shape: list[int] = []
    if plan is not None:
        asked = [flat, flat_keys, flat_origins, list(window)]
        made = [
            *(flatten(OP.name, of) for of in (plan.grids, plan.key_grids, plan.origins)),
            list(plan.window),
        ]
        for name, one, other in zip(
            ("grids", "key_grids", "origins", "window"), asked, made, strict=True
        ):
            if one != other:
                raise ValueError(f"{OP.name}: {name} {one}; the plan was made for {other}")
        tables = [plan.segments, plan.tiles, plan.blocks, plan.mask, plan.patterns, plan.bits]
        shape = list(plan.shape)
    grid_arguments = (flat, flat_keys, flat_origins, list(window), scale, tables, shape)
    if needs_grad(q, k, v):
        check_gradless(OP, backend)
        return run(q, k, v, cu_seqlens, *grid_arguments, "reference")
    return _op(q, k, v, cu_seqlens, *grid_arguments, backend)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    flat: Sequence[int],
    flat_keys: Sequence[int],
    flat_origins: Sequence[int],
    window: Sequence[int],
    scale: float,
) -> None:
    """Everything that metadata can tell."""
    op = OP.name
    check_heads(op, q, k, v)
    checks.check_cu_seqlens(op, "cu_seqlens", cu_seqlens)
    checks.check_device(op, q, k=k, v=v, cu_seqlens=cu_seqlens)
    check_window(op, window)
    check_tokens(op, check_grids(op, "grids", flat), q)
    check_tokens(op, check_grids(op, "key_grids", flat_keys), k)
    if not len(flat) == len(flat_keys) == len(flat_origins):
        raise ValueError(
            f"{op}: {len(flat) // 3} grids, {len(flat_keys) // 3} key_grids, "
            f"{len(flat_origins) // 3} origins; they must be as many"
        )
    check_scale(op, scale)


def run(*arguments: Any) -> Tensor:
    """Validate, dispatch, run: what the schema takes, the backend's name last."""
    q, k, v, cu_seqlens, flat, flat_keys, flat_origins, window, scale = arguments[:9]
    tables, shape, backend = arguments[9:]
    check(*arguments[:9])
    offsets = offsets_of(cu_seqlens) if q.device.type == "cpu" else None
    if offsets is not None:
        checks.check_offsets(OP.name, "cu_seqlens", offsets, q.shape[0], q.shape[0])
    reach = check_window(OP.name, window)
    place = (
        tuple(check_grids(OP.name, "grids", flat, offsets)),
        tuple(check_grids(OP.name, "key_grids", flat_keys)),
        tuple(check_grids(OP.name, "origins", flat_origins)),
    )
    plan = None
    if tables:
        segments, tiles, blocks, mask, patterns, bits = tables
        t, h, w = shape
        checks.check_device(OP.name, q, plan=segments)
        plan = BlockPlan(segments, tiles, blocks, mask, patterns, bits, (t, h, w), *place, reach)
    module = OP.resolve(backend, Case.of(q, "mask" if plan and plan.mask.numel() else ""))
    return module.run(Operands(q, k, v, *place, reach, scale, plan))


def _fake(*arguments: Any) -> Tensor:
    check(*arguments[:9])
    q: Tensor = arguments[0]
    return q.new_empty(q.shape)


_op = register(
    OP.name,
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int[] grids, int[] key_grids, "
    "int[] origins, int[] window, float scale, Tensor[] plan, int[] shape, str backend) -> Tensor",
    run,
    _fake,
)
