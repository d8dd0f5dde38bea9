"""How a stored picture is turned and mirrored to be shown: a container's display matrix.

Source: ISO/IEC 14496-12, 8.3.2 (the matrix of a track header), as FFmpeg hands it on for MP4, MOV,
Matroska and the display orientation SEI of H.264 and HEVC.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

# As the ffmpeg command does: within a degree of a quarter turn, it is a quarter turn.
_STRAIGHT_DEG = 1.0


def orient(picture: np.ndarray, matrix: bytes | None) -> np.ndarray:
    """A picture `[height, width, 3]` as its display matrix has it shown.

    matrix: nine native int32, row by row: a pixel (x right, y down) goes to (ax + cy, bx + dy)
      where the rows begin with (a, b) and (c, d); scale and place do not count. None changes
      nothing, and so does a matrix of rank below 2. The four turns by a quarter, mirrored or not,
      move pixels alone. Any other angle is drawn (bicubic) on black.
    """
    if matrix is None:
        return picture
    a, b, _, c, d = (float(value) for value in np.frombuffer(matrix, np.int32)[:5])
    if a * d - b * c == 0:
        return picture
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    clockwise = math.degrees(math.atan2(b, a))
    quarters = round(clockwise / 90)
    if mirrored:
        picture = picture[:, ::-1]
    if abs(clockwise - 90 * quarters) < _STRAIGHT_DEG:
        return np.rot90(picture, -quarters)
    image = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.rotate(-clockwise, Image.Resampling.BICUBIC, expand=True))
