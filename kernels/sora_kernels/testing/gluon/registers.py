"""What an emulated kernel holds in registers: scalars, tiles, pointers.

Integers are 32 bits wide unless they were made wider, and a result that does not fit is a fault.
So is the quotient of a negative number, which Triton rounds toward zero and Python down.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sora_kernels.testing.faults import FaultError


class Scalar(int):
    """An integer in a register; `bits` wide."""

    bits: int

    def __new__(cls, value: int, bits: int = 32) -> Scalar:
        made = super().__new__(cls, value)
        made.bits = bits
        if not -(1 << bits - 1) <= value < 1 << bits - 1:
            raise FaultError(f"{value} overflows int{bits}")
        return made

    def to(self, dtype: torch.dtype) -> Any:
        if dtype.is_floating_point:
            return float(self)
        return Scalar(int(self), 8 * dtype.itemsize)


class Constexpr(int):
    """A constant of the kernel."""

    @property
    def value(self) -> int:
        return int(self)


def _of_scalars(name: str) -> Callable[[Scalar, Any], Any]:
    function: Callable[[int, int], int] = getattr(operator, name)

    def run(self: Scalar, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        if name in ("floordiv", "mod") and (self < 0 or other <= 0):
            raise FaultError(f"{int(self)} {name} {int(other)} rounds otherwise on the device")
        bits = max(self.bits, getattr(other, "bits", 32))
        return Scalar(function(int(self), int(other)), bits)

    return run


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "xor"):
    _function = _of_scalars({"and": "and_"}.get(_name, _name))
    setattr(Scalar, f"__{_name}__", _function)
    if _name in ("add", "mul"):
        setattr(Scalar, f"__r{_name}__", _function)


class Tile:
    """A tensor in registers."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def __getitem__(self, index: Any) -> Tile:
        return Tile(self.values[index])

    def to(self, dtype: torch.dtype) -> Tile:
        return Tile(self.values.to(dtype))


def plain(value: Any) -> Any:
    """A tile's tensor, a scalar as a Python number."""
    if isinstance(value, Tile):
        return value.values
    return int(value) if type(value) in (Scalar, Constexpr) else value


def _of_tiles(name: str) -> Callable[[Tile, Any], Tile]:
    def run(self: Tile, other: Any) -> Tile:
        if not isinstance(other, (Tile, int, float)):
            other = other.values  # of a product in flight this is a fault
        function = getattr(self.values, name)
        result = function(plain(other))
        if result.dtype == torch.int32 and not torch.equal(
            result.long(), getattr(self.values.long(), name)(plain(other))
        ):
            raise FaultError(f"a tile of int32 overflows in {name}")
        return Tile(result)

    return run


for _name in ("add", "sub", "mul", "truediv", "radd", "rsub", "rmul", "rtruediv"):
    setattr(Tile, f"__{_name}__", _of_tiles(f"__{_name}__"))
for _name in ("lt", "le", "gt", "ge"):
    setattr(Tile, f"__{_name}__", _of_tiles(f"__{_name}__"))


class Array:
    """A tensor argument in global memory, and how often each element was stored to."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.stores = torch.zeros(tensor.numel(), dtype=torch.int32)

    def at(self, offsets: Tensor) -> Tensor:
        """Checked element numbers."""
        if offsets.numel() and not 0 <= int(offsets.min()) <= int(offsets.max()) < len(self.stores):
            raise FaultError(
                f"an access at elements {int(offsets.min())} to {int(offsets.max())} of a tensor "
                f"of {len(self.stores)}"
            )
        return offsets


class Pointer:
    """The address of an element of an array, or of a tile of them."""

    def __init__(self, array: Array, offset: Any = 0) -> None:
        self.array, self.offset = array, offset
        self.dtype = SimpleNamespace(element_ty=array.tensor.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.array, plain(self.offset) + plain(offset))


def load(pointer: Pointer, mask: Tile | None = None, other: float = 0.0) -> Scalar | Tile:
    """One integer; or a tile of elements, `other` where the mask is false and nothing is read."""
    flat = pointer.array.tensor.reshape(-1)
    if not isinstance(pointer.offset, Tensor):
        if mask is not None:
            raise FaultError("emulator: a load of one element has no mask")
        at = pointer.array.at(torch.tensor(pointer.offset))
        return Scalar(int(flat[at]), 8 * flat.dtype.itemsize)
    if mask is None:
        return Tile(flat[pointer.array.at(pointer.offset)])
    kept = mask.values.expand(pointer.offset.shape)
    values = torch.full(pointer.offset.shape, other, dtype=flat.dtype)
    values[kept] = flat[pointer.array.at(pointer.offset[kept])]
    return Tile(values)


def store(pointer: Pointer, value: Tile, mask: Tile) -> None:
    """Values to where the mask is true; each element may be stored to once."""
    offsets, kept = torch.broadcast_tensors(pointer.offset, mask.values)
    at = pointer.array.at(offsets[kept])
    flat = pointer.array.tensor.view(-1)
    if value.dtype != flat.dtype:
        raise FaultError(f"a store of {value.dtype} into {flat.dtype}")
    flat[at] = value.values.expand(offsets.shape)[kept]
    pointer.array.stores.index_add_(0, at, torch.ones_like(at, dtype=torch.int32))
