"""Windowed attention by torch's SDPA: a frame of queries against the frames in its reach.

The cost follows the window in time; inside the frames a mask does the rest, and frames with equal
neighbourhoods share it. Under a mask over whole frames, frames that see the same frames go together
and need no mask; under finer ones, a block of queries meets the keys that any of them sees.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels.dispatch import Case
from sora_kernels.grids import Grid
from sora_kernels.windowed.operands import Operands
from sora_kernels.windowed.plan import WHOLE, SegmentMask, masks_of, radii
from sora_kernels.windowed.reference import coordinates, visibility

BLOCK = 256  # queries at a time under a fine mask


def unsupported(case: Case) -> str | None:
    return "SDPA is kept to fp32, fp16 and bf16" if case.dtype == torch.float64 else None


def _frame_mask(
    grid: Grid, key_grid: Grid, origin: Grid, reach: Grid, device: torch.device
) -> Tensor:
    """Which keys of a frame each query of a frame sees: bool `[queries, keys]`."""
    at_q = coordinates((1, *grid[1:]), (0, *origin[1:]), device)
    at_k = coordinates((1, *key_grid[1:]), (0, 0, 0), device)
    limit = torch.tensor(reach, device=device)
    return ((at_q[:, None] - at_k[None]).abs() <= limit).all(-1)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """q: `[tokens_q, heads, head_dim]`; k, v: `[tokens_k, heads, head_dim]`."""
    result = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        scale=scale,
    )
    return result[0].transpose(0, 1)


def _rows(tensor: Tensor, indices: list[int]) -> Tensor:
    """Rows in rising order; without a copy where they are consecutive."""
    if indices[-1] - indices[0] + 1 == len(indices):
        return tensor[indices[0] : indices[-1] + 1]
    return tensor[torch.tensor(indices, device=tensor.device)]


def _by_frames(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, mask: SegmentMask, origin: int, reach: int,
    scale: float,
) -> None:  # fmt: skip
    """One segment under a mask over whole frames. `out` is written, and zero on entry."""
    frames, key_frames = mask.grid[0], mask.key_grid[0]
    if q.shape[0] == 0 or k.shape[0] == 0:
        return
    at_q, at_k = torch.arange(frames), torch.arange(key_frames)
    seen = mask.allowed.cpu()[at_q // mask.cell[0]][:, at_k // mask.cell[0]]
    seen &= (at_q[:, None] + origin - at_k[None]).abs() <= reach
    groups: dict[tuple[bool, ...], list[int]] = {}
    for frame, row in enumerate(seen.tolist()):
        groups.setdefault(tuple(row), []).append(frame)
    q, out = q.unflatten(0, (frames, -1)), out.unflatten(0, (frames, -1))
    k, v = k.unflatten(0, (key_frames, -1)), v.unflatten(0, (key_frames, -1))
    for row, members in groups.items():
        keys = [frame for frame in range(key_frames) if row[frame]]
        if not keys:
            continue
        seen_k, seen_v = _rows(k, keys).flatten(0, 1), _rows(v, keys).flatten(0, 1)
        part = _attend(_rows(q, members).flatten(0, 1), seen_k, seen_v, None, scale)
        out[torch.tensor(members, device=out.device)] = part.unflatten(0, (len(members), -1))


def _by_blocks(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, seen_by: Callable[[int, int], Tensor],
    scale: float,
) -> None:  # fmt: skip
    """One segment under any mask, a block of queries at a time."""
    for first in range(0, q.shape[0], BLOCK):
        rows = slice(first, min(first + BLOCK, q.shape[0]))
        seen = seen_by(first, rows.stop)
        keys = seen.any(0).nonzero()[:, 0]
        if len(keys) == 0:
            continue
        seen = seen[:, keys]
        blind = ~seen.any(1)
        part = _attend(q[rows], k[keys], v[keys], seen, scale)
        out[rows] = part.masked_fill(blind[:, None, None], 0.0)


def run(call: Operands) -> Tensor:
    q, k, v, window, scale = call.q, call.k, call.v, call.window, call.scale
    reach, masks = radii(window), masks_of(call.plan)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for i, rows, keys, grid, key_grid, origin in call.segments():
        if masks is not None:
            parts = q[rows], k[keys], v[keys], out[rows]
            if masks[i].grid[1] == 1 and window[1:] == (-1, -1) and masks[i].cell[2] == WHOLE:
                _by_frames(*parts, masks[i], origin[0], reach[0], scale)
            else:
                seen_by = visibility(grid, key_grid, origin, reach, masks[i], q.device)
                _by_blocks(*parts, seen_by, scale)
            continue
        q_frame, k_frame = grid[1] * grid[2], key_grid[1] * key_grid[2]
        if q_frame * k_frame == 0:
            continue
        mask = _frame_mask(grid, key_grid, origin, reach, q.device)
        blind = ~mask.any(1)
        whole = bool(mask.all())
        for frame in range(grid[0]):
            first = max(0, origin[0] + frame - reach[0])
            last = min(key_grid[0], origin[0] + frame + reach[0] + 1)
            if first >= last:
                continue
            seeing = slice(rows.start + frame * q_frame, rows.start + (frame + 1) * q_frame)
            seen = slice(keys.start + first * k_frame, keys.start + last * k_frame)
            wide_mask = None if whole else mask.repeat(1, last - first)
            part = _attend(q[seeing], k[seen], v[seen], wide_mask, scale)
            out[seeing] = part if whole else part.masked_fill(blind[:, None, None], 0.0)
    return out
