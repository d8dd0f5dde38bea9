"""Encoders of what conditions a video beside its latents: texts, and images for CLIP."""

from sora_engine.text.image import ImageEncoder
from sora_engine.text.umt5 import TextEncoder

__all__ = ["ImageEncoder", "TextEncoder"]
