"""The layers of T5's and UMT5's encoders, under the names that transformers gives their weights.

T5: Raffel et al., https://arxiv.org/abs/1910.10683, with the gated feed-forward of
https://arxiv.org/abs/2002.05202. UMT5: Chung et al., https://arxiv.org/abs/2304.09151; each of its
layers has relative positions of its own, where T5's share those of the first.

They are the engine's own because importing transformers' takes 2 seconds of a cold start, more than
all that follows it for a small model; `tests/parity/test_text.py` holds the two together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class T5Shape:
    """What a `config.json` says of an encoder, by its keys.

    feed_forward_proj: `gated-gelu` or `relu`. bias_in_each_layer: whether it is a UMT5.
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    layer_norm_epsilon: float
    feed_forward_proj: str
    bias_in_each_layer: bool


class T5Layers(nn.Module):
    """An encoder: ids to what its last layer gives of each.

    Built on the meta device it takes no memory before weights are put in place.
    """

    def __init__(self, config: T5Shape) -> None:
        super().__init__()
        self.config = config
        self.shared = _table(config.vocab_size, config.d_model)
        self.encoder = _Stack(config, self.shared)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; with float16, products that leave its range stay in float32."""
        return self.shared.weight.dtype

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of tokens."""
        return self.shared

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Embeddings `[texts, tokens, d_model]` of ids `[texts, tokens]`.

        attention_mask: where it is 0, `[texts, tokens]`, no other token sees one.
        """
        embeddings: Tensor = self.encoder(self.shared(input_ids), attention_mask)
        return embeddings


def _table(rows: int, width: int) -> nn.Embedding:
    """Without the random values that nn.Embedding begins with: on the meta device those have torch
    import its compiler, for a second and more."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class _Stack(nn.Module):
    def __init__(self, config: T5Shape, table: nn.Embedding) -> None:
        super().__init__()
        self.embed_tokens = table
        self.block = nn.ModuleList(_Block(config, i) for i in range(config.num_layers))
        self.final_layer_norm = _RMSNorm(config)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        bias: Tensor | None = None
        for block in self.block:
            x, bias = block(x, mask, bias)
        normed: Tensor = self.final_layer_norm(x)
        return normed


class _Block(nn.Module):
    def __init__(self, config: T5Shape, index: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList([_AttentionLayer(config, index), _ForwardLayer(config)])

    def forward(self, x: Tensor, mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        x, bias = self.layer[0](x, mask, bias)
        x = _within_range(self.layer[1](_within_range(x)))
        return x, bias


class _AttentionLayer(nn.Module):
    def __init__(self, config: T5Shape, index: int) -> None:
        super().__init__()
        self.SelfAttention = _Attention(config, index)
        self.layer_norm = _RMSNorm(config)

    def forward(self, x: Tensor, mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        change, bias = self.SelfAttention(self.layer_norm(x), mask, bias)
        return x + change, bias


class _Attention(nn.Module):
    def __init__(self, config: T5Shape, index: int) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        self.heads = config.num_heads
        self.farthest = config.relative_attention_max_distance
        self.relative_attention_bias = (
            _table(config.relative_attention_num_buckets, config.num_heads)
            if config.bias_in_each_layer or index == 0
            else None
        )

    def forward(self, x: Tensor, mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.relative_attention_bias is not None:
            bias = self._bias(self.relative_attention_bias, x.shape[1], mask)
        assert bias is not None, "the first layer has one"
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self._qkv)
        # T5's weights are scaled as they are trained, so scores are not.
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(mixed.transpose(1, 2).flatten(-2)), bias

    @property
    def _qkv(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.q, self.k, self.v

    def _bias(self, table: nn.Embedding, tokens: int, mask: Tensor | None) -> Tensor:
        """What is added to scores, `[1 or texts, heads, tokens, tokens]`."""
        place = torch.arange(tokens, device=table.weight.device)
        buckets = distance_bucket(
            place[None, :] - place[:, None], table.num_embeddings, self.farthest
        )
        bias = table(buckets).permute(2, 0, 1)[None]
        if mask is not None:
            bias = bias.masked_fill(mask[:, None, None, :] == 0, -math.inf)
        return bias.contiguous()


def distance_bucket(distance: Tensor, buckets: int, farthest: int) -> Tensor:
    """T5's bucket of a signed distance in tokens, int64: half of them for tokens behind, and of
    each half the first half for one distance each, the rest ever wider up to `farthest`."""
    half = buckets // 2
    single = half // 2
    away = distance.abs()
    # In float32 and in this order: a distance on the edge of a bucket falls as it was trained.
    wide = torch.log(away.float() / single) / math.log(farthest / single) * (half - single)
    wide = (single + wide.clamp(min=0).long()).clamp(max=half - 1)
    return torch.where(away < single, away, wide) + (distance > 0) * half


class _ForwardLayer(nn.Module):
    def __init__(self, config: T5Shape) -> None:
        super().__init__()
        self.DenseReluDense = (
            _Gated(config) if config.feed_forward_proj == "gated-gelu" else _Plain(config)
        )
        self.layer_norm = _RMSNorm(config)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.DenseReluDense(self.layer_norm(x))
        return x + change


class _Gated(nn.Module):
    def __init__(self, config: T5Shape) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)
        out: Tensor = self.wo(hidden.to(self.wo.weight.dtype))
        return out


class _Plain(nn.Module):
    def __init__(self, config: T5Shape) -> None:
        super().__init__()
        self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.wo(F.relu(self.wi(x)).to(self.wo.weight.dtype))
        return out


class _RMSNorm(nn.Module):
    """Without a mean and a bias (https://arxiv.org/abs/1910.07467), in float32."""

    def __init__(self, config: T5Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.epsilon = config.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        square = x.float().square().mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(square + self.epsilon)).to(self.weight.dtype)


def _within_range(x: Tensor) -> Tensor:
    """float16 as transformers holds it off infinity: by 1000, which is more than a rounding."""
    if x.dtype != torch.float16:
        return x
    most = torch.finfo(x.dtype).max - 1000
    return x.clamp(-most, most)
