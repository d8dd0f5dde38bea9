"""Two homes and a proxy on a Ray of this machine, in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

from tests.serve.clusters import home_of
from tests.serve.servers import ROOT, Asked

_RUN = """
import json, sys
import ray
from ray import serve
from sora_engine.serve.ray_app import build

port, arguments = int(sys.argv[1]), json.loads(sys.argv[2])
ray.init(num_cpus=4, include_dashboard=False, log_to_driver=True)
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(build(arguments))
print("READY", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""


class RayCluster(Asked):
    """`build` with this many homes. A context manager."""

    def __init__(self, data: Path, count: int, **settings: object) -> None:
        self.data, self._log = data, data.with_suffix(".log")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = {"data_dir": str(data), "replicas": str(count), "min_free": "0"}
        arguments |= {"keep_latents": "true", **{name: str(v) for name, v in settings.items()}}
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _RUN, str(port), json.dumps(arguments)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=ROOT,
            )
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self._until(lambda: "READY\n" in self.text())
        self._until(lambda: set(self.states().values()) == {"ready"})

    def states(self) -> dict[str, str]:
        """Of each home, as the proxy sees it."""
        return self.http.get("/ready").json()["replicas"]

    def _until(self, condition, timeout_s: float = 180.0) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert self._process.poll() is None, self.text()[-3000:]
            assert time.monotonic() < end, self.text()[-3000:]
            time.sleep(0.1)

    def text(self) -> str:
        return self._log.read_text(errors="replace")

    def data_of(self, name: str) -> Path:
        return self.data / home_of(name)

    def kill(self, name: str) -> None:
        """Kill the process that has a home's folder: Ray names it by its deployment."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if re.search(rf"ServeReplica:\w+:home-{name}\b", path.read_text(errors="replace")):
                    os.kill(int(path.parent.name), signal.SIGKILL)
                    return
        raise AssertionError(f"no process of home {name}")

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
