"""The shape of a PixArt, read from diffusers' `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from sora_engine.errors import CheckpointError
from sora_engine.models.transformer_config import PatchConfig

CONDITIONED = 128
"""The sample size at which diffusers takes a model without a word to be PixArt-Alpha's, which reads
its picture's size."""


@dataclass(frozen=True)
class PixArtConfig(PatchConfig):
    """The configuration of a PixArt, with the names of diffusers' `PixArtTransformer2DModel` and
    the values of PixArt-Sigma's; one that no PixArt-Sigma can have raises `CheckpointError`.

    interpolation_scale: by how much places lie closer than patches; None: by the sample size.
    use_additional_conditions: whether it reads the picture's size and shape, as PixArt-Alpha at
    1024 pixels does; that is not carried out.
    """

    class_names = ("PixArtTransformer2DModel", "Transformer2DModel")
    """diffusers' class, and the one that published folders name."""
    model = "a PixArt"
    only: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "norm_type": ("ada_norm_single",),
        "norm_elementwise_affine": (False,),
        "num_vector_embeds": (None,),
        "use_linear_projection": (False,),
        "only_cross_attention": (False,),
        "double_self_attention": (False,),
        "attention_type": ("default",),
    }
    without_effect = ("norm_num_groups", "dropout", "upcast_attention", "num_embeds_ada_norm")

    sample_size: int = 128
    cross_attention_dim: int | None = None
    caption_channels: int | None = None
    interpolation_scale: int | float | None = None
    use_additional_conditions: bool | None = None

    def check(self) -> None:
        """What it reads, and all else."""
        super().check()
        self.must_be_positive("caption_channels")
        scale = self.interpolation_scale
        if scale is not None and (
            isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < 1000
        ):
            raise CheckpointError(
                f"interpolation_scale is {scale!r}; null or a number between 0 and 1000 would work"
            )
        if self.cross_attention_dim not in (None, self.inner_dim):
            raise CheckpointError(
                f"cross_attention_dim is {self.cross_attention_dim!r}; texts are projected to "
                f"{self.inner_dim} (num_attention_heads x attention_head_dim)"
            )
        asked = self.use_additional_conditions
        if asked or (asked is None and self.sample_size == CONDITIONED):
            raise CheckpointError(
                f"use_additional_conditions is {asked!r}"
                f"{'' if asked else f' at sample_size {CONDITIONED}, which means true'}: "
                "PixArt-Alpha's picture sizes are not read; false, as PixArt-Sigma has, would work"
            )

    @property
    def place_divisor(self) -> float:
        """By how much positions are closer than patches."""
        if self.interpolation_scale is not None:
            return float(self.interpolation_scale)
        return max(self.sample_size // 64, 1)
