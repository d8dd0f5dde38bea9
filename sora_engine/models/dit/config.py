"""The shape of a DiT, read from diffusers' `config.json` by an allow-list of keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sora_engine.errors import CheckpointError
from sora_engine.models.layers import GELUS

CLASS_NAMES = ("DiTTransformer2DModel", "Transformer2DModel")
"""diffusers' class, and the one that published folders name."""
MAX_LAYERS = 1000

_BOOKKEEPING = frozenset({"_class_name", "_diffusers_version", "_name_or_path"})
_POSITIVE = (
    "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "patch_size",
    "sample_size", "num_embeds_ada_norm",
)  # fmt: skip
_WITHOUT_EFFECT = ("norm_num_groups", "dropout", "upcast_attention")
_ONLY: Mapping[str, tuple[object, ...]] = {
    "norm_type": ("ada_norm_zero",),
    "norm_elementwise_affine": (False,),
    "cross_attention_dim": (None,),
    "caption_channels": (None,),
    "num_vector_embeds": (None,),
    "interpolation_scale": (None,),
    "use_linear_projection": (False,),
    "only_cross_attention": (False,),
    "double_self_attention": (False,),
    "use_additional_conditions": (None, False),
    "attention_type": ("default",),
}
"""Keys of a class that serves many models, each at the values that a DiT has."""


@dataclass(frozen=True, slots=True)
class DiTConfig:
    """The configuration of a DiT. Fields and defaults are those of diffusers'
    `DiTTransformer2DModel`; a value that no DiT can have raises `CheckpointError`.

    sample_size: latents along a side of the pictures that it was trained on. num_embeds_ada_norm:
    its classes; the class after the last is none.
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int = 8
    num_layers: int = 28
    attention_bias: bool = True
    sample_size: int = 32
    patch_size: int = 2
    activation_fn: str = "gelu-approximate"
    num_embeds_ada_norm: int = 1000
    norm_eps: float = 1e-5

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
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise CheckpointError(
                f"out_channels is {self.out_channels}; {self.in_channels}, or with a learned "
                f"variance {2 * self.in_channels}, would work"
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
    def learned_variance(self) -> bool:
        """Whether predictions carry as many channels again, of a variance."""
        return self.out_channels != self.in_channels

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, path: str | Path | None = None) -> DiTConfig:
        """Read a diffusers `config.json`. `path` is the file that errors name.

        Missing keys take diffusers' defaults. Raises `CheckpointError` for a key that is not on
        the list, another class's name, and a value that is not carried out.
        """
        name = values.get("_class_name", CLASS_NAMES[0])
        if name not in CLASS_NAMES:
            raise CheckpointError(
                f"_class_name is {name!r}; this loader reads {' and '.join(CLASS_NAMES)}", path=path
            )
        allowed = {field.name for field in fields(cls)}
        known = {*allowed, *_ONLY, *_WITHOUT_EFFECT, *_BOOKKEEPING}
        unknown = sorted(set(values) - known)
        if unknown:
            raise CheckpointError(
                f"unknown configuration keys {unknown}; known are {sorted(known)}", path=path
            )
        for key, wanted in _ONLY.items():
            if key in values and values[key] not in wanted:
                raise CheckpointError(
                    f"{key} is {values[key]!r}; a DiT has {wanted[0]!r}", path=path
                )
        given = {key: value for key, value in values.items() if key in allowed}
        if given.get("out_channels", 0) is None:
            given["out_channels"] = given.get("in_channels", cls().in_channels)
        try:
            return cls(**given)
        except CheckpointError as error:
            raise CheckpointError(str(error), path=path) from None

    def to_dict(self) -> dict[str, Any]:
        """The keys and values of a diffusers `config.json`."""
        return {"_class_name": CLASS_NAMES[0], "norm_type": "ada_norm_zero", **asdict(self)}


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
