"""Live servers: started in a moment, killed, and started again on the same data folder."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
SMALL = {"size": "32x32", "num_frames": 5, "num_inference_steps": 2, "seed": 3}


class Nursery:
    """The process from which servers are forked."""

    def __init__(self, **environment: str) -> None:
        environment = {
            **os.environ,
            **environment,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.serve.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self._lock = threading.Lock()

    def ask(self, command: dict[str, Any]) -> Any:
        with self._lock:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.kill()  # its servers are ended by those who started them
        self._process.wait(10)
        self._process.stdin.close()


class Asked:
    """What tests ask of a service over HTTP."""

    http: httpx.Client

    def text(self) -> str:
        raise NotImplementedError

    def create(self, **fields: Any) -> dict[str, Any]:
        answer = self.http.post("/v1/videos", json={"prompt": "a red circle", **SMALL, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def get(self, name: str) -> dict[str, Any]:
        answer = self.http.get(f"/v1/videos/{name}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def done(self, name: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """The video once it is completed or failed."""
        until = time.monotonic() + timeout_s
        while (video := self.get(name))["status"] in ("queued", "in_progress"):
            assert time.monotonic() < until, f"{video}\n{self.text()[-3000:]}"
            time.sleep(0.03)
        return video

    def completed(self, name: str, timeout_s: float = 60.0) -> dict[str, Any]:
        video = self.done(name, timeout_s)
        assert video["status"] == "completed", f"{video}\n{self.text()[-3000:]}"
        return video


class Server(Asked):
    """One server. A context manager, which kills what still runs."""

    def __init__(
        self,
        nursery: Nursery,
        data: Path,
        *,
        faults: dict[str, Any] | None = None,
        ready: bool = True,
        log: Path | None = None,
        **settings: Any,
    ) -> None:
        self._nursery, self.data = nursery, data
        self.log = log or data.with_name(f"{data.name}.{time.monotonic_ns()}.log")
        defaults = {"port": 0, "data_dir": str(data), "min_free": 0, "keep_latents": True}
        self.pid = nursery.ask(
            {
                "start": {
                    "settings": {**defaults, **settings},
                    "faults": {"quick_linger": 1, **(faults or {})},
                    "log": str(self.log),
                }
            }
        )
        self._code: int | None = None
        self.url = ""
        if ready:
            self.url = self.said("LISTENING")
            self.said("READY")
            self.http = httpx.Client(base_url=self.url, timeout=60)

    def said(self, word: str, timeout_s: float = 60.0) -> str:
        """What a line of the log that begins with a word says after it."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            code = self.code()
            whole = self.text().rpartition("\n")[0]
            for line in whole.splitlines():
                if line.startswith(f"{word} ") or line == word:
                    return line[len(word) + 1 :]
            if code is not None:
                raise AssertionError(f"the server ended with {code}: {self.text()[-3000:]}")
            time.sleep(0.02)
        raise AssertionError(f"no {word} in {self.text()[-3000:]}")

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def code(self) -> int | None:
        """The exit code, once it has ended."""
        if self._code is None:
            self._code = self._nursery.ask({"wait": self.pid})
        return self._code

    def ended(self, timeout_s: float = 60.0) -> int:
        until = time.monotonic() + timeout_s
        while (code := self.code()) is None:
            assert time.monotonic() < until, f"it still runs: {self.text()[-3000:]}"
            time.sleep(0.02)
        return code

    def data_of(self, _name: str) -> Path:
        """The data folder of a job's server."""
        return self.data

    def signal(self, number: int) -> None:
        if self.code() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.ended()

    def until(self, condition: Any, timeout_s: float = 30.0) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, self.text()[-3000:]
            time.sleep(0.02)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            self.kill()
        if self.url:
            self.http.close()
