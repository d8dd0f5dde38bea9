"""Ranks for tests: started once, single-threaded, and given one case after another.

The leader imports everything and forks the ranks, so that eight of them start in one import's time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Fleet:
    """`size` ranks over gloo. A case is a function of tests/distributed/cases.py."""

    def __init__(self, size: int) -> None:
        self.size = size
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.fleet", str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )

    def run(self, case: str, **arguments):
        """What each rank returns, in order. An error at any rank is raised here."""
        self._process.stdin.write(json.dumps([case, arguments]) + "\n")
        self._process.stdin.flush()
        replies = json.loads(self._process.stdout.readline())
        errors = [f"rank {i}: {r['error']}" for i, r in enumerate(replies) if "error" in r]
        assert not errors, "\n".join(errors)
        return [reply["value"] for reply in replies]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(120)


def lead(size: int) -> None:
    """Fork the ranks, pass each line on to all, and answer with all that they say."""
    import torch.distributed as dist

    from tests.distributed import cases

    folder = tempfile.TemporaryDirectory()
    connections = []
    for rank in range(size):
        to_rank, from_rank = os.pipe(), os.pipe()
        if os.fork() == 0:
            for connection in (*connections, to_rank[1:], from_rank[:1]):
                for end in connection:
                    os.close(end)
            store = dist.FileStore(f"{folder.name}/store", size)
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(minutes=5)
            )
            serve(cases, os.fdopen(to_rank[0]), os.fdopen(from_rank[1], "w"))
            os._exit(0)
        os.close(to_rank[0])
        os.close(from_rank[1])
        connections.append((to_rank[1], from_rank[0]))
    writers = [os.fdopen(write, "w") for write, _ in connections]
    readers = [os.fdopen(read) for _, read in connections]
    for line in sys.stdin:
        for writer in writers:
            writer.write(line)
            writer.flush()
        answers = [json.loads(reader.readline()) for reader in readers]
        print(json.dumps(answers), flush=True)
    for writer in writers:
        writer.close()
    for _ in connections:
        os.wait()


def serve(cases, commands, answers) -> None:
    import torch

    torch.set_num_threads(1)
    for line in commands:
        case, arguments = json.loads(line)
        try:
            answer = {"value": getattr(cases, case)(**arguments)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    lead(int(sys.argv[1]))
