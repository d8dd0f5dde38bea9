"""Several servers on the machines of a Ray cluster: `serve run sora_engine.serve.ray_app:app`.

Each home is a Serve deployment of its own with one replica, so that a job's id names the deployment
that has it, and Ray starts a dead one anew wherever there is room. It takes up the rows, savepoints
and results of its folder, which lies on storage that all machines see. Requests go from the proxy
to a home as calls of Ray: a home opens no port.

What is set: the settings of `sora serve`, as `SORA_` variables or as arguments of `build`.

    SORA_DATA_DIR=/shared/sora SORA_REPLICAS=8 serve run sora_engine.serve.ray_app:app
    serve run sora_engine.serve.ray_app:build data_dir=/shared/sora replicas=8 num_gpus=1
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from sora_engine.serve.replicas.homes import Home, Homes
from sora_engine.serve.replicas.proxy import Proxy
from sora_engine.serve.settings import settings_from

ENGINE = ("model", "device", "dtype", "offload", "vae_backend", "vae_dtype")
"""What `build` takes for `Engine.from_pretrained`."""
ACTOR = ("num_gpus", "num_cpus")
"""What it takes for the machine of each home."""
HEALTH_S = 5.0

Answer = AsyncIterator[Any]


def build(arguments: Mapping[str, str]) -> Any:
    """The application for `serve run` and `serve.run`.

    arguments: settings of `sora serve` by their names, `model`, `device` and the like of
    `Engine.from_pretrained`, and `num_gpus` and `num_cpus` of each home. Raises ValueError for what
    cannot be.
    """
    given = {name: arguments[name] for name in arguments if name not in (*ENGINE, *ACTOR)}
    known = {_short(name) for name in given}
    environment = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("SORA_") and _short(name.removeprefix("SORA_").lower()) not in known
    }
    settings = settings_from({}, environment, given)
    engine = {name: arguments[name] for name in ENGINE if name in arguments}
    engine.setdefault("model", os.environ.get("SORA_MODEL", "sprites"))
    machine = {name: float(arguments[name]) for name in ACTOR if name in arguments}
    homes = []
    home: Any = RayHome  # what the decorators make of them
    door: Any = Door
    for i in range(settings.replicas):
        place = {
            "data_dir": str(settings.data_dir.expanduser().absolute() / str(i)),
            "replica": str(i),
            "shared": True,
            "replicas": 1,
        }
        deployment = home.options(name=f"home-{i}", ray_actor_options=machine or None)
        homes.append(deployment.bind(environment, given, place, engine))
    return door.bind(homes)


def _short(name: str) -> str:
    return name.replace("-", "_").removesuffix("_s")


def __getattr__(name: str) -> Any:
    """`app`, by the environment; not made before it is asked for, as each worker imports this."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return build({})


@serve.deployment(
    num_replicas=1,
    max_ongoing_requests=1000,
    health_check_period_s=HEALTH_S,
    graceful_shutdown_timeout_s=5,
)
class RayHome:
    """One server: its engine, its folder, and its application."""

    async def __init__(  # type: ignore[misc]  # as Ray has it
        self,
        environment: dict[str, str],
        given: dict[str, str],
        place: dict[str, Any],
        engine: dict[str, str],
    ) -> None:
        from sora_engine.runtime.engine import Engine
        from sora_engine.serve.app import make_app

        settings = settings_from(place, environment, given)
        kinds: dict[str, Any] = dict(engine)
        model = kinds.pop("model")

        def make_engine() -> Engine:
            options: dict[str, Any] = {"limits": settings.limits(), "hooks": settings.hooks}
            return Engine.from_pretrained(model, **kinds, **options)

        self._app = make_app(make_engine, settings)
        self._service = self._app.state.service
        # A folder that a dying one of before still has makes this raise, and Ray tries again.
        await self._service.start()

    def check_health(self) -> None:
        """Ray starts a home anew whose engine is dead or could not be made."""
        if self._service.dead or self._service.failed is not None:
            raise RuntimeError(f"the engine is dead: {self._service.failed or 'a device failed'}")

    async def ask(
        self, method: str, target: bytes, headers: list[tuple[bytes, bytes]], body: bytes
    ) -> Answer:
        """A request's answer: its status, headers and first piece, and then the others. A short
        answer is one message, so that a home that dies sends all of it or nothing."""
        path, _, query = target.partition(b"?")
        known = dict(headers)
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": known.get(b"x-forwarded-proto", b"http").decode(),
            "path": httpx.URL("http://home").copy_with(raw_path=path).path,
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": headers,
            "client": (known.get(b"x-forwarded-for", b"ray").decode(), 0),
            "server": ("home", 0),
            "state": {},
        }
        sent: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(16)
        left = asyncio.Event()
        bodies = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if bodies:
                return bodies.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(scope, receive, sent.put)  # type: ignore[arg-type]
            finally:
                await sent.put(None)

        task = asyncio.create_task(run())
        try:
            start: dict[str, Any] | None = None
            while (message := await sent.get()) is not None:
                if message["type"] == "http.response.start":
                    start = message
                elif start is not None:
                    yield start["status"], list(start["headers"]), message.get("body", b"")
                    start = None
                elif message.get("body"):
                    yield message["body"]
            await task
        finally:
            left.set()
            task.cancel()


class RayTransport(httpx.AsyncBaseTransport):
    """A home as the proxy asks it."""

    def __init__(self, handle: Any) -> None:
        self._ask = handle.options(stream=True).ask

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Raises ReadError where the home is gone."""
        body = await request.aread()
        answer = self._ask.remote(
            request.method, request.url.raw_path, [(n, v) for n, v in request.headers.raw], body
        )
        try:
            status, headers, piece = await anext(answer)
        except asyncio.CancelledError:
            answer.cancel()
            raise
        except (RayError, RayServeException, StopAsyncIteration) as error:
            raise httpx.ReadError(str(error), request=request) from error
        return httpx.Response(
            status, headers=headers, stream=_Pieces(piece, answer), request=request
        )


class _Pieces(httpx.AsyncByteStream):
    def __init__(self, first: bytes, answer: Any) -> None:
        self._first, self._answer = first, answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            yield self._first
            async for piece in self._answer:
                yield piece
        except (RayError, RayServeException) as error:
            raise httpx.ReadError(str(error)) from error

    async def aclose(self) -> None:
        self._answer.cancel()


@serve.deployment(max_ongoing_requests=1000)
@serve.ingress()
class Door:
    """The proxy. It keeps nothing, so there may be several."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def __serve_build_asgi_app__(self) -> Proxy:
        return Proxy(Homes(Home(str(i), RayTransport(h)) for i, h in enumerate(self._handles)))
