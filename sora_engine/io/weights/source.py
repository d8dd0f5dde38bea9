"""The seam: tensors by name out of a file, in whichever format it holds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from sora_engine.errors import CheckpointError
from sora_engine.io.mapped_file import at_once

PIECE_VALUES = 1 << 18
"""Values that are decoded at a time: 1 MiB in float32."""

Self = TypeVar("Self")


class Stored(Protocol):
    """What is known of a tensor before it is read.

    dtype: of its values; of quantised weights float32, in which they are decoded. is_plain: the
    file's bytes are the values, in that dtype.
    """

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def is_plain(self) -> bool: ...


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A matrix as its file has it, not decoded.

    format: as `sora_kernels.quant_linear` has it: "int8", "float8_e4m3fn", "float8_e5m2", or a
    block format of GGUF. weight: `[rows, in]`, or uint8 `[rows, bytes]` of blocks. scale: float32
    `[1, 1]` or `[rows, stretches]`; None is 1. rotation: size of the groups of inputs that a
    Hadamard matrix has mixed (ConvRot); 0 for none.
    """

    format: str
    weight: Tensor
    scale: Tensor | None = None
    rotation: int = 0


class WeightSource(Protocol):
    """The weights of a model, open: headers are read and checked, values come on demand.

    Use it as a context manager, or close it. Names come in the order in which the file has them.
    """

    @property
    def path(self) -> Path:
        """The file, or the folder of several."""
        ...

    def __iter__(self) -> Iterator[str]: ...

    def __contains__(self, name: object) -> bool: ...

    def __len__(self) -> int: ...

    def info(self, name: str) -> Stored:
        """Raises CheckpointError where there is no such tensor."""
        ...

    def path_of(self, name: str) -> Path:
        """The file that holds the tensor."""
        ...

    def read(
        self,
        name: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        rows: range | None = None,
    ) -> Tensor:
        """A tensor on `device` as `dtype` (None: as `info` says), owning its memory.

        rows: a stretch of the first dimension; of the file's bytes only its own are read. Raises
        CheckpointError.
        """
        ...

    def kept_format(self, name: str) -> str | None:
        """The format in which `read_kept` gives a matrix; None for one that is only decoded."""
        ...

    def read_kept(self, name: str, *, device: torch.device | str = "cpu") -> Kept:
        """A matrix that has a `kept_format`, owning its memory. Raises CheckpointError."""
        ...

    def close(self) -> None: ...

    def __enter__(self: Self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def kept_format_of(source: WeightSource, name: str) -> str:
    """`source.kept_format`, or a CheckpointError for a tensor that is only decoded."""
    form = source.kept_format(name)
    if form is None:
        raise CheckpointError(
            f"tensor {name!r} is not a quantised matrix that is kept as stored",
            path=source.path_of(name),
            tensor=name,
        )
    return form


Decode = Callable[[range], Tensor]
"""Some rows of a tensor in float32, `[len(rows), ...]`."""


def read_by_pieces(
    shape: tuple[int, ...],
    decoder: Callable[[], Decode],
    *,
    device: torch.device | str,
    dtype: torch.dtype | None,
    rows: range | None,
) -> Tensor:
    """A tensor, or some of its rows, decoded a piece at a time into the memory that it keeps.

    decoder: reads the scales, and is not asked where nothing but shapes is wanted (`device` meta).
    """
    wanted = range(shape[0]) if rows is None else rows
    target = torch.empty(
        (len(wanted), *shape[1:]), dtype=dtype or torch.float32, device=torch.device(device)
    )
    if target.is_meta:
        return target
    with at_once():
        decode = decoder()
        step = max(1, PIECE_VALUES // max(1, math.prod(shape[1:])))
        for first in range(0, len(wanted), step):
            piece = wanted[first : first + step]
            target[first : first + len(piece)].copy_(decode(piece))
    return target
