"""What decoding and encoding will need, known before they start.

The layers are run on meta tensors, which have shapes and no storage, while every storage that
comes and goes is counted: the figures follow the code and cannot fall behind it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sora_engine.errors import RequestError
from sora_engine.vae.blocks import CausalConv3d
from sora_engine.vae.causal import CausalVAE
from sora_engine.vae.decoding import decoding
from sora_engine.vae.meter import META, NoScores, OnOneDevice, StorageMeter
from sora_engine.vae.registry import build_vae, vae_kind
from sora_engine.vae.shapes import VAEConfig, look_ahead
from sora_engine.vae.state import VAEState
from sora_engine.vae.tiling import TilePlan, starts

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


@functools.lru_cache(maxsize=256)
def decode_memory(
    config: VAEConfig, height: int, width: int, dtype: torch.dtype = torch.float32
) -> CodingMemory:
    """For `height` x `width` latents, batch 1, decoded a latent frame at a time."""
    latents = torch.empty(1, config.z_dim, 1, height, width, dtype=dtype, device=META)
    chunks = [latents] * (3 + look_ahead(config))
    if look_ahead(config):
        chunks.append(latents[:, :, :0])
    return _rehearse(config, dtype, lambda vae: _in_chunks(vae.decode_chunk, chunks))


@functools.lru_cache(maxsize=256)
def encode_memory(
    config: VAEConfig, height: int, width: int, dtype: torch.dtype = torch.float32
) -> CodingMemory:
    """For frames of `height` x `width` latents, batch 1, encoded a latent frame at a time."""
    chunks = list(_pixels(config, height, width, dtype, length=3))
    return _rehearse(config, dtype, lambda vae: _in_chunks(vae.encode_chunk, chunks))


@functools.lru_cache(maxsize=256)
def video_decode_memory(
    config: VAEConfig, height: int, width: int, dtype: torch.dtype, length: int, wraps: bool
) -> CodingMemory:
    """Of `decoding.decoding`, run on `length` latent frames of `height` x `width`: what a caller's
    frames are made from is counted too, and the laps over a loop."""
    latents = torch.empty(config.z_dim, length, height, width, dtype=dtype, device=META)

    def run(vae: CausalVAE) -> Iterator[None]:
        coder: Any = _OneLap(vae)
        for frames in decoding(latents, coder, dtype=dtype, device=META, wraps=wraps):
            yield None
            del frames

    return _rehearse(config, dtype, run, apart=[latents])


@functools.lru_cache(maxsize=256)
def video_encode_memory(
    config: VAEConfig, height: int, width: int, dtype: torch.dtype, length: int
) -> CodingMemory:
    """Of `length` latent frames of `height` x `width`, one at a time, their pixels included."""
    return _rehearse(
        config,
        dtype,
        lambda vae: _in_chunks(
            vae.encode_chunk, _pixels(config, height, width, dtype, length=length)
        ),
    )


class _OneLap:
    """Layers that find a loop's second lap, which holds what any further one does, to be the last.
    Nothing can be compared on the meta device."""

    def __init__(self, vae: CausalVAE) -> None:
        self.decode_chunk, self.config = vae.decode_chunk, vae.config
        self.scale_factor_temporal = vae.scale_factor_temporal

    def same_state(self, a: Any, b: Any) -> bool:
        return True


def _in_chunks(
    run: Callable[..., tuple[Tensor, VAEState]], chunks: Iterable[Tensor]
) -> Iterator[int]:
    """Code the chunks in order; gives the bytes of the caches after each."""
    state: VAEState | None = None
    for chunk in chunks:
        _, state = run(chunk, state, consume=True)
        yield state.nbytes


def _pixels(
    config: VAEConfig, height: int, width: int, dtype: torch.dtype, *, length: int
) -> Iterator[Tensor]:
    """Frames of `length` latent frames of `height` x `width`, a latent frame's worth at a time."""
    size = (height * config.factor_spatial, width * config.factor_spatial)
    for i in range(length):
        count = config.factor_temporal if i else 1
        yield torch.empty(1, config.pixel_channels, count, *size, dtype=dtype, device=META)


@functools.lru_cache(maxsize=8)
def hollow_vae(config: VAEConfig, dtype: torch.dtype) -> CausalVAE:
    """The layers without weights, which are laid out as on their first run: that is not counted."""
    with META:
        vae = build_vae(config).to(dtype).requires_grad_(False).prepare(onednn=False)
        latents = torch.empty(1, config.z_dim, 1, _SMALLEST, _SMALLEST, dtype=dtype)
    with StorageMeter():  # whose operations are quick, and do not import torch's compiler
        for _ in _in_chunks(vae.decode_chunk, [latents] * 3):
            pass
        if vae_kind(config.class_name).encodes:
            chunks = _pixels(config, _SMALLEST, _SMALLEST, dtype, length=3)
            for _ in _in_chunks(vae.encode_chunk, chunks):
                pass
    return vae


def _rehearse(
    config: VAEConfig,
    dtype: torch.dtype,
    run: Callable[[CausalVAE], Iterator[int | None]],
    apart: Sequence[Tensor] = (),
) -> CodingMemory:
    """What `run` takes beside the weights and `apart`. It yields between two turns the bytes that
    stay for the next one; None: all that is alive then."""
    with torch.inference_mode(False), torch.no_grad(), NoScores(), OnOneDevice():
        vae = hollow_vae(config, dtype)
        with StorageMeter([*apart, *vae.parameters()]) as meter:
            kept = [meter.now if held is None else held for held in run(vae)]
    convs = [module for module in vae.modules() if isinstance(module, CausalConv3d)]
    again = sum(conv.second_bytes for conv in convs)
    return CodingMemory(cache=max(kept), peak=meter.peak + again)


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
    return (
        config.pixel_channels * config.factor_spatial**2 * config.factor_temporal * dtype.itemsize
    )


def surely_fits(
    config: VAEConfig, height: int, width: int, budget: int, dtype: torch.dtype = torch.float32
) -> bool:
    """Whether coding this size needs no measuring: 40 of the widest layer at full resolution, which
    is more than any layout takes, are still within the budget."""
    pixels = height * width * config.factor_spatial**2
    return 40 * config.widest * config.factor_temporal * pixels * dtype.itemsize <= budget


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
