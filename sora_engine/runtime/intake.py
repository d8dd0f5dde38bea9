"""Requests into jobs: checked, their adapters held, their memory promised, and sent to a worker."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sora_engine.config import Limits
from sora_engine.denoise.denoise import num_steps, step_tokens
from sora_engine.errors import RequestError
from sora_engine.models.adapter_store import AdapterStore, LoadedAdapter
from sora_engine.models.device import own_device
from sora_engine.request import ResolvedRequest, VideoRequest, check_for_mode, resolve_request
from sora_engine.request.checks import several
from sora_engine.request.unread import unread
from sora_engine.runtime.executor import ServedModel
from sora_engine.runtime.hooks import Hooks
from sora_engine.runtime.job import Job, JobOptions
from sora_engine.runtime.lifetime import Origin
from sora_engine.runtime.memory import MemoryPlanner
from sora_engine.runtime.options import checked_options
from sora_engine.runtime.savepoint import Savepoint
from sora_engine.runtime.saving import check_unshared
from sora_engine.runtime.stages import OF_VIDEOS
from sora_engine.runtime.worker import DECODE_STEPS, Worker
from sora_engine.samplers import SOLVERS

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Intake:
    """An engine's way from requests to jobs. planner: None where the model is elsewhere."""

    model: ServedModel
    limits: Limits
    hooks: Hooks
    planner: MemoryPlanner | None
    workers: Sequence[Worker]
    origin: Origin

    @property
    def adapters(self) -> AdapterStore:
        """Those that requests may name; RequestError where the model takes none."""
        self.origin.check()
        store = self.workers[0].executor.adapters
        if store is None:
            raise RequestError("this model takes no adapters of requests")
        return store

    @own_device()
    def resolved(self, request: VideoRequest) -> tuple[ResolvedRequest, list[LoadedAdapter]]:
        """The request with the checkpoint's defaults, checked, and its adapters, which stay for as
        long as they are held. Raises RequestError."""
        resolved = resolve_request(request, self.model, self.limits, solvers=SOLVERS)
        check_for_mode(resolved, self.model.known_mode, self.model.takes_camera)
        if not several("loras", request.loras, "Lora(path_or_name, strength)"):
            return resolved, []
        records, held = self.adapters.take(request.loras)
        return replace(resolved, loras=records), held

    def taken(self, request: VideoRequest) -> tuple[ResolvedRequest, list[LoadedAdapter]]:
        """A request that is to be made: as `resolved`, and what of it nothing reads is logged."""
        resolved, held = self.resolved(request)
        for line in unread(request, resolved, self.model.num_experts):
            logger.warning("%s", line)
        return resolved, held

    @own_device()
    def enqueue(
        self,
        request: ResolvedRequest,
        options: JobOptions,
        adapters: Sequence[LoadedAdapter] = (),
        saved: Savepoint | None = None,
    ) -> Job:
        """Queue its job at the idlest worker; raises as `Engine.submit`."""
        self.origin.check()
        options = checked_options(options)
        check_unshared(options.save_to, [job for worker in self.workers for job in worker.jobs])
        if options.on_latents is not None and self.hooks.check_frames is not None:
            raise RequestError("on_latents is not to be had where a hook checks all frames")
        if self.hooks.check_request is not None:
            self.hooks.check_request(request)
        job = Job(request, options, OF_VIDEOS)
        job.adapters = adapters
        job.batch_tokens = self.limits.max_batch_tokens
        if self.planner is not None:
            job.plan = self.planner.plan(request)
            job.batch_tokens = job.plan.batch_tokens
        job.tokens = step_tokens(request, self.model.grid)
        steps = job.planned_steps = num_steps(request, self.model.grid)
        if saved is not None:
            steps = max(0, steps - saved.step)
            job.resumed_at = saved.step
            job.provenance = saved.provenance
            job.saved = saved
        alive = [worker for worker in self.workers if worker.error is None] or self.workers
        idlest = min(alive, key=lambda worker: worker.num_queued + worker.num_running)
        idlest.enqueue(job, steps + DECODE_STEPS)
        return job
