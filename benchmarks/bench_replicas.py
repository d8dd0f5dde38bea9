"""Jobs a minute of one server of one thread, and of several behind their proxy.

    python benchmarks/bench_replicas.py -o benchmarks/results/replicas.json

Each side is a `sora serve` of its own, on an empty folder, and each of its servers has one thread.
A client sends all jobs at once and polls a few times a second; the time runs from the first create
to the last `completed`. Sides take turns, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from sora_engine.bench.results import Measurement, Result
from sora_engine.bench.tables import table

JOB = {"prompt": "a red circle moves right", "size": "96x64", "num_frames": 33}
"""What each job asks for; its steps and seed beside that."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    sides: dict[str, list[float]] = {"sora": [], "one server": []}
    for _ in range(given.rounds):
        for side, count in (("one server", 1), ("sora", given.replicas)):
            sides[side].append(measured(count, given.jobs, given.steps))
            print(f"{count} of one thread: {sides[side][-1]:.1f} jobs a minute", flush=True)
    figures = {
        "replicas": float(given.replicas),
        "jobs": float(given.jobs),
        "job": f"{JOB['size']}, {JOB['num_frames']} frames, {given.steps} steps",
    }
    name = f"replicas/{given.replicas} servers of one thread"
    found = Measurement(name, "jobs a minute", sides, better="higher", figures=figures)
    result = Result.here("replicas", [found])
    print(table(result))
    if given.output is not None:
        result.write(given.output)


def measured(count: int, jobs: int, steps: int) -> float:
    """Jobs a minute of this many servers."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sora_engine", "serve", "--port", "0"]
        command += ["--data-dir", f"{folder}/data", "--replicas", str(count), "--min-free", "0"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as server:
            try:
                return 60 * jobs / _seconds(_address(server), jobs, steps)
            finally:
                server.send_signal(signal.SIGTERM)
                server.wait(60)


def _address(server: subprocess.Popen[str]) -> str:
    """Where it listens, once its models are loaded."""
    assert server.stdout is not None
    address = ""
    for line in server.stdout:
        if line.startswith("listening on "):
            address = line.split()[-1]
        if line.startswith("ready"):
            return address
    raise SystemExit("sora serve ended before it was ready")


def _seconds(address: str, jobs: int, steps: int) -> float:
    with httpx.Client(base_url=address, timeout=60) as http:

        def create(seed: int) -> str:
            body: dict[str, Any] = {**JOB, "num_inference_steps": steps, "seed": seed}
            answer = http.post("/v1/videos", json=body)
            answer.raise_for_status()
            return str(answer.json()["id"])

        for name in [create(seed) for seed in range(4)]:  # caches and kernels
            _wait(http, name)
        begun = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            names = list(pool.map(create, range(jobs)))
        for name in names:
            _wait(http, name)
        return time.perf_counter() - begun


def _wait(http: httpx.Client, name: str) -> None:
    while (status := http.get(f"/v1/videos/{name}").json()["status"]) != "completed":
        if status == "failed":
            raise SystemExit(f"{name} failed")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
