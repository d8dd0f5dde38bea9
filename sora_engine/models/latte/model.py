"""Latte over packed patches (arXiv 2401.03048): each layer attends within frames and to the text,
then along time.

Parameter names are those of diffusers' `LatteTransformer3DModel`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_engine.denoise.conditioning import NEGATIVE, Context, Embedding, KeyValues
from sora_engine.denoise.model import TransformerShape
from sora_engine.denoise.packing import ContextRuns, PackedBatch, Stream
from sora_engine.errors import LayoutError, RequestError
from sora_engine.models.attention import cross_attention
from sora_engine.models.backends import Backends
from sora_engine.models.latte.config import LatteConfig
from sora_engine.models.layers import (
    Attention,
    FeedForward,
    TimestepEmbedder,
    picture_positions,
    scale_shift_table,
    sincos,
    timestep_sinusoids,
)
from sora_engine.models.linear import embed_patches, steady
from sora_engine.models.transformer import DiffusionTransformer
from sora_kernels import (
    gate_residual_norm_modulate,
    norm_modulate,
    spatial_attention,
    temporal_attention,
)
from sora_kernels.transfer import to_device

TEXT_TOKENS = 120
"""Where its pipeline cuts a text."""
FREQUENCIES = 256
LAST_EPS = 1e-6
"""Of the norm before the output."""


class Modulation(NamedTuple):
    """Scale and shift of one normalisation, `[rows, channels]` each, and its eps."""

    scale: Tensor
    shift: Tensor
    eps: float


class LatteBlock(nn.Module):
    """Attention within frames or along time, attention to a text in those within frames, and
    feed-forward; the first and the last behind a modulated LayerNorm and a gate."""

    def __init__(self, config: LatteConfig, *, temporal: bool) -> None:
        super().__init__()
        dim, heads, bias = config.inner_dim, config.num_attention_heads, config.attention_bias
        self.eps, self.temporal = config.norm_eps, temporal
        self.scale_shift_table = scale_shift_table(6, dim)
        self.attn1 = Attention(dim, heads, bias=bias)
        self.attn2 = None if temporal else Attention(dim, heads, bias=bias)
        self.ff = FeedForward(dim, 4 * dim, config.activation_fn)

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
    ) -> tuple[Tensor, Tensor]:
        """Residual stream x (float32) and normalised input y, both `[N, dim]`, to those of the next
        block."""
        _, _, gate, ff_shift, ff_scale, ff_gate = table.unbind(1)
        q, k, v = self.attn1.of_itself(y)
        if self.temporal:
            attended = temporal_attention(q, k, v, stream.grids)
        else:
            attended = spatial_attention(q, k, v, stream.grids, backend=backends.attention)
        scale, shift = ff_scale, ff_shift
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
    """What all blocks know of the noise level: adaLN-single (arXiv 2310.00426)."""

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


class LatteTransformer(DiffusionTransformer):
    """A text-conditional Latte."""

    block_lists = ("transformer_blocks", "temporal_transformer_blocks")
    own_parts = ("attn1", "attn2", "ff")
    block_methods = ("forward", "keys_values")
    one_input = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
    adaptable = (
        r"(temporal_)?transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)"
        r"|ff\.net\.(0\.proj|2))|caption_projection\.linear_[12]|proj_out"
    )

    def __init__(
        self, config: LatteConfig, *, backend: str = "auto", attention_backend: str | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.backends = Backends(backend, attention_backend or backend)
        dim, patch = config.inner_dim, (1, config.patch_size, config.patch_size)
        self.pos_embed = nn.ModuleDict({"proj": nn.Conv3d(config.in_channels, dim, patch, patch)})
        spatial, temporal = (
            nn.ModuleList([LatteBlock(config, temporal=kind) for _ in range(config.num_layers)])
            for kind in (False, True)
        )
        self.transformer_blocks = cast("Sequence[LatteBlock]", spatial)
        self.temporal_transformer_blocks = cast("Sequence[LatteBlock]", temporal)
        self.scale_shift_table = scale_shift_table(2, dim)
        self.proj_out = nn.Linear(dim, config.patch_size**2 * config.out_channels)
        self.adaln_single = LevelEmbedder(dim)
        self.caption_projection = TextProjection(config.caption_channels, dim)

    @property
    def shape(self) -> TransformerShape:
        """Its sizes."""
        return transformer_shape(self.config)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that activations flow in."""
        return cast("nn.Conv3d", self.pos_embed["proj"]).weight.dtype

    @property
    def blocks_in_order(self) -> list[nn.Module]:
        """Those within frames and those along time, in turn."""
        pairs = zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True)
        return [block for pair in pairs for block in pair]

    def rebuild(self) -> LatteTransformer:
        """Another transformer of the same configuration and backends."""
        return LatteTransformer(
            self.config, backend=self.backends.fused, attention_backend=self.backends.attention
        )

    def example_embedding(self, num_tokens: int, device: torch.device) -> Embedding:
        """A text of so many tokens, which `encode_contexts` takes padded."""
        size = (TEXT_TOKENS, self.config.caption_channels)
        return {
            "text": torch.zeros(size, dtype=self.dtype, device=device),
            "count": torch.tensor(num_tokens),
        }

    def encode_contexts(self, embeddings: Sequence[Embedding]) -> list[Context]:
        """Keys and values of texts, for every layer: once a request.

        embeddings: each with `"text"` `[TEXT_TOKENS, caption_channels]`, padding encoded too, and
        `"count"`, int64 `[]`, its own tokens. A text is read without its padding. The one of the
        unconditional branch is read as far as the first one is, as diffusers' pipeline has it.
        """
        # Where memory is rehearsed, texts have no lengths: then they are as long as they get.
        own = [TEXT_TOKENS if e["count"].is_meta else int(e["count"]) for e in embeddings]
        counts = [own[0] if NEGATIVE in e else n for e, n in zip(embeddings, own, strict=True)]
        texts = [e["text"][:count] for e, count in zip(embeddings, counts, strict=True)]
        rows = self.caption_projection(torch.cat(texts).to(self.dtype))
        pairs = [block.keys_values(rows) for block in self.transformer_blocks]
        keys, values = (torch.stack(each).split(counts, dim=1) for each in zip(*pairs, strict=True))
        return [Context({"text": KeyValues(k, v)}) for k, v in zip(keys, values, strict=True)]

    def forward(self, batch: PackedBatch) -> Tensor:
        """Predictions for all tokens, `[N, patch_size^2 * out_channels]`, channel last."""
        stream = batch.video
        _check(stream)
        assert stream.extents is not None
        config = self.config
        patch = cast("nn.Conv3d", self.pos_embed["proj"])
        x = embed_patches(stream.tokens.to(self.dtype), patch)
        base = config.sample_size // config.patch_size
        places = picture_positions(
            stream.coords, stream.extents, x.shape[1], base, config.interpolation_scale
        )
        x = (x + places.to(x.dtype)).float()  # the residual stream is not rounded at each branch
        del places
        level, projection = self.adaln_single(batch.timesteps)
        blocks = cast("Sequence[LatteBlock]", self.blocks_in_order)
        tables = [block.scale_shift_table.float() + projection.float() for block in blocks]
        entries = [Modulation(t[:, 1], t[:, 0], config.norm_eps) for t in tables]
        shift, scale = (self.scale_shift_table.float() + level.float()[:, None]).unbind(1)
        entries.append(Modulation(scale, shift, LAST_EPS))
        y = self._normalised(x, entries[0], stream)
        for i, block in enumerate(blocks):
            x, y = block(
                x,
                y,
                stream=stream,
                text=batch.contexts["text"],
                layer=i // 2,
                table=tables[i],
                following=entries[i + 1],
                backends=self.backends,
            )
            if i == 0:  # time has its positions once, before the first attention along it
                x = x + _times(stream, x.shape[1]).to(self.dtype)
                y = self._normalised(x, entries[1], stream)
        return steady(self.proj_out, y)

    def _normalised(self, x: Tensor, modulation: Modulation, stream: Stream) -> Tensor:
        """In the dtype of the layers that read it."""
        scale, shift, eps = modulation
        return norm_modulate(
            x, scale, shift, stream.rows, kind="layer", eps=eps, backend=self.backends.fused
        ).to(self.dtype)


def _check(stream: Stream) -> None:
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
    return TransformerShape(
        num_layers=2 * config.num_layers,
        num_heads=config.num_attention_heads,
        head_dim=config.attention_head_dim,
        ffn_dim=4 * config.inner_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_tokens=TEXT_TOKENS,
    )
