"""What goes into Wan's transformer: patches, places, noise levels, texts and images."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_engine.models.linear import steady
from sora_engine.models.wan.blocks import FeedForward
from sora_engine.models.wan.config import WanConfig
from sora_kernels import norm_modulate


class ConditionEmbedder(nn.Module):
    """Embeddings of noise level, text and image."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.inner_dim
        self.freq_dim = config.freq_dim
        self.time_embedder = TwoLinears(config.freq_dim, dim, "silu")
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = TwoLinears(config.text_dim, dim, "tanh")
        self.action_embedder = None
        if config.action_dim is not None:
            self.action_embedder = TwoLinears(config.action_dim, dim, "silu")
        self.image_embedder = None
        if config.image_dim is not None:
            self.image_embedder = ImageEmbedder(config.image_dim, dim, config.pos_embed_seq_len)

    def embed_timesteps(
        self, timesteps: Tensor, dtype: torch.dtype, actions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Timesteps `[rows]` -> embedding `[rows, dim]` and its projection `[rows, 6, dim]`.

        actions: `[rows, action_dim]`, of a model that is driven; None: nothing was done. Their
        embedding is added, as Oasis adds its buttons (github.com/etched-ai/open-oasis).
        """
        half = self.freq_dim // 2
        steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        frequencies = torch.exp(-math.log(10_000.0) * steps / half)
        angles = timesteps.float()[:, None] * frequencies
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1)
        embedding = self.time_embedder(sinusoid.to(self.time_embedder.dtype)).to(dtype)
        embedder = self.action_embedder
        if embedder is not None:
            if actions is None:
                actions = timesteps.new_zeros(len(timesteps), embedder.linear_1.in_features)
            embedding = embedding + embedder(actions.to(embedder.dtype)).to(dtype)
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
        return _layer_norm(self.norm2, self.ff(_layer_norm(self.norm1, tokens)))


def rope_tables(
    coords: Tensor, config: WanConfig, places: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[N, head_dim / 2]` (float32) of rotary embedding at `coords [N, 3]`.

    The pairs of a head are shared out to time, height and width: of 128 channels 44, 42 and 42.
    Where a configuration has `rope_pairs`, some read where in the world a token lies, in latents:
    its place in the view, and behind it `places [N, 2]`, the view's own. Two tokens that show one
    spot are at one position there, whenever they did.
    """
    axes = list(coords.to(torch.float64).unbind(dim=1))
    pairs = config.rope_pairs
    if pairs is None:
        side = config.attention_head_dim // 6
        pairs = (config.attention_head_dim // 2 - 2 * side, side, side)
    else:
        for side in (1, 2):
            place = axes[side] * config.patch_size[side]
            axes.append(place if places is None else place + places[:, side - 1])
    angles = []
    for place, count in zip(axes, pairs, strict=True):
        exponents = torch.arange(0, 2 * count, 2, dtype=torch.float64, device=coords.device)
        frequencies = config.rope_theta ** -(exponents / (2 * count))
        angles.append(place[:, None] * frequencies)
    angle = torch.cat(angles, dim=1)
    return angle.cos().float(), angle.sin().float()


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm in fp32, as diffusers has it."""
    return norm_modulate(x, None, None, weight=norm.weight, bias=norm.bias, eps=norm.eps)
