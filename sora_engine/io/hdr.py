"""High dynamic range and wide colours as what an SDR screen shows: BT.709, gamma 2.4, 8 bits.

- **PQ, HLG** to linear light: ITU-R BT.2100. HLG is shown as on a screen of 1000 cd/m2.
- **down to SDR**: ITU-R BT.2446-1, method C, its crosstalk and its correction of chroma left out
  (both are optional). Luminance up to 70 cd/m2 is kept in proportion, above that it follows a
  logarithm: diffuse white (203 cd/m2, BT.2408) comes to 91% of SDR's white, and all from 332 on is
  white. Chromaticity is kept.
- **colours** outside of BT.709 are cut off in linear light.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from sora_engine.errors import MediaError

TRANSFERS = {16: "PQ", 18: "HLG"}
"""Those of HDR, by their code in ITU-T H.273."""

_OTHER_TRANSFERS = {8: "linear light", 9: "logarithmic", 10: "logarithmic", 17: "SMPTE ST 428"}

# x and y of red, green and blue, by the code in H.273; white is D65 but in 11, which is cinema's.
_PRIMARIES = {
    1: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
_D65 = (0.3127, 0.3290)

_BAND = 64  # rows at a time, so that what is in between stays in the cache


def needs_conversion(transfer: int, primaries: int) -> bool:
    """Whether pictures of these H.273 codes are other than plain SDR; MediaError for what is none
    that can be shown."""
    if transfer in _OTHER_TRANSFERS:
        raise MediaError(
            f"its transfer is {_OTHER_TRANSFERS[transfer]}, which is not read; one in BT.709, PQ "
            "or HLG would be"
        )
    return transfer in TRANSFERS or primaries in (9, 12)


def to_sdr(picture: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """A picture of these H.273 codes as BT.709 for SDR.

    picture: uint16 `[height, width, 3]`, R'G'B' of full range. Returns uint8 of the same shape.
    Primaries that are not named are those of BT.2020 for PQ and HLG.
    """
    if primaries not in _PRIMARIES:
        primaries = 9 if transfer in TRANSFERS else 1
    linear = _linear_light(transfer)
    luminance = _to_xyz(primaries)[1].astype(np.float32)
    to_709 = (np.linalg.inv(_to_xyz(1)) @ _to_xyz(primaries)).astype(np.float32).T
    shown = np.empty(picture.shape, np.uint8)
    for top in range(0, len(picture), _BAND):
        light = np.take(linear, picture[top : top + _BAND], mode="clip")
        if transfer in TRANSFERS:
            # By the root of the luminance, whose steps lie closer in the dark, and in between by a
            # straight line: without it a brighter colour could come out darker.
            place = np.sqrt(np.clip(light @ luminance, 0, 1)) * np.float32(65534)
            below = place.astype(np.uint16)
            gain, slope = _gain(transfer)
            factor = np.take(gain, below, mode="clip")
            factor += np.take(slope, below, mode="clip") * (place - below)
            light *= factor[..., None]
        light = (light.reshape(-1, 3) @ to_709).reshape(light.shape)
        np.clip(light, 0, 1, out=light)
        # Codes lie closer together in the dark, and so does the root of the light.
        root = (np.sqrt(light) * 65535 + 0.5).astype(np.uint16)
        np.take(_codes(), root, out=shown[top : top + _BAND], mode="clip")
    return shown


@lru_cache(maxsize=2)
def _gain(transfer: int) -> tuple[np.ndarray, np.ndarray]:
    """What light is multiplied with for SDR with white at 1, by the root of its luminance in
    65534ths, and the way to the next.

    HLG's system gamma (BT.2100, table 5), then BT.2446-1, 5.1.4.
    """
    luminance = np.maximum(np.arange(65536) / 65534, 1e-6) ** 2
    nits = 1000 * luminance**1.2 if transfer == 18 else 10000 * luminance
    k1, k3, bend = 0.83802, 0.74204, 58.535 / 0.83802
    k2 = k1 * bend * (1 - k3)
    k4 = k1 * bend - k2 * math.log(1 - k3)
    above = k2 * np.log(np.maximum(nits / bend, 1) - k3) + k4
    shown = np.where(nits < bend, k1 * nits, above)
    gain = shown / 100 / luminance
    return gain.astype(np.float32), np.diff(gain, append=gain[-1]).astype(np.float32)


@lru_cache(maxsize=4)
def _linear_light(transfer: int) -> np.ndarray:
    """Light of each 16-bit code, float32 up to 1: the screen's for PQ (10,000 cd/m2) and SDR, the
    scene's for HLG."""
    code = np.arange(65536) / 65535
    if transfer == 16:
        m1, m2 = 2610 / 16384, 2523 / 4096 * 128
        c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
        root = code ** (1 / m2)
        light = (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)
    elif transfer == 18:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
    else:
        light = code**2.4  # BT.1886
    return light.astype(np.float32)


@lru_cache(maxsize=1)
def _codes() -> np.ndarray:
    """The 8-bit code (BT.1886) of light, by the light's root in 65535ths."""
    return ((np.arange(65536) / 65535) ** (2 / 2.4) * 255).round().astype(np.uint8)


@lru_cache(maxsize=4)
def _to_xyz(primaries: int) -> np.ndarray:
    """CIE XYZ from linear RGB, float64 `[3, 3]`; white has Y = 1 (SMPTE RP 177)."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in _PRIMARIES[primaries]]).T
    white = np.array([_D65[0] / _D65[1], 1, (1 - sum(_D65)) / _D65[1]])
    return columns * np.linalg.solve(columns, white)
