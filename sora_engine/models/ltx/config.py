"""The shape of an LTX-Video transformer, read from diffusers' `config.json` or a file's header."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sora_engine.errors import CheckpointError
from sora_engine.models.layers import GELUS

CLASS_NAME = "LTXVideoTransformer3DModel"
MAX_LAYERS = 1000
_OWN = frozenset({"pixel_times", "time_factor", "space_factor"})
"""What no `config.json` says: it follows from the pipeline and the autoencoder."""

_BOOKKEEPING = frozenset({"_class_name", "_diffusers_version", "_name_or_path"})
_POSITIVE = (
    "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "caption_channels",
)  # fmt: skip
_ONLY: dict[str, Any] = {
    "qk_norm": "rms_norm_across_heads", "norm_elementwise_affine": False,
    "patch_size": 1, "patch_size_t": 1,
}  # fmt: skip
"""Keys that are carried out at one value alone."""
_AUTHORS = {
    "qk_norm": "rms_norm", "standardization_norm": "rms_norm",
    "adaptive_norm": "single_scale_shift",
    "positional_embedding_type": "rope", "positional_embedding_theta": 10000.0,
    "positional_embedding_max_pos": [20, 2048, 2048], "norm_elementwise_affine": False,
    "only_cross_attention": False, "double_self_attention": False, "use_linear_projection": False,
}  # fmt: skip
"""What the authors' files say beside that, at the values that all published ones have."""
_AUTHORS_UNREAD = frozenset({
    "_class_name", "_diffusers_version", "_name_or_path", "dropout", "norm_num_groups",
    "num_vector_embeds", "num_embeds_ada_norm", "upcast_attention", "timestep_scale_multiplier",
    "project_to_2d_pos", "attention_type", "use_tpu_flash_attention", "cross_attention_dim",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class LTXConfig:
    """The configuration of an LTX-Video transformer, with the names of diffusers'
    `LTXVideoTransformer3DModel` and the values of LTX-Video 0.9 (2B); one that no such transformer
    can have raises `CheckpointError`.

    pixel_times: whether positions in time are those of frames, of which the first latent frame
        holds one: 0.9.5 and later. Before, latent frames lie evenly.
    time_factor, space_factor: frames and pixels that a latent stands for, of its autoencoder.
    """

    num_attention_heads: int = 32
    attention_head_dim: int = 64
    in_channels: int = 128
    out_channels: int = 128
    num_layers: int = 28
    cross_attention_dim: int = 2048
    attention_bias: bool = True
    attention_out_bias: bool = True
    activation_fn: str = "gelu-approximate"
    norm_eps: float = 1e-6
    caption_channels: int = 4096
    pixel_times: bool = False
    time_factor: int = 8
    space_factor: int = 32

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
        for name in ("attention_bias", "attention_out_bias"):
            if getattr(self, name) is not True:
                raise CheckpointError(f"{name} is {getattr(self, name)!r}; true is supported")
        if self.activation_fn not in GELUS:
            raise CheckpointError(
                f"activation_fn is {self.activation_fn!r}; {' and '.join(GELUS)} are supported"
            )
        eps = self.norm_eps
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
            raise CheckpointError(f"norm_eps is {eps!r}; it must lie between 0 and 1")
        if self.inner_dim % 2 or self.inner_dim < 6:
            raise CheckpointError(
                f"tokens are {self.inner_dim} wide; rotary positions need an even width, 6 or more"
            )
        if self.cross_attention_dim != self.inner_dim:
            raise CheckpointError(
                f"cross_attention_dim is {self.cross_attention_dim!r}; texts are projected to "
                f"{self.inner_dim} (num_attention_heads x attention_head_dim)"
            )
        if self.out_channels != self.in_channels:
            raise CheckpointError(
                f"out_channels is {self.out_channels}; a flow has as many as in_channels, "
                f"{self.in_channels}"
            )

    @property
    def inner_dim(self) -> int:
        """Width of a token: heads x head_dim."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, path: str | Path | None = None) -> LTXConfig:
        """Read a diffusers `config.json`. `path` is the file that errors name.

        Raises `CheckpointError` for a key that is not on the list, another class's name, and a
        value that is not carried out.
        """
        name = values.get("_class_name", CLASS_NAME)
        if name != CLASS_NAME:
            raise CheckpointError(
                f"_class_name is {name!r}; this loader reads {CLASS_NAME}", path=path
            )
        allowed = {field.name for field in fields(cls)} - _OWN
        unknown = sorted(set(values) - {*allowed, *_ONLY, *_BOOKKEEPING})
        if unknown:
            raise CheckpointError(
                f"unknown configuration keys {unknown}; known are "
                f"{sorted({*allowed, *_ONLY, *_BOOKKEEPING})}",
                path=path,
            )
        _check_fixed(values, _ONLY, path)
        return _made(cls, {k: v for k, v in values.items() if k in allowed}, path)

    @classmethod
    def from_header(cls, values: Mapping[str, Any], *, path: str | Path | None = None) -> LTXConfig:
        """Read what the authors' files say under `transformer` in their header's `config`. Raises
        `CheckpointError` as `from_dict`."""
        own = {field.name for field in fields(cls)} - _OWN
        times = "causal_temporal_positioning"
        unknown = sorted(set(values) - {*own, *_AUTHORS, *_AUTHORS_UNREAD, times})
        if unknown:
            raise CheckpointError(
                f"unknown keys {unknown} of the transformer in the header's config", path=path
            )
        _check_fixed(values, _AUTHORS, path)
        read = {key: values[key] for key in own & values.keys() if values[key] is not None}
        heads, dim = read.get("num_attention_heads"), read.get("attention_head_dim")
        if _positive(heads) and _positive(dim):
            read["cross_attention_dim"] = heads * dim
        return _made(cls, {**read, "pixel_times": bool(values.get(times, False))}, path)

    def to_dict(self) -> dict[str, Any]:
        """The keys and values of a diffusers `config.json`."""
        own = asdict(self)
        for name in _OWN:
            del own[name]
        return {"_class_name": CLASS_NAME, **_ONLY, **own}


def _check_fixed(
    values: Mapping[str, Any], fixed: Mapping[str, Any], path: str | Path | None
) -> None:
    for key, wanted in fixed.items():
        if key in values and values[key] not in (wanted, None):
            raise CheckpointError(
                f"{key} is {values[key]!r}; an LTX-Video transformer has {wanted!r}", path=path
            )


def _made(cls: type[LTXConfig], values: dict[str, Any], path: str | Path | None) -> LTXConfig:
    try:
        return cls(**values)
    except CheckpointError as error:
        raise CheckpointError(str(error), path=path) from None


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
