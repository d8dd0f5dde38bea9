"""HTTP: what `sora serve` costs beside an engine in the caller's own process.

The server is a process of its own, as it is in use, and needs the extra `serve`; the clients here
are of the standard library. Both sides have the same threads, and take turns.

What each side does for a job. The *embedded engine* leaves its frames in memory. The *embedded
engine that saves* writes them as an MP4, beside the engine's own thread; nothing of a job survives
a kill before that. The *server* commits its row before the answer, at its start and at its end,
keeps its state after the last step of what takes a second or more, and has its MP4, its request and
its receipt on the disk, flushed, before it says `completed`. Pictures of a video it makes when they
are asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sora_engine.bench.results import SUBJECT, Measurement, ResultError
from sora_engine.bench.serving import Kind, with_percentiles
from sora_engine.bench.timing import interleaved
from sora_engine.runtime.engine import Engine

EMBEDDED = "embedded engine"
SAVING = "embedded engine that saves"
SMALL = Kind(64, 64, 5, 4, share=1)
"""Hardly any work, so that what the service adds to each job shows."""
DEFAULT = Kind(64, 64, 17, 40, share=1, small=False)
"""What the bundled checkpoint makes of words alone, by its `generation_config.json`."""
LARGE = Kind(192, 192, 33, 60, share=1, small=False)
START_S = 120.0
KEPT_POLLS, LEAST_POLLS = 500, 20


class Client:
    """One connection that is kept. A server closes one that is idle for a while, so each
    measurement has its own."""

    def __init__(self, address: str) -> None:
        host, _, port = address.removeprefix("http://").rpartition(":")
        self._connection = http.client.HTTPConnection(host, int(port), timeout=120)

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer's JSON; ResultError for another status than 200."""
        data = None if body is None else json.dumps(body)
        headers = {} if data is None else {"Content-Type": "application/json"}
        self._connection.request(method, path, data, headers)
        answer = self._connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise ResultError(f"{method} {path} answered {answer.status}: {text[:300]!r}")
        told: dict[str, Any] = json.loads(text)
        return told

    def create(self, kind: Kind, seed: int) -> str:
        arguments = kind.arguments(seed)
        size = f"{arguments.pop('width')}x{arguments.pop('height')}"
        return str(self.ask("POST", "/v1/videos", {**arguments, "size": size, "seed": seed})["id"])

    def wait(self, name: str) -> dict[str, Any]:
        """The video once it is done, told by its events."""
        self._connection.request("GET", f"/v1/videos/{name}/events")
        answer = self._connection.getresponse()
        last = [line for line in answer.read().splitlines() if line.startswith(b"data: ")][-1]
        told: dict[str, Any] = json.loads(last.removeprefix(b"data: "))
        if told["status"] != "completed":
            raise ResultError(f"a job failed over HTTP: {told['error']}")
        return told

    def close(self) -> None:
        self._connection.close()


@contextlib.contextmanager
def connected(address: str) -> Iterator[Client]:
    """A client of a server."""
    with contextlib.closing(Client(address)) as client:
        yield client


@contextlib.contextmanager
def server(model: str | Path, threads: int) -> Iterator[str]:
    """A server of its own on a folder of its own; its address. ResultError where it does not
    start."""
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "wb") as nowhere:
        command = [sys.executable, "-m", "sora_engine", "serve", str(model), "--port", "0"]
        command += ["--data-dir", f"{folder}/data", "--min-free", "0", "--device", "cpu"]
        command += ["--max-queue", "200", "--max-jobs-per-key", "200"]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=nowhere,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        try:
            yield _address(process)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    address = ""
    for line in process.stdout:
        if line.startswith("listening on "):
            address = line.removeprefix("listening on ").strip()
        if line.startswith("ready"):
            return address
    raise ResultError(
        f"sora serve ended with {process.wait()} before it was ready; "
        'pip install "sora_engine[serve]" brings what it needs'
    )


def over_http(
    *,
    model: str | Path = "sprites",
    small: Kind = SMALL,
    default: Kind = DEFAULT,
    large: Kind = LARGE,
    count: int = 50,
    rounds: int = 3,
    polls_s: float = 3.0,
    clients: int = 100,
) -> list[Measurement]:
    """Throughput and latency of jobs of two sizes, polling, cancelling, and a small job behind a
    large one: over HTTP, and of an engine in this process."""
    threads = torch.get_num_threads()
    with Engine.from_pretrained(model, device="cpu") as engine, server(model, threads) as address:
        # Twice two: what a batch may hold is measured when requests meet for the first time.
        with connected(address) as client:
            for kind in (small, default):
                for name in [client.create(kind, seed) for seed in (1, 2)]:
                    client.wait(name)
                engine.generate([kind.request(seed) for seed in (1, 2)])
        return [
            _throughput(engine, address, default, count, rounds),
            _throughput(engine, address, small, count, rounds),
            _latency(engine, address, default, max(2, count // 10)),
            _latency(engine, address, small, count),
            _polls(address, large, clients, polls_s),
            _poll_latency(address, large, count),
            _cancel(address, large, max(3, count // 5)),
            _behind(engine, address, small, large, max(2, count // 10)),
        ]


def _size(kind: Kind) -> str:
    return f"{kind.width}x{kind.height}, {kind.num_frames} frames, {kind.steps} steps"


def _throughput(engine: Engine, address: str, kind: Kind, count: int, rounds: int) -> Measurement:
    seeds = range(1, count + 1)
    requests = [kind.request(seed) for seed in seeds]

    def served() -> None:
        with connected(address) as client:
            for name in [client.create(kind, seed) for seed in seeds]:
                client.wait(name)

    def embedded() -> None:
        engine.generate(requests)

    def saving() -> None:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(4) as pool:
            jobs = [engine.submit(request) for request in requests]
            files = [Path(folder) / f"{i}.mp4" for i in seeds]
            list(pool.map(lambda job, file: job.result().save(file), jobs, files))

    rivals = {SUBJECT: served, EMBEDDED: embedded, SAVING: saving}
    times = interleaved(rivals, rounds, warmup=0)
    rates = {name: [count / s for s in values] for name, values in times.items()}
    told = f"http: throughput of {count} jobs of {_size(kind)}"
    found = Measurement(told, "videos/s", rates, "higher")
    own = 1 / found.spread(SUBJECT).median
    added = {
        f"ms a job beyond {name}": 1000 * (own - 1 / found.spread(name).median)
        for name in found.rivals
    }
    return replace(found, figures=added)


def _latency(engine: Engine, address: str, kind: Kind, count: int) -> Measurement:
    """The median that a job takes over HTTP beyond one of the embedded engine is a figure."""
    with connected(address) as client, tempfile.TemporaryDirectory() as folder:
        rivals = {
            SUBJECT: lambda: client.wait(client.create(kind, 1)),
            EMBEDDED: lambda: engine.generate(kind.request(1)),
            SAVING: lambda: engine.generate(kind.request(1)).save(f"{folder}/a.mp4"),
        }
        times = interleaved(rivals, count)
    told = f"http: latency of a job alone of {_size(kind)}"
    found = Measurement(told, "s", times, paired=False)
    beyond = found.spread(SUBJECT).median - found.spread(EMBEDDED).median
    return with_percentiles(replace(found, figures={"beyond the embedded engine": beyond}))


def _polls(address: str, large: Kind, clients: int, seconds: float) -> Measurement:
    with connected(address) as client:
        name = client.create(large, 1)
    done = asyncio.run(_poll_by_many(address, name, clients, seconds))
    with connected(address) as client:
        client.ask("DELETE", f"/v1/videos/{name}")
    rate = len(done) / seconds
    found = with_percentiles(
        Measurement(
            f"http: answer to a poll, {clients} clients that poll without a pause, engine busy",
            "s",
            {SUBJECT: done},
            paired=False,
            figures={"polls a second": rate},
        )
    )
    # Of thousands, as many are kept as draw the same picture; the figures are of all.
    kept = done[:: math.ceil(len(done) / KEPT_POLLS)]
    return replace(found, samples={SUBJECT: kept})


async def _poll_by_many(address: str, name: str, clients: int, seconds: float) -> list[float]:
    host, _, port = address.removeprefix("http://").rpartition(":")
    ask = f"GET /v1/videos/{name} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    until = time.monotonic() + seconds
    took: list[float] = []

    async def poll() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        while time.monotonic() < until:
            begun = time.monotonic()
            writer.write(ask)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise ResultError(f"a poll was answered {head[:40]!r}")
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]
            await reader.readexactly(int(length))
            took.append(time.monotonic() - begun)
        writer.close()

    await asyncio.gather(*(poll() for _ in range(clients)))
    return took


def _poll_latency(address: str, large: Kind, count: int) -> Measurement:
    took = []
    with connected(address) as client:
        name = client.create(large, 2)
        for _ in range(max(100, 10 * count)):
            begun = time.monotonic()
            told = client.ask("GET", f"/v1/videos/{name}")
            took.append(time.monotonic() - begun)
            if told["status"] not in ("queued", "in_progress"):
                break
            time.sleep(0.01)
        if len(took) < LEAST_POLLS:
            raise ResultError(
                f"the large job ended after {len(took)} polls; a larger one is needed"
            )
        client.ask("DELETE", f"/v1/videos/{name}")
    found = Measurement(
        "http: answer to a poll, one client, engine busy", "s", {SUBJECT: took}, paired=False
    )
    p99 = sorted(took)[max(0, round(0.99 * len(took)) - 1)]
    return with_percentiles(replace(found, figures={"p99": p99}))


def _cancel(address: str, large: Kind, count: int) -> Measurement:
    """From the request to cancel, at a random time of a step, until the job is over."""
    took = []
    with connected(address) as client:
        for seed in range(count):
            name = client.create(large, seed)
            while client.ask("GET", f"/v1/videos/{name}")["steps_done"] < 2:
                time.sleep(0.005)
            time.sleep(0.03 * (seed % 7))
            begun = time.monotonic()
            client.ask("POST", f"/v1/videos/{name}/cancel")
            while client.ask("GET", f"/v1/videos/{name}")["status"] != "failed":
                time.sleep(0.002)
            took.append(time.monotonic() - begun)
    found = Measurement("http: from cancel to the job's end", "s", {SUBJECT: took}, paired=False)
    return with_percentiles(found)


def _behind(engine: Engine, address: str, small: Kind, large: Kind, count: int) -> Measurement:
    """A small job that comes while a large one is made."""
    times: dict[str, list[float]] = {SUBJECT: [], EMBEDDED: []}
    for seed in range(count):
        with connected(address) as client:
            name = client.create(large, seed)
            while client.ask("GET", f"/v1/videos/{name}")["steps_done"] < 1:
                time.sleep(0.005)
            begun = time.monotonic()
            client.wait(client.create(small, seed))
            times[SUBJECT].append(time.monotonic() - begun)
            client.ask("DELETE", f"/v1/videos/{name}")
        job = engine.submit(large.request(seed))
        while job.progress.steps_done < 1:
            time.sleep(0.005)
        begun = time.monotonic()
        engine.generate(small.request(seed))
        times[EMBEDDED].append(time.monotonic() - begun)
        job.cancel()
        while not job.done():
            time.sleep(0.005)
    return Measurement("http: a small job behind a large one", "s", times)
