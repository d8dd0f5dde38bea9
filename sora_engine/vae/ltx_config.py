"""What an LTX-Video autoencoder is made of, read from diffusers' `config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sora_engine.errors import CheckpointError

CLASS_NAME = "AutoencoderKLLTXVideo"
DOWN = "LTXVideoDownBlock3D"
DOWN_095 = "LTXVideo095DownBlock3D"
STRIDES = {
    "conv": (2, 2, 2), "spatial": (1, 2, 2), "temporal": (2, 1, 1), "spatiotemporal": (2, 2, 2),
}  # fmt: skip
"""By type of downsampling what it divides frames, rows and columns by."""

_POSITIVE = ("in_channels", "out_channels", "latent_channels", "patch_size")
_FLAGS = ("timestep_conditioning", "encoder_causal", "decoder_causal")
_MOST = 100
_KINDS: dict[str, type] = {
    "block_out_channels": int, "decoder_block_out_channels": int, "layers_per_block": int,
    "decoder_layers_per_block": int, "upsample_factor": int, "spatio_temporal_scaling": bool,
    "decoder_spatio_temporal_scaling": bool, "decoder_inject_noise": bool,
    "upsample_residual": bool, "down_block_types": str, "downsample_type": str,
}  # fmt: skip
"""Keys that are lists, and what of."""


@dataclass(frozen=True)
class LTXVAEConfig:
    """The layout of an `AutoencoderKLLTXVideo`, with diffusers' names and the values of 0.9.0.

    Lists go from the pixels to the latents, those of the decoder too.

    decode_timestep, decode_noise_scale: of a decoder that takes a noise level, that level, and how
        much noise is mixed into the latents: those of the published pipelines. They are in no
        `config.json`.
    latents_mean, latents_std: one value a channel. diffusers keeps them among the weights.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 128
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    down_block_types: tuple[str, ...] = (DOWN,) * 4
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: tuple[int, ...] = (4, 3, 3, 3, 4)
    decoder_layers_per_block: tuple[int, ...] = (4, 3, 3, 3, 4)
    spatio_temporal_scaling: tuple[bool, ...] = (True, True, True, False)
    decoder_spatio_temporal_scaling: tuple[bool, ...] = (True, True, True, False)
    decoder_inject_noise: tuple[bool, ...] = (False,) * 5
    downsample_type: tuple[str, ...] = ("conv",) * 4
    upsample_residual: tuple[bool, ...] = (False,) * 4
    upsample_factor: tuple[int, ...] = (1,) * 4
    timestep_conditioning: bool = False
    patch_size: int = 4
    patch_size_t: int = 1
    resnet_norm_eps: float = 1e-6
    scaling_factor: float = 1.0
    encoder_causal: bool = True
    decoder_causal: bool = False
    spatial_compression_ratio: int | None = None
    temporal_compression_ratio: int | None = None
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()
    decode_timestep: float = 0.05
    decode_noise_scale: float = 0.025

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not value or len(value) > _MOST:
                raise CheckpointError(f"{name} must be a list, not {value!r}")
            object.__setattr__(self, name, tuple(value))
            for i, each in enumerate(value):
                if not isinstance(each, kind) or (kind is int and not _count(each)):
                    raise CheckpointError(f"{name}[{i}] is {each!r}; it must be {_WORDS[kind]}")
        for name in _POSITIVE:
            if not _count(getattr(self, name)):
                raise CheckpointError(
                    f"{name} must be a positive whole number, not {getattr(self, name)!r}"
                )
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise CheckpointError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if self.patch_size_t != 1 or not self.encoder_causal:
            raise CheckpointError(
                f"patch_size_t is {self.patch_size_t!r} and encoder_causal {self.encoder_causal!r};"
                " 1 and true are supported"
            )
        if not _number(self.scaling_factor) or self.scaling_factor <= 0:
            raise CheckpointError(f"scaling_factor is {self.scaling_factor!r}; above 0 would work")
        if not _number(self.resnet_norm_eps) or not 0 < self.resnet_norm_eps < 1:
            raise CheckpointError(
                f"resnet_norm_eps is {self.resnet_norm_eps!r}; it must lie between 0 and 1"
            )
        self._check_lists()
        for name, default in (("latents_mean", 0.0), ("latents_std", 1.0)):
            values = tuple(getattr(self, name)) or (default,) * self.latent_channels
            if len(values) != self.latent_channels or not all(_number(v) for v in values):
                raise CheckpointError(
                    f"{name} has {len(values)} values; {self.latent_channels} numbers are wanted"
                )
            object.__setattr__(self, name, tuple(float(v) for v in values))
        for name, found in (
            ("spatial_compression_ratio", self.factor_spatial),
            ("temporal_compression_ratio", self.factor_temporal),
        ):
            if getattr(self, name) not in (None, found):
                raise CheckpointError(
                    f"{name} is {getattr(self, name)!r}; the layers compress by {found}"
                )

    def _check_lists(self) -> None:
        stages, ups = len(self.down_block_types), len(self.decoder_block_out_channels)
        newer = self.down_block_types[-1] == DOWN_095
        if self.down_block_types != ((DOWN_095 if newer else DOWN),) * stages:
            raise CheckpointError(
                f"down_block_types is {list(self.down_block_types)}; all {DOWN} or all {DOWN_095} "
                "are supported"
            )
        lengths = {
            "block_out_channels": stages + newer, "layers_per_block": stages + 1,
            "spatio_temporal_scaling": stages, "decoder_layers_per_block": ups + 1,
            "decoder_spatio_temporal_scaling": ups, "upsample_residual": ups,
            "upsample_factor": ups, "decoder_inject_noise": ups + 1,
        }  # fmt: skip
        if newer:
            lengths["downsample_type"] = stages
        for name, wanted in lengths.items():
            if len(getattr(self, name)) != wanted:
                raise CheckpointError(
                    f"{name} has {len(getattr(self, name))} entries; {wanted} would go with the "
                    "other lists"
                )
        for name in self.downsample_type:
            if name not in STRIDES:
                raise CheckpointError(
                    f"downsample_type has {name!r}; {', '.join(STRIDES)} are supported"
                )
        if newer and not all(self.spatio_temporal_scaling):
            raise CheckpointError(
                "spatio_temporal_scaling is false in a stage of LTXVideo095DownBlock3D; its "
                "channels change by downsampling, so true would work"
            )
        times = 2 ** sum(self.decoder_spatio_temporal_scaling)
        if (times, times * self.patch_size) != (self.factor_temporal, self.factor_spatial):
            raise CheckpointError(
                f"the decoder makes {times} frames and {times * self.patch_size} pixels of a "
                f"latent, the encoder takes {self.factor_temporal} and {self.factor_spatial}"
            )

    @property
    def strides(self) -> tuple[tuple[int, int, int], ...]:
        """Of each stage of the encoder, what it divides frames, rows and columns by."""
        newer = self.down_block_types[-1] == DOWN_095
        kinds = self.downsample_type if newer else ("conv",) * len(self.down_block_types)
        return tuple(
            STRIDES[kind] if scaled else (1, 1, 1)
            for kind, scaled in zip(kinds, self.spatio_temporal_scaling, strict=True)
        )

    @property
    def class_name(self) -> str:
        return CLASS_NAME

    @property
    def z_dim(self) -> int:
        """Channels of a latent."""
        return self.latent_channels

    @property
    def factor_temporal(self) -> int:
        """Frames that a latent frame stands for, the first one aside."""
        return math.prod(stride[0] for stride in self.strides)

    @property
    def factor_spatial(self) -> int:
        """Pixels along one side of a latent."""
        return self.patch_size * math.prod(stride[1] for stride in self.strides)

    @property
    def pixel_channels(self) -> int:
        return self.in_channels

    @property
    def size_multiple(self) -> int:
        return self.factor_spatial

    @property
    def widest(self) -> int:
        pixels = self.patch_size**2 * max(self.in_channels, self.out_channels)
        return max(*self.block_out_channels, *self.decoder_block_out_channels, pixels)

    @property
    def look_ahead(self) -> int:
        """Latent frames that the decoder must have seen beyond one to make the last of its
        frames: half a kernel for each convolution, at the rate at which it runs. 0: it is causal.
        """
        if self.decoder_causal:
            return 0
        blocks = self.decoder_layers_per_block[::-1]
        ahead, rate = 1.0 + 2 * blocks[0], 1
        for layers, scaled in zip(
            blocks[1:], self.decoder_spatio_temporal_scaling[::-1], strict=True
        ):
            ahead += (2 + int(scaled)) / rate  # a block that changes the channels, upsampling
            rate *= 2 if scaled else 1
            ahead += 2 * layers / rate
        return math.ceil(ahead + 1 / rate)

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], *, path: str | Path | None = None
    ) -> LTXVAEConfig:
        """A config from the dictionary of a `config.json`; `path` is for the error messages.

        Raises CheckpointError for another class, for keys this engine does not know (a key may
        change what the layers compute, so none is skipped) and for values that make no sense.
        """
        name = values.get("_class_name", CLASS_NAME)
        if name != CLASS_NAME:
            raise CheckpointError(f"_class_name is {name!r}; {CLASS_NAME} is wanted", path=path)
        keys = {key for key in values if not key.startswith("_")}
        known = {field.name for field in fields(cls)}
        if keys - known:
            raise CheckpointError(
                f"unknown keys {', '.join(sorted(keys - known))}; known are "
                f"{', '.join(sorted(known))}",
                path=path,
            )
        try:
            return cls(**{key: values[key] for key in keys})
        except CheckpointError as error:
            raise CheckpointError(str(error), path=path) from None

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds, as diffusers reads it."""
        own = ("latents_mean", "latents_std", "decode_timestep", "decode_noise_scale")
        values: dict[str, Any] = {"_class_name": CLASS_NAME}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in own:
                values[field.name] = list(value) if isinstance(value, tuple) else value
        return values


_WORDS = {int: "a positive whole number", bool: "true or false", str: "a string"}


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
