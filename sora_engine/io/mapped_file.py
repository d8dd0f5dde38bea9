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
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from sora_engine.errors import CheckpointError

HUGE_BYTES = 4 << 20
"""Tensors from here on lie on huge pages; a page is 2 MiB."""
SHARED_BYTES = 32 << 20
"""Of huge pages that smaller tensors share."""
PIECE_BYTES = 16 << 20
"""What a device, or another dtype, is given at a time."""
BEHIND_BYTES = 1 << 18
"""From here on a copy takes longer than handing it to another thread."""
THREADS = 4
"""Of `Copies`, at most: more wait for memory alone."""


class Copies:
    """Threads that copy out of files while the one that asks goes on. At its end all is there.

    Copying into fresh memory waits for its pages: with two threads 1 GB takes half the time that it
    takes with one. The asking one allocates: allocations of several would wait for each other.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), "copies")
        self._running: list[Future[None]] = []
        self._shared: mmap.mmap | None = None
        self._used = 0

    @contextlib.contextmanager
    def behind(self) -> Iterator[None]:
        """Within it `MappedFile.fill` comes back at once, on this thread."""
        token = _BEHIND.set(self)
        try:
            yield
        finally:
            _BEHIND.reset(token)

    def room(self, size: int) -> tuple[mmap.mmap, int]:
        """Memory that several tensors share, and where in it `size` bytes are free. It is given
        back when the last of them goes."""
        if self._shared is None or self._used + size > len(self._shared):
            self._shared, self._used = _huge_pages(max(size, SHARED_BYTES)), 0
        at = self._used
        self._used += (size + 63) // 64 * 64
        return self._shared, at

    def submit(self, read: Callable[[memoryview, int], None], memory: memoryview, at: int) -> None:
        self._running.append(self._pool.submit(read, memory, at))

    def __enter__(self) -> Copies:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Waits for what runs, before its file is closed. Raises what went wrong."""
        self._pool.shutdown(cancel_futures=error is not None)
        if error is None:
            for each in self._running:
                each.result()


_BEHIND: ContextVar[Copies | None] = ContextVar("copies", default=None)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Within it `MappedFile.fill` waits for its bytes after all: for what is looked at."""
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
        if hasattr(mmap, "MADV_DONTNEED"):
            first = start - start % mmap.PAGESIZE
            self.data.madvise(mmap.MADV_DONTNEED, first, end - first)

    def fill(self, start: int, target: Tensor) -> None:
        """Fill a dense tensor with the bytes from `start` on; within `Copies.behind`, some time
        later. Raises CheckpointError."""
        if target.is_meta or not target.numel():
            return
        flat = target.view(-1).view(torch.uint8)
        if target.device.type == "cpu":
            values: Any = flat.numpy()
            memory, copies = memoryview(values), _BEHIND.get()
            if copies is None or len(memory) < BEHIND_BYTES:
                self._read_into(memory, start)
            else:
                copies.submit(self._read_into, memory, start)
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


def room(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    kept: bool = False,
) -> Tensor:
    """An empty tensor; of a CPU on huge pages where it is large and the system has them.

    kept: it stays where it is for as long as the model does. Within `Copies.behind` small ones of
    that kind share their pages: the system would take longer over their memory than they take to
    read.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    copies = _BEHIND.get() if kept and size >= BEHIND_BYTES else None
    here = torch.device(device).type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE")
    if not here or (size < HUGE_BYTES and copies is None):
        return torch.empty(shape, dtype=dtype, device=device)
    if copies is not None and size < HUGE_BYTES:
        memory, at = copies.room(size)
    else:
        memory, at = _huge_pages(size), 0
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=at).view(shape)


def _huge_pages(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel that was built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
