"""The ladders of Wan's few-step models, as their publishers' code steps through them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sora_engine.request.ladders import Ladder


def shifted(shift: float, *levels: float) -> tuple[float, ...]:
    """`s' = k s / (1 + (k - 1) s)`."""
    return tuple(shift * s / (1 + (shift - 1) * s) for s in levels)


def trig_levels(*angles: float) -> tuple[float, ...]:
    """TrigFlow's angles as levels of a rectified flow, `sin / (sin + cos)` (arXiv 2410.11081)."""
    return tuple(math.sin(a) / (math.sin(a) + math.cos(a)) for a in angles)


WAN_LADDERS: Mapping[str, Ladder] = {
    "lightx2v-4": Ladder(
        shifted(5.0, 1.0, 0.75, 0.5, 0.25),
        "euler",
        r"lightx2v|lightning|4[-_ ]?steps?",
        "LightX2V's 4 steps, Wan 2.1 and 2.2",
    ),
    "self-forcing-4": Ladder(
        shifted(5.0, 1.0, 0.75, 0.5, 0.25),
        "renoise",
        r"self[-_ ]?forcing",
        "Self-Forcing (arXiv 2506.08009) and Krea's realtime model",
    ),
    "fastwan-3": Ladder(
        (1.0, 0.757, 0.522), "renoise", r"fast[-_ ]?wan", "FastVideo's FastWan 2.1 (DMD)"
    ),
    "causvid-9": Ladder(
        (0.999, 0.934, 0.862, 0.756, 0.603, 0.410, 0.250, 0.140, 0.074),
        "renoise",
        r"caus[-_ ]?vid",
        "CausVid (arXiv 2412.07772)",
    ),
    "rcm-4": Ladder(
        trig_levels(math.atan(80.0), 1.5, 1.4, 1.0),
        "renoise",
        r"\brcm|[-_]rcm|turbo[-_ ]?(wan|diffusion)",
        "rCM (arXiv 2510.08431) and TurboDiffusion",
        scaled_start=True,
    ),
}
