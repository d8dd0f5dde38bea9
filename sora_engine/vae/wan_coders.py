"""The encoder and the decoder: stages of residual blocks with resampling between them."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from sora_engine.errors import CheckpointError
from sora_engine.vae.blocks import (
    AttentionBlock,
    AverageDown,
    CausalConv3d,
    Downsample,
    DuplicateUp,
    MidBlock,
    ResidualBlock,
    RMSNorm,
    Upsample,
)
from sora_engine.vae.state import FeatureCache
from sora_engine.vae.wan_config import WanVAEConfig


class DownStage(nn.Module):
    """A stage of the residual (Wan 2.2) encoder: blocks, resampling, an averaged shortcut."""

    def __init__(self, c_in: int, c_out: int, blocks: int, *, down: bool, time: bool):
        super().__init__()
        factor = (2 if time else 1) * (4 if down else 1)
        if c_in * factor % c_out:
            raise CheckpointError(
                f"a residual down stage cannot average {c_in} x {factor} channels into {c_out}"
            )
        self.avg_shortcut = AverageDown(c_in, c_out, time=2 if time else 1, space=2 if down else 1)
        self.resnets = nn.ModuleList(
            [ResidualBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks)]
        )
        self.downsampler = Downsample(c_out, time=time) if down else None

    def forward(self, x: Tensor, feat_cache: FeatureCache) -> Tensor:
        shortcut = self.avg_shortcut(x)
        for block in self.resnets:
            x = block(x, feat_cache)
        if self.downsampler is not None:
            x = self.downsampler(x, feat_cache)
        return x + shortcut


class UpStage(nn.Module):
    """A stage of the decoder: blocks, then upsampling.

    Wan 2.1 halves the channels while upsampling; the residual layout (Wan 2.2) keeps them and adds
    a shortcut of duplicated channels.
    """

    def __init__(self, c_in: int, c_out: int, blocks: int, *, up: bool, time: bool, residual: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResidualBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks + 1)]
        )
        self.avg_shortcut: DuplicateUp | None = None
        self.upsampler: Upsample | None = None
        self.upsamplers: nn.ModuleList | None = None
        if up and residual:
            factor = (2 if time else 1) * 4
            if c_out * factor % c_in:
                raise CheckpointError(
                    f"a residual up stage cannot spread {c_in} channels over {c_out} x {factor}"
                )
            self.avg_shortcut = DuplicateUp(c_in, c_out, time=2 if time else 1, space=2)
            self.upsampler = Upsample(c_out, c_out, time=time)
        elif up:
            self.upsamplers = nn.ModuleList([Upsample(c_out, c_out // 2, time=time)])

    def forward(self, x: Tensor, feat_cache: FeatureCache) -> Tensor:
        stage_input = x
        for block in self.resnets:
            x = block(x, feat_cache)
        if self.upsamplers is not None:
            return self.upsamplers[0](x, feat_cache)
        if self.upsampler is None or self.avg_shortcut is None:
            return x
        return self.upsampler(x, feat_cache) + self.avg_shortcut(
            stage_input, first=feat_cache.first
        )


class Encoder(nn.Module):
    """Pixels `[B, in_channels, T, H, W]` to moments `[B, 2 * z_dim, t, h, w]`."""

    def __init__(self, config: WanVAEConfig):
        super().__init__()
        dims = [config.base_dim * mult for mult in (1, *config.dim_mult)]
        last = len(config.dim_mult) - 1
        self.conv_in = CausalConv3d(config.in_channels, dims[0], (3, 3, 3))
        stages: list[nn.Module] = []
        scale = 1.0
        for i, (c_in, c_out) in enumerate(pairwise(dims)):
            down = i != last
            time = down and config.temperal_downsample[i]
            if config.is_residual:
                stages.append(DownStage(c_in, c_out, config.num_res_blocks, down=down, time=time))
                continue
            for j in range(config.num_res_blocks):
                stages.append(ResidualBlock(c_in if j == 0 else c_out, c_out))
                if scale in config.attn_scales:
                    stages.append(AttentionBlock(c_out))
            if down:
                stages.append(Downsample(c_out, time=time))
                scale /= 2
        self.down_blocks = nn.ModuleList(stages)
        self.mid_block = MidBlock(dims[-1])
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], config.z_dim * 2, (3, 3, 3))

    def forward(self, x: Tensor, feat_cache: FeatureCache) -> Tensor:
        x = self.conv_in(x, feat_cache)
        for stage in self.down_blocks:
            x = stage(x, feat_cache)
        x = self.mid_block(x, feat_cache)
        return self.conv_out(x, feat_cache, self.norm_out)


class Decoder(nn.Module):
    """Latents `[B, z_dim, t, h, w]` to pixels `[B, out_channels, T, H, W]`."""

    def __init__(self, config: WanVAEConfig):
        super().__init__()
        base = config.decoder_base_dim or config.base_dim
        dims = [base * mult for mult in (config.dim_mult[-1], *reversed(config.dim_mult))]
        last = len(config.dim_mult) - 1
        time_flags = config.temperal_downsample[::-1]
        self.conv_in = CausalConv3d(config.z_dim, dims[0], (3, 3, 3))
        self.mid_block = MidBlock(dims[0])
        stages = []
        for i, (c_in, c_out) in enumerate(pairwise(dims)):
            up = i != last
            stages.append(
                UpStage(
                    c_in if i == 0 or config.is_residual else c_in // 2,
                    c_out,
                    config.num_res_blocks,
                    up=up,
                    time=up and time_flags[i],
                    residual=config.is_residual,
                )
            )
        self.up_blocks = nn.ModuleList(stages)
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], config.out_channels, (3, 3, 3))

    def forward(self, x: Tensor, feat_cache: FeatureCache) -> Tensor:
        x = self.conv_in(x, feat_cache)
        x = self.mid_block(x, feat_cache)
        for stage in self.up_blocks[:-1]:
            x = stage(x, feat_cache)
        if torch.compiler.is_compiling():  # a graph for elsewhere is not unrolled
            return self._at_full_size(x, feat_cache)
        # Here activations are largest, and nothing changes the number of frames any more.
        return feat_cache.in_parts(self._at_full_size, x, 1)

    def _at_full_size(self, x: Tensor, feat_cache: FeatureCache) -> Tensor:
        x = self.up_blocks[-1](x, feat_cache)
        return self.conv_out(x, feat_cache, self.norm_out)
