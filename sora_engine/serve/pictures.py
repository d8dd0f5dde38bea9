"""A video's pictures: its first frame, and a sheet of frames.

They are made of the file when somebody asks for one the first time: most are never asked for, and
what they take is taken from the videos that are being made.
"""

from __future__ import annotations

import io
import math
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from sora_engine.io.video_reader import frames_of
from sora_engine.serve.writer import VIDEO

if TYPE_CHECKING:
    import numpy as np

    from sora_engine.serve.files import Files

THUMBNAIL = 512
"""Pixels of a thumbnail's longer side, at most."""
SHEET = 16
"""Pictures of a sheet, at most: four a row."""
SHEET_PICTURE = 256
"""Pixels of the longer side of each, at most."""


def thumbnail(video: Path, num_frames: int) -> bytes:
    """A video's first frame as WebP. num_frames: of the video."""
    _, frame = next(frames_of(video))
    return _webp(_fitted(frame, THUMBNAIL), 85)


def spritesheet(video: Path, num_frames: int) -> bytes:
    """Up to 16 frames of a video as one WebP, the first and the last among them."""
    count = min(SHEET, num_frames)
    chosen = {round(i * (num_frames - 1) / max(1, count - 1)) for i in range(count)}
    pictures = [
        _fitted(frame, SHEET_PICTURE)
        for i, (_, frame) in enumerate(frames_of(video))
        if i in chosen
    ]
    columns = min(4, len(pictures))
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return _webp(sheet, 80)


MAKERS: dict[str, Callable[[Path, int], bytes]] = {
    "thumbnail": thumbnail,
    "spritesheet": spritesheet,
}


def picture_of(files: Files, name: str, variant: str, num_frames: int) -> Path:
    """The file of a completed video's picture, made if need be. It may take as long as decoding the
    video does, and is for a thread. FileNotFoundError where the video is gone."""
    path = files.video(name) / f"{variant}.webp"
    if not path.exists():
        data = MAKERS[variant](_existing(files.video(name) / VIDEO), num_frames)
        temporary = files.tmp / f"{name}.{secrets.token_hex(4)}.webp"
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)  # the folder has gone with a video that was deleted
        finally:
            temporary.unlink(missing_ok=True)
    return path


def _existing(video: Path) -> Path:
    if not video.is_file():
        raise FileNotFoundError(video.name)
    return video


def _fitted(frame: np.ndarray, most: int) -> Image.Image:
    picture = Image.fromarray(frame)
    picture.thumbnail((most, most), Image.Resampling.LANCZOS)
    return picture


def _webp(picture: Image.Image, quality: int) -> bytes:
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=quality)
    return out.getvalue()
