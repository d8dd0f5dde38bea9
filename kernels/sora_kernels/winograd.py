"""The two ends of Winograd's F(2x2, 3x3) (arXiv 1509.09308) by csrc/cpu: what its products read,
and what comes of them.

A tile is 4 x 4 pixels that make 2 x 2; it stands every second row and column, and has a pixel of
zeros around the picture. Between the ends lie 16 planes, one for each place in a tile, and a
product of all channels on each: 16 where a convolution has 36.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sora_kernels import csrc
from sora_kernels.dispatch import KernelUnavailableError

PLACES = 16


def filters(weight: Tensor) -> Iterator[Tensor]:
    """`weight [outs, ins, frames, 3, 3]` as each of the 16 planes' products has it, in its dtype:
    `[outs, ins, frames, 1, 1]`."""
    rows = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]]
    ends = torch.tensor(rows, dtype=torch.float64, device=weight.device)
    wide = weight.double()
    for down in ends:
        for across in ends:
            taps = torch.outer(down, across)
            yield torch.tensordot(wide, taps, dims=2).to(weight.dtype)[..., None, None]


def split(x: Tensor, tiles: Tensor, first: int, rows: int) -> None:
    """Fills `tiles` with what the products of some rows of tiles read.

    x: `[frames, height, width, channels]`, float32, dense, on the CPU. first, rows: of the
    `ceil(height / 2)` rows of tiles. tiles: `[16, n]`, float32, each plane of which begins with
    `[frames, rows, ceil(width / 2), channels]`. RuntimeError for what does not fit, and
    KernelUnavailableError where the native library is not there.
    """
    _check_library()
    torch.ops.sora.native_winograd_split(x, tiles, first, rows)


def join(
    products: Sequence[Tensor],
    bias: Tensor | None,
    beside: Tensor | None,
    y: Tensor,
    first: int,
    rows: int,
) -> None:
    """Fills in `y` what comes of the products of some rows of tiles, plus `bias` and `beside`.

    products: 16 of `[frames, rows, ceil(width / 2), channels]`. bias: `[channels]`. y, beside:
    `[frames, height, width, channels]`. All are float32, dense, and on the CPU. Errors are those
    of `split`.
    """
    _check_library()
    torch.ops.sora.native_winograd_join(list(products), bias, beside, y, first, rows)


def _check_library() -> None:
    why = csrc.problem()
    if why is not None:
        raise KernelUnavailableError(f"winograd: {why}")
