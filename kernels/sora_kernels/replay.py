"""Calls like one before are launched again without being looked at again.

A model makes the same few calls in each of its layers and steps: only addresses differ. Checks, the
choice of a backend, and Triton's own binding of some twenty arguments take the host longer than a
small kernel takes the device. So the first call of its kind is watched. Where all it does is to
allocate its results and to launch Triton's kernels on its operands and on those, the compiled
kernels are kept by all that the call depends on, and later ones are launched by hand.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

MOST_KINDS = 1024
"""Kinds of calls that an op remembers; sizes of requests make more of them in the end."""

Kind = tuple[Any, ...]

_PLAIN = frozenset((Tensor, nn.Parameter))
_ALLOCATIONS = frozenset(
    f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "detach")
)
_watching = threading.local()
_EVERY: list[dict[Any, Any]] = []


def forget() -> None:
    """Look at each call again, as launch parameters or devices are others now."""
    for known in _EVERY:
        known.clear()


@functools.cache
def unread(dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of one element, for a kernel's parameter that it does not read."""
    return torch.empty(1, dtype=dtype, device=device)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """`kernel[grid](*arguments, **constants)`, so that calls like it can be launched again.

    arguments: all that the kernel takes at run time, in order; constants: its constexprs, by name,
    and the options of Triton's compiler.
    """
    compiled = kernel[grid](*arguments, **constants)
    watch: _Watch | None = getattr(_watching, "now", None)
    if watch is not None:
        names = kernel.arg_names[len(arguments) :]
        values = (*arguments, *(constants[name] for name in names))
        watch.launches.append((compiled, grid, values))


class _Watch(TorchDispatchMode):
    """Sees what a call does: its launches, and whether torch computes anything beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[Any, tuple[int, ...], tuple[Any, ...]]] = []
        self.only_launches = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if not func.is_view and func._schema.name not in _ALLOCATIONS:
            self.only_launches = False
        return func(*args, **(kwargs or {}))

    @contextmanager
    def watching(self) -> Any:
        _watching.now = self
        try:
            with self:
                yield
        finally:
            _watching.now = None


class _Launch:
    """A compiled kernel, and where its arguments come from: from the tensors of a call, or from
    what is the same in all of them."""

    def __init__(self, compiled: Any, grid: tuple[int, ...], values: Sequence[Any]) -> None:
        self._run = compiled.run
        self._head = *(*grid, 1, 1)[:3], compiled.function, compiled.packed_metadata
        self._values = values
        self._same: list[Any] = []
        self._descriptors: list[tuple[int, Any]] = []
        self._pick: Callable[[tuple[Any, ...]], tuple[Any, ...]]

    def settle(self, tensors: Sequence[Tensor | None]) -> bool:
        """Find where the values come from; False where one is none of `tensors`."""
        at = {id(tensor): i for i, tensor in enumerate(tensors) if tensor is not None}
        described = [value for value in self._values if hasattr(value, "block_shape")]
        if any(id(value.base) not in at for value in described):
            return False
        self._descriptors = [(at[id(v.base)], _rebased(v, None)) for v in described]
        places: list[int] = []
        for value in self._values:
            if isinstance(value, Tensor) and id(value) in at:
                places.append(at[id(value)])
            elif hasattr(value, "block_shape"):
                places.append(len(tensors) + [v is value for v in described].index(True))
            elif isinstance(value, Tensor) and value is not unread(value.dtype, value.device):
                return False
            else:
                places.append(len(tensors) + len(described) + len(self._same))
                self._same.append(value)
        self._pick, self._values = itemgetter(*places), ()  # no tensor of this call is kept
        return True

    def __call__(self, tensors: tuple[Any, ...], stream: int) -> None:
        described = [_rebased(like, tensors[i]) for i, like in self._descriptors]
        values = self._pick((*tensors, *described, *self._same))
        x, y, z, function, packed = self._head
        self._run(x, y, z, stream, function, packed, None, None, None, *values)


def _rebased(descriptor: Any, base: Tensor | None) -> Any:
    """A tensor descriptor of another tensor of the same kind, without checking it again."""
    made = object.__new__(type(descriptor))
    made.__dict__.update(descriptor.__dict__)
    made.base = base
    return made


class _Replay:
    """A call as it was seen: results to allocate, kernels to launch."""

    def __init__(self, made: Sequence[Tensor], launches: Sequence[_Launch], single: bool) -> None:
        self._made = [(result.shape, result.dtype, result.device) for result in made]
        # One that holds nothing need not be another one each time.
        self._empty = [None if result.numel() else result for result in made]
        self._launches, self._single = launches, single

    def __call__(self, arguments: tuple[Any, ...], stream: int) -> Any:
        results = tuple(
            [
                torch.empty(shape, dtype=dtype, device=device) if empty is None else empty
                for (shape, dtype, device), empty in zip(self._made, self._empty, strict=True)
            ]
        )
        tensors = arguments + results
        for one in self._launches:
            one(tensors, stream)
        return results[0] if self._single else results


def _seen(arguments: tuple[Any, ...], results: Any, watch: _Watch) -> _Replay | None:
    """What a watched call did, or None where that is more than to launch."""
    single = isinstance(results, Tensor)
    made: list[Tensor] = [results] if single else list(results)
    given = {id(argument) for argument in arguments}
    fresh = all(id(tensor) not in given and tensor.is_contiguous() for tensor in made)
    launched = watch.launches and all(compiled is not None for compiled, _, _ in watch.launches)
    if not (watch.only_launches and launched and fresh):
        return None
    tensors = [x if isinstance(x, Tensor) else None for x in (*arguments, *made)]
    launches = [_Launch(*one) for one in watch.launches]
    if not all(one.settle(tensors) for one in launches):
        return None
    return _Replay(made, launches, single)


class Replayed:
    """An op's `run` for tensors of a card, which launches what it knows.

    run: takes what the op's schema takes, tensors of the current device; its results follow from
        the arguments' metadata, from their alignment and from what is no tensor.
    """

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run
        self._known: dict[Kind, _Replay | None] = {}
        _EVERY.append(self._known)

    def __call__(self, kind: Kind, arguments: tuple[Any, ...]) -> Any:
        """The call's results. kind: `kind_of(arguments)`."""
        replay = self._known.get(kind, self)
        if isinstance(replay, _Replay) and not _hooked():
            active = _active_driver()
            return replay(arguments, active.get_current_stream(active.get_current_device()))
        if replay is not self:
            return self._run(*arguments)
        watch = _Watch()
        with watch.watching():
            results = self._run(*arguments)
        if len(self._known) >= MOST_KINDS:
            self._known.clear()
        self._known[kind] = _seen(arguments, results, watch)
        return results


def kind_of(arguments: tuple[Any, ...]) -> Kind | None:
    """All that a call depends on but for addresses: of tensors their shape, strides, dtype, device
    and where they begin within 16 bytes. None where one is no plain tensor, or a list."""
    kind: list[Any] = []
    for value in arguments:
        if type(value) in _PLAIN:
            kind += (value.shape, value.stride(), value.dtype)
            kind += (value.get_device(), value.data_ptr() % 16)
        elif isinstance(value, (Tensor, list)):
            return None
        else:
            kind.append(value)
    return tuple(kind)


def unobserved() -> bool:
    """Whether neither a mode nor a profiler looks on."""
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._autograd._profiler_enabled()
    )


@functools.cache
def _triton() -> tuple[Any, Any]:
    from triton import knobs
    from triton.runtime import driver

    return driver, knobs.runtime


def _active_driver() -> Any:
    return _triton()[0].active


def _hooked() -> bool:
    """Whether a profiler of Triton's wants to know of launches."""
    runtime = _triton()[1]
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool((enter and enter.calls) or (leave and leave.calls))
