"""A tiny video decoder (TAEHV): latents to frames at a small share of the work, and not the same.

Its layers are 2-D convolutions over frames; a memory block sees the frame before, too. So it is
causal and streams: all that it keeps is one frame a block. Each latent frame becomes four frames,
and the first three of a video are left out. After https://github.com/madebyollin/taehv.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sora_engine.io.loading import load_into
from sora_engine.io.weights.opening import open_weights
from sora_engine.io.weights.selected import Part, SelectedWeights
from sora_engine.vae.causal import CausalVAE
from sora_engine.vae.registry import VAEKind
from sora_engine.vae.state import FeatureCache
from sora_engine.vae.tiny_config import STRIDES, TinyVAEConfig, infer_tiny

LEFT_OUT = 3
"""Frames at the beginning that have no past to be made from."""


class MemoryBlock(nn.Module):
    """Three convolutions of each frame and the one before it, and a shortcut."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat([x, before], dim=1)) + x)


class DeepMemoryBlock(nn.Module):
    """The same with a depthwise convolution and products of pixels (the "super" form)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, 2 * width, 7, padding=3, groups=2 * width, bias=False),
            nn.Conv2d(2 * width, 4 * width, 1),
            nn.ReLU(),
            nn.Conv2d(4 * width, width, 1, bias=False),
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return x + self.conv(torch.cat([x, before], dim=1))


class TimeGrow(nn.Module):
    """A product of pixels that makes `stride` frames of one."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).unflatten(1, (-1, self.width)).flatten(0, 1)


class TinyVAE(CausalVAE):
    """The decoder of a TAEHV file, by whose numbers its layers are named. It encodes nothing."""

    def __init__(self, config: TinyVAEConfig):
        super().__init__(config)
        widths, last = config.widths, 3 * config.patch**2
        layers: dict[str, nn.Module] = {}
        if config.deep:
            layers["0"] = nn.Conv2d(config.z_dim, widths[0], 1, bias=False)
        else:
            layers["1"] = nn.Conv2d(config.z_dim, widths[0], 3, padding=1)
        for stage, stride in enumerate(STRIDES):
            own, following = widths[stage], widths[stage + 1]
            blocks, grow, conv = _places(stage, deep=config.deep)
            for place in blocks:
                layers[str(place)] = DeepMemoryBlock(own) if config.deep else MemoryBlock(own)
            if config.deep:
                layers[str(conv)] = nn.Conv2d(own, 4 * following, 3, padding=1)
                layers[str(grow)] = TimeGrow(following, stride)
            else:
                layers[str(grow)] = TimeGrow(own, stride)
                layers[str(conv)] = nn.Conv2d(own, following, 3, padding=1, bias=False)
        layers["22"] = nn.Conv2d(widths[3], last, 3, padding=1)
        self.decoder = nn.ModuleDict(layers)

    @property
    def config(self) -> TinyVAEConfig:
        config: TinyVAEConfig = self._config
        return config

    def encode_step(self, frames: Tensor, feat_cache: FeatureCache) -> Tensor:
        raise NotImplementedError("a tiny VAE decodes; the model's own encodes")

    def decode_step(self, raw: Tensor, feat_cache: FeatureCache) -> Tensor:
        """One pass through the layers: latents `[B, z, t, h, w]`, as the transformer has them, to
        frames in [-1, 1]."""
        batch = raw.shape[0]
        x = raw.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        if self.config.deep:
            x = self._layer(0)(x)
        else:
            x = F.relu(self._layer(1)(torch.tanh(x / 3) * 3))
        for stage in range(len(STRIDES)):
            blocks, _, _ = _places(stage, deep=self.config.deep)
            for place in blocks:
                x = self._layer(place)(x, _frames_before(x, batch, feat_cache))
            if stage + 1 < len(STRIDES):
                x = self._up(x, stage)
        left_out = 0
        if feat_cache.first:  # of what the first of these frames becomes nothing is shown
            x = x.unflatten(0, (batch, -1))[:, 1:].flatten(0, 1)
            left_out = LEFT_OUT - STRIDES[-1]
        # Nothing looks back any more, and activations are largest: frames go one by one.
        made = [self._finished(self._up(frame, len(STRIDES) - 1)) for frame in x.split(1)]
        return torch.cat(made).unflatten(0, (batch, -1)).transpose(1, 2)[:, :, left_out:]

    def _layer(self, place: int) -> nn.Module:
        layers: nn.Module = self.decoder
        assert isinstance(layers, nn.ModuleDict)
        return layers[str(place)]

    def _up(self, x: Tensor, stage: int) -> Tensor:
        """Twice the height and width, and a stage's stride in time."""
        _, grow, conv = _places(stage, deep=self.config.deep)
        if self.config.deep:
            return self._layer(grow)(F.pixel_shuffle(F.relu(self._layer(conv)(x)), 2))
        # Before upsampling, not after: a product of pixels does not care, and they are a quarter.
        return self._layer(conv)(F.interpolate(self._layer(grow)(x), scale_factor=2.0))

    def _finished(self, x: Tensor) -> Tensor:
        x = self._layer(22)(x if self.config.deep else F.relu(x))
        if self.config.patch > 1:
            x = F.pixel_shuffle(x, self.config.patch)
        return x.clamp(0, 1) * 2 - 1


def _places(stage: int, *, deep: bool) -> tuple[range, int, int]:
    """A stage's layers by their numbers in a file: of its blocks, of what grows in time, and of the
    convolution between it and the next."""
    if deep:
        first = 1 + 7 * stage
        return range(first, first + 3), first + 6, first + 3
    first = 3 + 6 * stage
    return range(first, first + 3), first + 4, first + 5


def _frames_before(x: Tensor, batch: int, feat_cache: FeatureCache) -> Tensor:
    """For each of the frames `[B * t, C, h, w]` the one before it; before the first are zeros."""
    frames = x.unflatten(0, (batch, -1))
    kept = feat_cache.take()
    first = torch.zeros_like(frames[:, :1]) if kept is None else kept.transpose(1, 2)
    before = torch.cat([first, frames[:, :-1]], dim=1)
    feat_cache.leave(frames.transpose(1, 2), 1)
    return before.flatten(0, 1)


KIND = VAEKind(config=TinyVAEConfig, layers=TinyVAE, encodes=False)


def load_tiny_vae(path: Path, device: torch.device | str, dtype: torch.dtype) -> TinyVAE:
    """The decoder of a file; its encoder is left out. Raises CheckpointError."""
    with open_weights(path) as opened:
        shapes = {name: opened.info(name).shape for name in opened}
        config = infer_tiny(shapes, path=path)
        with torch.device("meta"):
            vae = TinyVAE(config)
        grows = {
            f"decoder.{place}.conv.weight": layer.conv.out_channels
            for place, layer in vae.decoder.named_children()
            if isinstance(layer, TimeGrow)
        }
        names: dict[str, str | Part] = {n: n for n in shapes if not n.startswith("encoder.")}
        for name, rows in grows.items():
            stored = shapes.get(name, (0,))[0]
            if stored > rows:  # of a larger stride: the last frames are the ones
                names[name] = Part(name, range(stored - rows, stored))
        load_into(vae, SelectedWeights(opened, names), device=device, dtype=dtype)
    return vae.eval().requires_grad_(False)
