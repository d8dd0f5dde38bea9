"""The shape of a U-ViT, by the names of its authors' constructors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from sora_engine.errors import CheckpointError
from sora_engine.models.transformer_config import MAX_LAYERS, TransformerConfig


@dataclass(frozen=True)
class UViTConfig(TransformerConfig):
    """The configuration of a U-ViT, which reads a class or a text. Its files have none: they tell
    it by their shapes, but for the heads of widths that were not published.

    img_size: latents along a side; positions are learned, so there is no other size. num_classes:
    the rows of its classes' embedding, of which the last is none; -1: it reads texts, of
    num_clip_token tokens of clip_dim channels. conv: whether a convolution follows the last layer.
    """

    class_names = ("UViT",)
    model = "a U-ViT"
    only: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "mlp_ratio": (4,),
        "qkv_bias": (False,),
        "mlp_time_embed": (False,),
        "qk_scale": (None,),
        "skip": (True,),
    }
    without_effect = ("use_checkpoint",)

    img_size: int = 32
    patch_size: int = 2
    in_chans: int = 4
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    num_classes: int = -1
    clip_dim: int = 768
    num_clip_token: int = 77
    conv: bool = True

    def check(self) -> None:
        """Sizes, and that they fit each other."""
        self.must_be_positive(
            "img_size", "patch_size", "in_chans", "embed_dim", "num_heads", "clip_dim",
            "num_clip_token",
        )  # fmt: skip
        self.must_be_positive("depth", most=MAX_LAYERS)
        self.must_be_bool("conv")
        if self.num_classes != -1:
            self.must_be_positive("num_classes")
        if self.depth % 2:
            raise CheckpointError(f"depth is {self.depth}; skips need an even number of blocks")
        if self.embed_dim % self.num_heads or self.embed_dim % 2:
            raise CheckpointError(
                f"embed_dim {self.embed_dim} does not divide into {self.num_heads} heads of an "
                "even width"
            )
        if self.img_size % self.patch_size:
            raise CheckpointError(
                f"img_size {self.img_size} is no multiple of patch_size {self.patch_size}"
            )

    @property
    def reads_classes(self) -> bool:
        """Whether its condition is a class; else it is a text."""
        return self.num_classes != -1

    @property
    def side(self) -> int:
        """Patches along a side of its pictures."""
        return self.img_size // self.patch_size

    @property
    def num_context(self) -> int:
        """Tokens of its condition."""
        return 1 if self.reads_classes else self.num_clip_token
