"""The files that a video can be written as: their suffixes, and the rates that each can have."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from sora_engine.errors import MediaError
from sora_engine.io.animation import GIF_MAX_FPS, WEBP_MAX_FPS

MAX_FPS = {".mp4": 1000, ".gif": GIF_MAX_FPS, ".webp": WEBP_MAX_FPS, ".png": 1000, "": 1000}
LEAST_FPS = 0.001
"""A picture a quarter of an hour. Rates are written as fractions of denominators up to 1001."""
MIN_FPS = {".gif": 0.0016}
"""A GIF's pictures stand for 65535 hundredths of a second at most (GIF89a, section 23)."""
SUFFIXES = tuple(suffix for suffix in MAX_FPS if suffix)
NUMBERED_PNG = re.compile(r"\d+\.png")
"""The files of a folder that is a video."""


def check_rate(fps: float | Fraction, suffix: str = "") -> None:
    """Raises MediaError for a rate that no file of the suffix can have."""
    least, most = MIN_FPS.get(suffix, LEAST_FPS), MAX_FPS[suffix]
    if not math.isfinite(fps) or not least <= fps <= most:
        what = f" for a {suffix}" if suffix else ""
        raise MediaError(
            f"fps {float(fps):g}: it must be at least {least} and at most {most}{what}"
        )
