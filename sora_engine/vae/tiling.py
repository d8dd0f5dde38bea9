"""Frames too large for the memory, in overlapping tiles that are blended where they meet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from sora_engine.vae.coder import ChunkCoder, VideoCoder
from sora_engine.vae.shapes import VAEConfig

S = TypeVar("S")


@dataclass(frozen=True)
class TilePlan:
    """Height and width of every tile, and how far neighbours overlap at least, in latents."""

    height: int
    width: int
    overlap: int

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < min(self.height, self.width):
            raise ValueError(
                f"tiles of {self.height} x {self.width} latents cannot overlap by {self.overlap}"
            )

    def __str__(self) -> str:
        return f"tiles of {self.height}x{self.width} latents that overlap by {self.overlap}"


def starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where the tiles of one axis begin: as few as cover it, all of one length, evenly spread."""
    if tile >= size:
        return [0]
    count = -(-(size - overlap) // (tile - overlap))
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


def blend_weights(size: int, tile: int, at: list[int]) -> Tensor:
    """`[tiles, tile]` float32: a tile's weight along one axis. It rises over the overlap with the
    tile before and falls over that with the next; at every place the weights add up to one."""
    weights = torch.ones(len(at), tile, dtype=torch.float32)
    for i in range(1, len(at)):
        shared = at[i - 1] + tile - at[i]
        ramp = (torch.arange(shared, dtype=torch.float32) + 0.5) / shared
        weights[i, :shared] *= ramp
        weights[i - 1, tile - shared :] *= 1 - ramp
    total = torch.zeros(size, dtype=torch.float32)
    for i, start in enumerate(at):
        total[start : start + tile] += weights[i]
    for i, start in enumerate(at):
        weights[i] /= total[start : start + tile]
    return weights


@dataclass
class TiledState(Generic[S]):
    """A state for every tile, row by row."""

    tiles: list[S]

    @property
    def caches(self) -> tuple[Tensor | None, ...]:
        """The caches of all tiles, in order."""
        return tuple(cache for tile in self.tiles for cache in getattr(tile, "caches", ()))


class TiledCoder(ChunkCoder[TiledState[S]], Generic[S]):
    """A `VideoCoder` that passes the tiles of each stretch through another one.

    Frames that fit into one tile pass untouched, bit for bit. Otherwise the result differs a little
    from the untiled one: a tile sees nothing beyond its border. With `offload` the caches of the
    tiles that are not at work wait in host memory, so that the device holds those of one.
    """

    def __init__(self, coder: VideoCoder[S], plan: TilePlan, *, offload: bool = False):
        self.coder, self.plan, self.offload = coder, plan, offload

    @property
    def config(self) -> VAEConfig:
        return self.coder.config

    def decode_chunk(
        self, latents: Tensor, state: TiledState[S] | None = None, *, consume: bool = False
    ) -> tuple[Tensor, TiledState[S]]:
        """The next latent frames to frames, tile by tile; the state has one for each tile."""
        factor = self.scale_factor_spatial
        return self._tiled(self.coder.decode_chunk, latents, state, consume, 1, factor)

    def encode_chunk(
        self, frames: Tensor, state: TiledState[S] | None = None, *, consume: bool = False
    ) -> tuple[Tensor, TiledState[S]]:
        """The next frames to latents, tile by tile; the state has one for each tile."""
        factor = self.scale_factor_spatial
        return self._tiled(self.coder.encode_chunk, frames, state, consume, factor, 1)

    def _tiled(
        self,
        run: Callable[..., tuple[Tensor, S]],
        x: Tensor,
        state: TiledState[S] | None,
        consume: bool,
        unit_in: int,
        unit_out: int,
    ) -> tuple[Tensor, TiledState[S]]:
        height, width = x.shape[3] // unit_in, x.shape[4] // unit_in
        tile_h, tile_w = min(self.plan.height, height), min(self.plan.width, width)
        tops = starts(height, tile_h, self.plan.overlap)
        lefts = starts(width, tile_w, self.plan.overlap)
        if len(tops) == len(lefts) == 1:
            out, only = run(x, state.tiles[0] if state else None, consume=consume)
            return out, TiledState([only])
        rows = blend_weights(height * unit_out, tile_h * unit_out, [t * unit_out for t in tops])
        columns = blend_weights(width * unit_out, tile_w * unit_out, [t * unit_out for t in lefts])
        total: Tensor | None = None
        states: list[S] = []
        for i, top in enumerate(tops):
            for j, left in enumerate(lefts):
                ys = slice(top * unit_in, (top + tile_h) * unit_in)
                xs = slice(left * unit_in, (left + tile_w) * unit_in)
                old: Any = state.tiles[len(states)] if state else None
                if self.offload and old is not None:
                    old = old.to(x.device)
                new: Any
                part, new = run(x[..., ys, xs], old, consume=consume or self.offload)
                states.append(new.to("cpu") if self.offload else new)
                del old, new  # the device holds them no longer while the next tile is at work
                if total is None:
                    size = (height * unit_out, width * unit_out)
                    total = part.new_zeros((*part.shape[:3], *size))
                weight = (rows[i][:, None] * columns[j]).to(part)
                ys = slice(top * unit_out, (top + tile_h) * unit_out)
                xs = slice(left * unit_out, (left + tile_w) * unit_out)
                total[..., ys, xs] += part * weight
        assert total is not None
        return total, TiledState(states)
