"""Weights that wait in host memory, and visit the device while their module runs.

A model's blocks run one after the other, always in the same order, so the next one's weights can
cross while one runs. The device holds those of two blocks, whatever their number.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sora_engine.errors import BackendError

logger = logging.getLogger(__name__)

LEVELS = ("none", "text", "blocks")
"""What waits in host memory: nothing; the text and image encoders; the transformers' blocks too."""

ALIGNMENT = 256
"""Bytes at whose multiples each tensor of a block begins, as the allocators of torch have it."""


def check_level(name: str) -> None:
    """Raises BackendError unless `name` is `"auto"` or a level."""
    if name != "auto" and name not in LEVELS:
        raise BackendError(f"offload must be auto, {', '.join(LEVELS)}, got {name!r}")


def level_that_fits(free: int, *, text: int, transformers: int, rest: int) -> str:
    """The lowest level at which all that stays on a device takes no more than `free` bytes.

    text, transformers: bytes of the encoders' and of all transformers' weights. rest: of all that
    stays at any level, and of what a request needs. `"blocks"` where nothing fits.
    """
    stays = {"none": text + transformers + rest, "text": transformers + rest}
    return next((level for level, size in stays.items() if size <= free), "blocks")


class HostCopies:
    """Copies that are done when they are asked for: where the device is the host."""

    def start(self, target: Tensor, source: Tensor, after: Any) -> None:
        target.copy_(source)

    def wait(self, copy: Any) -> None:
        pass

    def so_far(self) -> None:
        pass


class StreamCopies:
    """Copies on a CUDA stream of their own, beside what the current stream does."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._stream = device, torch.cuda.Stream(device)

    def start(self, target: Tensor, source: Tensor, after: torch.cuda.Event) -> Any:
        """Copy once `after` has come; returns the event of its end."""
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, copy: torch.cuda.Event) -> None:
        """What the current stream is given from here on begins after this copy."""
        torch.cuda.current_stream(self.device).wait_event(copy)

    def so_far(self) -> Any:
        """The event that the current stream has done what it was given."""
        return torch.cuda.current_stream(self.device).record_event()


class OffloadedModules:
    """Modules whose weights lie in host memory, pinned where `device` is a GPU, and are on `device`
    while one of the module's `methods` runs.

    Each module's weights are one block of memory and cross in one copy. Two such blocks on the
    device take turns, each as large as the largest module: while a module runs, the next one's
    weights are copied on a stream of their own, once the module before it is done with the place.
    Outside a visit the parameters are those in host memory. Frozen weights only; from any thread,
    one at a time.

    modules: in the order in which they run, round and round.
    parts: names of the children whose weights visit; None is all that a module has.
    copies: how weights cross; None chooses by the device.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        device: torch.device,
        *,
        parts: Collection[str] | None = None,
        methods: Sequence[str] = ("forward",),
        copies: HostCopies | StreamCopies | None = None,
    ) -> None:
        self.device = device
        gpu = device.type == "cuda"
        self._copies = copies or (StreamCopies(device) if gpu else HostCopies())
        self._lock = threading.RLock()
        self._tensors = [_tensors(module, parts) for module in modules]
        whole, self._blocks = _move_together(self._tensors)
        if gpu:
            weakref.finalize(self, _unpin, _pin(whole))
        self._at_home = [[t.data for t in tensors] for tensors in self._tensors]
        largest = max(block.nbytes for block in self._blocks)
        self._places = [
            torch.empty(largest, dtype=torch.uint8, device=device)
            for _ in range(min(2, len(modules)))
        ]
        # Laid out once, so that a visit only points parameters elsewhere.
        self._away = [
            [_views(place, tensors) for place in self._places] for tensors in self._tensors
        ]
        self._holds: list[int | None] = [None] * len(self._places)
        self._copied: list[Any] = [None] * len(self._places)
        # Nothing is copied to a place before what used its memory last is done.
        self._done: list[Any] = [self._copies.so_far() for _ in self._places]
        self._visiting: int | None = None
        for i, module in enumerate(modules):
            for method in methods:
                setattr(module, method, self._during_visit(i, getattr(module, method)))

    @property
    def tensors(self) -> list[Tensor]:
        """All that visit."""
        return [tensor for tensors in self._tensors for tensor in tensors]

    @property
    def device_bytes(self) -> int:
        """What the two places take, for good."""
        return sum(place.nbytes for place in self._places)

    @property
    def host_bytes(self) -> int:
        return sum(block.nbytes for block in self._blocks)

    def _during_visit(self, index: int, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._visit(index):
                return method(*args, **kwargs)

        return run

    @contextmanager
    def _visit(self, index: int) -> Iterator[None]:
        with self._lock:
            if self._visiting == index:  # one of its methods calls another
                yield
                return
            assert self._visiting is None, "modules that visit in turn do not run inside each other"
            place = self._fetch(index, avoid=None)
            self._copies.wait(self._copied[place])
            self._visiting = index
            _point(self._tensors[index], self._away[index][place])
            try:
                if len(self._places) > 1:
                    self._fetch((index + 1) % len(self._tensors), avoid=place)
                yield
            finally:
                _point(self._tensors[index], self._at_home[index])
                self._visiting = None
                self._done[place] = self._copies.so_far()

    def _fetch(self, index: int, avoid: int | None) -> int:
        """The place that holds a module's weights, or soon will; not the place to `avoid`."""
        if index in self._holds:
            return self._holds.index(index)
        place = next(i for i in range(len(self._places)) if i != avoid)
        block = self._blocks[index]
        target = self._places[place][: block.nbytes]
        self._holds[place] = None  # should the copy fail
        self._copied[place] = self._copies.start(target, block, self._done[place])
        self._holds[place] = index
        return place


def offload_blocks(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    device: torch.device,
    *,
    parts: Collection[str] | None = None,
    methods: Sequence[str] = ("forward",),
    at_home: Collection[Tensor] = (),
) -> OffloadedModules:
    """Have `blocks` of a model that lies in host memory visit `device`, and all else live there,
    but for the tensors `at_home`. The rest is as of `OffloadedModules`."""
    visits = OffloadedModules(blocks, device, parts=parts, methods=methods)
    elsewhere = {id(tensor) for tensor in (*visits.tensors, *at_home)}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in elsewhere:
            tensor.data = tensor.data.to(device)
    logger.info(
        "%s: the weights of %d blocks, %.2f GiB, wait in host memory; two at a time are on %s",
        type(model).__name__, len(blocks), visits.host_bytes / 2**30, device,
    )  # fmt: skip
    return visits


class Encoder(Protocol):
    """One of transformers' encoders as the engine holds it: `text.TextEncoder`, `ImageEncoder`."""

    model: Any
    device: torch.device


def offload_encoder(encoder: Encoder, device: torch.device) -> OffloadedModules:
    """Have an encoder whose weights lie in host memory compute on `device`: its layers, which it
    has in one list, visit.

    A table of word embeddings stays in host memory, and words are looked up there.
    """
    model = encoder.model
    model.requires_grad_(False)
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    words = model.get_input_embeddings()
    encoder.device = device
    if not isinstance(words, nn.Embedding):  # a picture's patches
        return offload_blocks(model, list(layers), device)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight is words.weight:
            _look_up_at_home(module, device)
    return offload_blocks(model, list(layers), device, at_home=[words.weight])


def _look_up_at_home(table: nn.Embedding, device: torch.device) -> None:
    look_up = table.forward

    @functools.wraps(look_up)
    def run(ids: Tensor) -> Tensor:
        return look_up(ids.to(table.weight.device)).to(device)

    setattr(table, "forward", run)  # noqa: B010 - a function in place of the class's method


def _tensors(module: nn.Module, parts: Collection[str] | None) -> list[Tensor]:
    children = [module] if parts is None else [c for n, c in module.named_children() if n in parts]
    found = [t for child in children for t in (*child.parameters(), *child.buffers())]
    if any(tensor.requires_grad for tensor in found):
        raise ValueError("weights that require a gradient cannot be offloaded")
    return list({id(tensor): tensor for tensor in found}.values())


def _move_together(groups: Sequence[Sequence[Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """Have tensors lie in host memory group by group; returns all of that memory, and each group's
    block within it."""
    sizes = [sum(_aligned(tensor.nbytes) for tensor in group) for group in groups]
    whole = torch.empty(sum(sizes), dtype=torch.uint8)
    blocks = [whole[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]
    for group, block in zip(groups, blocks, strict=True):
        for tensor, view in zip(group, _views(block, group), strict=True):
            tensor.data = view.copy_(tensor.data)
    return whole, blocks


def _pin(memory: Tensor) -> Tensor | None:
    """Have the driver keep host memory in place, so that copies from it need not wait; None, with a
    warning, where it does not. (torch's own pinned memory comes in powers of two.)"""
    failed = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if not failed:
        return memory
    runtime = _cuda_runtime()
    if runtime is not None:
        # The error stays behind in this thread, and the next launch would raise it as its own.
        runtime.cudaGetLastError()
    logger.warning(
        "%.2f GiB of host memory cannot be pinned (CUDA error %d): weights cross more slowly",
        memory.nbytes / 2**30, failed,
    )  # fmt: skip
    return None


def _cuda_runtime() -> Any | None:
    """CUDA's runtime library, as torch has loaded it, for what torch does not hand on."""
    try:
        with open("/proc/self/maps", encoding="utf-8") as mapped:
            paths = {line.split(maxsplit=5)[5].strip() for line in mapped if "libcudart" in line}
    except OSError:
        return None
    return ctypes.CDLL(paths.pop()) if paths else None


def _unpin(memory: Tensor | None) -> None:
    if memory is not None:
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def _views(block: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """A view within `block` for each of the tensors, as they lie there."""
    views, start = [], 0
    for tensor in tensors:
        part = block[start : start + tensor.nbytes]
        views.append(part.view(tensor.dtype).view(tensor.shape))
        start += _aligned(tensor.nbytes)
    return views


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _point(tensors: Sequence[Tensor], at: Sequence[Tensor]) -> None:
    for tensor, data in zip(tensors, at, strict=True):
        tensor.data = data
