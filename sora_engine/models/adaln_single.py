"""Transformers whose blocks share one projection of the noise level (adaLN-single, arXiv
2310.00426), each with a table of its own added to it, and which read texts by cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_engine.denoise.conditioning import Context, Embedding, KeyValues
from sora_engine.denoise.packing import ContextRuns, PackedBatch, Stream
from sora_engine.models.attention import cross_attention, self_attention
from sora_engine.models.backends import Backends
from sora_engine.models.layers import (
    Attention,
    FeedForward,
    TimestepEmbedder,
    scale_shift_table,
    timestep_sinusoids,
)
from sora_engine.models.linear import steady
from sora_engine.models.patch_transformer import Modulation, PatchTransformer
from sora_engine.models.transformer_config import PatchConfig
from sora_kernels import gate_residual_norm_modulate

FREQUENCIES = 256
"""Channels of the sinusoids of a noise level."""
LAST_EPS = 1e-6
"""Of the norm before the output."""
Rope = tuple[Tensor, Tensor]
"""Cosines and sines, float32 `[N, head_dim / 2]`."""


class SingleBlock(nn.Module):
    """Self-attention, attention to a text where `reads` says so, and feed-forward; the first and
    the last behind a modulated LayerNorm and a gate."""

    def __init__(self, config: PatchConfig, *, reads: bool) -> None:
        super().__init__()
        dim, heads, bias = config.inner_dim, config.num_attention_heads, config.attention_bias
        self.eps = config.norm_eps
        self.scale_shift_table = scale_shift_table(6, dim)
        self.attn1 = Attention(dim, heads, bias=bias)
        self.attn2 = Attention(dim, heads, bias=bias) if reads else None
        self.ff = FeedForward(dim, 4 * dim, config.activation_fn)

    def attend(self, y: Tensor, stream: Stream, backends: Backends, rope: Rope | None) -> Tensor:
        """Self-attention of y `[N, dim]`: `[N, heads, head_dim]`. rope: as of `rotations`."""
        q, k, v = self.attn1.of_itself(y)
        return self_attention(q, k, v, stream, backend=backends.attention)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        *,
        stream: Stream,
        text: ContextRuns,
        layer: int,
        table: Tensor,
        following: Modulation,
        backends: Backends,
        rope: Rope | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Residual stream x (float32) and normalised input y, both `[N, dim]`, to those of the next
        block. layer: of the text's keys and values."""
        _, _, gate, ff_shift, ff_scale, ff_gate = table.unbind(1)
        scale, shift = ff_scale, ff_shift
        attended = self.attend(y, stream, backends, rope)
        x, y = gate_residual_norm_modulate(
            self.attn1.out(attended), x, gate, scale, shift, stream.rows,
            kind="layer", eps=self.eps, backend=backends.fused,
        )  # fmt: skip
        if self.attn2 is not None:
            # It reads the residual stream as it is, without a norm.
            q = self.attn2.split(self.attn2.to_q(x.to(y.dtype)))
            attended = cross_attention(q, text, layer, backend=backends.attention)
            x, y = gate_residual_norm_modulate(
                self.attn2.out(attended), x, None, scale, shift, stream.rows,
                kind="layer", eps=self.eps, backend=backends.fused,
            )  # fmt: skip
        return gate_residual_norm_modulate(
            self.ff(y), x, ff_gate, following.scale, following.shift, stream.rows,
            kind="layer", eps=following.eps, backend=backends.fused,
        )  # fmt: skip

    def keys_values(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[n, heads, head_dim]` of an embedded text `[n, dim]`."""
        assert self.attn2 is not None
        attention = self.attn2
        return attention.split(attention.to_k(embedded)), attention.split(attention.to_v(embedded))


class LevelEmbedder(nn.Module):
    """What all blocks know of the noise level."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepEmbedder(FREQUENCIES, dim)})
        self.linear = nn.Linear(dim, 6 * dim)

    def forward(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps `[rows]` to the embedding `[rows, dim]` and its projection `[rows, 6, dim]`."""
        sinusoids = timestep_sinusoids(timesteps, FREQUENCIES, ends_at_lowest=False)
        level = self.emb["timestep_embedder"](sinusoids)
        return level, steady(self.linear, F.silu(level)).unflatten(-1, (6, -1))


class TextProjection(nn.Module):
    """The text encoder's channels to the model's."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, text: Tensor) -> Tensor:
        hidden = F.gelu(steady(self.linear_1, text), approximate="tanh")
        return steady(self.linear_2, hidden)


class SingleTransformer(PatchTransformer):
    """A transformer of such blocks, which a subclass makes.

    text_tokens: where its texts are cut, and how long `T5Encoder` makes them.
    """

    block_methods = ("forward", "keys_values")
    text_tokens: int

    def __init__(
        self,
        config: PatchConfig,
        caption_channels: int,
        *,
        backend: str = "auto",
        attention_backend: str | None = None,
    ) -> None:
        super().__init__(config, backend=backend, attention_backend=attention_backend)
        dim = config.inner_dim
        self.caption_channels = caption_channels
        self.scale_shift_table = scale_shift_table(2, dim)
        self.proj_out = nn.Linear(dim, config.patch_size**2 * config.out_channels)
        self.adaln_single = LevelEmbedder(dim)
        self.caption_projection = TextProjection(caption_channels, dim)

    def example_embedding(self, num_tokens: int, device: torch.device) -> Embedding:
        """A text of so many tokens, which `encode_contexts` takes padded."""
        size = (self.text_tokens, self.caption_channels)
        return {
            "text": torch.zeros(size, dtype=self.dtype, device=device),
            "count": torch.tensor(num_tokens),
        }

    def num_read(self, embeddings: Sequence[Embedding]) -> list[int]:
        """How many tokens of each text are read: its own, and none of its padding. Where memory is
        rehearsed, texts have no lengths: then they are as long as they get."""
        return [self.text_tokens if e["count"].is_meta else int(e["count"]) for e in embeddings]

    def encode_contexts(self, embeddings: Sequence[Embedding]) -> list[Context]:
        """Keys and values of texts, for every layer: once a request.

        embeddings: each with `"text"` `[text_tokens, caption_channels]`, padding encoded too, and
        `"count"`, int64 `[]`, its own tokens.
        """
        counts = self.num_read(embeddings)
        texts = [self.read(e)[:count] for e, count in zip(embeddings, counts, strict=True)]
        rows = self.caption_projection(torch.cat(texts).to(self.dtype))
        blocks = cast("Sequence[SingleBlock]", self.blocks_in_order)
        pairs = [block.keys_values(rows) for block in blocks if block.attn2 is not None]
        keys, values = (torch.stack(each).split(counts, dim=1) for each in zip(*pairs, strict=True))
        return [Context({"text": KeyValues(k, v)}) for k, v in zip(keys, values, strict=True)]

    def read(self, embedding: Embedding) -> Tensor:
        """What of an embedding is projected, `[text_tokens, caption_channels]`."""
        return embedding["text"]

    def conditions(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Of the table's rows the embedding `[rows, dim]` and its projection `[rows, 6, dim]`."""
        return self.adaln_single(timesteps)  # type: ignore[no-any-return]

    def rotations(self, stream: Stream) -> Rope | None:
        """By what queries and keys are turned, of blocks that do so."""
        return None

    def before(self, layer: int, x: Tensor, stream: Stream) -> Tensor | None:
        """What the residual stream becomes before the block `layer`; None where it stays."""
        return None

    def forward(self, batch: PackedBatch) -> Tensor:
        """Predictions for all tokens, `[N, patch_size^2 * out_channels]`, channel last."""
        stream, eps = batch.video, self.config.norm_eps
        x = self.embedded(stream)
        level, projection = self.conditions(batch.timesteps)
        rope = self.rotations(stream)
        blocks = cast("Sequence[SingleBlock]", self.blocks_in_order)
        tables = [block.scale_shift_table.float() + projection.float() for block in blocks]
        entries = [Modulation(t[:, 1], t[:, 0], eps) for t in tables]
        shift, scale = (self.scale_shift_table.float() + level.float()[:, None]).unbind(1)
        entries.append(Modulation(scale, shift, LAST_EPS))
        y = self.normalised(x, entries[0], stream)
        text_layer = -1
        for i, block in enumerate(blocks):
            moved = self.before(i, x, stream)
            if moved is not None:
                x, y = moved, self.normalised(moved, entries[i], stream)
            text_layer += block.attn2 is not None
            x, y = block(
                x,
                y,
                stream=stream,
                text=batch.contexts["text"],
                layer=text_layer,
                table=tables[i],
                following=entries[i + 1],
                backends=self.backends,
                rope=rope,
            )
        return steady(self.proj_out, y)
