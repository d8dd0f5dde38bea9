"""A job's results as files: the video as its frames come, a thumbnail, a sheet of its pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sora_engine.io.video_writer import VideoWriter

if TYPE_CHECKING:
    from sora_engine.io.provenance import Provenance
    from sora_engine.serve.store import Row
    from sora_engine.video import Video

THUMBNAIL = 512
"""Pixels of a thumbnail's longer side, at most."""
SHEET = 16
"""Pictures of a sheet, at most: four a row."""
SHEET_PICTURE = 256
"""Pixels of the longer side of each, at most."""

VIDEO, IMAGE = "video.mp4", "image.png"
MEDIA_TYPES = {"video": "video/mp4", "thumbnail": "image/webp", "spritesheet": "image/webp"}


class ResultWriter:
    """Writes one job's results into a folder, a few frames at a time.

    Raises MediaError and OSError, and leaves the folder to whoever made it.
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        fps: float,
        num_frames: int,
        provenance: Provenance | None,
        **options: Any,
    ) -> None:
        """options: of `VideoWriter`."""
        self._folder = folder
        name = VIDEO if kind == "video" else IMAGE
        self._video = VideoWriter(
            folder / name, fps, num_frames=num_frames, provenance=provenance, **options
        )
        count = min(SHEET, num_frames)
        self._chosen = {round(i * (num_frames - 1) / max(1, count - 1)) for i in range(count)}
        self._pictures: list[Image.Image] = []
        self._count = 0

    def write(self, frames: np.ndarray) -> None:
        """Adds frames, uint8 `[n, height, width, 3]`."""
        for frame in frames:
            self._video.write(frame)
            if self._count == 0:
                picture = _fitted(frame, THUMBNAIL)
                picture.save(self._folder / "thumbnail.webp", quality=85)
            if self._count in self._chosen:
                self._pictures.append(_fitted(frame, SHEET_PICTURE))
            self._count += 1

    def close(self, video: Video, row: Row) -> None:
        """Finishes the files, the receipt last, which says whose they are: other replicas read it
        (`neighbours`). request.json: what would make it again."""
        self._video.close()
        _sheet(self._pictures).save(self._folder / "spritesheet.webp", quality=80)
        receipt = None if video.receipt is None else video.receipt.to_dict()
        told: dict[str, Any] = {
            "receipt": receipt,
            "timings_s": video.timings_s,
            "seed": video.seed,
        }
        told |= {"owner": row.owner, "prompt": row.facts.get("prompt")}
        (self._folder / "request.json").write_text(json.dumps(row.body), encoding="utf-8")
        (self._folder / "receipt.json").write_text(json.dumps(told), encoding="utf-8")

    def abort(self) -> None:
        """Lets go of the file that is under way."""
        self._video.abort()


def _fitted(frame: np.ndarray, most: int) -> Image.Image:
    picture = Image.fromarray(frame)
    picture.thumbnail((most, most), Image.Resampling.LANCZOS)
    return picture


def _sheet(pictures: list[Image.Image]) -> Image.Image:
    columns = min(4, len(pictures))
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet
