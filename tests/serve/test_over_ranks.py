"""A server whose engine runs over ranks: one of them is killed, and then the server itself."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.processes import descendants, wait_gone
from tests.serve.servers import ROOT, SMALL

pytestmark = pytest.mark.slow


class Command:
    """`sora serve` as it is typed, on two ranks."""

    def __init__(self, data: Path) -> None:
        words = ["serve", "--port", "0", "--data-dir", str(data), "--parallel", "ulysses=2"]
        words += ["--device", "cpu", "--min-free", "0", "--save-every", "0.001s"]
        paths = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
        self.log = data.with_name(f"{time.monotonic_ns()}.log")
        with self.log.open("wb") as log:  # a pipe that nobody reads would hold the server up
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sora_engine", *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            )
        self.until(lambda: self.process.poll() is not None or "ready; " in self.log.read_text())
        found = re.search(r"listening on (\S+)", self.log.read_text())
        assert found is not None, self.log.read_text()
        self.http = httpx.Client(base_url=found[1], timeout=60)

    def create(self, **fields: Any) -> str:
        answer = self.http.post("/v1/videos", json={"prompt": "a", **SMALL, **fields})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def get(self, name: str) -> dict[str, Any]:
        return self.http.get(f"/v1/videos/{name}").json()

    def until(self, condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.05)

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[[], Command]]:
    made: list[Command] = []

    def start() -> Command:
        made.append(Command(tmp_path / "data"))
        return made[-1]

    yield start
    for command in made:
        command.process.kill()
        command.process.wait()


def test_jobs_outlive_a_rank_and_the_server(started: Callable[[], Command], tmp_path: Path) -> None:
    server = started()
    names = [server.create(num_inference_steps=100, seed=seed) for seed in (1, 2)]
    server.until(lambda: all(server.get(name)["steps_done"] > 2 for name in names))
    ranks = descendants(server.process.pid)[1:]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    # Told within seconds; the jobs are made again, each alone, by fresh ranks.
    server.until(lambda: all(server.get(name)["status"] == "queued" for name in names[1:]), 40)
    assert server.http.get("/health").status_code == 200
    assert wait_gone(ranks, 20)
    server.until(lambda: server.get(names[0])["steps_done"] > 2)
    assert server.get(names[1])["status"] == "queued", "alone: it shows whose fault it is"

    ranks = descendants(server.process.pid)
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    assert wait_gone(ranks, 20), "they end with their server"
    again = started()
    for name in names:
        again.until(lambda name=name: again.get(name)["status"] not in ("queued", "in_progress"))
        video = again.get(name)
        assert video["status"] == "completed", video
        assert video["receipt"]["resumed_at"] > 2
    ranks = descendants(again.process.pid)
    assert again.end(signal.SIGTERM) == 0
    assert wait_gone(ranks, 20)
    assert list((tmp_path / "data" / "saved").iterdir()) == []


def test_a_job_under_which_ranks_die_twice_fails_alone(started: Callable[[], Command]) -> None:
    server = started()
    name = server.create(num_inference_steps=200)
    for _ in range(2):
        server.until(
            lambda: (
                server.get(name)["status"] == "in_progress"
                and len(descendants(server.process.pid)) == 3
                and server.get(name)["steps_done"] > 0
            )
        )
        ranks = descendants(server.process.pid)[1:]
        os.kill(ranks[0], signal.SIGKILL)
        assert wait_gone(ranks, 40)
    server.until(lambda: server.get(name)["status"] == "failed", 40)
    assert server.get(name)["error"]["code"] == "rank_failed"
    other = server.create()
    server.until(lambda: server.get(other)["status"] == "completed")
    assert server.http.get("/health").status_code == 200
    assert server.end(signal.SIGTERM) == 0
