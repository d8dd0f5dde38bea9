"""What `lora_linear` hands to a backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from sora_kernels import checks


@dataclass(frozen=True, slots=True)
class Group:
    """One adapter and the rows from `start` to below `stop` that it changes."""

    down: Tensor
    up: Tensor
    start: int
    stop: int
    scale: float


@dataclass(frozen=True, slots=True)
class Operands:
    """One call. `rows` has start and stop of each adapter in turn; the rest is as `lora_linear` has
    it."""

    x: Tensor
    base: Tensor
    down: Sequence[Tensor]
    up: Sequence[Tensor]
    rows: Sequence[int]
    scale: Sequence[float]

    @property
    def groups(self) -> Iterator[Group]:
        starts, stops = self.rows[::2], self.rows[1::2]
        for parts in zip(self.down, self.up, starts, stops, self.scale, strict=True):
            yield Group(*parts)

    def check(self, op: str) -> None:
        """Everything that metadata can tell."""
        x, base = self.x, self.base
        checks.check_packed_channels(op, "x", x)
        checks.check_float(op, "x", x)
        checks.check_packed_channels(op, "base", base)
        checks.check_float(op, "base", base, like=x)
        if base.shape[0] != x.shape[0]:
            raise ValueError(f"{op}: base has {base.shape[0]} rows and x {x.shape[0]}")
        counts = len(self.down), len(self.up), len(self.rows) / 2, len(self.scale)
        if len(set(counts)) > 1:
            raise ValueError(
                f"{op}: {counts[0]} down, {counts[1]} up, {counts[2]:g} rows and {counts[3]} scale;"
                " one of each for an adapter is due"
            )
        for i, group in enumerate(self.groups):
            down, up = group.down, group.up
            checks.check_float(op, f"down {i}", down, like=x)
            checks.check_float(op, f"up {i}", up, like=x)
            if down.dim() != 2 or down.shape[1] != x.shape[1] or down.shape[0] < 1:
                raise ValueError(
                    f"{op}: down {i} has shape {checks.shape_of(down)}; [rank, {x.shape[1]}] is due"
                )
            if tuple(up.shape) != (base.shape[1], down.shape[0]):
                raise ValueError(
                    f"{op}: up {i} has shape {checks.shape_of(up)}; "
                    f"[{base.shape[1]}, {down.shape[0]}] is due"
                )
            if not 0 <= group.start <= group.stop <= x.shape[0]:
                raise ValueError(
                    f"{op}: rows {i} are {group.start} to {group.stop}; x has {x.shape[0]}"
                )
            checks.check_device(op, x, **{"base": base, f"down {i}": down, f"up {i}": up})
