"""Several servers behind a proxy: they are processes, and the proxy is a thread of this one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from sora_engine.serve.replicas.children import Children, Place, places_in
from sora_engine.serve.replicas.homes import Home, Homes
from sora_engine.serve.replicas.proxy import Proxy
from sora_engine.serve.replicas.server import settings_of_place, transport_to
from tests.serve.raw import Live
from tests.serve.servers import Asked, Nursery


class Forked:
    """A server of the nursery, as `Children` want one."""

    def __init__(self, nursery: Nursery, options: dict[str, Any]) -> None:
        self._nursery = nursery
        self.pid: int = nursery.ask({"start": options})
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            self._code = self._nursery.ask({"wait": self.pid})
        return self._code

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


class Cluster(Asked):
    """`count` servers and their proxy. A context manager, which kills what still runs."""

    def __init__(
        self, nursery: Nursery, data: Path, count: int, *, faults: Any = None, **settings: Any
    ) -> None:
        self.data = data
        self._nursery, self._settings, self._faults = nursery, settings, faults or {}
        self._sockets = tempfile.TemporaryDirectory(prefix="sora-")
        self.processes: dict[str, Forked] = {}
        self._places = places_in(data, count, Path(self._sockets.name))
        self.children = Children(self._places, self._spawn)
        self._watch = threading.Thread(target=lambda: asyncio.run(self.children.watch()))
        self._watch.start()
        self._begin()

    def _begin(self) -> None:
        self.homes = Homes(Home(p.name, transport_to(p.socket)) for p in self._places)
        proxy = Proxy(self.homes, lambda: self.children.restarts)
        self.proxy = Live(proxy, lifespan="on", timeout_graceful_shutdown=1)
        self.url = f"http://127.0.0.1:{self.proxy.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.until(lambda: all(home.state == "ready" for home in self.homes.all))

    def new_proxy(self) -> None:
        """End the proxy, and start one that has never seen the servers."""
        self.http.close()
        self.proxy.stop()
        self._begin()

    def _spawn(self, place: Place) -> Forked:
        told = {"name": place.name, "data": str(place.data), "socket": str(place.socket)}
        own = settings_of_place(json.dumps(told))
        settings = {"min_free": 0, "keep_latents": True, **self._settings, **own}
        made = Forked(
            self._nursery,
            {
                "settings": settings,
                "faults": {"quick_linger": 1, **self._faults},
                "log": str(self.log(place.name)),
            },
        )
        self.processes[place.name] = made
        return made

    def log(self, name: str) -> Path:
        self.data.mkdir(exist_ok=True, parents=True)
        return self.data / f"{name}.log"

    def text(self) -> str:
        logs = [self.log(place.name) for place in self._places]
        return "\n".join(log.read_text()[-2000:] for log in logs if log.exists())

    def data_of(self, name: str) -> Path:
        return self.data / home_of(name)

    def kill(self, name: str) -> None:
        self.processes[name].send_signal(signal.SIGKILL)

    def until(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        for _ in range(int(timeout_s / 0.02)):
            if condition():
                return
            threading.Event().wait(0.02)
        raise AssertionError(self.text())

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.children.stop(signal.SIGKILL)
        self._watch.join()
        self.http.close()
        self.proxy.stop()
        self._sockets.cleanup()


def home_of(name: str) -> str:
    match = re.fullmatch(r"video_([a-z0-9]+)_[a-z0-9]{26}", name)
    assert match is not None
    return match[1]
