"""STDiT3 over packed patches (Open-Sora 1.2, arXiv 2412.20404): each layer attends within frames
and to the text, then along time and to the text.

Layers have diffusers' names within a block, and the authors' lists around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_engine.denoise.conditioning import NEGATIVE, Embedding
from sora_engine.denoise.model import TransformerShape
from sora_engine.denoise.packing import PackedBatch, Stream
from sora_engine.errors import LayoutError, RequestError
from sora_engine.models.adaln_single import FREQUENCIES, Rope, SingleBlock, SingleTransformer
from sora_engine.models.backends import Backends
from sora_engine.models.layers import TimestepEmbedder, sincos, timestep_sinusoids
from sora_engine.models.linear import embed_patches, steady
from sora_engine.models.patch_transformer import patch_shape
from sora_engine.models.stdit.config import STDiTConfig
from sora_kernels import qk_norm_rope, spatial_attention, temporal_attention

FPS = 24.0
"""That its transformer is told: its own sampling's."""
NORM_EPS = 1e-6
"""Of the norms of queries and keys."""
THETA = 10_000.0


class STDiTBlock(SingleBlock):
    """With RMS norms of queries and keys; along time they are turned, too."""

    def __init__(self, config: STDiTConfig, *, temporal: bool) -> None:
        super().__init__(config, reads=True)
        self.temporal = temporal
        dim = config.attention_head_dim
        self.norm_q, self.norm_k = nn.RMSNorm(dim), nn.RMSNorm(dim)

    def attend(self, y: Tensor, stream: Stream, backends: Backends, rope: Rope | None) -> Tensor:
        """Within frames, or along time."""
        q, k, v = self.attn1.of_itself(y)
        cos, sin = rope if self.temporal and rope is not None else (None, None)
        q, turned = qk_norm_rope(
            q, k, self.norm_q.weight, self.norm_k.weight, cos, sin,
            across_heads=False, eps=NORM_EPS, backend=backends.fused,
        )  # fmt: skip
        assert turned is not None
        if self.temporal:
            return temporal_attention(q, turned, v, stream.grids)
        return spatial_attention(q, turned, v, stream.grids, backend=backends.attention)


class STDiT(SingleTransformer):
    """A text-conditional STDiT3. It was trained to predict data less noise, and predicts noise less
    data, as all flow models of the engine."""

    block_lists = ("spatial_blocks", "temporal_blocks")
    config: STDiTConfig
    adaptable = (
        r"(spatial|temporal)_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)"
        r"|ff\.net\.(0\.proj|2))|caption_projection\.linear_[12]|proj_out"
    )

    def __init__(
        self, config: STDiTConfig, *, backend: str = "auto", attention_backend: str | None = None
    ) -> None:
        super().__init__(
            config, config.caption_channels, backend=backend, attention_backend=attention_backend
        )
        self.text_tokens = config.text_tokens
        layers = range(config.num_layers)
        spatial, temporal = (
            nn.ModuleList([STDiTBlock(config, temporal=kind) for _ in layers])
            for kind in (False, True)
        )
        self.spatial_blocks = cast("Sequence[STDiTBlock]", spatial)
        self.temporal_blocks = cast("Sequence[STDiTBlock]", temporal)
        self.fps_embedder = TimestepEmbedder(FREQUENCIES, config.inner_dim)
        self.no_text = nn.Parameter(torch.zeros(config.text_tokens, config.caption_channels))
        """What the unconditional branch reads in the place of an empty text."""

    @property
    def shape(self) -> TransformerShape:
        """Its sizes."""
        return transformer_shape(self.config)

    @property
    def blocks_in_order(self) -> list[nn.Module]:
        """Those within frames and those along time, in turn."""
        pairs = zip(self.spatial_blocks, self.temporal_blocks, strict=True)
        return [block for pair in pairs for block in pair]

    def num_read(self, embeddings: Sequence[Embedding]) -> list[int]:
        """A text without its padding; what stands for none as far as the first one goes."""
        own = super().num_read(embeddings)
        return [own[0] if self._none(e) else n for e, n in zip(embeddings, own, strict=True)]

    def read(self, embedding: Embedding) -> Tensor:
        """The text's own, or what was learned for none."""
        return self.no_text if self._none(embedding) else embedding["text"]

    def conditions(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Of the noise level and of the frame rate, which all rows share."""
        linear = self.adaln_single.linear
        sinusoids = timestep_sinusoids(timesteps, FREQUENCIES, ends_at_lowest=False)
        level = self.adaln_single.emb["timestep_embedder"](sinusoids)
        rate = torch.full((1,), FPS, device=timesteps.device)
        level = level + self.fps_embedder(
            timestep_sinusoids(rate, FREQUENCIES, ends_at_lowest=False)
        )
        return level, steady(linear, F.silu(level)).unflatten(-1, (6, -1))

    def embedded(self, stream: Stream) -> Tensor:
        """Patches, and places that depend on a video's size: as of a square of its area, scaled by
        how much larger that is than the trained one."""
        assert stream.extents is not None
        x = embed_patches(stream.tokens.to(self.dtype), self._patch)
        extents = stream.extents.double()
        side = extents.prod(dim=1).sqrt()
        scale = side * self.config.patch_size / self.config.sample_size
        halves = [
            sincos(
                stream.coords[:, 1 + i] / scale * (side.round() / extents[:, i]), x.shape[1] // 2
            )
            for i in (1, 0)
        ]
        return (x + torch.cat(halves, dim=1).to(x.dtype)).float()

    def rotations(self, stream: Stream) -> Rope | None:
        """RoPE along time, over all channels of a head."""
        dim = self.config.attention_head_dim
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=stream.coords.device) / dim
        angles = stream.coords[:, :1].double() * THETA**-exponents
        return angles.cos().float(), angles.sin().float()

    def forward(self, batch: PackedBatch) -> Tensor:
        """Predictions for all tokens, `[N, patch_size^2 * out_channels]`, channel last."""
        stream = batch.video
        if stream.attend is not None:
            raise LayoutError(
                "attention within frames and along time is not shared out over ulysses or ring "
                "ranks; guidance, window or data would work"
            )
        if stream.sees is not None:
            raise RequestError(
                "attention along time sees all frames of a window: a SparsePlan is not carried "
                "out, and a WindowPlan would work"
            )
        return -super().forward(batch)

    def _none(self, embedding: Embedding) -> bool:
        """Whether it is the negative branch's, of an empty text: one token, the end mark."""
        count = embedding["count"]
        return NEGATIVE in embedding and not count.is_meta and int(count) == 1


def transformer_shape(config: STDiTConfig) -> TransformerShape:
    """The sizes of the transformer that a configuration describes."""
    return patch_shape(config, lists=2, text_tokens=config.text_tokens)
