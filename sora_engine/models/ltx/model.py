"""LTX-Video's transformer over packed tokens (arXiv 2501.00103).

Each block is a Latte's or a Wan's with two differences: norms are RMS norms without weights, and
rotary positions turn the whole width of a token rather than each head of it. Parameter names are
those of diffusers' `LTXVideoTransformer3DModel`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_engine.denoise.conditioning import Context, Embedding, KeyValues
from sora_engine.denoise.model import TransformerShape
from sora_engine.denoise.packing import ContextRuns, PackedBatch, Stream
from sora_engine.models.adaln_single import LAST_EPS, LevelEmbedder, TextProjection
from sora_engine.models.attention import cross_attention, self_attention
from sora_engine.models.backends import Backends
from sora_engine.models.layers import Attention, FeedForward, scale_shift_table
from sora_engine.models.linear import steady
from sora_engine.models.ltx.config import LTXConfig
from sora_engine.models.transformer import DiffusionTransformer
from sora_kernels import gate_residual_norm_modulate, norm_modulate, qk_norm_rope

QK_EPS = 1e-5
THETA = 10_000.0
REACH = (20.0, 2048.0, 2048.0)
"""Seconds, rows and columns of pixels that positions are fractions of."""


class Modulation(NamedTuple):
    """Scale and shift of one normalisation, `[rows, channels]` each, and which norm it is."""

    scale: Tensor
    shift: Tensor
    kind: str
    eps: float


class LTXAttention(Attention):
    """Projections of one attention, with RMS norms of queries and keys across all heads."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads, bias=True)
        self.norm_q = nn.RMSNorm(dim, QK_EPS)
        self.norm_k = nn.RMSNorm(dim, QK_EPS)

    def turned(
        self, q: Tensor, k: Tensor, rope: tuple[Tensor, Tensor], backends: Backends
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys `[N, heads, head_dim]`, normalised and turned over the whole width.

        `qk_norm_rope` takes heads of up to 256 channels, so the rotation is its own pass.
        """
        turned = []
        for x, norm in ((q, self.norm_q), (k, self.norm_k)):
            flat = norm_modulate(
                x.flatten(1), kind="rms", weight=norm.weight, eps=QK_EPS, backend=backends.fused
            )
            turned.append(self.split(rotated(flat, rope)))
        return turned[0], turned[1]

    def normalised(self, x: Tensor, norm: nn.RMSNorm, backends: Backends) -> Tensor:
        """`[N, dim]` to `[N, heads, head_dim]`."""
        q, _ = qk_norm_rope(
            self.split(x), None, norm.weight, None, None, None,
            across_heads=True, eps=QK_EPS, backend=backends.fused,
        )  # fmt: skip
        return q


def rotated(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """`[N, dim]` with neighbouring channels turned by angles `[N, dim / 2]`, in float32."""
    cos, sin = rope
    even, odd = x.float().unflatten(1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(1).to(x.dtype)


class LTXBlock(nn.Module):
    """Self-attention, attention to a text, and feed-forward; the first and the last behind a
    modulated RMSNorm and a gate."""

    def __init__(self, config: LTXConfig) -> None:
        super().__init__()
        dim, heads = config.inner_dim, config.num_attention_heads
        self.eps = config.norm_eps
        self.attn1 = LTXAttention(dim, heads)
        self.attn2 = LTXAttention(dim, heads)
        self.ff = FeedForward(dim, 4 * dim, config.activation_fn)
        self.scale_shift_table = scale_shift_table(6, dim)

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
        rope: tuple[Tensor, Tensor],
        backends: Backends,
    ) -> tuple[Tensor, Tensor]:
        """Residual stream x (float32) and normalised input y, both `[N, dim]`, to those of the next
        block."""
        _, _, gate, ff_shift, ff_scale, ff_gate = table.unbind(1)
        q, k, v = self.attn1.of_itself(y)
        q, k = self.attn1.turned(q, k, rope, backends)
        attended = self_attention(q, k, v, stream, backend=backends.attention)
        x, y = gate_residual_norm_modulate(
            self.attn1.out(attended), x, gate, None, None, stream.rows,
            kind="rms", eps=self.eps, backend=backends.fused,
        )  # fmt: skip
        # It reads the residual stream as it is, without a norm.
        q = self.attn2.normalised(self.attn2.to_q(x.to(y.dtype)), self.attn2.norm_q, backends)
        attended = cross_attention(q, text, layer, backend=backends.attention)
        x, y = gate_residual_norm_modulate(
            self.attn2.out(attended), x, None, ff_scale, ff_shift, stream.rows,
            kind="rms", eps=self.eps, backend=backends.fused,
        )  # fmt: skip
        return gate_residual_norm_modulate(
            self.ff(y), x, ff_gate, following.scale, following.shift, stream.rows,
            kind=following.kind, eps=following.eps, backend=backends.fused,
        )  # fmt: skip

    def keys_values(self, embedded: Tensor, backends: Backends) -> tuple[Tensor, Tensor]:
        """Keys and values `[n, heads, head_dim]` of an embedded text `[n, dim]`."""
        attention = self.attn2
        keys = attention.normalised(attention.to_k(embedded), attention.norm_k, backends)
        return keys, attention.split(attention.to_v(embedded))


class LTXTransformer(DiffusionTransformer):
    """A text-conditional LTX-Video (0.9.x, 2B and 13B)."""

    block_lists = ("transformer_blocks",)
    own_parts = ("attn1", "attn2", "ff")
    block_methods = ("forward", "keys_values")
    one_input = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
    adaptable = (
        r"transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))"
        r"|caption_projection\.linear_[12]|proj_in|proj_out"
    )

    def __init__(
        self,
        config: LTXConfig,
        *,
        backend: str = "auto",
        attention_backend: str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.backends = Backends(backend, attention_backend or backend)
        dim = config.inner_dim
        self.proj_in = nn.Linear(config.in_channels, dim)
        self.scale_shift_table = scale_shift_table(2, dim)
        self.time_embed = LevelEmbedder(dim)
        self.caption_projection = TextProjection(config.caption_channels, dim)
        blocks = nn.ModuleList([LTXBlock(config) for _ in range(config.num_layers)])
        self.transformer_blocks = cast("Sequence[LTXBlock]", blocks)
        self.proj_out = nn.Linear(dim, config.out_channels)

    @property
    def shape(self) -> TransformerShape:
        """Its sizes."""
        return transformer_shape(self.config)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that activations flow in."""
        return self.time_embed.linear.weight.dtype

    def rebuild(self) -> LTXTransformer:
        """Another transformer of the same configuration and backends."""
        return LTXTransformer(
            self.config,
            backend=self.backends.fused,
            attention_backend=self.backends.attention,
        )

    def example_embedding(self, num_tokens: int, device: torch.device) -> Embedding:
        """A text of so many tokens, which `encode_contexts` takes padded."""
        size = (self.config.text_tokens, self.config.caption_channels)
        return {
            "text": torch.zeros(size, dtype=self.dtype, device=device),
            "count": torch.tensor(num_tokens),
        }

    def encode_contexts(self, embeddings: Sequence[Embedding]) -> list[Context]:
        """Keys and values of texts, for every layer: once a request.

        embeddings: each with `"text"` `[text_tokens, caption_channels]`, padding encoded too, and
        `"count"`, int64 `[]`, its own tokens: a text is read without its padding.
        """
        # Where memory is rehearsed, texts have no lengths: then they are as long as they get.
        most = self.config.text_tokens
        counts = [most if e["count"].is_meta else int(e["count"]) for e in embeddings]
        texts = [e["text"][:count] for e, count in zip(embeddings, counts, strict=True)]
        rows = self.caption_projection(torch.cat(texts).to(self.dtype))
        pairs = [block.keys_values(rows, self.backends) for block in self.transformer_blocks]
        keys, values = (torch.stack(each).split(counts, dim=1) for each in zip(*pairs, strict=True))
        return [Context({"text": KeyValues(k, v)}) for k, v in zip(keys, values, strict=True)]

    def forward(self, batch: PackedBatch) -> Tensor:
        """Predictions for all tokens, `[N, out_channels]`."""
        stream = batch.video
        x = steady(self.proj_in, stream.tokens.to(self.dtype))
        rope = rope_tables(stream, self.config)
        level, projection = self.time_embed(batch.timesteps)
        tables = [b.scale_shift_table.float() + projection.float() for b in self.transformer_blocks]
        eps = self.config.norm_eps
        entries = [Modulation(t[:, 1], t[:, 0], "rms", eps) for t in tables]
        shift, scale = (self.scale_shift_table.float() + level.float()[:, None]).unbind(1)
        entries.append(Modulation(scale, shift, "layer", LAST_EPS))
        y = norm_modulate(
            x, entries[0].scale, entries[0].shift, stream.rows,
            kind="rms", eps=eps, backend=self.backends.fused,
        )  # fmt: skip
        x = x.float()  # the residual stream is not rounded at each branch
        for layer, block in enumerate(self.transformer_blocks):
            x, y = block(
                x,
                y,
                stream=stream,
                text=batch.contexts["text"],
                layer=layer,
                table=tables[layer],
                following=entries[layer + 1],
                rope=rope,
                backends=self.backends,
            )
        return steady(self.proj_out, y)


def rope_tables(stream: Stream, config: LTXConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[N, dim / 2]` (float32) of rotary positions over the whole width.

    Positions are fractions of 20 seconds and 2048 pixels, so they depend on the frame rate. Each
    frequency stands once for time, rows and columns; what is left of the width comes first and is
    not turned. Angles are rounded to float32 at each step, as in diffusers: they reach 15,000,
    where a last digit of another order would be an error of 1e-3.
    """
    assert stream.rates is not None
    times = stream.coords[:, 0].float()
    if config.pixel_times:  # the first latent frame holds one frame, the others `time_factor`
        times = (times * config.time_factor + 1 - config.time_factor).clamp(min=0)
        seconds = times * (1.0 / stream.rates.double()).float()
    else:
        seconds = times * (config.time_factor / stream.rates.double()).float()
    places = [seconds, *(stream.coords[:, axis].float() * config.space_factor for axis in (1, 2))]
    fractions = torch.stack(
        [place / reach for place, reach in zip(places, REACH, strict=True)], dim=1
    )
    dim = config.inner_dim
    exponents = torch.linspace(0.0, 1.0, dim // 6, dtype=torch.float32, device=fractions.device)
    frequencies = THETA**exponents * math.pi / 2.0
    angles = frequencies * (fractions[:, :, None] * 2 - 1)
    angles = angles.transpose(1, 2).flatten(1)
    angles = F.pad(angles, (dim % 6 // 2, 0))
    return angles.cos(), angles.sin()


def transformer_shape(config: LTXConfig) -> TransformerShape:
    """The sizes of the transformer that a configuration describes."""
    return TransformerShape(
        num_layers=config.num_layers,
        num_heads=config.num_attention_heads,
        head_dim=config.attention_head_dim,
        ffn_dim=4 * config.inner_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_tokens=config.text_tokens,
    )
