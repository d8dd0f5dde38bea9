"""One request, passed to a server and its answer passed back, both as they come.

Nothing is held: a body of any length, a part of a file, an event stream. A client that goes away
ends the request to the server too, which is what cancels a `/v1/videos/sync`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import httpx
from starlette.types import Receive, Scope, Send

from sora_engine.serve.replicas.homes import Home, request_to
from sora_engine.serve.service import STATE

# RFC 9110, 7.6.1: of this connection alone. A date is the proxy's own.
_HOP = frozenset(
    (
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te"),
        *(b"proxy-connection", b"trailer", b"transfer-encoding", b"upgrade"),
    )
)
_OURS = (b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"forwarded")


class Unreachable(Exception):  # noqa: N818 - it is an answer, and no error
    """Nobody listened, and nothing of the request was read: another server may have it."""


class Lost(Exception):  # noqa: N818
    """The server ended before it answered. What it was asked may have been done."""


class Cut(Exception):  # noqa: N818
    """The server ended amid its answer."""


class _Gone(Exception):  # noqa: N818
    """The client went amid its body."""


class Body:
    """A client's body as it comes, once; and whether the client has gone after it."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        names = {name for name, _ in scope["headers"]}
        self.given = bool(names & {b"content-length", b"transfer-encoding"})
        self.begun = False
        self._receive = receive
        self._ended = anyio.Event()
        if not self.given:
            self._ended.set()

    async def chunks(self) -> AsyncIterator[bytes]:
        self.begun = True
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            if message.get("body"):
                yield message["body"]
            if not message.get("more_body", False):
                self._ended.set()
                return

    async def client_gone(self) -> None:
        """Waits until the client has gone."""
        await self._ended.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass


def headers_for(scope: Scope) -> list[tuple[bytes, bytes]]:
    """A client's headers for a server, with who it is: servers believe their proxy."""
    headers = [(n, v) for n, v in _own(scope["headers"]) if n not in _OURS]
    client = scope.get("client")
    if client:
        headers.append((b"x-forwarded-for", str(client[0]).encode()))
    headers.append((b"x-forwarded-proto", str(scope.get("scheme", "http")).encode()))
    return headers


def target_of(scope: Scope) -> bytes:
    """Path and query as the client sent them."""
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope.get("query_string", b"")
    return path + (b"?" + query if query else b"")


async def forward(home: Home, scope: Scope, body: Body, send: Send) -> None:
    """Pass a request on, and its answer back. Raises Unreachable, Lost or Cut."""
    content = body.chunks() if body.given else None
    request = request_to(scope["method"], target_of(scope), headers_for(scope), content)
    failed: Exception | None = None
    async with anyio.create_task_group() as group:

        async def end_with_client() -> None:
            await body.client_gone()
            group.cancel_scope.cancel()

        group.start_soon(end_with_client)
        try:
            await _exchange(home, request, body, send)
        except (Unreachable, Lost, Cut) as error:
            failed = error
        except _Gone:
            pass
        group.cancel_scope.cancel()
    if failed is not None:
        raise failed


async def _exchange(home: Home, request: httpx.Request, body: Body, send: Send) -> None:
    try:
        response = await home.transport.handle_async_request(request)
    except httpx.HTTPError as error:
        home.lost()
        nothing = isinstance(error, httpx.ConnectError) and not body.begun
        raise (Unreachable if nothing else Lost) from error
    try:
        if _is_loading(response):
            home.loads()
            if not body.begun:
                raise Unreachable
        start = {
            "type": "http.response.start",
            "status": response.status_code,
            "headers": [(n, v) for n, v in _own(response.headers.raw) if n != b"date"],
        }
        await send(start)
        assert isinstance(response.stream, httpx.AsyncByteStream)
        try:
            async for chunk in response.stream:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except httpx.HTTPError as error:
            raise Cut from error
        await send({"type": "http.response.body", "body": b"", "more_body": False})
    finally:
        with anyio.CancelScope(shield=True):
            await response.aclose()


async def fetch(home: Home, target: bytes, headers: list[tuple[bytes, bytes]]) -> httpx.Response:
    """A whole answer to a GET; raises Lost."""
    try:
        response = await home.transport.handle_async_request(request_to("GET", target, headers))
        try:
            await response.aread()
        finally:
            await response.aclose()
    except httpx.HTTPError as error:
        home.lost()
        raise Lost from error
    if _is_loading(response):
        home.loads()
        raise Lost
    return response


def _is_loading(response: httpx.Response) -> bool:
    return response.status_code == 503 and response.headers.get(STATE) == "loading"


def _own(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Headers that go on to the next one, their names in lower case."""
    lower = [(bytes(name).lower(), bytes(value)) for name, value in headers]
    named = {
        word.strip().lower()
        for name, value in lower
        if name == b"connection"
        for word in value.split(b",")
    }
    return [(n, v) for n, v in lower if n not in _HOP and n not in named]
