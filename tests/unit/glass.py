"""A terminal's glass: reads what a program sends, and knows what stands on it."""

from __future__ import annotations

import re

import numpy as np

_TOKEN = re.compile(r"\x1b\[([?<>=]?)([0-9;]*)([@-~])|(.)", re.DOTALL)
BLACK = (0, 0, 0)


class Glass:
    """Cells of a window, by their row and column: a character and its two colours.

    pictures: what stood on it each time the program said that it is to be shown (the end of a
    synchronised update), as cells. modes: private ones that are set.
    """

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.pictures: list[tuple[list[list[str]], np.ndarray]] = []
        self.modes: set[str] = set()
        self.sent = ""
        self._rest = ""
        self._drawing = False
        self._row = self._column = 0
        self._colours = [BLACK, BLACK]
        self.clear()

    def clear(self) -> None:
        """Nothing stands on it."""
        self.characters = [[" "] * self.columns for _ in range(self.rows)]
        self.colours = np.zeros((self.rows, self.columns, 2, 3), dtype=np.uint8)

    def write(self, text: str) -> None:
        """What the program sends; a sequence may come in pieces."""
        self.sent += text
        text, self._rest = self._rest + text, ""
        start = text.rfind("\x1b")
        if start >= 0 and not re.match(r"\x1b\[[?<>=]?[0-9;]*[@-~]", text[start:]):
            text, self._rest = text[:start], text[start:]
        for private, parameters, final, character in _TOKEN.findall(text):
            if character:
                self._put(character)
            else:
                self._obey(private, parameters, final)

    def _put(self, character: str) -> None:
        if character == "\r":
            self._column = 0
        elif character == "\n":
            self._down()
        else:
            if self._column == self.columns:
                assert not self._drawing, "a line runs over the edge"
                self._column = 0
                self._down()
            self.characters[self._row][self._column] = character
            self.colours[self._row, self._column] = self._colours
            self._column += 1

    def _down(self) -> None:
        """To the next row; at the last one everything moves up."""
        self._row += 1
        if self._row == self.rows:
            assert not self._drawing, "the picture is moved up"
            self._row -= 1
            self.characters = [*self.characters[1:], [" "] * self.columns]
            self.colours = np.roll(self.colours, -1, axis=0)
            self.colours[-1] = 0

    def _obey(self, private: str, parameters: str, final: str) -> None:
        if private:
            if private == "?" and final == "h":
                self.modes.add(parameters)
                self._drawing |= parameters == "1049"
            if private == "?" and final == "l":
                self.modes.discard(parameters)
                self._drawing &= parameters != "1049"
                if parameters == "2026":
                    rows = [list(row) for row in self.characters]
                    self.pictures.append((rows, self.colours.copy()))
            return
        numbers = [int(number or 0) for number in parameters.split(";")]
        if final == "H":
            self._row, self._column = (max(1, number) - 1 for number in [*numbers, 1][:2])
            assert self._row < self.rows
        elif final == "J":
            self.clear()
        elif final == "K":
            for column in range(self._column, self.columns):
                self.characters[self._row][column] = " "
                self.colours[self._row, column] = BLACK
        elif final == "m":
            while numbers:
                kind = numbers.pop(0)
                if kind == 0:
                    self._colours = [BLACK, BLACK]
                else:
                    two, *colour = numbers[:4]
                    assert kind in (38, 48)
                    assert two == 2
                    self._colours[kind == 48] = tuple(colour)
                    numbers = numbers[4:]
        else:
            raise AssertionError(f"an unknown sequence ends with {final!r}")


def lines_of(picture: tuple[list[list[str]], np.ndarray]) -> list[str]:
    """The text of a picture, row by row."""
    return ["".join(row).rstrip() for row in picture[0]]


def pixels_of(
    picture: tuple[list[list[str]], np.ndarray], top: int, left: int, height: int, width: int
) -> np.ndarray:
    """The pixels of half blocks: uint8 `[height, width, 3]`."""
    characters, colours = picture
    found = np.zeros((height, width, 3), dtype=np.uint8)
    for row in range(height // 2):
        for column in range(width):
            upper, lower = colours[top + row, left + column]
            character = characters[top + row][left + column]
            assert character in "▀ ", character
            found[2 * row, column] = upper if character == "▀" else lower
            found[2 * row + 1, column] = lower
    return found
