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

from sora_engine import errors
from sora_engine.config import ParallelConfig
from sora_engine.distributed.message import Link, Message, MessageError
from sora_engine.errors import RankFailedError, SoraError

GRACE_S = 1.0
"""After the first sign of a failure, how long to listen for one that says more of its cause."""
SILENCE_S = 15.0
"""A rank at work tells of itself every second; after this long without a word it is stopped."""


@dataclass(slots=True)
class _State:
    """One rank, as far as the engine has heard."""

    link: Link
    reply: Message | None = None
    replied_at: float = 0.0
    heard_at: float = math.inf  # importing everything takes long, and is silent
    exchanges: int = 0
    waiting_s: float | None = None
    failed: str | None = None
    broken: bool = False
    ended: str | None = None
    """How its process ended."""
    aborted: str | None = None
    """What it answered when it was told of another's failure."""


class RankPool:
    """The ranks of one replica. For one thread, except `close`."""

    def __init__(
        self,
        links: list[Link],
        config: ParallelConfig,
        launcher: subprocess.Popen[bytes],
        num_children: int,
    ) -> None:
        self.config = config
        self.failure: RankFailedError | None = None
        self.description: dict[str, Any] = {}
        self.told: dict[int, str] = {}
        """What each of the other ranks answered when it was told of a failure."""
        self._launcher = launcher
        self._num_children = num_children  # the first ranks; others come from elsewhere
        self._ranks = [_State(link) for link in links]
        for link in links:
            link.socket.settimeout(
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
            "threads": threads or max(1, len(os.sched_getaffinity(0)) // config.num_ranks),
            "model": dict(model),
            "store_fd": listener.fileno(),
            "store_port": listener.getsockname()[1],
        }
        links, launcher = launch(config.num_ranks, settings, [listener.fileno()])
        listener.close()
        pool = cls(links, config, launcher, config.num_ranks)
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
                rank.link.send(message)
            except TimeoutError:
                self._fail(i, f"has read nothing for {self.config.timeout_s:g} s")
            except OSError:
                self._fail_as_found(i)
        return self._replies()

    def _replies(self, *, loading: bool = False) -> list[Message]:
        """Every rank's answer. Loading takes as long as it takes, and at each its own time."""
        while any(rank.reply is None for rank in self._ranks):
            self._listen(0.2)
            culprit = self._culprit(patient=loading)
            if culprit is not None:
                self._fail(*culprit)
        replies = [rank.reply for rank in self._ranks if rank.reply is not None]
        refused = [reply for reply in replies if reply.kind == "refused"]
        if refused and len(refused) < len(replies):
            odd = next(i for i, r in enumerate(replies) if r.kind == "refused")
            self._fail(odd, f"alone refused: {replies[odd].fields['why']}")
        if refused:
            raise _as_error(refused[0])
        return replies

    def _listen(self, timeout_s: float) -> None:
        """Take in what ranks and launcher say, for as long at most."""
        open_ranks = [rank for rank in self._ranks if rank.ended is None]
        sources: list[Any] = [rank.link for rank in open_ranks]
        launcher = self._launcher
        assert launcher.stdout is not None
        if not launcher.stdout.closed:
            sources.append(launcher.stdout)
        readable = select.select(sources, [], [], timeout_s)[0]
        now = time.monotonic()
        for rank in open_ranks:
            if rank.link in readable:
                self._hear(rank, now)
        if launcher.stdout in readable:
            line = launcher.stdout.readline()
            if line:
                end = json.loads(line)
                self._ranks[end["rank"]].ended = _how(end["code"])
            else:
                launcher.stdout.close()
                for rank in self._ranks[: self._num_children]:
                    rank.ended = rank.ended or _how(-signal.SIGKILL)

    def _hear(self, rank: _State, now: float) -> None:
        rank.heard_at = now
        try:
            message = rank.link.receive()
        except (MessageError, TimeoutError) as error:
            rank.failed = f"sent no whole message: {error}"
            return
        except (EOFError, OSError):
            if rank in self._ranks[: self._num_children]:
                time.sleep(0.02)  # word of its end is on the way, and says more
            else:
                rank.ended = "is gone: its connection closed"
            return
        if message.kind == "beat":
            rank.exchanges, rank.waiting_s = (
                message.fields["exchanges"],
                message.fields["waiting_s"],
            )
        elif message.kind == "failed":
            rank.failed, rank.broken = message.fields["why"], message.fields["broken"]
        elif message.kind == "aborted":
            rank.aborted = message.fields["why"]
        else:
            rank.reply, rank.replied_at = message, now

    def _culprit(self, *, patient: bool) -> tuple[int, str] | None:
        """The rank that is at fault, and how, once one is."""
        if any(rank.ended is not None or rank.failed is not None for rank in self._ranks):
            # Where one goes, the others' exchanges break: the cause may be yet to be heard of.
            until = time.monotonic() + GRACE_S
            while time.monotonic() < until and not self._found():
                self._listen(0.05)
            found = self._found()
            if found is not None:
                return found
            broken = next(i for i, rank in enumerate(self._ranks) if rank.failed is not None)
            return broken, str(self._ranks[broken].failed)
        if patient:
            return None
        now = time.monotonic()
        for i, rank in enumerate(self._ranks):
            if rank.reply is None and now - rank.heard_at > SILENCE_S:
                return i, f"has not been heard of for {SILENCE_S:g} s"
        return self._hung(now)

    def _found(self) -> tuple[int, str] | None:
        """A rank that died or raised by itself."""
        for i, rank in enumerate(self._ranks):
            if rank.failed is not None and not rank.broken:
                return i, rank.failed
        for i, rank in enumerate(self._ranks):
            if rank.ended is not None:
                return i, rank.ended
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
        late = min(working, key=lambda i: (self._ranks[i].exchanges, waits[i]))
        return late, f"hangs: the others have waited for it for {max(waits):.0f} s"

    def _fail_as_found(self, i: int) -> None:
        """A rank that cannot be reached has ended."""
        self._listen(0.1)
        self._ranks[i].ended = self._ranks[i].ended or "is gone: its connection closed"
        found = self._found()
        assert found is not None
        self._fail(*found)

    def _fail(self, culprit: int, reason: str) -> None:
        """Tell the others, end all, and raise."""
        self.failure = RankFailedError(culprit, reason)
        told = Message("abort", {"rank": culprit, "reason": reason})
        for i, rank in enumerate(self._ranks):
            if i != culprit and rank.ended is None:
                with contextlib.suppress(OSError):
                    rank.link.send(told)
        until = time.monotonic() + GRACE_S
        while time.monotonic() < until and any(
            rank.aborted is None and rank.ended is None
            for i, rank in enumerate(self._ranks)
            if i != culprit
        ):
            self._listen(0.05)
        self.told = {i: r.aborted for i, r in enumerate(self._ranks) if r.aborted is not None}
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
            rank.link.close()


def launch(
    num_ranks: int, settings: Mapping[str, Any], pass_fds: list[int]
) -> tuple[list[Link], subprocess.Popen[bytes]]:
    """Start a launcher with that many ranks as its children, and a link to each of them."""
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
    launcher.stdin.write(json.dumps({**settings, "links": theirs}).encode() + b"\n")
    return [Link(pair[0]) for pair in pairs], launcher


def _how(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _as_error(refused: Message) -> SoraError:
    """A rank's refusal as the error that it was."""
    why = refused.fields["why"]
    kind = getattr(errors, refused.fields["error"], errors.JobFailedError)
    try:
        return kind(why)
    except TypeError:  # an error that takes more than a text
        return errors.JobFailedError(why)
