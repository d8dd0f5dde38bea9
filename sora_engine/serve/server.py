"""The server: uvicorn, ended so that those who poll see how their jobs end.

Exit codes, for a supervisor: 0, drained; 1, it could not start; 70, the engine is dead and a new
process is needed; 128 and the signal's number, stopped at once by a second signal.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from sora_engine.errors import SoraError
from sora_engine.serve.app import make_app
from sora_engine.serve.guard import guarded_protocol
from sora_engine.serve.service import Service
from sora_engine.serve.settings import Settings

if TYPE_CHECKING:
    from sora_engine.runtime.engine import Engine

logger = logging.getLogger(__name__)

DRAINED, FAILED, DEAD = 0, 1, 70
WRITE_S = 60.0
"""After how long a client is let go that takes nothing of what is sent to it."""
WATCH_S = 0.25
"""How often a server that is ready looks for a signal or a dead engine."""
LINGER_S = 2.0
"""How long a drained server still answers, so that those who poll see the end."""


def run(
    make_engine: Callable[[], Engine],
    settings: Settings,
    *,
    on_listening: Callable[[str], None] | None = None,
    on_ready: Callable[[], None] | None = None,
) -> int:
    """Serve until a signal comes or the engine dies; returns the exit code.

    on_listening: called with the address once connections are taken. on_ready: called once the
    model is loaded. Raises OSError where the address cannot be had, ServeError for the data folder,
    and what `make_engine` raises.
    """
    os.umask(0o077)
    app = make_app(make_engine, settings)
    listener = listener_for(settings)
    try:
        server = Server(app, settings, on_listening, on_ready)
        server.run(sockets=[listener])
    finally:
        listener.close()
    service: Service = app.state.service
    if server.startup_error is not None:
        raise server.startup_error
    if service.failed is not None:
        raise service.failed
    return DEAD if service.dead else DRAINED


def listener_for(settings: Settings) -> socket.socket:
    """The socket; here, so that a port which is taken is told before anything is loaded."""
    if settings.uds is not None:
        settings.uds.unlink(missing_ok=True)  # of a server that was killed
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(settings.uds))
        listener.listen(512)
        return listener
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError:
        listener.close()
        raise
    listener.listen(512)
    listener.set_inheritable(False)
    return listener


def address_of(listener: socket.socket) -> str:
    """Where a socket is reached, for people."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class SignalledServer(uvicorn.Server):
    """One that is asked to drain by the first signal, and ended by the second."""

    drain_wanted = False

    def end_at_once(self, code: int) -> None:
        """The process ends: what is accepted is on the disk."""
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(code)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; the second ends the process."""
        if self.drain_wanted:
            self.end_at_once(128 + sig)
        self.drain_wanted = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a signal that was handled is not raised anew at the end."""
        before = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Server(SignalledServer):
    """One that drains at the first signal: it goes on answering until its jobs are done."""

    def __init__(
        self,
        app: FastAPI,
        settings: Settings,
        on_listening: Callable[[str], None] | None = None,
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(configuration(app, settings))
        self._service: Service = app.state.service
        self._settings = settings
        self._on_listening, self._on_ready = on_listening, on_ready
        self._watch: asyncio.Task[None] | None = None
        self.startup_error: BaseException | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await self._service.open()
        except SoraError as error:
            self.startup_error = error
            self.should_exit = True
            return
        await super().startup(sockets)
        if self.should_exit:
            return
        if self._on_listening is not None and sockets:
            self._on_listening(address_of(sockets[0]))
        self._watch = asyncio.create_task(self._watched())

    async def _watched(self) -> None:
        """Look after what ends a server: a signal, a model that does not load, a dead engine."""
        service, told = self._service, False
        while not self.should_exit:
            if service.failed is not None:
                self.should_exit = True
            elif self.drain_wanted:
                await self._drain()
            elif service.dead:
                logger.error("the engine is dead; the server ends in a moment")
                await asyncio.sleep(self._settings.dead_timeout_s)
                self.should_exit = True
            elif service.has_desk and not told:
                told = True
                if self._on_ready is not None:
                    self._on_ready()
            await asyncio.sleep(WATCH_S if told else 0.05)

    async def _drain(self) -> None:
        at_work = self._service.has_desk and self._service.desk.counts[1] > 0
        logger.info("the server takes no more jobs, and finishes those at work")
        await self._service.drain()
        if self._service.has_desk and self._service.desk.counts[1]:
            logger.error("the engine does not come to an end; its jobs go on at the next start")
            os._exit(DEAD)
        if at_work:
            await asyncio.sleep(LINGER_S)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for told in self._service.on_stopping:
            told()
        await super().shutdown(sockets)


def configuration(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    """What uvicorn is told."""
    options: dict[str, Any] = {
        "host": settings.host,
        "port": settings.port,
        "lifespan": "on",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "date_header": True,
        "timeout_keep_alive": int(settings.keep_alive_timeout_s),
        "timeout_graceful_shutdown": 5,
        "h11_max_incomplete_event_size": settings.max_header_bytes,
        "http": guarded_protocol(settings.header_timeout_s, WRITE_S),
        "limit_concurrency": settings.max_connections,
        "loop": "asyncio",
        "ws": "none",
        "proxy_headers": bool(settings.forwarded_allow_ips),
        "forwarded_allow_ips": settings.forwarded_allow_ips or None,
    }
    return uvicorn.Config(app, **options)
