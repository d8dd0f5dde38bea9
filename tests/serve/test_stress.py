"""Many kills and many cancels at random moments: nothing is lost, and nothing goes on."""

from __future__ import annotations

import io
import random
import signal
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from tests.serve.servers import Nursery, Server
from tests.serve.serving import served


def mixed(rng: random.Random, upload: str) -> dict[str, Any]:
    """The body of a small job of some kind."""
    body: dict[str, Any] = {
        "prompt": rng.choice(["a red circle moves right", "a blue square"]),
        "seed": rng.randrange(1 << 32),
        "size": rng.choice(["32x32", "48x32", "64x64"]),
        "num_frames": rng.choice([1, 5, 9, 17]),
        "num_inference_steps": rng.choice([2, 4, 8, 12]),
    }
    kind = rng.choice(["words", "words", "picture", "loop", "shots"])
    if kind == "picture" and body["num_frames"] > 1:
        body["input_reference"] = {"upload": upload}
    elif kind == "loop":
        body |= {"loop": True, "num_frames": 8}
    elif kind == "shots":
        shots = [{"prompt": word, "num_frames": 4} for word in ("a red circle", "a blue square")]
        body |= {"timeline": {"shots": shots}, "num_frames": 8}
    return body


def taken(server: Server, bodies: list[dict[str, Any]], names: dict[int, str]) -> None:
    """Order what has not been ordered, until the server is gone. names: of what was accepted."""
    for i, body in enumerate(bodies):
        if i not in names:
            key = {"Idempotency-Key": f"job-{i}"}
            answer = server.http.post("/v1/videos", json=body, headers=key)
            assert answer.status_code == 200, answer.text
            names[i] = answer.json()["id"]


def upload_to(server: Server) -> str:
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 40, 40)).save(picture, "PNG")
    answer = server.http.post("/v1/uploads", files={"file": ("a.png", picture.getvalue())})
    return str(answer.json()["id"])


def got_further(server: Server) -> None:
    """Wait until each job that is being made has taken a step more, which is saved, or has ended.
    What is decoded counts for nothing before its files are in place."""
    first: dict[str, int] = {}
    until = time.monotonic() + 60
    while time.monotonic() < until:
        listed = server.http.get("/v1/videos?limit=100").json()["data"]
        active = {told["id"]: told for told in listed if told["status"] == "in_progress"}
        begun = {name: told for name, told in active.items() if told["stage"] != "encoding"}
        for name, told in begun.items():
            first.setdefault(name, told["steps_done"])
        further = all(
            name not in active or active[name]["steps_done"] > steps
            for name, steps in first.items()
        )
        waits = any(told["status"] == "queued" for told in listed)
        if further and len(begun) == len(active) and (first or not waits):
            return
        time.sleep(0.01)


def latents(data: Path, name: str) -> np.ndarray:
    return load_file(data / "videos" / name / "latents.safetensors")["latents"]


def survived(nursery: Nursery, folder: Path, jobs: int, kills: int, seed: int) -> int:
    """How many of the jobs were taken up from a savepoint, after so many kills and no loss."""
    rng = random.Random(seed)
    options = {"save_every_s": "0.000001", "max_queue": 64, "max_running": 4}
    with Server(nursery, folder / "undisturbed", **options) as server:
        upload = upload_to(server)
        bodies = [mixed(rng, upload) for _ in range(jobs)]
        calm: dict[int, str] = {}
        taken(server, bodies, calm)
        for name in calm.values():
            server.completed(name, 240)
        want = [latents(server.data, calm[i]) for i in range(jobs)]

    data = folder / "killed"
    names: dict[int, str] = {}
    soon = True  # not twice: a job that is lost three times at one point is given up
    for attempt in range(kills):
        with Server(nursery, data, faults={"slow_steps": 8}, **options) as server:
            if attempt == 0:
                assert upload_to(server) == upload
            soon = not soon and rng.random() < 0.2
            killer = threading.Timer(rng.uniform(0, 0.5), server.signal, [signal.SIGKILL])
            if soon:
                killer.start()
            try:
                taken(server, bodies, names)
                if not soon:
                    got_further(server)
                    killer.start()
            except httpx.TransportError:
                pass  # it was killed while it was asked
            killer.join()
            server.kill()
        with sqlite3.connect(data / "jobs.sqlite") as rows:
            assert rows.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            known = {name for (name,) in rows.execute("SELECT id FROM jobs")}
        assert set(names.values()) <= known, "what was accepted is lost"

    resumed = 0
    with Server(nursery, data, **options) as server:
        taken(server, bodies, names)
        for i, name in names.items():
            video = server.completed(name, 240)
            resumed += video["receipt"]["resumed_at"] is not None
            got = latents(data, name)
            assert got.shape == want[i].shape
            worst = np.abs(got - want[i]).max() / np.abs(want[i]).max()
            assert worst <= 1e-5, (bodies[i], worst)
            content = server.http.get(video["url"])
            assert content.content[4:8] == b"ftyp"
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
    with sqlite3.connect(data / "jobs.sqlite") as rows:
        states = dict(rows.execute("SELECT id, state FROM jobs").fetchall())
    # A job whose answer was lost with the connection was ordered again under its key: one row.
    assert sorted(states) == sorted(names.values())
    assert set(states.values()) == {"completed"}
    assert {path.name for path in (data / "videos").iterdir()} == set(states)
    for part in ("saved", "tmp"):
        assert list((data / part).iterdir()) == []
    return resumed


@pytest.mark.slow
def test_two_kills_under_three_mixed_jobs_lose_nothing(nursery: Nursery, tmp_path) -> None:
    survived(nursery, tmp_path, jobs=3, kills=2, seed=1)


@pytest.mark.slow
def test_thirty_kills_under_forty_mixed_jobs_lose_nothing(nursery: Nursery, tmp_path) -> None:
    assert survived(nursery, tmp_path, jobs=40, kills=30, seed=2) > 0


def test_a_job_that_kills_its_server_takes_no_other_along(nursery: Nursery, tmp_path) -> None:
    """Those beside it are lost with the server as often as it is, and are made all the same."""
    data = tmp_path / "data"
    names: list[str] = []
    videos: dict[str, dict[str, Any]] = {}
    faults = {"kill_by_seed": 666, "slow_steps": 10}
    for life in range(8):
        with Server(nursery, data, faults=faults, ready=False) as server:
            try:
                server.url = server.said("LISTENING")
                server.said("READY")
                server.http = httpx.Client(base_url=server.url, timeout=60)
                if life == 0:
                    for seed in (1, 2, 3, 666):
                        server.create(seed=seed, num_inference_steps=30)
                    server.ended()
                    raise httpx.ReadError("it was killed")
                videos = {name: server.done(name) for name in names}
            except (AssertionError, httpx.TransportError):  # it is gone
                assert server.ended() == -signal.SIGKILL
                with sqlite3.connect(data / "jobs.sqlite") as rows:
                    found = rows.execute("SELECT id FROM jobs ORDER BY number").fetchall()
                names = [name for (name,) in found]
                continue
            break
    assert life == 6, "three times in company, three alone, and then a server that lives"
    codes = [(video["error"] or {}).get("code") for video in videos.values()]
    assert codes == [None, None, None, "crashed"]


def cancelled(data: Path, count: int) -> None:
    """The step in flight when a cancel is answered is the last one."""
    rng = random.Random(3)
    with served(data, max_running=1) as service:
        for _ in range(count):
            name = service.create(num_inference_steps=200, size="64x64", num_frames=9)["id"]
            while service.http.get(f"/v1/videos/{name}").json()["steps_done"] < 1:
                time.sleep(0.002)
            job = service.desk.live(name).job
            time.sleep(rng.uniform(0, 0.1))
            how = rng.choice(["cancel", "delete"])
            if how == "cancel":
                answer = service.http.post(f"/v1/videos/{name}/cancel")
            else:
                answer = service.http.delete(f"/v1/videos/{name}")
            told = job.progress.steps_done
            assert answer.status_code == 200
            until = time.monotonic() + 30
            while not job.done():
                assert time.monotonic() < until
                time.sleep(0.001)
            assert job.progress.steps_done <= told + 1
            assert job.progress.steps_done < 200
            service.idle()
            after = service.http.get(f"/v1/videos/{name}")
            if how == "cancel":
                assert after.json()["error"]["code"] == "cancelled"
            else:
                assert after.status_code == 404
        assert service.engine.num_running == service.engine.num_queued == 0


def test_a_cancel_stops_within_the_step(tmp_path) -> None:
    cancelled(tmp_path / "data", 5)


@pytest.mark.slow
def test_a_hundred_cancels_stop_within_the_step(tmp_path) -> None:
    cancelled(tmp_path / "data", 100)
