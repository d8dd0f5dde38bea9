"""Starts the ranks of one machine, and is their parent: where it goes, they go.

`python -m sora_engine.distributed.launch` reads one line of JSON, imports what ranks need, once,
and forks them. It tells each rank's end as a line of JSON, and kills all that are left as soon as
the engine that started it closes its end or dies. Ranks have PR_SET_PDEATHSIG: they do not outlive
this process either, however it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
import traceback
from typing import Any

_PR_SET_PDEATHSIG = 1


def main() -> None:
    engine = os.getppid()
    settings: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    from sora_engine.distributed.rank import run_rank

    connections: list[int] = settings["connections"]
    ranks: dict[int, int] = {}
    launcher = os.getpid()
    for rank, connection in enumerate(connections):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _die_with(launcher)
                for later in connections[rank + 1 :]:  # those before are closed already
                    os.close(later)
                if rank > 0 and settings.get("store_fd") is not None:
                    os.close(settings["store_fd"])
                sys.stdin.close()
                if sys.stderr is None:  # the engine's process has it closed
                    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
                os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # which tells of ranks' ends
                sock = socket.socket(fileno=connection)
                code = run_rank(rank, settings.get("world", len(connections)), sock, settings)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        ranks[child] = rank
        os.close(connection)
    if settings.get("store_fd") is not None:
        os.close(settings["store_fd"])
    try:
        _watch(ranks, engine)
    finally:
        for child in ranks:  # all of them, before any is waited for
            _kill(child)
        for child in ranks:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)


def _watch(ranks: dict[int, int], engine: int) -> None:
    """Report ends until all ranks have ended or the engine is gone."""
    while ranks:
        readable, _, _ = select.select([sys.stdin], [], [], 0.05)
        if (readable and not os.read(sys.stdin.fileno(), 1)) or os.getppid() != engine:
            return
        for child in list(ranks):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                rank = ranks.pop(child)
                code = os.waitstatus_to_exitcode(status)
                print(json.dumps({"rank": rank, "code": code}), flush=True)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends (Linux; elsewhere the connection's end
    of file does)."""
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


def _kill(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
