"""Ranks as their engine sees them: started, told what to do, watched, and ended together.

The engine's process is no rank. So it never waits in an exchange, can end all ranks whatever they
are doing, and goes on with fresh ones.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sora_engine.config import ParallelConfig
from sora_engine.distributed.message import Connection, Message, MessageError
from sora_engine.errors import RankFailedError, error_from_fields
from sora_engine.io.system import usable_cores

CAUSE_S = 8.0
"""After the first sign of a failure, how long to listen for its cause. A loaded machine tells of a
death late: its neighbours' exchanges fail first."""
ABORT_S = 5.0
"""How long ranks have to answer that they heard of another's failure, before they are killed."""
SILENCE_S = 15.0
"""A rank at work tells of itself every second; after this long without a word it is stopped."""


@dataclass(slots=True)
class _State:
    """One rank, as far as the engine has heard."""

    connection: Connection
    reply: Message | None = None
    replied_at: float = 0.0
    heard_at: float = math.inf  # importing everything takes long, and is silent
    exchanges: int = 0
    waiting_s: float | None = None
    lost: str | None = None
    """An exchange of its failed: another rank's fault, unless none is found."""
    raised: str | None = None
    ended: str | None = None
    """How its process ended."""
    faulty_since: float | None = None
    """When it was first heard to have raised or to be gone; how it went may be told later."""
    aborted: str | None = None
    """What it answered when it was told of another's failure."""

    @property
    def fault(self) -> str | None:
        return self.raised or self.ended


class RankPool:
    """The ranks of one replica. For one thread, except `close`."""

    def __init__(
        self,
        connections: list[Connection],
        config: ParallelConfig,
        launcher: subprocess.Popen[bytes],
        num_children: int,
    ) -> None:
        self.config = config
        self.failure: RankFailedError | None = None
        self.description: dict[str, Any] = {}
        self.acknowledged: dict[int, str] = {}
        """What each of the other ranks answered when it was told of a failure."""
        self._launcher = launcher
        self._num_children = num_children  # the first ranks; others come from elsewhere
        self._ranks = [_State(connection) for connection in connections]
        for connection in connections:
            connection.socket.settimeout(
                config.timeout_s
            )  # a rank that reads nothing is no reason to hang
        self._closed = False

    @classmethod
    def start(
        cls,
        config: ParallelConfig,
        *,
        device: str,
        model: Mapping[str, Any],
        first_device: int = 0,
        threads: int | None = None,
    ) -> RankPool:
        """Start the ranks of one replica on this machine, and wait until they have the model.

        model: arguments of `load_video_model`, as JSON has them. threads: of each rank, on a CPU.

        Raises RankFailedError where a rank does not get there, and what loading the model raises.
        """
        listener = socket.create_server(("127.0.0.1", 0))
        settings = {
            "parallel": asdict(config),
            "device": device,
            "first_device": first_device,
            "threads": threads or max(1, usable_cores() // config.num_ranks),
            "model": dict(model),
            "store_fd": listener.fileno(),
            "store_port": listener.getsockname()[1],
        }
        connections, launcher = launch(config.num_ranks, settings, [listener.fileno()])
        listener.close()
        pool = cls(connections, config, launcher, config.num_ranks)
        try:
            pool.wait_ready()
        except BaseException:
            pool.close()
            raise
        return pool

    def wait_ready(self) -> None:
        """Wait until every rank has the model. `description` is what rank 0 says of it."""
        self.description = self._replies(loading=True)[0].fields

    def call(self, message: Message) -> list[Message]:
        """Have all ranks do something; their answers, in order.

        Raises the error of a request that the ranks refuse, and RankFailedError once a rank has
        failed: all are ended then, and every later call raises the same.
        """
        if self.failure is not None:
            raise self.failure
        for i, rank in enumerate(self._ranks):
            rank.reply, rank.waiting_s = None, None
            rank.heard_at = time.monotonic()
            try:
                rank.connection.send(message)
            except TimeoutError:
                self._fail(i, f"has read nothing for {self.config.timeout_s:g} s")
            except OSError:
                _gone(rank, time.monotonic(), None if i < self._num_children else _CLOSED)
                self._fail(*self._trace())
        return self._replies()

    def _replies(self, *, loading: bool = False) -> list[Message]:
        """Every rank's answer. Loading takes as long as it takes, and at each its own time."""
        while any(rank.reply is None for rank in self._ranks):
            self._listen(0.2)
            if self._closed and self.failure is not None:
                raise self.failure
            culprit = self._culprit(patient=loading)
            if culprit is not None:
                self._fail(*culprit)
        replies = [rank.reply for rank in self._ranks if rank.reply is not None]
        refused = [reply for reply in replies if reply.kind == "refused"]
        if refused and len(refused) < len(replies):
            odd = next(i for i, r in enumerate(replies) if r.kind == "refused")
            self._fail(odd, f"alone refused: {replies[odd].fields['why']}")
        if refused:
            raise error_from_fields(refused[0].fields)
        return replies

    def _listen(self, timeout_s: float) -> None:
        """Take in what ranks and launcher say, for as long at most."""
        open_ranks = [rank for rank in self._ranks if not rank.connection.closed]
        sources: list[Any] = [rank.connection for rank in open_ranks]
        launcher = self._launcher
        assert launcher.stdout is not None
        if not launcher.stdout.closed:
            sources.append(launcher.stdout)
        try:
            readable = select.select(sources, [], [], timeout_s)[0]
        except (OSError, ValueError):
            if self._closed:  # meanwhile, by another thread
                return
            raise
        now = time.monotonic()
        for rank in open_ranks:
            if rank.connection in readable:
                self._hear(rank, now)
        if launcher.stdout in readable:
            line = launcher.stdout.readline()
            if line:
                end = json.loads(line)
                _gone(self._ranks[end["rank"]], now, _how(end["code"]))
            else:
                launcher.stdout.close()
                for rank in self._ranks[: self._num_children]:
                    _gone(rank, now, _how(-signal.SIGKILL))

    def _hear(self, rank: _State, now: float) -> None:
        rank.heard_at = now
        try:
            message = rank.connection.receive()
        except (MessageError, TimeoutError) as error:
            _raised(rank, now, f"sent no whole message: {error}")
            rank.connection.close()
            return
        except (EOFError, OSError):
            rank.connection.close()
            # Of its own children the launcher tells how they ended.
            child = rank in self._ranks[: self._num_children]
            _gone(rank, now, None if child else _CLOSED)
            return
        if message.kind == "beat":
            rank.exchanges, rank.waiting_s = (
                message.fields["exchanges"],
                message.fields["waiting_s"],
            )
        elif message.kind == "failed":
            _raised(rank, now, message.fields["why"])
        elif message.kind == "lost":
            rank.lost = message.fields["why"]
        elif message.kind == "aborted":
            rank.aborted = message.fields["why"]
        else:
            rank.reply, rank.replied_at = message, now

    def _culprit(self, *, patient: bool) -> tuple[int, str] | None:
        """The rank that is at fault, and how, once one is."""
        if any(rank.faulty_since is not None or rank.lost for rank in self._ranks):
            return self._trace()
        if patient:
            return None
        now = time.monotonic()
        return self._silent(now) or self._hung(now)

    def _trace(self) -> tuple[int, str]:
        """The rank at fault, from the first sign of a failure on.

        Where a rank goes, its neighbours' exchanges fail, and word of that may come first: so
        there is some time for the cause to be heard of. Where none is, the exchange is named.
        """
        until = time.monotonic() + CAUSE_S
        while True:
            cause = self._cause()
            if cause is not None:
                return cause
            now = time.monotonic()
            stuck = self._silent(now) or self._hung(now)
            if stuck is not None and self._first_faulty() is None:
                return stuck
            if now > until:
                break
            self._listen(0.05)
        first = self._first_faulty()
        if first is not None:
            return first, _CLOSED
        lost = next(i for i, rank in enumerate(self._ranks) if rank.lost)
        return lost, str(self._ranks[lost].lost)

    def _cause(self) -> tuple[int, str] | None:
        """The rank that was the first to raise or to go by itself, once it is known how."""
        first = self._first_faulty()
        if first is None:
            return None
        fault = self._ranks[first].fault
        return None if fault is None else (first, fault)

    def _first_faulty(self) -> int | None:
        since = {i: rank.faulty_since for i, rank in enumerate(self._ranks)}
        known = {i: at for i, at in since.items() if at is not None}
        return min(known, key=known.__getitem__) if known else None

    def _silent(self, now: float) -> tuple[int, str] | None:
        """A rank at work that tells nothing of itself."""
        for i, rank in enumerate(self._ranks):
            if rank.reply is None and now - rank.heard_at > SILENCE_S:
                return i, f"has not been heard of for {SILENCE_S:g} s"
        return None

    def _hung(self, now: float) -> tuple[int, str] | None:
        """A rank for which others have waited too long: in an exchange, or with their answers."""
        waits = [
            now - rank.replied_at if rank.reply is not None else (rank.waiting_s or 0.0)
            for rank in self._ranks
        ]
        if max(waits) < self.config.timeout_s:
            return None
        # Not the one that waits, and of the others the one that has come least far.
        working = [i for i, rank in enumerate(self._ranks) if rank.reply is None]
        if any(rank.lost for rank in self._ranks):
            # Those that wait now may do so for the one whose exchange failed.
            ranks = self._ranks
            working = [i for i in working if not ranks[i].lost and ranks[i].waiting_s is None]
        if not working:
            return None
        late = min(working, key=lambda i: (self._ranks[i].exchanges, waits[i]))
        return late, f"hangs: the others have waited for it for {max(waits):.0f} s"

    def _fail(self, culprit: int, reason: str) -> None:
        """Tell the others, end all, and raise."""
        self.failure = RankFailedError(culprit, reason)
        notice = Message("abort", {"rank": culprit, "reason": reason})
        for i, rank in enumerate(self._ranks):
            if i != culprit and not rank.connection.closed:
                rank.connection.socket.settimeout(1.0)  # of many that are stopped, each costs this
                with contextlib.suppress(OSError):
                    rank.connection.send(notice)
        until = time.monotonic() + ABORT_S
        while time.monotonic() < until and any(
            rank.aborted is None and not rank.connection.closed and rank.ended is None
            for i, rank in enumerate(self._ranks)
            if i != culprit
        ):
            self._listen(0.05)
        self.acknowledged = {
            i: r.aborted for i, r in enumerate(self._ranks) if r.aborted is not None
        }
        self.close()
        raise self.failure

    def close(self) -> None:
        """End all ranks, at once and without asking. May be called again."""
        if self._closed:
            return
        self._closed = True
        if self.failure is None:
            self.failure = RankFailedError(0, "was ended with its engine")
        launcher = self._launcher
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
        for pipe in (launcher.stdin, launcher.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        for rank in self._ranks:
            rank.connection.close()


def launch(
    num_ranks: int, settings: Mapping[str, Any], pass_fds: list[int]
) -> tuple[list[Connection], subprocess.Popen[bytes]]:
    """Start a launcher with that many ranks as its children, and a connection to each of them."""
    pairs = [socket.socketpair() for _ in range(num_ranks)]
    theirs = [pair[1].fileno() for pair in pairs]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)}
    launcher = subprocess.Popen(
        [sys.executable, "-m", "sora_engine.distributed.launch"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        pass_fds=[*theirs, *pass_fds],
        env=environment,
        start_new_session=True,  # Ctrl-C is the engine's, not the ranks'
    )
    for pair in pairs:
        pair[1].close()
    assert launcher.stdin is not None
    launcher.stdin.write(json.dumps({**settings, "connections": theirs}).encode() + b"\n")
    return [Connection(pair[0]) for pair in pairs], launcher


_CLOSED = "is gone: its connection closed"


def _raised(rank: _State, now: float, why: str) -> None:
    rank.raised = rank.raised or why
    rank.faulty_since = rank.faulty_since or now


def _gone(rank: _State, now: float, how: str | None) -> None:
    """A rank's process has ended; `how`, where that is known."""
    rank.ended = rank.ended or how
    rank.faulty_since = rank.faulty_since or now


def _how(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
