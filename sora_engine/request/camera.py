"""The camera's path: a pose for every frame, from a file, from numbers, or from named moves.

A pose is a row of 19 numbers, as RealEstate10K's files and those of CameraCtrl (arXiv 2404.02101)
have it: a time, which is not read; focal lengths and middle of the picture as parts of its width
and height (fx, fy, cx, cy); two zeros; and 3 x 4 numbers that take points of the world to the
camera, whose axes point right, down and forward.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike, fspath
from os.path import exists
from pathlib import Path
from typing import Any

from sora_engine.errors import RequestError
from sora_engine.request.checks import finite, shown

COLUMNS = 19
MAX_FILE_BYTES = 32 << 20
MAX_SPEED = 1000
LENS = (0.532139961, 0.946026558, 0.5, 0.5)
"""fx, fy, cx, cy of a camera that moves by words: those of VideoX-Fun's own pose files."""
STEP = 1 / 54
"""How far a camera moves from frame to frame at speed 1, in the world's units."""
TURN = math.pi / 243
"""How far it rolls, in radians. Both are those of VideoX-Fun's pose files, 81 frames long."""

Matrix = tuple[tuple[float, ...], ...]
"""3 rows of 4: a rotation and a shift."""

_STILL: Matrix = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0))

MOVES = {
    "static": (0.0, 0.0, 0.0, 0.0),
    "pan left": (1.0, 0.0, 0.0, 0.0),
    "pan right": (-1.0, 0.0, 0.0, 0.0),
    "pan up": (0.0, 1.0, 0.0, 0.0),
    "pan down": (0.0, -1.0, 0.0, 0.0),
    "zoom in": (0.0, 0.0, -2.0, 0.0),
    "zoom out": (0.0, 0.0, 2.0, 0.0),
    "acw": (0.0, 0.0, 0.0, 1.0),
    "cw": (0.0, 0.0, 0.0, -1.0),
}
"""By name, in `STEP`s along x, y and z what the world does before the camera, and in `TURN`s how it
rolls: VideoX-Fun's `CAMERA`. A pan moves the camera sideways, a zoom moves it along its view.
(DiffSynth's directions shear the view in place of that, and its zooms are half as fast.)"""


@dataclass(frozen=True, slots=True)
class CameraPath:
    """Where the camera is at every frame of a video.

    poses: of each frame (fx, fy, cx, cy) and 12 numbers, row by row, that take the world to the
        camera.
    told: the moves, or the name of the file; "" for poses that were given as numbers.
    sha256: of the file or the numbers; "" for moves.
    left_over: how many poses were given beyond the video's end.
    """

    poses: tuple[tuple[float, ...], ...]
    told: str = ""
    sha256: str = ""
    left_over: int = 0

    def __str__(self) -> str:
        return self.told or f"{len(self.poses)} poses, sha256 {self.sha256[:12]}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "poses": [list(pose) for pose in self.poses],
            "told": self.told,
            "sha256": self.sha256,
            "left_over": self.left_over,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any] | None) -> CameraPath | None:
        """What `to_json` wrote; None as it is. Raises ValueError or TypeError for anything else."""
        if values is None:
            return None
        poses = tuple(map(tuple, values["poses"]))
        if not poses or any(len(pose) != 16 or not all(map(math.isfinite, pose)) for pose in poses):
            raise ValueError("a camera's poses are 16 finite numbers each")
        return cls(**{**values, "poses": poses})


def resolve_camera(camera: object, num_frames: int) -> CameraPath | None:
    """The path over a video of so many frames.

    camera: as `VideoRequest.camera`. Raises RequestError for moves that are none, a file that
    cannot be read, a row that is no pose, and for fewer poses than frames.
    """
    if camera is None:
        return None
    if isinstance(camera, str) and is_spoken(camera):
        return spoken_path([camera], num_frames)
    if isinstance(camera, (str, PathLike)):
        return _cut(*_read(Path(fspath(camera))), num_frames)
    rows = _rows(camera)
    if rows and all(isinstance(row, str) for row in rows):
        return spoken_path(rows, num_frames)
    poses = [_pose(f"camera's pose {i}", row) for i, row in enumerate(rows)]
    digest = hashlib.sha256(repr(poses).encode()).hexdigest()
    return _cut(poses, "camera", "", digest, num_frames)


def is_spoken(text: str) -> bool:
    """Whether a text begins like moves; any other one is a file's path."""
    first = re.split(r"[,+]", text)[0]
    name, _ = _speed(first)
    words = name.split()
    known = {word for move in MOVES for word in move.split()}
    return bool(words) and words[0] in known and not exists(text)


def spoken_path(legs: Sequence[str], num_frames: int) -> CameraPath:
    """The path of moves, one after the other, over shares of the time that are alike.

    legs: `"pan left"`, `"zoom in x0.5"` (half as fast), `"pan left + pan up"` (both at once); a
        comma stands between moves that follow each other. Motion within one is even, and goes on
        from where the one before has ended. Raises RequestError for what is no move.
    """
    moves = [_move(leg) for text in legs for leg in text.split(",")]
    if len(moves) > max(1, num_frames - 1):
        raise RequestError(
            f"camera has {len(moves)} moves, one after the other, and the video {num_frames} "
            f"frames; at most {max(1, num_frames - 1)} would work, or at once, as 'pan left + pan "
            "up'"
        )
    steps = num_frames - 1
    ends = [round(steps * (i + 1) / len(moves)) for i in range(len(moves))]
    matrices, at = [_STILL], _STILL
    for move, (begin, end) in zip(moves, pairwise([0, *ends]), strict=True):
        matrices += [_after(_moved(move, i), at) for i in range(1, end - begin + 1)]
        at = matrices[-1]
    told = ", ".join(" ".join(leg.split()) for text in legs for leg in text.split(","))
    return CameraPath(tuple((*LENS, *sum(m, ())) for m in matrices), told.lower())


def _move(text: str) -> tuple[float, ...]:
    """The sum of moves that are made at once."""
    total: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    for part in text.split("+"):
        name, speed = _speed(part)
        if speed > MAX_SPEED:
            raise RequestError(f"camera move {shown(part.strip())} is over x{MAX_SPEED}, the most")
        if name not in MOVES:
            raise RequestError(
                f"camera move {part.strip()!r} is none of {', '.join(MOVES)}; 'pan left x0.5' is "
                "half as fast, 'pan left + pan up' both at once, 'pan left, zoom in' one after the "
                "other; anything else is the path of a pose file"
            )
        total = tuple(a + speed * b for a, b in zip(total, MOVES[name], strict=True))
    return total


def _speed(text: str) -> tuple[str, float]:
    """A move's name and how fast it is: 'Pan Left x0.5'."""
    match = re.fullmatch(r"(.*?)(?:\s+[x×]\s*(\d+(?:\.\d+)?))?", " ".join(text.lower().split()))
    assert match is not None
    return match[1], 1.0 if match[2] is None else float(match[2])


def _moved(move: tuple[float, ...], steps: int) -> Matrix:
    """The world before the camera after so many frames of a move."""
    x, y, z = (STEP * steps * part for part in move[:3])
    cos, sin = math.cos(TURN * steps * move[3]), math.sin(TURN * steps * move[3])
    return ((cos, -sin, 0.0, x), (sin, cos, 0.0, y), (0.0, 0.0, 1.0, z))


def _after(second: Matrix, first: Matrix) -> Matrix:
    """One after the other: `second @ first`, as 4 x 4."""
    columns = list(zip(*first, strict=True))
    return tuple(
        tuple(
            sum(a * b for a, b in zip(row[:3], column, strict=True)) + (row[3] if i == 3 else 0.0)
            for i, column in enumerate(columns)
        )
        for row in second
    )


def _rows(camera: object) -> list[Any]:
    """Moves or poses out of a list, a tuple, or an array of two dimensions."""
    rows = camera.tolist() if hasattr(camera, "tolist") else camera
    if not isinstance(rows, (list, tuple)) or not rows:
        raise RequestError(
            "camera must be the path of a pose file, moves such as 'pan left, zoom in', or rows of "
            f"{COLUMNS} numbers, got {shown(camera)}"
        )
    return list(rows)


def _read(path: Path) -> tuple[list[tuple[float, ...]], str, str, str]:
    """The poses of a file, and what it is called. The first line may be anything: a link to the
    video, or nothing."""
    try:
        size = path.stat().st_size
        if not path.is_file():  # a pipe would be waited for
            raise OSError("it is no regular file")
        if size > MAX_FILE_BYTES:
            raise RequestError(f"camera file {path} has over {MAX_FILE_BYTES} bytes: no poses")
        data = path.read_bytes()
        lines = data.decode().splitlines()
    except (OSError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(
            f"camera {shown(str(path))} is no move ({', '.join(MOVES)}) and cannot be read as a "
            f"pose file: {error}"
        ) from error
    poses = []
    for number, line in enumerate(lines, 1):
        columns = line.split()
        if not columns or (number == 1 and not _are_numbers(columns)):
            continue
        poses.append(_pose(f"camera file {path}, line {number}", columns))
    return poses, f"camera file {path}", path.name, hashlib.sha256(data).hexdigest()


def _are_numbers(columns: Sequence[str]) -> bool:
    try:
        return len(columns) > 1 and all(math.isfinite(float(column)) for column in columns)
    except ValueError:
        return False


def _pose(where: str, row: object) -> tuple[float, ...]:
    """A row as it is kept. Raises RequestError."""
    if not isinstance(row, (list, tuple)) or len(row) != COLUMNS:
        got = f"{len(row)} numbers" if isinstance(row, (list, tuple)) else shown(row)
        raise RequestError(
            f"{where} has {got}; a pose has {COLUMNS}: a time, fx, fy, cx, cy, two zeros, and 3 x "
            "4 that take the world to the camera"
        )
    try:
        numbers = [float(x) if isinstance(x, str) else x for x in row]
    except ValueError as error:
        raise RequestError(f"{where}: {error}") from None
    lens = tuple(finite(where, x, None) for x in numbers[1:5])
    if lens[0] <= 0 or lens[1] <= 0:
        raise RequestError(f"{where}: fx {lens[0]:g} and fy {lens[1]:g} must be over 0")
    matrix = tuple(finite(where, x, None) for x in numbers[7:])
    (a, b, c, _), (d, e, f, _), (g, h, i, _) = (matrix[at : at + 4] for at in (0, 4, 8))
    volume = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
    if not 0.5 < volume < 2:
        raise RequestError(
            f"{where}: its 3 x 3 numbers are no rotation: their determinant is {volume:g}, not 1"
        )
    return (*lens, *matrix)


def _cut(
    poses: Sequence[tuple[float, ...]], where: str, told: str, sha256: str, num_frames: int
) -> CameraPath:
    if len(poses) < num_frames:
        raise RequestError(
            f"{where} has {len(poses)} poses, and the video {num_frames} frames; "
            + (f"num_frames={len(poses)} would work" if poses else "a pose for each would work")
        )
    return CameraPath(tuple(poses[:num_frames]), told, sha256, len(poses) - num_frames)
