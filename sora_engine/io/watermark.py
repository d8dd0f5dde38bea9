"""A mark in the pixels that is hard to see: 16 bits, by spread-transform dither modulation.

The picture is cut into 24 x 40 cells, whatever its size. Twenty-four cells, scattered by a key,
carry each bit: their mean luma, summed with signs of the key, is moved to the nearest point of a
lattice, and the bit says which of two lattices. Each frame carries all bits, and a reader takes the
vote of many frames.

The method is quantisation index modulation with a spread transform: Chen and Wornell, "Quantization
Index Modulation", IEEE Trans. Information Theory 47(4), 2001, section V.B.

It outlives compression and changes of size. Crops, turns and mirrors break it, and who knows the
key can remove it: it says "made here", and is no defence against an attacker.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sora_engine.errors import MediaError

BITS = 16
ROWS, COLUMNS = 24, 40
LEAST_ROWS = 256
"""Frames of fewer rows are not marked unless asked for: their cells are a few pixels."""
MODES = ("auto", "on", "off")

PAYLOAD = 0x50AE
"""What says no more than that this engine made it."""
KEY = b"sora_engine"
SPACING = 35.0
"""Of a bit's lattice, in levels of luma of the normalised sum: about 45 dB."""
# Fewer cells are moved further for the same error, and encoders drop what is less than a level or
# two of a moving block. With 60 cells a bit, 1 of 48 bits was lost at crf 28 at the same error.
_CELLS = 24
_MOST = 9
"""By how many levels a cell is moved at most."""
_ROUNDS = 3
_BT709 = np.array([0.2126, 0.7152, 0.0722])
_CHANCE = 1e-4
"""A mark is believed where fewer unmarked clips than this would look so."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a clip carries.

    payload: the 16 bits that were read, as four hex digits. They are read of any clip.
    agreeing: how many of them are those that were expected.
    chance: at most this share of unmarked clips looks so.
    frames: how many had a vote.
    """

    payload: str
    agreeing: int
    chance: float
    frames: int

    @property
    def marked(self) -> bool:
        """Whether that is no accident."""
        return self.chance < _CHANCE

    @property
    def confidence(self) -> float:
        """1 less the chance."""
        return 1 - self.chance


def wanted(mode: str, rows: int, signed: bool) -> bool:
    """Whether frames of so many rows are marked. `"auto"`: where the result is signed, and has 256
    rows or more. Raises MediaError for another mode than `"on"` and `"off"` besides."""
    if mode not in MODES:
        raise MediaError(f"watermark {mode!r}: auto, on or off would work")
    return mode == "on" or (mode == "auto" and signed and rows >= LEAST_ROWS)


class Watermark:
    """Writes and reads one payload under one key.

    payload: 0 to 65535, such as the number of a server. key: who has it can read the mark, and
    forge it. The default is everyone's. strength: 0.5 to 1, how much of the way to its lattice each
    sum is moved. Less is harder to see, and lost sooner: benchmarks/watermark.py says how soon.
    """

    def __init__(self, payload: int = PAYLOAD, key: bytes = KEY, *, strength: float = 1.0) -> None:
        if (
            isinstance(payload, bool)
            or not isinstance(payload, int)
            or not 0 <= payload < 1 << BITS
        ):
            raise MediaError(f"a watermark's payload is a number from 0 to 65535, got {payload!r}")
        if not 0.5 <= strength <= 1:
            raise MediaError(f"a watermark's strength is from 0.5 to 1, got {strength!r}")
        self.payload, self.strength = f"{payload:04x}", strength
        self._code = _Code(key)
        self._bits = payload >> np.arange(BITS - 1, -1, -1) & 1
        self._offsets = self._code.dither + self._bits * SPACING / 2

    def embed(self, frame: np.ndarray) -> np.ndarray:
        """The frame with the mark: uint8 [height, width, 3], of 24 rows and 40 columns or more.

        Each cell is moved by a whole number of levels, the same in all three colours, so nothing is
        dithered. Raises MediaError for a smaller frame.
        """
        _check_size(frame)
        code, marked = self._code, frame
        sums = code.project(frame)
        nearest = self._offsets + SPACING * np.round((sums - self._offsets) / SPACING)
        target = sums + self.strength * (nearest - sums)
        moves = np.zeros(ROWS * COLUMNS)
        # Cells of black or white cannot be moved as asked, and others then take their share.
        room = np.ones((BITS, _CELLS))
        for _ in range(_ROUNDS):
            missing = target - sums
            if np.abs(missing).max() < SPACING / 32:
                break
            moves[code.cells] = np.clip(
                moves[code.cells] + code.share(missing, room), -_MOST, _MOST
            )
            marked = _moved(frame, moves.reshape(ROWS, COLUMNS))
            before, sums = sums, code.project(marked)
            stuck = np.abs(sums - before) < np.abs(missing) / 2
            means = _means(marked).ravel()[code.cells]
            wanted = np.sign(target - sums)[:, None] * code.signs
            limit = np.where(wanted > 0, 255 - means, means) < _MOST
            room = np.where(stuck[:, None] & limit, 0.05, 1.0)
        return marked

    def read(self, frames: Iterable[np.ndarray]) -> Found:
        """What frames carry, each uint8 [height, width, 3], and whether it is this payload.

        The chance is that of the likeliest of three tests, times three: the number of bits that
        agree; how near the sums are to this payload's lattices; and to those of any payload.
        """
        sums = []
        for frame in frames:
            _check_size(frame)
            sums.append(self._code.project(frame))
        if not sums:
            raise MediaError("a watermark is read from at least one frame")
        phases = 2 * math.pi / SPACING * (np.stack(sums) - self._code.dither)
        votes = np.cos(phases).mean(0)
        read = (votes < 0).astype(int)
        agreeing = int((read == self._bits).sum())
        by_count = sum(math.comb(BITS, n) for n in range(agreeing, BITS + 1)) / 2**BITS
        nearness = float((votes * (1 - 2 * self._bits)).mean())
        # Twice a phase is 0 on either lattice, whatever the bit.
        of_any = float(np.cos(2 * phases).mean())
        chance = min(1.0, 3 * min(by_count, _tail(nearness), _tail(of_any)))
        payload = int(read @ (1 << np.arange(BITS - 1, -1, -1)))
        return Found(f"{payload:04x}", agreeing, chance, len(sums))


class _Code:
    """What a key says: which cells carry each bit, with which signs, and where its lattice lies."""

    def __init__(self, key: bytes) -> None:
        seed = int.from_bytes(hashlib.sha256(b"watermark 1:" + key).digest(), "big")
        random = np.random.Generator(np.random.Philox(key=seed % (1 << 128)))
        self.cells = random.permutation(ROWS * COLUMNS)[: BITS * _CELLS].reshape(BITS, _CELLS)
        # As many of either sign: brightness as a whole tells nothing.
        halves = np.repeat([1.0, -1.0], _CELLS // 2)
        self.signs = np.stack([random.permutation(halves) for _ in range(BITS)])
        # Spread over a lattice evenly, so that a picture of one colour looks like no mark.
        self.dither = random.permutation(BITS) * (SPACING / 2 / BITS) + SPACING / 4 / BITS

    def project(self, frame: np.ndarray) -> np.ndarray:
        """The 16 sums of a frame, in levels of luma times the root of the number of cells."""
        return (_means(frame).ravel()[self.cells] * self.signs).sum(1) / math.sqrt(_CELLS)

    def share(self, missing: np.ndarray, room: np.ndarray) -> np.ndarray:
        """By how many whole levels each cell moves, [16, 60], for sums to change by `missing`."""
        part = room / room.sum(1, keepdims=True) * _CELLS
        wanted = missing[:, None] / math.sqrt(_CELLS) * part
        # Each cell is rounded at a place of its own, so that their sum is right to half a level,
        # and that few cells change where the sum changes little from frame to frame.
        places = (np.arange(_CELLS) + 0.5) / _CELLS
        return np.floor(wanted + places) * self.signs


def _tail(score: float) -> float:
    """At most the probability that the mean cosine of 16 uniform phases is so large.

    Chernoff's bound: the moments of the cosine of a uniform phase are the Bessel function I0.
    Frames of one clip are no independent draws, so all of them count as one.
    """
    if score <= 0:
        return 1.0
    at = np.linspace(0, 60, 2401)
    return math.exp(BITS * float((np.log(np.i0(at)) - at * min(score, 1.0)).min()))


def _means(frame: np.ndarray) -> np.ndarray:
    """Mean luma of each cell, [24, 40], of uint8 [height, width, 3]."""
    height, width = frame.shape[:2]
    rows, columns = _edges(height, ROWS), _edges(width, COLUMNS)
    sums = np.add.reduceat(frame, rows[:-1], axis=0, dtype=np.uint32)
    sums = np.add.reduceat(sums, columns[:-1], axis=1)
    return sums @ _BT709 / np.outer(np.diff(rows), np.diff(columns))


def _moved(frame: np.ndarray, moves: np.ndarray) -> np.ndarray:
    """A frame whose cells are lighter or darker by whole levels [24, 40], with soft edges: on a
    smooth ground a step of three levels is seen, and three steps of one are not."""
    height, width = frame.shape[:2]
    spread = _blend(height, ROWS) @ moves.astype(np.float32) @ _blend(width, COLUMNS).T
    return np.clip(frame + np.rint(spread).astype(np.int16)[..., None], 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=16)
def _blend(size: int, count: int) -> np.ndarray:
    """How much of each cell is in each row or column, float32 [size, count]: a quarter of a cell to
    either side of an edge, one passes into the other."""
    edges = _edges(size, count)
    blend = np.zeros((size, count), np.float32)
    reach = int(size / count / 4)
    box = np.ones(2 * reach + 1) / (2 * reach + 1)
    for cell in range(count):
        inside = np.zeros(size + 2 * reach)
        first, last = edges[cell] + reach, edges[cell + 1] + reach
        # Beyond the picture there is more of the outermost cells.
        inside[first if cell else 0 : last if cell < count - 1 else len(inside)] = 1
        blend[:, cell] = np.convolve(inside, box, "valid")
    return blend


def _edges(size: int, count: int) -> np.ndarray:
    return np.round(np.arange(count + 1) * (size / count)).astype(np.intp)


def _check_size(frame: np.ndarray) -> None:
    height, width = frame.shape[:2]
    if height < ROWS or width < COLUMNS:
        raise MediaError(f"{width}x{height}: a watermark needs {COLUMNS}x{ROWS} pixels and more")
