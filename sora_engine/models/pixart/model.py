"""PixArt over packed patches (arXiv 2310.00426, 2403.04692): blocks that attend to the picture and
to the text, under one projection of the noise level.

Parameter names are those of diffusers' `PixArtTransformer2DModel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import nn

from sora_engine.denoise.model import TransformerShape
from sora_engine.models.adaln_single import SingleBlock, SingleTransformer
from sora_engine.models.patch_transformer import patch_shape
from sora_engine.models.pixart.config import PixArtConfig

TEXT_TOKENS = 300
"""Where the pipeline of PixArt-Sigma cuts a text."""


class PixArt(SingleTransformer):
    """A text-conditional PixArt."""

    block_lists = ("transformer_blocks",)
    text_tokens = TEXT_TOKENS
    config: PixArtConfig
    adaptable = (
        r"transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))"
        r"|caption_projection\.linear_[12]|proj_out"
    )

    def __init__(
        self, config: PixArtConfig, *, backend: str = "auto", attention_backend: str | None = None
    ) -> None:
        assert config.caption_channels is not None
        super().__init__(
            config, config.caption_channels, backend=backend, attention_backend=attention_backend
        )
        blocks = [SingleBlock(config, reads=True) for _ in range(config.num_layers)]
        self.transformer_blocks = cast("Sequence[SingleBlock]", nn.ModuleList(blocks))

    @property
    def shape(self) -> TransformerShape:
        """Its sizes."""
        return transformer_shape(self.config)


def transformer_shape(config: PixArtConfig) -> TransformerShape:
    """The sizes of the transformer that a configuration describes."""
    return patch_shape(config, text_tokens=TEXT_TOKENS)
