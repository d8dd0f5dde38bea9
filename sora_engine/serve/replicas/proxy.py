"""The ASGI application in front of several servers.

Work goes to the shortest queue, what concerns a video to the server that its id names, and lists
are merged. Keys, limits, hosts and origins are each server's own affair: the proxy passes them on.
It keeps nothing that is not there again after a restart.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable, Mapping
from urllib.parse import parse_qs

import httpx
from starlette.types import Message, Receive, Scope, Send

from sora_engine.serve.failures import ApiError
from sora_engine.serve.metrics import Metrics
from sora_engine.serve.refusal import header, refuse
from sora_engine.serve.replicas.forward import (
    Body,
    Cut,
    Lost,
    Unreachable,
    fetch,
    forward,
    headers_for,
    target_of,
)
from sora_engine.serve.replicas.homes import READY, Home, Homes
from sora_engine.serve.replicas.merging import merged_list, merged_metrics

logger = logging.getLogger(__name__)

WORKS = ("edits", "extensions", "connect", "loop", "upscale")
"""As `menu.OF_CLIPS` has them, which would bring the engine into this process."""
WORK = frozenset(
    (
        *("/v1/videos", "/v1/videos/sync", "/v1/videos/plan"),
        *(f"/v1/videos/{work}{end}" for work in WORKS for end in ("", "/plan")),
        *("/v1/images/generations", "/v1/uploads"),
    )
)
"""Paths of which a POST goes to the shortest queue."""
_OF_A_JOB = re.compile(r"/v1/(?:videos|images)/video_([a-z0-9]{1,16})_[a-z0-9]{26}(?:/|$)")
_SAFE = ("GET", "HEAD")


class Proxy:
    """What clients reach. restarts: how often each server was started anew, for its figures."""

    def __init__(
        self, homes: Homes, restarts: Callable[[], Mapping[str, int]] = lambda: {}
    ) -> None:
        self.homes = homes
        self._restarts = restarts
        self._later: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        if scope["type"] != "http":
            return
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._answer(scope, receive, watched)
        except ApiError as error:
            await refuse(send, error)
        except Cut:
            raise  # the client sees that the answer is cut
        except Exception as error:
            logger.exception("a request failed: %s", type(error).__name__)
            if begun:
                raise
            await refuse(send, ApiError(500, "internal", "the server failed"))

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await self.homes.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.homes.stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        if method in _SAFE and path in ("/health", "/ready"):
            await self._tell_state(path, send)
        elif method == "GET" and path == "/v1/videos":
            await self._list(scope, send)
        elif method == "GET" and path == "/metrics":
            await self._metrics(scope, send)
        elif method == "POST" and path in WORK:
            await self._work(scope, receive, send)
        else:
            match = _OF_A_JOB.match(path)
            known = match is not None and match[1] in self.homes.by_name
            await self._pass(scope, receive, send, match[1] if match and known else None)

    # What goes to one server.

    async def _pass(self, scope: Scope, receive: Receive, send: Send, name: str | None) -> None:
        """To the server of that name, or to any. What only reads is asked again."""
        body = Body(scope, receive)
        for attempt in range(3):
            home = await (self.homes.any() if name is None else self.homes.named(name))
            if home is None:
                raise _down()
            try:
                await forward(home, scope, body, send)
                return
            except Unreachable:
                continue
            except Lost as error:
                if scope["method"] not in _SAFE or body.given or attempt == 2:
                    raise _lost() from error
        raise _down()

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = Body(scope, receive)
        key = header(scope, b"idempotency-key")
        for _ in range(1 + len(self.homes.all)):
            if key is None:
                home = await self.homes.for_work()
            else:
                owner = header(scope, b"authorization") or ""
                chosen = self.homes.for_key(f"{owner}\0{key}".encode())
                home = await self.homes.named(chosen.name)
            if home is None:
                raise _down()
            work = home.sends()
            try:
                await forward(home, scope, body, send)
                return
            except Unreachable:
                continue
            except Lost as error:
                raise _lost(again=key is not None) from error
            finally:
                home.answered(work)
                task = asyncio.create_task(home.ask())
                self._later.add(task)
                task.add_done_callback(self._later.discard)
        raise _down()

    # What all servers say together.

    async def _tell_state(self, path: str, send: Send) -> None:
        homes = self.homes
        state, each = homes.state, {home.name: home.state for home in homes.all}
        told: dict[str, object] = {"status": state, "replicas": each}
        if path == "/health":
            lives = any(home.state not in ("down", "dead") for home in homes.all)
            told["status"] = "ok" if lives else "dead"
            await _send_json(send, told, 200 if lives else 503)
            return
        if state == READY:
            told["load"] = homes.load.to_dict()
        await _send_json(send, told, 200 if state == READY else 503)

    async def _list(self, scope: Scope, send: Send) -> None:
        query = parse_qs(scope["query_string"].decode("latin-1"))
        newest = query.get("order", ["desc"])[-1] != "asc"
        answers = await asyncio.gather(*(self._asked(home, scope) for home in self.homes.all))
        told = {h.name: a for h, a in zip(self.homes.all, answers, strict=True) if a is not None}
        if not told:
            raise _down()
        for response in told.values():
            if response.status_code != 200:  # a key, a value: each of them says the same
                await _send(send, response.status_code, response.headers.raw, response.content)
                return
        limit = int(query.get("limit", ["20"])[-1])
        missing = [home.name for home in self.homes.all if home.name not in told]
        pages = [json.loads(response.content) for response in told.values()]
        await _send_json(send, merged_list(pages, limit, newest=newest, missing=missing))

    async def _metrics(self, scope: Scope, send: Send) -> None:
        reachable = [home for home in self.homes.all if home.reachable]
        answers = await asyncio.gather(*(self._asked(home, scope) for home in reachable))
        texts = {}
        for home, response in zip(reachable, answers, strict=True):
            if response is not None and response.status_code != 200:
                await _send(send, response.status_code, response.headers.raw, response.content)
                return
            if response is not None:
                texts[home.name] = response.text
        own = {
            "sora_replica_up": {h.name: float(h.state == READY) for h in self.homes.all},
            "sora_replica_restarts": {n: float(v) for n, v in self._restarts().items()},
        }
        content_type = Metrics.content_type.encode()
        body = merged_metrics(texts, own)
        await _send(send, 200, [(b"content-type", content_type)], body)

    async def _asked(self, home: Home, scope: Scope) -> httpx.Response | None:
        """A server's answer to a GET, once it is reachable; None where it gives none."""
        for _ in range(2):
            if await self.homes.named(home.name) is None:
                return None
            try:
                return await fetch(home, target_of(scope), headers_for(scope))
            except Lost:
                continue
        return None


def _down() -> ApiError:
    return ApiError(
        503,
        "replica_down",
        "the server that has this is being started anew; ask again in a moment",
        headers={"Retry-After": "2"},
        retry=True,
    )


def _lost(*, again: bool = False) -> ApiError:
    said = "the server ended before it answered, and may have done what it was asked"
    if not again:
        said += "; with an Idempotency-Key it would be safe to ask again"
    return ApiError(503, "replica_lost", said, headers={"Retry-After": "2"}, retry=again)


async def _send_json(send: Send, told: object, status: int = 200) -> None:
    headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
    await _send(send, status, headers, json.dumps(told, separators=(",", ":")).encode())


async def _send(
    send: Send, status: int, headers: list[tuple[bytes, bytes]], content: bytes
) -> None:
    own = [(n, v) for n, v in headers if n.lower() not in (b"content-length", b"date")]
    own.append((b"content-length", str(len(content)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": own})
    await send({"type": "http.response.body", "body": content, "more_body": False})
