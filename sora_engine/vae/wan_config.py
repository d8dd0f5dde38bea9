"""What a Wan video autoencoder is made of, read from `vae/config.json` of a diffusers folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sora_engine.errors import CheckpointError

CLASS_NAME = "AutoencoderKLWan"

# Statistics of the published Wan 2.1 latents: what diffusers assumes where a config names none.
WAN21_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN21_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
# Those of Wan 2.2's 16x autoencoder (5B), published with its code.
WAN22_MEAN = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
    *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
    *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
    *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
    *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
WAN22_STD = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
    *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
    *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
    *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
    *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)
# What diffusers writes into every config that does not say otherwise.
_DEFAULT_TEMPORAL, _DEFAULT_SPATIAL = 4, 8


@dataclass(frozen=True)
class WanVAEConfig:
    """The layout of an `AutoencoderKLWan`, with diffusers' names (its spelling of `temperal` too).

    `dim_mult` has an entry a stage; between two stages there is a 2x spatial resampling, which
    also halves time where `temperal_downsample` says so. `patch_size` folds squares of pixels into
    channels before the encoder: `in_channels` and `out_channels` count them after folding.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = 0.0
    latents_mean: tuple[float, ...] = WAN21_MEAN
    latents_std: tuple[float, ...] = WAN21_STD
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    clip_output: bool = True
    scale_factor_temporal: int | None = None
    scale_factor_spatial: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "dim_mult",
            "attn_scales",
            "temperal_downsample",
            "latents_mean",
            "latents_std",
        ):
            value = getattr(self, name)
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise CheckpointError(f"{name} must be a list, not {value!r}")
            object.__setattr__(self, name, tuple(value))
        self._check_counts()
        self._check_latent_statistics()
        self._settle_factors()

    def _check_counts(self) -> None:
        counts = {
            "base_dim": self.base_dim,
            "z_dim": self.z_dim,
            "num_res_blocks": self.num_res_blocks,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
        }
        for name in ("decoder_base_dim", "patch_size"):
            if getattr(self, name) is not None:
                counts[name] = getattr(self, name)
        for i, mult in enumerate(self.dim_mult):
            counts[f"dim_mult[{i}]"] = mult
        for name, value in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(f"{name} must be a positive whole number, not {value!r}")
        if not self.dim_mult:
            raise CheckpointError("dim_mult must name at least one stage")
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise CheckpointError(
                f"temperal_downsample has {len(self.temperal_downsample)} entries for "
                f"{len(self.dim_mult)} stages; it needs {len(self.dim_mult) - 1}"
            )
        for name in ("is_residual", "clip_output"):
            if not isinstance(getattr(self, name), bool):
                raise CheckpointError(f"{name} must be true or false, not {getattr(self, name)!r}")
        for flag in self.temperal_downsample:
            if not isinstance(flag, bool):
                raise CheckpointError(f"temperal_downsample must hold true and false, not {flag!r}")
        for scale in self.attn_scales:
            if not _is_number(scale):
                raise CheckpointError(f"attn_scales must hold numbers, not {scale!r}")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise CheckpointError(f"dropout must lie in [0, 1), not {self.dropout!r}")
        area = (self.patch_size or 1) ** 2
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) % area:
                raise CheckpointError(
                    f"{name} is {getattr(self, name)}, but with patch_size {self.patch_size} "
                    f"it must be a multiple of {area}"
                )

    def _check_latent_statistics(self) -> None:
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            if len(values) != self.z_dim:
                raise CheckpointError(f"{name} has {len(values)} values; z_dim is {self.z_dim}")
            for value in values:
                if not _is_number(value) or not math.isfinite(value):
                    raise CheckpointError(f"{name} must hold finite numbers, not {value!r}")
        if min(self.latents_std) <= 0:
            raise CheckpointError(f"latents_std must be positive, not {min(self.latents_std)!r}")

    def _settle_factors(self) -> None:
        """The layers decide the factors; a config that declares others is at odds with itself.

        diffusers writes 4 and 8 into every config whose author said nothing, so these two pass.
        """
        stages = len(self.dim_mult) - 1
        temporal = 2 ** sum(self.temperal_downsample)
        spatial = 2**stages * (self.patch_size or 1)
        for name, derived, default in (
            ("scale_factor_temporal", temporal, _DEFAULT_TEMPORAL),
            ("scale_factor_spatial", spatial, _DEFAULT_SPATIAL),
        ):
            declared = getattr(self, name)
            if declared not in (None, default, derived):
                raise CheckpointError(f"{name} is {declared!r}, but the layers make {derived}")
            object.__setattr__(self, name, derived)

    @property
    def class_name(self) -> str:
        return CLASS_NAME

    @property
    def pixel_channels(self) -> int:
        """Channels of the frames that are encoded."""
        return self.in_channels // (self.patch_size or 1) ** 2

    @property
    def size_multiple(self) -> int:
        """What height and width of frames must be multiples of, in pixels."""
        # The residual shortcuts cut frames into whole squares; Wan 2.1 rounds down instead.
        return self.factor_spatial if self.is_residual else self.patch_size or 1

    @property
    def widest(self) -> int:
        """At least the channels of the widest layer."""
        base = max(self.base_dim, self.decoder_base_dim or 0)
        return max(base * max(self.dim_mult), self.z_dim, self.in_channels)

    @property
    def factor_temporal(self) -> int:
        """Frames a latent frame stands for, the first one aside."""
        assert self.scale_factor_temporal is not None  # settled on construction
        return self.scale_factor_temporal

    @property
    def factor_spatial(self) -> int:
        """Pixels along one side of a latent."""
        assert self.scale_factor_spatial is not None
        return self.scale_factor_spatial

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], *, path: str | Path | None = None
    ) -> WanVAEConfig:
        """A config from the dictionary of a `config.json`; `path` is for the error messages.

        Raises CheckpointError for another class, for keys this engine does not know (a key may
        change what the layers compute, so none is skipped) and for values that make no sense.
        """
        name = values.get("_class_name", CLASS_NAME)
        if name != CLASS_NAME:
            raise CheckpointError(
                f"_class_name is {name!r}; this engine decodes with {CLASS_NAME}", path=path
            )
        known = {field.name for field in fields(cls)}
        keys = {key for key in values if not key.startswith("_")}
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

    @classmethod
    def from_file(cls, path: str | Path) -> WanVAEConfig:
        """The config in a `config.json`, or in the folder that holds one."""
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", path=path) from error
        except ValueError as error:
            raise CheckpointError(f"is not JSON: {error}", path=path) from error
        if not isinstance(values, dict):
            raise CheckpointError("is not a JSON object", path=path)
        return cls.from_dict(values, path=path)

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds, as diffusers reads it.

        `clip_output` is left out where it is true: diffusers' own configs do not carry it.
        """
        values: dict[str, Any] = {"_class_name": CLASS_NAME}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "clip_output" and value:
                continue
            values[field.name] = list(value) if isinstance(value, tuple) else value
        return values


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
