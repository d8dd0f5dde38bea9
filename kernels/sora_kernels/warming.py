"""Kernels compiled before they are needed: the calls of a rehearsal, made once on the device.

A Triton kernel is compiled when it is first launched, which takes a second or more. What a kernel
is compiled for are dtypes, widths and flags; sizes that differ between requests are no part of it
(`do_not_specialize`). So a small rehearsal has all that later requests need.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

MOST_THREADS = 16

Noted = tuple[Callable[..., Any], tuple[Any, ...]]


class Notes(TorchDispatchMode):
    """While it lasts, notes the calls of `torch.ops.sora.*`, each of one kind once.

    Of two calls with the same dtypes, shapes and other arguments the first is kept, with what it
    was called with: on meta tensors that holds no memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: dict[Any, Noted] = {}

    @property
    def calls(self) -> Sequence[Noted]:
        return [*self._calls.values()]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "sora":
            self._calls.setdefault((func, str(tree_map(_kind, args))), (func, args))
        return func(*args, **(kwargs or {}))


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.stride()
    return value


def warm_up(calls: Iterable[Noted], device: torch.device, threads: int | None = None) -> int:
    """Make the calls on a device, on zeros of their shapes, so that their kernels are compiled.

    Segments of zero offsets are empty, so the offsets are valid whatever the shapes. threads: that
    compile at a time (default: the machine's cores, up to 16); 1 is the caller's own. Returns the
    number of calls; what one raises is raised.
    """
    pending = list(calls)
    count = min(threads or os.cpu_count() or 1, MOST_THREADS, len(pending))

    def make(noted: Noted) -> None:
        function, args = noted
        with torch.inference_mode():
            function(*tree_map(lambda value: _zeros(value, device), args))

    if count <= 1:
        for noted in pending:
            make(noted)
    else:
        with ThreadPoolExecutor(count, "sora-warm-up") as pool:
            list(pool.map(make, pending))
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.synchronize(device)
    return len(pending)


def _zeros(value: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor):
        return value
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return made.zero_()
