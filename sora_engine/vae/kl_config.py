"""What an image autoencoder of latent diffusion is made of, read from diffusers' `config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from sora_engine.errors import CheckpointError

CLASS_NAME = "AutoencoderKL"
LDM_SCALING = 0.18215
"""Of the autoencoders that were published with latent diffusion (arXiv 2112.10752)."""

_POSITIVE = (
    "in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups",
)  # fmt: skip
_FLAGS = ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention", "force_upcast")
_LISTS = ("down_block_types", "up_block_types", "block_out_channels")
_MAX_LAYERS = 100


@dataclass(frozen=True)
class KLConfig:
    """The layout of an `AutoencoderKL`, with diffusers' names and defaults.

    block_out_channels: of each stage; between two stages height and width halve.
    scaling_factor, shift_factor: a model's latents are `(raw - shift_factor) * scaling_factor`.
    force_upcast, sample_size: diffusers' own advice to its pipelines; nothing here reads them.
    """

    kind: ClassVar[str] = CLASS_NAME
    not_its: ClassVar[tuple[str, ...]] = ()
    """Fields that files of the class have no key for."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32
    scaling_factor: float = LDM_SCALING
    shift_factor: float | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        for name in _LISTS:
            value = getattr(self, name)
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise CheckpointError(f"{name} must be a list, not {value!r}")
            object.__setattr__(self, name, tuple(value))
        if isinstance(self.sample_size, list):
            object.__setattr__(self, "sample_size", tuple(self.sample_size))
        for name in _POSITIVE:
            _check_count(name, getattr(self, name))
        if not self.block_out_channels or len(self.block_out_channels) > 10:
            raise CheckpointError(
                f"block_out_channels has {len(self.block_out_channels)} stages; 1 to 10 would work"
            )
        if self.layers_per_block > _MAX_LAYERS:
            raise CheckpointError(
                f"layers_per_block is {self.layers_per_block}; at most {_MAX_LAYERS} would work"
            )
        for i, channels in enumerate(self.block_out_channels):
            _check_count(f"block_out_channels[{i}]", channels)
            if channels % self.norm_num_groups:
                raise CheckpointError(
                    f"block_out_channels[{i}] is {channels}, no multiple of norm_num_groups "
                    f"{self.norm_num_groups}"
                )
        for name, kind in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            given = getattr(self, name)
            if given != (kind,) * len(self.block_out_channels):
                raise CheckpointError(
                    f"{name} is {list(given)}; {kind} for each of the "
                    f"{len(self.block_out_channels)} stages is supported"
                )
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise CheckpointError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if self.act_fn != "silu":
            raise CheckpointError(f"act_fn is {self.act_fn!r}; 'silu' is supported")
        if not _is_number(self.scaling_factor) or self.scaling_factor <= 0:
            raise CheckpointError(
                f"scaling_factor must be a positive number, not {self.scaling_factor!r}"
            )
        if self.shift_factor is not None and not _is_number(self.shift_factor):
            raise CheckpointError(
                f"shift_factor must be a number or null, not {self.shift_factor!r}"
            )

    @property
    def class_name(self) -> str:
        return self.kind

    @property
    def z_dim(self) -> int:
        """Channels of a latent."""
        return self.latent_channels

    @property
    def encoded(self) -> int:
        """Channels that the encoder gives: mean and variance of each latent."""
        return 2 * self.latent_channels

    @property
    def factor_temporal(self) -> int:
        """Each frame has a latent of its own."""
        return 1

    @property
    def factor_spatial(self) -> int:
        """Pixels along one side of a latent."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @property
    def latents_mean(self) -> tuple[float, ...]:
        return (self.shift_factor or 0.0,) * self.latent_channels

    @property
    def latents_std(self) -> tuple[float, ...]:
        return (1.0 / self.scaling_factor,) * self.latent_channels

    @property
    def pixel_channels(self) -> int:
        return self.in_channels

    @property
    def size_multiple(self) -> int:
        """Sizes between latents round down, as in diffusers."""
        return 1

    @property
    def widest(self) -> int:
        return max(*self.block_out_channels, self.latent_channels, self.in_channels)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, path: str | Path | None = None) -> Self:
        """A config from the dictionary of a `config.json`; `path` is for the error messages.

        Raises CheckpointError for another class, for keys this engine does not know (a key may
        change what the layers compute, so none is skipped) and for values that make no sense.
        """
        name = values.get("_class_name", cls.kind)
        if name != cls.kind:
            raise CheckpointError(f"_class_name is {name!r}; {cls.kind} is wanted", path=path)
        keys = {key for key in values if not key.startswith("_")}
        for key in ("latents_mean", "latents_std"):
            # Pipelines of diffusers disagree on what they mean beside a scaling factor.
            if values.get(key) is not None:
                raise CheckpointError(
                    f"{key} is {values[key]!r}; null is supported, with scaling_factor and "
                    "shift_factor",
                    path=path,
                )
            keys.discard(key)
        known = {field.name for field in fields(cls)} - set(cls.not_its)
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
        values: dict[str, Any] = {"_class_name": self.kind}
        for field in fields(self):
            if field.name in self.not_its:
                continue
            value = getattr(self, field.name)
            values[field.name] = list(value) if isinstance(value, tuple) else value
        return values


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{name} must be a positive whole number, not {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
