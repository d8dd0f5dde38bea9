"""What stands around the jobs: guards, keys, turns, metrics, events. `lay_around` puts it there."""

from __future__ import annotations

import logging
import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sora_engine.serve import session, streams, telling, uploads
from sora_engine.serve.access import Access, AccessRules, Sessions
from sora_engine.serve.events import Events
from sora_engine.serve.failures import ApiError
from sora_engine.serve.guard import Bounds, Guard
from sora_engine.serve.intake import Caps, Intake
from sora_engine.serve.keys import Keys
from sora_engine.serve.metrics import Metrics
from sora_engine.serve.session_files import SharedSessions
from sora_engine.serve.settings import Settings
from sora_engine.serve.store import DONE
from sora_engine.serve.tracing import Tracing
from sora_engine.serve.turns import Turn, Turns

if TYPE_CHECKING:
    from sora_engine.serve.desk import Desk
    from sora_engine.serve.live import Live
    from sora_engine.serve.service import Service

logger = logging.getLogger("sora_engine.serve.requests")

GONE = 499
"""For the log and the metrics: the client went away within its body."""
SESSIONS = "sessions"
"""The folder of cookies, beside the folders of replicas that share it."""
PROBES = ("/health", "/ready")
"""What is asked twice a second fills no log."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def lay_around(app: FastAPI, service: Service) -> None:
    """Add the routes and the middleware; to be called before the outermost one is added. Raises
    KeyFileError, BackendError."""
    settings = service.settings
    state = app.state
    state.keys = keys_of(settings)
    state.sessions = Sessions()
    if settings.shared and state.keys is not None:
        folder = settings.data_dir.expanduser().parent / SESSIONS
        state.sessions = SharedSessions(folder, state.keys)
    state.metrics = Metrics()
    state.events = Events(watch=state.metrics.streams)
    state.intake = Intake(
        Caps(max_pixels=settings.max_upload_pixels, max_frames=settings.max_upload_frames)
    )
    tracing = Tracing() if settings.otel else None
    for router in (streams.router, uploads.router, session.router, telling.router):
        app.include_router(router)
    service.verify = lambda path: _verify(path, state.intake, state.metrics)
    service.keys = state.keys
    service.on_failure.append(lambda told: _count_refusal(state.metrics, told))
    service.on_stopping.append(state.events.close)
    service.on_desk.append(lambda desk: _watch(desk, state.metrics, state.events, tracing))
    _read_gauges(state.metrics, service)

    bounds = Bounds(
        max_body=settings.max_upload,
        max_header=settings.max_header_bytes,
        body_s=settings.body_timeout_s,
    )
    rules = AccessRules(
        keys=state.keys,
        hosts=settings.allow_hosts,
        origins=settings.cors,
        open_metrics=settings.loopback,
    )
    # The last one added is the first that a request meets.
    app.add_middleware(Heads)
    app.add_middleware(Access, rules=rules, sessions=state.sessions)
    if settings.cors:  # before keys: a browser asks whether it may ask, and sends none with that
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID"],
            expose_headers=["X-Request-ID", "OpenAI-Poll-After-Ms", "Retry-After"],
        )
    app.add_middleware(Guard, bounds=bounds)
    app.add_middleware(Counted, metrics=state.metrics)


_OWN = re.compile(r"/v1/videos/[^/]+/(events|content)")
"""Paths whose HEAD is not their GET: the one does not end, the other reads a file for nothing."""


class Heads:
    """Answers HEAD as GET, whose body the connection leaves out (RFC 9110, 9.3.2)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD" and not _OWN.match(scope["path"]):
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


def _verify(path: Path, intake: Intake, metrics: Metrics) -> None:
    intake.examine(path)
    metrics.uploads.inc(path.stat().st_size)


def keys_of(settings: Settings) -> Keys | None:
    """All keys of the settings; None where nobody needs one."""
    named = [] if settings.api_keys is None else list(Keys.read(settings.api_keys))
    single = [] if settings.api_key is None else list(Keys.of_one(settings.api_key))
    return Keys([*named, *single]) if named or single else None


def turn_of(live: Live) -> Turn:
    """What a job's turn depends on: its work is pixels times steps, as they are asked for."""
    facts = live.row.facts
    width, _, height = facts["size"].partition("x")
    work = float(int(width) * int(height) * facts["num_frames"] * max(1, facts["num_steps"]))
    return Turn(live.row.owner, work, facts.get("priority", 0), live.row.number)


def _watch(desk: Desk, metrics: Metrics, events: Events, tracing: Tracing | None) -> None:
    turns: Turns[Live] = Turns(turn_of)
    desk.choose, desk.order = turns.choose, turns.order
    metrics.serves(desk.engine.model.name)

    lock = threading.Lock()

    def changed(live: Live) -> None:
        with lock:  # a word on how far it is may come late, behind the one on its end
            ended = live.done.done() and not live.counted
            live.counted = live.counted or ended
            if ended or not live.done.done():
                metrics.saw(live)
        if ended:
            row = live.row if live.row.state in DONE else desk.store.get(live.row.id)
            metrics.ended(live, row)
            if tracing is not None:
                tracing.ended(row or replace(live.row, state="cancelled"), desk.clock.now())
        events.tell(live.row.id, last=ended)

    desk.on_change.append(changed)


def _read_gauges(metrics: Metrics, service: Service) -> None:
    """Gauges that are read when they are asked for."""

    def of_desk(number: int) -> Any:
        return lambda: service.desk.counts[number] if service.has_desk else 0

    def promised() -> int:
        return service.desk.promised_bytes if service.has_desk else 0

    metrics.waiting.set_function(of_desk(0))
    metrics.running.set_function(of_desk(1))
    metrics.promised.set_function(promised)
    metrics.disk_free.set_function(lambda: service.files.free_bytes())
    metrics.engine_up.set_function(lambda: service.has_desk and not service.dead)
    metrics.draining.set_function(lambda: service.draining)


def _count_refusal(metrics: Metrics, told: ApiError) -> None:
    if told.status in (429, 503) or told.code == "refused":
        metrics.refused(told.code)
    if told.code == "refused":
        logger.info("a hook refused a request")  # and no word of what it asked for


class Counted:
    """Counts requests, and logs each with its id: its method and path, never its body."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.monotonic(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except ClientDisconnect:
            status = status or GONE
            raise
        finally:
            method = scope["method"] if scope["method"] in METHODS else "other"
            self._metrics.requests.labels(method, str(status or 500)).inc()
            probe = method in ("GET", "HEAD") and scope["path"] in PROBES
            logger.log(
                logging.DEBUG if probe else logging.INFO,
                "%s %s %d",
                method,
                scope["path"][:200].encode("unicode_escape").decode(),
                status,
                extra={
                    "request_id": scope["state"].get("request_id"),
                    "owner": scope["state"].get("owner"),
                    "ms": round(1000 * (time.monotonic() - begun), 1),
                },
            )
