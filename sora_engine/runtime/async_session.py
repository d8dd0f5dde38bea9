"""A session for asyncio: the same steps, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np

from sora_engine.request import Action
from sora_engine.runtime.pace import SessionStats, Source, Tick
from sora_engine.runtime.recording import Recording
from sora_engine.runtime.session import Session
from sora_engine.runtime.standing import Mark

T = TypeVar("T")


class AsyncSession:
    """A `Session` whose waiting is awaiting; `session` is it. Cancelling a task cancels its step:
    one that is not done by then never was.

    An async context manager; leaving it closes the session.
    """

    def __init__(self, session: Session) -> None:
        self.session = session

    @property
    def frames(self) -> np.ndarray:
        """As `Session.frames`."""
        return self.session.frames

    @property
    def stats(self) -> SessionStats:
        """As `Session.stats`."""
        return self.session.stats

    async def step(self, action: Action | None = None) -> np.ndarray:
        """As `Session.step`."""
        return await self._stepping(lambda: self.session.step(action))

    async def stream(self, source: Source, fps: float | None = None) -> AsyncIterator[Tick]:
        """As `Session.stream`. Steps are made in threads of the loop's; waiting takes none."""
        waits: list[float] = []
        ticks = self.session.stream(source, fps, sleep=waits.append)
        while (tick := await self._stepping(lambda: next(ticks, None))) is not None:
            waited = waits.pop() if waits else 0.0
            await asyncio.sleep(waited)
            yield replace(tick, age_s=tick.age_s + waited)

    def mark(self) -> Mark:
        """As `Session.mark`; it waits for the step that is under way."""
        return self.session.mark()

    async def rewind(self, mark: Mark | None = None, *, steps: int | None = None) -> None:
        """As `Session.rewind`."""
        await asyncio.to_thread(self.session.rewind, mark, steps=steps)

    async def branch(self, mark: Mark | None = None) -> AsyncSession:
        """As `Session.branch`."""
        return AsyncSession(await asyncio.to_thread(self.session.branch, mark))

    async def save(self, path: str | PathLike[str], mark: Mark | None = None) -> Path:
        """As `Session.save`."""
        return await asyncio.to_thread(self.session.save, path, mark)

    def record(self, path: str | PathLike[str]) -> Recording:
        """As `Session.record`."""
        return self.session.record(path)

    async def close(self) -> None:
        """As `Session.close`."""
        await asyncio.to_thread(self.session.close)

    async def __aenter__(self) -> AsyncSession:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _stepping(self, work: Callable[[], T]) -> T:
        """What makes a step, in a thread. Cancelled, it waits for the step to stop."""
        under_way = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            return await asyncio.shield(under_way)
        except asyncio.CancelledError:
            self.session.cancel()
            await asyncio.wait([under_way])
            under_way.exception()  # it was asked for: nobody else is told
            raise
