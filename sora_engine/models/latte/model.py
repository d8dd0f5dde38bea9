"""Latte over packed patches (arXiv 2401.03048): each layer attends within frames and to the text,
then along time.

Parameter names are those of diffusers' `LatteTransformer3DModel`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from sora_engine.denoise.conditioning import NEGATIVE, Embedding
from sora_engine.denoise.model import TransformerShape
from sora_engine.denoise.packing import PackedBatch, Stream
from sora_engine.errors import LayoutError, RequestError
from sora_engine.models.adaln_single import Rope, SingleBlock, SingleTransformer
from sora_engine.models.backends import Backends
from sora_engine.models.latte.config import LatteConfig
from sora_engine.models.layers import sincos
from sora_engine.models.patch_transformer import patch_shape
from sora_kernels import spatial_attention, temporal_attention
from sora_kernels.transfer import to_device

TEXT_TOKENS = 120
"""Where its pipeline cuts a text."""


class FrameBlock(SingleBlock):
    """Attends within each frame, and to the text."""

    def attend(self, y: Tensor, stream: Stream, backends: Backends, rope: Rope | None) -> Tensor:
        """Tokens of one frame see each other."""
        qkv = self.attn1.of_itself(y)
        return spatial_attention(*qkv, stream.grids, backend=backends.attention)


class TimeBlock(SingleBlock):
    """Attends along time."""

    def attend(self, y: Tensor, stream: Stream, backends: Backends, rope: Rope | None) -> Tensor:
        """Tokens of one place see each other."""
        return temporal_attention(*self.attn1.of_itself(y), stream.grids)


class LatteTransformer(SingleTransformer):
    """A text-conditional Latte."""

    block_lists = ("transformer_blocks", "temporal_transformer_blocks")
    text_tokens = TEXT_TOKENS
    config: LatteConfig
    adaptable = (
        r"(temporal_)?transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)"
        r"|ff\.net\.(0\.proj|2))|caption_projection\.linear_[12]|proj_out"
    )

    def __init__(
        self, config: LatteConfig, *, backend: str = "auto", attention_backend: str | None = None
    ) -> None:
        super().__init__(
            config, config.caption_channels, backend=backend, attention_backend=attention_backend
        )
        layers = range(config.num_layers)
        spatial = nn.ModuleList([FrameBlock(config, reads=True) for _ in layers])
        temporal = nn.ModuleList([TimeBlock(config, reads=False) for _ in layers])
        self.transformer_blocks = cast("Sequence[SingleBlock]", spatial)
        self.temporal_transformer_blocks = cast("Sequence[SingleBlock]", temporal)

    @property
    def shape(self) -> TransformerShape:
        """Its sizes."""
        return transformer_shape(self.config)

    @property
    def blocks_in_order(self) -> list[nn.Module]:
        """Those within frames and those along time, in turn."""
        pairs = zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True)
        return [block for pair in pairs for block in pair]

    def num_read(self, embeddings: Sequence[Embedding]) -> list[int]:
        """A text without its padding; the one of the unconditional branch as far as the first one
        goes, as diffusers' pipeline has it."""
        own = super().num_read(embeddings)
        return [own[0] if NEGATIVE in e else n for e, n in zip(embeddings, own, strict=True)]

    def before(self, layer: int, x: Tensor, stream: Stream) -> Tensor | None:
        """Time has its positions once, before the first attention along it."""
        return x + _times(stream, x.shape[1]).to(self.dtype) if layer == 1 else None

    def forward(self, batch: PackedBatch) -> Tensor:
        """Predictions for all tokens, `[N, patch_size^2 * out_channels]`, channel last."""
        check_whole(batch.video)
        return super().forward(batch)


def check_whole(stream: Stream) -> None:
    """That whole frames and whole times are here: LayoutError and RequestError."""
    if stream.attend is not None:
        raise LayoutError(
            "attention within frames and along time is not shared out over ulysses or ring ranks; "
            "guidance, window or data would work"
        )
    if stream.sees is not None:
        raise RequestError(
            "attention along time sees all frames of a window: a SparsePlan is not carried out, "
            "and a WindowPlan would work"
        )


def _times(stream: Stream, dim: int) -> Tensor:
    """Fixed positions in time `[N, dim]`; none in segments of one frame."""
    lengths = torch.tensor([math.prod(grid) for grid in stream.grids])
    moving = torch.tensor([float(grid[0] > 1) for grid in stream.grids])
    each = to_device(moving.repeat_interleave(lengths), stream.coords.device)
    return sincos(stream.coords[:, 0], dim) * each[:, None]


def transformer_shape(config: LatteConfig) -> TransformerShape:
    """The sizes of the transformer that a configuration describes."""
    return patch_shape(config, lists=2, text_tokens=TEXT_TOKENS)
