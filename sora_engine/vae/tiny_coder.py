"""A model's own autoencoder for encoding, and a tiny one for decoding: `vae_backend="tiny"`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sora_engine.vae.coder import ChunkCoder, VideoCoder
from sora_engine.vae.shapes import VAEConfig


class TinyDecoder(ChunkCoder[Any]):
    """A `VideoCoder` that decodes with a tiny autoencoder.

    What a caller gives is encoded by the model's own, `vae`: latents of a tiny encoder would be
    seen by the transformer. Latents that are kept stay the model's own, too.
    """

    def __init__(self, vae: VideoCoder[Any], tiny: VideoCoder[Any]) -> None:
        self.vae, self.tiny = vae, tiny

    @property
    def config(self) -> VAEConfig:
        return self.vae.config

    @property
    def decode_config(self) -> VAEConfig:
        """Of what decodes."""
        return self.tiny.config

    def decode_chunk(
        self, latents: Tensor, state: Any = None, *, consume: bool = False
    ) -> tuple[Tensor, Any]:
        """The next latent frames to frames, by the tiny decoder."""
        return self.tiny.decode_chunk(latents, state, consume=consume)

    def encode_chunk(
        self, frames: Tensor, state: Any = None, *, consume: bool = False
    ) -> tuple[Tensor, Any]:
        """The next frames to latents, by the model's own encoder."""
        return self.vae.encode_chunk(frames, state, consume=consume)
