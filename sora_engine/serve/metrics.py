"""What a service tells Prometheus: counts, times and gauges, with labels of few fixed values.

No label has a prompt, an id, a key or an owner: what clients send cannot make new time series.
Names follow Prometheus's rules: base units, `_total` for counters.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

if TYPE_CHECKING:
    from sora_engine.serve.live import Live
    from sora_engine.serve.store import Row

OUTCOMES = ("completed", "failed", "cancelled", "refused", "expired_deadline")
REASONS = (
    "queue_full",
    "too_many_jobs",
    "too_many_streams",
    "loading",
    "draining",
    "disk_full",
    "engine_dead",
    "refused",
)
STAGES = ("queued", "encoding", "denoising", "decoding", "writing")
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 3600)
STEP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKENS = tuple(float(1 << n) for n in range(6, 19, 2))
_OTHER = "other"
CODES = frozenset(
    {
        *("none", "cancelled", "refused", "deadline", "memory_limit", "out_of_memory", "internal"),
        *(
            "device_error",
            "rank_failed",
            "engine_dead",
            "unreadable_media",
            "not_finite",
            "crashed",
        ),
        *("invalid_value", "disk_full", "lost"),
    }
)


@dataclass(slots=True)
class _Seen:
    """Of a job that is under way: since when, when it was handed to the engine, its last step."""

    began: float
    handed: float | None = None
    steps: int = 0
    stepped: float = 0.0
    resumed: bool = False


class Metrics:
    """All of one server's. Safe to use from any thread."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self.model = ""
        self._clock = clock
        self._own_step: Histogram
        self._seen: dict[str, _Seen] = {}

        def counter(name: str, told: str, *labels: str) -> Counter:
            return Counter(name, told, labels, registry=self.registry)

        def gauge(name: str, told: str) -> Gauge:
            return Gauge(name, told, registry=self.registry)

        def histogram(name: str, told: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, told, labels, buckets=buckets, registry=self.registry)

        self.running = gauge("sora_jobs_running", "jobs that were begun and are not done")
        self.waiting = gauge("sora_jobs_waiting", "jobs that wait")
        self.jobs = counter("sora_jobs_total", "jobs that ended", "model", "outcome", "code")
        self.stage = histogram("sora_job_seconds", "time in a stage", SECONDS, "model", "stage")
        self.whole = histogram(
            "sora_job_end_to_end_seconds", "from a job's creation to its end", SECONDS, "model"
        )
        self.step = histogram(
            "sora_step_seconds", "between two finished steps of a job", STEP_SECONDS, "model"
        )
        self.batch_tokens = histogram(
            "sora_batch_tokens", "tokens of the largest pass of each job", TOKENS, "model"
        )
        self.batch_jobs = histogram(
            "sora_batch_jobs", "most jobs that shared a pass, by job", (1, 2, 4, 8, 16, 32), "model"
        )
        self.video_seconds = counter("sora_video_seconds_total", "seconds of video made", "model")
        self.frames = counter("sora_frames_total", "frames made", "model")
        self.real_time = histogram(
            "sora_real_time_factor",
            "seconds of work for a second of video",
            (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000),
            "model",
        )
        self.refusals = counter(
            "sora_queue_refusals_total",
            "requests that found no place, or that a hook refused",
            "reason",
        )
        self.promised = gauge("sora_memory_promised_bytes", "planned peaks of the jobs under way")
        self.peak = gauge("sora_memory_peak_bytes", "the largest resident set of this process")
        self.resumed = counter("sora_resumed_jobs_total", "jobs taken up from a file", "model")
        self.uploads = counter("sora_upload_bytes_total", "bytes of uploads that were taken")
        self.streams = gauge("sora_event_streams", "event streams that are open")
        self.disk_free = gauge("sora_disk_free_bytes", "free bytes of the data folder's disk")
        self.engine_up = gauge("sora_engine_up", "whether the engine serves")
        self.draining = gauge("sora_draining", "whether the server is about to stop")
        self.requests = counter("sora_http_requests_total", "requests", "method", "status")
        self.peak.set_function(_largest_resident_set)
        for reason in REASONS:
            self.refusals.labels(reason)

    def serves(self, model: str) -> None:
        """The model is loaded. model: its name, the label of what depends on it.

        Series that are 0 are there from the start: an alert on their increase works."""
        self.model = model
        self._own_step = self.step.labels(model)  # after each step: looked up once
        for outcome, code in (("completed", "none"), ("cancelled", "cancelled")):
            self.jobs.labels(self.model, outcome, code)
        for stage in STAGES:
            self.stage.labels(self.model, stage)

    def refused(self, code: str) -> None:
        """A request found no place."""
        self.refusals.labels(code if code in REASONS else _OTHER).inc()

    def text(self) -> bytes:
        """The exposition that Prometheus reads."""
        return generate_latest(self.registry)

    # What is seen.

    def saw(self, live: Live) -> None:
        """A job came, or has got further; on whatever thread."""
        now, job = self._clock(), live.job
        seen = self._seen.setdefault(live.row.id, _Seen(now))
        if job is None:
            return
        if seen.handed is None:
            seen.handed = now
        if not seen.resumed and job.resumed_at is not None:
            seen.resumed = True
            self.resumed.labels(self.model).inc()
        steps = live.steps
        if job.state == "denoising" and steps > seen.steps:
            if seen.stepped:
                self._own_step.observe((now - seen.stepped) / (steps - seen.steps))
            seen.steps, seen.stepped = steps, now

    def _stages(self, live: Live, seen: _Seen, now: float, facts: dict[str, Any]) -> None:
        spent = {} if live.job is None else dict(live.job.timings_s)
        handed = now if seen.handed is None else seen.handed
        spent["queued"] = spent.get("queued", 0.0) + handed - seen.began
        if "stage_durations" in facts:
            spent["writing"] = facts["stage_durations"]["writing"]
        for stage in STAGES:
            if stage in spent:
                self.stage.labels(self.model, stage).observe(spent[stage])

    def ended(self, live: Live, row: Row | None) -> None:
        """A job is done. row: its last one; None for a job that was deleted."""
        now = self._clock()
        facts: dict[str, Any] = {} if row is None else row.facts
        seen = self._seen.pop(live.row.id, None)
        if seen is not None:
            self._stages(live, seen, now, facts)
            self.whole.labels(self.model).observe(now - seen.began)
        state = "cancelled" if row is None or row.state == "deleting" else row.state
        code = (facts.get("error") or {}).get("code", "none")
        if state == "cancelled":
            code = "cancelled"
        outcome = {"deadline": "expired_deadline", "refused": "refused"}.get(code, state)
        outcome = outcome if outcome in OUTCOMES else "failed"
        self.jobs.labels(self.model, outcome, code if code in CODES else _OTHER).inc()
        if state == "completed" and row is not None:
            self._made(row)

    def _made(self, row: Row) -> None:
        facts, model = row.facts, self.model
        seconds = facts["num_frames"] / facts["fps"]
        self.frames.labels(model).inc(facts["num_frames"])
        self.video_seconds.labels(model).inc(seconds)
        if facts.get("inference_time_s") is not None:
            self.real_time.labels(model).observe(facts["inference_time_s"] / seconds)
        receipt = facts.get("receipt")
        if receipt is not None:
            self.batch_tokens.labels(model).observe(receipt["largest_batch_tokens"])
            self.batch_jobs.labels(model).observe(receipt["most_in_company"])


def _largest_resident_set() -> float:
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
