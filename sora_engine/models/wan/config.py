"""The shape of a Wan transformer, read from diffusers' `config.json` by an allow-list of keys."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from sora_engine.errors import CheckpointError

CLASS_NAME = "WanTransformer3DModel"
VACE_CLASS_NAME = "WanVACETransformer3DModel"
WORLD_CLASS_NAME = "WanWorldTransformer3DModel"
"""Of the engine's own: Wan that is driven by actions and knows where its camera is. diffusers has
no such class, and a model of another name would be taken for one without them there."""
CAMERA_CLASS_NAME = "WanCameraTransformer3DModel"
"""Of the engine's own too: Wan with the control adapter of Fun-Control-Camera checkpoints."""
CLASS_NAMES = (CLASS_NAME, VACE_CLASS_NAME, WORLD_CLASS_NAME, CAMERA_CLASS_NAME)

MAX_LAYERS = 1000  # a configuration must not keep the engine busy building a model for hours

# What diffusers writes beside the model's own keys. They say nothing about the shape.
_BOOKKEEPING = frozenset({"_class_name", "_diffusers_version", "_name_or_path"})
_POSITIVE = (
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "text_dim",
    "freq_dim",
    "ffn_dim",
    "rope_max_seq_len",
    "downscale_factor_control_adapter",
)
_POSITIVE_OR_NONE = (
    "image_dim",
    "added_kv_proj_dim",
    "pos_embed_seq_len",
    "vace_in_channels",
    "action_dim",
    "in_dim_control_adapter",
)
_OF_CLASS = {
    VACE_CLASS_NAME: ("vace_layers", "vace_in_channels"),
    WORLD_CLASS_NAME: ("action_dim", "rope_pairs", "rope_theta"),
    CAMERA_CLASS_NAME: ("in_dim_control_adapter", "downscale_factor_control_adapter"),
}
"""Keys that one class alone has."""


@dataclass(frozen=True, slots=True)
class WanConfig:
    """The configuration of a Wan 2.1 or 2.2 transformer. Fields and defaults are those of
    diffusers' `WanTransformer3DModel`, and with `vace_layers` of its `WanVACETransformer3DModel`;
    the last five are of models that are driven, and of those that are told where the camera is,
    the latter as VideoX-Fun names them. A value that no Wan can have raises `CheckpointError`."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = 1e-6
    image_dim: int | None = None
    """Width of the CLIP image embedding; None where the model reads no image embedding."""
    added_kv_proj_dim: int | None = None
    """Width of the keys' and values' input for image tokens: `inner_dim`, where there is one."""
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None
    """Image tokens that carry a learned position (first-last-frame models: 2 x 257)."""
    vace_layers: tuple[int, ...] | None = None
    """The layers that a VACE control block adds to; None for a model without control."""
    vace_in_channels: int | None = None
    """Channels of VACE's control latents: known, unknown and mask."""
    action_dim: int | None = None
    """Numbers that say what was done to make a latent frame; None for a model that is not driven.
    """
    rope_pairs: tuple[int, ...] | None = None
    """How many pairs of a head's channels read each of five coordinates: time, row and column in
    the view, row and column in the world. None: Wan's shares of time, row and column."""
    rope_theta: float = 10_000.0
    """Of the pairs' frequencies, the base."""
    in_dim_control_adapter: int | None = None
    """Numbers that a latent frame has of the rays of one pixel; None for a model without camera."""
    downscale_factor_control_adapter: int = 8
    """Pixels to a latent, each way, as the control adapter folds them."""

    def __post_init__(self) -> None:
        patch = self.patch_size
        if not isinstance(patch, tuple) or len(patch) != 3 or not all(_positive(p) for p in patch):
            raise CheckpointError(f"patch_size is {patch!r}; it must be three positive integers")
        for name in _POSITIVE:
            if not _positive(getattr(self, name)):
                raise CheckpointError(
                    f"{name} is {getattr(self, name)!r}; it must be a positive integer"
                )
        if not _positive(self.num_layers) or self.num_layers > MAX_LAYERS:
            raise CheckpointError(
                f"num_layers is {self.num_layers!r}; it must be a positive integer up to "
                f"{MAX_LAYERS}"
            )
        for name in _POSITIVE_OR_NONE:
            value = getattr(self, name)
            if value is not None and not _positive(value):
                raise CheckpointError(f"{name} is {value!r}; it must be a positive integer or null")
        if not isinstance(self.cross_attn_norm, bool):
            raise CheckpointError(
                f"cross_attn_norm is {self.cross_attn_norm!r}; it must be true or false"
            )
        if self.qk_norm != "rms_norm_across_heads":
            raise CheckpointError(
                f"qk_norm is {self.qk_norm!r}; Wan has 'rms_norm_across_heads' alone"
            )
        if isinstance(self.eps, bool) or not isinstance(self.eps, (int, float)):
            raise CheckpointError(f"eps is {self.eps!r}; it must be a number")
        if not 0 < self.eps < 1:
            raise CheckpointError(f"eps is {self.eps!r}; it must lie between 0 and 1")
        # RoPE splits a head into pairs for time, height and width: at least one pair each.
        if self.attention_head_dim % 2 or self.attention_head_dim < 6:
            raise CheckpointError(
                f"attention_head_dim is {self.attention_head_dim}; it must be even and at least 6"
            )
        if self.freq_dim % 2:
            raise CheckpointError(f"freq_dim is {self.freq_dim}; it must be even")
        if (self.image_dim is None) != (self.added_kv_proj_dim is None):
            raise CheckpointError(
                f"image_dim is {self.image_dim} and added_kv_proj_dim is {self.added_kv_proj_dim}; "
                "a model with an image embedding needs both, one without needs neither"
            )
        if self.added_kv_proj_dim not in (None, self.inner_dim):
            raise CheckpointError(
                f"added_kv_proj_dim is {self.added_kv_proj_dim}; the image tokens that it reads "
                f"are {self.inner_dim} wide (num_attention_heads x attention_head_dim)"
            )
        if self.pos_embed_seq_len is not None and self.image_dim is None:
            raise CheckpointError(
                f"pos_embed_seq_len is {self.pos_embed_seq_len} but image_dim is null"
            )

        layers = self.vace_layers
        if (layers is None) != (self.vace_in_channels is None):
            raise CheckpointError(
                f"vace_layers is {layers} and vace_in_channels is {self.vace_in_channels}; a VACE "
                "model needs both, any other neither"
            )
        if layers is not None:
            rising = all(a < b for a, b in itertools.pairwise(layers))
            if not layers or layers[0] != 0 or layers[-1] >= self.num_layers or not rising:
                raise CheckpointError(
                    f"vace_layers is {list(layers)}; they must rise from 0 to at most "
                    f"{self.num_layers - 1}"
                )

        self._check_world()
        if self.in_dim_control_adapter is not None and (self.patch_size[0] > 1 or layers):
            raise CheckpointError(
                f"in_dim_control_adapter is {self.in_dim_control_adapter} beside patch_size "
                f"{patch} and vace_layers {layers}; a camera goes with patches of one latent frame "
                "and without VACE"
            )

    def _check_world(self) -> None:
        """What a model that is driven has of its own."""
        pairs, half = self.rope_pairs, self.attention_head_dim // 2
        if pairs is not None:
            five = isinstance(pairs, tuple) and len(pairs) == 5 and all(map(_positive, pairs))
            if not five or sum(pairs) != half:
                raise CheckpointError(
                    f"rope_pairs is {pairs!r}; it must be five positive integers that add up to "
                    f"{half}, half of attention_head_dim"
                )
        theta = self.rope_theta
        if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not theta > 1:
            raise CheckpointError(f"rope_theta is {theta!r}; it must be a number above 1")
        if (self.action_dim is None) != (pairs is None):
            raise CheckpointError(
                f"action_dim is {self.action_dim} and rope_pairs is {pairs}; a model that is "
                "driven needs both, any other neither"
            )
        if self.action_dim is not None and self.vace_layers is not None:
            raise CheckpointError("action_dim and vace_layers are both given; one of them can be")

    @property
    def input_channels(self) -> int:
        """Channels of the model's input: the sample's, and behind them VACE's control."""
        return self.in_channels + (self.vace_in_channels or 0)

    @property
    def inner_dim(self) -> int:
        """Width of a token: heads x head_dim."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, path: str | Path | None = None) -> WanConfig:
        """Read a diffusers `config.json`. `path` is the file that errors name.

        Missing keys take diffusers' defaults. Raises `CheckpointError` for a key that is not on
        the list, another class's name, and a value of the wrong type or range.
        """
        name = values.get("_class_name", CLASS_NAME)
        if name not in CLASS_NAMES:
            raise CheckpointError(
                f"_class_name is {name!r}; this loader reads {' and '.join(CLASS_NAMES)}", path=path
            )
        allowed = {field.name for field in fields(cls)}
        for other, own in _OF_CLASS.items():
            if name != other:
                allowed -= set(own)
        unknown = sorted(set(values) - allowed - _BOOKKEEPING)
        if unknown:
            raise CheckpointError(
                f"unknown configuration keys {unknown}; known are {sorted(allowed)}", path=path
            )
        known = {key: value for key, value in values.items() if key in allowed}
        for key in ("patch_size", "rope_pairs"):
            if isinstance(known.get(key), list):
                known[key] = tuple(known[key])
        if name == WORLD_CLASS_NAME and known.get("action_dim") is None:
            raise CheckpointError("action_dim is missing; a world's transformer has it", path=path)
        if name == CAMERA_CLASS_NAME:
            known.setdefault("in_dim_control_adapter", 24)
        if name == VACE_CLASS_NAME:
            layers = known.setdefault("vace_layers", [0, 5, 10, 15, 20, 25, 30, 35])
            if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
                raise CheckpointError(f"vace_layers is {layers!r}; it must list layers", path=path)
            known["vace_layers"] = tuple(layers)
            known.setdefault("vace_in_channels", 96)
        if "out_channels" in known and known["out_channels"] is None:
            known["out_channels"] = known.get("in_channels", cls().in_channels)
        try:
            config = cls(**known)
        except CheckpointError as error:
            raise CheckpointError(str(error), path=path) from None
        return replace(config, eps=float(config.eps), rope_theta=float(config.rope_theta))

    def to_dict(self) -> dict[str, Any]:
        """The keys and values of a diffusers `config.json`."""
        name = CLASS_NAME
        if self.vace_layers is not None:
            name = VACE_CLASS_NAME
        elif self.action_dim is not None:
            name = WORLD_CLASS_NAME
        elif self.in_dim_control_adapter is not None:
            name = CAMERA_CLASS_NAME
        others = {key for of, keys in _OF_CLASS.items() if of != name for key in keys}
        values = {key: value for key, value in asdict(self).items() if key not in others}
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {"_class_name": name, **values}


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
