"""A world that is driven while it is made: actions in, frames out."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Protocol

import numpy as np

from sora_engine.errors import (
    DeviceError,
    JobCancelledError,
    RequestError,
    SessionClosedError,
    SessionLostError,
)
from sora_engine.request import Action, ActionSpace, ResolvedSession
from sora_engine.request.actions import pack_log
from sora_engine.request.checks import integer, positive, shown
from sora_engine.runtime.job import Job
from sora_engine.runtime.memory import MemoryPlan
from sora_engine.runtime.options import path_of
from sora_engine.runtime.pace import Pace, SessionStats, Source, Tick
from sora_engine.runtime.recall import Memory
from sora_engine.runtime.recording import Recording
from sora_engine.runtime.session_step import StepStages, Texts
from sora_engine.runtime.standing import Log, Mark, Past, Standing

MOST_MARKS = 64
"""Marks that a session keeps for going back to; a further one makes it forget the oldest."""


class Keeper(Protocol):
    """The engine, as its sessions see it: `runtime.sessions.Sessions`."""

    def begin_step(
        self, session: ResolvedSession, stages: StepStages, plan: MemoryPlan | None
    ) -> Job:
        """Queue a step's job."""
        ...

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
        ...

    def check_prompt(self, session: ResolvedSession, prompt: str) -> None:
        """That a text may be read; raises RequestError, or what a hook does."""
        ...

    def branched(self, session: Session, standing: Standing) -> Session:
        """A session of its own that goes on from there."""
        ...

    def release(self, place: Place) -> None:
        """A session has ended."""
        ...

    def save(self, path: Path, session: Session, standing: Standing) -> None:
        """Write a session's state to a file."""
        ...

    def recording(self, path: Path, session: Session) -> Recording:
        """A file that takes the session's frames from here on."""
        ...


@dataclass(slots=True, eq=False)
class Place:
    """What a session has of its engine's, until it ends."""

    plan: MemoryPlan | None
    memory: Memory
    reserved: int = 0
    left: bool = False


class Session:
    """One world. `Engine.open_session` makes it, with its first frame in `frames`.

    A context manager: leaving it closes it. Safe to use from several threads: steps come one after
    the other. All its noise follows from `seed` and the number of the step, so that the same
    actions make the same frames again: byte for byte where its steps were packed with nobody
    (`SessionRequest.exact`, or an engine that does nothing else).
    """

    def __init__(
        self,
        keeper: Keeper,
        owner: object,
        settings: ResolvedSession,
        place: Place,
        standing: Standing | None = None,
    ) -> None:
        self.settings = settings
        """The request with all defaults filled in."""
        self.memory = place.memory
        """What it remembers, to share with another session (`Engine.open_session(memory=...)`)."""
        self._keeper, self._owner, self._place = keeper, owner, place
        self._texts = Texts()
        self._past = Past(settings.rewind)
        self._marks: deque[weakref.ref[Mark]] = deque()
        self._recordings: list[Recording] = []
        self._pace = Pace()
        self._job: Job | None = None
        self._closed = False
        self._turn = threading.RLock()
        self._finalizer = weakref.finalize(self, keeper.release, place)
        self._finalizer.atexit = False
        if standing is None:
            try:
                standing = self._made(None, Action(), settings.video.prompt)
            except BaseException:
                self._finalizer()
                raise
        self._standing = standing

    # What it is.

    @property
    def actions(self) -> ActionSpace:
        """What can be done: buttons, axes, and how `Action`s are read from a text."""
        return self.settings.driving.actions

    @property
    def seed(self) -> int:
        """Of all noise."""
        return self.settings.video.seed

    @property
    def fps(self) -> float:
        """Frames a second, where `stream` is not told otherwise."""
        return self.settings.driving.fps

    @property
    def frames(self) -> np.ndarray:
        """The frames that came last, uint8 `[n, height, width, 3]`: 1 at the beginning, later as
        many as a latent frame holds."""
        return self._standing.frames.copy()

    @property
    def prompt(self) -> str:
        """The text in force."""
        return self._standing.prompt

    @property
    def place(self) -> tuple[float, float]:
        """Where its view lies, in pixels down and right of the world's origin."""
        scale = self._scale
        down, right = self._standing.context[-1].place
        return down * scale, right * scale

    @property
    def log(self) -> list[tuple[Action, int]]:
        """All actions so far as runs of equal ones, each with how often it was done."""
        return Log.runs(self._standing.log)

    @property
    def num_steps(self) -> int:
        """How many actions were done."""
        return self._standing.step

    @property
    def stats(self) -> SessionStats:
        """How fast it was, and what it holds."""
        standings = [self._standing, *self._past]
        held = sum(standing.nbytes for standing in standings) + self.memory.nbytes
        index = self.memory.index
        return self._pace.stats(
            num_steps=self.num_steps,
            bytes_held=held,
            num_moments=len(index.moments),
            num_places=index.num_places,
            num_lost=index.num_lost,
            company=self._standing.company,
        )

    @property
    def closed(self) -> bool:
        """Whether it takes no more actions."""
        return self._closed

    # What it does.

    def step(self, action: Action | None = None) -> np.ndarray:
        """Do something, and wait for its frames: uint8 `[n, height, width, 3]`.

        action: None does nothing. Raises ActionError for one that cannot be done; RequestError for
        a prompt that cannot be read; SessionLostError where the device fails, JobMemoryError,
        RefusedError (of a hook), NonFiniteError, JobCancelledError, after all of which the session
        is as it was before; SessionClosedError, EngineClosedError, QueueFullError.
        """
        action = self.actions.check(Action() if action is None else action)
        with self._turn:
            self._check_open()
            if action.prompt is not None:
                self._keeper.check_prompt(self.settings, action.prompt)
            began = time.monotonic()
            before = self._standing
            prompt = before.prompt if action.prompt is None else action.prompt
            standing = self._made(before, action, prompt)
            self._past.add(before)
            self._standing = standing
            self._pace.count(time.monotonic() - began, len(standing.frames))
            for recording in self._recordings:
                recording.take(before, standing, action)
            return standing.frames.copy()

    def stream(
        self,
        source: Source,
        fps: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> Iterator[Tick]:
        """Steps in real time: what is to be shown, when it is to be shown.

        source: is asked when a latent frame begins, and no earlier, for what is done then: `Keys`,
            or any function that returns None at the end. Actions one after the other, too.
        fps: frames a second; None: the session's own.

        A latent frame is begun as late as it can be done in time, by what the last ones took: so
        an action is seen after one latent frame's time at most, and its making. A tick that is late
        is given at once; one that is late by a latent frame's time or more is a stall, and what
        follows keeps its distance from there. Raises as `step`.
        """
        rate = self.fps if fps is None else positive("fps", fps)
        return self._pace.in_time(self, source, rate, clock, sleep)

    def mark(self) -> Mark:
        """The present, to come back to. It takes no time."""
        with self._turn:
            self._check_open()
            return self._marked(self._standing)

    def rewind(self, mark: Mark | None = None, *, steps: int | None = None) -> None:
        """Go back to a mark, or by so many steps; `frames` are those of then.

        From there the same actions make the same frames. What a shared memory has seen stays seen.
        Raises MarkError for a mark of another session, or of what is forgotten.
        """
        with self._turn:
            self._check_open()
            standing = self._standing_at(mark, steps)
            self._past.cut(standing)
            self._standing = standing
            self.memory.go_back(standing.index)

    def branch(self, mark: Mark | None = None) -> Session:
        """A session of its own that goes on from a mark, or from the present, with a memory of its
        own. The two share what is the same. Raises MarkError, SessionLimitError."""
        with self._turn:
            self._check_open()
            standing = self._standing if mark is None else self._standing_at(mark, None)
            return self._keeper.branched(self, standing)

    def save(self, path: str | PathLike[str], mark: Mark | None = None) -> Path:
        """Write the present, or a mark, to a file, whole or not at all; `Engine.reopen_session`
        goes on from it, in any process. The marks themselves are not written.

        Raises MarkError, OSError, and SessionError where the decoder's state is of a kind that no
        file holds.
        """
        where = path_of("a session's file", path)
        with self._turn:
            standing = self._standing if mark is None else self._standing_at(mark, None)
            self._keeper.save(where, self, standing)
        return where

    def record(self, path: str | PathLike[str]) -> Recording:
        """Write the frames of all steps from here on to an `.mp4`: `with world.record(path):`.

        The file is there once the `with` is left. It holds the seed and the actions, of which
        `Engine.replay` makes the same frames again. Raises MediaError.
        """
        where = path_of("a recording", path)
        with self._turn:
            self._check_open()
            recording = self._keeper.recording(where, self)
            self._recordings.append(recording)
            return recording

    def cancel(self) -> None:
        """Stop the step that is under way: it raises JobCancelledError, and was never."""
        job = self._job
        if job is not None:
            job.cancel()

    def close(self) -> None:
        """Stop the step that is under way, and let go of all that it holds. Its marks are
        forgotten; recordings that are under way end."""
        self._closed = True
        self.cancel()
        with self._turn:
            for recording in list(self._recordings):
                recording.end()
            for mark in self._marks:
                if (kept := mark()) is not None:
                    kept.forget()
            self._past.clear()
            self._standing = replace(
                self._standing, decoder=None, context=self._standing.context[-1:]
            )
            self._texts = Texts()
        self._finalizer()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Session is of the process of its engine and cannot be copied or pickled; `branch` "
            "and `save` do that"
        )

    # Within.

    @property
    def owner(self) -> object:
        """The engine that it is of."""
        return self._owner

    @property
    def _scale(self) -> int:
        height = self._standing.context[-1].latent.shape[2]
        return self.settings.video.canvas_height // height

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosedError("the session is closed; open a new one")

    def _made(self, before: Standing | None, action: Action, prompt: str) -> Standing:
        """One step further; what is before stays as it is."""
        stages = self._keeper.stages(
            self.settings, self._texts, self.memory, before, action, prompt
        )
        try:
            job = self._job = self._keeper.begin_step(self.settings, stages, self._place.plan)
            if self._closed:
                job.cancel()
            try:
                job.result()
            except BaseException:  # KeyboardInterrupt too
                job.cancel()
                raise
            finally:
                self._job = None
        except JobCancelledError:
            self._check_open()
            raise
        except DeviceError as error:
            if before is None:
                raise
            raise self._lost(before, error) from error
        assert stages.moment is not None
        assert stages.frames is not None
        return Standing(
            context=(*stages.context, stages.moment)[-self.settings.driving.context :],
            decoder=stages.decoder,
            index=self.memory.add(stages.moment),
            prompt=prompt,
            frames=stages.frames.copy(),
            log=None if before is None else Log.with_one(before.log, action),
            company=max(job.most_in_company, 1 if before is None else before.company),
        )

    def _lost(self, before: Standing, error: DeviceError) -> SessionLostError:
        """What a caller is told when the device fails."""
        kept = before.on_host()
        if kept is not before:
            self._standing = kept
            self._past.clear()
        return SessionLostError(
            f"the session was at step {before.step}: {error}. Its state then is in `mark`, to go "
            "back to or to save, and its actions are in `log`",
            mark=self._marked(kept),
            log=pack_log(Log.runs(before.log)),
        )

    def _marked(self, standing: Standing) -> Mark:
        mark = Mark(standing, self)
        alive = [ref for ref in self._marks if ref() is not None]
        for old in alive[: max(0, len(alive) + 1 - MOST_MARKS)]:
            if (kept := old()) is not None:
                kept.forget()
        self._marks = deque([*alive, weakref.ref(mark)][-MOST_MARKS:])
        return mark

    def _standing_at(self, mark: Mark | None, steps: int | None) -> Standing:
        if (mark is None) == (steps is None):
            raise RequestError("rewind takes a mark, or a number of steps: one of the two")
        if steps is not None:
            count = integer("steps", steps, 0)
            if count < 0:
                raise RequestError(f"steps go back, so 0 or more would work; got {count}")
            return self._past.back(self._standing, count)
        if not isinstance(mark, Mark):
            raise RequestError(f"a mark is what `Session.mark` returns, got {shown(mark)}")
        kept = [ref for ref in self._marks if (m := ref()) is not None and not m.forgotten]
        steps_kept = [m.step for ref in kept if (m := ref()) is not None]
        oldest = min([self._past.oldest(self._standing), *steps_kept])
        return mark.standing_for(self, oldest)

    def end_recording(self, recording: Recording) -> None:
        """It takes no more frames."""
        with self._turn:
            if recording in self._recordings:
                self._recordings.remove(recording)
