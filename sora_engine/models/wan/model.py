"""Wan's diffusion transformer over packed spacetime patches (arXiv 2503.20314).

With `vace_layers` it is VACE's (arXiv 2503.07598): control blocks run beside the first ones, over
control latents that come as further input channels, and add to the layers that they belong to.
Parameter names are those of diffusers' `WanTransformer3DModel` and `WanVACETransformer3DModel`.
There is no batch dimension: the forward pass takes a `PackedBatch` of segments of any size, length,
text and noise level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_engine.attention import cross_attention, self_attention
from sora_engine.models.linear import block_linears, linear_gelu, steady
from sora_engine.models.wan.config import WanConfig
from sora_engine.packing import Context, ContextRuns, KeyValues, PackedBatch, Stream
from sora_kernels import gate_residual_norm_modulate, norm_modulate, qk_norm_rope

ROPE_THETA = 10_000.0
TEXT_TOKENS = 512
"""Wan pads every text to this many tokens with zeros, after the text encoder, and masks none."""


class Modulation(NamedTuple):
    """Scale and shift of one normalisation, `[rows, channels]` each."""

    scale: Tensor
    shift: Tensor


class Backends(NamedTuple):
    """The backends of one forward pass: of the fused operations, and of attention."""

    fused: str
    attention: str


class WanTransformer(nn.Module):
    """A Wan transformer (2.1, 2.2 A14B expert, 2.2 TI2V-5B).

    Args:
        config: the checkpoint's `transformer/config.json`.
        text_tokens: length to which texts count as padded (512 in every published pipeline).
        backend: `backend` of every `sora_kernels` call; training uses `"reference"`.
        attention_backend: that of `packed_attention`, where it is another one.
    """

    def __init__(
        self,
        config: WanConfig,
        *,
        text_tokens: int = TEXT_TOKENS,
        backend: str = "auto",
        attention_backend: str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.text_tokens = text_tokens
        self.backends = Backends(backend, attention_backend or backend)
        dim = config.inner_dim
        self.patch_embedding = nn.Conv3d(
            config.in_channels, dim, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.condition_embedder = ConditionEmbedder(config)
        blocks = [WanBlock(config) for _ in range(config.num_layers)]
        self.blocks: Sequence[WanBlock] = cast("Sequence[WanBlock]", nn.ModuleList(blocks))
        self.vace_blocks: Sequence[VaceBlock] = ()
        if config.vace_layers is not None:
            assert config.vace_in_channels is not None
            self.vace_patch_embedding = nn.Conv3d(
                config.vace_in_channels, dim, config.patch_size, config.patch_size
            )
            controls = [VaceBlock(config, first=i == 0) for i in range(len(config.vace_layers))]
            self.vace_blocks = cast("Sequence[VaceBlock]", nn.ModuleList(controls))
        self.proj_out = nn.Linear(dim, config.out_channels * math.prod(config.patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def prepare(self) -> WanTransformer:
        """Lay the blocks' weights out for the processor, for good: the model only runs from here.

        They are no parameters any more, and cannot be saved. Returns self.
        """
        for block in (*self.blocks, *self.vace_blocks):
            block_linears(block)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that activations flow in."""
        return self.patch_embedding.weight.dtype

    def encode_contexts(
        self, texts: Sequence[Tensor], images: Sequence[Tensor | None] | None = None
    ) -> list[Context]:
        """Keys and values of texts and image embeddings, for every layer: once a request.

        Layers are the blocks, and behind them VACE's.
        texts: each `[n, text_dim]`, the text encoder's output without padding, n <= `text_tokens`.
        images: each `[257, image_dim]` (`[514, image_dim]`: first and last frame), Wan 2.1 I2V.
        """
        for text in texts:
            if not 0 < len(text) <= self.text_tokens:
                raise ValueError(f"a text has 1 to {self.text_tokens} tokens, got {len(text)}")
        # A zero row rides along: what the model makes of it is its padding token.
        rows = torch.cat([*texts, texts[0].new_zeros(1, self.config.text_dim)]).to(self.dtype)
        keys, values = self._keys_values(self.condition_embedder.text_embedder(rows), "text")
        lengths = [len(text) for text in texts]
        sources: list[dict[str, KeyValues]] = [
            {"text": KeyValues(k, v, self.text_tokens - n, keys[:, -1], values[:, -1])}
            for n, k, v in zip(
                lengths,
                keys[:, :-1].split(lengths, dim=1),
                values[:, :-1].split(lengths, dim=1),
                strict=True,
            )
        ]
        # The branches of a request read one image: its keys are computed once.
        images = images or [None] * len(texts)
        distinct = {id(image): image for image in images if image is not None}
        embedded = {
            key: KeyValues(*self._keys_values(self._embed_image(image), "image"))
            for key, image in distinct.items()
        }
        for source, image in zip(sources, images, strict=True):
            if image is not None:
                source["image"] = embedded[id(image)]
        return [Context(source) for source in sources]

    def _keys_values(self, embedded: Tensor, source: str) -> tuple[Tensor, Tensor]:
        blocks = (*self.blocks, *self.vace_blocks)
        pairs = [block.attn2.keys_values(embedded, source, self.backends) for block in blocks]
        keys, values = zip(*pairs, strict=True)
        return torch.stack(keys), torch.stack(values)

    def _embed_image(self, image: Tensor) -> Tensor:
        embedder = self.condition_embedder.image_embedder
        if embedder is None:
            raise ValueError("this checkpoint takes no image embedding: its image_dim is null")
        return embedder(image.to(self.dtype))

    def forward(self, batch: PackedBatch) -> Tensor:
        """Predictions for all tokens, `[N, patch volume * out_channels]`, channel last.

        The tokens are `[N, in_channels * patch volume]`, as `packing.patchify` makes them; VACE's
        have `vace_in_channels` more, of the control latents, behind those.
        """
        stream = batch.video
        tokens = stream.tokens.to(self.dtype)
        sample_size = self.config.in_channels * math.prod(self.config.patch_size)
        x = _embed(tokens[:, :sample_size], self.patch_embedding)
        rope = rope_tables(stream.coords, self.config)
        level, level_projection = self.condition_embedder.embed_timesteps(
            batch.timesteps, self.dtype
        )
        # [rows, 6, dim] and [rows, 2, dim], kept in fp32 as diffusers keeps them.
        tables = [block.scale_shift_table + level_projection.float() for block in self.blocks]
        shift, scale = (self.scale_shift_table + level.unsqueeze(1).float()).unbind(1)
        entries = [Modulation(table[:, 1], table[:, 0]) for table in tables]
        entries.append(Modulation(scale, shift))

        hints: dict[int, Tensor] = {}
        if self.config.vace_layers is not None:
            control = _embed(tokens[:, sample_size:], self.vace_patch_embedding)
            hints = self._control(x, control, batch, level_projection, rope)
        y = self._normalised(x, entries[0], stream)
        for layer, block in enumerate(self.blocks):
            # Each block ends in the normalisation that the next one begins with: one fused pass.
            x, y = block(
                x,
                y,
                stream=stream,
                contexts=batch.contexts,
                layer=layer,
                table=tables[layer],
                following=entries[layer + 1],
                rope=rope,
                backends=self.backends,
            )
            if layer in hints:
                x = x + hints.pop(layer)
                y = self._normalised(x, entries[layer + 1], stream)
        return steady(self.proj_out, y)

    def _control(
        self,
        x: Tensor,
        control: Tensor,
        batch: PackedBatch,
        level_projection: Tensor,
        rope: tuple[Tensor, Tensor],
    ) -> dict[int, Tensor]:
        """What VACE's blocks add to the layers of the model, `[N, dim]` each.

        x: embedded sample, control: embedded control latents, `[N, dim]`.
        """
        assert self.config.vace_layers is not None
        stream = batch.video
        tables = [block.scale_shift_table + level_projection.float() for block in self.vace_blocks]
        entries = [Modulation(table[:, 1], table[:, 0]) for table in tables]
        control = self.vace_blocks[0].proj_in(control) + x
        y = self._normalised(control, entries[0], stream)
        hints = {}
        for i, (layer, block) in enumerate(
            zip(self.config.vace_layers, self.vace_blocks, strict=True)
        ):
            control, y = block(
                control,
                y,
                stream=stream,
                contexts=batch.contexts,
                layer=self.config.num_layers + i,
                table=tables[i],
                following=entries[min(i + 1, len(entries) - 1)],
                rope=rope,
                backends=self.backends,
            )
            hints[layer] = steady(block.proj_out, control)
        return hints

    def _normalised(self, x: Tensor, modulation: Modulation, stream: Stream) -> Tensor:
        return norm_modulate(
            x,
            *modulation,
            stream.rows,
            kind="layer",
            eps=self.config.eps,
            backend=self.backends.fused,
        )


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
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

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
        """Residual stream x and normalised input y, both `[N, dim]`, to those of the next block."""
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
            y = x
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
        q, k = qk_norm_rope(
            self._heads(self.to_q(y)),
            self._heads(self.to_k(y)),
            self.norm_q.weight,
            self.norm_k.weight,
            *rope,
            across_heads=True,
            eps=self.eps,
            backend=backends.fused,
        )
        assert k is not None
        out = self_attention(q, k, self._heads(self.to_v(y)), stream, backend=backends.attention)
        return self.to_out[0](out.flatten(1))

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
        return self.to_out[0](out.flatten(1))

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
        return x.unflatten(-1, (self.heads, -1))


class ConditionEmbedder(nn.Module):
    """Embeddings of noise level, text and image."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.inner_dim
        self.freq_dim = config.freq_dim
        self.time_embedder = TwoLinears(config.freq_dim, dim, "silu")
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = TwoLinears(config.text_dim, dim, "tanh")
        self.image_embedder = None
        if config.image_dim is not None:
            self.image_embedder = ImageEmbedder(config.image_dim, dim, config.pos_embed_seq_len)

    def embed_timesteps(self, timesteps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Timesteps `[rows]` -> embedding `[rows, dim]` and its projection `[rows, 6, dim]`."""
        half = self.freq_dim // 2
        steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        frequencies = torch.exp(-math.log(10_000.0) * steps / half)
        angles = timesteps.float()[:, None] * frequencies
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1)
        embedding = self.time_embedder(sinusoid.to(self.time_embedder.dtype)).to(dtype)
        return embedding, steady(self.time_proj, F.silu(embedding)).unflatten(-1, (6, -1))


class TwoLinears(nn.Module):
    """Linear, activation, linear, under the names that diffusers gives them."""

    def __init__(self, in_dim: int, dim: int, activation: str) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)
        self.activation = activation

    @property
    def dtype(self) -> torch.dtype:
        return self.linear_1.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        hidden = steady(self.linear_1, x)
        if self.activation == "silu":
            return steady(self.linear_2, F.silu(hidden))
        return steady(self.linear_2, F.gelu(hidden, approximate=self.activation))


class ImageEmbedder(nn.Module):
    """CLIP tokens of the first frame (and of the last, behind it) to the model's width."""

    def __init__(self, image_dim: int, dim: int, positions: int | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(image_dim)
        self.ff = FeedForward(image_dim, image_dim, "none", out_dim=dim)
        self.norm2 = nn.LayerNorm(dim)
        self.pos_embed = None
        if positions is not None:
            self.pos_embed = nn.Parameter(torch.zeros(1, positions, image_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.pos_embed is not None:
            if len(tokens) != self.pos_embed.shape[1]:
                raise ValueError(
                    f"this checkpoint takes {self.pos_embed.shape[1]} image tokens "
                    f"(first and last frame), got {len(tokens)}"
                )
            tokens = tokens + self.pos_embed[0]
        return _norm_in_fp32(self.norm2, self.ff(_norm_in_fp32(self.norm1, tokens)))


class FeedForward(nn.Module):
    """Linear, GELU, linear; `net.0.proj` and `net.2` as diffusers names them."""

    def __init__(self, dim: int, hidden: int, approximate: str, out_dim: int | None = None) -> None:
        super().__init__()
        self.approximate = approximate
        # The middle entry holds the place of a dropout, so that the names are diffusers'.
        up = nn.ModuleDict({"proj": nn.Linear(dim, hidden)})
        self.net = nn.ModuleList([up, nn.Identity(), nn.Linear(hidden, out_dim or dim)])

    def forward(self, x: Tensor) -> Tensor:
        up = cast("nn.ModuleDict", self.net[0])["proj"]
        return self.net[2](linear_gelu(up, x, self.approximate))


def rope_tables(coords: Tensor, config: WanConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[N, head_dim / 2]` (float32) of 3-D rotary embedding at `coords [N, 3]`.

    The pairs of a head are shared out to time, height and width: of 128 channels 44, 42 and 42.
    """
    head_dim = config.attention_head_dim
    side = 2 * (head_dim // 6)
    angles = []
    for axis, dim in enumerate((head_dim - 2 * side, side, side)):
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=coords.device) / dim
        frequencies = ROPE_THETA**-exponents
        angles.append(coords[:, axis, None].to(torch.float64) * frequencies)
    angle = torch.cat(angles, dim=1)
    return angle.cos().float(), angle.sin().float()


def _embed(tokens: Tensor, patch: nn.Conv3d) -> Tensor:
    """Patches `[N, channels * patch volume]` through a convolution of their own size."""
    weight = patch.weight.flatten(1)
    return steady(lambda x: F.linear(x, weight, patch.bias), tokens)


def _norm_in_fp32(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    weight, bias = norm.weight.float(), norm.bias.float()
    return F.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps).to(x.dtype)
