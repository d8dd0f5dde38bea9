"""Colours by an embedded ICC profile, brought to sRGB as every viewer brings them."""

from __future__ import annotations

import io
import itertools
import logging
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

logger = logging.getLogger(__name__)

_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}


def to_srgb(picture: Image.Image, profile: bytes, path: str | Path) -> Image.Image:
    """A picture of mode L, RGB or CMYK as RGB in sRGB, by LittleCMS and the profile's own intent.

    A profile that moves no colour by more than one level is sRGB's own: nothing is changed. One
    that is broken or of another kind than the picture is passed over, and a warning says so.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES.get(source.profile.xcolor_space.strip())
        if mode == "RGB" and picture.mode == "L":
            picture = picture.convert("RGB")
        if mode != picture.mode:
            raise ValueError(f"it is for {source.profile.xcolor_space.strip()} pictures")
        intent = ImageCms.Intent(ImageCms.getDefaultIntent(source))
        transform = ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), picture.mode, "RGB", intent
        )
        if picture.mode == "RGB" and _changes_nothing(transform):
            return picture
        return transform.apply(picture)
    except (ImportError, OSError, ValueError, TypeError, ImageCms.PyCMSError) as error:
        logger.warning("%s: its colour profile is not applied: %s", path, error)
        return picture.convert("RGB")


def transfer_of(profile: bytes) -> int | None:
    """The transfer, in H.273's codes, of a profile that names one (ICC.1:2022, 9.2.17)."""
    count = int.from_bytes(profile[128:132], "big")
    for at in range(132, 132 + 12 * min(count, 100), 12):
        if profile[at : at + 4] == b"cicp":
            place = int.from_bytes(profile[at + 4 : at + 8], "big")
            return profile[place + 9] if place + 9 < len(profile) else None
    return None


def _changes_nothing(transform: object) -> bool:
    levels = [0, 16, 48, 96, 144, 192, 224, 240, 255]
    colours = np.array([list(itertools.product(levels, repeat=3))], np.uint8)
    moved = np.asarray(transform.apply(Image.fromarray(colours)))  # type: ignore[attr-defined]
    return int(np.abs(moved.astype(int) - colours).max()) <= 1
