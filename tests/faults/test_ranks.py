"""Ranks that raise, die or hang; engines that die: typed errors that name them, in time, and
nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import sora_engine as sora
from sora_engine.distributed import pool as pool_module
from tests.faults.processes import descendants, parents, wait_gone

BOUND_S = 30.0
GONE_S = 120.0
"""Until processes are off the table of the kernel, which takes work that others may have taken."""


def shared_memory():
    paths = Path("/dev/shm").iterdir()
    return {path.name for path in paths if "torch" in path.name or "gloo" in path.name}


SHARED_BEFORE = shared_memory()  # other work on the machine may have its own
REQUEST = sora.VideoRequest(
    "a red circle", height=32, width=32, num_frames=5, num_inference_steps=900, seed=1
)
SHORT = sora.VideoRequest("a", height=32, width=32, num_frames=1, num_inference_steps=1, seed=1)

# What makes a rank of these tests do wrong: it is told by a file, read before each step. And a
# launcher that tells of an end late, as on a loaded machine: the exchanges that it broke are first.
SABOTAGE = """
    import os
    import time
    from pathlib import Path
    import sora_engine.distributed.rank as rank_module

    step = rank_module.denoise_step

    def sabotaged(jobs, model, packer, limit, ranks):
        order = Path({order!r}).read_text().split()
        if order and int(order[1]) == ranks.mesh.rank:
            if order[0] == "raise":
                raise OSError("the disk is on fire")
            time.sleep(1000)
        return step(jobs, model, packer, limit, ranks)

    rank_module.denoise_step = sabotaged

    waitpid = os.waitpid
    ends = {{}}

    def late(child, options):
        if child not in ends:
            end = waitpid(child, options)
            if end[0] == 0 or options == 0:
                return end
            ends[child] = end, time.monotonic() + 1.5
        end, tell_at = ends[child]
        return end if time.monotonic() > tell_at else (0, 0)

    os.waitpid = late
"""


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Ranks that other work keeps from answering that they were told have longer; with what comes
    before it is still under the bound."""
    monkeypatch.setattr(pool_module, "ABORT_S", 15.0)


@pytest.fixture
def order(tmp_path, monkeypatch):
    """A file that orders a fault, for ranks that are started from here on."""
    path = tmp_path / "order"
    path.write_text("")
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(SABOTAGE.format(order=str(path))))
    monkeypatch.syspath_prepend(tmp_path)
    return path


def start(**axes):
    # As short as it can be for a step that other work on the machine delays.
    parallel = sora.ParallelConfig(timeout_s=10.0, **axes)
    return sora.Engine.from_pretrained("sprites", device="cpu", parallel=parallel)


def running(engine):
    """A job that takes its steps, and the ranks that take them (without their launcher)."""
    stepped = threading.Event()
    job = engine.submit(REQUEST, on_progress=lambda progress: stepped.set())
    assert stepped.wait(900)  # four processes start: long, where others have the machine
    return job, descendants()[1:]


def check_failure(engine, job, ranks, pattern, since):
    with pytest.raises(sora.RankFailedError, match=pattern) as caught:
        job.result(BOUND_S)
    assert time.monotonic() - since < BOUND_S
    assert wait_gone(ranks, GONE_S)
    assert descendants() == []
    # Every rank that could still speak was told who failed, and said so before it ended.
    acknowledged = engine._workers[0].executor.pool.acknowledged
    assert set(acknowledged) == set(range(len(ranks))) - {caught.value.rank}
    assert all(str(caught.value) in answer for answer in acknowledged.values())
    return caught.value


def test_ranks_that_are_killed_raise_or_hang(order):
    """One engine through three faults: each time the next request is served by fresh ranks."""
    with start(ulysses=2, guidance=2) as engine:
        job, ranks = running(engine)
        assert len(ranks) == 4
        since = time.monotonic()
        os.kill(ranks[2], signal.SIGKILL)
        error = check_failure(engine, job, ranks, "rank 2 was killed by SIGKILL", since)
        assert (error.rank, error.reason) == (2, "was killed by SIGKILL")

        job, ranks = running(engine)
        since = time.monotonic()
        order.write_text("raise 1")
        check_failure(engine, job, ranks, "rank 1 raised OSError: the disk is on fire", since)
        order.write_text("")

        job, ranks = running(engine)
        since = time.monotonic()
        order.write_text("hang 3")
        check_failure(engine, job, ranks, "rank 3 hangs: the others have waited", since)
        order.write_text("")

        assert engine.generate(SHORT).frames.shape == (1, 32, 32, 3)
        assert len(descendants()) == 5
    assert descendants() == []


def test_a_rank_that_is_stopped_and_a_death_in_idleness():
    with start(ring=2) as engine:
        job, ranks = running(engine)
        since = time.monotonic()
        os.kill(ranks[1], signal.SIGSTOP)  # not even its second thread answers
        check_failure(engine, job, ranks, "rank 1 (hangs|has not been heard of)", since)

        assert engine.generate(SHORT).frames.any()
        ranks = descendants()[1:]
        os.kill(ranks[0], signal.SIGKILL)
        assert wait_gone(ranks[:1], GONE_S)
        with pytest.raises(sora.RankFailedError, match="rank 0"):
            engine.generate(SHORT)
        assert engine.generate(SHORT).frames.any()
    assert descendants() == []


ENGINE = """
    import sys, threading
    import sora_engine as sora
    engine = sora.Engine.from_pretrained(
        "sprites", device="cpu", parallel=sora.ParallelConfig(ulysses=2)
    )
    request = sora.VideoRequest("a", height=32, width=32, num_frames=5, num_inference_steps=900)
    engine.submit(request, on_progress=lambda p: print("step", flush=True))
    threading.Event().wait(300)
"""


def test_an_engine_that_dies_takes_its_ranks_with_it():
    code = textwrap.dedent(ENGINE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment
    ) as engine:
        assert engine.stdout.readline() == b"step\n"
        ranks = descendants(engine.pid)
        assert len(ranks) == 3
        os.kill(ranks[2], signal.SIGSTOP)  # not even this one stays
        engine.kill()
    assert wait_gone(ranks, GONE_S)


def test_a_launcher_that_dies_takes_its_ranks_with_it():
    with start(ulysses=2) as engine:
        job, ranks = running(engine)
        launcher = descendants()[0]
        os.kill(launcher, signal.SIGKILL)
        assert wait_gone(ranks, GONE_S)
        with pytest.raises(sora.RankFailedError):
            job.result(BOUND_S)
    assert descendants() == []


def test_nothing_is_left_in_shared_memory():
    """After all of the above."""
    assert shared_memory() <= SHARED_BEFORE
    assert not [pid for pid in parents() if pid in descendants()]
