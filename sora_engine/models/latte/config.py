"""The shape of a Latte, read from diffusers' `config.json` by an allow-list of keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sora_engine.errors import CheckpointError
from sora_engine.models.layers import GELUS

CLASS_NAME = "LatteTransformer3DModel"
MAX_LAYERS = 1000

_BOOKKEEPING = frozenset({"_class_name", "_diffusers_version", "_name_or_path"})
_POSITIVE = (
    "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "patch_size",
    "sample_size", "caption_channels", "video_length",
)  # fmt: skip
_WITHOUT_EFFECT = ("dropout", "num_embeds_ada_norm")
_ONLY = {"norm_type": "ada_norm_single", "norm_elementwise_affine": False}
"""Keys that are carried out at one value alone."""


@dataclass(frozen=True, slots=True)
class LatteConfig:
    """The configuration of a Latte, with the names of diffusers' `LatteTransformer3DModel` and the
    values of Latte-1; one that no Latte can have raises `CheckpointError`.

    sample_size: latents along a side of the videos that it was trained on; video_length: frames.
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int = 8
    num_layers: int = 28
    cross_attention_dim: int | None = None
    attention_bias: bool = True
    sample_size: int = 64
    patch_size: int = 2
    activation_fn: str = "gelu-approximate"
    norm_eps: float = 1e-6
    caption_channels: int = 4096
    video_length: int = 16

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if not _positive(value):
                raise CheckpointError(f"{name} is {value!r}; it must be a positive integer")
        if not _positive(self.num_layers) or self.num_layers > MAX_LAYERS:
            raise CheckpointError(
                f"num_layers is {self.num_layers!r}; it must be a positive integer up to "
                f"{MAX_LAYERS}"
            )
        if not isinstance(self.attention_bias, bool):
            raise CheckpointError(
                f"attention_bias is {self.attention_bias!r}; it must be true or false"
            )
        if self.activation_fn not in GELUS:
            raise CheckpointError(
                f"activation_fn is {self.activation_fn!r}; {' and '.join(GELUS)} are supported"
            )
        eps = self.norm_eps
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
            raise CheckpointError(f"norm_eps is {eps!r}; it must lie between 0 and 1")
        if self.inner_dim % 4:
            raise CheckpointError(
                f"tokens are {self.inner_dim} wide; fixed positions need a multiple of 4"
            )
        if self.cross_attention_dim not in (None, self.inner_dim):
            raise CheckpointError(
                f"cross_attention_dim is {self.cross_attention_dim!r}; texts are projected to "
                f"{self.inner_dim} (num_attention_heads x attention_head_dim)"
            )
        if self.out_channels != 2 * self.in_channels:
            raise CheckpointError(
                f"out_channels is {self.out_channels}; with its learned variance "
                f"{2 * self.in_channels} would work"
            )
        if self.sample_size % self.patch_size:
            raise CheckpointError(
                f"sample_size {self.sample_size} is no multiple of patch_size {self.patch_size}"
            )

    @property
    def inner_dim(self) -> int:
        """Width of a token: heads x head_dim."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def interpolation_scale(self) -> int:
        """By how much positions are closer than patches, in large models."""
        return max(self.sample_size // 64, 1)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, path: str | Path | None = None) -> LatteConfig:
        """Read a diffusers `config.json`. `path` is the file that errors name.

        Raises `CheckpointError` for a key that is not on the list, another class's name, and a
        value that is not carried out.
        """
        name = values.get("_class_name", CLASS_NAME)
        if name != CLASS_NAME:
            raise CheckpointError(
                f"_class_name is {name!r}; this loader reads {CLASS_NAME}", path=path
            )
        allowed = {field.name for field in fields(cls)}
        known = {*allowed, *_ONLY, *_WITHOUT_EFFECT, *_BOOKKEEPING}
        unknown = sorted(set(values) - known)
        if unknown:
            raise CheckpointError(
                f"unknown configuration keys {unknown}; known are {sorted(known)}", path=path
            )
        for key, wanted in _ONLY.items():
            if key in values and values[key] != wanted:
                raise CheckpointError(
                    f"{key} is {values[key]!r}; a Latte has {wanted!r}", path=path
                )
        try:
            return cls(**{key: value for key, value in values.items() if key in allowed})
        except CheckpointError as error:
            raise CheckpointError(str(error), path=path) from None

    def to_dict(self) -> dict[str, Any]:
        """The keys and values of a diffusers `config.json`."""
        return {"_class_name": CLASS_NAME, **_ONLY, **asdict(self)}


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
