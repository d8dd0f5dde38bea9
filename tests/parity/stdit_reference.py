"""STDiT3 as Open-Sora 1.2 describes it (arXiv 2412.20404), one video at a time, in plain PyTorch
under its authors' names: what the engine's is held against, as diffusers has none."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoids(values: Tensor, channels: int = 256) -> Tensor:
    half = channels // 2
    angles = values[:, None] * torch.exp(-math.log(1e4) * torch.arange(half) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Embedder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, values: Tensor) -> Tensor:
        return self.mlp(sinusoids(values))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def turned(x: Tensor) -> Tensor:
    """RoPE of `[..., T, dim]`: pair (2i, 2i + 1) by the angle t / 10000^(2i / dim)."""
    time, dim = x.shape[-2:]
    angles = torch.arange(time)[:, None] * 1e4 ** (-torch.arange(0, dim, 2) / dim)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = RMSNorm(dim // heads), RMSNorm(dim // heads)

    def forward(self, x: Tensor, *, along_time: bool) -> Tensor:
        """`[B, n, dim]`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if along_time:
            q, k = turned(q), turned(k)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear, self.kv_linear = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q = self.q_linear(x).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        k, v = self.kv_linear(text).unflatten(-1, (2, self.heads, -1)).permute(1, 2, 0, 3)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(0, 1).flatten(1))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, *, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.attn, self.cross_attn = Attention(dim, heads), CrossAttention(dim, heads)
        self.mlp = Mlp(dim, 4 * dim, dim)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) * 0.5)

    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        """x `[T, S, dim]`, t `[T, 6, dim]`: each frame has the modulation of its own level."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + t)[
            :, :, None
        ].unbind(1)
        y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1
        if self.temporal:
            y = self.attn(y.transpose(0, 1), along_time=True).transpose(0, 1)
        else:
            y = self.attn(y, along_time=False)
        x = x + gate1 * y
        x = x + self.cross_attn(x.flatten(0, 1), text).view(x.shape)
        y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2
        return x + gate2 * self.mlp(y)


class STDiT3(nn.Module):
    def __init__(
        self, dim: int = 24, heads: int = 2, depth: int = 2, channels: int = 4, texts: int = 32,
        tokens: int = 300, square: int = 64,
    ) -> None:  # fmt: skip
        super().__init__()
        self.square, self.channels = square, channels
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv3d(channels, dim, (1, 2, 2), (1, 2, 2))})
        self.t_embedder, self.fps_embedder = Embedder(dim), Embedder(dim)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_embedder = nn.Module()
        self.y_embedder.y_proj = Mlp(texts, dim, dim)
        self.y_embedder.y_embedding = nn.Parameter(torch.randn(tokens, texts))
        self.spatial_blocks, self.temporal_blocks = (
            nn.ModuleList([Block(dim, heads, temporal=kind) for _ in range(depth)])
            for kind in (False, True)
        )
        self.final_layer = nn.Module()
        self.final_layer.scale_shift_table = nn.Parameter(torch.randn(2, dim) * 0.5)
        self.final_layer.linear = nn.Linear(dim, 4 * 2 * channels)

    def forward(self, x: Tensor, levels: Tensor, text: Tensor, fps: float) -> Tensor:
        """x `[C, T, H, W]`, levels `[T]` (0 where a frame is known), text `[n, texts]`: velocities
        `[C, T, H, W]`, from noise to data."""
        tokens = self.x_embedder["proj"](x[None])[0].permute(1, 2, 3, 0)  # [T, H, W, dim]
        time, height, width, dim = tokens.shape
        scale = math.sqrt(height * 16 * width * 16) / self.square
        base = round(math.sqrt(height * width))
        rows = torch.arange(height) / scale * base / height
        columns = torch.arange(width) / scale * base / width
        omega = 1e4 ** (-torch.arange(0, dim // 2, 2) / (dim // 2))

        def sincos(places: Tensor) -> Tensor:
            angles = places[..., None] * omega
            return torch.cat([angles.sin(), angles.cos()], dim=-1)

        by_row = sincos(rows)[:, None].expand(-1, width, -1)
        by_column = sincos(columns)[None].expand(height, -1, -1)
        h = (tokens + torch.cat([by_column, by_row], dim=-1)).flatten(1, 2)
        t = self.t_embedder(levels) + self.fps_embedder(torch.tensor([fps]))
        six = self.t_block(t).unflatten(-1, (6, dim))
        read = self.y_embedder.y_proj(text)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            h = temporal(spatial(h, read, six), read, six)
        shift, scale = (self.final_layer.scale_shift_table + t[:, None])[:, :, None].unbind(1)
        out = F.layer_norm(h, (dim,), eps=1e-6) * (1 + scale) + shift
        out = self.final_layer.linear(out).view(time, height, width, 2, 2, -1)
        video = out.permute(5, 0, 1, 3, 2, 4).reshape(-1, time, 2 * height, 2 * width)
        return video[: self.channels]
