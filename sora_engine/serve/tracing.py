"""Spans for OpenTelemetry, by its API alone: where no SDK is set up they go nowhere.

A job is one span, with a child for each stage, made when it ends: times are those that were
measured. Names are of the GenAI conventions (in development), such as `gen_ai.operation.name`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sora_engine.errors import BackendError

if TYPE_CHECKING:
    from sora_engine.serve.store import Row

TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_STAGES = ("encoding", "denoising", "decoding", "writing")


class Tracing:
    """Makes the spans of jobs. provider: of tests; by default what the process has set up."""

    def __init__(self, provider: Any = None) -> None:
        try:
            from opentelemetry import trace
        except ModuleNotFoundError as error:
            raise BackendError(
                "--otel needs opentelemetry-api: pip install opentelemetry-api opentelemetry-sdk"
            ) from error
        self._trace = trace
        self._tracer = trace.get_tracer("sora_engine.serve", tracer_provider=provider)

    def ended(self, row: Row, ended_s: float) -> None:
        """A job is done. ended_s: seconds since 1970."""
        facts, trace = row.facts, self._trace
        parent = self._context(facts.get("traceparent"))
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": "generate_content",
            "gen_ai.provider.name": "sora_engine",
            "gen_ai.output.type": row.kind,
            "gen_ai.request.model": facts["model"],
            "gen_ai.request.seed": facts["seed"],
            "sora.steps": facts["num_steps"],
            "sora.frames": facts["num_frames"],
        }
        code = (facts.get("error") or {}).get("code")
        if code is not None:
            attributes["error.type"] = code
        span = self._tracer.start_span(
            f"generate_content {facts['model']}",
            context=parent,
            kind=trace.SpanKind.SERVER,
            attributes=attributes,
            start_time=_nanoseconds(row.created),
        )
        if code is not None:
            span.set_status(trace.StatusCode.ERROR, code)
        durations = facts.get("stage_durations", {})
        at = ended_s - sum(durations.get(stage, 0.0) for stage in _STAGES)
        inside = trace.set_span_in_context(span)
        for stage in _STAGES:
            if stage in durations:
                child = self._tracer.start_span(stage, inside, start_time=_nanoseconds(at))
                at += durations[stage]
                child.end(_nanoseconds(min(at, ended_s)))  # sums are rounded
        span.end(_nanoseconds(ended_s))

    def _context(self, traceparent: str | None) -> Any:
        if traceparent is None:
            return None
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        return TraceContextTextMapPropagator().extract({"traceparent": traceparent})


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
