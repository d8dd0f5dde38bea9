"""Engines that are forked, let go of, left behind at exit, or dead: nobody waits for ever."""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch

import sora_engine as sora
from sora_engine.runtime import executor as executor_module
from sora_engine.runtime import worker as worker_module
from sora_engine.runtime.async_engine import AsyncEngine
from tests.faults.engines import comes_true, engine

SMALL = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 2, "seed": 1}
REQUEST = sora.VideoRequest("a red circle", **SMALL)
LONG = sora.VideoRequest("a red circle", **{**SMALL, "num_inference_steps": 1000})
NAME = "sora-engine"


def in_a_fork(does, timeout_s=60.0):
    """What a function returns in a forked process, as JSON; it must not need this one's threads."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = does()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, json.dumps(said).encode())
        os._exit(0)
    os.close(write)
    ready = select.select([read], [], [], timeout_s)[0]
    came = os.read(read, 10_000) if ready else b'"nothing came"'
    os.close(read)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return json.loads(came)


def tries(*calls):
    """The errors that calls raise, by class; or what they return."""
    came = []
    for call in calls:
        try:
            came.append(repr(call()))
        except Exception as error:
            came.append(f"{type(error).__name__}: {error}")
    return came


def test_a_fork_is_told_so_by_whatever_it_asks(tmp_path):
    with engine() as made:
        job = made.submit(LONG)
        kept = tmp_path / "job.safetensors"
        job.save(kept, 300)
        other = AsyncEngine(made)
        # Held, as a fork may catch it: the child must not wait for who is not there.
        with made._workers[0]._wake:
            came = in_a_fork(
                lambda: tries(
                    lambda: made.submit(REQUEST),
                    lambda: made.generate(REQUEST),
                    lambda: made.generate([REQUEST, REQUEST]),
                    lambda: made.resume(kept),
                    lambda: made.plan(REQUEST),
                    lambda: other.submit(REQUEST),
                    lambda: job.result(),
                    lambda: job.save(kept),
                )
            )
        for said in came:
            assert said.startswith("EngineForkedError: this engine was made in process"), said
            assert "Make the engine after the fork" in said
        assert not job.done()
        job.cancel()


def test_closing_dropping_and_ending_in_a_fork_harm_no_parent():
    with engine() as made:
        holder = [made]

        def does():
            error = made.error
            with made:
                pass
            holder.clear()
            gc.collect()
            return [type(error).__name__, isinstance(error, sora.EngineDeadError)]

        assert in_a_fork(does) == ["EngineForkedError", True]
        assert made.error is None
        assert made.generate(REQUEST).frames.any()


FORKED = """
import os, sys
import sora_engine as sora
engine = sora.Engine.from_pretrained("sprites", device="cpu", {options})
child = os.fork()
if child == 0:
    sys.exit(3)  # by way of its exit handlers
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 3
request = sora.VideoRequest("a", height=16, width=16, num_frames=1, num_inference_steps=1, seed=1)
print(engine.generate(request).frames.shape)
engine.close()
"""


@pytest.mark.parametrize("options", ["", "parallel=sora.ParallelConfig(ulysses=2)"])
def test_a_fork_that_exits_leaves_the_engine_and_its_ranks(options):
    run = subprocess.run(
        [sys.executable, "-c", FORKED.format(options=options)],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment(),
    )
    assert run.stdout == "(1, 16, 16, 3)\n", run.stderr


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def engine_threads():
    return [thread for thread in threading.enumerate() if thread.name == NAME]


def test_an_engine_that_nobody_holds_takes_its_thread_and_its_model_with_it():
    """At once, not at some collection: weights of a device are not for the collector to find."""
    # transformers keeps the frames of its first import until a collection, and so what loads it.
    sora.Engine.from_pretrained("sprites", device="cpu").close()
    before, models = len(engine_threads()), []
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            made = sora.Engine.from_pretrained("sprites", device="cpu")
            made.generate(REQUEST)
            models.append(weakref.ref(made.loaded_model.loaded_transformer))
            del made
        # The thread may be between the result and its next wait: it goes as soon as it gets there.
        assert comes_true(lambda: len(engine_threads()) == before)
        assert comes_true(lambda: [model() for model in models] == [None, None])
    finally:
        gc.enable()


def test_one_in_a_cycle_goes_with_the_next_collection():
    before = len(engine_threads())
    made = engine()
    made.itself = made
    del made
    gc.collect()
    assert comes_true(lambda: len(engine_threads()) == before)


def test_jobs_of_an_engine_that_was_let_go_of_are_done_first():
    """Somebody may hold them, or wait for what their callbacks get."""
    before, seen = len(engine_threads()), []
    jobs = [engine().submit(REQUEST, on_frames=seen.append) for _ in range(2)]
    gc.collect()
    assert all(job.result(300).frames.any() for job in jobs)
    assert sum(len(frames) for frames in seen) == 10
    assert comes_true(lambda: len(engine_threads()) == before)


def test_the_last_hold_is_let_go_of_in_a_callback():
    """On the engine's own thread, which cannot wait for itself."""
    before, holder = len(engine_threads()), [engine()]
    job = holder[0].submit(REQUEST, on_progress=lambda _: holder.clear() or gc.collect())
    assert job.result(300).frames.any()
    assert comes_true(lambda: len(engine_threads()) == before)


EXITS = """
import sys, threading
import sora_engine as sora
engine = sora.Engine.from_pretrained("sprites", device="cpu")
request = sora.VideoRequest("a", height=32, width=32, num_frames=5, num_inference_steps=1000)
stepped = threading.Event()
jobs = [engine.submit(request, on_progress=lambda p: stepped.set()) for _ in range(2)]
stepped.wait(300)
print("stepped", flush=True)
{end}
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [("", 0), ("sys.exit(5)", 5), ("raise ValueError('mine')", 1), ("del engine, jobs", 0)],
)
def test_an_exit_with_work_under_way_is_prompt_and_clean(end, code):
    with subprocess.Popen(
        [sys.executable, "-c", EXITS.format(end=end)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as run:
        assert run.stdout.readline() == "stepped\n"
        since = time.monotonic()
        errors = run.communicate(timeout=120)[1]
    assert time.monotonic() - since < 30  # a step, and the interpreter's end, on a loaded machine
    assert run.returncode == code, errors
    assert "Fatal" not in errors
    assert ("ValueError: mine" in errors) == (code == 1)


def test_error_says_whether_the_engine_is_dead_and_why(monkeypatch):
    def broken(*_):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    with engine() as made:
        assert made.error is None
        assert AsyncEngine(made).error is None
        made.generate(REQUEST)
        assert made.error is None
        monkeypatch.setattr(executor_module, "denoise_step", broken)
        monkeypatch.setattr(worker_module.Worker, "_free_memory", broken)
        with pytest.raises(sora.DeviceError):
            made.submit(REQUEST).result(300)
        assert comes_true(lambda: made.error is not None)
        assert isinstance(made.error, sora.EngineDeadError)
        assert "device-side assert triggered" in str(made.error)
        assert AsyncEngine(made).error is made.error
        with pytest.raises(sora.EngineDeadError) as told:
            made.submit(REQUEST)
        assert told.value is made.error
    assert made.error is not None  # also once it is closed


def test_a_device_error_that_passes_and_a_close_are_no_death(monkeypatch):
    step, left = executor_module.denoise_step, [1]

    def once(*arguments):
        if left:
            left.pop()
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return step(*arguments)

    with engine() as made:
        monkeypatch.setattr(executor_module, "denoise_step", once)
        with pytest.raises(sora.DeviceError):
            made.submit(REQUEST).result(300)
        assert made.generate(REQUEST).frames.any()
        assert made.error is None
    assert made.error is None


def test_one_replica_that_lives_serves():
    """The engine is dead with its last replica; until then jobs go to those that live."""
    from sora_engine.runtime.executor import LocalExecutor
    from tests.faults.engines import sprites

    replicas = [LocalExecutor(sprites()) for _ in range(2)]
    with sora.Engine(replicas=replicas, limits=sora.Limits(pack_tokens=512)) as made:
        dead = sora.EngineDeadError("the device cpu no longer answers")
        made._workers[0]._dead = dead
        assert made.error is None
        assert made.generate(REQUEST).frames.any()
        made._workers[1]._dead = dead
        assert made.error is dead
        with pytest.raises(sora.EngineDeadError):
            made.submit(REQUEST)


def test_a_state_that_cannot_be_kept_does_not_fail_the_job(tmp_path, caplog):
    gone = tmp_path / "gone" / "job.safetensors"
    with engine() as made:
        job = made.submit(REQUEST, save_to=gone)
        assert job.result(300).frames.any()
        assert isinstance(job.save_error, OSError)
        told = [line for line in caplog.messages if "goes on without its state" in line]
        assert len(told) == 1
        job = made.submit(REQUEST, save_to=tmp_path / "job.safetensors")
        job.result(300)
        assert job.save_error is None
