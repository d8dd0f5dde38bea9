"""What every autoencoder backend offers: chunks in, chunks out, and the state between them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from sora_engine.errors import RequestError
from sora_engine.vae.shapes import VAEConfig, check_frames, look_ahead
from sora_kernels.transfer import constant

S = TypeVar("S")


class VideoCoder(Protocol[S]):
    """A video autoencoder that works through time. `CausalVAE` is one; so are the ONNX Runtime and
    TensorRT backends, and a tiling of any of them. `S` is the backend's own state."""

    @property
    def config(self) -> VAEConfig: ...
    @property
    def z_dim(self) -> int: ...
    @property
    def scale_factor_temporal(self) -> int: ...
    @property
    def scale_factor_spatial(self) -> int: ...

    def decode_chunk(
        self, latents: Tensor, state: S | None = None, *, consume: bool = False
    ) -> tuple[Tensor, S]:
        """The next latent frames, normalised `[B, z, t, h, w]`, to frames `[B, 3, n, H, W]`.

        A decoder that looks ahead (`shapes.look_ahead`) gives frames late, and what is left with a
        stretch of no latent frames, which ends the video."""
        ...

    def encode_chunk(
        self, frames: Tensor, state: S | None = None, *, consume: bool = False
    ) -> tuple[Tensor, S]:
        """The next frames (1 first, later `scale_factor_temporal` a latent) to their latents."""
        ...


class ChunkCoder(ABC, Generic[S]):
    """What follows from coding in chunks: whole videos, and the statistics of the latents."""

    @property
    @abstractmethod
    def config(self) -> VAEConfig:
        """The autoencoder's layout."""

    @abstractmethod
    def decode_chunk(
        self, latents: Tensor, state: S | None = None, *, consume: bool = False
    ) -> tuple[Tensor, S]:
        """See `VideoCoder`."""

    @abstractmethod
    def encode_chunk(
        self, frames: Tensor, state: S | None = None, *, consume: bool = False
    ) -> tuple[Tensor, S]:
        """See `VideoCoder`."""

    @property
    def z_dim(self) -> int:
        return self.config.z_dim

    @property
    def scale_factor_temporal(self) -> int:
        return self.config.factor_temporal

    @property
    def scale_factor_spatial(self) -> int:
        return self.config.factor_spatial

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents `[B, z, t, h, w]` to frames `[B, 3, n, H, W]` in [-1, 1], with
        `n = 1 + (t - 1) * scale_factor_temporal`."""
        return torch.cat(list(stream_decode(self, latents)), dim=2)

    def encode(self, video: Tensor) -> Tensor:
        """Frames `[B, 3, n, H, W]` in [-1, 1] to normalised latents `[B, z, t, h, w]`.

        RequestError where `n` is not one more than a multiple of `scale_factor_temporal`."""
        check_frames(self.config, video, first=True)
        return torch.cat(list(stream_encode(self, [video])), dim=2)

    def normalise(self, latents: Tensor) -> Tensor:
        """Raw latents `[B, z, ...]` to zero mean and unit deviation, by the config's statistics."""
        mean, std = latent_statistics(self.config, latents)
        return (latents - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        mean, std = latent_statistics(self.config, latents)
        return latents * std + mean


def latent_statistics(config: VAEConfig, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latents, shaped to go with `like [B, z, ...]`, of its dtype."""
    # Made on the spot: a buffer outside the state dict would stay on the meta device when weights
    # are assigned.
    shape = (-1, *([1] * (like.dim() - 2)))
    mean = constant(config.latents_mean, like).reshape(shape)
    return mean, constant(config.latents_std, like).reshape(shape)


def stream_decode(coder: VideoCoder[Any], latents: Tensor) -> Iterator[Tensor]:
    """Frames of `latents [B, z, t, h, w]` as they come, a latent frame's worth at a time.

    What it holds does not grow with the length. Stopping the iteration stops the work: nothing is
    decoded ahead, but for what a decoder that looks ahead must see.
    """
    state = None
    for latent in stretches_of(latents, coder.config):
        with torch.inference_mode():
            frames, state = coder.decode_chunk(latent, state, consume=True)
        if frames.shape[2]:
            yield frames


def stretches_of(latents: Tensor, config: VAEConfig) -> list[Tensor]:
    """Latents `[..., t, h, w]` one at a time, and for a decoder that looks ahead the end."""
    end = [latents[..., :0, :, :]] if look_ahead(config) else []
    return [*latents.split(1, dim=-3), *end]


def stream_encode(coder: VideoCoder[Any], stretches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Latents of a video that comes in stretches `[B, C, k, H, W]` of any lengths k, a latent frame
    at a time. A video that ends inside a latent frame is a RequestError."""
    factor = coder.scale_factor_temporal
    state, waiting, seen, need = None, [], 0, 1
    for stretch in stretches:
        seen += stretch.shape[2]
        waiting.append(stretch)
        while sum(part.shape[2] for part in waiting) >= need:
            joined = waiting[0] if len(waiting) == 1 else torch.cat(waiting, dim=2)
            with torch.inference_mode():
                latents, state = coder.encode_chunk(joined[:, :, :need], state, consume=True)
            waiting = [joined[:, :, need:]]
            need = factor
            yield latents
    left = sum(part.shape[2] for part in waiting)
    if left or not seen:
        low = max(seen - left, 1)
        raise RequestError(
            f"a video of {seen} frames does not fit the VAE; {low} or {low + factor} would"
        )
