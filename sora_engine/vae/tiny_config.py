"""What a tiny autoencoder (TAEHV) is made of, told by the shapes of its file.

`taew2_1` goes with the latents of Wan 2.1 and 2.2 A14B, `taew2_2` and `taew2_2_super` with those of
Wan 2.2 5B (https://github.com/madebyollin/taehv). Files have no configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sora_engine.errors import CheckpointError

CLASS_NAME = "TAEHV"
STRIDES = (1, 2, 2)
"""Frames that each of the decoder's three stages makes of one."""
FACTOR_TEMPORAL, FACTOR_SPATIAL = 4, 8
_LAST = "decoder.22.bias"
"""A tensor of each of them, and of no other autoencoder."""
USUAL = {
    16: "taew2_1.safetensors",
    48: "taew2_2.safetensors or taew2_2_super.safetensors",
}
"""By channels of the latents, under which names people hold them."""


@dataclass(frozen=True, slots=True)
class TinyVAEConfig:
    """The layout of a tiny decoder.

    widths: channels of the three stages, and of the last layer's input. patch: side of the squares
    of pixels that a last layer's channels are. deep: whether it is of the "super" form, whose
    blocks are depthwise convolutions and products of pixels.
    """

    z_dim: int
    widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    patch: int = 1
    deep: bool = False

    @property
    def class_name(self) -> str:
        return CLASS_NAME

    @property
    def factor_temporal(self) -> int:
        return FACTOR_TEMPORAL

    @property
    def factor_spatial(self) -> int:
        return FACTOR_SPATIAL * self.patch

    @property
    def latents_mean(self) -> tuple[float, ...]:
        """It reads latents as the transformer has them."""
        return (0.0,) * self.z_dim

    @property
    def latents_std(self) -> tuple[float, ...]:
        return (1.0,) * self.z_dim

    @property
    def pixel_channels(self) -> int:
        return 3

    @property
    def size_multiple(self) -> int:
        return self.factor_spatial

    @property
    def widest(self) -> int:
        return max(4 * max(self.widths), self.z_dim)

    def to_dict(self) -> dict[str, Any]:
        """Its fields, as `from_dict` reads them."""
        return {"_class_name": CLASS_NAME, **asdict(self), "widths": list(self.widths)}

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], *, path: str | Path | None = None
    ) -> TinyVAEConfig:
        """The same from `to_dict`'s. Raises CheckpointError."""
        own = {key: value for key, value in values.items() if not key.startswith("_")}
        try:
            return cls(**{**own, "widths": tuple(own["widths"])})
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"no configuration of {CLASS_NAME}: {error}", path=path) from None


def is_tiny(names: Iterable[str]) -> bool:
    """Whether these are the tensors of a tiny autoencoder."""
    return _LAST in set(names)


def infer_tiny(
    shapes: Mapping[str, tuple[int, ...]], *, path: str | Path | None = None
) -> TinyVAEConfig:
    """The configuration of a file with tensors of these shapes. Raises CheckpointError."""

    def shape(name: str) -> tuple[int, ...]:
        found = shapes.get(name)
        if found is None or len(found) != 4 or 0 in found:
            what = "is missing" if found is None else f"has shape {list(found)}"
            raise CheckpointError(
                f"tensor {name!r} {what}; a tiny autoencoder (TAEHV) has a convolution there",
                path=path,
                tensor=name,
            )
        return found

    if not is_tiny(shapes):
        seen = ", ".join(sorted(shapes)[:3])
        raise CheckpointError(
            f"not a tiny autoencoder (TAEHV): it holds {seen}; people hold it as "
            f"{', '.join(USUAL.values())}",
            path=path,
        )
    deep = "decoder.0.weight" in shapes
    first, z_dim = shape("decoder.0.weight" if deep else "decoder.1.weight")[:2]
    if deep:
        between = [shape(f"decoder.{i}.weight")[0] // 4 for i in (4, 11, 18)]
    else:
        between = [shape(f"decoder.{i}.weight")[0] for i in (8, 14, 20)]
    out = shape("decoder.22.weight")[0]
    patch = {3: 1, 12: 2}.get(out)
    if patch is None:
        raise CheckpointError(
            f"tensor 'decoder.22.weight' makes {out} channels; 3 or 12 would work "
            "(other models' tiny autoencoders are not read)",
            path=path,
            tensor="decoder.22.weight",
        )
    return TinyVAEConfig(z_dim, (first, between[0], between[1], between[2]), patch, deep)
