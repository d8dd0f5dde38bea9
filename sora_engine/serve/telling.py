"""`/metrics`, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from sora_engine.serve.failures import not_found
from sora_engine.serve.metrics import Metrics
from sora_engine.serve.service import service_of

router = APIRouter(tags=["health"])


@router.get("/metrics", operation_id="metrics", response_class=Response)
def metrics(request: Request) -> Response:
    """Counts, times and gauges, as text for Prometheus."""
    if not service_of(request).settings.metrics:
        raise not_found("page")
    told: Metrics = request.app.state.metrics
    return Response(told.text(), media_type=told.content_type)
