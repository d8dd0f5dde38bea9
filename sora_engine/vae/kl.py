"""The image autoencoder of latent diffusion (arXiv 2112.10752), over the frames of a video.

Each frame is a picture of its own: nothing is kept from one to the next. Tensors are
`[B, C, T, H, W]`, channels last in memory. Parameter names are those of diffusers' `AutoencoderKL`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_engine.vae.blocks import CausalConv3d, Downsample, Upsample
from sora_engine.vae.causal import CausalVAE
from sora_engine.vae.kl_config import KLConfig
from sora_engine.vae.native import Layouts, fuses
from sora_engine.vae.state import FeatureCache
from sora_kernels import group_norm

EPS = 1e-6
"""Of every norm, as in the published models."""


class PictureConv(CausalConv3d):
    """A convolution of one frame at a time; a weight without an axis for time loads, too."""

    fewer_products: ClassVar[bool] = True

    def __init__(self, c_in: int, c_out: int, side: int):
        super().__init__(c_in, c_out, (1, side, side))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.dim() == 4:
            state_dict[prefix + "weight"] = weight.unsqueeze(2)
        super()._load_from_state_dict(state_dict, prefix, *args)


class PictureNorm(nn.GroupNorm):
    """GroupNorm over each frame by itself."""

    def __init__(self, groups: int, channels: int):
        super().__init__(groups, channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        if fuses(x, self.weight):
            return self._fused(x, silu=False)
        pictures = x.transpose(1, 2).flatten(0, 1)  # no copy: channels lie last
        if x.device.type == "cuda" or (x.device.type == "meta" and torch.cuda.is_available()):
            # CUDA's norm takes channels first and converts by itself: so it is seen and counted.
            pictures = pictures.contiguous()
        y = super().forward(pictures).contiguous(memory_format=torch.channels_last)
        return y.unflatten(0, (x.shape[0], -1)).transpose(1, 2)

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the norm."""
        if fuses(x, self.weight):
            return self._fused(x, silu=True)
        y = self(x)
        wants_grad = torch.is_grad_enabled() and y.requires_grad
        return F.silu(y, inplace=not wants_grad and not torch.compiler.is_compiling())

    def _fused(self, x: Tensor, *, silu: bool) -> Tensor:
        batch, _, time, height, width = x.shape
        pixels = x.permute(0, 2, 3, 4, 1).flatten(0, 1).flatten(1, 2)  # no copy
        y = group_norm(pixels, self.num_groups, self.weight, self.bias, silu=silu, eps=self.eps)
        return y.view(batch, time, height, width, -1).permute(0, 4, 1, 2, 3)


class Resnet(nn.Module):
    """Norm, SiLU, convolution, twice, and a shortcut."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = PictureNorm(groups, c_in)
        self.conv1 = PictureConv(c_in, c_out, 3)
        self.norm2 = PictureNorm(groups, c_out)
        self.conv2 = PictureConv(c_out, c_out, 3)
        self.conv_shortcut = PictureConv(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut.valid(x)
        y = self.conv1.valid(self.norm1.silu(x))
        return self.conv2.valid(self.norm2.silu(y), beside=shortcut)


class Attention(nn.Module):
    """One head over the pixels of each frame."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = PictureNorm(groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, time, height, width = x.shape
        tokens = self.group_norm(x).permute(0, 2, 3, 4, 1)
        tokens = tokens.reshape(batch * time, 1, height * width, channels)
        mixed = F.scaled_dot_product_attention(
            self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        )
        (project,) = self.to_out
        mixed = project(mixed).reshape(batch, time, height, width, channels)
        return x + mixed.permute(0, 4, 1, 2, 3)


class MidBlock(nn.Module):
    """Two residual blocks at the smallest grid, and attention between them."""

    def __init__(self, channels: int, config: KLConfig):
        super().__init__()
        groups = config.norm_num_groups
        attentions = [Attention(channels, groups)] if config.mid_block_add_attention else []
        self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList([Resnet(channels, channels, groups) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.resnets
        x = first(x)
        for attention in self.attentions:
            x = attention(x)
        return second(x)  # type: ignore[no-any-return]


class PictureDownsample(Downsample):
    """Halves height and width."""

    def __init__(self, channels: int):
        nn.Module.__init__(self)
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        self.time_conv = None
        self.layouts = Layouts()

    @property
    def convolution(self) -> nn.Conv2d:
        return self.conv


class PictureUpsample(Upsample):
    """Doubles height and width."""

    def __init__(self, channels: int):
        nn.Module.__init__(self)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.time_conv = None
        self.layouts = Layouts()

    @property
    def convolution(self) -> nn.Conv2d:
        return self.conv


class Stage(nn.Module):
    """Residual blocks at one grid, and what leads to the next one."""

    def __init__(self, c_in: int, c_out: int, blocks: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(
            [Resnet(c_in if i == 0 else c_out, c_out, groups) for i in range(blocks)]
        )
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def forward(self, x: Tensor, feat_cache: FeatureCache) -> Tensor:
        for block in self.resnets:
            x = block(x)
        for resample in (*self.downsamplers, *self.upsamplers):
            x = resample(x, feat_cache)
        return x


class Encoder(nn.Module):
    """Pixels `[B, in_channels, T, H, W]` to moments `[B, config.encoded, T, h, w]`."""

    def __init__(self, config: KLConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = PictureConv(config.in_channels, widths[0], 3)
        stages = [
            Stage(c_in, c_out, config.layers_per_block, groups)
            for c_in, c_out in pairwise((widths[0], *widths))
        ]
        for stage, width in zip(stages[:-1], widths[:-1], strict=True):
            stage.downsamplers.append(PictureDownsample(width))
        self.down_blocks = nn.ModuleList(stages)
        self.mid_block = MidBlock(widths[-1], config)
        self.conv_norm_out = PictureNorm(groups, widths[-1])
        self.conv_out = PictureConv(widths[-1], config.encoded, 3)

    def forward(self, x: Tensor, feat_cache: FeatureCache) -> Tensor:
        x = self.conv_in.valid(x)
        for stage in self.down_blocks:
            x = stage(x, feat_cache)
        x = self.mid_block(x)
        return self.conv_out.valid(self.conv_norm_out.silu(x))


class Decoder(nn.Module):
    """Latents `[B, z_dim, T, h, w]` to pixels `[B, out_channels, T, H, W]`."""

    def __init__(self, config: KLConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = PictureConv(config.latent_channels, widths[0], 3)
        self.mid_block = MidBlock(widths[0], config)
        stages = [
            Stage(c_in, c_out, config.layers_per_block + 1, groups)
            for c_in, c_out in pairwise((widths[0], *widths))
        ]
        for stage, width in zip(stages[:-1], widths[:-1], strict=True):
            stage.upsamplers.append(PictureUpsample(width))
        self.up_blocks = nn.ModuleList(stages)
        self.conv_norm_out = PictureNorm(groups, widths[-1])
        self.conv_out = PictureConv(widths[-1], config.out_channels, 3)

    def forward(self, x: Tensor, feat_cache: FeatureCache) -> Tensor:
        x = self.mid_block(self.conv_in.valid(x))
        for stage in self.up_blocks:
            x = stage(x, feat_cache)
        return self.conv_out.valid(self.conv_norm_out.silu(x))


class KLVAE(CausalVAE):
    """`AutoencoderKL`; a state dict of diffusers' class loads as it is."""

    splits_rows: ClassVar[bool] = False
    """Its norms and its attention see the whole picture at every grid."""

    def __init__(self, config: KLConfig):
        super().__init__(config)
        moments, latents = 2 * config.latent_channels, config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = PictureConv(moments, moments, 1) if config.use_quant_conv else None
        self.decoder = Decoder(config)
        self.post_quant_conv = (
            PictureConv(latents, latents, 1) if config.use_post_quant_conv else None
        )

    def encode_step(self, frames: Tensor, feat_cache: FeatureCache) -> Tensor:
        """One pass through the layers: frames to the moments of raw latents `[B, 2z, t, h, w]`."""
        x = self.encoder(frames.contiguous(memory_format=torch.channels_last_3d), feat_cache)
        return x if self.quant_conv is None else self.quant_conv.valid(x)  # type: ignore[no-any-return]

    def decode_step(self, raw: Tensor, feat_cache: FeatureCache) -> Tensor:
        """One pass through the layers: raw (not normalised) latents to their frames."""
        x = raw.contiguous(memory_format=torch.channels_last_3d)
        if self.post_quant_conv is not None:
            x = self.post_quant_conv.valid(x)
        return self.decoder(x, feat_cache)  # type: ignore[no-any-return]
