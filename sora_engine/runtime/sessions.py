"""The sessions of an engine: how they are opened, what they may take, and their steps as jobs."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from sora_engine.errors import CheckpointError, MemoryLimitError, SessionError, SessionLimitError
from sora_engine.io.provenance import Provenance
from sora_engine.models.video_model import VideoModel
from sora_engine.request import (
    Action,
    ResolvedRequest,
    ResolvedSession,
    SessionRequest,
    resolve_session,
)
from sora_engine.request.limits import check_text
from sora_engine.runtime.intake import Intake
from sora_engine.runtime.job import Job, JobOptions
from sora_engine.runtime.memory import MemoryPlan, MemoryPlanner
from sora_engine.runtime.recall import Index, Memory, Places, Recent
from sora_engine.runtime.recording import Recording
from sora_engine.runtime.replay import frames_again
from sora_engine.runtime.session import Place, Session
from sora_engine.runtime.session_file import load_session, save_session
from sora_engine.runtime.session_memory import plan_session
from sora_engine.runtime.session_step import StepStages, Texts, request_of_step
from sora_engine.runtime.standing import Standing
from sora_engine.runtime.worker import DECODE_STEPS, Worker
from sora_engine.samplers import SOLVERS
from sora_engine.vae.shapes import look_ahead

RETRY_S = 10.0
"""When a place for a session may be free. Nobody knows: a player ends it."""


class Sessions:
    """Those of one engine. Safe to use from several threads."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._limits, self._hooks = intake.limits, intake.hooks
        self._count = 0
        # The garbage collector ends sessions, in whichever thread it runs.
        self._lock = threading.RLock()

    # For the engine.

    def open(self, owner: object, request: SessionRequest, memory: Memory | None = None) -> Session:
        """See `Engine.open_session`. owner: the engine, which lives as long as its sessions."""
        settings = self.resolve(request)
        self.check_prompt(settings, settings.video.prompt)
        return Session(self, owner, settings, self._take(settings, memory))

    def reopen(self, owner: object, path: Path) -> Session:
        """See `Engine.reopen_session`."""
        saved = load_session(path, self._model)
        settings = self.resolve(saved.request)
        own = settings.video.latent_shape(self._model.grid)
        for moment in (*saved.remembered, *saved.context):
            if tuple(moment.latent.shape) != own:
                raise CheckpointError(
                    f"is damaged as a saved session: latents of {list(moment.latent.shape)}, and "
                    f"its size takes {list(own)}",
                    path=path,
                )
        self.check_prompt(settings, saved.prompt)
        index = self._index(settings)
        for moment in saved.remembered:
            index = index.added(moment, settings.memory_bytes)
        place = self._take(settings, None)
        place.memory.go_back(index)
        standing = Standing(
            context=saved.context,
            decoder=saved.decoder,
            index=index,
            prompt=saved.prompt,
            frames=saved.frames,
            log=saved.log,
            company=saved.company,
        )
        return Session(self, owner, settings, place, standing)

    def replay(self, owner: object, path: Path, record: Path | None) -> Iterator[np.ndarray]:
        """See `Engine.replay`."""
        return frames_again(path, record, self._model, lambda request: self.open(owner, request))

    def plan(self, request: SessionRequest) -> MemoryPlan:
        """See `Engine.plan`."""
        plan = plan_session(self._planner, self.resolve(request)).whole
        limit = self._planner.limit
        if limit is not None and plan.peak > limit:
            raise MemoryLimitError(
                f"the session needs {plan.peak} bytes ({plan}), and {limit} are to be had; "
                "less memory_bytes, rewind or context would work",
                needed=plan.peak,
                limit=limit,
            )
        return plan

    def resolve(self, request: SessionRequest) -> ResolvedSession:
        """The request with all defaults; raises RequestError."""
        settings = resolve_session(request, self._model, self._limits, solvers=SOLVERS)
        if look_ahead(self._model.vae.config_of("decode")):
            raise SessionError(
                f"the decoder of {self._model.name} gives frames late, once it has seen those that "
                "come: a session cannot wait for them"
            )
        return settings

    # For sessions: `session.Keeper`.

    def stages(
        self,
        session: ResolvedSession,
        texts: Texts,
        memory: Memory,
        before: Standing | None,
        action: Action,
        prompt: str,
    ) -> StepStages:
        """What a step is made of."""
        request = request_of_step(session, self._model, before, prompt)
        return StepStages(session, self._model, texts, memory, before, action, request)

    def begin_step(
        self, session: ResolvedSession, stages: StepStages, plan: MemoryPlan | None
    ) -> Job:
        """Queue a step's job. Raises EngineClosedError, EngineDeadError, QueueFullError."""
        request = stages.request
        job = Job(request, JobOptions(), stages)
        job.provenance = Provenance(prompt=request.prompt, seed=request.seed)
        job.plan = plan
        job.batch_tokens = self._limits.max_batch_tokens
        job.tokens = self._tokens(session, request)
        given = stages.before is None and session.first is not None
        steps = 0 if given else request.num_inference_steps
        self._worker.enqueue(job, steps + DECODE_STEPS)
        return job

    def check_prompt(self, session: ResolvedSession, prompt: str) -> None:
        """That a text may be read; raises RequestError, or what a hook does."""
        check_text("a session's prompt", prompt, self._limits)
        if self._hooks.check_request is not None:
            self._hooks.check_request(replace(session.video, prompt=prompt))

    def branched(self, session: Session, standing: Standing) -> Session:
        """A session of its own that goes on from there."""
        place = self._take(session.settings, None)
        place.memory.go_back(standing.index)
        return Session(self, session.owner, session.settings, place, standing)

    def release(self, place: Place) -> None:
        """A session has ended: what it had is others' again."""
        if not self._intake.origin.here:  # a fork's copy: what it would give back is the parent's
            return
        with self._lock:
            if place.left:
                return
            place.left = True
            self._count -= 1
        self._planner.reserve(-place.reserved)
        place.memory.leave()
        self._worker.tidy()

    def save(self, path: Path, session: Session, standing: Standing) -> None:
        """Write a session's state to a file."""
        save_session(path, session.settings, standing, self._model)

    def recording(self, path: Path, session: Session) -> Recording:
        """A file that takes the session's frames from here on."""
        return Recording(path, session, self._model)

    # Within.

    @property
    def _planner(self) -> MemoryPlanner:
        self._intake.origin.check()
        planner = self._intake.planner
        if planner is None:
            raise SessionError(
                "a session's steps are too small to share out over ranks; an engine without "
                "`parallel` opens sessions"
            )
        return planner

    @property
    def _model(self) -> VideoModel:
        return self._planner.model

    @property
    def _worker(self) -> Worker:
        return self._intake.workers[0]

    def _take(self, settings: ResolvedSession, memory: Memory | None) -> Place:
        """What a session has of the engine. Raises SessionLimitError, MemoryLimitError."""
        plan = plan_session(self._planner, settings)
        kind = self._kind(settings)
        if memory is None:
            memory = Memory(self._index(settings), kind=kind, room=settings.memory_bytes)
        elif not isinstance(memory, Memory):
            raise SessionError(f"a memory is what `Session.memory` is, got {type(memory).__name__}")
        elif memory.kind != kind:
            raise SessionError(
                f"a memory of {memory.kind} cannot be shared by a session of {kind}: the two must "
                "be of one checkpoint, and of one size"
            )
        with self._lock:
            if self._count >= self._limits.max_sessions:
                raise SessionLimitError(
                    f"{self._count} sessions are open, which is Limits.max_sessions; close one, or "
                    f"try again in {RETRY_S:.0f} s",
                    retry_after_s=RETRY_S,
                )
            try:
                self._planner.reserve(
                    plan.held, "a session", "less memory_bytes or rewind would work", plan.step.peak
                )
            except MemoryLimitError as error:
                if self._count == 0:
                    raise
                raise SessionLimitError(
                    f"{self._count} sessions are open, and no memory is left for another: {error}",
                    retry_after_s=RETRY_S,
                ) from error
            self._count += 1
        memory.join()
        return Place(plan.step, memory, plan.held)

    def _index(self, settings: ResolvedSession) -> Index:
        """An empty memory."""
        driving = settings.driving
        if self._model.transformer(0).shape.places:
            return Places(driving.world)
        return Recent(driving.context + driving.recall)

    def _kind(self, settings: ResolvedSession) -> tuple[object, ...]:
        shape = settings.video.latent_shape(self._model.grid)
        return self._model.weights_hash[:12], shape, settings.driving.world

    def _tokens(self, session: ResolvedSession, request: ResolvedRequest) -> int:
        """Of a step: what may be recalled, the context, the new latent frame; twice where it is
        guided."""
        _, frames, height, width = request.latent_shape(self._model.grid)
        seen = frames + session.driving.recall
        branches = 2 if request.guided else 1
        return seen * height * width // math.prod(self._model.grid.patch) * branches
