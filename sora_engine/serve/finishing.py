"""How a job ends: its frames become files, the files are put in place, and then its row says so."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

from sora_engine.errors import (
    DeviceError,
    EngineClosedError,
    EngineDeadError,
    JobCancelledError,
    RankFailedError,
)
from sora_engine.io.latents import SavedLatents
from sora_engine.runtime.job import JobState
from sora_engine.serve.failures import ApiError, code_of, is_disk_full, message_of
from sora_engine.serve.jobs import Jobs
from sora_engine.serve.live import Live
from sora_engine.serve.recovery import finished_facts
from sora_engine.serve.writer import ResultWriter

logger = logging.getLogger(__name__)
T = TypeVar("T")

_BROKEN = (DeviceError, RankFailedError, EngineDeadError)
"""What may be the fault of any job that was at the engine."""
SAVE_S = 20.0
"""How long a job that is put off may take to its next step, after which it is saved."""
LATENTS = "latents.safetensors"


class Finisher:
    """Ends the jobs of a desk. `start`, `engine_done` and `end` wait for no disk."""

    def __init__(self, desk: Jobs) -> None:
        self._desk = desk

    def start(self, live: Live) -> None:
        """Begin to write a job's frames as they come, once; RuntimeError for want of a thread."""
        with live.started:
            if live.finisher is None:
                writer = threading.Thread(
                    target=self._finish, args=(live,), name="sora-writer", daemon=True
                )
                writer.start()
                live.finisher = writer

    def engine_done(self, live: Live) -> None:
        """The engine has done with a job, one way or the other."""
        assert live.spool is not None
        live.engine_done_at = time.monotonic()
        live.spool.end()
        self._desk.left_engine(live)
        self.start(live)

    def end(self, live: Live, error: Exception) -> None:
        """A job ends that the engine did not take."""
        live.finisher = threading.Thread(
            target=self._close, args=(live, error, 0.0), name="sora-writer", daemon=True
        )
        live.finisher.start()

    def put_off(self, lives: Iterable[Live]) -> None:
        """Save jobs that are at work, and stop them; they are queued for the next start."""
        lives = list(lives)
        threads = [threading.Thread(target=self._put_off, args=(live,)) for live in lives]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _put_off(self, live: Live) -> None:
        live.keeping = True
        job = live.job
        if job is None:
            return
        if job.state is JobState.DENOISING:
            try:
                job.save(self._desk.files.savepoint(live.row.id), timeout_s=SAVE_S)
            except Exception as error:  # it goes on from an earlier step, or begins anew
                logger.warning("a job could not be saved: %s", type(error).__name__)
        job.cancel()

    def _finish(self, live: Live) -> None:
        live.handed_over.wait()
        job, spool = live.job, live.spool
        assert job is not None
        assert spool is not None
        error: BaseException | None = None
        receipt: dict[str, Any] | None = None
        try:
            receipt = self._write(live)
        except Exception as failed:
            error = failed
            job.cancel()  # nobody takes its frames any more
            while spool.get() is not None:
                pass
        own = job.exception() if job.done() else None
        if error is not None and not (live.stopping or live.keeping):
            own = None  # it was cancelled here, and by nobody else
        writing_s = time.monotonic() - (live.engine_done_at or time.monotonic())
        self._close(live, own if own is not None else error, writing_s, receipt)

    def _write(self, live: Live) -> dict[str, Any] | None:
        """Frames as they come, up to the results in place; nothing for a job that fails. The
        receipt that stands beside them."""
        job, spool, trail, files = live.job, live.spool, live.trail, self._desk.files
        assert job is not None
        assert spool is not None
        assert trail is not None
        name, request = live.row.id, job.request
        writer = None
        try:
            while (frames := spool.get()) is not None:
                if writer is None:
                    writer = ResultWriter(
                        files.begin(name),
                        live.row.kind,
                        request.fps,
                        request.num_frames,
                        job.provenance,
                        **self._desk.marks.options(request),
                    )
                writer.write(frames)
                trail.writes(writer.count)
            if job.exception() is not None or writer is None:
                return None
            trail.writes("end")
            video = self._desk.marks.told(job.result(), request)
            receipt = writer.close(video, live.row)
            if self._desk.settings.keep_latents and job.latents is not None:
                latents = SavedLatents(job.latents, request.fps, request.loop, "")
                latents.write(files.tmp / name / LATENTS)
            trail.writes("place")
            files.place(name, writer.flushed)
            return receipt
        finally:
            if writer is not None:
                writer.abort()  # which does nothing to a file that is closed

    def _close(
        self,
        live: Live,
        error: BaseException | None,
        writing_s: float,
        receipt: dict[str, Any] | None = None,
    ) -> None:
        """Bring the row to where the job is, however long the disk keeps it from that."""
        desk, name = self._desk, live.row.id
        if live.trail is not None:
            live.trail.close()
        if error is not None and self._goes_on(live, error):
            # Where the engine dies of it, the next start counts it as one that was in flight.
            lost = {"lost": isinstance(error, _BROKEN)}
            before = self._insist(
                lambda: desk.store.change(name, "queued", when={"running"}, facts=lost)
            )
            if before is None:
                desk.gone(live)
            else:
                desk.again(live, pause=is_disk_full(error))
            return
        now = desk.clock.now()
        if error is None:
            assert live.job is not None
            facts = finished_facts(live.job.result().timings_s, receipt, writing_s)
            desk.pace.learn(live.job.request, facts["inference_time_s"])
            state = "completed"
        else:
            facts = {"error": {"code": _code(error), "message": self._message(error)}}
            state = "cancelled" if isinstance(error, JobCancelledError) else "failed"
            if _code(error) == "internal":
                logger.error("job %s failed", name, exc_info=error)
        before = self._insist(
            lambda: desk.store.change(name, state, when={"running"}, completed=now, facts=facts)
        )
        if before is not None:
            row = live.row
            live.row = replace(row, state=state, completed=now, facts={**row.facts, **facts})
        try:
            desk.files.remove(name, results=error is not None)
        except OSError:
            logger.exception("files of a job that is done stay until the next start")
        desk.gone(live)

    def _goes_on(self, live: Live, error: BaseException) -> bool:
        """Whether a job that ended so is to be made all the same."""
        if live.stopping:
            return False
        if isinstance(error, JobCancelledError):
            return live.keeping
        if isinstance(error, EngineClosedError) or is_disk_full(error):
            return True
        if isinstance(error, _BROKEN) and not live.retried:
            live.retried = True  # and alone: what fails it then is its own
            return True
        return False

    def _message(self, error: BaseException) -> str:
        if isinstance(error, ApiError):
            return error.message
        root = self._desk.files.root
        return message_of(error, {f"{root}/uploads/": "upload_", str(root): "DATA"})

    def _insist(self, change: Callable[[], T]) -> T:
        """Do what the store may not have room for now."""
        while True:
            try:
                return change()
            except Exception as error:
                if self._desk.closed:
                    raise  # the next start finds the row as it was
                logger.warning("the store does not take a change: %s", error)
                time.sleep(1.0)


def _code(error: BaseException) -> str:
    return error.code if isinstance(error, ApiError) else code_of(error)
