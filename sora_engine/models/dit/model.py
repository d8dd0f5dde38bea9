"""DiT over packed patches (arXiv 2212.09748): class and noise level modulate every block.

Parameter names are those of diffusers' `DiTTransformer2DModel`. Each block has an embedding of
noise levels and one of classes of its own there, and so it has here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_engine.denoise.conditioning import Context, Embedding
from sora_engine.denoise.model import TransformerShape
from sora_engine.denoise.packing import PackedBatch, Stream
from sora_engine.models.attention import self_attention
from sora_engine.models.backends import Backends
from sora_engine.models.dit.config import DiTConfig
from sora_engine.models.layers import (
    Attention,
    FeedForward,
    TimestepEmbedder,
    timestep_sinusoids,
)
from sora_engine.models.linear import steady
from sora_engine.models.patch_transformer import Modulation, PatchTransformer, patch_shape
from sora_kernels import gate_residual_norm_modulate

FREQUENCIES = 256
"""Channels of the sinusoids of a noise level."""
EPS = 1e-6
"""Of the norms that open a block, and of the last."""


class ConditionEmbedder(nn.Module):
    """The sum of a noise level's and a class's embedding."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.inner_dim
        self.timestep_embedder = TimestepEmbedder(FREQUENCIES, dim)
        self.class_embedder = nn.ModuleDict(
            {"embedding_table": nn.Embedding(config.num_embeds_ada_norm + 1, dim)}
        )

    def forward(self, sinusoids: Tensor, labels: Tensor) -> Tensor:
        """`[rows, channels]` and `[rows]` to `[rows, dim]`."""
        table = self.class_embedder["embedding_table"]
        return self.timestep_embedder(sinusoids) + table(labels)  # type: ignore[no-any-return]


class ZeroNorm(nn.Module):
    """What makes a block's modulation: adaLN-Zero."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.emb = ConditionEmbedder(config)
        self.linear = nn.Linear(config.inner_dim, 6 * config.inner_dim)

    def forward(self, sinusoids: Tensor, labels: Tensor) -> Tensor:
        """The table `[rows, 6, dim]`: shift, scale and gate of attention, then of feed-forward."""
        embedded = self.emb(sinusoids, labels)
        return steady(self.linear, F.silu(embedded)).unflatten(-1, (6, -1))


class DiTBlock(nn.Module):
    """Self-attention and feed-forward, each behind a modulated LayerNorm and a gate."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.inner_dim
        self.eps = config.norm_eps
        self.norm1 = ZeroNorm(config)
        self.attn1 = Attention(dim, config.num_attention_heads, bias=config.attention_bias)
        self.ff = FeedForward(dim, 4 * dim, config.activation_fn)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        *,
        stream: Stream,
        table: Tensor,
        following: Modulation,
        backends: Backends,
    ) -> tuple[Tensor, Tensor]:
        """Residual stream x (float32) and normalised input y, both `[N, dim]`, to those of the next
        block."""
        _, _, gate, ff_shift, ff_scale, ff_gate = table.unbind(1)
        q, k, v = self.attn1.of_itself(y)
        attended = self_attention(q, k, v, stream, backend=backends.attention)
        x, y = gate_residual_norm_modulate(
            self.attn1.out(attended),
            x,
            gate,
            ff_scale,
            ff_shift,
            stream.rows,
            kind="layer",
            eps=self.eps,
            backend=backends.fused,
        )
        return gate_residual_norm_modulate(
            self.ff(y),
            x,
            ff_gate,
            following.scale,
            following.shift,
            stream.rows,
            kind="layer",
            eps=following.eps,
            backend=backends.fused,
        )


class DiT(PatchTransformer):
    """A class-conditional DiT."""

    block_lists = ("transformer_blocks",)
    own_parts = ("attn1", "ff")
    config: DiTConfig
    adaptable = (
        r"transformer_blocks\.\d+\.(attn1\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))|proj_out_2"
    )

    def __init__(
        self, config: DiTConfig, *, backend: str = "auto", attention_backend: str | None = None
    ) -> None:
        super().__init__(config, backend=backend, attention_backend=attention_backend)
        dim = config.inner_dim
        blocks = [DiTBlock(config) for _ in range(config.num_layers)]
        self.transformer_blocks = cast("Sequence[DiTBlock]", nn.ModuleList(blocks))
        self.proj_out_1 = nn.Linear(dim, 2 * dim)
        self.proj_out_2 = nn.Linear(dim, config.patch_size**2 * config.out_channels)

    @property
    def shape(self) -> TransformerShape:
        """Its sizes."""
        return patch_shape(self.config)

    def example_embedding(self, num_tokens: int, device: torch.device) -> Embedding:
        """A class."""
        return {"label": torch.zeros((), dtype=torch.int64, device=device)}

    def encode_contexts(self, embeddings: Sequence[Embedding]) -> list[Context]:
        """The class that each branch is of; a negative one is none.

        embeddings: each with `"label"`, int64 `[]`.
        """
        none = self.config.num_embeds_ada_norm
        labels = [embedding["label"] for embedding in embeddings]
        return [Context(pooled=torch.where(label < 0, none, label).reshape(1)) for label in labels]

    def forward(self, batch: PackedBatch) -> Tensor:
        """Predictions for all tokens, `[N, patch_size^2 * out_channels]`, channel last."""
        stream = batch.video
        assert batch.pooled is not None
        labels = batch.pooled[:, 0]
        x = self.embedded(stream)
        sinusoids = timestep_sinusoids(batch.timesteps, FREQUENCIES, ends_at_lowest=True)
        tables = [block.norm1(sinusoids, labels) for block in self.transformer_blocks]
        entries = [Modulation(table[:, 1], table[:, 0], EPS) for table in tables]
        condition = F.silu(self.transformer_blocks[0].norm1.emb(sinusoids, labels))
        shift, scale = steady(self.proj_out_1, condition).chunk(2, dim=1)
        entries.append(Modulation(scale, shift, EPS))
        y = self.normalised(x, entries[0], stream)
        for layer, block in enumerate(self.transformer_blocks):
            x, y = block(
                x,
                y,
                stream=stream,
                table=tables[layer],
                following=entries[layer + 1],
                backends=self.backends,
            )
        return steady(self.proj_out_2, y)
