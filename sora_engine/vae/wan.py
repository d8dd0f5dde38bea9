"""The Wan video autoencoder: its layers over pixels that may be folded into patches."""

from __future__ import annotations

import torch
from torch import Tensor

from sora_engine.vae.blocks import CausalConv3d, fold_patches, unfold_patches
from sora_engine.vae.causal import CausalVAE
from sora_engine.vae.state import FeatureCache
from sora_engine.vae.wan_coders import Decoder, Encoder
from sora_engine.vae.wan_config import WanVAEConfig


class WanVAE(CausalVAE):
    """`AutoencoderKLWan` of Wan 2.1 and Wan 2.2 (5B); a state dict of diffusers' class loads as it
    is."""

    def __init__(self, config: WanVAEConfig):
        super().__init__(config)
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv3d(config.z_dim * 2, config.z_dim * 2, (1, 1, 1))
        self.post_quant_conv = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config)

    @property
    def config(self) -> WanVAEConfig:
        config: WanVAEConfig = self._config
        return config

    def encode_step(self, frames: Tensor, feat_cache: FeatureCache) -> Tensor:
        """One pass through the layers: frames to the moments of raw latents `[B, 2z, t, h, w]`."""
        x = fold_patches(frames, self.config.patch_size or 1)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        return self.quant_conv.valid(self.encoder(x, feat_cache))

    def decode_step(self, raw: Tensor, feat_cache: FeatureCache) -> Tensor:
        """One pass through the layers: raw (not normalised) latents to their frames."""
        x = self.post_quant_conv.valid(raw.contiguous(memory_format=torch.channels_last_3d))
        x = unfold_patches(self.decoder(x, feat_cache), self.config.patch_size or 1)
        return x.clamp(-1.0, 1.0) if self.config.clip_output else x
