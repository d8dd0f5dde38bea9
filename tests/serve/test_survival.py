"""A server that is killed, stopped, or whose device dies loses no job that it has accepted."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.serve.servers import Nursery, Server

JOB = {"num_frames": 9, "num_inference_steps": 6, "seed": 5}


def latents(server: Server, name: str) -> np.ndarray:
    return load_file(server.data / "videos" / name / "latents.safetensors")["latents"]


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> np.ndarray:
    return latents(server, server.completed(server.create(**JOB)["id"])["id"])


def leftovers(data: Path) -> list[str]:
    """What is in the data folder that no finished job has."""
    with sqlite3.connect(data / "jobs.sqlite") as rows:
        known = {name for (name,) in rows.execute("SELECT id FROM jobs")}
        assert rows.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        states = {state for (state,) in rows.execute("SELECT state FROM jobs")}
    assert states <= {"completed", "failed", "cancelled"}
    strange = {path.name for path in (data / "videos").iterdir()} - known
    return [*strange, *(p.name for sub in ("saved", "tmp") for p in (data / sub).iterdir())]


@pytest.mark.parametrize(
    ("fault", "value", "resumed"),
    [
        ("stall_before_begin", 1, None),
        ("stall_at_step", 3, 3),
        ("stall_at_frame", 2, 6),
        ("stall_while_writing", 1, 6),
        ("stall_before_row", 1, None),
    ],
)
def test_a_job_is_done_after_a_kill_at_each_stage(
    nursery: Nursery, tmp_path, undisturbed, fault, value, resumed
):
    data = tmp_path / "data"
    with Server(nursery, data, faults={fault: value}, save_every_s="0.000001") as first:
        name = first.create(**JOB)["id"]
        if fault != "stall_before_begin":
            first.said("STALLED")
        first.kill()
    with Server(nursery, data) as second:
        video = second.completed(name)
        assert video["receipt"]["resumed_at"] == resumed
        got = latents(second, name)
        scale = np.abs(undisturbed).max()
        assert np.abs(got - undisturbed).max() <= 1e-5 * scale
        assert second.http.get(video["url"]).content[4:8] == b"ftyp"
        second.signal(signal.SIGTERM)
        assert second.ended() == 0
    assert leftovers(data) == []


@pytest.mark.parametrize(("step", "lives"), [(0, 3), (2, 3)])
def test_a_job_that_kills_its_server_is_given_up(nursery: Nursery, tmp_path, step, lives):
    """After three times at one point: in its first step, or in a later one."""
    data = tmp_path / "data"
    name = None
    for life in range(lives):
        faults = {"kill_at_step": step}
        with Server(nursery, data, faults=faults, ready=False) as server:
            if life == 0:
                server.url = server.said("LISTENING")
                server.said("READY")
                server.http = httpx.Client(base_url=server.url)
                name = server.create(**JOB)["id"]
            assert server.ended() == -signal.SIGKILL
    with Server(nursery, data) as server:
        video = server.get(name)
        assert (video["status"], video["error"]["code"]) == ("failed", "crashed")
        server.completed(server.create()["id"])  # and the others go on


def test_a_first_signal_drains(nursery: Nursery, tmp_path):
    """Those who poll see the end, nothing new is taken, and the exit code is 0."""
    with Server(nursery, tmp_path / "data", faults={"slow_steps": 60}) as server:
        name = server.create(**{**JOB, "num_inference_steps": 20})["id"]
        server.until(lambda: server.get(name)["steps_done"] > 0)
        assert server.http.get("/ready").status_code == 200
        server.signal(signal.SIGTERM)
        server.until(lambda: server.http.get("/ready").status_code == 503)
        assert server.http.get("/health").status_code == 200
        refused = server.http.post("/v1/videos", json={"prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert server.completed(name)["progress"] == 100
        assert server.ended() == 0


def test_what_outlasts_the_drain_is_saved_and_goes_on(nursery: Nursery, tmp_path, undisturbed):
    data = tmp_path / "data"
    options = {"faults": {"slow_steps": 200}, "drain_timeout": "0.3s", "max_running": 1}
    with Server(nursery, data, **options) as first:
        names = [first.create(**JOB)["id"] for _ in range(2)]
        first.until(lambda: first.get(names[0])["steps_done"] >= 2)
        first.signal(signal.SIGTERM)
        assert first.ended() == 0
    with sqlite3.connect(data / "jobs.sqlite") as rows:
        assert rows.execute("SELECT state, attempts FROM jobs").fetchall() == [("queued", 0)] * 2
    with Server(nursery, data) as second:
        video = second.completed(names[0])
        assert video["receipt"]["resumed_at"] >= 2
        for name in names:
            second.completed(name)
            difference = np.abs(latents(second, name) - undisturbed).max()
            assert difference <= 1e-5 * np.abs(undisturbed).max()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("loaded", [False, True])
def test_nothing_stays_behind_a_server(nursery: Nursery, tmp_path, number, loaded):
    """No process, no port, no lock."""
    data = tmp_path / "data"
    with Server(nursery, data, faults={"slow_steps": 20}, drain_timeout="0.1s") as server:
        if loaded:
            name = server.create(**JOB)["id"]
            server.until(lambda: server.get(name)["status"] != "queued")
        server.signal(number)
        assert server.ended() == (-number if number == signal.SIGKILL else 0)
        with pytest.raises(ProcessLookupError):
            os.killpg(server.pid, 0)
        port = urlsplit(server.url).port
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
    with Server(nursery, data) as again:
        assert again.http.get("/ready").status_code == 200


def test_a_second_signal_ends_it_at_once(nursery: Nursery, tmp_path):
    with Server(nursery, tmp_path / "data", faults={"stall_at_step": 1}) as server:
        server.create(**JOB)
        server.said("STALLED")
        server.signal(signal.SIGTERM)
        server.until(lambda: server.http.get("/ready").status_code == 503)
        server.signal(signal.SIGTERM)
        assert server.ended(5) == 128 + signal.SIGTERM


def test_an_engine_that_hangs_does_not_keep_the_server(nursery: Nursery, tmp_path):
    data = tmp_path / "data"
    faults = {"stall_at_step": 2, "quick_end": 1}
    with Server(nursery, data, faults=faults, drain_timeout="0.2s", save_every_s=0) as server:
        name = server.create(**JOB)["id"]
        server.said("STALLED")
        server.signal(signal.SIGTERM)
        assert server.ended(15) == 70
    with Server(nursery, data) as server:
        server.completed(name)


def test_a_dead_engine_is_told_and_its_jobs_wait_for_the_next_process(nursery: Nursery, tmp_path):
    data = tmp_path / "data"
    faults = {"device_dies_at_step": 2}
    with Server(nursery, data, faults=faults, dead_timeout="2s") as server:
        name = server.create(**JOB)["id"]
        server.until(lambda: server.http.get("/health").status_code == 503)
        assert server.http.get("/ready").json() == {"status": "dead"}
        refused = server.http.post("/v1/videos", json={"prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
        assert refused.headers["x-should-retry"] == "false"
        assert server.get(name)["status"] == "queued"
        assert server.ended() == 70
    with Server(nursery, data) as server:
        server.completed(name)


def test_a_folder_has_one_server(nursery: Nursery, server: Server):
    second = Server(nursery, server.data, ready=False)
    assert second.ended() == 1
    assert f"{server.data} is in use by another server" in second.text()


def test_a_damaged_store_is_named_and_left_as_it_is(nursery: Nursery, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "videos").mkdir()
    (data / "videos" / "kept").mkdir()
    damaged = b"SQLite format 3\0" + b"\xff" * 8000
    (data / "jobs.sqlite").write_bytes(damaged)
    server = Server(nursery, data, ready=False)
    assert server.ended() == 1
    assert f"{data / 'jobs.sqlite'} cannot be used" in server.text()
    assert (data / "jobs.sqlite").read_bytes() == damaged
    assert (data / "videos" / "kept").is_dir()


def test_a_store_that_another_has_locked_answers_503(nursery: Nursery, tmp_path):
    with Server(nursery, tmp_path / "data") as server:
        other = sqlite3.connect(server.data / "jobs.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        answer = server.http.post("/v1/videos", json={"prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_busy")
        other.execute("ROLLBACK")
        other.close()
        server.completed(server.create()["id"])


def test_a_taken_port_is_told_before_the_model_is_loaded(nursery: Nursery, tmp_path, server):
    port = urlsplit(server.url).port
    second = Server(nursery, tmp_path / "data", ready=False, port=port)
    assert second.ended(5) == 1
    assert "Address already in use" in second.text()


def test_rows_that_were_acknowledged_are_there(nursery: Nursery, tmp_path):
    """Creates from several threads, and a kill in the midst of them."""
    data = tmp_path / "data"
    told: list[str] = []
    with Server(nursery, data, faults={"stall_before_begin": 1}) as first:

        def ask() -> None:
            for _ in range(10):
                try:
                    told.append(first.create()["id"])
                except (httpx.HTTPError, AssertionError):
                    return

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        first.until(lambda: len(told) >= 12)
        first.kill()
        for thread in threads:
            thread.join()
    with Server(nursery, data) as second:
        for name in told:
            second.completed(name)


def test_kills_of_a_server_that_was_told_to_stop_are_held_against_no_job(nursery, tmp_path):
    """As of a supervisor whose patience ends before the drain's."""
    data = tmp_path / "data"
    for signals, attempts in ([signal.SIGTERM], 0), ([], 1):
        with Server(nursery, data, faults={"stall_at_step": 1}) as server:
            if signals:
                server.create(**JOB)
            server.said("STALLED")
            for number in signals:
                server.signal(number)
                server.until(lambda server=server: server.http.get("/ready").status_code == 503)
                time.sleep(0.1)
            server.kill()
        with Server(nursery, data, faults={"stall_before_begin": 1}):
            pass
        with sqlite3.connect(data / "jobs.sqlite") as rows:
            found = rows.execute("SELECT state, attempts FROM jobs").fetchall()
            assert found == [("queued", attempts)]


def test_pictures_of_a_server_that_was_killed_leave_nothing(nursery: Nursery, tmp_path):
    data = tmp_path / "data"
    body = {"prompt": "a red circle", "n": 3, "size": "32x32", "num_inference_steps": 4}
    with Server(nursery, data, faults={"stall_at_step": 2}, max_running=2) as server:

        def ask(url: str = server.url) -> None:
            with contextlib.suppress(httpx.TransportError):
                httpx.post(f"{url}/v1/images/generations", json=body, timeout=60)

        asked = threading.Thread(target=ask)
        asked.start()
        server.said("STALLED")
        server.kill()
        asked.join()
    with Server(nursery, data) as server:
        assert leftovers(data) == []
        with sqlite3.connect(data / "jobs.sqlite") as rows:
            assert rows.execute("SELECT count(*) FROM jobs").fetchone() == (0,)
        assert server.http.post("/v1/images/generations", json=body).status_code == 200


@pytest.mark.parametrize(
    "at",
    [
        *("savepoint", "video", "spool"),
        *(pytest.param(at, marks=pytest.mark.slow) for at in ("end of video", "sheet", "place")),
    ],
)
def test_a_disk_that_is_full_at_any_moment_loses_no_job(
    nursery: Nursery, tmp_path, undisturbed, at
):
    data, switch = tmp_path / "data", tmp_path / "full"
    switch.touch()
    faults = {"full_disk": {"at": at, "while": str(switch)}, "quick_pause": 1}
    with Server(nursery, data, faults=faults, save_every_s="0.000001") as server:
        name = server.create(**JOB)["id"]
        server.said(f"FULL {at}")
        if at != "savepoint":  # without which a job goes on
            server.until(lambda: server.text().count(f"FULL {at}") >= 2)  # it is tried again
            assert server.get(name)["status"] in ("queued", "in_progress")
        else:
            server.completed(name)
        switch.unlink()
        server.completed(name)
        assert np.abs(latents(server, name) - undisturbed).max() <= 1e-5 * np.abs(undisturbed).max()
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
    assert leftovers(data) == []


@pytest.mark.parametrize("killed", [False, True])
def test_a_store_without_room_loses_no_job(nursery: Nursery, tmp_path, undisturbed, killed):
    """The row cannot say that its job is completed; the files are there."""
    data, switch = tmp_path / "data", tmp_path / "full"
    faults = {"full_disk": {"at": "commit", "while": str(switch)}, "slow_steps": 50}
    with Server(nursery, data, faults=faults) as server:
        name = server.create(**JOB)["id"]
        server.until(lambda: server.get(name)["steps_done"] >= 1)
        switch.touch()
        answer = server.http.post("/v1/videos", json={"prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "disk_full")
        server.until(lambda: (data / "videos" / name).exists())
        assert server.get(name)["status"] == "in_progress"
        if killed:
            server.kill()
        switch.unlink()
        if not killed:
            server.completed(name)
    with Server(nursery, data) as server:
        server.completed(name)
        assert np.abs(latents(server, name) - undisturbed).max() <= 1e-5 * np.abs(undisturbed).max()
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
    assert leftovers(data) == []
