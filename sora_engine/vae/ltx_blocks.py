"""The layers of LTX-Video's autoencoder, over a video that comes in stretches.

Tensors are `[B, C, T, H, W]`, channels last in memory. The encoder's convolutions see the past, the
decoder's a frame of the future too: those wait for it, so a layer gives out as many frames as it
can, which may be none, and the rest when the video ends (`FeatureCache.last`). Parameter names are
those of diffusers' `AutoencoderKLLTXVideo` but for `.conv.` before weights and biases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_engine.vae.blocks import CausalConv3d
from sora_engine.vae.native import PackableConv3d, fuses
from sora_engine.vae.state import FeatureCache
from sora_kernels import causal_norm_silu
from sora_kernels.transfer import to_device

NORM_EPS = 1e-8
FREQUENCIES = 256
NOISE_SEED = 0x17C
"""Of the noise that some decoders add: the same for every video, so that latents have one
decoding."""
Stride = tuple[int, int, int]


class LTXConv(CausalConv3d):
    """A convolution whose padding in time repeats the first frame, and without `causal` the last
    one: half of it stands before a frame then, half behind."""

    fewer_products: ClassVar[bool] = True

    def __init__(
        self, c_in: int, c_out: int, *, causal: bool, kernel: int = 3, stride: Stride = (1, 1, 1)
    ):
        PackableConv3d.__init__(self, c_in, c_out, (kernel, kernel, kernel), stride=stride)
        self.causal = causal

    def stretch(
        self, x: Tensor, cache: FeatureCache, norm: Norm | None = None
    ) -> tuple[Tensor, bool]:
        """The next frames of the input to those of the output that are known by now, and whether
        the video's first is among them.

        norm: x goes through `norm` and SiLU first.
        """
        past, step = cache.take(), self.stride[0]
        begins = past is None or (not self.causal and past.shape[2] == 1)
        if past is None and x.shape[2] == 0:
            cache.leave(None)
            return self.nothing(x), False
        frames = x.shape[2] + (0 if past is None else past.shape[2])
        before = (2 if self.causal else 1) if begins else 0
        after = int(cache.last and not self.causal)
        made = (before + frames + after - 3) // step + 1
        if made < 1:  # it waits, and what has come stays as it is
            before, kept = 0, frames
        else:
            kept = before + frames + after - made * step
        if norm is not None and norm.fuses(x):
            whole, left = norm.silu_behind(past, x, before, after, kept if cache.keeps else 0)
            cache.put(left)
        else:
            whole = _joined(past, x if norm is None else norm.silu(x), before, after)
            cache.leave(whole, kept)
        return (self.valid(whole), begins) if made >= 1 else (self.nothing(x), False)

    def nothing(self, x: Tensor) -> Tensor:
        """No frames, of the output's shape."""
        batch, _, _, height, width = x.shape
        size = (math.ceil(height / self.stride[1]), math.ceil(width / self.stride[2]))
        return x.new_empty(batch, self.out_channels, 0, *size)


def _joined(past: Tensor | None, x: Tensor, before: int, after: int) -> Tensor:
    """x behind its past, with the first frame repeated before both and the last one behind."""
    frames = x if past is None else torch.cat([past, x], dim=2)
    if not before + after:
        return frames
    first, last = frames[:, :, :1], frames[:, :, -1:]
    return torch.cat(
        [first.expand(-1, -1, before, -1, -1), frames, last.expand(-1, -1, after, -1, -1)], dim=2
    )


def held_back(x: Tensor, count: int, cache: FeatureCache) -> Tensor:
    """The first `count` frames that have come and were not given out yet: a shortcut beside
    convolutions that wait."""
    past = cache.take()
    frames = x if past is None else torch.cat([past, x], dim=2)
    rest = frames.shape[2] - count
    cache.leave(frames if rest else None, rest)
    return frames[:, :, :count]


@dataclass(frozen=True)
class Norm:
    """RMSNorm over the channels without a weight of its own, times `1 + scale`, plus `shift`: what
    a noise level says, `[C]` each, or nothing."""

    scale: Tensor | None = None
    shift: Tensor | None = None

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the norm of `x [B, C, T, H, W]`."""
        rows = x.permute(0, 2, 3, 4, 1)
        y = F.rms_norm(rows, rows.shape[-1:], eps=NORM_EPS)
        if self.scale is not None and self.shift is not None:
            y = torch.addcmul(self.shift, y, 1 + self.scale)
        wants_grad = torch.is_grad_enabled() and y.requires_grad
        return F.silu(y, inplace=not wants_grad).permute(0, 4, 1, 2, 3)

    def fuses(self, x: Tensor) -> bool:
        """Whether `silu_behind` serves `x`."""
        return fuses(x, self.scale, self.shift)

    def silu_behind(
        self, past: Tensor | None, x: Tensor, before: int, after: int, keep: int
    ) -> tuple[Tensor, Tensor]:
        """`silu(x)` behind the frames of `past`, with the first of them repeated `before` times and
        the last one `after` times, and its last `keep` frames, in one pass over memory."""
        rows = x.permute(0, 2, 3, 4, 1)
        old = rows[:, :0] if past is None else past.permute(0, 2, 3, 4, 1)
        made = causal_norm_silu(
            rows.flatten(2, 3), old.flatten(2, 3), None if self.scale is None else 1 + self.scale,
            bias=self.shift, before=before, after=after, keep=keep, eps=NORM_EPS,
        )  # fmt: skip
        size = rows.shape[2:4]
        joined, left = (t.unflatten(2, size).permute(0, 4, 1, 2, 3) for t in made)
        return joined, left


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of `[B, C, T, H, W]`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class LevelEmbedder(nn.Module):
    """A noise level `[]` to `[dim]`: sinusoids through two linear layers."""

    def __init__(self, dim: int):
        super().__init__()
        layers = {"linear_1": nn.Linear(FREQUENCIES, dim), "linear_2": nn.Linear(dim, dim)}
        self.timestep_embedder = nn.ModuleDict(layers)

    def forward(self, level: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        steps = torch.arange(half, dtype=torch.float32, device=level.device)
        angles = level.float() * torch.exp(-math.log(10_000.0) * steps / half)
        first, second = self.timestep_embedder["linear_1"], self.timestep_embedder["linear_2"]
        sinusoids = torch.cat([angles.cos(), angles.sin()]).to(next(self.parameters()).dtype)
        return second(F.silu(first(sinusoids)))  # type: ignore[no-any-return]


class Resnet(nn.Module):
    """Norm, SiLU, convolution, twice, and a shortcut.

    noisy: noise is added behind each convolution, one picture of it for all channels and frames.
    levelled: a noise level modulates both norms.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        causal: bool,
        eps: float,
        noisy: bool = False,
        levelled: bool = False,
    ):
        super().__init__()
        self.causal, self.number = causal, 0
        self.conv1 = LTXConv(c_in, c_out, causal=causal)
        self.conv2 = LTXConv(c_out, c_out, causal=causal)
        same = c_in == c_out
        self.norm3 = None if same else ChannelNorm(c_in, eps=eps)
        self.conv_shortcut = None if same else LTXConv(c_in, c_out, causal=causal, kernel=1)
        self.per_channel_scale1 = nn.Parameter(torch.zeros(c_in, 1, 1)) if noisy else None
        self.per_channel_scale2 = nn.Parameter(torch.zeros(c_in, 1, 1)) if noisy else None
        self.scale_shift_table = None
        if levelled:
            self.scale_shift_table = nn.Parameter(torch.randn(4, c_in) / c_in**0.5)

    def forward(self, x: Tensor, cache: FeatureCache, level: Tensor | None = None) -> Tensor:
        """level: `[4 * c_in]`, what the block knows of the noise level."""
        first = second = Norm()
        if self.scale_shift_table is not None:
            assert level is not None
            table = (self.scale_shift_table + level.unflatten(0, (4, -1))).unbind()
            first, second = Norm(table[1], table[0]), Norm(table[3], table[2])
        y, _ = self.conv1.stretch(x, cache, first)
        y = self._noised(y, self.per_channel_scale1, 0)
        y, _ = self.conv2.stretch(y, cache, second)
        y = self._noised(y, self.per_channel_scale2, 1)
        return self._beside(x, y.shape[2], cache) + y

    def _beside(self, x: Tensor, count: int, cache: FeatureCache) -> Tensor:
        """The shortcut of the next `count` frames."""
        if not self.causal:
            x = held_back(x, count, cache)
        if self.norm3 is not None and self.conv_shortcut is not None:
            x = self.conv_shortcut.valid(self.norm3(x)) if count else self.conv_shortcut.nothing(x)
        return x

    def _noised(self, y: Tensor, scale: Tensor | None, which: int) -> Tensor:
        if scale is None or not y.shape[2]:
            return y
        noise = picture_noise(2 * self.number + which, y)
        return y + (noise * scale)[None, :, None]


def picture_noise(number: int, like: Tensor) -> Tensor:
    """Noise `[H, W]` of a layer's size, the same at every call."""
    if like.is_meta:
        return like.new_empty(like.shape[-2:])
    generator = torch.Generator().manual_seed(NOISE_SEED + number)
    noise = torch.randn(like.shape[-2:], generator=generator)
    return to_device(noise.to(like.dtype), like.device)


class StridedConv(LTXConv):
    """Halves frames, rows and columns (0.9.0, 0.9.1)."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, causal=True, stride=(2, 2, 2))

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:  # type: ignore[override]
        return self.stretch(x, cache)[0]


class Downsample(nn.Module):
    """Folds neighbours into channels, beside an averaged shortcut (0.9.5)."""

    def __init__(self, c_in: int, c_out: int, stride: Stride):
        super().__init__()
        self.stride, volume = stride, math.prod(stride)
        self.group = c_in * volume // c_out
        self.conv = LTXConv(c_in, c_out // volume, causal=True)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        if cache.first:
            x = torch.cat([x[:, :, : self.stride[0] - 1], x], dim=2)
        shortcut = _fold(x, self.stride).unflatten(1, (-1, self.group)).mean(dim=2)
        made, _ = self.conv.stretch(x, cache)
        return _fold(made, self.stride) + shortcut


class Upsample(nn.Module):
    """Unfolds channels into neighbours, with or without a shortcut of repeated channels; of the
    first frame's pair the second is kept."""

    def __init__(self, channels: int, *, causal: bool, residual: bool, factor: int):
        super().__init__()
        self.causal, self.residual, self.factor = causal, residual, factor
        self.conv = LTXConv(channels, channels * 8 // factor, causal=causal)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        made, begins = self.conv.stretch(x, cache)
        if self.residual:
            x = x if self.causal else held_back(x, made.shape[2], cache)
        up = _unfold(made)
        if self.residual:
            up = up + _unfold(x).repeat(1, 8 // self.factor, 1, 1, 1)
        return up[:, :, 1:] if begins else up


def _fold(x: Tensor, stride: Stride) -> Tensor:
    """`[B, C, T, H, W] -> [B, C * volume, T / t, H / h, W / w]`."""
    t, h, w = stride
    x = x.unflatten(4, (x.shape[4] // w, w)).unflatten(3, (x.shape[3] // h, h))
    x = x.unflatten(2, (x.shape[2] // t, t))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def _unfold(x: Tensor) -> Tensor:
    """`[B, 8 * C, T, H, W] -> [B, C, 2 * T, 2 * H, 2 * W]`."""
    batch, channels, time, height, width = x.shape
    x = x.reshape(batch, channels // 8, 2, 2, 2, time, height, width)
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(batch, channels // 8, 2 * time, 2 * height, 2 * width)
