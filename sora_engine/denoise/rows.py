"""The rows of the modulation table: which distinct conditions the tokens of a batch are under.

A transformer with adaptive normalisation scales and shifts a token by what it is under: the noise
level, what is pooled of the text that it reads, what was done to make its frame. Tokens that are
under the same read one row, so these are embedded once a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sora_engine.denoise.conditioning import Context
from sora_kernels.transfer import to_device


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the tokens of one segment are under, on the host.

    levels: float32 `[T]`, one for each frame of tokens, or `[T * H * W]`.
    contexts: what stretches of `levels` read, in order, each with its length.
    actions: float32 `[T, action_dim]`, or None.
    frames: T.
    """

    levels: Tensor
    contexts: Sequence[tuple[Context, int]]
    actions: Tensor | None
    frames: int


@dataclass(frozen=True, slots=True)
class ModulationRows:
    """The table's rows, by rising noise level.

    timesteps: float32 `[rows]`, on the host.
    read: of each segment the rows that it reads, int64, as long as its `levels`.
    pooled: `[rows, dim]`, where contexts have anything pooled.
    actions: float32 `[rows, action_dim]` on the host, where any segment has actions. A frame
        without any is as one of zeros.
    """

    timesteps: Tensor
    read: list[Tensor]
    pooled: Tensor | None = None
    actions: Tensor | None = None


def modulation_rows(segments: Sequence[Conditions]) -> ModulationRows:
    """The distinct conditions of a batch. They are worked out on the host at each step, so not for
    every token. Raises ValueError where some texts are pooled and some are not, or actions differ
    in width.
    """
    sizes = [len(segment.levels) for segment in segments]
    columns = [torch.cat([segment.levels for segment in segments])]
    pooled = _pooled_texts(segments)
    if pooled:
        numbers = {key: float(i) for i, (key, _) in enumerate(pooled)}
        spans = [
            torch.full((count,), numbers[id(context)], dtype=torch.float32)
            for segment in segments
            for context, count in segment.contexts
        ]
        columns.append(torch.cat(spans))
    actions = _actions(segments)
    if actions is not None:
        columns += actions.unbind(dim=1)
    if len(columns) == 1:
        timesteps, rows = torch.unique(columns[0], return_inverse=True)
        return ModulationRows(timesteps, list(rows.split(sizes)))
    # Sorted by their first column, the noise level.
    distinct, rows = torch.unique(torch.stack(columns), dim=1, return_inverse=True)
    numbers_of = distinct[1].tolist() if pooled else []
    return ModulationRows(
        timesteps=distinct[0],
        read=list(rows.split(sizes)),
        pooled=torch.stack([pooled[int(i)][1] for i in numbers_of]) if pooled else None,
        actions=None if actions is None else distinct[-actions.shape[1] :].T.contiguous(),
    )


def _pooled_texts(segments: Sequence[Conditions]) -> list[tuple[int, Tensor]]:
    """By the id of its context, what is pooled of each text that is read."""
    read = {id(context): context.pooled for s in segments for context, _ in s.contexts}
    found = [(key, vector) for key, vector in read.items() if vector is not None]
    if found and len(found) < len(read):
        raise ValueError("of the contexts of one batch some have a pooled text and some do not")
    return found


def _actions(segments: Sequence[Conditions]) -> Tensor | None:
    """What was done for each of the levels, float32 `[n, action_dim]`; None where nothing was."""
    widths = {s.actions.shape[1] for s in segments if s.actions is not None}
    if not widths:
        return None
    if len(widths) > 1:
        raise ValueError(f"actions of one batch are of one width, got {sorted(widths)}")
    (width,) = widths
    each = []
    for segment in segments:
        actions = segment.actions
        if actions is None:
            actions = torch.zeros(segment.frames, width)
        each.append(actions.repeat_interleave(len(segment.levels) // segment.frames, dim=0))
    return torch.cat(each)


def token_rows(
    read: Sequence[Tensor], grids: Sequence[tuple[int, int, int]], device: torch.device
) -> Tensor:
    """For each token its row, int64 `[N]`: `ModulationRows.read`, spread on the device.

    grids: of each segment, patches in frames, rows and columns.
    """
    numbers = to_device(torch.cat(list(read)), device)
    parts = zip(numbers.split([len(own) for own in read]), grids, strict=True)
    return torch.cat(
        [own[:, None].expand(-1, math.prod(grid) // len(own)).flatten() for own, grid in parts]
    )
