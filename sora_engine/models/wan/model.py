"""Wan's diffusion transformer over packed spacetime patches (arXiv 2503.20314).

With `vace_layers` it is VACE's (arXiv 2503.07598): control blocks run beside the first ones, over
control latents that come as further input channels, and add to the layers that they belong to.
Parameter names are those of diffusers' `WanTransformer3DModel` and `WanVACETransformer3DModel`.
There is no batch dimension: the forward pass takes a `PackedBatch` of segments of any size, length,
text and noise level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from sora_engine.denoise.conditioning import Context, Embedding, KeyValues
from sora_engine.denoise.model import TransformerShape
from sora_engine.denoise.packing import PackedBatch, Stream
from sora_engine.models.backends import Backends
from sora_engine.models.layers import scale_shift_table
from sora_engine.models.linear import embed_patches, steady
from sora_engine.models.transformer import DiffusionTransformer
from sora_engine.models.wan.blocks import Modulation, VaceBlock, WanBlock
from sora_engine.models.wan.camera import CameraAdapter
from sora_engine.models.wan.config import WanConfig
from sora_engine.models.wan.embedders import ConditionEmbedder, rope_tables
from sora_kernels import norm_modulate

CLIP_TOKENS = 257
"""Of one image: the patches of ViT-H/14 at 224 pixels, and the class token."""
TEXT_TOKENS = 512
"""Wan pads every text to this many tokens with zeros, after the text encoder, and masks none."""


class WanTransformer(DiffusionTransformer):
    """A Wan transformer (2.1, 2.2 A14B expert, 2.2 TI2V-5B).

    Args:
        config: the checkpoint's `transformer/config.json`.
        text_tokens: length to which texts count as padded (512 in every published pipeline).
        backend: `backend` of every `sora_kernels` call; training uses `"reference"`.
        attention_backend: that of `packed_attention`, where it is another one.
    """

    block_lists = ("vace_blocks", "blocks")  # VACE's control runs first
    own_parts = ("attn1", "attn2", "norm2", "ffn")
    """Tables of modulation are read for all blocks at once, VACE's projections by the model."""
    block_methods = ("forward", "keys_values")
    one_input = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
    adaptable = (
        r"(vace_)?blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0|add_[kv]_proj)|ffn\.net\.(0\.proj|2)"
        r"|proj_in|proj_out)|condition_embedder\.(text_embedder\.linear_[12]"
        r"|image_embedder\.ff\.net\.(0\.proj|2))|proj_out"
    )
    """Not the embedding of noise levels, whose rows are of all requests, nor the patches'."""

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
        self.control_adapter = None
        if config.in_dim_control_adapter is not None:
            self.control_adapter = CameraAdapter(config)
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
        self.scale_shift_table = scale_shift_table(1, 2, dim)

    @property
    def shape(self) -> TransformerShape:
        """Its sizes."""
        return transformer_shape(self.config, self.text_tokens)

    def rebuild(self) -> WanTransformer:
        """Another transformer of the same configuration and backends."""
        return WanTransformer(
            self.config,
            text_tokens=self.text_tokens,
            backend=self.backends.fused,
            attention_backend=self.backends.attention,
        )

    def example_embedding(self, num_tokens: int, device: torch.device) -> Embedding:
        """Zeros of the shapes that `encode_contexts` takes for a text of so many tokens."""
        config = self.config
        embedding = {
            "text": torch.zeros(num_tokens, config.text_dim, dtype=self.dtype, device=device)
        }
        if config.image_dim is not None:
            tokens = config.pos_embed_seq_len or CLIP_TOKENS
            embedding["image"] = torch.zeros(
                tokens, config.image_dim, dtype=self.dtype, device=device
            )
        return embedding

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that activations flow in."""
        return self.patch_embedding.weight.dtype

    def encode_contexts(self, embeddings: Sequence[Embedding]) -> list[Context]:
        """Keys and values of texts and image embeddings, for every layer: once a request.

        Layers are the blocks, and behind them VACE's.
        embeddings: each with `"text"` `[n, text_dim]`, the text encoder's output without padding,
        n <= `text_tokens`, and in Wan 2.1 I2V `"image"` `[257, image_dim]` (`[514, image_dim]`:
        first and last frame).
        """
        texts = [embedding["text"] for embedding in embeddings]
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
        images = [embedding.get("image") for embedding in embeddings]
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
        pairs = [block.keys_values(embedded, source, self.backends) for block in blocks]
        keys, values = zip(*pairs, strict=True)
        return torch.stack(keys), torch.stack(values)

    def encode_camera(self, rays: Tensor) -> Tensor:
        """What the rays of a latent frame, `[in_dim_control_adapter, height, width]` in pixels, add
        to its tokens: `[tokens, inner_dim]`. It hangs on no noise level: once a request."""
        if self.control_adapter is None:
            return super().encode_camera(rays)
        return self.control_adapter(rays)

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
        x = embed_patches(tokens[:, :sample_size], self.patch_embedding)
        if stream.control is not None:
            x = x + stream.control
        rope = rope_tables(stream.coords, self.config, stream.places)
        level, level_projection = self.condition_embedder.embed_timesteps(
            batch.timesteps, self.dtype, batch.actions
        )
        # [rows, 6, dim] and [rows, 2, dim], kept in fp32 as diffusers keeps them.
        tables = modulation_tables(self.blocks, level_projection)
        shift, scale = (self.scale_shift_table + level.unsqueeze(1).float()).unbind(1)
        entries = [Modulation(table[:, 1], table[:, 0]) for table in tables]
        entries.append(Modulation(scale, shift))

        hints: dict[int, Tensor] = {}
        if self.config.vace_layers is not None:
            control = embed_patches(tokens[:, sample_size:], self.vace_patch_embedding)
            hints = self._control(x, control, batch, level_projection, rope)
        y = self._normalised(x, entries[0], stream)
        x = residual_of(x)
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
        tables = modulation_tables(self.vace_blocks, level_projection)
        entries = [Modulation(table[:, 1], table[:, 0]) for table in tables]
        control = self.vace_blocks[0].proj_in(control) + x
        y = self._normalised(control, entries[0], stream)
        control = residual_of(control)
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
            hints[layer] = steady(block.proj_out, control.to(self.dtype))
        return hints

    def _normalised(self, x: Tensor, modulation: Modulation, stream: Stream) -> Tensor:
        """In the dtype of the layers that read it."""
        return norm_modulate(
            x,
            *modulation,
            stream.rows,
            kind="layer",
            eps=self.config.eps,
            backend=self.backends.fused,
        ).to(self.dtype)


def residual_of(x: Tensor) -> Tensor:
    """The residual stream in float32, from the first gate on, as Wan's own code has it: in bf16 it
    would be rounded three times a block, which makes most of a bf16 model's error."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def modulation_tables(blocks: Sequence[WanBlock], level_projection: Tensor) -> Sequence[Tensor]:
    """The table `[rows, 6, dim]` (float32) of each block, for the levels' projection of that shape.

    In one sum: block by block it would be two launches for each.
    """
    offsets = torch.cat([block.scale_shift_table for block in blocks])
    return (offsets[:, None] + level_projection.float()).unbind(0)


def transformer_shape(config: WanConfig, text_tokens: int) -> TransformerShape:
    """The sizes of the transformer that a configuration describes."""
    return TransformerShape(
        num_layers=config.num_layers,
        num_heads=config.num_attention_heads,
        head_dim=config.attention_head_dim,
        ffn_dim=config.ffn_dim,
        in_channels=config.input_channels,
        out_channels=config.out_channels,
        text_tokens=text_tokens,
        cross_attn_norm=config.cross_attn_norm,
        action_dim=config.action_dim,
        places=config.rope_pairs is not None,
    )
