"""Video autoencoders: latents to frames and back, streaming."""

from sora_engine.vae.coder import VideoCoder, stream_decode, stream_encode
from sora_engine.vae.state import VAEState
from sora_engine.vae.tiling import TiledCoder, TilePlan
from sora_engine.vae.wan import WanVAE
from sora_engine.vae.wan_config import VAEConfig

__all__ = [
    "TilePlan",
    "TiledCoder",
    "VAEConfig",
    "VAEState",
    "VideoCoder",
    "WanVAE",
    "stream_decode",
    "stream_encode",
]
