"""Video autoencoders: latents to frames and back, streaming."""

from sora_engine.vae.causal import CausalVAE
from sora_engine.vae.coder import VideoCoder, stream_decode, stream_encode
from sora_engine.vae.registry import VAEKind, register_vae, unregister_vae
from sora_engine.vae.shapes import VAEConfig
from sora_engine.vae.state import VAEState
from sora_engine.vae.tiling import TiledCoder, TilePlan

__all__ = [
    "CausalVAE",
    "TilePlan",
    "TiledCoder",
    "VAEConfig",
    "VAEKind",
    "VAEState",
    "VideoCoder",
    "register_vae",
    "stream_decode",
    "stream_encode",
    "unregister_vae",
]
