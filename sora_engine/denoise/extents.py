"""What positions may be relative to: the size of a token's picture, the rate of its frames, and
where in the world its view lies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sora_kernels.transfer import to_device


def extents_of(grids: Sequence[tuple[int, int, int]], device: torch.device) -> Tensor:
    """int64 `[N, 2]`, rows and columns of patches of each token's segment.

    grids: of each segment, patches in frames, rows and columns.

    Filled on the device: few families read it, and the others wait for no copy. Where all segments
    have one size, as in most batches, it takes no memory.
    """

    def filled(size: tuple[int, int]) -> Tensor:
        return torch.stack([torch.full((), side, device=device) for side in size])

    sides = {size: filled(size) for size in {(rows, columns) for _, rows, columns in grids}}
    if len(sides) == 1:
        return sides[grids[0][1:]].expand(sum(map(math.prod, grids)), 2)
    return torch.cat([sides[grid[1:]].expand(math.prod(grid), 2) for grid in grids])


def rates_of(
    rates: Sequence[float | None], lengths: Sequence[int], device: torch.device
) -> Tensor | None:
    """float32 `[N]`, frames a second of each token's video; None where a segment does not say.

    rates: of each segment; lengths: its tokens. Where all have one rate it takes no memory.
    """
    known = [rate for rate in rates if rate is not None]
    if not known or len(known) < len(rates):
        return None
    filled = {rate: torch.full((), rate, dtype=torch.float32, device=device) for rate in known}
    if len(filled) == 1:
        return filled[known[0]].expand(sum(lengths))
    return torch.cat([filled[r].expand(n) for r, n in zip(known, lengths, strict=True)])


def places_of(
    places: Sequence[Tensor | None],
    grids: Sequence[tuple[int, int, int]],
    patch_frames: int,
    device: torch.device,
) -> Tensor | None:
    """float32 `[N, 2]`, how far each token's view lies from the newest one, spread on the device;
    None where no segment says.

    places: of each segment `[T, 2]` on the host. grids: its patches in frames, rows and columns.
    """
    if all(place is None for place in places):
        return None
    own = [
        torch.zeros(T, 2) if place is None else place[::patch_frames].to(torch.float32)
        for place, (T, _, _) in zip(places, grids, strict=True)
    ]
    parts = zip(to_device(torch.cat(own), device).split([len(p) for p in own]), grids, strict=True)
    return torch.cat(
        [part[:, None].expand(-1, H * W, 2).flatten(0, 1) for part, (_, H, W) in parts]
    )
