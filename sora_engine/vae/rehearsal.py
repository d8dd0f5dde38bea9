"""What decoding and encoding will need, known before they start.

The layers are run on meta tensors, which have shapes and no storage, while every storage that
comes and goes is counted: the figures follow the code and cannot fall behind it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sora_engine.errors import RequestError
from sora_engine.vae.tiling import TilePlan, starts
from sora_engine.vae.wan import WanVAE
from sora_engine.vae.wan_config import VAEConfig

_SMALLEST = 16
"""Latents along the side of the smallest tile."""
_OVERLAP = 8
"""Latents that neighbouring tiles share where they are large enough: 64 pixels for Wan 2.1."""


@dataclass(frozen=True)
class CodingMemory:
    """Bytes for one stretch of a video whose latents come one at a time."""

    cache: int
    """Held between two latent frames, whatever the length of the video."""
    peak: int
    """The most that is alive at one time: caches, activations, the frames that come out."""


class StorageMeter(TorchDispatchMode):
    """Sums the bytes of the storages that are alive, and keeps the highest sum.

    apart: what was there before, such as weights: it counts for nothing, nor do views of it.
    """

    def __init__(self, apart: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}
        self.now = self.peak = 0
        for tensor in apart:
            if tensor.layout is torch.strided:
                self._watch(tensor.untyped_storage(), 0)

    def count(self, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                self._watch(storage, storage.nbytes())

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = size
            self.now += size
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


class NoScores(TorchFunctionMode):
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


def decode_peak_bytes(
    config: VAEConfig,
    latent_shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    tiles: TilePlan | None = None,
    *,
    offload: bool = False,
    loop: bool = False,
) -> int:
    """The most that decoding latents of `latent_shape [..., h, w]` holds beside the weights and the
    latents, whatever their number: caches, activations, the frames of one latent.

    tiles: the plan of a `TiledCoder`; with `offload` the caches of waiting tiles are not counted,
    being on the host. loop: one more generation of caches is kept, to see when a lap repeats.
    Convolutions' own workspaces come on top: oneDNN's are a few MiB.
    """
    height, width = latent_shape[-2:]
    return _peak(decode_memory, config, height, width, dtype, tiles, offload, loop)


def encode_peak_bytes(
    config: VAEConfig,
    latent_shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    tiles: TilePlan | None = None,
    *,
    offload: bool = False,
) -> int:
    """As `decode_peak_bytes`, of encoding frames into latents of that shape. The frames of three
    latents that are put in are counted too."""
    height, width = latent_shape[-2:]
    return _peak(encode_memory, config, height, width, dtype, tiles, offload, False)


def _peak(
    measure: Callable[..., CodingMemory],
    config: VAEConfig,
    height: int,
    width: int,
    dtype: torch.dtype,
    tiles: TilePlan | None,
    offload: bool,
    loop: bool,
) -> int:
    if tiles is None or (tiles.height >= height and tiles.width >= width):
        whole = measure(config, height, width, dtype)
        return whole.peak + (whole.cache if loop else 0)
    tile_h, tile_w = min(tiles.height, height), min(tiles.width, width)
    one = measure(config, tile_h, tile_w, dtype)
    count = len(starts(height, tile_h, tiles.overlap)) * len(starts(width, tile_w, tiles.overlap))
    waiting = 0 if offload else (count - 1) + (count if loop else 0)
    out = 0
    if measure is decode_memory:
        # The frames that tiles are blended into, and a tile's share while it is weighted.
        out = _frame_bytes(config, dtype) * (height * width + 2 * tile_h * tile_w)
    return one.peak + waiting * one.cache + out


def _frame_bytes(config: VAEConfig, dtype: torch.dtype) -> int:
    """Bytes of the pixels that one latent becomes."""
    channels = config.out_channels // (config.patch_size or 1) ** 2
    return channels * config.factor_spatial**2 * config.factor_temporal * dtype.itemsize


def surely_fits(
    config: VAEConfig, height: int, width: int, budget: int, dtype: torch.dtype = torch.float32
) -> bool:
    """Whether coding this size needs no measuring: 40 of the widest layer at full resolution, which
    is more than any layout takes, are still within the budget."""
    channels = max(config.base_dim, config.decoder_base_dim or 0) * max(config.dim_mult)
    channels = max(channels, config.z_dim, config.in_channels)
    pixels = height * width * config.factor_spatial**2
    return 40 * channels * config.factor_temporal * pixels * dtype.itemsize <= budget


def _measure(
    config: VAEConfig, dtype: torch.dtype, method: Callable[[WanVAE], Any], chunks: list[Tensor]
) -> CodingMemory:
    with torch.device("meta"):
        vae = WanVAE(config).to(dtype).requires_grad_(False).prepare(onednn=False)
    run = method(vae)

    def code() -> Any:
        state: Any = None
        for chunk in chunks:
            _, state = run(chunk, state, consume=True)
        return state

    with torch.inference_mode(False), torch.no_grad(), NoScores():
        code()  # lays out the weights, which are not counted
        with StorageMeter(vae.parameters()) as meter:
            state = code()
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
    if surely_fits(config, height, width, budget, dtype):
        return None
    measure = encode_memory if encode else decode_memory
    peak_bytes = encode_peak_bytes if encode else decode_peak_bytes
    whole = measure(config, height, width, dtype)
    if whole.peak <= budget:
        return None
    least = whole.peak
    tile_h, tile_w = height, width
    while max(tile_h, tile_w) > _SMALLEST:
        if tile_h >= tile_w:
            tile_h = max(_SMALLEST, tile_h * 3 // 4)
        else:
            tile_w = max(_SMALLEST, tile_w * 3 // 4)
        plan = TilePlan(tile_h, tile_w, overlap=min(_OVERLAP, min(tile_h, tile_w) // 4))
        count = len(starts(height, tile_h, plan.overlap)) * len(starts(width, tile_w, plan.overlap))
        waiting = 0 if offload else count - 1
        # Everything grows with the area: a guess from the whole spares most measurements.
        share = tile_h * tile_w / (height * width)
        guess = share * (whole.peak + waiting * whole.cache)
        if guess > 1.2 * budget and max(tile_h, tile_w) > _SMALLEST:
            continue
        need = peak_bytes(config, (height, width), dtype, plan, offload=offload)
        if need <= budget:
            return plan
        least = min(least, need)
    raise RequestError(
        f"coding {height} x {width} latents needs {least / 2**20:.0f} MiB even in tiles, "
        f"and {budget / 2**20:.0f} MiB are to be had"
    )
