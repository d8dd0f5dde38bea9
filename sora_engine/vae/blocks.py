"""The layers of the Wan autoencoder: causal convolution, norm, blocks, attention, resampling.

Tensors are `[B, C, T, H, W]`. Parameter names are those of diffusers' `AutoencoderKLWan` (and so
the classes nest as there); the arithmetic follows "Wan: Open and Advanced Large-Scale Video
Generative Models" (arXiv 2503.20314), section 4.1. A layer never keeps anything between calls: what
it needs from earlier frames comes from a `FeatureCache`, and what it wants kept goes back to it.

Tensors lie channels-last in memory (`torch.channels_last_3d`): convolutions on GPUs and CPUs are
fastest so, a norm reads its channels in one piece, and a frame is a picture without a copy.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_engine.vae.native import Layouts, PackableConv3d, PackedConv, native_kernels
from sora_engine.vae.state import FeatureCache
from sora_engine.vae.winograd import WinogradConv, serves
from sora_kernels import causal_norm_silu
from sora_kernels.transfer import constant
from sora_kernels.triton_support import problem as triton_problem


class CausalConv3d(PackableConv3d):
    """A convolution that sees the present and the past: in time, all its padding comes before."""

    fewer_products: ClassVar[bool] = False
    """Whether it may run as a `WinogradConv`: a part of a frame then has other bits than in the
    whole, within float32's rounding."""

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int, int], stride_t: int = 1):
        super().__init__(c_in, c_out, kernel, stride=(stride_t, 1, 1))

    def valid(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        """`[B, c_in, T, H, W] -> [B, c_out, (T - k) // stride + 1, H, W]`, no padding in time, and
        the sum with `beside` of that shape where it is given."""
        if self.layouts.wanted:
            packed = self.packed()
            if self.fewer_products and serves(self, x):
                return self._winograd(packed)(x, beside)
            return packed(x, beside)
        y = F.conv3d(x, self.weight, self.bias, self.stride, self.spatial_padding)
        return y if beside is None else beside + y

    def _winograd(self, packed: PackedConv) -> WinogradConv:
        made: WinogradConv = self.layouts.get(
            "winograd", lambda: WinogradConv(packed.plain_weight(), self.bias)
        )
        return made

    @property
    def second_bytes(self) -> int:
        """What the weight takes a second time, for large frames."""
        made: WinogradConv | None = self.layouts.made("winograd")
        return 0 if made is None else made.nbytes

    def _last_tap(self, x: Tensor) -> Tensor:
        if self.layouts.wanted:
            return self.packed_last_tap()(x)
        return F.conv3d(x, self.weight[:, :, -1:], self.bias, 1, self.spatial_padding)

    def forward(  # type: ignore[override]
        self, x: Tensor, feat_cache: FeatureCache, norm: RMSNorm | None = None
    ) -> Tensor:
        """`[B, c_in, T, H, W] -> [B, c_out, T, H, W]`, for a kernel of 3 frames and stride 1.

        With `norm`, x is normalised and goes through SiLU first.

        Calls of this class, of `Upsample` and (in the encoder) of `Downsample` do all the padding
        there is: in time from the cache, in space with zeros around x. So whoever holds but a part
        of the rows can hand x over with its neighbours' rows around it and cut off what comes of
        them. All else looks at single pixels, but for `AttentionBlock`.
        """
        frames = x.shape[2]
        x = self._behind_past(x, feat_cache, norm)
        # An empty past is zeros: only the last tap sees anything, a third of the work.
        return self._last_tap(x) if x.shape[2] == frames else self.valid(x)

    def _behind_past(self, x: Tensor, feat_cache: FeatureCache, norm: RMSNorm | None) -> Tensor:
        """x, activated, behind two frames of its past, and what the next call finds left on the
        feat_cache: `[B, C, 2 + T, H, W]`. A lone frame with an empty past stays alone."""
        past = feat_cache.take()
        if norm is not None:
            if past is not None and norm.fuses(x):
                x, cache = norm.silu_behind(past, x)
                feat_cache.put(cache)
                return x
            x = norm.silu(x)
        if past is not None:
            x = torch.cat([past, x], dim=2)
        elif x.shape[2] > 1:
            x = F.pad(x, (0, 0, 0, 0, 2, 0))
        feat_cache.leave(x, 2)
        return x


class RMSNorm(nn.Module):
    """`x / |x| * sqrt(C) * gamma`, over the channels (dimension 1). gamma: `[C, 1, 1(, 1)]`."""

    def __init__(self, channels: int, *, images: bool = False):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *([1] * (2 if images else 3))))

    def forward(self, x: Tensor) -> Tensor:
        gamma = self.gamma.reshape(-1, *([1] * (x.dim() - 2)))
        gain = x.shape[1] ** 0.5 * gamma
        if x.dtype in (torch.float16, torch.bfloat16):
            length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
            return (x / length.clamp_min(1e-12)).to(x.dtype) * gain
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-12)
        return x / length * gain

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the norm of `x [B, C, T, H, W]`, in fewer passes where no gradient is wanted."""
        wants_grad = torch.is_grad_enabled() and (x.requires_grad or self.gamma.requires_grad)
        if wants_grad or torch.compiler.is_compiling():
            return F.silu(self(x))
        if x.device.type == "cpu" and self.fuses(x):
            return self.silu_behind(x[:, :, :0], x)[0]
        return F.silu(self(x), inplace=True)

    def fuses(self, x: Tensor) -> bool:
        """Whether `silu_behind` serves `x`, in one pass over memory. On the meta device the answer
        is that of this machine's own devices."""
        if torch.is_grad_enabled() and (x.requires_grad or self.gamma.requires_grad):
            return False
        if torch.compiler.is_compiling() or x.dtype == torch.float64:
            return False
        if x.device.type == "cuda" or (x.device.type == "meta" and torch.cuda.is_available()):
            return triton_problem("cuda") is None
        return x.device.type in ("cpu", "meta") and native_kernels()

    def silu_behind(self, past: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """`silu(x)` behind the frames of `past [B, C, k, H, W]`, and its last k frames: the next
        past."""
        rows, before = (t.permute(0, 2, 3, 4, 1) for t in (x, past))
        joined, cache = causal_norm_silu(
            rows.flatten(2, 3), before.flatten(2, 3), self.gamma.flatten(), eps=1e-30
        )
        size = rows.shape[2:4]
        joined, cache = (t.unflatten(2, size).permute(0, 4, 1, 2, 3) for t in (joined, cache))
        return joined, cache


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, and a shortcut."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm1 = RMSNorm(c_in)
        self.conv1 = CausalConv3d(c_in, c_out, (3, 3, 3))
        self.norm2 = RMSNorm(c_out)
        self.conv2 = CausalConv3d(c_out, c_out, (3, 3, 3))
        self.conv_shortcut = CausalConv3d(c_in, c_out, (1, 1, 1)) if c_in != c_out else None

    def forward(self, x: Tensor, feat_cache: FeatureCache) -> Tensor:
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut.valid(x)
        x = self.conv1(x, feat_cache, self.norm1)
        x = self.conv2(x, feat_cache, self.norm2)
        return x + shortcut


class AttentionBlock(nn.Module):
    """Attention among the pixels of each frame, one head as wide as the channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = RMSNorm(channels, images=True)
        self.to_qkv = nn.Conv2d(channels, channels * 3, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, feat_cache: FeatureCache) -> Tensor:
        batch, channels, time, height, width = x.shape
        # [B, C, T, H, W] -> [B * T, H * W, C]: 1x1 convolutions are matrix products on the pixels.
        tokens = self.norm(x).permute(0, 2, 3, 4, 1).reshape(batch * time, height * width, channels)
        qkv = F.linear(tokens, self.to_qkv.weight.flatten(1), self.to_qkv.bias)
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        mixed = F.linear(mixed, self.proj.weight.flatten(1), self.proj.bias)
        return x + mixed.reshape(batch, time, height, width, channels).permute(0, 4, 1, 2, 3)


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the smallest grid."""

    def __init__(self, channels: int):
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(channels)])
        self.resnets = nn.ModuleList(
            [ResidualBlock(channels, channels), ResidualBlock(channels, channels)]
        )

    def forward(self, x: Tensor, feat_cache: FeatureCache) -> Tensor:
        x = self.resnets[0](x, feat_cache)
        x = self.attentions[0](x, feat_cache)
        return self.resnets[1](x, feat_cache)


def _convolution(resample: nn.Sequential) -> nn.Conv2d:
    # Index 1 is where diffusers has the convolution; before it comes padding or upsampling, which
    # has no parameters and is done differently here.
    conv = resample[1]
    assert isinstance(conv, nn.Conv2d)
    return conv


class Downsample(nn.Module):
    """Halves height and width; with `time`, frames too, the first of a video aside.

    With frames f0 f1 f2 f3 f4, the first passes and the others meet in threes with the frame
    before them: f0, conv(f0 f1 f2), conv(f2 f3 f4).
    """

    def __init__(self, channels: int, *, time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), stride_t=2) if time else None
        self.layouts = Layouts()

    @property
    def convolution(self) -> nn.Conv2d:
        """The convolution in space."""
        return _convolution(self.resample)

    def forward(self, x: Tensor, feat_cache: FeatureCache) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1))
        conv = self.convolution
        weight = conv.weight.unsqueeze(2)
        if self.layouts.wanted:
            packed = self.layouts.get(
                "conv",
                lambda: PackedConv(
                    weight, conv.bias, (1, 2, 2), (0, 0, 0), onednn=self.layouts.onednn
                ),
            )
            x = packed(x)
        else:
            x = F.conv3d(x, weight, conv.bias, (1, 2, 2))
        if self.time_conv is None:
            return x
        past = feat_cache.take()
        joined = None if past is None else torch.cat([past, x], dim=2)
        feat_cache.leave(x, 1)
        if joined is not None:
            return self.time_conv.valid(joined)
        if x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :1], self.time_conv.valid(x)], dim=2)


class Upsample(nn.Module):
    """Doubles height and width; with `time`, frames too, the first of a video aside.

    The first latent frame passes the temporal convolution by and is not in its past either: the
    second one finds zeros there.
    """

    def __init__(self, c_in: int, c_out: int, *, time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.time_conv = CausalConv3d(c_in, c_in * 2, (3, 1, 1)) if time else None
        self.layouts = Layouts()

    @property
    def convolution(self) -> nn.Conv2d:
        """The convolution in space."""
        return _convolution(self.resample)

    def forward(self, x: Tensor, feat_cache: FeatureCache) -> Tensor:
        if self.time_conv is not None:
            x = self._double_time(x, feat_cache)
        # 2x nearest and then 3x3 is a transposed convolution with the taps that meet summed.
        conv = self.convolution
        if self.layouts.wanted:
            kernel = self.layouts.get("folded", lambda: _folded_kernel(conv.weight.detach()))
        else:
            kernel = fold_upsampling(conv.weight)
        batch = x.shape[0]
        pictures = x.transpose(1, 2).flatten(0, 1)  # no copy: channels lie last
        pictures = F.conv_transpose2d(pictures, kernel, conv.bias, 2, 1)
        return pictures.unflatten(0, (batch, -1)).transpose(1, 2)

    def _double_time(self, x: Tensor, feat_cache: FeatureCache) -> Tensor:
        assert self.time_conv is not None
        if feat_cache.first:
            head, x = x[:, :, :1], x[:, :, 1:]
            if x.shape[2] == 0:
                feat_cache.take()
                feat_cache.leave(None)
                return head
        else:
            head = None
        # The first half of the channels is the earlier frame of each pair, the second the later.
        pairs = self.time_conv(x, feat_cache).permute(0, 2, 3, 4, 1).unflatten(4, (2, -1))
        x = pairs.permute(0, 1, 4, 2, 3, 5).flatten(1, 2).permute(0, 4, 1, 2, 3)
        return x if head is None else torch.cat([head, x], dim=2)


def _folded_kernel(weight: Tensor) -> Tensor:
    return fold_upsampling(weight).contiguous(memory_format=torch.channels_last)


def fold_upsampling(weight: Tensor) -> Tensor:
    """The 4x4 kernel of a transposed convolution (stride 2, padding 1) that equals 2x nearest
    upsampling followed by the 3x3 convolution `weight` (padding 1).

    `[c_out, c_in, 3, 3] -> [c_in, c_out, 4, 4]`. Of the three taps w0 w1 w2 along a side, two fall
    on the same small pixel: an even output reads w0 of the pixel before and w1 + w2 of its own, an
    odd one w0 + w1 of its own and w2 of the next. That is 4 products a pixel instead of 9.
    """
    sums = constant([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], weight)
    return torch.einsum("ai,bj,ocij->coab", sums, sums, weight)


class AverageDown(nn.Module):
    """The shortcut of a residual down stage: squares (and pairs of frames) become channels, and
    groups of those are averaged. A lone first frame is paired with zeros before it."""

    def __init__(self, c_in: int, c_out: int, *, time: int, space: int):
        super().__init__()
        self.c_out, self.time, self.space = c_out, time, space

    def forward(self, x: Tensor) -> Tensor:
        t, s = self.time, self.space
        if x.shape[2] % t:
            x = F.pad(x, (0, 0, 0, 0, t - x.shape[2] % t, 0))
        batch, _, frames, height, width = x.shape
        x = x.unflatten(4, (width // s, s)).unflatten(3, (height // s, s))
        x = x.unflatten(2, (frames // t, t)).permute(0, 1, 3, 5, 7, 2, 4, 6)
        x = x.reshape(batch, self.c_out, -1, frames // t, height // s, width // s)
        return x.mean(dim=2)


class DuplicateUp(nn.Module):
    """The shortcut of a residual up stage: channels, repeated as often as needed, become squares
    (and pairs of frames); of the first frame's pair only the second is kept."""

    def __init__(self, c_in: int, c_out: int, *, time: int, space: int):
        super().__init__()
        self.c_out, self.time, self.space = c_out, time, space
        self.repeats = c_out * time * space * space // c_in

    def forward(self, x: Tensor, *, first: bool) -> Tensor:
        batch, _, frames, height, width = x.shape
        t, s = self.time, self.space
        x = x.repeat_interleave(self.repeats, dim=1)
        x = x.reshape(batch, self.c_out, t, s, s, frames, height, width)
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)
        x = x.reshape(batch, self.c_out, frames * t, height * s, width * s)
        return x[:, :, t - 1 :] if first else x


def fold_patches(x: Tensor, patch: int) -> Tensor:
    """`[B, C, T, H, W] -> [B, C * patch^2, T, H / patch, W / patch]`; columns before rows."""
    if patch == 1:
        return x
    batch, channels, frames, height, width = x.shape
    x = x.reshape(batch, channels, frames, height // patch, patch, width // patch, patch)
    return x.permute(0, 1, 6, 4, 2, 3, 5).reshape(
        batch, channels * patch * patch, frames, height // patch, width // patch
    )


def unfold_patches(x: Tensor, patch: int) -> Tensor:
    """The inverse of `fold_patches`."""
    if patch == 1:
        return x
    batch, channels, frames, height, width = x.shape
    channels //= patch * patch
    x = x.reshape(batch, channels, patch, patch, frames, height, width)
    return x.permute(0, 1, 4, 5, 3, 6, 2).reshape(
        batch, channels, frames, height * patch, width * patch
    )
