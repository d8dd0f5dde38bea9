"""Slow and oversized clients, by raw sockets: half headers, half bodies, floods, slow readers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import socket
import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sora_engine.serve.guard import Bounds, Guard, guarded_protocol
from tests.serve.raw import Live, asked, connected, live, status_of, until_closed

HEADER_S, BODY_S, WRITE_S = 0.6, 0.5, 0.8
MAX_BODY = 100_000


async def health(_request: Request) -> Response:
    return Response("ok")


async def count(request: Request) -> Response:
    return JSONResponse(len(await request.body()))


async def unread(_request: Request) -> Response:
    return Response("nothing was read")


async def caught(request: Request) -> Response:
    """An application that makes another error of whatever reading raises."""
    try:
        return JSONResponse(len(await request.body()))
    except Exception:
        return Response("mine", 400)


async def endless(_request: Request) -> Response:
    async def much() -> Any:
        while True:
            yield b"x" * 65536
            await asyncio.sleep(0)  # as reading a file does

    return StreamingResponse(much())


ROUTES = [
    Route("/health", health),
    Route("/unread", unread, methods=["POST"]),
    Route("/count", count, methods=["POST"]),
    Route("/caught", caught, methods=["POST"]),
    Route("/endless", endless),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    bounds = Bounds(max_body=MAX_BODY, body_s=BODY_S, bytes_per_s=200_000)
    app = Guard(Starlette(routes=ROUTES), bounds)
    protocol = guarded_protocol(HEADER_S, WRITE_S)
    with live(app, http=protocol, limit_concurrency=40, h11_max_incomplete_event_size=16384) as it:
        yield it


def post(path: str, *fields: str, body: bytes = b"") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", *fields]
    return "\r\n".join([*lines, "", ""]).encode() + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def dripped(sock: socket.socket, data: bytes) -> None:
    """Send a byte at a time, until the other side will have no more."""
    with contextlib.suppress(OSError):
        for byte in data:
            sock.sendall(bytes([byte]))
            time.sleep(0.05)


def healthy(server: Live) -> bool:
    answer = asked(server.port, b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    return status_of(answer) == 200


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"GET /hea",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-",
        b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /hea",
    ],
)
def test_half_a_header_is_not_waited_for(server: Live, start: bytes) -> None:
    """The last: after a whole request on the same connection."""
    with connected(server.port) as sock:
        begun = time.monotonic()
        sock.sendall(start)
        until_closed(sock, 10)
        assert HEADER_S * 0.8 < time.monotonic() - begun < HEADER_S + 2


def test_a_header_that_comes_in_drops_is_not_waited_for(server: Live) -> None:
    with connected(server.port) as sock:
        begun = time.monotonic()
        dripped(sock, b"GET /health HTTP/1.1\r\nHost: " + b"a" * 400)
        assert time.monotonic() - begun < HEADER_S + 2


def test_a_slow_but_whole_header_is_served(server: Live) -> None:
    with connected(server.port) as sock:
        for part in (b"GET /health HTTP/1.1\r\n", b"Host: a\r\n", b"Connection: close\r\n\r\n"):
            time.sleep(HEADER_S / 6)
            sock.sendall(part)
        assert status_of(until_closed(sock)) == 200


def test_an_idle_connection_may_ask_again(server: Live) -> None:
    """Beyond the time for a header: no part of the next one is there yet."""
    with connected(server.port) as sock:
        for _ in range(2):
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            answer = b""
            while not answer.endswith(b"ok"):
                answer += sock.recv(4096)
            assert status_of(answer) == 200
            time.sleep(HEADER_S * 1.5)


def test_many_half_open_connections_pass_and_others_are_served_again(server: Live) -> None:
    socks = [connected(server.port) for _ in range(60)]
    for sock in socks:
        sock.sendall(b"GET /health HTTP/1.1\r\nHo")
    time.sleep(HEADER_S + 0.5)
    assert healthy(server)
    for sock in socks:
        sock.close()
    until = time.monotonic() + 5
    while server.connections and time.monotonic() < until:
        time.sleep(0.02)
    assert server.connections == 0


@pytest.mark.parametrize("path", ["/count", "/caught"])
def test_half_a_body_is_answered_408(server: Live, path: str) -> None:
    with connected(server.port) as sock:
        begun = time.monotonic()
        sock.sendall(post(path, "Content-Length: 50", body=b"x" * 20))
        answer = until_closed(sock, 10)
        assert BODY_S * 0.8 < time.monotonic() - begun < BODY_S + 2
    assert status_of(answer) == 408
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert error["code"] == "body_too_slow"
    assert error["message"].startswith("20 bytes")


def test_a_body_that_trickles_is_answered_408(server: Live) -> None:
    """Each pause is short enough, the rate is not."""
    with connected(server.port) as sock:
        begun = time.monotonic()
        sock.sendall(post("/count", "Content-Length: 5000"))
        while not select.select([sock], [], [], BODY_S / 5)[0]:
            sock.sendall(b"x")
            assert time.monotonic() - begun < BODY_S + 2
        answer = until_closed(sock, 10)
    assert status_of(answer) == 408


def test_what_trickles_after_the_answer_ends_too(server: Live) -> None:
    with connected(server.port) as sock:
        begun = time.monotonic()
        sock.sendall(post("/unread", "Content-Length: 5000", body=b"x"))
        sock.settimeout(10)
        assert status_of(sock.recv(4096)) == 200
        dripped(sock, b"x" * 200)
        assert time.monotonic() - begun < HEADER_S + 2


def test_a_body_over_the_bound_is_413_declared_or_not(server: Live) -> None:
    small = b"y" * (MAX_BODY // 2)
    close = "Connection: close"
    fits = asked(server.port, post("/count", "Content-Length: 50000", close, body=small))
    assert (status_of(fits), fits[-5:]) == (200, b"50000")
    declared = asked(server.port, post("/count", "Content-Length: 10000000"))
    chunked = post("/count", "Transfer-Encoding: chunked") + chunk(small) * 3 + chunk(b"")
    whole = asked(server.port, post("/count", f"Content-Length: {MAX_BODY + 1}") + small * 2 + b"y")
    for answer in (declared, whole, asked(server.port, chunked)):
        assert status_of(answer) == 413
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert error["code"] == "body_too_large"
        assert str(MAX_BODY) in error["message"]
    two = post("/count", "Transfer-Encoding: chunked", close) + chunk(small) * 2 + chunk(b"")
    exact = asked(server.port, two)
    assert exact.endswith(b"100000")


def test_20000_chunks_of_one_byte_cost_little(server: Live) -> None:
    begun = time.monotonic()
    body = chunk(b"z") * 20_000 + chunk(b"")
    answer = asked(
        server.port, post("/count", "Transfer-Encoding: chunked", "Connection: close") + body
    )
    assert answer.endswith(b"20000")
    assert time.monotonic() - begun < 8
    assert healthy(server)


@pytest.mark.parametrize("count_and_size", [(1, 64_000), (150, 20), (4, 5_000)])
def test_large_headers_are_refused(server: Live, count_and_size: tuple[int, int]) -> None:
    """In one packet: h11 counts only what is not yet whole. 400 is h11's own answer to one."""
    number, size = count_and_size
    fields = [f"X-{i}: {'v' * size}" for i in range(number)]
    head = "\r\n".join(["GET /health HTTP/1.1", "Host: a", "Connection: close", *fields, "", ""])
    assert status_of(asked(server.port, head.encode())) in (400, 431)
    assert healthy(server)


def test_a_client_that_reads_nothing_is_let_go(server: Live) -> None:
    with connected(server.port) as sock:
        sock.sendall(b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n")
        until = time.monotonic() + WRITE_S + 4
        time.sleep(WRITE_S / 2)
        while server.connections and time.monotonic() < until:
            time.sleep(0.05)
        assert server.connections == 0


def test_an_answer_does_not_wait_for_acknowledgements() -> None:
    """On a listener that does not name TCP, as a supervisor may hand one over."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    app = Guard(Starlette(routes=ROUTES))
    took = []
    with (
        live(app, listener=listener, http=guarded_protocol(5, 5)) as it,
        connected(it.port) as sock,
    ):
        for _ in range(15):
            begun = time.monotonic()
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            answer = b""
            while not answer.endswith(b"ok"):
                answer += sock.recv(4096)
            took.append(time.monotonic() - begun)
    assert statistics.median(took) < 0.03


def test_nothing_is_left_open(server: Live) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    assert healthy(server)
    before = descriptors()
    for _ in range(20):
        with connected(server.port) as sock:
            sock.sendall(post("/count", "Content-Length: 50", body=b"x"))
        with connected(server.port) as sock:
            sock.sendall(b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n")
            sock.recv(100)
    until = time.monotonic() + 5
    while server.connections and time.monotonic() < until:
        time.sleep(0.02)
    assert server.connections == 0
    assert descriptors() <= before + 1
