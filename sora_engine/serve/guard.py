"""Bounds on what a client may send and how slowly, before any of it is understood.

Two layers. `Guard` is an ASGI middleware: sizes of headers and bodies, declared or chunked, and the
time that a body takes. `GuardedProtocol` is below it, at the connection: uvicorn (0.54) waits for
ever for a client that sends half a header, or does not read what it is sent.
"""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import dataclass
from typing import Any

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from sora_engine.serve.failures import ApiError
from sora_engine.serve.refusal import header, refuse

LINGER_S = 2.0
"""How long a refused body is read on and thrown away: a client that is still sending when the
connection closes may lose the answer with it (RFC 9112, 9.6)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """max_body: bytes. max_header, max_headers: bytes of all headers and the path, and their count.
    body_s: the longest pause within a body. bytes_per_s: below this rate, on the whole, a body is
    too slow; `body_s` is free."""

    max_body: int = 64 << 20
    max_header: int = 16 << 10
    max_headers: int = 100
    body_s: float = 20.0
    bytes_per_s: float = 4096.0


class BodyRefusedError(Exception):
    """Raised out of `receive` into the application, which is to end: its answer is not sent."""


class Guard:
    """ASGI middleware, to be laid around the whole application."""

    def __init__(self, app: ASGIApp, bounds: Bounds | None = None) -> None:
        self.app = app
        self.bounds = bounds or Bounds()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        verdict = self._of_head(scope)
        if verdict is not None:
            await _end(send, receive, verdict)
            return
        await _Watched(self, scope, receive, send).run()

    def _of_head(self, scope: Scope) -> ApiError | None:
        bounds = self.bounds
        fields = scope["headers"]
        size = len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
        size += sum(len(name) + len(value) + 4 for name, value in fields)
        if size > bounds.max_header or len(fields) > bounds.max_headers:
            return _refusal(
                431,
                "headers_too_large",
                f"the address and headers have {size} bytes in {len(fields)} fields; at most "
                f"{bounds.max_header} bytes in {bounds.max_headers} are read",
            )
        declared = header(scope, b"content-length")
        if declared is not None and header(scope, b"transfer-encoding") is not None:
            # A proxy that went by the other one would take the rest for another client's request.
            return _refusal(
                400, "two_lengths", "a body has Content-Length or Transfer-Encoding, not both"
            )
        if declared is not None and declared.isdigit() and int(declared) > bounds.max_body:
            return self.too_large(f"{int(declared)}")
        return None

    def too_large(self, size: str) -> ApiError:
        return _refusal(
            413,
            "body_too_large",
            f"the body has {size} bytes; at most {self.bounds.max_body} are read",
        )


class _Watched:
    """One request: what it sends is counted and timed."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self.guard, self.scope = guard, scope
        self._receive, self._send = receive, send
        self._size = 0
        self._whole = False
        self._started = False
        self._begun = time.monotonic()
        self._verdict: ApiError | None = None

    async def run(self) -> None:
        try:
            await self.guard.app(self.scope, self.receive, self.send)
        except BaseException:
            # An application's own error handler may have raised once more after its answer.
            if self._verdict is None or self._started:
                raise
        if self._verdict is not None and not self._started:
            await _end(self._send, self._receive, self._verdict)

    async def receive(self) -> Message:
        if self._verdict is not None:
            raise BodyRefusedError(self._verdict.message)
        if self._whole:  # what is awaited now is the client's going
            return await self._receive()
        bounds = self.guard.bounds
        now = time.monotonic()
        until = self._begun + bounds.body_s + self._size / bounds.bytes_per_s
        try:
            async with asyncio.timeout(min(bounds.body_s, until - now)):  # no task, as `wait_for`
                message = await self._receive()
        except TimeoutError:
            raise self._refused(
                _refusal(
                    408,
                    "body_too_slow",
                    f"{self._size} bytes of the body came in {now - self._begun:.0f} s and then "
                    f"none; it is not waited for longer",
                )
            ) from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._size > bounds.max_body:
                raise self._refused(self.guard.too_large(f"over {bounds.max_body}"))
        return message

    async def send(self, message: Message) -> None:
        if self._verdict is not None and not self._started:
            return  # what the application makes of the error is not the answer
        self._started = True
        await self._send(message)

    def _refused(self, verdict: ApiError) -> BodyRefusedError:
        self._verdict = verdict
        return BodyRefusedError(verdict.message)


async def _end(send: Send, receive: Receive, verdict: ApiError) -> None:
    """Answer, let the client finish sending for a moment, and close."""

    async def linger() -> None:
        try:
            async with asyncio.timeout(0 if verdict.status == 408 else LINGER_S):
                while (message := await receive())["type"] == "http.request":
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            return

    await refuse(send, verdict, before_end=linger)


def _refusal(status: int, code: str, message: str) -> ApiError:
    return ApiError(status, code, message, headers={"connection": "close"})


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 over h11, which also closes a connection

    - whose next header is not whole `header_s` after its first byte (after the connection was made,
      for the first one), and
    - that takes nothing of what is sent to it for `write_s`.
    """

    header_s = 10.0
    write_s = 60.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _send_at_once(transport)
        self._await_header()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_header()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_header()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _watch_header(self) -> None:
        """The timer runs from the first part of a header on, and is not set anew by further ones.
        What still comes of a body after its answer counts as what stands before the next header."""
        ours, theirs = self.conn.our_state, self.conn.their_state
        part = theirs is h11.IDLE and bool(self.conn.trailing_data[0])
        if part or (ours is h11.DONE and theirs is h11.SEND_BODY):
            self._await_header()
        elif self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _await_header(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self.header_s, self.transport.abort)

    def _stop_timers(self) -> None:
        for timer in (self._header_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self._header_timer = self._write_timer = None


def _send_at_once(transport: asyncio.Transport) -> None:
    """No waiting for an acknowledgement between an answer's header and its body, which delayed
    acknowledgements make 40 ms. asyncio asks for it where the listener names its protocol alone."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def guarded_protocol(header_s: float, write_s: float) -> type[GuardedProtocol]:
    """The protocol class for `uvicorn.Config(http=...)`, with these times."""
    return type("GuardedProtocol", (GuardedProtocol,), {"header_s": header_s, "write_s": write_s})
