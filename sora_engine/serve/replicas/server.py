"""`sora serve --replicas N`: a proxy, and its servers as processes of their own.

Exit codes are those of one server: 0, all drained; 1 or 2, one could not start; 70, an engine was
dead as they ended; 128 and the signal's number, stopped at once by a second signal.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
from starlette.types import ASGIApp

from sora_engine.serve.replicas.children import (
    Children,
    Place,
    Process,
    devices_of,
    places_in,
    share_of,
    wait_until_free,
)
from sora_engine.serve.replicas.homes import READY, Home, Homes
from sora_engine.serve.replicas.proxy import Proxy
from sora_engine.serve.server import SignalledServer, address_of, configuration, listener_for
from sora_engine.serve.settings import Settings

PLACE = "SORA_PLACE"
"""The variable by which a child is told which of the servers it is."""
LINGER_S = 1.0
"""How long the proxy still answers once its servers have ended."""


def run(
    settings: Settings,
    command: Sequence[str],
    *,
    on_listening: Callable[[str], None] | None = None,
    on_ready: Callable[[], None] | None = None,
) -> int:
    """Serve with `settings.replicas` servers until a signal comes; returns the exit code.

    command: what starts one server that reads `settings_of_place`. on_listening: called with the
    address once connections are taken. on_ready: once all servers are. Raises OSError where the
    address cannot be had, ServeError for the data folder.
    """
    os.umask(0o077)
    count, environment = settings.replicas, dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="sora-") as sockets:
        places = places_in(settings.data_dir, count, Path(sockets))
        wait_until_free(places)
        processors, devices = len(os.sched_getaffinity(0)), devices_of(environment)

        def spawn(place: Place) -> Process:
            told = {"name": place.name, "data": str(place.data), "socket": str(place.socket)}
            share = share_of(places.index(place), count, processors, devices, environment)
            return subprocess.Popen(
                list(command),
                env={**environment, **share, PLACE: json.dumps(told)},
                stdin=subprocess.PIPE,  # which ends when this process does
                start_new_session=True,  # a Ctrl-C is the proxy's to pass on
            )

        return serve(settings, places, spawn, on_listening=on_listening, on_ready=on_ready)


def serve(
    settings: Settings,
    places: Sequence[Place],
    spawn: Callable[[Place], Process],
    *,
    on_listening: Callable[[str], None] | None = None,
    on_ready: Callable[[], None] | None = None,
) -> int:
    """As `run`, with servers that `spawn` starts."""
    listener = listener_for(settings)
    try:
        children = Children(places, spawn)
        homes = Homes(Home(place.name, transport_to(place.socket)) for place in places)
        proxy = Proxy(homes, lambda: children.restarts)
        server = ProxyServer(proxy, settings, children, on_listening, on_ready)
        server.run(sockets=[listener])
    finally:
        listener.close()
    return children.code


def transport_to(path: Path) -> httpx.AsyncHTTPTransport:
    """How a server at a Unix socket is asked, by any number of clients at a time."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=5)
    return httpx.AsyncHTTPTransport(uds=str(path), limits=limits, retries=0, trust_env=False)


class ProxyServer(SignalledServer):
    """uvicorn, which drains with its servers."""

    def __init__(
        self,
        proxy: Proxy,
        settings: Settings,
        children: Children,
        on_listening: Callable[[str], None] | None,
        on_ready: Callable[[], None] | None,
    ) -> None:
        app: ASGIApp = proxy
        super().__init__(configuration(app, settings))
        self._proxy, self._children = proxy, children
        self._on_listening, self._on_ready = on_listening, on_ready
        self._watch: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        await super().startup(sockets)  # type: ignore[arg-type]
        if self._on_listening is not None and sockets:
            self._on_listening(address_of(sockets[0]))  # type: ignore[arg-type]
        self._watch = asyncio.create_task(self._watched())

    async def _watched(self) -> None:
        ends = asyncio.create_task(self._children.watch())
        told = stopped = False
        while not ends.done():
            if self.drain_wanted and not stopped:
                stopped = True
                self._children.stop(signal.SIGTERM)
            if not told and all(home.state == READY for home in self._proxy.homes.all):
                told = True
                if self._on_ready is not None:
                    self._on_ready()
            await asyncio.sleep(0.05)
        if stopped:
            await asyncio.sleep(LINGER_S)
        self.should_exit = True

    def end_at_once(self, code: int) -> None:
        self._children.stop(signal.SIGKILL)
        super().end_at_once(code)


def settings_of_place(text: str) -> dict[str, Any]:
    """The settings of a child, from the value of `PLACE`."""
    place = json.loads(text)
    return {
        "uds": place["socket"],
        "data_dir": place["data"],
        "replica": place["name"],
        "shared": True,
        "replicas": 1,
        "forwarded_allow_ips": "*",  # nobody else reaches the socket
    }


def end_with_parent() -> None:
    """Have this process, a child, end when its parent does: without a proxy nobody reaches it, and
    it would keep its folder from the next one."""
    threading.Thread(target=_await_parent, name="sora-parent", daemon=True).start()


def _await_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(128 + signal.SIGKILL)  # what is accepted is on the disk
