"""Decoding over ranks, split in space: each has a stretch of rows, exactly as if it had all.

A 3 x 3 convolution reads one row beyond its own on either side: neighbours trade that row before
each (a halo exchange), and what the convolution makes of it is cut off. Attention, which the
decoder has once and at the smallest grid, gathers all rows. No tile overlaps, nothing is blended.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sora_engine.distributed.comm import Channel
from sora_engine.distributed.layout import bounds
from sora_engine.vae.blocks import AttentionBlock, CausalConv3d, Upsample
from sora_engine.vae.causal import CausalVAE
from sora_engine.vae.coder import ChunkCoder
from sora_engine.vae.shapes import VAEConfig
from sora_engine.vae.state import VAEState

ROWS = 3
"""The dimension of rows in `[B, C, T, H, W]`."""


class SplitVAE(ChunkCoder[VAEState]):
    """A VAE of which each rank decodes some rows. Hooks on the decoder's layers do the exchanges.

    `decode_chunk` takes all latents at every rank and gives this rank's rows of the frames; where
    there are fewer rows of latents than ranks, the last ranks have none and must not call it.
    """

    def __init__(self, vae: CausalVAE, channel: Channel) -> None:
        self.vae, self.channel = vae, channel
        self._cuts: tuple[int, ...] = ()
        for module in vae.decoder.modules():
            if isinstance(module, CausalConv3d) and module.kernel_size[1] == 3:
                self._widen(module, scale=1)
            elif isinstance(module, Upsample):
                self._widen(module, scale=2)
            elif isinstance(module, AttentionBlock):
                module.register_forward_pre_hook(self._gather)
                module.register_forward_hook(self._own_rows)

    @property
    def config(self) -> VAEConfig:
        return self.vae.config

    def num_active(self, latent_rows: int) -> int:
        """How many ranks have rows: all, where there are enough."""
        return min(latent_rows, self.channel.size)

    def decode_chunk(
        self, latents: Tensor, state: VAEState | None = None, *, consume: bool = False
    ) -> tuple[Tensor, VAEState]:
        """As `VideoCoder.decode_chunk`, but of this rank's rows."""
        self._cuts = bounds(latents.shape[ROWS], self.num_active(latents.shape[ROWS]))
        place = self.channel.index
        own = latents[:, :, :, self._cuts[place] : self._cuts[place + 1]]
        return self.vae.decode_chunk(own, state, consume=consume)

    def encode_chunk(
        self, frames: Tensor, state: VAEState | None = None, *, consume: bool = False
    ) -> tuple[Tensor, VAEState]:
        """As `VideoCoder.encode_chunk`: whole, at every rank."""
        return self.vae.encode_chunk(frames, state, consume=consume)

    def same_state(self, a: VAEState, b: VAEState) -> bool:
        """Whether two states are equal at every rank that has rows: all must go on, or none."""
        pairs = zip(a.caches, b.caches, strict=True)
        same = all(x is not None and y is not None and torch.equal(x, y) for x, y in pairs)
        flag = torch.tensor([same], dtype=torch.uint8, device=self._device)
        return all(bool(part) for part in self._all_rows_of(flag, [(1,)] * (len(self._cuts) - 1)))

    @property
    def _device(self) -> torch.device:
        return next(self.vae.parameters()).device

    # What the hooks do.

    def _widen(self, module: nn.Module, scale: int) -> None:
        """Have a layer see a row more on each side that has a neighbour, and hide what it makes
        of it (`scale` rows)."""

        def before(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            return (self._with_halo(arguments[0]), *arguments[1:])

        def after(_: nn.Module, __: tuple[Any, ...], out: Tensor) -> Tensor:
            top = scale if self.channel.index > 0 else 0
            bottom = scale if self.channel.index + 2 < len(self._cuts) else 0
            own = out.narrow(ROWS, top, out.shape[ROWS] - top - bottom)
            return own.contiguous(memory_format=torch.channels_last_3d)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def _with_halo(self, x: Tensor) -> Tensor:
        place, last = self.channel.index, len(self._cuts) - 2
        first_row = x.narrow(ROWS, 0, 1).contiguous()
        last_row = x.narrow(ROWS, x.shape[ROWS] - 1, 1).contiguous()
        send: dict[int, Tensor] = {}
        if place > 0:
            send[place - 1] = first_row
        if place < last:
            send[place + 1] = last_row
        receive = {peer: torch.empty_like(first_row) for peer in send}
        rows: Mapping[int, Tensor] = self.channel.start(send, receive).wait()
        parts = [rows[place - 1]] if place > 0 else []
        parts.append(x)
        if place < last:
            parts.append(rows[place + 1])
        return torch.cat(parts, dim=ROWS).contiguous(memory_format=torch.channels_last_3d)

    def _gather(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x = arguments[0]
        shapes = []
        for a, b in itertools.pairwise(self._cuts):
            shape = list(x.shape)
            shape[ROWS] = b - a
            shapes.append(tuple(shape))
        whole = torch.cat(self._all_rows_of(x.contiguous(), shapes), dim=ROWS)
        return (whole.contiguous(memory_format=torch.channels_last_3d), *arguments[1:])

    def _own_rows(self, _: nn.Module, __: tuple[Any, ...], out: Tensor) -> Tensor:
        place = self.channel.index
        return out[:, :, :, self._cuts[place] : self._cuts[place + 1]].contiguous(
            memory_format=torch.channels_last_3d
        )

    def _all_rows_of(self, own: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
        """The tensor of every rank that has rows."""
        place = self.channel.index
        peers = [i for i in range(len(shapes)) if i != place]
        receive = {i: own.new_empty(shapes[i]) for i in peers}
        parts = self.channel.start(dict.fromkeys(peers, own), receive).wait()
        return [own if i == place else parts[i] for i in range(len(shapes))]


def shared_copy(vae: CausalVAE) -> CausalVAE:
    """Another module with the same tensors, ready for inference."""
    with torch.device("meta"):
        copy = type(vae)(vae.config)
    copy.load_state_dict(vae.state_dict(), assign=True)
    return copy.eval().requires_grad_(False).prepare()
