"""Queues, races, a full disk, a slow writer, clocks: what bounds a service, and what it bears."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from sora_engine.serve.clock import Clock
from sora_engine.serve.files import Files
from sora_engine.serve.keeping import Keeper
from sora_engine.serve.settings import Settings
from sora_engine.serve.spool import Spool
from sora_engine.serve.store import Row, Store
from tests.serve.servers import Nursery, Server
from tests.serve.test_contract import frames_of


def test_one_more_than_the_queue_holds_is_told_to_come_again(nursery: Nursery, tmp_path):
    limits = {"max_queue": 2, "max_running": 1}
    with Server(nursery, tmp_path / "data", faults={"slow_steps": 50}, **limits) as server:
        body = {"prompt": "a", "size": "16x16", "num_frames": 1, "num_inference_steps": 40}
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: server.http.post("/v1/videos", json=body), range(4)))
        codes = sorted(answer.status_code for answer in answers)
        assert codes == [200, 200, 200, 429]
        full = next(answer for answer in answers if answer.status_code == 429)
        assert full.json()["error"]["code"] == "queue_full"
        assert int(full.headers["retry-after"]) >= 1
        names = [answer.json()["id"] for answer in answers if answer.status_code == 200]
        server.until(lambda: any(server.get(n)["status"] == "in_progress" for n in names))
        told = {name: server.get(name)["queue_position"] for name in names}
        assert sorted(told.values(), key=str) == [0, 1, None]
        waiting = next(name for name, place in told.items() if place == 1)
        cancelled = server.http.post(f"/v1/videos/{waiting}/cancel").json()
        assert (cancelled["status"], cancelled["error"]["code"]) == ("failed", "cancelled")
        assert server.http.post("/v1/videos", json=body).status_code == 200


def test_a_key_has_so_many_jobs(nursery: Nursery, tmp_path):
    with Server(nursery, tmp_path / "d", faults={"stall_before_begin": 1}, max_jobs_per_key=2) as s:
        names = [s.create()["id"] for _ in range(2)]
        answer = s.http.post("/v1/videos", json={"prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "too_many_jobs")
        s.http.delete(f"/v1/videos/{names[0]}")
        s.create()


def test_a_cancel_stops_the_work_within_a_step(nursery: Nursery, tmp_path):
    with Server(nursery, tmp_path / "data", faults={"slow_steps": 100}) as server:
        for ask in ("cancel", "delete"):
            name = server.create(num_inference_steps=50)["id"]
            server.until(lambda name=name: server.get(name)["steps_done"] >= 2)
            if ask == "delete":
                assert server.http.delete(f"/v1/videos/{name}").status_code == 200
                assert server.http.get(f"/v1/videos/{name}").status_code == 404
            else:
                before = server.get(name)["steps_done"]
                asked = time.monotonic()
                server.http.post(f"/v1/videos/{name}/cancel")
                video = server.done(name)
                assert time.monotonic() - asked < 2.0
                assert video["error"]["code"] == "cancelled"
                assert video["steps_done"] <= before + 2
        server.until(lambda: not list((server.data / "saved").iterdir()))
        assert not list((server.data / "tmp").iterdir())


@pytest.mark.parametrize("times", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_a_delete_that_races_the_end_leaves_nothing(server: Server, times):
    """By chance before, at and after the job's end; never a 500, never a file or a row."""
    body = {"prompt": "a", "size": "16x16", "num_frames": 1, "num_inference_steps": 1, "seed": 1}
    first = server.http.post("/v1/videos", json=body).json()["id"]
    began = time.monotonic()
    server.completed(first)
    took = time.monotonic() - began
    rng = np.random.default_rng(3)
    seen = set()
    for _ in range(times):
        name = server.http.post("/v1/videos", json=body).json()["id"]
        time.sleep(rng.uniform(0, 1.5 * took))
        seen.add(server.get(name)["status"])
        codes = []
        barrier = threading.Barrier(2)

        def delete(name: str = name, codes: list[int] = codes, barrier: object = barrier) -> None:
            barrier.wait()  # type: ignore[attr-defined]
            codes.append(server.http.delete(f"/v1/videos/{name}").status_code)

        threads = [threading.Thread(target=delete) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(codes) in ([200, 404], [200, 200])
        assert server.http.get(f"/v1/videos/{name}").status_code == 404
    assert "completed" in seen
    assert len(seen) > 1
    known = {first}
    server.until(
        lambda: {p.name for p in (server.data / "videos").iterdir()} == known, timeout_s=10
    )
    assert not list((server.data / "tmp").iterdir())
    assert "Traceback" not in server.text()
    listed = server.http.get("/v1/videos").json()
    assert [video["id"] for video in listed["data"]] == [first]


def test_an_idempotency_key_makes_one_job(server: Server):
    body = {"prompt": "once", "size": "32x32", "num_frames": 1, "num_inference_steps": 1}
    headers = {"Idempotency-Key": "order-1"}

    def ask(_: int) -> httpx.Response:
        return server.http.post("/v1/videos", json=body, headers=headers)

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == 1
    other = server.http.post("/v1/videos", json={**body, "prompt": "twice"}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (400, "idempotency_mismatch")
    free = server.http.post("/v1/videos", json=body)
    assert free.json()["id"] != answers[0].json()["id"]


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of 8 MB; skipped where none can be made."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)], capture_output=True
    )
    if made.returncode:
        pytest.skip("no small disk can be mounted here, which takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount here")
def test_a_full_disk_keeps_the_jobs(nursery: Nursery, tmp_path):
    """A clean 503; what was accepted goes on once there is room again."""
    with (
        small_disk(tmp_path / "disk") as disk,
        Server(
            nursery,
            disk / "data",
            log=tmp_path / "log",
            faults={"slow_steps": 100, "quick_pause": 1},
        ) as server,
    ):
        name = server.create(num_inference_steps=10, num_frames=9, size="64x64")["id"]
        server.until(lambda: server.get(name)["steps_done"] >= 2)
        with (disk / "fat").open("wb", buffering=0) as fat, contextlib.suppress(OSError):
            while True:
                fat.write(b"\0" * 4096)
        answer = server.http.post("/v1/videos", json={"prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "disk_full")
        time.sleep(2.5)  # it comes to its end meanwhile, and cannot be written
        assert server.get(name)["status"] in ("queued", "in_progress")
        (disk / "fat").unlink()
        assert len(frames_of(server.http.get(server.completed(name)["url"]).content)) == 9


def test_a_slow_writer_holds_up_nobody(nursery: Nursery, tmp_path, server: Server):
    """The engine's thread does not wait for files, and what waits lies on the disk."""
    want = server.completed(server.create(num_frames=49)["id"])
    faults = {"slow_writer": 60, "small_spool": 4096}
    with Server(nursery, tmp_path / "data", faults=faults) as slow:
        name = slow.create(num_frames=49)["id"]
        slow.until(lambda: slow.get(name)["stage"] == "writing")
        waits = slow.data / "tmp" / f"{name}.frames"
        assert waits.stat().st_size > 10 * 4096
        began = time.monotonic()
        slow.completed(slow.create(num_frames=1)["id"])
        assert time.monotonic() - began < 2.0
        assert slow.get(name)["status"] == "in_progress"
        got = slow.http.get(slow.completed(name)["url"]).content
        assert not waits.exists()
    assert np.array_equal(frames_of(got), frames_of(server.http.get(want["url"]).content))


def test_a_spool_gives_what_it_was_given(tmp_path):
    rng = np.random.default_rng(0)
    chunks = [rng.integers(0, 256, (n, 4, 6, 3), np.uint8) for n in rng.integers(1, 5, 200)]
    spool = Spool(tmp_path / "overflow", memory=500)
    got = []

    def read() -> None:
        while (chunk := spool.get()) is not None:
            got.append(chunk)
            time.sleep(0.0005)

    reader = threading.Thread(target=read)
    reader.start()
    for i, chunk in enumerate(chunks):
        spool.put(chunk)
        if i % 50 == 0:
            time.sleep(0.02)
    spool.end()
    reader.join(30)
    assert len(got) == len(chunks)
    assert all(np.array_equal(a, b) for a, b in zip(got, chunks, strict=True))
    assert not (tmp_path / "overflow").exists()


class Hands:
    """A clock whose wall and steady hands are moved by a test."""

    def __init__(self) -> None:
        self.wall, self.steady = 1_700_000_000.0, 50.0

    def clock(self, last_seen: float = 0.0) -> Clock:
        return Clock(last_seen, lambda: self.wall, lambda: self.steady)


@pytest.fixture
def kept(tmp_path) -> Iterator[tuple[Store, Files]]:
    files = Files(tmp_path / "data")
    store = Store(files.rows)
    yield store, files
    store.close()
    files.close()


def finished(store: Store, files: Files, name: str, at: float, size: int = 100) -> None:
    facts = {"num_frames": 1}
    store.add(Row(id=name, owner="local", created=at, body={"fields": {}}, facts=facts))
    store.change(name, "running", when={"queued"})
    store.change(name, "completed", when={"running"}, completed=at)
    folder = files.begin(name)
    (folder / "video.mp4").write_bytes(b"0" * size)
    (folder / "receipt.json").write_text("{}")
    files.place(name)


def test_jumps_of_the_machines_clock_expire_nothing(kept):
    store, files = kept
    hands = Hands()
    clock = hands.clock()
    keeper = Keeper(store, files, Settings(keep_s=100.0, keep_jobs_s=1000.0), clock)
    finished(store, files, "fresh", clock.now())
    hands.wall += 10**9
    keeper.sweep()
    hands.wall -= 2 * 10**9
    keeper.sweep()
    assert store.get("fresh").state == "completed"
    hands.steady += 101
    keeper.sweep()
    assert store.get("fresh").state == "expired"
    assert not files.video("fresh").exists()
    hands.steady += 1000
    keeper.sweep()
    assert store.get("fresh") is None


def test_a_clock_that_was_set_back_does_not_go_back(kept):
    store, files = kept
    hands = Hands()
    settings = Settings(keep_s=100.0, keep_jobs_s=1000.0)
    first = hands.clock()
    Keeper(store, files, settings, first).sweep()
    seen = float(store.noted("last_seen"))
    hands.wall -= 10**6
    assert hands.clock(seen).now() == first.now()


def test_the_oldest_go_where_there_is_no_room_for_all(kept):
    store, files = kept
    clock = Hands().clock()
    for i in range(4):
        finished(store, files, f"v{i}", clock.now() + i, size=1000)
    keeper = Keeper(store, files, Settings(disk_limit=2500), clock)
    keeper.sweep()
    states = [store.get(f"v{i}").state for i in range(4)]
    assert states == ["expired", "expired", "completed", "completed"]


def test_uploads_go_once_no_job_needs_them(kept, tmp_path):
    store, files = kept
    source = tmp_path / "source"
    names = {}
    for word in ("needed", "old", "new"):
        source.write_bytes(word.encode())
        with source.open("rb") as file:
            names[word] = files.keep_upload(file)
    body = {"fields": {"clips": [{"upload": names["needed"], "at": 0}]}}
    clock = Hands().clock()
    store.add(Row(id="a", owner="local", created=clock.now(), body=body))
    for word in ("needed", "old"):
        os.utime(files.upload(names[word]), (0, 0))
    os.utime(files.upload(names["new"]), (clock.now(), clock.now()))
    Keeper(store, files, Settings(), clock).sweep()
    assert {path.name for path in files.uploads.iterdir()} == {names["needed"], names["new"]}
