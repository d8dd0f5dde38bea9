"""What a start makes of each thing that a kill can leave, on rows and files that are laid out."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sora_engine.errors import MediaError
from sora_engine.runtime.job import Job
from sora_engine.runtime.worker import Worker
from sora_engine.serve.clock import Clock
from sora_engine.serve.files import Files
from sora_engine.serve.intake import Caps
from sora_engine.serve.live import Live
from sora_engine.serve.recovery import STOPPING, recover
from sora_engine.serve.spool import Spool
from sora_engine.serve.store import Row, Store
from sora_engine.serve.trail import Trail, last_word
from tests.serve.serving import served

RECEIPT = {"timings_s": {"denoising": 1.0, "decoding": 0.5}, "receipt": None, "seed": 1}


class Folder:
    """A data folder without a server."""

    def __init__(self, files: Files) -> None:
        self.files, self.store = files, Store(files.rows)

    def add(self, name: str, state: str = "running", **columns: Any) -> None:
        self.store.add(Row(id=name, owner="local", created=1.0, body={}, **columns))
        if state != "queued":
            self.store.change(name, state, when={"queued"}, completed=2.0)

    def save(self, name: str) -> None:
        path = self.files.savepoint(name)
        path.write_bytes(path.read_bytes() + b"x" if path.exists() else b"x")

    def place(self, name: str, receipt: str = json.dumps(RECEIPT)) -> None:
        (self.files.begin(name) / "receipt.json").write_text(receipt)
        self.files.place(name)

    def begin(self, *names: str, point: int = 0) -> None:
        """As a server does with jobs that it hands to the engine. point: where they are then."""
        for name in names:
            trail = Trail(self.files.trail(name))
            trail.goes(point, 0)
            trail.close()
            mark = self.files.mark(name)
            facts = {"mark": mark, "lost": False}
            assert self.store.change(name, "running", when={"queued"}, facts=facts)

    def recover(self) -> list[Live]:
        return recover(self.store, self.files, Clock())

    def states(self) -> dict[str, str]:
        return {row.id: row.state for row in self.store.all()}

    def tree(self) -> set[str]:
        found = (*self.files.videos.iterdir(), *self.files.saved.iterdir())
        return {f"{path.parent.name}/{path.name.split('.')[0]}" for path in found}


@pytest.fixture
def folder(tmp_path) -> Iterator[Folder]:
    made = Folder(Files(tmp_path / "data"))
    yield made
    made.store.close()
    made.files.close()


def lives(going_on: list[Live]) -> list[str]:
    return [live.row.id for live in going_on]


def test_no_file_outlives_the_row_that_has_it(folder: Folder) -> None:
    """A kill between a row's last state and the removal of what it no longer needs."""
    for state in ("completed", "expired", "failed", "cancelled", "deleting"):
        folder.add(state, state)
        folder.save(state)
        folder.place(state)
    folder.add("going")
    folder.save("going")
    folder.place("nobody")
    folder.save("nobody")
    (folder.files.saved / ".going.1234.tmp").write_bytes(b"half a savepoint")
    assert lives(folder.recover()) == ["going"]
    assert folder.tree() == {"videos/completed", "saved/going"}
    assert set(folder.states()) == {"completed", "expired", "failed", "cancelled", "going"}


def test_results_in_place_complete_their_job_unless_they_are_damaged(folder: Folder) -> None:
    for name, receipt in (
        ("whole", json.dumps(RECEIPT)),
        ("half", json.dumps(RECEIPT)[:20]),
        ("other", "[]"),
        ("bytes", "\ufffd{"),
        ("empty", "{}"),
    ):
        folder.add(name)
        folder.place(name, receipt)
    assert lives(folder.recover()) == ["half", "other", "bytes", "empty"]
    assert folder.tree() == {"videos/whole"}
    row = folder.store.get("whole")
    assert (row.state, row.facts["inference_time_s"]) == ("completed", 1.5)


def test_pictures_that_nobody_waits_for_are_gone(folder: Folder) -> None:
    """Their client waited on a connection of the server that is gone."""
    for name, state in (("a", "queued"), ("b", "running"), ("c", "running"), ("d", "completed")):
        folder.add(name, state, kind="image")
    for name in "cd":
        folder.place(name)
    folder.save("b")
    assert folder.recover() == []
    assert folder.states() == {"d": "completed"}
    assert folder.tree() == {"videos/d"}


def lost(
    folder: Folder, *names: str, point: int = 0
) -> tuple[list[str], dict[str, tuple[int, int]]]:
    """One more life of a server that is lost with these jobs in flight: those that go on, and of
    each how often it was lost, and how often alone at one point."""
    folder.begin(*names, point=point)
    going_on = lives(folder.recover())
    rows = folder.store.all()
    return going_on, {row.id: (row.attempts, row.facts.get("alone", 0)) for row in rows}


def test_losses_alone_at_one_point_end_a_job(folder: Folder) -> None:
    folder.add("a", "queued")
    assert lost(folder, "a") == (["a"], {"a": (1, 1)})
    assert lost(folder, "a") == (["a"], {"a": (2, 2)})
    assert lost(folder, "a") == ([], {"a": (3, 3)})
    row = folder.store.get("a")
    assert (row.state, row.facts["error"]["code"]) == ("failed", "crashed")


def test_losses_in_company_end_none_and_make_suspects(folder: Folder) -> None:
    for name in "ab":
        folder.add(name, "queued")
    for count in range(1, 8):
        assert lost(folder, "a", "b") == (["a", "b"], dict.fromkeys("ab", (count, 0)))
    assert all(live.is_suspect for live in folder.recover())


def test_a_job_that_ends_as_the_server_is_lost_is_company(folder: Folder) -> None:
    for name in "ab":
        folder.add(name, "queued")
    folder.place("b")
    assert lost(folder, "a", "b") == (["a"], {"a": (1, 0), "b": (0, 0)})


def test_one_that_is_lost_here_and_there_is_not_given_up(folder: Folder) -> None:
    """However often an operator kills the server, as long as it gets further at times."""
    folder.add("a", "queued")
    for point in range(1, 20, 2):
        for at in (point, point + 1, point + 1, point):
            assert lost(folder, "a", point=at)[0] == ["a"]
        folder.begin("a", point=point)
        folder.save("a")
        assert lives(folder.recover()) == ["a"]


def test_one_that_never_gets_further_is_given_up_at_last(folder: Folder) -> None:
    folder.add("a", "queued")
    for life in range(1, 11):
        assert lost(folder, "a", point=life % 3)[0] == (["a"] if life < 10 else [])
    error = folder.store.get("a").facts["error"]
    assert error["code"] == "crashed"
    assert "10 times" in error["message"]


def test_a_loss_at_another_point_begins_the_count_anew(folder: Folder) -> None:
    folder.add("a", "queued")
    told = [lost(folder, "a", point=point)[1]["a"][1] for point in (1, 1, 2, 2)]
    assert told == [1, 2, 0, 1]
    folder.begin("a")
    folder.files.trail("a").unlink()  # so early that there is no word, it counts as neither
    folder.recover()
    assert folder.store.get("a").facts["alone"] == 1
    told = [lost(folder, "a", point=2)[1]["a"][1] for _ in range(2)]
    assert told == [2, 3]
    assert folder.states() == {"a": "failed"}


def test_losses_while_the_server_is_being_stopped_are_held_against_nobody(folder: Folder) -> None:
    folder.add("a", "queued")
    for _ in range(5):
        folder.store.note(STOPPING, "asked")
        assert lost(folder, "a") == (["a"], {"a": (0, 0)})
    assert lost(folder, "a")[1] == {"a": (1, 1)}, "the word holds for one end"


def test_a_job_that_kills_the_device_is_given_up_too(folder: Folder) -> None:
    """Its row is queued again as the engine dies, and its supervisor starts a new process."""
    folder.add("a", "queued")
    for count in range(1, 4):
        folder.begin("a")
        folder.store.change("a", "queued", when={"running"}, facts={"lost": True})
        assert lives(folder.recover()) == (["a"] if count < 3 else [])
    assert folder.store.get("a").facts["error"]["code"] == "crashed"


def test_a_kill_within_the_recovery_changes_nothing(folder: Folder, monkeypatch) -> None:
    """At each of its commits: what the next start finds says the same of who was in flight."""
    folder.add("gone", "completed")
    folder.add("old", "deleting")
    for name in "ab":
        folder.add(name, "queued")
    folder.begin("a", "b")
    plain = folder.store.transact

    def killed_at(number: int) -> None:
        left = itertools.count(1)

        def transact(work: Callable[[sqlite3.Connection], object]) -> object:
            if next(left) == number:
                raise KeyboardInterrupt
            return plain(work)

        with monkeypatch.context() as patch:
            patch.setattr(folder.store, "transact", transact)
            folder.recover()

    for number in (1, 2, 2, 3):
        with contextlib.suppress(KeyboardInterrupt):
            killed_at(number)
    assert lives(folder.recover()) == ["a", "b"]
    assert folder.states() == {"gone": "failed", "a": "queued", "b": "queued"}
    rows = {name: folder.store.get(name) for name in "ab"}
    assert [(row.attempts, row.facts["alone"]) for row in rows.values()] == [(1, 0), (1, 0)]


def test_what_an_attempt_left_in_a_spool_is_no_frame_of_the_next(tmp_path) -> None:
    """A disk that was full as frames were put there leaves a part of them."""
    (tmp_path / "overflow").write_bytes(b"\xff" * 7)
    frames = np.arange(4 * 2 * 2 * 3, dtype=np.uint8).reshape(4, 2, 2, 3)
    spool = Spool(tmp_path / "overflow", memory=0)
    for frame in frames:
        spool.put(frame[None])
    spool.end()
    assert np.array_equal(np.concatenate([spool.get() for _ in frames]), frames)
    assert spool.get() is None


def test_a_trail_that_finds_no_room_is_silent(tmp_path, monkeypatch) -> None:
    """Nothing is mapped that has no place on the disk: to write there would end the process."""

    def full(_file: int, _data: bytes, _at: int) -> int:
        raise OSError(errno.ENOSPC, "no space")

    for put in (full, lambda _file, data, _at: len(data) - 1):
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", put)
            trail = Trail(tmp_path / "a.at")
        trail.goes(1, 0)
        trail.close()
        assert last_word(tmp_path / "a.at") == ""


def test_a_trail_tells_the_last_word_and_no_earlier_attempts(tmp_path) -> None:
    path = tmp_path / "a.at"
    trail = Trail(path)
    assert last_word(path) == ""
    trail.starts(3)
    assert last_word(path) == "3 0"
    trail.goes(1000, 81)
    trail.starts(3)  # the engine was quicker than who handed the job over
    trail.writes(80)
    assert last_word(path) == "1000 81 80"
    trail.goes(4, 0)
    assert last_word(path) == "4 0 80"
    trail.close()
    trail.goes(5, 0)
    assert last_word(path) == "4 0 80"
    Trail(path).close()
    assert last_word(path) == ""
    assert last_word(tmp_path / "none") == ""
    Trail(tmp_path / "none" / "a.at").goes(1, 0)  # a folder that is gone, a disk that is full


def test_few_small_frames_wait_for_more_or_the_end(tmp_path) -> None:
    """Whoever takes them is not woken for each; all that is put is got, in its order."""
    spool = Spool(tmp_path / "overflow", worth=100)
    got: list[int] = []

    def read() -> None:
        while (frames := spool.get()) is not None:
            got.append(int(frames[0, 0, 0, 0]))

    reader = threading.Thread(target=read)
    reader.start()

    def put(number: int) -> None:
        spool.put(np.full((1, 4, 4, 3), number, np.uint8))  # 48 bytes

    def until(count: int) -> None:
        end = time.monotonic() + 10
        while len(got) < count:
            assert time.monotonic() < end, got
            time.sleep(0.001)

    put(0)
    put(1)
    time.sleep(0.05)
    assert got == []
    put(2)
    until(3)
    put(3)
    time.sleep(0.05)
    assert got == [0, 1, 2]
    spool.end()
    reader.join(10)
    assert got == [0, 1, 2, 3]


def test_an_upload_is_there_once_it_was_checked(folder: Folder) -> None:
    """Not before, for another request or after a kill; and one that is there already stays, though
    a later check of the same bytes fails."""
    files = folder.files
    sha256 = hashlib.sha256(b"bytes").hexdigest()

    def refuse(path: Path) -> None:
        assert path.read_bytes() == b"bytes"
        assert not files.upload(sha256).exists()
        raise MediaError("no picture")

    with pytest.raises(MediaError):
        files.keep_upload(io.BytesIO(b"bytes"), refuse)
    assert list(files.uploads.iterdir()) == list(files.tmp.iterdir()) == []
    assert files.keep_upload(io.BytesIO(b"bytes"), lambda path: None) == sha256

    def out_of_time(path: Path) -> None:
        raise MediaError("the machine is busy")

    with pytest.raises(MediaError):
        files.keep_upload(io.BytesIO(b"bytes"), out_of_time)
    assert files.upload(sha256).read_bytes() == b"bytes"


def test_an_examiner_ends_though_nobody_waits_for_it(tmp_path) -> None:
    """One that hangs, and whose server was killed."""
    code = (
        "import sys, threading; from sora_engine.serve import examiner as e; "
        "e._found = lambda *_: threading.Event().wait(); sys.exit(e.main(sys.argv[1:]))"
    )
    caps = json.dumps({**asdict(Caps()), "wall_s": -0.8})  # it has a second more
    done = subprocess.run([sys.executable, "-c", code, "0", "image/png", caps], timeout=30)
    assert done.returncode == -signal.SIGALRM


def test_a_device_that_fails_under_one_job_fails_no_other(tmp_path, monkeypatch) -> None:
    """All that were at it go again, each alone: then it is known whose fault it is."""
    plain = Worker._step

    def stepped(self: Worker, jobs: list[Job]) -> None:
        if any(job.request.seed == 666 for job in jobs):
            self._device_failed(torch.AcceleratorError("CUDA error: an illegal memory access"))
        else:
            plain(self, jobs)

    monkeypatch.setattr(Worker, "_step", stepped)
    with served(tmp_path / "data") as service:
        names = [service.create(seed=seed, num_inference_steps=6)["id"] for seed in (1, 2, 3, 666)]
        videos = [service.ended(name) for name in names]
    codes = [(video["error"] or {}).get("code") for video in videos]
    assert codes == [None, None, None, "device_error"]
