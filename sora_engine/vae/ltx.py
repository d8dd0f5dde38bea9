"""LTX-Video's autoencoder (arXiv 2501.00103): 32 x 32 pixels and 8 frames to a latent.

Its decoder sees some latent frames ahead, so frames come out late, and the last ones when the video
ends. Newer decoders take a last denoising step: they are told a noise level, and noise is mixed
into the latents.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from sora_engine.vae.causal import CausalVAE
from sora_engine.vae.ltx_blocks import (
    Downsample,
    LevelEmbedder,
    LTXConv,
    Norm,
    Resnet,
    StridedConv,
    Upsample,
)
from sora_engine.vae.ltx_config import DOWN_095, LTXVAEConfig
from sora_engine.vae.state import FeatureCache
from sora_kernels.transfer import to_device

LATENT_SEED = 0x17C0
"""Of the noise that is mixed into latents: each latent frame has its own, whatever video it is
of."""
PART = 4
"""Frames that go through a stage of the decoder together, where the end of a video gives more."""


class DownStage(nn.Module):
    """Residual blocks, then downsampling, then in older layouts a block of more channels."""

    def __init__(self, config: LTXVAEConfig, stage: int, c_in: int, c_out: int):
        super().__init__()
        eps, stride = config.resnet_norm_eps, config.strides[stage]
        blocks = range(config.layers_per_block[stage])
        self.resnets = nn.ModuleList([Resnet(c_in, c_in, causal=True, eps=eps) for _ in blocks])
        self.downsamplers = nn.ModuleList()
        newer = config.down_block_types[stage] == DOWN_095
        if config.spatio_temporal_scaling[stage]:
            folds = newer and config.downsample_type[stage] != "conv"
            self.downsamplers.append(
                Downsample(c_in, c_out, stride) if folds else StridedConv(c_in)
            )
        self.conv_out = None
        if c_in != c_out and not newer:
            self.conv_out = Resnet(c_in, c_out, causal=True, eps=eps)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        for block in (*self.resnets, *self.downsamplers):
            x = block(x, cache)
        return x if self.conv_out is None else self.conv_out(x, cache)  # type: ignore[no-any-return]


class Blocks(nn.Module):
    """Residual blocks of one width that may know the noise level."""

    def __init__(
        self,
        channels: int,
        layers: int,
        *,
        causal: bool,
        eps: float,
        noisy: bool,
        levelled: bool,
    ):
        super().__init__()
        self.time_embedder = LevelEmbedder(4 * channels) if levelled else None
        self.resnets = nn.ModuleList(
            [
                Resnet(channels, channels, causal=causal, eps=eps, noisy=noisy, levelled=levelled)
                for _ in range(layers)
            ]
        )

    def forward(self, x: Tensor, cache: FeatureCache, level: Tensor | None = None) -> Tensor:
        known = None if self.time_embedder is None else self.time_embedder(level)
        for block in self.resnets:
            x = block(x, cache, known)
        return x


class UpStage(Blocks):
    """A block of other channels where they change, upsampling, and residual blocks."""

    def __init__(self, config: LTXVAEConfig, stage: int, c_in: int, c_out: int):
        causal, eps = config.decoder_causal, config.resnet_norm_eps
        noisy = config.decoder_inject_noise[::-1][stage + 1]
        levelled = config.timestep_conditioning
        layers = config.decoder_layers_per_block[::-1][stage + 1]
        super().__init__(c_out, layers, causal=causal, eps=eps, noisy=noisy, levelled=levelled)
        if levelled:
            self.time_embedder = LevelEmbedder(4 * c_in)
        self.conv_in = None
        if c_in != c_out:
            self.conv_in = Resnet(
                c_in, c_out, causal=causal, eps=eps, noisy=noisy, levelled=levelled
            )
        self.upsamplers = nn.ModuleList()
        if config.decoder_spatio_temporal_scaling[::-1][stage]:
            factor = config.upsample_factor[::-1][stage]
            residual = config.upsample_residual[::-1][stage]
            self.upsamplers.append(
                Upsample(c_out * factor, causal=causal, residual=residual, factor=factor)
            )

    def forward(self, x: Tensor, cache: FeatureCache, level: Tensor | None = None) -> Tensor:
        known = None if self.time_embedder is None else self.time_embedder(level)
        if self.conv_in is not None:
            x = self.conv_in(x, cache, known)
        for upsampler in self.upsamplers:
            x = upsampler(x, cache)
        for block in self.resnets:
            x = block(x, cache, known)
        return x


class Encoder(nn.Module):
    """Pixels `[B, in_channels, T, H, W]` to moments `[B, 2 * z_dim, t, h, w]`."""

    def __init__(self, config: LTXVAEConfig):
        super().__init__()
        self.patch, widths = config.patch_size, config.block_out_channels
        newer = config.down_block_types[-1] == DOWN_095
        self.conv_in = LTXConv(config.in_channels * self.patch**2, widths[0], causal=True)
        outs = widths[1:] if newer else (*widths[1:], widths[-1])
        pairs = zip((widths[0], *outs), outs, strict=False)
        self.down_blocks = nn.ModuleList(
            [DownStage(config, i, c_in, c_out) for i, (c_in, c_out) in enumerate(pairs)]
        )
        last = outs[-1]
        self.mid_block = Blocks(
            last, config.layers_per_block[-1],
            causal=True, eps=config.resnet_norm_eps, noisy=False, levelled=False,
        )  # fmt: skip
        self.conv_out = LTXConv(last, config.latent_channels + 1, causal=True)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        x, _ = self.conv_in.stretch(fold_pixels(x, self.patch), cache)
        for stage in self.down_blocks:
            x = stage(x, cache)
        x = self.mid_block(x, cache)
        x, _ = self.conv_out.stretch(x, cache, Norm())
        # All channels have one log-variance.
        return torch.cat([x, x[:, -1:].expand(-1, x.shape[1] - 2, -1, -1, -1)], dim=1)


class Decoder(nn.Module):
    """Latents `[B, z_dim, t, h, w]` to pixels `[B, out_channels, T, H, W]`."""

    def __init__(self, config: LTXVAEConfig):
        super().__init__()
        self.patch, causal = config.patch_size, config.decoder_causal
        widths, levelled = config.decoder_block_out_channels[::-1], config.timestep_conditioning
        self.conv_in = LTXConv(config.latent_channels, widths[0], causal=causal)
        self.mid_block = Blocks(
            widths[0], config.decoder_layers_per_block[-1], causal=causal,
            eps=config.resnet_norm_eps, noisy=config.decoder_inject_noise[-1], levelled=levelled,
        )  # fmt: skip
        stages, width = [], widths[0]
        for i, (channels, factor) in enumerate(
            zip(widths, config.upsample_factor[::-1], strict=True)
        ):
            stages.append(UpStage(config, i, width // factor, channels // factor))
            width = channels // factor
        self.up_blocks = nn.ModuleList(stages)
        self.conv_out = LTXConv(width, config.out_channels * self.patch**2, causal=causal)
        self.timestep_scale_multiplier: Tensor | None = None
        self.time_embedder = self.scale_shift_table = None
        if levelled:
            self.timestep_scale_multiplier = nn.Parameter(torch.tensor(1000.0))
            self.time_embedder = LevelEmbedder(2 * width)
            self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        for number, block in enumerate(m for m in self.modules() if isinstance(m, Resnet)):
            block.number = number

    def forward(self, x: Tensor, cache: FeatureCache, level: float) -> Tensor:
        known = None
        if self.timestep_scale_multiplier is not None:
            known = self.timestep_scale_multiplier * level
        x, _ = self.conv_in.stretch(x, cache)
        x = self.mid_block(x, cache, known)
        return self._stages(x, cache, 0, known)

    def _stages(self, x: Tensor, cache: FeatureCache, first: int, level: Tensor | None) -> Tensor:
        """From a stage on. The end of a video gives many frames at once, which go on in parts."""
        if first == len(self.up_blocks):
            return self._out(x, cache, level)

        def run(part: Tensor, own: FeatureCache) -> Tensor:
            part = self.up_blocks[first](part, own, level)
            return self._stages(part, own, first + 1, level)

        return cache.in_parts(run, x, PART)

    def _out(self, x: Tensor, cache: FeatureCache, level: Tensor | None) -> Tensor:
        norm = Norm()
        if self.time_embedder is not None:
            assert self.scale_shift_table is not None
            table = self.scale_shift_table + self.time_embedder(level).unflatten(0, (2, -1))
            shift, scale = table.unbind()
            norm = Norm(scale, shift)
        x, _ = self.conv_out.stretch(x, cache, norm)
        return unfold_pixels(x, self.patch)


class LTXVAE(CausalVAE):
    """`AutoencoderKLLTXVideo`; a state dict of diffusers' class loads by `to_own_name`."""

    splits_rows: ClassVar[bool] = False

    def __init__(self, config: LTXVAEConfig):
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        # They are in every state dict; the configuration has the values.
        self.register_buffer("latents_mean", torch.tensor(config.latents_mean))
        self.register_buffer("latents_std", torch.tensor(config.latents_std))

    @property
    def config(self) -> LTXVAEConfig:
        config: LTXVAEConfig = self._config
        return config

    def encode_step(self, frames: Tensor, feat_cache: FeatureCache) -> Tensor:
        """One pass through the layers: frames to the moments of raw latents `[B, 2z, t, h, w]`."""
        return self.encoder(frames.contiguous(memory_format=torch.channels_last_3d), feat_cache)  # type: ignore[no-any-return]

    def decode_step(self, raw: Tensor, feat_cache: FeatureCache) -> Tensor:
        """One pass through the layers: raw (not normalised) latents to the frames that are known
        by now."""
        config = self.config
        if config.timestep_conditioning and raw.shape[2]:
            noise = latent_noise(raw, feat_cache.latent_frames)
            raw = torch.lerp(raw, noise, config.decode_noise_scale)
        x = raw.contiguous(memory_format=torch.channels_last_3d)
        return self.decoder(x, feat_cache, config.decode_timestep)  # type: ignore[no-any-return]


def latent_noise(raw: Tensor, first: int) -> Tensor:
    """Noise like latents `[B, z, t, h, w]` of which the first is latent frame `first` of its
    video."""
    if raw.is_meta:
        return torch.empty_like(raw)
    frames = []
    for number in range(first, first + raw.shape[2]):
        generator = torch.Generator().manual_seed(LATENT_SEED + number)
        shape = (raw.shape[1], *raw.shape[3:])
        frames.append(torch.randn(shape, generator=generator))
    noise = torch.stack(frames, dim=1)[None].to(raw.dtype)
    return to_device(noise, raw.device)


def fold_pixels(x: Tensor, patch: int) -> Tensor:
    """`[B, C, T, H, W] -> [B, C * patch^2, T, H / patch, W / patch]`; columns before rows."""
    x = x.unflatten(4, (x.shape[4] // patch, patch)).unflatten(3, (x.shape[3] // patch, patch))
    x = x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)
    return x.contiguous(memory_format=torch.channels_last_3d)


def unfold_pixels(x: Tensor, patch: int) -> Tensor:
    """The inverse of `fold_pixels`."""
    batch, channels, time, height, width = x.shape
    x = x.reshape(batch, channels // patch**2, patch, patch, time, height, width)
    x = x.permute(0, 1, 4, 5, 3, 6, 2)
    return x.reshape(batch, channels // patch**2, time, height * patch, width * patch)
