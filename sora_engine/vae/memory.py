"""What decoding and encoding will need, known before they start.

The layers are run on meta tensors, which have shapes and no storage, while every storage that
comes and goes is counted: the figures follow the code and cannot fall behind it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sora_engine.errors import RequestError
from sora_engine.vae.config import VAEConfig
from sora_engine.vae.tiling import TilePlan, starts
from sora_engine.vae.wan import WanVAE


@dataclass(frozen=True)
class CodingMemory:
    """Bytes for one stretch of a video whose latents come one at a time."""

    cache: int
    """Held between two latent frames, whatever the length of the video."""
    peak: int
    """The most that is alive at one time: caches, activations, the frames that come out."""


class _StorageMeter(TorchDispatchMode):
    """Sums the bytes of the storages that are alive, and keeps the highest sum."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}
        self.now = self.peak = 0

    def count(self, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._alive:
                self._alive[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count(out if isinstance(out, tuple | list) else (out,))
        return out


class _NoScores(TorchFunctionMode):
    """Attention whose scores are never stored, as the fused kernels on real devices do it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


@functools.lru_cache(maxsize=256)
def decode_memory(
    config: VAEConfig, height: int, width: int, dtype: torch.dtype = torch.float32
) -> CodingMemory:
    """For `height` x `width` latents, batch 1, decoded a latent frame at a time."""
    latents = torch.empty(1, config.z_dim, 1, height, width, dtype=dtype, device="meta")
    return _measure(config, dtype, lambda vae: vae.decode_chunk, [latents] * 3)


@functools.lru_cache(maxsize=256)
def encode_memory(
    config: VAEConfig, height: int, width: int, dtype: torch.dtype = torch.float32
) -> CodingMemory:
    """For frames of `height` x `width` latents, batch 1, encoded a latent frame at a time."""
    factor = config.factor_spatial
    channels = config.in_channels // (config.patch_size or 1) ** 2
    size = (height * factor, width * factor)
    frames = [
        torch.empty(1, channels, count, *size, dtype=dtype, device="meta")
        for count in (1, config.factor_temporal, config.factor_temporal)
    ]
    return _measure(config, dtype, lambda vae: vae.encode_chunk, frames)


def _measure(
    config: VAEConfig, dtype: torch.dtype, method: Callable[[WanVAE], Any], chunks: list[Tensor]
) -> CodingMemory:
    with torch.device("meta"):
        vae = WanVAE(config).to(dtype).requires_grad_(False)
    run = method(vae)
    state: Any = None
    with torch.inference_mode(False), torch.no_grad(), _NoScores(), _StorageMeter() as meter:
        for chunk in chunks:
            _, state = run(chunk, state, consume=True)
    return CodingMemory(cache=state.nbytes, peak=meter.peak)


def plan_tiles(
    config: VAEConfig,
    height: int,
    width: int,
    budget: int,
    *,
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
    encode: bool = False,
) -> TilePlan | None:
    """The largest tiles (in latents) whose coding stays under `budget` bytes; None if all fits.

    RequestError with the least figure where even the smallest tiles need more.
    """
    measure = encode_memory if encode else decode_memory
    whole = measure(config, height, width, dtype)
    if whole.peak <= budget:
        return None
    pixels = config.out_channels // (config.patch_size or 1) ** 2 * config.factor_spatial**2
    frames = height * width * pixels * config.factor_temporal * dtype.itemsize
    need = whole.peak
    tile_h, tile_w = height, width
    while max(tile_h, tile_w) > _SMALLEST:
        if tile_h >= tile_w:
            tile_h = max(_SMALLEST, tile_h * 3 // 4)
        else:
            tile_w = max(_SMALLEST, tile_w * 3 // 4)
        plan = TilePlan(tile_h, tile_w, overlap=min(tile_h, tile_w) // 4)
        count = len(starts(height, tile_h, plan.overlap)) * len(starts(width, tile_w, plan.overlap))
        waiting = 0 if offload else count - 1
        # Everything grows with the area: a guess from the whole spares most measurements.
        share = tile_h * tile_w / (height * width)
        guess = share * (whole.peak + waiting * whole.cache)
        if guess > 1.2 * budget and max(tile_h, tile_w) > _SMALLEST:
            continue
        one = measure(config, tile_h, tile_w, dtype)
        need = one.peak + waiting * one.cache + (0 if encode else 2 * frames)
        if need <= budget:
            return plan
    raise RequestError(
        f"coding {height} x {width} latents needs {need / 2**20:.0f} MiB even in tiles, "
        f"and {budget / 2**20:.0f} MiB are to be had"
    )


_SMALLEST = 16
