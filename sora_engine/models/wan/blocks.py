"""The blocks of Wan's transformer, over packed tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

from torch import Tensor, nn

from sora_engine.denoise.packing import ContextRuns, Stream
from sora_engine.models.attention import cross_attention, self_attention
from sora_engine.models.backends import Backends
from sora_engine.models.cuda_linear import JoinedLinears
from sora_engine.models.layers import scale_shift_table
from sora_engine.models.linear import linear_gelu
from sora_engine.models.wan.config import WanConfig
from sora_kernels import gate_residual_norm_modulate, qk_norm_rope


class Modulation(NamedTuple):
    """Scale and shift of one normalisation, `[rows, channels]` each."""

    scale: Tensor
    shift: Tensor


class WanBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each behind a modulated LayerNorm."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.inner_dim
        self.eps = config.eps
        self.attn1 = WanAttention(config)
        self.attn2 = WanAttention(config, added_kv=config.added_kv_proj_dim is not None)
        self.norm2 = nn.LayerNorm(dim, config.eps) if config.cross_attn_norm else None
        self.ffn = FeedForward(dim, config.ffn_dim, "tanh")
        self.scale_shift_table = scale_shift_table(1, 6, dim)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        *,
        stream: Stream,
        contexts: Mapping[str, ContextRuns],
        layer: int,
        table: Tensor,
        following: Modulation,
        rope: tuple[Tensor, Tensor],
        backends: Backends,
    ) -> tuple[Tensor, Tensor]:
        """Residual stream x (float32) and normalised input y, both `[N, dim]`, to those of the next
        block."""
        _, _, gate, ffn_shift, ffn_scale, ffn_gate = table.unbind(1)
        rows = stream.rows

        attended = self.attn1.to_itself(y, stream, rope, backends)
        x, y = gate_residual_norm_modulate(
            attended,
            x,
            gate,
            None,
            None,
            rows,
            kind="layer",
            weight=None if self.norm2 is None else self.norm2.weight,
            bias=None if self.norm2 is None else self.norm2.bias,
            eps=self.eps,
            backend=backends.fused,
        )
        if self.norm2 is None:
            y = x.to(y.dtype)
        attended = self.attn2.to_contexts(y, contexts, layer, backends)
        x, y = gate_residual_norm_modulate(
            attended,
            x,
            None,
            ffn_scale,
            ffn_shift,
            rows,
            kind="layer",
            eps=self.eps,
            backend=backends.fused,
        )
        return gate_residual_norm_modulate(
            self.ffn(y),
            x,
            ffn_gate,
            following.scale,
            following.shift,
            rows,
            kind="layer",
            eps=self.eps,
            backend=backends.fused,
        )

    def keys_values(
        self, embedded: Tensor, source: str, backends: Backends
    ) -> tuple[Tensor, Tensor]:
        """The cross-attention's keys and values `[n, heads, head_dim]` of embedded `[n, dim]`."""
        return self.attn2.keys_values(embedded, source, backends)


class VaceBlock(WanBlock):
    """A block over control tokens, with a projection of what it adds to the model.

    first: control tokens meet the sample's behind a projection of their own.
    """

    def __init__(self, config: WanConfig, *, first: bool) -> None:
        super().__init__(config)
        dim = config.inner_dim
        if first:
            self.proj_in = nn.Linear(dim, dim)
        self.proj_out = nn.Linear(dim, dim)


class WanAttention(nn.Module):
    """Projections and RMS norms of one attention; the norms run across all heads."""

    joined: JoinedLinears | None = None
    """to_q, to_k and to_v as one product, where they read one input."""

    def __init__(self, config: WanConfig, *, added_kv: bool = False) -> None:
        super().__init__()
        dim = config.inner_dim
        self.heads = config.num_attention_heads
        self.eps = config.eps
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = nn.RMSNorm(dim, config.eps)
        self.norm_k = nn.RMSNorm(dim, config.eps)
        if added_kv:
            self.add_k_proj = nn.Linear(dim, dim)
            self.add_v_proj = nn.Linear(dim, dim)
            self.norm_added_k = nn.RMSNorm(dim, config.eps)

    def to_itself(
        self, y: Tensor, stream: Stream, rope: tuple[Tensor, Tensor], backends: Backends
    ) -> Tensor:
        q, k, v = map(self._heads, self._projections(y))
        turned = qk_norm_rope(
            q,
            k,
            self.norm_q.weight,
            self.norm_k.weight,
            *rope,
            across_heads=True,
            eps=self.eps,
            backend=backends.fused,
        )
        q, k = cast("tuple[Tensor, Tensor]", turned)  # the projections are let go of
        out = self_attention(q, k, v, stream, backend=backends.attention)
        (project,) = self.to_out
        return project(out.flatten(1))

    def _projections(self, y: Tensor) -> tuple[Tensor, ...]:
        layers = self.to_q, self.to_k, self.to_v
        if self.joined is not None and self.joined.serves(layers, y):
            return self.joined(y)
        return tuple(layer(y) for layer in layers)

    def to_contexts(
        self,
        y: Tensor,
        contexts: Mapping[str, ContextRuns],
        layer: int,
        backends: Backends,
    ) -> Tensor:
        q = self._normalised(self.to_q(y), self.norm_q.weight, backends)
        out = cross_attention(q, contexts["text"], layer, backend=backends.attention)
        if "image" in contexts:
            out = out + cross_attention(q, contexts["image"], layer, backend=backends.attention)
        (project,) = self.to_out
        return project(out.flatten(1))

    def keys_values(
        self, embedded: Tensor, source: str, backends: Backends
    ) -> tuple[Tensor, Tensor]:
        """Keys and values `[n, heads, head_dim]` of embedded tokens `[n, dim]`.

        Image tokens (Wan 2.1 I2V) have projections of their own beside the text's.
        """
        if source == "image":
            k, v, norm = self.add_k_proj, self.add_v_proj, self.norm_added_k
        else:
            k, v, norm = self.to_k, self.to_v, self.norm_k
        return self._normalised(k(embedded), norm.weight, backends), self._heads(v(embedded))

    def _normalised(self, projected: Tensor, weight: Tensor, backends: Backends) -> Tensor:
        normalised, _ = qk_norm_rope(
            self._heads(projected),
            None,
            weight,
            None,
            None,
            None,
            across_heads=True,
            eps=self.eps,
            backend=backends.fused,
        )
        return normalised

    def _heads(self, x: Tensor) -> Tensor:
        # (`unflatten` is Python within torch: four calls a block are 5% of what the host does.)
        return x.view(x.shape[0], self.heads, x.shape[1] // self.heads)


class FeedForward(nn.Module):
    """Linear, GELU, linear; `net.0.proj` and `net.2` as diffusers names them."""

    def __init__(self, dim: int, hidden: int, approximate: str, out_dim: int | None = None) -> None:
        super().__init__()
        self.approximate = approximate
        # The middle entry holds the place of a dropout, so that the names are diffusers'.
        up = nn.ModuleDict({"proj": nn.Linear(dim, hidden)})
        self.net = nn.ModuleList([up, nn.Identity(), nn.Linear(hidden, out_dim or dim)])

    def forward(self, x: Tensor) -> Tensor:
        first, _, down = self.net
        up = cast("nn.ModuleDict", first)["proj"]
        return down(linear_gelu(up, x, self.approximate))
