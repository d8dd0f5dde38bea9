"""The VAE of a checkpoint alone: what finished latents need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sora_engine.vae.decoding import decoding
from sora_engine.vae.fit import FittedCoder


@dataclass(frozen=True, slots=True, eq=False)
class VideoDecoder:
    """A VAE on its device, in its dtype."""

    vae: FittedCoder
    dtype: torch.dtype
    device: torch.device

    def decode(self, latents: Tensor, *, wraps: bool) -> Iterator[Tensor]:
        """Frames `[n, height, width, 3]` (uint8, on the host), a latent frame's worth at a time.

        latents: normalised, `[C, T, H, W]`.
        """
        for frames in decoding(
            latents, self.vae, dtype=self.dtype, device=self.device, wraps=wraps
        ):
            if frames is not None:
                yield frames
