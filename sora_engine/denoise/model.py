"""What denoising needs of a model, whatever its family."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sora_engine.denoise.adapting import AdapterRun, Adapters
from sora_engine.denoise.conditioning import Context, Embedding
from sora_engine.denoise.packing import PackedBatch
from sora_engine.denoise.preview import Preview
from sora_engine.request import GenerationDefaults, KnownMode, LatentGrid
from sora_engine.request.lora import LoraRecord
from sora_engine.samplers import SamplerConfig
from sora_engine.vae.coder import ChunkCoder


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerShape:
    """The sizes of a transformer, as those who plan for it must know them.

    in_channels: of its input, conditioning channels included. out_channels: of its prediction, a
        learned variance included.
    ffn_dim: width of the feed-forward's middle. text_tokens: what cross-attention reads a text as,
        padding included; 0 without cross-attention.
    action_dim: numbers that tell it what was done to make a latent frame; None: it is not told.
    places: whether it is told where the camera was.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    in_channels: int
    out_channels: int
    text_tokens: int = 0
    cross_attn_norm: bool = False
    action_dim: int | None = None
    places: bool = False

    @property
    def inner_dim(self) -> int:
        """Width of a token."""
        return self.num_heads * self.head_dim


class Transformer(Protocol):
    """A diffusion transformer over packed tokens: what a family builds."""

    @property
    def shape(self) -> TransformerShape: ...

    def adapting(self, runs: Sequence[AdapterRun]) -> AbstractContextManager[None]:
        """While it lasts, adapters change what the layers make of these runs of tokens."""
        ...

    def encode_contexts(self, embeddings: Sequence[Embedding]) -> list[Context]:
        """What each embedding is to attention, for every layer: once a request."""
        ...

    def encode_camera(self, rays: Tensor) -> Tensor:
        """What the camera's rays in a latent frame, float32 `[6 * frames, height, width]`, add to
        its tokens, `[tokens, inner_dim]`. Raises ValueError where it takes no camera."""
        ...

    def __call__(self, batch: PackedBatch) -> Tensor:
        """Predictions for the video's tokens, `[N, patch volume * out_channels]`, channel last."""
        ...


class PromptEncoder(Protocol):
    """What turns the prompts of requests into what a transformer reads."""

    @property
    def reused(self) -> int:
        """Of the prompts that were encoded last, how many were known from before."""
        ...

    def encode(self, prompts: Sequence[str]) -> Sequence[Embedding]: ...

    def cut(self, prompts: Sequence[str]) -> tuple[str, ...]:
        """A line for each prompt of which the end is not read."""
        ...


class ImageEncoder(Protocol):
    """What turns pictures into tokens that a transformer reads beside a text."""

    def encode(self, images: Sequence[Any]) -> Tensor:
        """`[images, tokens, image_dim]`."""
        ...


class DiffusionModel(Protocol):
    """A checkpoint as denoising sees it. `models.video_model.VideoModel` is one.

    takes_last_image: whether the image encoder is shown the last frame too.
    learned_variance: whether predictions carry as many channels again, of a variance.
    """

    @property
    def device(self) -> torch.device: ...
    @property
    def grid(self) -> LatentGrid: ...
    @property
    def defaults(self) -> GenerationDefaults: ...
    @property
    def known_mode(self) -> KnownMode: ...
    @property
    def sampler_config(self) -> SamplerConfig: ...
    @property
    def learned_variance(self) -> bool: ...
    @property
    def vae(self) -> ChunkCoder[Any]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def vae_dtype(self) -> torch.dtype: ...
    @property
    def prompt_encoder(self) -> PromptEncoder: ...
    @property
    def image_encoder(self) -> ImageEncoder | None: ...
    @property
    def takes_last_image(self) -> bool: ...
    @property
    def preview(self) -> Preview | None: ...
    @property
    def num_experts(self) -> int: ...

    def expert_at(self, timestep: float) -> int:
        """The index of the expert for this timestep."""
        ...

    def transformer(self, index: int) -> Transformer:
        """Expert `index`, loaded."""
        ...

    def adapters_of(self, loras: Sequence[LoraRecord]) -> Sequence[Adapters | None]:
        """For each expert what these adapters, which are loaded, change of it."""
        ...
