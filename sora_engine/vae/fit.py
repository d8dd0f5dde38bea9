"""A coder that keeps to a memory budget: whole frames where they fit, tiles where they do not."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import Tensor

from sora_engine.vae.causal import CausalVAE
from sora_engine.vae.coder import ChunkCoder, VideoCoder
from sora_engine.vae.cuda_graph import GraphedVAE
from sora_engine.vae.free_memory import free_bytes
from sora_engine.vae.rehearsal import plan_tiles
from sora_engine.vae.shapes import VAEConfig
from sora_engine.vae.tiling import TiledCoder, TilePlan
from sora_engine.vae.tiny_coder import TinyDecoder

logger = logging.getLogger(__name__)

Side = Literal["decode", "encode"]

_SHARE = 0.8
"""Of the free memory, what coding may plan for: others take and give back while it runs."""


class FittedCoder(ChunkCoder[Any]):
    """A `VideoCoder` that passes videos through another one, in tiles if they do not fit otherwise.

    What fits passes untouched, bit for bit. Tiles are an approximation (see `TiledCoder`), so
    `tiles` says which sizes they are used for. That is settled when a size is first met and then
    kept, so that a size is coded in one way for as long as this coder lives.
    """

    def __init__(
        self,
        coder: VideoCoder[Any],
        *,
        dtype: torch.dtype,
        device: torch.device,
        budget_bytes: int | None = None,
    ):
        self.coder, self._dtype, self._device = coder, dtype, device
        self._budget = budget_bytes
        self._chosen: dict[tuple[Side, int, int], VideoCoder[Any]] = {}

    @property
    def config(self) -> VAEConfig:
        return self.coder.config

    def config_of(self, side: Side) -> VAEConfig:
        """The layout of what does that work."""
        if isinstance(self.coder, TinyDecoder) and side == "decode":
            return self.coder.decode_config
        return self.config

    @property
    def layers(self) -> CausalVAE | None:
        """The PyTorch layers that do the work, where it is they, and the same for both ways."""
        coder = self.coder.vae if isinstance(self.coder, GraphedVAE) else self.coder
        return coder if isinstance(coder, CausalVAE) else None

    @property
    def replays(self) -> bool:
        """Whether steps are CUDA graphs: what they work in then stays reserved between them."""
        coder = self.coder.tiny if isinstance(self.coder, TinyDecoder) else self.coder
        return isinstance(coder, GraphedVAE)

    def limit(self, budget_bytes: int | None) -> None:
        """Keep to this many bytes beside the weights from now on; None: to what is free."""
        self._budget = budget_bytes
        self._chosen.clear()

    def tiles(self, side: Side, height: int, width: int) -> TilePlan | None:
        """The tiles for videos of `height` x `width` latents; None: they are coded whole.

        Raises RequestError, with the least figure, where even the smallest tiles do not fit.
        """
        chosen = self._choose(side, height, width)
        return chosen.plan if isinstance(chosen, TiledCoder) else None

    def tiles_used(self, height: int, width: int) -> dict[str, str]:
        """The tiles in which videos of this size have been coded, by side; empty for whole ones."""
        return {
            side: str(chosen.plan)
            for (side, *size), chosen in self._chosen.items()
            if size == [height, width] and isinstance(chosen, TiledCoder)
        }

    def decode_chunk(
        self, latents: Tensor, state: Any = None, *, consume: bool = False
    ) -> tuple[Tensor, Any]:
        """The next latent frames to frames, in tiles where a whole frame does not fit."""
        chosen = self._choose("decode", *latents.shape[-2:])
        return chosen.decode_chunk(latents, state, consume=consume)

    def encode_chunk(
        self, frames: Tensor, state: Any = None, *, consume: bool = False
    ) -> tuple[Tensor, Any]:
        """The next frames to latents, in tiles where a whole frame does not fit."""
        factor = self.scale_factor_spatial
        chosen = self._choose("encode", *(-(-side // factor) for side in frames.shape[-2:]))
        return chosen.encode_chunk(frames, state, consume=consume)

    def _choose(self, side: Side, height: int, width: int) -> VideoCoder[Any]:
        key = (side, height, width)
        if key not in self._chosen:
            budget = self._budget
            if budget is None:
                budget = int(_SHARE * free_bytes(self._device))
            offload = self._device.type != "cpu"
            plan = plan_tiles(
                self.config_of(side), height, width, budget,
                dtype=self._dtype, offload=offload, encode=side == "encode",
            )  # fmt: skip
            if plan is None:
                self._chosen[key] = self.coder
            else:
                logger.warning(
                    "%s %dx%d latents in %s, since whole frames do not fit into %d MiB",
                    side, height, width, plan, budget >> 20,
                )  # fmt: skip
                self._chosen[key] = TiledCoder(self.coder, plan, offload=offload)
        return self._chosen[key]
