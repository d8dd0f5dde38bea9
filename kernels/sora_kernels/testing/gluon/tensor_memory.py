"""Tensor memory and Blackwell's products of an emulated program.

Products (`tcgen05.mma`) of a partition take place in the order of their issue, each as a whole at
some time after it. A barrier that is named with one, or in a commit behind it, is arrived at once
it and all before it have taken place (PTX manual, tcgen05.commit). Until then what it reads may not
be written, and what it adds to may be neither read nor written, except by the products behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sora_kernels.testing.faults import FaultError
from sora_kernels.testing.gluon.memory import Barrier, Barriers, Operations, Shared, reads
from sora_kernels.testing.gluon.registers import Tile

LANES, COLUMNS = 128, 512  # of a program, of 32 bits each


class Region:
    """Columns of tensor memory. writing, reading: products in flight that do so."""

    def __init__(self, columns: int) -> None:
        self.cells = torch.full((LANES, columns), float("nan"))
        self.writing = self.reading = 0
        self.filled = False


class TensorMemory:
    """Tiles of tensor memory, or a view of one: a region each, which views share."""

    def __init__(
        self, operations: Operations, regions: list[Region], dtype: torch.dtype, columns: int,
        layout: Any,
    ) -> None:  # fmt: skip
        self.operations, self.regions, self.dtype = operations, regions, dtype
        self.columns, self.layout = columns, layout

    @classmethod
    def allocate(
        cls, operations: Operations, dtype: torch.dtype, shape: Sequence[int], layout: Any
    ) -> TensorMemory:
        tiles, rows, columns = map(int, shape)
        if rows != LANES or layout.block != (rows, columns) or dtype != torch.float32:
            raise FaultError(f"emulator: tensor memory of {dtype} {[tiles, rows, columns]}")
        operations.tensor_columns += tiles * columns
        if operations.tensor_columns > COLUMNS:
            raise FaultError(f"{operations.tensor_columns} columns of tensor memory of {COLUMNS}")
        return cls(operations, [Region(columns) for _ in range(tiles)], dtype, columns, layout)

    def index(self, i: int) -> TensorMemory:
        if not 0 <= i < len(self.regions):
            raise FaultError(f"tile {int(i)} of {len(self.regions)}")
        one = [self.regions[int(i)]]
        return TensorMemory(self.operations, one, self.dtype, self.columns, self.layout)

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> TensorMemory:
        rows, columns = map(int, shape)
        if rows != LANES or layout.block != (rows, columns) or layout.col_stride != 1:
            raise FaultError(f"emulator: tensor memory as {dtype} {[rows, columns]}")
        if columns * dtype.itemsize > 4 * self.region.cells.shape[1]:
            raise FaultError(f"{columns} columns of {dtype} where there is less room")
        return TensorMemory(self.operations, self.regions, dtype, columns, layout)

    @property
    def region(self) -> Region:
        if len(self.regions) != 1:
            raise FaultError(f"an operation on {len(self.regions)} tiles at once")
        return self.regions[0]

    @property
    def values(self) -> Tensor:
        """Narrow elements lie side by side in a cell."""
        return self.region.cells.view(self.dtype)[:, : self.columns]

    def load(self, layout: object) -> Tile:
        self.operations.machine.pause()
        if self.region.writing:
            raise FaultError("a load of tensor memory that a product in flight writes")
        if not self.region.filled:
            raise FaultError("a load of tensor memory to which nothing has come")
        return Tile(self.values.clone())

    def store(self, tile: Tile) -> None:
        self.operations.machine.pause()
        if tile.values.shape != self.values.shape or tile.dtype != self.dtype:
            raise FaultError(f"a store of {tile.dtype} {[*tile.values.shape]} into another tile")
        if self.region.writing or self.region.reading:
            raise FaultError("a store to tensor memory that a product in flight has")
        self.values.copy_(tile.values)
        self.region.filled = True


def _committed(barriers: Sequence[Barriers]) -> list[Barrier]:
    found = [barriers.one for barriers in barriers]
    if not all(barrier.fenced for barrier in found):
        raise FaultError("a commit to a barrier whose initialisation no fence made visible")
    return found


def multiply(
    operations: Operations, a: Any, b: Shared, acc: TensorMemory, use_acc: bool,
    mbarriers: Sequence[Barriers],
) -> None:  # fmt: skip
    """tcgen05.mma: a, of shared or of tensor memory, times b, of shared memory, into acc."""
    machine = operations.machine
    machine.pause()
    me = machine.current
    if me is None:
        raise FaultError("emulator: products are within partitions")
    barriers = _committed(mbarriers)
    shared = [operand for operand in (a, b) if isinstance(operand, Shared)]
    for operand in shared:
        reads(operand, me)
    regions = [a.region] if isinstance(a, TensorMemory) else []
    for region in regions:
        if not region.filled:
            raise FaultError("a product reads tensor memory to which nothing has come")
        region.reading += 1
    target = acc.region
    if use_acc and not target.filled:
        raise FaultError("a product adds to tensor memory to which nothing has come")
    target.writing += 1
    target.filled = True
    machine.counts["products"] += 1

    def land() -> None:
        left = a.matrix if isinstance(a, Shared) else a.values
        if left.dtype != b.dtype or left.shape[1] != b.matrix.shape[0]:
            raise FaultError(f"a product of {left.dtype} {[*left.shape]} with {b.dtype}")
        product = left.double() @ b.matrix.double()
        if product.shape != acc.values.shape:
            raise FaultError("an accumulator of another shape than the product")
        if use_acc:
            product += acc.values.double()
        acc.values.copy_(product.float())
        target.writing -= 1
        for operand in shared:
            operand.states["reading"] -= 1
        for region in regions:
            region.reading -= 1
        for barrier in barriers:
            barrier.arrived(1)

    machine.launch(("products", me.name), land)


def commit(operations: Operations, barriers: Barriers) -> None:
    """tcgen05.commit: an arrival once all products of the partition so far have taken place."""
    machine = operations.machine
    machine.pause()
    me = machine.current
    if me is None:
        raise FaultError("emulator: commits are within partitions")
    (barrier,) = _committed([barriers])
    machine.launch(("products", me.name), lambda: barrier.arrived(1))
