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
COMPILES_ALONE = "flex"
"""A backend, an op's last argument, that compiles by torch.compile: one thread at a time may."""

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

    threads: that compile at a time (default: the machine's cores, up to 16); 1 is the caller's own.
    Returns the number of calls; what one raises is raised.
    """
    pending = list(calls)

    def make(noted: Noted) -> None:
        function, args = noted
        with torch.inference_mode():
            function(*_on_device(function, args, device))

    alone = [noted for noted in pending if noted[1][-1:] == (COMPILES_ALONE,)]
    together = [noted for noted in pending if noted[1][-1:] != (COMPILES_ALONE,)]
    count = min(threads or os.cpu_count() or 1, MOST_THREADS, len(together))
    if count > 1:
        with ThreadPoolExecutor(count, "sora-warm-up") as pool:
            list(pool.map(make, together))
    else:
        alone += together
    for noted in alone:
        make(noted)
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.synchronize(device)
    return len(pending)


def _on_device(function: Any, args: tuple[Any, ...], device: torch.device) -> Sequence[Any]:
    """The arguments with zeros in the place of tensors, and offsets that segments could have."""

    def zeros(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return made.zero_()

    made = [tree_map(zeros, value) for value in args]
    names = [argument.name for argument in function._schema.arguments] if made else []
    at = {name: i for i, name in enumerate(names)}
    for side, tokens in (("q", "q"), ("k", "k")):
        offsets, most = at.get(f"cu_seqlens_{side}"), at.get(f"max_seqlen_{side}")
        if offsets is not None and most is not None:
            # As many segments, none longer than the longest, that hold all tokens.
            count, held = args[offsets].shape[0], args[at[tokens]].shape[0]
            made[offsets] = (torch.arange(count) * args[most]).clamp(max=held).to(made[offsets])
    return made
