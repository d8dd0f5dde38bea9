"""Deletes, disconnects and mixed use at length: no 5xx, no orphan, and nothing that grows.

`SORA_TEST_MINUTES=60 SORA_TEST_SEED=7 pytest -s -m slow tests/serve/test_endurance.py -k mixed` is
one of an hour.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import socket
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.servers import Nursery, Server

MINUTES = float(os.environ.get("SORA_TEST_MINUTES", "5"))
SEED = int(os.environ.get("SORA_TEST_SEED", "2"))
GAUGES = ("sora_jobs_running", "sora_jobs_waiting", "sora_event_streams")
OPTIONS: dict[str, Any] = {"max_running": 4, "save_every_s": "0.05", "keep_latents": False}


def metric(server: Server, name: str, **labels: str) -> float:
    """The sum of a metric over its labels. labels: how the values of those begin that count."""
    families = text_string_to_metric_families(server.http.get("/metrics").text)
    samples = [s for family in families for s in family.samples if s.name == name]
    return sum(
        s.value
        for s in samples
        if all(s.labels[key].startswith(value) for key, value in labels.items())
    )


def at_rest(server: Server) -> None:
    """Wait until nothing is under way; the gauges say so, and so do the folders."""
    for name in (*GAUGES, "sora_memory_promised_bytes"):
        server.until(lambda name=name: metric(server, name) == 0, timeout_s=60)
    for part in ("saved", "tmp"):
        server.until(lambda part=part: not list((server.data / part).iterdir()), timeout_s=10)
    with contextlib.closing(sqlite3.connect(server.data / "jobs.sqlite")) as rows:
        assert rows.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        found = {name for (name,) in rows.execute("SELECT id FROM jobs WHERE state='completed'")}
    assert {path.name for path in (server.data / "videos").iterdir()} == found
    assert "Traceback" not in server.text(), server.text()[-4000:]
    assert metric(server, "sora_http_requests_total", status="5") == 0


class Usage:
    """What a process has: resident bytes, descriptors, threads."""

    def __init__(self, pid: int) -> None:
        status = Path(f"/proc/{pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        self.rss = int(fields["VmRSS"].split()[0]) << 10
        self.threads = int(fields["Threads"])
        self.fds = len(os.listdir(f"/proc/{pid}/fd"))

    def __str__(self) -> str:
        return f"{self.rss / 1e6:.0f} MB, {self.fds} descriptors, {self.threads} threads"


class Client:
    """One client of a server, and what it is answered. No answer may be a 5xx."""

    def __init__(self, server: Server, seed: int) -> None:
        self.url, self.rng = server.url, random.Random(seed)
        self.http = httpx.Client(base_url=server.url, timeout=60)
        self.jobs: list[str] = []
        self.codes: Counter[tuple[str, int]] = Counter()

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        answer = self.http.request(method, path, **options)
        self.heard(f"{method} {path.rpartition('/')[2][:9]}", answer.status_code, answer.text)
        return answer

    def heard(self, what: str, code: int, text: str = "") -> None:
        self.codes[what, code] += 1
        assert code < 500, (what, code, text)

    def body(self, **fields: Any) -> dict[str, Any]:
        return {
            "prompt": self.rng.choice(["a red circle moves right", "a blue square"]),
            "size": self.rng.choice(["16x16", "32x32", "48x32"]),
            "num_frames": self.rng.choice([1, 5, 9]),
            "num_inference_steps": self.rng.choice([1, 2, 6]),
            "seed": self.rng.randrange(1 << 32),
            **fields,
        }

    def create(self, **fields: Any) -> str:
        answer = self.ask("POST", "/v1/videos", json=self.body(**fields))
        assert answer.status_code == 200, answer.text
        self.jobs.append(answer.json()["id"])
        return self.jobs[-1]

    def until(self, name: str, *statuses: str) -> None:
        end = time.monotonic() + 60
        while self.ask("GET", f"/v1/videos/{name}").json()["status"] not in statuses:
            assert time.monotonic() < end
            time.sleep(0.01)

    def delete(self, name: str) -> int:
        return self.ask("DELETE", f"/v1/videos/{name}").status_code

    def hang_up(self, request: bytes, after_s: float) -> None:
        """Send a request, and go away without the answer, or in the midst of it."""
        where = urlsplit(self.url)
        with socket.create_connection((where.hostname, where.port), timeout=10) as sock:
            sock.sendall(request)
            time.sleep(after_s)
            if self.rng.random() < 0.5:  # with a reset, where not with an end
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def posted(path: str, body: bytes, kind: str = "application/json", missing: int = 0) -> bytes:
    """A request whose body lacks its last bytes."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(body) + missing}\r\n\r\n".encode() + body


def got(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", (32, 32), random.Random(seed).randbytes(3072)).save(file, "PNG")
    return file.getvalue()


# Deletes.


def delete_once(client: Client, name: str) -> None:
    assert client.delete(name) == 200


def delete_twice(client: Client, name: str) -> None:
    with ThreadPoolExecutor(2) as pool:
        codes = sorted(pool.map(client.delete, [name, name]))
    assert codes in ([200, 200], [200, 404])


def delete_while_it_is_read(client: Client, name: str) -> None:
    """Who reads has the whole file, or nothing."""
    client.until(name, "completed")
    with ThreadPoolExecutor(1) as pool:
        deleted = pool.submit(client.delete, name)
        answer = client.http.get(f"/v1/videos/{name}/content")
        client.heard("content", answer.status_code)
        assert answer.status_code in (200, 404)
        if answer.status_code == 200:
            assert answer.content[4:8] == b"ftyp"
            assert len(answer.content) == int(answer.headers["content-length"])
        assert deleted.result() == 200


def delete_while_it_is_cancelled(client: Client, name: str) -> None:
    with ThreadPoolExecutor(2) as pool:
        cancelled = pool.submit(client.ask, "POST", f"/v1/videos/{name}/cancel")
        assert client.delete(name) == 200
        assert cancelled.result().status_code in (200, 404)


def delete_while_it_is_remixed(client: Client, name: str) -> None:
    client.until(name, "completed")
    with ThreadPoolExecutor(1) as pool:
        deleted = pool.submit(client.delete, name)
        body = {"prompt": "a green square", "num_inference_steps": 4}
        answer = client.ask("POST", f"/v1/videos/{name}/remix", json=body)
        assert deleted.result() == 200
    assert answer.status_code in (200, 400, 404)
    if answer.status_code == 200:
        client.until(answer.json()["id"], "completed")  # what it starts from is kept for it
        assert client.delete(answer.json()["id"]) == 200
        client.jobs.append(answer.json()["id"])


def delete_while_it_is_watched(client: Client, name: str) -> None:
    with client.http.stream("GET", f"/v1/videos/{name}/events") as stream:
        client.heard("events", stream.status_code)
        deleted = client.delete(name)
        told = "".join(stream.iter_text())
    assert deleted == 200
    assert "event: gone" in told or "event: done" in told


DELETES = (
    delete_once,
    delete_twice,
    delete_while_it_is_read,
    delete_while_it_is_cancelled,
    delete_while_it_is_remixed,
    delete_while_it_is_watched,
)


def deleted(server: Server, count: int, seed: int) -> None:
    """At random moments, by four clients at a time."""

    def work(number: int) -> Client:
        client = Client(server, 100 * seed + number)
        for i in range(count // 4):
            name = client.create()
            time.sleep(client.rng.choice([0, 0.02, 0.1, 0.4]) * client.rng.random())
            DELETES[(i + number) % len(DELETES)](client, name)
            assert client.ask("GET", f"/v1/videos/{name}").status_code == 404
        return client

    with ThreadPoolExecutor(4) as pool:
        clients = list(pool.map(work, range(4)))
    at_rest(server)
    assert list((server.data / "videos").iterdir()) == []
    with contextlib.closing(sqlite3.connect(server.data / "jobs.sqlite")) as rows:
        assert rows.execute("SELECT count(*) FROM jobs").fetchone() == (0,)
        assert rows.execute("SELECT count(*) FROM idempotency").fetchone() == (0,)
    made = sum(len(client.jobs) for client in clients)
    assert metric(server, "sora_jobs_total") == made, "each job's end is counted once"


def test_deletes_at_random_moments_leave_nothing(nursery: Nursery, tmp_path) -> None:
    with Server(nursery, tmp_path / "data", **OPTIONS) as server:
        deleted(server, 12, SEED)


@pytest.mark.slow
def test_two_hundred_deletes_at_random_moments_leave_nothing(nursery: Nursery, tmp_path) -> None:
    with Server(nursery, tmp_path / "data", **OPTIONS) as server:
        deleted(server, 200, SEED)


@pytest.fixture
def plain_nursery() -> Iterator[Nursery]:
    """One whose servers keep few of oneDNN's compiled products. There is one for each number of
    packed tokens and layer, up to 1024 of them, in oneDNN and once more in ideep, through which
    torch calls it: memory that grows for an hour, and then no more."""
    made = Nursery(ONEDNN_PRIMITIVE_CACHE_CAPACITY="8", LRU_CACHE_CAPACITY="8")
    yield made
    made.close()


# Disconnects.


def disconnects(client: Client, done: str) -> Iterator[tuple[str, bytes]]:
    """A request of each kind, by what it is. done: a video that is completed."""
    slow = json.dumps(client.body(num_inference_steps=60)).encode()
    file = picture(0)
    form = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n'
        b"Content-Type: image/png\r\n\r\n" + file + b"\r\n--b--\r\n"
    )
    kind = "multipart/form-data; boundary=b"
    running = client.create(num_inference_steps=60)
    client.until(running, "in_progress", "completed")
    yield "events", got(f"/v1/videos/{running}/events")
    yield "preview", got(f"/v1/videos/{running}/preview")
    yield "poll", got(f"/v1/videos/{running}")
    yield "sync", posted("/v1/videos/sync", slow)
    yield "images", posted("/v1/images/generations", b'{"prompt": "a", "n": 2, "size": "32x32"}')
    yield "content", got(f"/v1/videos/{done}/content")
    yield "create", posted("/v1/videos", slow)
    yield "half a create", posted("/v1/videos", slow, missing=10)
    yield "upload", posted("/v1/uploads", form, kind)
    yield "half an upload", posted("/v1/uploads", form[:-40], kind, missing=40)
    yield "half a header", b"GET /v1/videos HTTP/1.1\r\nHost: loc"
    yield "nothing", b""


def hung_up(server: Server, count: int, seed: int) -> tuple[Usage, Usage]:
    """What the server has before and after so many clients went away."""
    client = Client(server, seed)
    done = client.create(num_frames=9)
    client.until(done, "completed")
    kinds: Counter[str] = Counter()

    def some(most: int) -> None:
        while kinds.total() < most:
            for name, request in disconnects(client, done):
                client.hang_up(request, client.rng.choice([0, 0.01, 0.05, 0.3]))
                kinds[name] += 1
            for job in client.ask("GET", "/v1/videos?limit=100").json()["data"]:
                if job["id"] != done:
                    client.delete(job["id"])
        at_rest(server)

    some(60)  # threads and caches that come once
    before = Usage(server.pid)
    some(60 + count)
    server.until(lambda: Usage(server.pid).fds <= before.fds)
    with contextlib.closing(sqlite3.connect(server.data / "jobs.sqlite")) as rows:
        found = rows.execute("SELECT id FROM jobs WHERE kind='video'").fetchall()
    assert found == [(done,)], "a sync whose client has gone is cancelled, and is no row"
    return before, Usage(server.pid)


@pytest.mark.slow
def test_a_hundred_disconnects_of_every_kind_leave_nothing(plain_nursery, tmp_path) -> None:
    with Server(plain_nursery, tmp_path / "data", faults={"slow_steps": 5}, **OPTIONS) as server:
        before, after = hung_up(server, 100, SEED)
    print(f"before: {before}; after: {after}")
    assert after.fds <= before.fds
    assert after.threads <= before.threads + 4  # of pools that grow with use, up to a bound
    assert after.rss <= before.rss + (20 << 20)


# All of it, at length.


USES = ("poll", "poll", "cancel", "delete", "events", "upload", "sync", "images")


def use(client: Client, end: float) -> None:
    """What clients do, mixed, until then."""
    rng = client.rng
    while time.monotonic() < end:
        what = rng.choice(USES)
        match what:
            case "sync":
                answer = client.ask("POST", "/v1/videos/sync", json=client.body())
                client.jobs.append(answer.headers["x-video-id"])
                client.delete(answer.headers["x-video-id"])
                continue
            case "images":
                body = {"prompt": "a", "n": 2, "size": "32x32", "num_inference_steps": 2}
                client.ask("POST", "/v1/images/generations", json=body)
                continue
            case "upload":
                file = picture(rng.randrange(16))
                told = client.ask("POST", "/v1/uploads", files={"file": ("a.png", file)}).json()
                fields = {"input_reference": {"upload": told["id"]}, "num_frames": 5}
                name = client.create(**fields, size="32x32")
            case _:
                name = client.create()
        if what == "events":
            client.hang_up(got(f"/v1/videos/{name}/events"), rng.uniform(0, 0.1))
        if what == "cancel":
            time.sleep(rng.uniform(0, 0.2))
            client.ask("POST", f"/v1/videos/{name}/cancel")
        if what == "delete":
            rng.choice(DELETES)(client, name)
            continue
        if what == "poll":
            client.ask("GET", f"/v1/videos/{name}/preview")
        client.until(name, "completed", "failed")
        if what == "poll":
            client.ask("GET", f"/v1/videos/{name}/content")
        client.ask("GET", "/v1/videos?limit=10")
        client.delete(name)


@pytest.mark.slow
def test_mixed_use_makes_nothing_grow(plain_nursery: Nursery, tmp_path) -> None:
    """For SORA_TEST_MINUTES: what the server has at rest is measured after each sixth of them."""
    nursery = plain_nursery
    at: list[tuple[int, Usage]] = []
    with Server(nursery, tmp_path / "data", **OPTIONS) as server:
        clients = [Client(server, 100 * SEED + i) for i in range(4)]
        for _ in range(6):
            end = time.monotonic() + MINUTES * 10
            with ThreadPoolExecutor(len(clients)) as pool:
                for over in [pool.submit(use, client, end) for client in clients]:
                    over.result()
            at_rest(server)
            at.append((sum(len(client.jobs) for client in clients), Usage(server.pid)))
            print(f"{at[-1][0]} jobs: {at[-1][1]}", flush=True)
        with contextlib.closing(sqlite3.connect(server.data / "jobs.sqlite")) as rows:
            left = rows.execute("SELECT count(*) FROM jobs WHERE kind='video'").fetchone()
        assert left == (0,)
        asked = [(what, n) for client in clients for (what, _), n in client.codes.items()]
        remixes = sum(n for what, n in asked if "remix" in what)  # which keep what they begin with
        assert len(list((server.data / "uploads").iterdir())) <= 16 + remixes
    (jobs, first), (more, last) = at[1], at[-1]
    assert last.fds <= first.fds + 2
    assert last.threads <= first.threads + 4
    grown = (last.rss - first.rss) / max(1, more - jobs) * 100
    assert grown < 1e6, f"{grown / 1e6:.2f} MB for 100 jobs"
