"""Whether the server lives, and whether it takes work: for supervisors and balancers."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from sora_engine.serve.load import load_of
from sora_engine.serve.service import service_of

router = APIRouter(tags=["health"])


@router.get("/health", operation_id="health")
async def health(request: Request) -> JSONResponse:
    """200 while the process and its engine live, 503 once the engine is dead."""
    dead = service_of(request).dead
    return JSONResponse({"status": "dead" if dead else "ok"}, 503 if dead else 200)


@router.get("/ready", operation_id="ready")
async def ready(request: Request) -> JSONResponse:
    """200 while jobs are taken, with how much is to be done; 503 while the server loads, drains or
    is full, or is dead."""
    service = service_of(request)
    state = service.state
    if state != "ready":
        return JSONResponse({"status": state}, 503)
    return JSONResponse({"status": state, "load": load_of(service.desk).to_dict()})
