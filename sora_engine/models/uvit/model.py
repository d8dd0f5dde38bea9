"""U-ViT over packed patches (arXiv 2209.12152): the noise level, a class or a text, and the patches
are tokens of one sequence, and blocks of the second half also read what the first half made.

Layers have diffusers' names within a block, and the authors' around it.
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
from sora_engine.errors import LayoutError, RequestError
from sora_engine.models.attention import self_attention
from sora_engine.models.backends import Backends
from sora_engine.models.layers import Attention, FeedForward, timestep_sinusoids
from sora_engine.models.linear import embed_patches, steady
from sora_engine.models.transformer import DiffusionTransformer
from sora_engine.models.uvit.config import UViTConfig
from sora_kernels import gate_residual_norm_modulate, norm_modulate

EPS = 1e-5
CONTEXT = "context"


class UViTBlock(nn.Module):
    """Self-attention and feed-forward, each behind a LayerNorm; before them, in the second half, a
    linear layer that joins a block of the first half."""

    def __init__(self, config: UViTConfig, *, skips: bool) -> None:
        super().__init__()
        dim = config.embed_dim
        self.skip_linear = nn.Linear(2 * dim, dim) if skips else None
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(dim, eps=EPS)
        self.attn1 = Attention(dim, config.num_heads, bias=False)
        self.ff = FeedForward(dim, 4 * dim, "gelu")

    def forward(
        self, x: Tensor, skipped: Tensor | None, *, stream: Stream, dtype: torch.dtype, on: Backends
    ) -> Tensor:
        """The residual stream `[N, dim]` (float32) to that of the next block. skipped: as another
        block left it."""
        if self.skip_linear is not None:
            assert skipped is not None
            x = self.skip_linear(torch.cat([x, skipped], dim=1).to(dtype)).float()
        norm = self.norm1
        y = norm_modulate(
            x, None, None, None, kind="layer", weight=norm.weight, bias=norm.bias, eps=EPS,
            backend=on.fused,
        ).to(dtype)  # fmt: skip
        q, k, v = self.attn1.of_itself(y)
        attended = self.attn1.out(self_attention(q, k, v, stream, backend=on.attention))
        norm = self.norm2
        x, y = gate_residual_norm_modulate(
            attended, x, None, None, None, None, kind="layer", weight=norm.weight, bias=norm.bias,
            eps=EPS, backend=on.fused,
        )  # fmt: skip
        return x + self.ff(y)


class UViT(DiffusionTransformer):
    """A U-ViT of classes or of texts."""

    block_lists = ("in_blocks", "mid_blocks", "out_blocks")
    own_parts = ("attn1", "ff", "skip_linear")
    one_input = ("attn1.to_q", "attn1.to_k", "attn1.to_v")

    def __init__(
        self, config: UViTConfig, *, backend: str = "auto", attention_backend: str | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.backends = Backends(backend, attention_backend or backend)
        dim, patch = config.embed_dim, (1, config.patch_size, config.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(config.in_chans, dim, patch, patch)})
        tokens = 1 + config.num_context + config.side**2
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, dim).normal_(std=0.02))
        if config.reads_classes:
            self.label_emb = nn.Embedding(config.num_classes, dim)
        else:
            self.context_embed = nn.Linear(config.clip_dim, dim)
        half = range(config.depth // 2)
        blocks = [nn.ModuleList([UViTBlock(config, skips=s) for _ in half]) for s in (False, True)]
        self.in_blocks = cast("Sequence[UViTBlock]", blocks[0])
        middle = nn.ModuleList([UViTBlock(config, skips=False)])
        self.mid_blocks = cast("Sequence[UViTBlock]", middle)
        self.out_blocks = cast("Sequence[UViTBlock]", blocks[1])
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.decoder_pred = nn.Linear(dim, config.patch_size**2 * config.in_chans)
        channels = config.in_chans
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1) if config.conv else None

    @property
    def shape(self) -> TransformerShape:
        """Its sizes."""
        return transformer_shape(self.config)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that activations flow in."""
        return self.decoder_pred.weight.dtype

    def rebuild(self) -> UViT:
        """Another transformer of the same configuration and backends."""
        return UViT(
            self.config, backend=self.backends.fused, attention_backend=self.backends.attention
        )

    def example_embedding(self, num_tokens: int, device: torch.device) -> Embedding:
        """A class, or a text at its one length."""
        if self.config.reads_classes:
            return {"label": torch.zeros((), dtype=torch.int64, device=device)}
        size = (self.config.num_clip_token, self.config.clip_dim)
        return {"text": torch.zeros(size, dtype=self.dtype, device=device)}

    def encode_contexts(self, embeddings: Sequence[Embedding]) -> list[Context]:
        """The tokens that stand before the patches.

        embeddings: each with `"label"`, int64 `[]`, where a negative one is none; or with `"text"`
        `[num_clip_token, clip_dim]`.
        """
        if self.config.reads_classes:
            none = self.config.num_classes - 1
            labels = [torch.where(e["label"] < 0, none, e["label"]) for e in embeddings]
            return [Context(tokens={CONTEXT: self.label_emb(label)[None]}) for label in labels]
        texts = [steady(self.context_embed, e["text"].to(self.dtype)) for e in embeddings]
        return [Context(tokens={CONTEXT: text}) for text in texts]

    def forward(self, batch: PackedBatch) -> Tensor:
        """Predictions for all tokens, `[N, patch_size^2 * in_chans]`, channel last."""
        stream, config = batch.video, self.config
        self._check(stream)
        count, dim = len(stream.grids), config.embed_dim
        x = embed_patches(stream.tokens.to(self.dtype), cast("nn.Conv3d", self.patch_embed["proj"]))
        context = batch.streams[CONTEXT]
        level = timestep_sinusoids(batch.timesteps, dim, ends_at_lowest=False).to(self.dtype)
        words = context.tokens.view(count, -1, dim)
        rows = context.rows
        if rows is None:
            times = level[:1].expand(count, 1, dim)
        else:
            times = level[rows.view(count, -1)[:, :1]]
        joined = torch.cat([times, words, x.view(count, -1, dim)], dim=1)
        x = (joined + self.pos_embed).flatten(0, 1).float()
        del joined, words, times
        length = len(x) // count
        offsets = torch.arange(count + 1, dtype=torch.int32, device=x.device) * length
        whole = Stream(
            tokens=x,
            rows=None,
            coords=stream.coords,
            cu_seqlens=offsets,
            max_seqlen=length,
            grids=((1, 1, length),) * count,
        )
        left: list[Tensor] = []
        blocks = cast("Sequence[UViTBlock]", self.blocks_in_order)
        for i, block in enumerate(blocks):
            skipped = left.pop() if i > config.depth // 2 else None
            x = block(x, skipped, stream=whole, dtype=self.dtype, on=self.backends)
            del skipped
            if i < config.depth // 2:
                left.append(x)
        x = x.view(count, length, dim)[:, 1 + config.num_context :].flatten(0, 1)
        norm = self.norm
        y = norm_modulate(
            x.contiguous(), None, None, None, kind="layer", weight=norm.weight, bias=norm.bias,
            eps=EPS, backend=self.backends.fused,
        ).to(self.dtype)  # fmt: skip
        return self._smoothed(steady(self.decoder_pred, y), count)

    def _smoothed(self, predictions: Tensor, count: int) -> Tensor:
        """Through the convolution over whole pictures, where there is one."""
        if self.final_layer is None:
            return predictions
        side, patch, channels = self.config.side, self.config.patch_size, self.config.in_chans
        x = predictions.view(count, side, side, patch, patch, channels)
        pictures = x.permute(0, 5, 1, 3, 2, 4).reshape(count, channels, side * patch, -1)
        weight, bias = self.final_layer.weight, self.final_layer.bias
        made = torch.cat([F.conv2d(one, weight, bias, padding=1) for one in pictures.split(1)])
        x = made.view(count, channels, side, patch, side, patch).permute(0, 2, 4, 3, 5, 1)
        return x.reshape(len(predictions), -1)

    def _check(self, stream: Stream) -> None:
        """That whole pictures of its one size are here: LayoutError and RequestError."""
        if stream.attend is not None:
            raise LayoutError(
                "attention over time, text and patches is not shared out over ulysses or ring "
                "ranks; guidance or data would work"
            )
        side = self.config.side
        for _, rows, columns in stream.grids:
            if (rows, columns) != (side, side):
                raise RequestError(
                    f"a picture of {rows} x {columns} patches: positions are learned for "
                    f"{side} x {side}, and no other size is made"
                )


def transformer_shape(config: UViTConfig) -> TransformerShape:
    """The sizes of the transformer that a configuration describes."""
    return TransformerShape(
        num_layers=config.depth + 1,
        num_heads=config.num_heads,
        head_dim=config.embed_dim // config.num_heads,
        ffn_dim=4 * config.embed_dim,
        in_channels=config.in_chans,
        out_channels=config.in_chans,
    )
