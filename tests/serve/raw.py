"""Raw sockets, and a server in this process for an ASGI application: what clients would not send."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn


class Live:
    """An application on a loopback port, its loop in a thread."""

    def __init__(self, app: Any, **options: Any) -> None:
        config = uvicorn.Config(
            app, host="127.0.0.1", port=0, log_level="critical", lifespan="off", **options
        )
        self.server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self.server.serve()))
        self._thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port: int = self.server.servers[0].sockets[0].getsockname()[1]

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)

    def stop(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self._thread.join()


@contextlib.contextmanager
def live(app: Any, **options: Any) -> Iterator[Live]:
    server = Live(app, **options)
    try:
        yield server
    finally:
        server.stop()


def connected(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=30)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def until_closed(sock: socket.socket, timeout_s: float = 30.0) -> bytes:
    """All that comes until the other side closes; TimeoutError where it does not."""
    sock.settimeout(timeout_s)
    received = b""
    while True:
        try:
            data = sock.recv(65536)
        except ConnectionResetError:
            return received
        if not data:
            return received
        received += data


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def asked(port: int, request: bytes) -> bytes:
    """The whole answer to a request that asks for the connection to be closed."""
    with connected(port) as sock:
        sock.sendall(request)
        return until_closed(sock)
