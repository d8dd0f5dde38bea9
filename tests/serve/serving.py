"""A whole service in this process: the bundled checkpoint, loaded once, on a loopback port."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

import sora_engine as sora
from sora_engine.serve import Settings, make_app
from sora_engine.serve.guard import guarded_protocol
from tests.faults.engines import sprites
from tests.serve.raw import Live, live

SMALL = {
    "prompt": "a red circle moves right",
    "size": "32x32",
    "num_frames": 5,
    "num_inference_steps": 2,
    "seed": 7,
}


class Service:
    """What a test has of one: an HTTP client, the application, and its engine."""

    def __init__(self, server: Live, app: Any, engine: sora.Engine, data: Path) -> None:
        self.server, self.app, self.engine, self.data = server, app, engine, data
        self.url = f"http://127.0.0.1:{server.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)

    @property
    def desk(self) -> Any:
        return self.app.state.service.desk

    def create(self, headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
        """A small job; its answer, which must be 200."""
        answer = self.http.post("/v1/videos", json={**SMALL, **fields}, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def ended(
        self, name: str, headers: dict[str, str] | None = None, timeout_s: float = 60
    ) -> dict[str, Any]:
        """The job once it is completed or failed."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            told = self.http.get(f"/v1/videos/{name}", headers=headers).json()
            if told["status"] in ("completed", "failed"):
                return told
            time.sleep(0.02)
        raise TimeoutError(f"{name} is {told}")

    def idle(self) -> None:
        """Wait until no job is under way."""
        until = time.monotonic() + 60
        while self.desk.counts != (0, 0) or self.engine.num_running:
            assert time.monotonic() < until
            time.sleep(0.02)


@contextlib.contextmanager
def served(data: Path, *, header_s: float = 10.0, **settings: Any) -> Iterator[Service]:
    """A service on a data folder."""
    made = Settings(
        data_dir=data, **{"min_free": 0, "save_every_s": 0, "max_running": 4, **settings}
    )
    with sora.Engine(sprites(), limits=made.limits(), hooks=made.hooks) as engine:
        app = make_app(engine, made)
        options = {"lifespan": "on", "http": guarded_protocol(header_s, 60.0)}
        with live(app, timeout_graceful_shutdown=2, **options) as server:
            service = Service(server, app, engine, data)
            try:
                yield service
            finally:
                for told in app.state.service.on_stopping:
                    server.call(told)
                service.http.close()
