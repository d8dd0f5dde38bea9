"""The two ends of Winograd's F(2x2, 3x3) (arXiv 1509.09308) by csrc/cpu: what its products read,
and what comes of them.

A tile is 4 x 4 pixels that make 2 x 2; it stands every second row and column, and has a pixel of
zeros around the picture. Between the ends each of its 16 places has a product of all channels: 16
where a convolution has 36.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sora_kernels import csrc
from sora_kernels.dispatch import KernelUnavailableError

PLACES = 16


def filters(weight: Tensor) -> Tensor:
    """`weight [outs, ins, frames, 3, 3]` as the products of the places have it, one place's behind
    another's, in its dtype: `[16 * outs, ins, frames, 1, 1]`."""
    rows = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]]
    ends = torch.tensor(rows, dtype=torch.float64, device=weight.device)
    made = weight.new_empty(PLACES, *weight.shape[:3])
    wide = weight.double()
    for place, to in enumerate(made):
        to.copy_(torch.tensordot(wide, torch.outer(ends[place // 4], ends[place % 4]), dims=2))
    return made.flatten(0, 1)[..., None, None]


def split(x: Tensor, tiles: Tensor, first: int) -> None:
    """Fills `tiles` with what the products of some rows of tiles read.

    x: `[frames, height, width, channels]`. tiles: `[frames, rows, ceil(width / 2), 16, channels]`,
    of the rows of tiles from `first` on, of which there are `ceil(height / 2)`. Both are float32,
    dense, and on the CPU; RuntimeError for what does not fit, and KernelUnavailableError where the
    native library is not there.
    """
    _check_library()
    torch.ops.sora.native_winograd_split(x, tiles, first)


def join(
    products: Tensor, bias: Tensor | None, beside: Tensor | None, y: Tensor, first: int
) -> None:
    """Fills in `y` what comes of the products of some rows of tiles, plus `bias` and `beside`.

    products: as `tiles` of `split`. bias: `[channels]`. y, beside: `[frames, height, width,
    channels]`. All are float32, dense, and on the CPU. Errors are those of `split`.
    """
    _check_library()
    torch.ops.sora.native_winograd_join(products, bias, beside, y, first)


def _check_library() -> None:
    why = csrc.problem()
    if why is not None:
        raise KernelUnavailableError(f"winograd: {why}")
