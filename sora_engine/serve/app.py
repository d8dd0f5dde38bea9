"""The ASGI application: routers, what stands in front of them, and what it starts and ends."""

from __future__ import annotations

import logging
import secrets
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sora_engine.errors import SoraError
from sora_engine.serve import health, images, models, page, plans, videos, works
from sora_engine.serve.around import lay_around
from sora_engine.serve.document import describe
from sora_engine.serve.failures import ApiError, api_error, bad_value, envelope
from sora_engine.serve.service import Service
from sora_engine.serve.settings import Settings
from sora_engine.version import version

if TYPE_CHECKING:
    from sora_engine.runtime.engine import Engine

logger = logging.getLogger(__name__)

ROUTERS = (
    *(works.router, plans.router, videos.router),
    *(images.router, models.router, health.router),
)
"""`works` before `videos`: its paths, such as /v1/videos/connect, would be taken for ids."""


def make_app(engine: Engine | Callable[[], Engine], settings: Settings | None = None) -> FastAPI:
    """The service as an ASGI application.

    engine: one that the caller closes; or what makes one, which is called in a thread once the
    server listens, and whose engine the service closes. settings: those of its data folder count
    from when it starts (its lifespan).
    """
    service = Service(engine, settings or Settings())

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(
        title="sora_engine",
        version=version(),
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.service = service
    for router in ROUTERS:
        app.include_router(router)
    if service.settings.page:
        app.include_router(page.router)
    lay_around(app, service)
    describe(app)
    _answer_failures(app, service)
    # The last one added is the first that a request meets.
    app.add_middleware(Named)
    return app


def _answer_failures(app: FastAPI, service: Service) -> None:
    async def api(_request: Request, error: Exception) -> JSONResponse:
        told = api_error(error, service.hidden)
        for watcher in service.on_failure:
            watcher(told)
        if told.status == 500:
            logger.error("a request failed: %s", type(error).__name__, exc_info=error)
        return JSONResponse(told.envelope(), told.status, told.headers)

    async def http(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code = _HTTP_CODES.get(error.status_code, "invalid_request")
        body = envelope(error.status_code, code, str(error.detail))
        return JSONResponse(body, error.status_code, error.headers)

    async def invalid(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        param = str(first["loc"][-1])
        told = bad_value(f"{param}: {first['msg']}", param)
        return JSONResponse(told.envelope(), told.status)

    app.add_exception_handler(ApiError, api)
    app.add_exception_handler(SoraError, api)
    app.add_exception_handler(OSError, api)
    app.add_exception_handler(sqlite3.Error, api)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)


_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 408: "slow_body", 413: "too_large"}


class Named:
    """Gives each request an id, which its answer and its log lines have, and each exception that
    nothing else has answered a 500 without details."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = name
        begun = False

        async def named(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                plain = [(b"x-request-id", name.encode()), (b"x-content-type-options", b"nosniff")]
                message["headers"] = [*message.get("headers", ()), *plain]
            await send(message)

        try:
            await self._app(scope, receive, named)
        except ClientDisconnect:  # in the midst of its body: nobody waits for an answer
            logger.info("the client of request %s has gone", name)
        except Exception as error:
            logger.exception("request %s failed: %s", name, type(error).__name__)
            if begun:  # the client sees that the answer is cut
                raise
            told: dict[str, Any] = api_error(error).envelope()
            await JSONResponse(told, api_error(error).status)(scope, receive, named)
