"""The seam: tensors by name out of a file, in whichever format it holds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

import torch
from torch import Tensor

PIECE_VALUES = 1 << 18
"""Values that are decoded at a time: 1 MiB in float32."""

Self = TypeVar("Self")


class Stored(Protocol):
    """What is known of a tensor before it is read.

    dtype: of its values; of quantised weights float32, in which they are decoded.
    """

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


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

    def close(self) -> None: ...

    def __enter__(self: Self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


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
    decode = decoder()
    step = max(1, PIECE_VALUES // max(1, math.prod(shape[1:])))
    for first in range(0, len(wanted), step):
        piece = wanted[first : first + step]
        target[first : first + len(piece)].copy_(decode(piece))
    return target
