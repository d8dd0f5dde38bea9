"""Raw sockets, and a server in this process for an ASGI application: what no client sends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn


class Live:
    """An application on a loopback port, its loop in a thread."""

    def __init__(self, app: Any, listener: socket.socket | None = None, **options: Any) -> None:
        given = {"lifespan": "off", "log_config": None, **options}
        config = uvicorn.Config(app, host="127.0.0.1", port=0, **given)
        self.server = uvicorn.Server(config)
        self._listener = listener
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        while not self.server.started:
            time.sleep(0.01)
        opened = listener or self.server.servers[0].sockets[0]
        self.port: int = opened.getsockname()[1]

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self.server.serve(None if self._listener is None else [self._listener])

    def call(self, function: Callable[[], None]) -> None:
        """Call a function in the loop, and wait until it has run."""
        assert self._loop is not None
        over = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (function(), over.set()))
        assert over.wait(10)

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)

    def stop(self) -> None:
        self.server.should_exit = True
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
