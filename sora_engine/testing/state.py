"""What the shadow devices of a process have in common: which is current, what is pinned."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from sora_engine.testing.crossings import Trace


class Shadow:
    """The devices of one `shadow_device`, and what crossed to and from them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.trace = Trace()
        self._current = threading.local()
        self._pinned: dict[int, Tensor] = {}

    @property
    def current(self) -> int:
        """The current device of this thread."""
        return int(getattr(self._current, "index", 0))

    def exchange(self, index: int) -> int:
        """Make a device current; returns the one that was. A negative one changes nothing."""
        before = self.current
        if index >= self.count:
            raise RuntimeError(f"CUDA error: invalid device ordinal {index} of {self.count}")
        if index >= 0:
            self._current.index = index
        return before

    def place(self, device: Any) -> torch.device | None:
        """The shadow device that a device names; None for any other."""
        if device is None:
            return None
        named = torch.device(device)
        if named.type != "cuda":
            return None
        index = self.current if named.index is None else named.index
        if index >= self.count:
            raise RuntimeError(f"CUDA error: invalid device ordinal {index} of {self.count}")
        return torch.device("cuda", index)

    def pin(self, tensor: Tensor) -> Tensor:
        """A copy in memory that counts as pinned, for as long as the shadow lasts."""
        copy = tensor.clone()
        self._pinned[copy.untyped_storage().data_ptr()] = copy
        return copy

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned


ACTIVE: list[Shadow] = []


def active() -> Shadow:
    """The shadow whose turn it is."""
    if not ACTIVE:
        raise RuntimeError("a tensor of a shadow device is used outside of its shadow_device()")
    return ACTIVE[-1]
