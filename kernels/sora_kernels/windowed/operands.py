"""What `windowed_attention` hands to a backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from sora_kernels.grids import Grid, starts_of
from sora_kernels.windowed.plan import BlockPlan


class Segment(NamedTuple):
    """One segment: rows of the queries and of the keys, their grids, and the queries' origin."""

    number: int
    rows: slice
    keys: slice
    grid: Grid
    key_grid: Grid
    origin: Grid


@dataclass(frozen=True, slots=True)
class Operands:
    """One call. The fields are as `windowed_attention` has them, one grid a segment."""

    q: Tensor
    k: Tensor
    v: Tensor
    grids: tuple[Grid, ...]
    key_grids: tuple[Grid, ...]
    origins: tuple[Grid, ...]
    window: Grid
    scale: float
    plan: BlockPlan | None

    def segments(self) -> Iterator[Segment]:
        q_starts, k_starts = starts_of(self.grids), starts_of(self.key_grids)
        for i, (grid, key_grid, origin) in enumerate(
            zip(self.grids, self.key_grids, self.origins, strict=True)
        ):
            rows = slice(q_starts[i], q_starts[i + 1])
            keys = slice(k_starts[i], k_starts[i + 1])
            yield Segment(i, rows, keys, grid, key_grid, origin)
