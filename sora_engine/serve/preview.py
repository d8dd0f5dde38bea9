"""What a step makes of a video, as a small picture: one linear map of the latents, no decoder."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    import numpy as np

MOST_PIXELS = 512
"""Of the longer side: a latent is enlarged eightfold, or as far as this allows."""
MEDIA_TYPE = "image/webp"


def preview_webp(preview: np.ndarray, seconds: float) -> bytes:
    """A preview as an animated WebP that plays as long as the video.

    preview: uint8 `[latent_frames, latent_height, latent_width, 3]`, see `Job.preview`. seconds: of
    the video.
    """
    frames, height, width = preview.shape[:3]
    scale = max(1, min(8, MOST_PIXELS // max(height, width)))
    pictures = [
        Image.fromarray(frame).resize((width * scale, height * scale), Image.Resampling.BICUBIC)
        for frame in preview
    ]
    out = io.BytesIO()
    pictures[0].save(
        out,
        "WEBP",
        save_all=True,
        append_images=pictures[1:],
        duration=max(20, round(1000 * seconds / frames)),
        loop=0,
        quality=70,
        method=2,
    )
    return out.getvalue()
