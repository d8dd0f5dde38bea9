"""The engine for asyncio: the same jobs, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from os import PathLike
from types import TracebackType
from typing import Any

import numpy as np

from sora_engine.errors import EngineDeadError
from sora_engine.request.request import VideoRequest
from sora_engine.request.session import SessionRequest
from sora_engine.runtime.async_session import AsyncSession
from sora_engine.runtime.engine import Engine
from sora_engine.runtime.job import Job, Progress
from sora_engine.runtime.recall import Memory
from sora_engine.video import Video


class AsyncEngine:
    """An `Engine` whose waiting is awaiting. Cancelling a task cancels its job.

    An async context manager; leaving it cancels what is still running.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @classmethod
    async def from_pretrained(cls, *arguments: Any, **options: Any) -> AsyncEngine:
        """As `Engine.from_pretrained`, without holding up the event loop."""
        return cls(await asyncio.to_thread(Engine.from_pretrained, *arguments, **options))

    @property
    def error(self) -> EngineDeadError | None:
        """As `Engine.error`."""
        return self.engine.error

    def submit(self, request: VideoRequest, **options: Any) -> Job:
        """Queue a request; takes and raises what `Engine.submit` does."""
        return self.engine.submit(request, **options)

    async def load_lora(self, path: str | PathLike[str], name: str | None = None) -> str:
        """As `Engine.load_lora`, without holding up the event loop."""
        return await asyncio.to_thread(self.engine.load_lora, path, name)

    def unload_lora(self, name: str) -> None:
        """As `Engine.unload_lora`."""
        self.engine.unload_lora(name)

    async def open_session(
        self, request: SessionRequest, *, memory: Memory | None = None
    ) -> AsyncSession:
        """As `Engine.open_session`, without holding up the event loop."""
        opened = asyncio.to_thread(self.engine.open_session, request, memory=memory)
        return AsyncSession(await opened)

    async def reopen_session(self, path: str | PathLike[str]) -> AsyncSession:
        """As `Engine.reopen_session`."""
        return AsyncSession(await asyncio.to_thread(self.engine.reopen_session, path))

    async def replay(
        self, path: str | PathLike[str], *, record: str | PathLike[str] | None = None
    ) -> AsyncIterator[np.ndarray]:
        """As `Engine.replay`."""
        frames = await asyncio.to_thread(self.engine.replay, path, record=record)
        while (chunk := await asyncio.to_thread(next, frames, None)) is not None:
            yield chunk

    async def generate(self, request: VideoRequest, **options: Any) -> Video:
        """Make a video. Cancelling the task cancels the job, within one step or latent frame."""
        return await self.wait(self.submit(request, **options))

    async def wait(self, job: Job) -> Video:
        """The video of a job; raises what `Job.result` raises."""
        done = _done_event(job)
        try:
            await done.wait()
        except asyncio.CancelledError:
            job.cancel()
            raise
        return job.result()

    async def progress(self, job: Job, *, interval_s: float = 0.25) -> AsyncIterator[Progress]:
        """A job's progress whenever it changed, at most every `interval_s`, up to its last."""
        done = _done_event(job)
        last: Progress | None = None
        while not job.done():
            current = job.progress
            if current != last:
                last = current
                yield current
            try:
                await asyncio.wait_for(done.wait(), interval_s)
            except TimeoutError:
                continue
        if job.progress != last:
            yield job.progress

    async def frames(self, request: VideoRequest, **options: Any) -> AsyncIterator[np.ndarray]:
        """Frames as they are decoded, uint8 `[n, height, width, 3]`.

        Leaving the loop early, or cancelling its task, cancels the job.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[np.ndarray | None] = asyncio.Queue()

        def put(item: np.ndarray | None) -> None:
            _call(loop, queue.put_nowait, item)

        job = self.engine.submit(request, **options, on_frames=put)
        job.add_done_callback(lambda _: put(None))
        try:
            while (chunk := await queue.get()) is not None:
                yield chunk
            error = job.exception()
            if error is not None:
                raise error
        finally:
            job.cancel()

    async def close(self) -> None:
        """Cancel what is queued or running, and wait for the engine to stop."""
        await asyncio.to_thread(self.engine.close)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


def _done_event(job: Job) -> asyncio.Event:
    """An event of the running loop that is set once the job is done."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()

    job.add_done_callback(lambda _: _call(loop, event.set))
    return event


def _call(
    loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: object
) -> None:
    """Call a function in a loop from another thread. The loop may be gone by the time that a job
    ends whose waiter was cancelled, or has left: then nobody is there to be told."""
    with suppress(RuntimeError):  # asked first, it could be closed in between
        loop.call_soon_threadsafe(function, *arguments)
