"""Encoders of what conditions a video beside its latents: texts, and images for CLIP."""

from sora_engine.text.encoder import (
    PromptEncoder,
    TextEncoder,
    load_text_encoder,
    register_text_encoder,
    unregister_text_encoder,
)
from sora_engine.text.image import ImageEncoder

__all__ = [
    "ImageEncoder",
    "PromptEncoder",
    "TextEncoder",
    "load_text_encoder",
    "register_text_encoder",
    "unregister_text_encoder",
]
