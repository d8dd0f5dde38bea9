"""The state machine of jobs, and the only part of the service that talks to the engine.

    queued -> running -> completed | failed | cancelled -> (deleting, gone) | expired

An accepted job is in the store before it is told of, and leaves `running` only by what the store
acknowledged. So a server that is killed at any point goes on from the rows, the savepoints and the
results that are in place (`recovery`).

Threads: callers' (creating, deleting), one that feeds the engine, the engine's own (callbacks that
never wait), and for each job at the engine one that writes its files and ends it (`finishing`).
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sora_engine.errors import QueueFullError
from sora_engine.serve.admission import Admission, facts_of
from sora_engine.serve.clock import Clock
from sora_engine.serve.failures import ApiError, disk_full, not_found
from sora_engine.serve.files import Files
from sora_engine.serve.finishing import Finisher
from sora_engine.serve.ids import moment, new_id
from sora_engine.serve.live import Live
from sora_engine.serve.marks import Marks
from sora_engine.serve.pace import Pace
from sora_engine.serve.recovery import STOPPING, recover
from sora_engine.serve.settings import Settings
from sora_engine.serve.starting import begin
from sora_engine.serve.store import ACTIVE, DONE, Row, Store, Taken
from sora_engine.serve.translate import Stored, Translator

if TYPE_CHECKING:
    from sora_engine.runtime.engine import Engine

logger = logging.getLogger(__name__)

END_S = 30.0
"""How long jobs that were stopped may take to let go."""
FULL_PAUSE_S = 5.0
"""How long nothing is begun after a job found the disk full."""


class Desk:
    """All jobs of one server. Safe to use from any thread; `create` may take a second."""

    def __init__(
        self, engine: Engine, settings: Settings, store: Store, files: Files, clock: Clock
    ) -> None:
        self.engine, self.settings = engine, settings
        self.store, self.files, self.clock = store, files, clock
        self.marks = Marks(settings)
        self.translator = Translator(engine.model, files.upload, settings.loras, engine.resolve)
        self.admission = Admission(engine, self.translator, settings.max_work)
        self.on_change: list[Callable[[Live], None]] = []
        """Called with a job after each of its steps and changes, on whatever thread; quick."""
        self.choose: Callable[[Sequence[Live]], Live] = first_come
        """Which of the jobs that wait is begun next."""
        self.order: Callable[[Sequence[Live]], list[Live]] = lambda waiting: sorted(
            waiting, key=_order
        )
        """In which order they would be begun if no other came."""
        self.most_jobs: Callable[[str], int] = lambda _owner: settings.max_jobs_per_key
        """How many jobs of an owner may be under way."""
        self.draining = False
        self._lives: dict[str, Live] = {}
        self._num_taken = 0
        self._waiting: list[Live] = []
        self._at_engine: set[Live] = set()
        self._wake = threading.Condition(threading.RLock())
        self.closed = False
        self._paused_until = 0.0
        self.pace = Pace()
        self._finisher = Finisher(self)
        for live in recover(store, files, clock):
            self._lives[live.row.id] = live
            self._waiting.append(live)
        self._feeder = threading.Thread(target=self._feed, name="sora-desk", daemon=True)
        self._feeder.start()

    # What is asked.

    def live(self, name: str) -> Live | None:
        """A job that is not done, by its id."""
        return self._lives.get(name)

    def row(self, owner: str, name: str, kind: str | None = None) -> Row:
        """An owner's job; ApiError 404 for another's, one that is gone, or that expired."""
        row = self.store.get(name) if len(name) <= 64 else None
        wrong = row is None or row.owner != owner or row.state == "deleting"
        if row is None or wrong or (kind is not None and row.kind != kind):
            raise not_found("video" if kind is None else kind)
        if row.state == "expired":
            raise ApiError(404, "expired", "the video was kept for its time, and is gone")
        return row

    def watched(self, owner: str, name: str, kind: str | None = None) -> Row:
        """As `row`, for a stream that asks often: of a job under way memory has all. What is being
        stopped may be deleted, as its row says."""
        live = self._lives.get(name)
        if live is None or live.stopping:
            return self.row(owner, name, kind)
        own = live.row.owner == owner and kind in (None, live.row.kind)
        return live.row if own else self.row(owner, name, kind)

    def lives(self) -> list[Live]:
        """All jobs that are not done."""
        with self._wake:
            return list(self._lives.values())

    def census(self) -> tuple[list[Live], int]:
        """The same, and how many were ever taken, at one moment."""
        with self._wake:
            return list(self._lives.values()), self._num_taken

    def position(self, name: str) -> int | None:
        """How many jobs are to be begun before this one; None for one that was begun."""
        with self._wake:
            ahead = [live for live in self._at_engine if live.stage == "queued"]
            for i, live in enumerate(self.order(self._waiting)):
                if live.row.id == name:
                    return len(ahead) + i
        return 0 if any(live.row.id == name for live in ahead) else None

    @property
    def counts(self) -> tuple[int, int]:
        """How many jobs wait, and how many are at work."""
        with self._wake:
            at_work = sum(live.stage != "queued" for live in self._lives.values())
            return len(self._lives) - at_work, at_work

    @property
    def promised_bytes(self) -> int:
        """The planned peaks of the jobs at the engine."""
        with self._wake:
            jobs = [live.job for live in self._at_engine if live.job is not None]
        return sum(job.plan.peak for job in jobs if job.plan is not None)

    def is_full(self) -> bool:
        """Whether the disk has less left than the settings want."""
        return self.files.free_bytes() < self.settings.min_free

    # What is ordered.

    def create(
        self,
        owner: str,
        stored: Stored,
        facts: dict[str, Any],
        *,
        kind: str = "video",
        idempotency: tuple[str, str] | None = None,
    ) -> Row:
        """Accept a job: once this returns it is not lost. facts: what its answers tell of it.

        Raises ApiError, and what `Engine.submit` raises of the request.
        """
        if idempotency is not None:
            known = self.store.given(owner, *idempotency)
            if known is not None:
                return known
        self._refuse_where_closed()
        stored["fields"].setdefault("seed", secrets.randbelow(1 << 32))
        request, resolved = self.admission.admit(stored)
        created = moment(self.clock.now())
        made = Row(
            id=new_id(self.settings.replica, created),
            owner=owner,
            kind=kind,
            created=created,
            body=stored,
            facts={
                "weights": self.engine.model.weights_hash,
                **facts_of(resolved, self.engine.model.grid),
                **facts,
            },
        )
        live = Live(made, request)
        self._reserve(live)
        try:
            live.row = self.store.add(made, idempotency)
        except Taken as taken:
            self._drop(live)
            row = self.store.given_row(taken)
            if row is None:
                raise not_found() from taken
            return row
        except BaseException:
            self._drop(live)
            raise
        with self._wake:
            self._waiting.append(live)
            self._nudge()
        self.tell(live)
        return live.row

    def _refuse_where_closed(self) -> None:
        if self.engine.error is not None:
            raise self.engine.error
        if self.draining or self.closed:
            raise ApiError(
                503, "draining", "the server is about to stop", headers={"Retry-After": "10"}
            )
        if self.is_full():
            raise disk_full()

    def _reserve(self, live: Live) -> None:
        settings, owner = self.settings, live.row.owner
        with self._wake:
            if len(self._lives) >= settings.max_queue + settings.max_running:
                raise QueueFullError(
                    f"{settings.max_queue} jobs wait, which is as many as this server lets",
                    retry_after_s=self._retry_after_s(),
                )
            own = sum(other.row.owner == owner for other in self._lives.values())
            if own >= self.most_jobs(owner):
                raise ApiError(
                    429,
                    "too_many_jobs",
                    f"{own} of your jobs are not done, which is as many as a key has",
                    headers={"Retry-After": str(round(self._retry_after_s()))},
                )
            self._lives[live.row.id] = live
            self._num_taken += 1

    def _retry_after_s(self) -> float:
        jobs = [live.job for live in self._at_engine if live.job is not None]
        etas = [eta for job in jobs if (eta := job.progress.eta_s) is not None]
        return max(1.0, min(etas, default=5.0))

    def cancel(self, owner: str, name: str) -> Row:
        """Stop a job within a step; one that is done stays as it is."""
        self.row(owner, name)
        facts = {"error": {"code": "cancelled", "message": "the job was cancelled while queued"}}
        live = self._lives.get(name)
        now = self.clock.now()
        if self.store.change(name, "cancelled", when={"queued"}, completed=now, facts=facts):
            if live is not None and self._take(live):
                self.gone(live)
        elif live is not None:
            self._stop(live)
        return self.row(owner, name)

    def put_at(self, owner: str, name: str, priority: int) -> Row:
        """Give a job that waits another priority; one that was begun stays as it is."""
        self.row(owner, name, "video")
        with self._wake:
            live = next((live for live in self._waiting if live.row.id == name), None)
        facts = {"priority": priority}
        if live is not None and self.store.change(name, "queued", when={"queued"}, facts=facts):
            with self._wake:
                live.row = replace(live.row, facts={**live.row.facts, **facts})
            self.tell(live)
        return self.row(owner, name)

    def delete(self, owner: str, name: str) -> None:
        """Remove a job, its files and its row; one at work is stopped first. It is out of sight
        once this returns."""
        self.row(owner, name)
        before = self.store.change(name, "deleting", when=ACTIVE | DONE)
        if before is None:
            raise not_found()
        live = self._lives.get(name)
        if before in DONE or live is None:
            self.remove(name)
        elif before == "queued" and self._take(live):
            self.gone(live)
        else:  # whoever has it finds that its row is no longer its own, and removes it
            self._stop(live)

    def forget(self, row: Row) -> None:
        """Delete a job that nobody waits for any more, if it is still there."""
        with suppress(ApiError):
            self.delete(row.owner, row.id)

    def _stop(self, live: Live) -> None:
        live.stopping = True
        if live.job is not None:
            live.job.cancel()

    def _take(self, live: Live) -> bool:
        """Whether a job waited; it does no more."""
        with self._wake:
            if live in self._waiting:
                self._waiting.remove(live)
                return True
        return False

    # What the threads tell each other.

    def _feed(self) -> None:
        while True:
            with self._wake:
                while not self.closed and not self._may_begin():
                    self._wake.wait(1.0)
                if self.closed:
                    return
                live = self.choose(self._candidates())
                self._waiting.remove(live)
                self._at_engine.add(live)
            try:
                begin(self, live, self._finisher)
            except Exception:  # the store failed: the row is as it was, and is tried again
                logger.exception("a job could not be begun")
                self.again(live, pause=True)

    def _may_begin(self) -> bool:
        if not self._waiting or self.draining or self.engine.error is not None:
            return False
        if len(self._at_engine) >= self.settings.max_running:
            return False
        if any(live.is_suspect for live in self._lives.values()) and self._at_work():
            return False
        return time.monotonic() >= self._paused_until and not self.is_full()

    def _candidates(self) -> Sequence[Live]:
        """Those that may be next. A suspect goes alone, and before the others: where it is what
        kills the server, it takes none of them along."""
        return [live for live in self._waiting if live.is_suspect][:1] or self._waiting

    def left_engine(self, live: Live) -> None:
        """The engine has done with a job: another one may begin."""
        with self._wake:
            self._at_engine.discard(live)
            self._nudge()

    def _nudge(self) -> None:
        """A place or a job is there, for whoever waits for one: nobody is woken for nothing, as
        that would take the interpreter from the engine."""
        place = len(self._at_engine) < self.settings.max_running
        if self.draining or (self._waiting and place):
            self._wake.notify_all()

    def again(self, live: Live, *, pause: bool = False) -> None:
        """A job whose row is queued waits anew. pause: nothing is begun for a moment."""
        fresh = Live(live.row, live.request, done=live.done, retried=live.retried)
        fresh.stopping = live.stopping and not live.keeping
        with self._wake:
            self._at_engine.discard(live)
            self._lives[live.row.id] = fresh
            self._waiting.append(fresh)
            if pause:
                self._paused_until = time.monotonic() + FULL_PAUSE_S
            self._wake.notify_all()
        self.tell(fresh)

    def gone(self, live: Live) -> None:
        """A job ended before or after its time at the engine, as `live.row` says or as its row
        does; of one that is deleted nothing stays behind."""
        if live.row.state not in DONE:
            row = self.store.get(live.row.id)
            if row is None or row.state == "deleting":
                self.remove(live.row.id)
        self._drop(live)
        self.tell(live)

    def _drop(self, live: Live) -> None:
        with self._wake:
            self._at_engine.discard(live)
            self._lives.pop(live.row.id, None)
            self._nudge()
        if not live.done.done():
            live.done.set_result(None)

    def remove(self, name: str) -> None:
        """Remove a job's files, and then its row."""
        self.files.remove(name)
        self.store.remove(name)

    def tell(self, live: Live) -> None:
        """Call those who watch."""
        for watcher in self.on_change:
            watcher(live)

    # The end.

    def drain(self, timeout_s: float) -> None:
        """Take no more jobs, and wait for those at work; what takes longer is saved, and stays
        queued for the next start."""
        with self._wake:
            self.draining = True
        if self.engine.error is None:
            self._note_stopping(True)
        with self._wake:
            self._wake.wait_for(lambda: not self._at_work(), timeout_s)
            left = self._at_work()
        self._finisher.put_off(left)
        with self._wake:
            ended = self._wake.wait_for(lambda: not self._at_work(), END_S)
        if not ended:  # one of them hangs, and that does count
            self._note_stopping(False)

    def _note_stopping(self, stopping: bool) -> None:
        """Jobs that are in flight when the server is gone had no part in it, if it was told to
        stop: a supervisor kills what takes it too long."""
        try:
            self.store.note(STOPPING, "asked" if stopping else "")
        except Exception as error:  # a full disk: their attempts are counted, and no more
            logger.warning("the store does not take a note: %s", error)

    def _at_work(self) -> list[Live]:
        return [live for live in self._lives.values() if live not in self._waiting]

    def close(self) -> None:
        """End the desk's own threads; jobs at work are put off."""
        self.drain(0.0)
        with self._wake:
            self.closed = True
            self._wake.notify_all()
        self._feeder.join()


def first_come(waiting: Sequence[Live]) -> Live:
    """The job of the highest priority that came first."""
    return min(waiting, key=_order)


def _order(live: Live) -> tuple[int, int]:
    return -int(live.row.facts.get("priority", 0)), live.row.number
