"""The shape of a DiT, read from diffusers' `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from sora_engine.models.transformer_config import PatchConfig


@dataclass(frozen=True)
class DiTConfig(PatchConfig):
    """The configuration of a DiT. Fields and defaults are those of diffusers'
    `DiTTransformer2DModel`; a value that no DiT can have raises `CheckpointError`.

    num_embeds_ada_norm: its classes; the class after the last is none.
    """

    class_names = ("DiTTransformer2DModel", "Transformer2DModel")
    """diffusers' class, and the one that published folders name."""
    model = "a DiT"
    only: ClassVar[Mapping[str, tuple[object, ...]]] = {
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
    without_effect = ("norm_num_groups", "dropout", "upcast_attention")

    num_embeds_ada_norm: int = 1000
    norm_eps: float = 1e-5

    def check(self) -> None:
        """Its classes, and all else."""
        super().check()
        self.must_be_positive("num_embeds_ada_norm")
