"""The servers behind a proxy: which of them live, what each has to do, and which is next."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import httpx

from sora_engine.serve.load import Load

POLL_S = 0.5
"""Between two questions to a server how it is."""
POLL_TIMEOUT_S = 5.0
DOWN_AFTER = 3
"""Questions without an answer after which a server is down; at once where nobody listens."""
UP_AFTER = 2
"""Answers after which it is up again."""
COUNTED_S = 2.0
"""Within which a server has counted work that was sent to it, whether it answers or not: an answer
may take as long as the job."""
HOLD_S = 20.0
"""How long requests wait for a server after it went down: a restart of a small model takes less.
From there on they are told at once."""

DOWN, LOADING, READY = "down", "loading", "ready"


@dataclass(eq=False)
class Home:
    """One server. name: the replica in its jobs' ids. transport: how it is asked. state: `down`,
    or what its `/ready` says. load: as it told last, at told_at. sent: of each request for work
    that this does not count yet, the moment from which it does."""

    name: str
    transport: httpx.AsyncBaseTransport
    state: str = DOWN
    load: Load = field(default_factory=Load)
    sent: dict[object, float] = field(default_factory=dict)
    told_at: float = 0.0
    failures: int = 0
    answers: int = 0
    lost_at: float = field(default_factory=time.monotonic)

    @property
    def reachable(self) -> bool:
        """Whether it answers for its jobs."""
        return self.state not in (DOWN, LOADING)

    def sends(self) -> object:
        """Work is sent to it; what `answered` takes."""
        work = object()
        self.sent[work] = time.monotonic() + COUNTED_S
        return work

    def answered(self, work: object) -> None:
        """It has answered that, and counts it by now."""
        if work in self.sent:
            self.sent[work] = min(self.sent[work], time.monotonic())

    async def ask(self) -> None:
        """See how it is."""
        begun = time.monotonic()
        try:
            status, told = await self._ready()
        except httpx.ConnectError:
            self.lost()
        except (httpx.HTTPError, ValueError, TimeoutError):
            self.failures, self.answers = self.failures + 1, 0
            if self.failures >= DOWN_AFTER:
                self._enter(DOWN)
        else:
            self.failures, self.answers = 0, self.answers + 1
            if self.state != DOWN or self.answers >= UP_AFTER:
                self._enter(str(told.get("status", DOWN)) if status in (200, 503) else DOWN)
            with suppress(TypeError):
                self._counts(Load(**told.get("load", {})), begun)

    def _counts(self, load: Load, begun: float) -> None:
        """It was asked at `begun`, and has told this since. What it has taken meanwhile is what was
        sent: what was answered first, and then what waits for its answer."""
        taken = load.taken - self.load.taken
        if taken < 0 and begun < self.told_at:
            return  # a later answer was here before
        self.load, self.told_at = load, time.monotonic()
        answered = sum(moment <= begun for moment in self.sent.values())
        left = sorted(self.sent.items(), key=lambda each: each[1])
        self.sent = dict(left[max(taken, answered) :])

    def lost(self) -> None:
        """Nobody listens there."""
        self.answers = 0
        self._enter(DOWN)

    def loads(self) -> None:
        """It was started anew, and does not answer for its jobs yet."""
        self._enter(LOADING)

    def _enter(self, state: str) -> None:
        if self.reachable:
            self.lost_at = time.monotonic()
        self.state = state

    async def _ready(self) -> tuple[int, dict[str, Any]]:
        request = request_to("GET", b"/ready", [(b"host", b"localhost")], timeout_s=POLL_TIMEOUT_S)
        async with asyncio.timeout(POLL_TIMEOUT_S):
            response = await self.transport.handle_async_request(request)
            try:
                told = json.loads(await response.aread())
            finally:
                await response.aclose()
        if not isinstance(told, dict):
            raise ValueError("no object")
        return response.status_code, told


def request_to(
    method: str,
    target: bytes,
    headers: Sequence[tuple[bytes, bytes]],
    content: object = None,
    *,
    timeout_s: float | None = None,
) -> httpx.Request:
    """A request as it goes to a server. target: path and query. timeout_s: of each read; None waits
    as long as the answer takes."""
    url = httpx.URL("http://replica").copy_with(raw_path=target)
    timeouts = httpx.Timeout(timeout_s, connect=POLL_TIMEOUT_S, pool=None).as_dict()
    return httpx.Request(
        method,
        url,
        headers=list(headers),
        content=content,  # type: ignore[arg-type]
        extensions={"timeout": timeouts},
    )


class Homes:
    """All servers of a service."""

    def __init__(self, homes: Iterable[Home]) -> None:
        self.all = list(homes)
        self.by_name = {home.name: home for home in self.all}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Ask each how it is, again and again."""
        self._tasks = [asyncio.create_task(_watched(home)) for home in self.all]

    async def stop(self) -> None:
        """End that, and close the connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for home in self.all:
            await home.transport.aclose()

    @property
    def state(self) -> str:
        """The best of theirs."""
        states = {home.state for home in self.all}
        order = (READY, LOADING, "disk_full", "draining", "dead")
        return next((state for state in order if state in states), DOWN)

    @property
    def load(self) -> Load:
        """Of those that take jobs."""
        loads = [home.load for home in self.all if home.state == READY]
        names = ("waiting", "running", "tokens", "room", "taken")
        return Load(**{name: sum(getattr(load, name) for load in loads) for name in names})

    async def named(self, name: str) -> Home | None:
        """A server by its name, once it is reachable; None where it does not become so."""
        home = self.by_name[name]
        return home if await _until(lambda: home.reachable, [home]) else None

    async def any(self) -> Home | None:
        """Whichever answers, once one does; None where none does."""
        await _until(lambda: any(home.reachable for home in self.all), self.all)
        reachable = [home for home in self.all if home.reachable]
        return random.choice(reachable) if reachable else None

    async def for_work(self) -> Home | None:
        """The one with the shortest queue, once one takes jobs. Where none does, one that says why;
        None where none answers."""
        if not any(home.state == READY for home in self.all):
            if any(home.reachable for home in self.all):
                return await self.any()
            await _until(lambda: any(home.state == READY for home in self.all), self.all)
        ready = [home for home in self.all if home.state == READY]
        return shortest(ready) if ready else await self.any()

    def for_key(self, key: bytes) -> Home:
        """The one that has all requests with this key: what is sent twice is made once. Of the
        others' keys none moves where a server is added (rendezvous hashing, Thaler and Ravishankar
        1998)."""
        return max(self.all, key=lambda home: sha256(home.name.encode() + b"\0" + key).digest())


def shortest(homes: Sequence[Home]) -> Home:
    """The server with the fewest tokens before it, of those that have room where any has.

    What was sent and no server has told of yet counts as jobs of the mean size, since nobody has
    read it. Of equals any.
    """
    jobs = sum(home.load.waiting + home.load.running for home in homes)
    mean = sum(home.load.tokens for home in homes) / jobs if jobs else 1.0
    fitting = [home for home in homes if home.load.room > len(home.sent)] or list(homes)

    def before(home: Home) -> tuple[float, float]:
        return home.load.tokens + len(home.sent) * max(1.0, mean), random.random()

    return min(fitting, key=before)


async def _watched(home: Home) -> None:
    while True:
        await home.ask()
        await asyncio.sleep(POLL_S)


async def _until(condition: Callable[[], bool], homes: Sequence[Home]) -> bool:
    """Whether it came true while a request may wait for these."""
    while not condition():
        if time.monotonic() >= max(home.lost_at for home in homes) + HOLD_S:
            return False
        await asyncio.sleep(0.05)
    return True
