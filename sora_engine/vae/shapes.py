"""What fits a video autoencoder, and the nearest thing that does where something does not."""

from __future__ import annotations

from torch import Tensor

from sora_engine.errors import RequestError
from sora_engine.vae.wan_config import VAEConfig


def check_frames(config: VAEConfig, frames: Tensor, *, first: bool) -> None:
    """That these can be encoded next: 1 + k * factor frames to begin with, then k * factor.

    Raises RequestError.
    """
    if frames.dim() != 5:
        raise RequestError(f"frames must be [B, C, n, H, W], not {list(frames.shape)}")
    patch = config.patch_size or 1
    channels = config.in_channels // patch**2
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
    # The residual shortcuts cut frames into whole squares; Wan 2.1 rounds down instead.
    unit = config.factor_spatial if config.is_residual else patch
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
