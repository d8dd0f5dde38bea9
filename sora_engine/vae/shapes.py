"""What fits a video autoencoder, and the nearest that does where something does not."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol

from torch import Tensor

from sora_engine.errors import RequestError


class VAEConfig(Hashable, Protocol):
    """What must be known of a video autoencoder's layout, whatever its kind."""

    @property
    def class_name(self) -> str:
        """diffusers' name of the class, by which `vae.registry` finds the kind."""
        ...

    @property
    def z_dim(self) -> int:
        """Channels of a latent."""
        ...

    @property
    def factor_temporal(self) -> int:
        """Frames that a latent frame stands for, the first one aside."""
        ...

    @property
    def factor_spatial(self) -> int:
        """Pixels along one side of a latent."""
        ...

    @property
    def latents_mean(self) -> tuple[float, ...]: ...
    @property
    def latents_std(self) -> tuple[float, ...]: ...

    @property
    def pixel_channels(self) -> int:
        """Channels of the frames that are encoded."""
        ...

    @property
    def size_multiple(self) -> int:
        """What height and width of frames must be multiples of, in pixels."""
        ...

    @property
    def widest(self) -> int:
        """At least the channels of the widest layer."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds, as diffusers reads it."""
        ...


def look_ahead(config: object) -> int:
    """Latent frames that a decoder sees beyond one before its frames are done; 0 for causal ones,
    whose configurations need not say so."""
    return int(getattr(config, "look_ahead", 0))


def check_frames(config: VAEConfig, frames: Tensor, *, first: bool) -> None:
    """That these can be encoded next: 1 + k * factor frames to begin with, then k * factor.

    Raises RequestError.
    """
    if frames.dim() != 5:
        raise RequestError(f"frames must be [B, C, n, H, W], not {list(frames.shape)}")
    channels = config.pixel_channels
    if frames.shape[1] != channels:
        raise RequestError(f"frames have {frames.shape[1]} channels; the VAE takes {channels}")
    n, factor = frames.shape[2], config.factor_temporal
    if first and (n < 1 or (n - 1) % factor):
        low = max(n - 1, 0) // factor * factor + 1
        raise RequestError(
            f"a video of {n} frames does not fit the VAE; {low} or {low + factor} would"
        )
    if not first and (n < 1 or n % factor):
        low = max(n // factor, 1) * factor
        raise RequestError(
            f"a chunk of {n} frames does not fit the VAE; {low} or {low + factor} would"
        )
    unit = config.size_multiple
    for side, size in (("height", frames.shape[3]), ("width", frames.shape[4])):
        if size % unit or size < 1:
            low = max(size // unit, 1) * unit
            raise RequestError(
                f"a {side} of {size} pixels does not fit the VAE; {low} or {low + unit} would"
            )


def check_latents(config: VAEConfig, latents: Tensor) -> None:
    """That these can be decoded; raises RequestError."""
    if latents.dim() != 5 or latents.shape[1] != config.z_dim or latents.shape[2] < 1:
        raise RequestError(
            f"latents must be [B, {config.z_dim}, t, h, w] with t of 1 or more, "
            f"not {list(latents.shape)}"
        )
