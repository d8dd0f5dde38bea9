"""Servers for the tests: each a process of its own, forked from one that has imported everything.

A line of JSON in, a line of JSON out: `{"start": {...}}` gives the pid, `{"wait": pid}` the exit
code or null. A server's stdout and stderr go to its log.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sora_engine.config import Limits
from sora_engine.io import video_writer
from sora_engine.models.loading import load_video_model
from sora_engine.models.video_model import VideoModel
from sora_engine.runtime import savepoint
from sora_engine.runtime.engine import Engine
from sora_engine.runtime.job import Job
from sora_engine.serve import desk, finishing, server, writer
from sora_engine.serve import files as files_module
from sora_engine.serve.desk import Desk
from sora_engine.serve.settings import settings_from
from sora_engine.serve.spool import Spool
from sora_engine.serve.store import Store
from sora_engine.serve.writer import ResultWriter


def main() -> None:
    model = load_video_model("sprites", device="cpu", dtype="float32")
    for line in sys.stdin:
        command = json.loads(line)
        if "start" in command:
            pid = os.fork()
            if pid == 0:
                run(command["start"], model)
            answer: Any = pid
        else:
            found, status = os.waitpid(command["wait"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if found else None
        print(json.dumps(answer), flush=True)


def run(options: dict[str, Any], model: VideoModel) -> None:
    os.setsid()
    log = os.open(options["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 99
    try:
        for name, value in options.get("faults", {}).items():
            FAULTS[name](value)
        settings = settings_from({}, {}, options["settings"])

        def make_engine() -> Engine:
            limits = settings.limits()
            known = {name: getattr(limits, name) for name in limits.__slots__}
            bounds = Limits(**{**known, "pack_tokens": 512})
            return Engine(model, limits=bounds, hooks=settings.hooks)

        code = server.run(
            make_engine,
            settings,
            on_listening=lambda address: print("LISTENING", address, flush=True),
            on_ready=lambda: print("READY", flush=True),
        )
    except BaseException as error:
        print(f"FAILED {type(error).__name__}: {error}", flush=True)
        code = 1
    os._exit(code)


def stall_here(name: str) -> None:
    print("STALLED", name, flush=True)
    threading.Event().wait()


def stall_at_step(step: int) -> None:
    plain = Job.tell_progress

    def told(self: Job) -> None:
        plain(self)
        if self.progress.frames_decoded == 0 and self.progress.steps_done == step:
            stall_here("step")

    Job.tell_progress = told  # type: ignore[method-assign]


def stall_at_frame(frame: int) -> None:
    plain = Job.tell_progress

    def told(self: Job) -> None:
        plain(self)
        if self.progress.frames_decoded >= frame:
            stall_here("frame")

    Job.tell_progress = told  # type: ignore[method-assign]


def stall_before_begin(_: int) -> None:
    Desk._may_begin = lambda self: False  # type: ignore[method-assign]


def stall_while_writing(_: int) -> None:
    def close(self: ResultWriter, *_arguments: object) -> None:
        stall_here("writing")

    ResultWriter.close = close  # type: ignore[method-assign]


def stall_before_row(_: int) -> None:
    plain = files_module.Files.place

    def place(self: files_module.Files, *arguments: Any) -> None:
        plain(self, *arguments)
        stall_here("placed")

    files_module.Files.place = place  # type: ignore[method-assign]


def slow_steps(milliseconds: int) -> None:
    plain = Job.tell_progress

    def told(self: Job) -> None:
        plain(self)
        time.sleep(milliseconds / 1000)

    Job.tell_progress = told  # type: ignore[method-assign]


def slow_writer(milliseconds: int) -> None:
    plain = ResultWriter.write

    def write(self: ResultWriter, frames: np.ndarray) -> None:
        for frame in frames:
            time.sleep(milliseconds / 1000)
            plain(self, frame[None])

    ResultWriter.write = write  # type: ignore[method-assign]


def device_dies_at_step(step: int) -> None:
    """The device fails, and answers nothing from there on."""
    import torch

    from sora_engine.runtime.worker import Worker

    plain = Worker._step

    def stepped(self: Worker, jobs: list[Job]) -> None:
        if any(job.progress.steps_done == step for job in jobs):
            torch.ones = fail  # type: ignore[assignment]
            self._device_failed(torch.AcceleratorError("CUDA error: an illegal memory access"))
            return
        plain(self, jobs)

    def fail(*_arguments: object, **_options: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access")

    Worker._step = stepped  # type: ignore[method-assign]


def kill_at_step(step: int) -> None:
    """A job that kills its process in the step behind this one."""
    _kill_before(lambda job: job.progress.steps_done == step)


def _kill_before(meets: Callable[[Job], bool]) -> None:
    from sora_engine.runtime.worker import Worker

    plain = Worker._step

    def stepped(self: Worker, jobs: list[Job]) -> None:
        if any(map(meets, jobs)):
            os.kill(os.getpid(), signal.SIGKILL)
        plain(self, jobs)

    Worker._step = stepped  # type: ignore[method-assign]


def kill_by_seed(seed: int) -> None:
    """One job that kills its process, in its third step."""
    _kill_before(lambda job: job.request.seed == seed and job.progress.steps_done == 2)


def quick_linger(_: int) -> None:
    server.LINGER_S = 0.3


def quick_pause(_: int) -> None:
    desk.FULL_PAUSE_S = 0.3


def quick_end(_: int) -> None:
    desk.END_S = finishing.SAVE_S = 0.3


def small_spool(size: int) -> None:
    Spool.__init__.__defaults__ = (size, size)  # type: ignore[misc]


def full_disk(where: dict[str, str]) -> None:
    """A disk without room for one kind of thing, as long as a file is there."""
    kind, switch = where["at"], Path(where["while"])

    def full() -> bool:
        if switch.exists():
            print("FULL", kind, flush=True)
        return switch.exists()

    def refuse(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def method(*arguments: Any, **options: Any) -> Any:
            if full():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return plain(*arguments, **options)

        setattr(owner, name, method)

    def commit(self: Store, work: Any) -> Any:
        def within(db: sqlite3.Connection) -> Any:
            pages = db.execute("PRAGMA page_count").fetchone()[0] if full() else 1 << 30
            db.execute(f"PRAGMA max_page_count={pages}")
            if switch.exists():  # as large as a row and its receipt may be
                db.execute("CREATE TABLE IF NOT EXISTS more (x)")
                db.execute("INSERT INTO more VALUES (zeroblob(100000))")
            return work(db)

        return plain(self, within)

    plain = Store.transact
    match kind:
        case "savepoint":
            refuse(savepoint, "write_atomically")
        case "video":
            refuse(video_writer._Mp4Writer, "write")
        case "end of video":
            refuse(video_writer._Mp4Writer, "close")
        case "sheet":
            refuse(writer, "_sheet")
        case "spool":
            refuse(Spool, "put")
        case "place":
            refuse(files_module.Files, "place")
        case "commit":
            Store.transact = commit  # type: ignore[method-assign]


FAULTS = {
    function.__name__: function
    for function in (
        *(stall_at_step, stall_at_frame, stall_before_begin, stall_while_writing),
        *(stall_before_row, slow_steps, slow_writer, device_dies_at_step, kill_at_step),
        *(full_disk, kill_by_seed, quick_linger, quick_pause, quick_end, small_spool),
    )
}

if __name__ == "__main__":
    main()
