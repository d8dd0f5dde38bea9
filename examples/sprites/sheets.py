"""Sheets: pictures of clips, one a row, for the eye."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

EDGE = 90  # the grey of the lines between frames


def sheet(rows: Iterable[np.ndarray], columns: int = 9) -> Image.Image:
    """Clips uint8 `[n, height, width, 3]` as rows of evenly spaced frames, in 128 colours."""
    lines = []
    for clip in rows:
        picks = np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)
        framed = np.pad(clip[picks], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=EDGE)
        lines.append(np.concatenate(list(framed), axis=1))
    width = max(line.shape[1] for line in lines)
    lines = [
        np.pad(x, ((0, 0), (0, width - x.shape[1]), (0, 0)), constant_values=255) for x in lines
    ]
    return Image.fromarray(np.concatenate(lines)).quantize(128)


class Sheets:
    """A folder of sheets; None leaves them undrawn."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def draw(self, name: str, rows: Iterable[np.ndarray], columns: int = 9) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            sheet(rows, columns).save(self.folder / f"{name}.png", optimize=True)
