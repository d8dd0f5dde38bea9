"""A file of weights: its bytes in a map, and copied out of it at the rate of memory.

What is kept as the file has it is read straight into the memory that keeps it, on huge pages: of
600 MB in the page cache that takes 0.06 s, where copying out of a map, whose every page is faulted
in on both sides, takes 0.3 s. What is decoded or converted is read out of the map, a piece at a
time, and the pages are handed back.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from sora_engine.errors import CheckpointError

HUGE_BYTES = 4 << 20
"""Tensors from here on lie on huge pages; a page is 2 MiB."""
RUN_BYTES = 1 << 30
"""Of memory that kept tensors share, at most, but for a larger one."""
GAP_BYTES = 1 << 16
"""What lies between two kept tensors is read with them up to here."""
PIECE_BYTES = 16 << 20
"""What a device, another dtype or another thread is given at a time."""
BEHIND_BYTES = 1 << 18
"""From here on a copy takes longer than handing it to another thread."""
RELEASED_BYTES = 1 << 16
"""Fewer are not handed back before the file is closed: other processors would be interrupted."""
SERIAL_VALUES = (1 << 15) - 1
"""PyTorch converts so many on the thread that asks. Its others would wait, busy, for the next ones,
and take the processor from those that copy."""
THREADS = 4
"""Of `Copies`, at most: more wait for memory alone."""


@dataclass(slots=True)
class _Run:
    """Memory that mirrors a file from `start` on. Up to `sent` its bytes are on their way, up to
    `end` they are wanted."""

    file: MappedFile
    memory: mmap.mmap
    start: int
    sent: int
    end: int


class Copies:
    """Threads that copy out of files while the one that asks goes on. At its end all is there.

    Copying into fresh memory waits for its pages: with two threads 1 GB takes half the time that it
    takes with one. The asking one allocates: allocations of several would wait for each other.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), "copies")
        self._running: list[Future[None]] = []
        self._run: _Run | None = None

    @contextlib.contextmanager
    def behind(self, *, kept: bool = False) -> Iterator[None]:
        """Within it `MappedFile.read` and `fill` come back at once, on this thread.

        kept: what is read stays where it is for as long as the model does. Such tensors lie beside
        each other as their file has them, and are read by long stretches: with a map and a read for
        each, the system would take longer over them than their bytes take. The memory is given back
        when the last of them goes.
        """
        token = _BEHIND.set((self, kept))
        try:
            yield
        finally:
            _BEHIND.reset(token)

    def keep(self, file: MappedFile, start: int, size: int) -> Tensor:
        """`size` bytes of a file from `start` on, uint8; some time later they are there."""
        run = self._run
        mirrors = run is not None and run.file is file and run.end <= start
        if run is None or not mirrors or start + size > run.start + len(run.memory):
            self._send()
            length = min(len(file.data) - start, RUN_BYTES)
            run = self._run = _Run(file, _huge_pages(max(size, length)), start, start, start)
        if start - run.end > GAP_BYTES:
            self._send()
            run.sent = start
        run.end = start + size
        if run.end - run.sent >= PIECE_BYTES:
            self._send()
        return torch.frombuffer(run.memory, dtype=torch.uint8, count=size, offset=start - run.start)

    def submit(self, read: Callable[[memoryview, int], None], memory: memoryview, at: int) -> None:
        self._running.append(self._pool.submit(read, memory, at))

    def _send(self) -> None:
        run = self._run
        while run is not None and run.sent < run.end:
            end = min(run.end, run.sent + PIECE_BYTES)
            part = memoryview(run.memory)[run.sent - run.start : end - run.start]
            self.submit(run.file._read_into, part, run.sent)
            run.sent = end

    def __enter__(self) -> Copies:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Waits for what runs, before its file is closed. Raises what went wrong."""
        if error is None:
            self._send()
        self._pool.shutdown(cancel_futures=error is not None)
        if error is None:
            for each in self._running:
                each.result()


_BEHIND: ContextVar[tuple[Copies, bool] | None] = ContextVar("copies", default=None)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Within it what is read is waited for after all: it will be looked at."""
    token = _BEHIND.set(None)
    try:
        yield
    finally:
        _BEHIND.reset(token)


class MappedFile:
    """One open file, whose bytes never change what was read of it. Raises OSError and ValueError
    where it cannot be opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - `close` closes it
        try:
            self.data = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        except BaseException:
            self._file.close()
            raise

    def view(self, start: int, end: int) -> Tensor:
        """Bytes of the map itself, uint8: to be read, and not after the file changes."""
        with warnings.catch_warnings():
            # The map is read-only and torch has no such tensors; nobody here writes to it.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(self.data, dtype=torch.uint8, count=end - start, offset=start)

    def release(self, start: int, end: int) -> None:
        """Hand back the pages that a view has touched, and no others but the first."""
        if end - start >= RELEASED_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            first = start - start % mmap.PAGESIZE
            self.data.madvise(mmap.MADV_DONTNEED, first, end - first)

    def read(
        self,
        start: int,
        shape: tuple[int, ...],
        stored: torch.dtype,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """A dense tensor of the values from `start` on, as `dtype` (None: as stored), owning its
        memory; within `Copies.behind` they are there some time later, unless they are converted.
        Raises CheckpointError."""
        size = math.prod(shape) * stored.itemsize
        same = dtype is None or dtype == stored
        copies, kept = _BEHIND.get() or (None, False)
        if copies is not None and kept and same and size and torch.device(device).type == "cpu":
            return copies.keep(self, start, size).view(stored).view(shape)
        target = room(shape, dtype or stored, device)
        if same or target.is_meta:
            self.fill(start, target)
            return target
        flat, step = target.view(-1), PIECE_BYTES // stored.itemsize
        each = step if copies is None else SERIAL_VALUES
        for first in range(0, flat.numel(), step):
            last = min(first + step, flat.numel())
            at, end = start + first * stored.itemsize, start + last * stored.itemsize
            piece = self.view(at, end)
            if at % stored.itemsize:
                piece = piece.clone()
            parts = piece.view(stored).split(each)
            for values, part in zip(flat[first:last].split(each), parts, strict=True):
                values.copy_(part)
            self.release(at, end)
        return target

    def fill(self, start: int, target: Tensor) -> None:
        """Fill a dense tensor with the bytes from `start` on; within `Copies.behind`, some time
        later. Raises CheckpointError."""
        if target.is_meta or not target.numel():
            return
        flat = target.view(-1).view(torch.uint8)
        if target.device.type == "cpu":
            values: Any = flat.numpy()
            memory, behind = memoryview(values), _BEHIND.get()
            if behind is None or len(memory) < BEHIND_BYTES:
                self._read_into(memory, start)
            else:
                behind[0].submit(self._read_into, memory, start)
            return
        for first in range(0, len(flat), PIECE_BYTES):
            piece = flat[first : first + PIECE_BYTES]
            at, end = start + first, start + first + len(piece)
            piece.copy_(self.view(at, end))
            self.release(at, end)

    def _read_into(self, memory: memoryview, start: int) -> None:
        done = 0
        while done < len(memory):
            at = start + done
            if hasattr(os, "preadv"):  # the kernel copies 2 GiB at a time at most
                count = os.preadv(self._file.fileno(), [memory[done:]], at)
            else:
                piece = self.data[at : at + min(PIECE_BYTES, len(memory) - done)]
                count = len(piece)
                memory[done : done + count] = piece
            if not count:
                raise CheckpointError(
                    f"truncated while it was read: nothing is left at byte {at}",
                    path=self.path,
                )
            done += count

    def close(self) -> None:
        """Unmap it; views that are still held keep it mapped until they go."""
        self._file.close()
        with contextlib.suppress(BufferError):
            self.data.close()


def room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """An empty tensor; of a CPU on huge pages where it is large and the system has them."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    here = torch.device(device).type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE")
    if not here or size < HUGE_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(_huge_pages(size), dtype=dtype, count=count).view(shape)


def _huge_pages(size: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return memory
    with contextlib.suppress(OSError):  # a kernel that was built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
