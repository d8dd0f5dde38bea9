"""`/v1/models`: the one model, and what it takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request

from sora_engine.request.ladders import ladder_of_file
from sora_engine.serve.document import FAILURES
from sora_engine.serve.failures import not_found
from sora_engine.serve.service import desk_of, owner_of, service_of

router = APIRouter(prefix="/v1/models", tags=["models"], responses=FAILURES)


def _ladders(own: str | None, adapters: Iterable[Path]) -> list[str]:
    """Those that the model or an adapter here was distilled for. Others of its family would be
    levels that it never learned to jump between."""
    told = (ladder_of_file(path.name) for path in adapters)
    return sorted({name for name in (own, *told) if name})


def _models(request: Request) -> list[dict[str, Any]]:
    engine, settings = desk_of(request).engine, service_of(request).settings
    model = engine.model
    limits = {
        name: getattr(settings, name)
        for name in ("max_pixels", "max_frames", "max_steps", "max_work", "max_upload")
    }
    own = {
        "grid": asdict(model.grid),
        "defaults": asdict(model.defaults),
        "known_frames": str(model.known_mode),
        "limits": limits,
        "loras": sorted(settings.loras),
        "ladders": _ladders(model.defaults.ladder, settings.loras.values()),
        "experts": model.num_experts,
        "labels": None if model.labels is None else asdict(model.labels),
        "camera": model.takes_camera,
        "max_priority": service_of(request).most_priority(owner_of(request)),
    }
    names = dict.fromkeys((model.name, *settings.aliases))
    return [
        {"id": name, "object": "model", "created": 0, "owned_by": "sora_engine", "sora": own}
        for name in names
    ]


@router.get("", operation_id="listModels")
async def models(request: Request) -> dict[str, Any]:
    """The model under each of its names, with its grid, its defaults and this server's limits."""
    return {"object": "list", "data": _models(request)}


@router.get("/{model_id:path}", operation_id="retrieveModel")
async def model(model_id: str, request: Request) -> dict[str, Any]:
    """One of them."""
    for known in _models(request):
        if known["id"] == model_id:
            return known
    raise not_found("model")
