"""Transformers over patches of latents that know their places by fixed sines."""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from sora_engine.denoise.model import TransformerShape
from sora_engine.denoise.packing import Stream
from sora_engine.models.backends import Backends
from sora_engine.models.layers import picture_positions
from sora_engine.models.linear import embed_patches
from sora_engine.models.transformer import DiffusionTransformer
from sora_engine.models.transformer_config import PatchConfig
from sora_kernels import norm_modulate


class Modulation(NamedTuple):
    """Scale and shift of one LayerNorm, `[rows, channels]` each, and its eps."""

    scale: Tensor
    shift: Tensor
    eps: float


class PatchTransformer(DiffusionTransformer):
    """A transformer over patches, under diffusers' `pos_embed.proj`."""

    own_parts: ClassVar[tuple[str, ...]] = ("attn1", "attn2", "ff")
    """Modulation is made for all blocks before the first one runs."""
    one_input = ("attn1.to_q", "attn1.to_k", "attn1.to_v")

    def __init__(
        self, config: PatchConfig, *, backend: str = "auto", attention_backend: str | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.backends = Backends(backend, attention_backend or backend)
        patch = (1, config.patch_size, config.patch_size)
        convolution = nn.Conv3d(config.in_channels, config.inner_dim, patch, patch)
        self.pos_embed = nn.ModuleDict({"proj": convolution})

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that activations flow in."""
        return self._patch.weight.dtype

    def rebuild(self) -> Self:
        """Another transformer of the same configuration and backends."""
        return type(self)(
            self.config, backend=self.backends.fused, attention_backend=self.backends.attention
        )

    def embedded(self, stream: Stream) -> Tensor:
        """The stream's patches and their places, `[N, dim]`: the residual stream, in float32, so
        that it is not rounded at each branch."""
        assert stream.extents is not None
        x = embed_patches(stream.tokens.to(self.dtype), self._patch)
        base = self.config.sample_size // self.config.patch_size
        places = picture_positions(
            stream.coords, stream.extents, x.shape[1], base, self.config.place_divisor
        )
        return (x + places.to(x.dtype)).float()

    def normalised(self, x: Tensor, modulation: Modulation, stream: Stream) -> Tensor:
        """A modulated LayerNorm of x, in the dtype of the layers that read it."""
        scale, shift, eps = modulation
        return norm_modulate(
            x, scale, shift, stream.rows, kind="layer", eps=eps, backend=self.backends.fused
        ).to(self.dtype)

    @property
    def _patch(self) -> nn.Conv3d:
        return cast("nn.Conv3d", self.pos_embed["proj"])


def patch_shape(config: PatchConfig, *, lists: int = 1, text_tokens: int = 0) -> TransformerShape:
    """The sizes of the transformer that a configuration describes.

    lists: how many lists of `num_layers` blocks it has.
    """
    return TransformerShape(
        num_layers=lists * config.num_layers,
        num_heads=config.num_attention_heads,
        head_dim=config.attention_head_dim,
        ffn_dim=4 * config.inner_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_tokens=text_tokens,
    )
