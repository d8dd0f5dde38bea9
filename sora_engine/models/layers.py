"""Layers that transformers of several families have, under diffusers' names, over packed tokens."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_engine.models.cuda_linear import JoinedLinears
from sora_engine.models.linear import linear_gelu, steady

GELUS = {"gelu": "none", "gelu-approximate": "tanh"}
"""The activations of a feed-forward by diffusers' names, and as torch has them."""


class Attention(nn.Module):
    """The projections of one attention without norms of queries and keys."""

    joined: JoinedLinears | None = None
    """to_q, to_k and to_v as one product, where they read one input."""

    def __init__(self, dim: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(dim, dim, bias=bias)
        self.to_v = nn.Linear(dim, dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def of_itself(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[N, heads, head_dim]` of y `[N, dim]`."""
        layers = self.to_q, self.to_k, self.to_v
        if self.joined is not None and self.joined.serves(layers, y):
            q, k, v = self.joined(y)
        else:
            q, k, v = (layer(y) for layer in layers)
        return self.split(q), self.split(k), self.split(v)

    def split(self, x: Tensor) -> Tensor:
        """`[N, dim]` as `[N, heads, head_dim]`."""
        return x.view(x.shape[0], self.heads, x.shape[1] // self.heads)

    def out(self, attended: Tensor) -> Tensor:
        """`[N, heads, head_dim]` to the branch's output `[N, dim]`."""
        (project,) = self.to_out
        return project(attended.flatten(1))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """Linear, GELU, linear; `net.0.proj` and `net.2` as diffusers names them."""

    def __init__(self, dim: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.approximate = GELUS[activation]
        # The middle entry holds the place of a dropout, so that the names are diffusers'.
        up = nn.ModuleDict({"proj": nn.Linear(dim, hidden)})
        self.net = nn.ModuleList([up, nn.Identity(), nn.Linear(hidden, dim)])

    def forward(self, x: Tensor) -> Tensor:
        first, _, down = self.net
        up = cast("nn.ModuleDict", first)["proj"]
        return down(linear_gelu(up, x, self.approximate))  # type: ignore[no-any-return]


class TimestepEmbedder(nn.Module):
    """Sinusoids of a timestep through two linear layers, with SiLU between."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, sinusoids: Tensor) -> Tensor:
        """`[rows, channels]` to `[rows, dim]`, in the dtype of the layers."""
        # By the bias: layers that are laid out for a processor have no weight any more.
        hidden = steady(self.linear_1, sinusoids.to(self.linear_1.bias.dtype))
        return steady(self.linear_2, F.silu(hidden))


def timestep_sinusoids(timesteps: Tensor, channels: int, *, ends_at_lowest: bool) -> Tensor:
    """Cosines and sines `[rows, channels]` (float32) of timesteps `[rows]`, of frequencies that
    fall from 1 to 1 / 10000, which the last one has where `ends_at_lowest`."""
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(10_000.0) * steps / (half - int(ends_at_lowest)))
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos(places: Tensor, dim: int) -> Tensor:
    """Fixed positions `[N, dim]` (float32) at places `[N]` along one axis: sines, then cosines
    (arXiv 1706.03762)."""
    exponents = torch.arange(dim // 2, dtype=torch.float64, device=places.device) / (dim / 2)
    angles = places.to(torch.float64)[:, None] * 10_000.0**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def picture_positions(
    coords: Tensor, extents: Tensor, dim: int, base: int, scale: float = 1.0
) -> Tensor:
    """Positions `[N, dim]` (float32) in a picture, whose columns fill the first half of the
    channels and whose rows the second.

    A picture of any size lies on the grid of `base` x `base` patches that the model was trained on:
    coords `[N, 3]` and extents `[N, 2]` are those of a `Stream`.
    """
    halves = []
    for axis in (1, 0):
        places = coords[:, 1 + axis].double() * (base / extents[:, axis].double()) / scale
        halves.append(sincos(places, dim // 2))
    return torch.cat(halves, dim=1)


def scale_shift_table(*shape: int) -> nn.Parameter:
    """Learned shifts, scales and gates, `[..., width]`, random as diffusers has them before they
    are trained: normal values over the root of the width.

    Without storage nothing is divided: torch would import its compiler for that.
    """
    values = torch.randn(shape)
    return nn.Parameter(values if values.is_meta else values / shape[-1] ** 0.5)
