"""Progress as server-sent events: the latest word on each job, and never a queue of them.

A slot holds a job's last word. A reader that is slow finds the newest when it comes back, and what
lay between is gone: whatever clients do, the memory is one word a job.
(WHATWG HTML, 9.2: `id`, `event`, `data`, comments, `Last-Event-ID`.)
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from sora_engine.serve.failures import ApiError

MOST_STREAMS = 4
"""Of one client."""
PACE_S = 0.2
"""The least time between two words on a job, but for its last: each takes the interpreter from the
engine's thread, and short steps would spend more on their telling than on themselves."""
QUIET_S = 15.0
"""After so long without a word a comment is sent: proxies close what is silent."""
FINAL = frozenset({"completed", "failed"})


@dataclass(slots=True, eq=False)
class _Slot:
    """news: there is what its readers were not woken for. resting: they were a moment ago, or are
    about to be. readers: to be woken."""

    news: bool = False
    resting: bool = False
    readers: set[asyncio.Event] = field(default_factory=set)


class Events:
    """All streams of a server. `tell` is for any thread; all else for the loop's own."""

    def __init__(
        self,
        *,
        pace_s: float = PACE_S,
        quiet_s: float = QUIET_S,
        most: int = MOST_STREAMS,
        watch: Any = None,
    ) -> None:
        """watch: a gauge of streams, with `inc` and `dec`."""
        self._pace_s, self._quiet_s, self._most, self._watch = pace_s, quiet_s, most, watch
        self._slots: dict[str, _Slot] = {}
        self._open: Counter[str] = Counter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    @property
    def num_open(self) -> int:
        return self._open.total()

    def tell(self, job: str, *, last: bool = False) -> None:
        """A job has got further, or has ended: the `last` word is told at once. Never waits;
        nothing happens where nobody reads."""
        loop, slot = self._loop, self._slots.get(job)
        if loop is None or slot is None:
            return
        slot.news = True  # before it is asked whether they rest: one of the two threads sees it
        if slot.resting and not last:
            return
        slot.resting = True
        try:
            loop.call_soon_threadsafe(self._wake, slot)
        except RuntimeError:  # the loop is closed: nobody reads any more
            return

    def _wake(self, slot: _Slot) -> None:
        slot.news = False
        for reader in slot.readers:
            reader.set()
        assert self._loop is not None
        self._loop.call_later(self._pace_s, self._rested, slot)

    def _rested(self, slot: _Slot) -> None:
        slot.resting = False
        if slot.news and slot.readers:
            slot.resting = True
            self._wake(slot)

    def close(self) -> None:
        """The server is about to stop: streams end, and clients come back to the next one."""
        self._closed = True
        for slot in self._slots.values():
            for reader in slot.readers:
                reader.set()

    def check(self, client: str) -> None:
        """ApiError 429 where a client has as many streams as it may."""
        if self._open[client] >= self._most:
            raise ApiError(
                429,
                "too_many_streams",
                f"a client has at most {self._most} event streams; close one, or poll",
                headers={"Retry-After": "5"},
            )

    def enter(self, client: str) -> Callable[[], None]:
        """One more stream of a client; what is returned ends it. ApiError as `check`."""
        self.check(client)
        self._open[client] += 1
        if self._watch is not None:
            self._watch.inc()
        left = False

        def leave() -> None:
            nonlocal left
            if left:
                return
            left = True
            self._open[client] -= 1
            if not self._open[client]:
                del self._open[client]
            if self._watch is not None:
                self._watch.dec()

        return leave

    async def stream(
        self, job: str, word: Callable[[], dict[str, Any]], last_id: str | None = None
    ) -> AsyncIterator[bytes]:
        """The lines of a stream, up to the job's last word.

        word: what is to be told of the job now; its `status` says whether it is the last. last_id:
        the last event that the client has.
        """
        self._loop = asyncio.get_running_loop()
        slot = self._slots.setdefault(job, _Slot())
        woken = asyncio.Event()
        slot.readers.add(woken)
        sent: dict[str, Any] | None = None
        try:
            yield b"retry: 2000\n\n"
            while not self._closed:
                woken.clear()
                try:
                    told = word()  # a read of one row, as a poll is
                except ApiError as error:  # it was deleted
                    yield event("gone", "gone", error.envelope())
                    return
                number = event_id(told)
                if told != sent and not (sent is None and number == last_id):
                    yield event("progress" if told["status"] not in FINAL else "done", number, told)
                sent = told
                if told["status"] in FINAL:
                    return
                try:
                    async with asyncio.timeout(self._quiet_s):  # which makes no task of the wait
                        await woken.wait()
                except TimeoutError:
                    yield b": still here\n\n"
        finally:
            slot.readers.discard(woken)
            if not slot.readers:
                self._slots.pop(job, None)


def event_id(told: dict[str, Any]) -> str:
    """How far a job is, as an id that means the same after a restart of the server."""
    return f"{told['stage']}-{told['steps_done']}-{told['frames_decoded']}"


def event(kind: str, number: str, told: dict[str, Any]) -> bytes:
    """One event. JSON has no line breaks, so its data are one line."""
    data = json.dumps(told, separators=(",", ":"))
    return f"id: {number}\nevent: {kind}\ndata: {data}\n\n".encode()
