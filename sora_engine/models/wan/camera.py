"""The control adapter of Fun-Control-Camera checkpoints: what rays of the camera add to tokens.

Written after `SimpleAdapter` of VideoX-Fun and DiffSynth-Studio, whose names of parameters it has.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sora_engine.models.wan.config import WanConfig


class CameraAdapter(nn.Module):
    """Rays of a latent frame to what is added to its tokens, behind the embedding of patches.

    Pixels are folded into channels until they lie as latents do, a convolution takes them to
    tokens, and a residual block looks at those round about.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        assert config.in_dim_control_adapter is not None
        dim, patch = config.inner_dim, config.patch_size[1:]
        self.fold = config.downscale_factor_control_adapter
        channels = config.in_dim_control_adapter * self.fold**2
        self.conv = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)
        self.residual_blocks = nn.ModuleList([ResidualBlock(dim)])

    def forward(self, rays: Tensor) -> Tensor:
        """`[channels, height, width]` in pixels to `[tokens, dim]`, row by row."""
        x = self.conv(F.pixel_unshuffle(rays[None].to(self.conv.weight.dtype), self.fold))
        for block in self.residual_blocks:
            x = block(x)
        return x[0].flatten(1).T.contiguous()


class ResidualBlock(nn.Module):
    """Two convolutions of 3 x 3, beside what they read."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(x))) + x
