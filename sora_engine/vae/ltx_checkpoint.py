"""Weights of LTX-Video's autoencoder under diffusers' names."""

from __future__ import annotations

import re

from sora_engine.vae.ltx import LTXVAE
from sora_engine.vae.ltx_config import LTXVAEConfig
from sora_engine.vae.registry import VAEKind


def to_own_name(name: str) -> str:
    """A parameter's name by diffusers', which has every convolution within a module of its own."""
    return re.sub(r"\.conv\.(weight|bias)$", r".\1", name)


KIND = VAEKind(config=LTXVAEConfig, layers=LTXVAE, renames=to_own_name)
