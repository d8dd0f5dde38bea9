"""The shape of a Latte, read from diffusers' `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from sora_engine.errors import CheckpointError
from sora_engine.models.transformer_config import PatchConfig


@dataclass(frozen=True)
class LatteConfig(PatchConfig):
    """The configuration of a Latte, with the names of diffusers' `LatteTransformer3DModel` and the
    values of Latte-1; one that no Latte can have raises `CheckpointError`.

    video_length: frames that it was trained on.
    """

    class_names = ("LatteTransformer3DModel",)
    model = "a Latte"
    only: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "norm_type": ("ada_norm_single",),
        "norm_elementwise_affine": (False,),
    }
    without_effect = ("dropout", "num_embeds_ada_norm")

    sample_size: int = 64
    cross_attention_dim: int | None = None
    caption_channels: int = 4096
    video_length: int = 16

    def check(self) -> None:
        """What it reads, its learned variance, and all else."""
        super().check()
        self.must_be_positive("caption_channels", "video_length")
        if self.cross_attention_dim not in (None, self.inner_dim):
            raise CheckpointError(
                f"cross_attention_dim is {self.cross_attention_dim!r}; texts are projected to "
                f"{self.inner_dim} (num_attention_heads x attention_head_dim)"
            )
        if not self.learned_variance:
            raise CheckpointError(
                f"out_channels is {self.out_channels}; with its learned variance "
                f"{2 * self.in_channels} would work"
            )

    @property
    def place_divisor(self) -> float:
        """By how much positions are closer than patches, in large models."""
        return max(self.sample_size // 64, 1)
