"""Where the pages that were given end: who deletes what it lists goes on from there too."""

from __future__ import annotations

from collections import OrderedDict

MOST = 10_000
"""Pages that are remembered. Those of an earlier server are not: there a deleted end is a 400."""


class Cursors:
    """The place in the list of each id that ended a page. For the loop's thread alone."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._numbers: OrderedDict[tuple[str, str], int] = OrderedDict()

    def gave(self, owner: str, name: str, number: int) -> None:
        """A page ended with this job."""
        self._numbers[owner, name] = number
        self._numbers.move_to_end((owner, name))
        if len(self._numbers) > self._most:
            self._numbers.popitem(last=False)

    def number(self, owner: str, name: str) -> int | None:
        """The place of a page's end, whether or not the job is still there."""
        return self._numbers.get((owner, name))
