"""Embeddings of texts that were encoded, for the next request with the same ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from torch import Tensor


class KeptTexts:
    """Embeddings by what was encoded, within a bound of bytes; those unused for longest go first.

    Each is as it was computed, so a request gets the same bits with it as without. For one thread.
    """

    def __init__(self, capacity: int = 0) -> None:
        self._capacity = self._room = capacity
        self._kept: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._nbytes = 0

    @property
    def capacity(self) -> int:
        """The most bytes that are kept; 0: none, and nobody needs to ask."""
        return self._capacity

    @property
    def nbytes(self) -> int:
        """What is kept."""
        return self._nbytes

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> Tensor | None:
        """An embedding; None where it is not kept, or not any more."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: Hashable, embedding: Tensor) -> None:
        """Keep an embedding, where there is room for it."""
        size = embedding.untyped_storage().nbytes()
        if key in self._kept or size > self._room:
            return
        self._make_room(self._room - size)
        self._kept[key] = embedding
        self._nbytes += size

    def bound(self, capacity: int) -> None:
        """Keep at most so many bytes from now on."""
        self._capacity = self._room = capacity
        self._make_room(capacity)

    def give_way(self, room: int) -> None:
        """So many bytes are to be had until this is called again; the bound stays."""
        self._room = max(0, min(self._capacity, room))
        self._make_room(self._room)

    def _make_room(self, size: int) -> None:
        while self._nbytes > size:
            _, embedding = self._kept.popitem(last=False)
            self._nbytes -= embedding.untyped_storage().nbytes()
