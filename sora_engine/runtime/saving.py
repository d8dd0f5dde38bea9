"""Writing the states of jobs that are under way: what a caller orders, and what `save_to` keeps."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path

from sora_engine.errors import RequestError
from sora_engine.runtime.executor import AnyExecutor
from sora_engine.runtime.failures import is_device_error
from sora_engine.runtime.job import Job
from sora_engine.runtime.savepoint import save_state

logger = logging.getLogger(__name__)


def check_unshared(path: Path | None, jobs: Iterable[Job]) -> None:
    """RequestError where one of `jobs` keeps its state in `path`: the last to write would win."""
    if path is not None and os.path.realpath(path) in {job.kept_in for job in jobs}:
        raise RequestError(
            f"save_to: another job that is not done keeps its state in {path}; each job needs "
            "a file of its own"
        )


def carry_out_orders(job: Job, executor: AnyExecutor) -> None:
    """Write the files for which callers of `Job.save` wait."""
    while job.save_orders:
        order = job.save_orders.pop()
        try:
            write_state(job, order.path, executor)
        except Exception as error:  # the caller's path: it goes to who asked
            order.error = error
        order.over.set()


def is_due(job: Job) -> bool:
    """Whether `save_to` is written after the step that a job has just taken.

    After the last one it is where the steps since then are `save_last_s` of work: from there a job
    that is killed while it is decoded goes on.
    """
    canvas, options = job.canvas, job.options
    if canvas.finished:
        return job.unkept_s >= options.save_last_s
    if canvas.step % options.save_every:
        return False
    every_s = options.save_every_s
    return every_s is None or time.monotonic() - job.kept_at >= every_s


def keep_state(job: Job, path: Path, executor: AnyExecutor) -> None:
    """Write `save_to`. It is there so that no work is lost: whatever keeps it from being written,
    the job goes on, and its `save_error` says so. A device that failed is no such thing."""
    try:
        write_state(job, path, executor)
        job.save_error, job.kept_at, job.unkept_s = None, time.monotonic(), 0.0
    except Exception as error:
        if is_device_error(error):
            raise
        if job.save_error is None:
            logger.warning("a job goes on without its state in %s: %s", path, error)
        job.save_error = error


def write_state(job: Job, path: Path, executor: AnyExecutor) -> None:
    """Write a job's state whole or not at all; raises OSError."""
    assert job.provenance is not None, "it is there once the job is encoded"
    state = executor.state_of(job.canvas)
    save_state(path, job.request, state, executor.model, job.provenance)
