"""A latent upsampler: a network that makes the latents of a video larger, or twice as many.

diffusers' `LTXLatentUpsamplerModel`: residual blocks, a pixel shuffle, residual blocks. Latents go
in and come out raw, as a VAE's decoder takes them; parameter names are diffusers'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_engine.errors import CheckpointError, RequestError
from sora_engine.io.config_file import read_json_object
from sora_engine.io.loading import load_into
from sora_engine.io.safetensors import find_weights
from sora_engine.io.weights.opening import open_weights

CLASS_NAME = "LTXLatentUpsamplerModel"
GROUPS = 32


@dataclass(frozen=True, slots=True)
class UpsamplerConfig:
    """The layout of a latent upsampler, with diffusers' names. dims: of its convolutions; 2 takes
    each frame by itself."""

    in_channels: int = 128
    mid_channels: int = 512
    num_blocks_per_stage: int = 4
    dims: int = 3
    spatial_upsample: bool = True
    temporal_upsample: bool = False

    def __post_init__(self) -> None:
        for name in ("in_channels", "mid_channels", "num_blocks_per_stage"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65536:
                raise CheckpointError(f"{name} is {value!r}; it must be a positive integer")
        if self.mid_channels % GROUPS:
            raise CheckpointError(
                f"mid_channels is {self.mid_channels}; norms need a multiple of {GROUPS}"
            )
        for name in ("spatial_upsample", "temporal_upsample"):
            if not isinstance(getattr(self, name), bool):
                raise CheckpointError(f"{name} is {getattr(self, name)!r}; true or false")
        if not (self.spatial_upsample or self.temporal_upsample):
            raise CheckpointError("spatial_upsample and temporal_upsample are both false")
        if self.dims not in (2, 3) or (self.dims == 2 and self.temporal_upsample):
            raise CheckpointError(
                f"dims is {self.dims!r}; 3, or 2 without temporal_upsample, are supported"
            )

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], *, path: str | Path | None = None
    ) -> UpsamplerConfig:
        """From a `config.json`; raises CheckpointError for other classes, keys and values."""
        name = values.get("_class_name", CLASS_NAME)
        if name != CLASS_NAME:
            raise CheckpointError(
                f"_class_name is {name!r}; a latent upsampler is {CLASS_NAME}", path=path
            )
        known = {field.name for field in fields(cls)}
        own = {key: value for key, value in values.items() if not key.startswith("_")}
        if set(own) - known:
            raise CheckpointError(
                f"unknown keys {sorted(set(own) - known)}; known are {sorted(known)}", path=path
            )
        try:
            return cls(**own)
        except CheckpointError as error:
            raise CheckpointError(str(error), path=path) from None


class ResBlock(nn.Module):
    """Convolution and norm, twice, beside a shortcut."""

    def __init__(self, channels: int, dims: int):
        super().__init__()
        self.conv1, self.conv2 = (_conv(dims, channels, channels) for _ in range(2))
        self.norm1, self.norm2 = (nn.GroupNorm(GROUPS, channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm1(self.conv1(x)))
        return F.silu(self.norm2(self.conv2(y)) + x)


class LatentUpsampler(nn.Module):
    """`LTXLatentUpsamplerModel`; a state dict of diffusers' class loads as it is."""

    def __init__(self, config: UpsamplerConfig):
        super().__init__()
        self.config, dims, width = config, config.dims, config.mid_channels
        blocks = range(config.num_blocks_per_stage)
        self.initial_conv = _conv(dims, config.in_channels, width)
        self.initial_norm = nn.GroupNorm(GROUPS, width)
        self.res_blocks = nn.ModuleList([ResBlock(width, dims) for _ in blocks])
        factor = (4 if config.spatial_upsample else 1) * (2 if config.temporal_upsample else 1)
        flat = not config.temporal_upsample
        self.upsampler = nn.ModuleList([_conv(2 if flat else 3, width, factor * width)])
        self.post_upsample_res_blocks = nn.ModuleList([ResBlock(width, dims) for _ in blocks])
        self.final_conv = _conv(dims, width, config.in_channels)

    def forward(self, latents: Tensor) -> Tensor:
        """Raw latents `[B, C, T, H, W]` to twice the height and width, or `2 T - 1` frames, or
        both."""
        pictures = self.config.dims == 2
        x = _pictures(latents) if pictures else latents
        x = F.silu(self.initial_norm(self.initial_conv(x)))
        for block in self.res_blocks:
            x = block(x)
        (convolution,) = self.upsampler
        if self.config.temporal_upsample:
            space = 2 if self.config.spatial_upsample else 1
            # Of the first frame's pair the second is kept: it is a frame of its own.
            x = _shuffled(convolution(x), 2, space)[:, :, 1:]
        elif pictures:
            x = _shuffled(convolution(x)[:, :, None], 1, 2)[:, :, 0]
        else:
            x = _videos(_shuffled(convolution(_pictures(x))[:, :, None], 1, 2)[:, :, 0], latents)
        for block in self.post_upsample_res_blocks:
            x = block(x)
        x = self.final_conv(x)
        return _videos(x, latents) if pictures else x


def open_latent_upsampler(
    path: str | Path, device: torch.device, dtype: torch.dtype
) -> LatentUpsampler:
    """A latent upsampler of a folder of diffusers: its own, or of a pipeline that has it in
    `latent_upsampler/`. Raises CheckpointError."""
    folder = Path(path)
    if (folder / "latent_upsampler").is_dir():
        folder = folder / "latent_upsampler"
    if not folder.is_dir():
        raise CheckpointError("no folder of a latent upsampler", path=folder)
    place = folder / "config.json"
    config = UpsamplerConfig.from_dict(read_json_object(place), path=place)
    with torch.device("meta"):
        model = LatentUpsampler(config)
    with open_weights(find_weights(folder, "diffusion_pytorch_model")) as weights:
        load_into(model, weights, device=device, dtype=dtype)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def upsampled(upsampler: LatentUpsampler, latents: Tensor) -> Tensor:
    """Raw latents `[C, T, H, W]` made larger, float32 on their device. Raises RequestError for
    latents of another model."""
    weight = upsampler.final_conv.weight
    channels = upsampler.config.in_channels
    if latents.ndim != 4 or latents.shape[0] != channels:
        raise RequestError(
            f"the latent upsampler takes {channels} channels; these latents are "
            f"{list(latents.shape)}"
        )
    made: Tensor = upsampler(latents[None].to(weight.device, weight.dtype))
    return made[0].float().to(latents.device)


def _conv(dims: int, c_in: int, c_out: int) -> nn.Conv2d | nn.Conv3d:
    kind = nn.Conv2d if dims == 2 else nn.Conv3d
    return kind(c_in, c_out, 3, padding=1)


def _pictures(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)


def _videos(x: Tensor, like: Tensor) -> Tensor:
    return x.unflatten(0, (like.shape[0], -1)).transpose(1, 2)


def _shuffled(x: Tensor, time: int, space: int) -> Tensor:
    """`[B, C * volume, T, H, W] -> [B, C, T * time, H * space, W * space]`."""
    x = x.unflatten(1, (-1, time, space, space)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
