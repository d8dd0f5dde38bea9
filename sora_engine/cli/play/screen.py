"""Frames on a terminal: half blocks in 24-bit colour, and no more of them than have changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

UPPER = "▀"
"""The upper half of a cell in the foreground's colour, the lower in the background's."""
BEGIN, END = "\x1b[?2026h", "\x1b[?2026l"
"""Around what a terminal is to show at once, if it knows of that."""
HELP_ROWS = 12
"""Rows of a window below which the line of keys gives way to the picture."""
LEAST_COLUMNS, LEAST_ROWS = 8, 4


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a picture lies in a window.

    columns, rows: of the window, in cells. height, width: of the picture as it is shown, in
    pixels: two to a cell, one over the other; the height is even. top, left: its first cell, from
    0. lines: those below it, for text.
    """

    columns: int
    rows: int
    height: int
    width: int
    top: int
    left: int
    lines: int

    @classmethod
    def of(cls, columns: int, rows: int, height: int, width: int) -> Layout:
        """The largest picture of `[height, width]` pixels that fits: whole multiples of its size,
        where it fits at all, and else what fits."""
        columns, rows = max(columns, LEAST_COLUMNS), max(rows, LEAST_ROWS)
        lines = 2 if rows >= HELP_ROWS else 1
        room = 2 * (rows - lines)
        scale = min(columns / width, room / height)
        if scale >= 1:
            scale = int(scale)
        shown_height = max(2, min(room, round(height * scale)))
        shown_height += shown_height % 2
        shown_width = max(1, min(columns, round(width * scale)))
        return cls(
            columns=columns,
            rows=rows,
            height=shown_height,
            width=shown_width,
            top=(rows - lines - shown_height // 2) // 2,
            left=(columns - shown_width) // 2,
            lines=lines,
        )


class Screen:
    """Turns frames and lines of text into what a terminal is to be sent."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._cells: np.ndarray | None = None
        self._texts: dict[int, str] = {}

    def cleared(self) -> str:
        """An empty window; all that comes next is drawn anew."""
        self._cells = None
        self._texts.clear()
        return "\x1b[0m\x1b[2J"

    def drawn(self, frame: np.ndarray) -> str:
        """A frame, uint8 `[height, width, 3]`: the cells that differ from the last one's."""
        cells = cells_of(frame, self.layout)
        if self._cells is None:
            changed = np.ones(cells.shape[:2], dtype=bool)
        else:
            changed = (cells != self._cells).any(axis=-1)
        self._cells = cells
        return "".join(self._runs(cells, changed))

    def texts(self, lines: list[str]) -> str:
        """Lines below the picture, cut to the window, as far as they differ from those there."""
        layout, sent = self.layout, []
        for i, line in enumerate(lines[: layout.lines]):
            row = layout.rows - layout.lines + i
            shown = cut(line, layout.columns - 1)  # the last cell of a window scrolls it
            if self._texts.get(row) != shown:
                self._texts[row] = shown
                sent.append(f"\x1b[{row + 1};1H\x1b[0m{shown}\x1b[K")
        return "".join(sent)

    def _runs(self, cells: np.ndarray, changed: np.ndarray) -> Iterator[str]:
        """What draws the changed cells: neighbours of one colour together."""
        if not changed.any():
            return
        layout = self.layout
        rows, columns = np.nonzero(changed)
        own = cells[rows, columns].astype(np.int64)
        colours = own @ np.array([1 << 40, 1 << 32, 1 << 24, 1 << 16, 1 << 8, 1])
        starts = np.ones(len(rows), dtype=bool)
        beside = (rows[1:] == rows[:-1]) & (columns[1:] == columns[:-1] + 1)
        starts[1:] = ~beside | (colours[1:] != colours[:-1])
        moves = np.ones(len(rows), dtype=bool)
        moves[1:] = ~beside
        first = np.flatnonzero(starts)
        lengths = np.diff(np.append(first, len(rows)))
        foreground = background = None
        for at, length in zip(first.tolist(), lengths.tolist(), strict=True):
            if moves[at]:
                yield f"\x1b[{layout.top + rows[at] + 1};{layout.left + columns[at] + 1}H"
            upper, lower = tuple(own[at, :3].tolist()), tuple(own[at, 3:].tolist())
            codes = []
            if upper != lower and upper != foreground:
                foreground = upper
                codes.append("38;2;{};{};{}".format(*upper))
            if lower != background:
                background = lower
                codes.append("48;2;{};{};{}".format(*lower))
            if codes:
                yield f"\x1b[{';'.join(codes)}m"
            yield (" " if upper == lower else UPPER) * length


def cut(line: str, width: int) -> str:
    """What fits of a line: whole parts of it, where it has parts."""
    if len(line) <= width:
        return line
    whole = max(line.rfind(end, 0, width + len(end)) for end in (" | ", ", "))
    return line[:whole] if whole > 0 else line[:width]


def cells_of(frame: np.ndarray, layout: Layout) -> np.ndarray:
    """The colours of each cell, upper and lower: uint8 `[rows, columns, 6]`."""
    height, width = frame.shape[:2]
    shown = (layout.height, layout.width)
    if shown[0] % height == 0 and shown[1] % width == 0:
        sized = frame.repeat(shown[0] // height, axis=0).repeat(shown[1] // width, axis=1)
    else:
        from PIL import Image

        # Means of what falls together; an odd height has a row more.
        method = Image.Resampling.BOX if shown[0] < height else Image.Resampling.NEAREST
        picture = Image.fromarray(np.ascontiguousarray(frame))
        sized = np.asarray(picture.resize((shown[1], shown[0]), method))
    return np.concatenate([sized[0::2], sized[1::2]], axis=-1)
