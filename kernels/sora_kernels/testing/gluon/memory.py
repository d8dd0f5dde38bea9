"""Shared memory, mbarriers, TMA and warpgroup products of an emulated program.

Barriers are as the PTX manual has them (mbarrier: a pending count, a count of bytes, phases of
which a waiter names the parity). A copy by TMA takes place as a whole at some time after its issue:
until then its tile may be neither read nor written. So does a product: until then it reads its
tiles, and its result is no one's to touch. Products of a partition end in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sora_kernels.testing.faults import FaultError
from sora_kernels.testing.gluon.machine import Flight, Machine, Partition
from sora_kernels.testing.gluon.registers import Array, Tile

MOST_BYTES = (1 << 20) - 1  # that a barrier can count (PTX manual, mbarrier)
MOST_COUNT = (1 << 20) - 1


class Barrier:
    """`pending` arrivals and `bytes` of copies are left of the present phase."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0
        self.fenced = False  # whether the async proxy sees that it was initialised

    def arrived(self, arrivals: int) -> None:
        if self.count == 0:
            raise FaultError("a barrier that was not initialised")
        self.pending -= arrivals
        if self.pending < 0:
            raise FaultError(f"more than a barrier's {self.count} arrivals in one phase")
        self.settle()

    def settle(self) -> None:
        if abs(self.bytes) > MOST_BYTES:
            raise FaultError(f"{self.bytes} bytes; a barrier counts to {MOST_BYTES}")
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count


class Barriers:
    """An allocation of barriers, or one of them."""

    def __init__(self, all_of_them: list[Barrier]) -> None:
        self.all = all_of_them

    def index(self, i: int) -> Barriers:
        if not 0 <= i < len(self.all):
            raise FaultError(f"barrier {int(i)} of {len(self.all)}")
        return Barriers([self.all[i]])

    @property
    def one(self) -> Barrier:
        if len(self.all) != 1:
            raise FaultError(f"an operation on {len(self.all)} barriers at once")
        return self.all[0]


class Shared:
    """Tiles of shared memory, or a view of some. Rows have a state each, which views share.

    writing: copies in flight into the row; reading: products in flight that read it; filled:
    whether anything ever came; stored, fenced: bits of the partitions that have stored to it
    without a fence since, and with one.
    """

    STATES = ("writing", "reading", "filled", "stored", "fenced")

    def __init__(self, machine: Machine, values: Tensor, states: dict[str, np.ndarray]) -> None:
        self.machine, self.values, self.states = machine, values, states
        self.dtype = values.dtype
        self.transposed = False

    @classmethod
    def allocate(cls, machine: Machine, dtype: torch.dtype, shape: Sequence[int]) -> Shared:
        values = torch.full([*shape], float("nan"), dtype=dtype)
        states = {name: np.zeros(shape[:-1], np.int32) for name in cls.STATES}
        return cls(machine, values, states)

    def _view(self, part: Callable[[Any], Any]) -> Shared:
        states = {name: part(state) for name, state in self.states.items()}
        return Shared(self.machine, part(self.values), states)

    def index(self, i: int) -> Shared:
        if not 0 <= i < len(self.values):
            raise FaultError(f"tile {int(i)} of {len(self.values)}")
        return self._view(lambda x: x[int(i)])

    def slice(self, start: int, size: int) -> Shared:
        if not 0 <= start <= start + size <= len(self.values):
            raise FaultError(f"rows {int(start)} to {int(start + size)} of {len(self.values)}")
        return self._view(lambda x: x[int(start) : int(start + size)])

    def permute(self, order: Sequence[int]) -> Shared:
        if tuple(order) != (1, 0):
            raise FaultError(f"emulator: permute({order})")
        view = self._view(lambda x: x)
        view.transposed = not self.transposed
        return view

    @property
    def matrix(self) -> Tensor:
        return self.values.t() if self.transposed else self.values

    def any(self, state: str, bits: int = -1) -> bool:
        return bool((self.states[state] & bits).any())

    def check_readable(self, reader: str) -> None:
        if self.any("writing"):
            raise FaultError(f"{reader} reads shared memory while a copy into it is in flight")
        if not self.states["filled"].all():
            raise FaultError(f"{reader} reads shared memory to which nothing has come")

    def load(self, layout: object) -> Tile:
        self.machine.pause()
        self.check_readable("a load")
        return Tile(self.values.clone())

    def store(self, tile: Tile) -> None:
        """By the partition that runs. The same values may be stored under a product's eyes."""
        self.machine.pause()
        if tile.values.shape != self.values.shape or tile.dtype != self.dtype:
            raise FaultError(f"a store of {tile.dtype} {[*tile.values.shape]} into another tile")
        if self.any("writing"):
            raise FaultError("a store into shared memory that a copy is writing")
        bits = torch.int16 if self.dtype.itemsize == 2 else torch.int32
        same = torch.equal(self.values.view(bits), tile.values.view(bits))
        if self.any("reading") and not same:
            raise FaultError("a store changes shared memory that a product in flight reads")
        self.values.copy_(tile.values)
        self.states["filled"][:] = 1
        if self.machine.current is not None:
            self.states["stored"] |= self.machine.current.bit
            self.states["fenced"] &= ~self.machine.current.bit


class Source:
    """A TMA descriptor as the kernel has it: a 2-D tensor and the box that a copy brings."""

    def __init__(self, name: str, descriptor: Any) -> None:
        self.name, self.layout = name, descriptor.layout
        self.rows, self.columns = map(int, descriptor.shape)
        self.box_rows, self.box_columns = map(int, descriptor.block_shape)
        if max(self.box_rows, self.box_columns) > 256:
            raise FaultError(
                f"{name}: a box of {descriptor.block_shape}; TMA takes up to 256 a side"
            )
        base = descriptor.base
        self.values = torch.as_strided(
            base, descriptor.shape, descriptor.strides, base.storage_offset()
        )
        self.nbytes = self.box_rows * self.box_columns * base.element_size()
        self.block_type = SimpleNamespace(nbytes=self.nbytes)

    def box(self, row: int, column: int) -> Tensor:
        """What a copy brings: zero outside the tensor."""
        tile = self.values.new_zeros(self.box_rows, self.box_columns)
        inside = self.values[row : row + self.box_rows, column : column + self.box_columns]
        tile[: inside.shape[0], : inside.shape[1]] = inside
        return tile


class Pending:
    """A product in flight. It may be waited for; anything else that is done with it is a fault."""

    def __init__(self, flight: Flight, result: list[Tile]) -> None:
        self.__dict__.update(flight=flight, result=result)

    def __getattr__(self, name: str) -> Any:
        raise FaultError(
            f"the result of a product in flight was used ({name}) before the wait for it"
        )


class Operations:
    """What the kernel of a program can call."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.memory: list[Shared] = []
        self.tensor_columns = 0  # of tensor memory, that are allocated
        self.barriers: list[Barrier] = []

    def allocate(self, dtype: torch.dtype, shape: Sequence[int]) -> Shared | Barriers:
        if dtype == torch.int64:  # mbarriers
            made = [Barrier() for _ in range(shape[0])]
            self.barriers += made
            return Barriers(made)
        self.memory.append(Shared.allocate(self.machine, dtype, [*map(int, shape)]))
        return self.memory[-1]

    def init(self, barriers: Barriers, count: int) -> None:
        barrier = barriers.one
        if self.machine.current is not None or barrier.count:
            raise FaultError("a barrier is initialised twice, or within a partition")
        if not 0 < count <= MOST_COUNT:
            raise FaultError(f"a barrier of {int(count)} arrivals")
        barrier.count = barrier.pending = int(count)

    def wait(self, barriers: Barriers, parity: int) -> None:
        barrier = barriers.one
        if barrier.count == 0:
            raise FaultError("a wait for a barrier that was not initialised")
        if parity not in (0, 1):
            raise FaultError(f"a wait for parity {int(parity)}")
        self.machine.counts["waits"] += 1
        self.machine.pause(lambda: barrier.phase & 1 != parity)

    def arrive(self, barriers: Barriers, count: int) -> None:
        self.machine.pause()
        barriers.one.arrived(int(count))

    def expect(self, barriers: Barriers, size: int) -> None:
        """Arrive, with so many bytes of copies still to come in this phase."""
        self.machine.pause()
        barriers.one.bytes += int(size)
        barriers.one.arrived(1)

    def copy(self, source: Source, at: Sequence[int], barriers: Barriers, tile: Shared) -> None:
        """TMA from global to shared memory."""
        self.machine.pause()
        barrier, (row, column) = barriers.one, map(int, at)
        if not barrier.fenced:
            raise FaultError("a copy signals a barrier whose initialisation no fence made visible")
        if tuple(tile.values.shape) != (source.box_rows, source.box_columns):
            raise FaultError(f"{source.name}: a box of another shape than its tile")
        if tile.dtype != source.values.dtype:
            raise FaultError(f"{source.name}: {source.values.dtype} into a tile of {tile.dtype}")
        if row < 0 or column < 0 or column + source.box_columns > source.columns:
            raise FaultError(
                f"{source.name}: a copy at {(row, column)} leaves the tensor's columns"
            )
        if tile.any("writing"):
            raise FaultError("two copies into one tile")
        if tile.any("reading"):
            raise FaultError("a copy into shared memory that a product in flight reads")
        if tile.any("stored"):
            raise FaultError("a copy over what was stored without a fence")
        tile.states["writing"] += 1
        tile.values.fill_(float("nan"))
        self.machine.counts["copies"] += 1
        self.machine.copies.append((source.name, row, column, source.nbytes))

        def land() -> None:
            tile.values.copy_(source.box(row, column))
            tile.states["writing"] -= 1
            tile.states["filled"][:] = 1
            tile.states["fenced"][:] = 0
            barrier.bytes -= source.nbytes
            barrier.settle()

        self.machine.launch(object(), land)

    def fence(self) -> None:
        """fence.proxy.async: what the partition stored is there for copies and products."""
        self.machine.pause()
        me = self.machine.current
        if me is None:
            for barrier in self.barriers:
                barrier.fenced = barrier.count > 0
            return
        for memory in self.memory:
            mine = memory.states["stored"] & me.bit
            memory.states["fenced"] |= mine
            memory.states["stored"] &= ~me.bit

    def product(self, a: Any, b: Any, acc: Any, use_acc: bool, is_async: bool) -> Pending:
        """wgmma: a, of a tile in registers or shared memory, times b, of shared memory."""
        self.machine.pause()
        me = self.machine.current
        if me is None or not is_async:
            raise FaultError("emulator: products are asynchronous, and within partitions")
        if isinstance(a, Pending) or isinstance(acc, Pending):
            raise FaultError("an operand of a product is itself in flight")
        shared = [operand for operand in (a, b) if isinstance(operand, Shared)]
        for operand in shared:
            reads(operand, me)
        left = a.matrix if isinstance(a, Shared) else a.values
        if left.dtype != b.dtype or left.shape[1] != b.matrix.shape[0]:
            raise FaultError(f"a product of {left.dtype} {[*left.shape]} with {[*b.matrix.shape]}")
        if acc.values.shape != (left.shape[0], b.matrix.shape[1]):
            raise FaultError("an accumulator of another shape than the product")
        result: list[Tile] = []
        self.machine.counts["products"] += 1

        def land() -> None:
            product = left.double() @ b.matrix.double()
            if use_acc:
                product += acc.values.double()
            result.append(Tile(product.float()))
            for operand in shared:
                operand.states["reading"] -= 1

        flight = self.machine.launch(("products", me.name), land)
        me.products.append(flight)
        return Pending(flight, result)

    def wait_products(self, outstanding: int, results: Sequence[Pending]) -> Any:
        """Until at most so many of the partition's products are in flight."""
        me = self.machine.current
        assert me is not None
        due = me.products[: len(me.products) - outstanding]
        self.machine.pause(lambda: all(flight.landed for flight in due))
        me.products = me.products[len(due) :]
        for pending in results:
            if pending.__dict__["flight"] in me.products:
                raise FaultError("warpgroup_mma_wait gives a product that it does not wait for")
        tiles = [pending.__dict__["result"][0] for pending in results]
        return tiles[0] if len(tiles) == 1 else tuple(tiles)


def reads(operand: Shared, me: Partition) -> None:
    """A product of a partition begins to read shared memory."""
    operand.check_readable("a product")
    if operand.any("stored", me.bit):
        raise FaultError("a product reads what its partition stored and did not fence")
    others = operand.states["stored"] & ~me.bit
    if (others.astype(bool) & ((operand.states["fenced"] & me.bit) == 0)).any():
        raise FaultError("a product reads what another partition stored and did not fence")
    operand.states["reading"] += 1


def arrays(arguments: dict[str, Any]) -> dict[str, Array]:
    """The tensors among a launch's arguments, by name."""
    return {name: Array(value) for name, value in arguments.items() if isinstance(value, Tensor)}
