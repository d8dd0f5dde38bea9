"""Video autoencoders: latents to frames and back, streaming."""

from sora_engine.vae.config import VAEConfig
from sora_engine.vae.state import VAEState
from sora_engine.vae.wan import WanVAE

__all__ = ["VAEConfig", "VAEState", "WanVAE"]
