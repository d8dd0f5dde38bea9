"""`/v1/models`: the one model, and what it takes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request

from sora_engine.models.registry import families
from sora_engine.serve.document import FAILURES
from sora_engine.serve.failures import not_found
from sora_engine.serve.service import desk_of, owner_of, service_of

router = APIRouter(prefix="/v1/models", tags=["models"], responses=FAILURES)


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
        "ladders": sorted(
            name for known in families() if known.name == model.family for name in known.ladders
        ),
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
