"""The shape of an LTX-Video transformer, read from diffusers' `config.json` or a file's header."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from sora_engine.errors import CheckpointError
from sora_engine.models.layers import GELUS
from sora_engine.models.transformer_config import MAX_LAYERS, TransformerConfig

_DERIVED = ("pixel_times", "time_factor", "space_factor")
_AUTHORS: dict[str, Any] = {
    "qk_norm": "rms_norm", "standardization_norm": "rms_norm",
    "adaptive_norm": "single_scale_shift", "positional_embedding_type": "rope",
    "positional_embedding_theta": 10000.0, "positional_embedding_max_pos": [20, 2048, 2048],
    "norm_elementwise_affine": False, "only_cross_attention": False,
    "double_self_attention": False, "timestep_scale_multiplier": 1000,
}  # fmt: skip
"""What the authors' files say beside diffusers' keys, at the values that published ones have."""
_UNREAD = frozenset({
    "_class_name", "_diffusers_version", "_name_or_path", "dropout", "norm_num_groups",
    "num_vector_embeds", "num_embeds_ada_norm", "upcast_attention", "project_to_2d_pos",
    "attention_type", "use_tpu_flash_attention", "use_linear_projection", "cross_attention_dim",
    "caption_projection", "skip_final_inner_dim_calculation",
})  # fmt: skip


@dataclass(frozen=True)
class LTXConfig(TransformerConfig):
    """The configuration of an LTX-Video transformer, with the names of diffusers'
    `LTXVideoTransformer3DModel` and the values of LTX-Video 0.9 (2B); one that no such transformer
    can have raises `CheckpointError`.

    pixel_times: whether positions in time are those of frames, of which the first latent frame
        holds one: 0.9.5 and later. Before, latent frames lie evenly. time_factor, space_factor:
        frames and pixels that a latent stands for. These follow from the pipeline and the
        autoencoder, and are in no `config.json`.
    """

    class_names = ("LTXVideoTransformer3DModel",)
    model = "an LTX-Video transformer"
    only: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "qk_norm": ("rms_norm_across_heads",),
        "norm_elementwise_affine": (False,),
        "patch_size": (1,),
        "patch_size_t": (1,),
        "attention_bias": (True,),
        "attention_out_bias": (True,),
    }

    num_attention_heads: int = 32
    attention_head_dim: int = 64
    in_channels: int = 128
    out_channels: int = 128
    num_layers: int = 28
    cross_attention_dim: int = 2048
    activation_fn: str = "gelu-approximate"
    norm_eps: float = 1e-6
    caption_channels: int = 4096
    pixel_times: bool = False
    time_factor: int = 8
    space_factor: int = 32

    def check(self) -> None:
        """Sizes, and that texts and positions fit them."""
        self.must_be_positive(
            "num_attention_heads", "attention_head_dim", "in_channels", "out_channels",
            "caption_channels",
        )  # fmt: skip
        self.must_be_positive("num_layers", most=MAX_LAYERS)
        self.must_be_one_of("activation_fn", GELUS)
        self.must_be_fraction("norm_eps")
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

    @property
    def text_tokens(self) -> int:
        """Where its pipeline cuts a text."""
        return 256 if self.pixel_times else 128

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, path: str | Path | None = None) -> LTXConfig:
        """As of every transformer; what is derived is no key. Raises `CheckpointError`."""
        derived = sorted(set(values) & set(_DERIVED))
        if derived:
            raise CheckpointError(f"unknown configuration keys {derived}", path=path)
        return super().from_dict(values, path=path)

    @classmethod
    def from_header(cls, values: Mapping[str, Any], *, path: str | Path | None = None) -> LTXConfig:
        """Read what the authors' files say under `transformer` in their header's `config`. Raises
        `CheckpointError` for keys and values that are not carried out."""
        own = {field.name for field in fields(cls)} - set(_DERIVED)
        times = "causal_temporal_positioning"
        fixed = {**{key: wanted[0] for key, wanted in cls.only.items()}, **_AUTHORS}
        unknown = sorted(set(values) - {*own, *fixed, *_UNREAD, times})
        if unknown:
            raise CheckpointError(
                f"unknown keys {unknown} of the transformer in the header's config", path=path
            )
        for key, wanted in fixed.items():
            if values.get(key, wanted) not in (wanted, None):
                raise CheckpointError(
                    f"{key} is {values[key]!r}; {cls.model} has {wanted!r}", path=path
                )
        read = {key: values[key] for key in own & values.keys() if values[key] is not None}
        read.pop("cross_attention_dim", None)  # texts are projected to the width of tokens
        heads, dim = read.get("num_attention_heads"), read.get("attention_head_dim")
        if isinstance(heads, int) and isinstance(dim, int) and heads * dim:
            read["cross_attention_dim"] = heads * dim
        try:
            return cls(**read, pixel_times=bool(values.get(times, False)))
        except CheckpointError as error:
            raise CheckpointError(str(error), path=path) from None

    def to_dict(self) -> dict[str, Any]:
        """The keys and values of a diffusers `config.json`."""
        return {key: v for key, v in super().to_dict().items() if key not in _DERIVED}
