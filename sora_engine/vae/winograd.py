"""3x3 convolutions of large frames in fewer products than they have taps."""

from __future__ import annotations

import torch
from torch import Tensor

from sora_engine.vae.native import PackableConv3d, PackedConv, fuses
from sora_kernels import winograd

STRIP_BYTES = 8 << 20
"""Of what the products of a strip of the frames read: it stays in the cache until they do."""
SMALLEST = 24
"""Pixels of a frame's shorter side from which on it pays."""
NARROWEST, MOST_WEIGHTS = 64, 3 * 256 * 256
"""Channels from which on it pays. Wider layers have the smaller frames, where it gains the least,
and their weights are held a second time, 16/9 as large."""
_LINE = 16
"""Floats between planes: at multiples of a page they would meet in the same lines of the cache."""


def serves(conv: PackableConv3d, x: Tensor) -> bool:
    """Whether `conv` gains by it on `x [B, C, T, H, W]`. On the meta device the answer is that of
    this machine's CPU."""
    outs, ins, *kernel = conv.out_channels, conv.in_channels, *conv.kernel_size
    return (
        kernel[1:] == [3, 3]
        and conv.stride == (1, 1, 1)
        and min(outs, ins) >= NARROWEST
        and outs * ins * kernel[0] <= MOST_WEIGHTS
        and x.dtype == torch.float32
        and min(x.shape[-2:]) >= SMALLEST
        and (x.is_meta or conv.layouts.onednn)
        and fuses(x, conv.bias)
    )


class WinogradConv:
    """A convolution of stride 1 with a pixel of zeros around the frames and none before them, by
    F(2x2, 3x3): 16 products where there are 36, in strips of the frames. Float32 on a CPU; on the
    meta device it takes the memory that it would take there."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: `[c_out, c_in, k, 3, 3]`."""
        self.outs, self.frames = weight.shape[0], weight.shape[2]
        self.nbytes = winograd.PLACES * weight[..., 0, 0].nbytes
        self.bias = None if bias is None else bias.detach()
        self.planes: list[PackedConv] = []
        if not weight.is_meta:
            for place in winograd.filters(weight.detach()):
                self.planes.append(PackedConv(place, None, (1, 1, 1), (0, 0, 0)))

    def __call__(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        """`[B, c_in, T, H, W] -> [B, c_out, T - k + 1, H, W]`, and the sum with `beside` of that
        shape where it is given."""
        pixels = x.permute(0, 2, 3, 4, 1).contiguous()
        batch, frames, height, width, channels = pixels.shape
        made = frames - self.frames + 1
        y = pixels.new_empty(batch, made, height, width, self.outs)
        sums = None if beside is None else beside.permute(0, 2, 3, 4, 1).contiguous()
        down, across = (height + 1) // 2, (width + 1) // 2
        row = frames * across * channels
        strip = max(1, min(down, STRIP_BYTES // (winograd.PLACES * row * x.element_size())))
        tiles = pixels.new_empty(winograd.PLACES, strip * row + _LINE)
        if x.is_meta:
            pixels.new_empty(winograd.PLACES, made * strip * across * self.outs)  # the products
            return y.permute(0, 4, 1, 2, 3)
        for one in range(batch):
            for first in range(0, down, strip):
                rows = min(strip, down - first)
                winograd.split(pixels[one], tiles, first, rows)
                read = tiles[:, : rows * row].view(winograd.PLACES, 1, frames, rows, across, -1)
                parts = [
                    conv(plane.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
                    for conv, plane in zip(self.planes, read, strict=True)
                ]
                added = None if sums is None else sums[one]
                winograd.join(parts, self.bias, added, y[one], first, rows)
        return y.permute(0, 4, 1, 2, 3)
