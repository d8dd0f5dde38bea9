"""3x3 convolutions of large frames in fewer products than they have taps."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from sora_engine.vae.native import PackableConv3d, PackedConv, fuses
from sora_kernels import winograd

STRIP_BYTES = 4 << 20
"""Of what the products of a strip of the frames read: it stays in the cache until they do."""
SMALLEST = 24
"""Pixels of a frame's shorter side from which on it pays."""
NARROWEST, MOST_WEIGHTS = 64, 3 * 256 * 256
"""Channels from which on it pays. Wider layers have the smaller frames, where it gains the least,
and their weights are held a second time, 16/9 as large."""


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
        if not weight.is_meta:
            # All places in one call: a product of one alone is too short to share out to threads.
            places = winograd.filters(weight.detach())
            self.products = PackedConv(places, None, (1, 1, 1), (0, 0, 0), groups=winograd.PLACES)

    def __call__(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        """`[B, c_in, T, H, W] -> [B, c_out, T - k + 1, H, W]`, and the sum with `beside` of that
        shape where it is given."""
        pixels = x.permute(0, 2, 3, 4, 1).contiguous()
        batch, frames, height, width, channels = pixels.shape
        made = frames - self.frames + 1
        y = pixels.new_empty(batch, made, height, width, self.outs)
        sums = None if beside is None else beside.permute(0, 2, 3, 4, 1).contiguous()
        down, across = (height + 1) // 2, (width + 1) // 2
        row = frames * across * winograd.PLACES * channels * x.element_size()
        strip = max(1, min(down, STRIP_BYTES // row))
        strips = [(one, first) for one in range(batch) for first in range(0, down, strip)]
        threads = min(torch.get_num_threads(), len(strips))
        if x.is_meta:
            size = (strip, across, winograd.PLACES)
            at_once = [pixels.new_empty(frames, *size, channels) for _ in range(threads)]
            at_once += [pixels.new_empty(made, *size, self.outs) for _ in range(threads)]
            return y.permute(0, 4, 1, 2, 3)
        inference = torch.is_inference_mode_enabled()

        def run(place: tuple[int, int]) -> None:
            one, first = place
            rows = min(strip, down - first)
            with torch.inference_mode(inference), torch.no_grad():  # each thread has its own
                tiles = pixels.new_empty(frames, rows, across, winograd.PLACES, channels)
                winograd.split(pixels[one], tiles, first)
                read = tiles.flatten(3).permute(3, 0, 1, 2)[None]
                products = self.products(read)[0].permute(1, 2, 3, 0)
                products = products.unflatten(3, (winograd.PLACES, -1)).contiguous()
                added = None if sums is None else sums[one]
                winograd.join(products, self.bias, added, y[one], first)

        if threads == 1:
            for place in strips:
                run(place)
        else:
            list(_workers(torch.get_num_threads()).map(run, strips))
        return y.permute(0, 4, 1, 2, 3)


@functools.cache
def _workers(count: int) -> ThreadPoolExecutor:
    """Threads that each work on a strip by themselves. Threads that share a strip wait for each
    other many times a layer: beside other work that took up to five times as long."""
    pool = ThreadPoolExecutor(
        count, "sora-winograd", initializer=torch.set_num_threads, initargs=(1,)
    )
    meet = threading.Barrier(count)
    list(pool.map(lambda _: meet.wait(), range(count)))
    torch.set_num_threads(count)  # MKL's number is all threads'
    return pool
