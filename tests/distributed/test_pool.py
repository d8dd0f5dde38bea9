"""Which rank an engine takes to be at fault, whatever order the news of a failure comes in.

The ranks here are sockets, and the launcher is `cat`: a line that is written to it is its news.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading

import pytest

from sora_engine.config import ParallelConfig
from sora_engine.distributed import pool as pool_module
from sora_engine.distributed.message import Connection, Message
from sora_engine.distributed.pool import RankPool
from sora_engine.errors import RankFailedError

LOST = Message("lost", {"why": "lost its exchange with rank 2 (ring): RuntimeError: by peer"})


class Ranks:
    """Four ranks without processes: what they do is said here."""

    def __init__(self, children: int) -> None:
        self.launcher = subprocess.Popen(
            ["cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        pairs = [socket.socketpair() for _ in range(4)]
        self.connections = [Connection(theirs) for _, theirs in pairs]
        connections = [Connection(ours) for ours, _ in pairs]
        config = ParallelConfig(ring=4, timeout_s=3.0)
        self.pool = RankPool(connections, config, self.launcher, children)
        for connection in self.connections:
            threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    @staticmethod
    def answer(connection: Connection) -> None:
        """Say that an abort was heard, as a rank's second thread does."""
        with contextlib.suppress(OSError, EOFError):
            while connection.receive().kind != "abort":
                pass
            connection.send(Message("aborted", {"why": "heard"}))

    def lose(self, *ranks: int) -> None:
        for rank in ranks:
            self.connections[rank].send(LOST)

    def go(self, rank: int) -> None:
        self.connections[rank].socket.shutdown(socket.SHUT_RDWR)

    def tell(self, rank: int, code: int) -> None:
        line = json.dumps({"rank": rank, "code": code}) + "\n"
        self.launcher.stdin.write(line.encode())

    def failure(self) -> RankFailedError:
        with pytest.raises(RankFailedError) as caught:
            self.pool.call(Message("step"))
        return caught.value


@pytest.fixture
def ranks(monkeypatch):
    monkeypatch.setattr(pool_module, "CAUSE_S", 30.0)  # a loaded machine may take its time
    monkeypatch.setattr(pool_module, "ABORT_S", 30.0)
    monkeypatch.setattr(pool_module, "SILENCE_S", 60.0)
    made = []

    def make(children=4):
        made.append(Ranks(children))
        return made[-1]

    yield make
    for each in made:
        each.pool.close()
        for connection in each.connections:
            connection.close()


def later(delay_s, act, *arguments):
    threading.Timer(delay_s, act, arguments).start()


def test_a_neighbours_exchange_is_not_the_cause_of_a_death(ranks):
    """The launcher's word of a death comes well after the exchanges that it broke."""
    four = ranks()
    four.lose(0, 1, 3)
    later(1.5, four.tell, 2, -9)
    assert str(four.failure()) == "rank 2 was killed by SIGKILL"
    assert set(four.pool.acknowledged) == {0, 1, 3}


def test_a_link_that_closes_waits_for_how_its_rank_ended(ranks):
    four = ranks()
    four.go(2)
    four.lose(0)
    later(1.5, four.tell, 2, 3)
    assert str(four.failure()) == "rank 2 ended with exit code 3"


def test_a_death_that_is_never_told_is_still_the_cause(ranks, monkeypatch):
    four = ranks()
    monkeypatch.setattr(pool_module, "CAUSE_S", 0.5)
    four.lose(0, 1)
    four.go(2)
    assert str(four.failure()) == "rank 2 is gone: its connection closed"


def test_a_rank_elsewhere_is_gone_when_its_connection_closes(ranks):
    four = ranks(children=1)
    four.lose(0, 1)
    later(0.5, four.go, 3)
    assert str(four.failure()) == "rank 3 is gone: its connection closed"


def test_what_a_rank_raised_is_the_cause_though_others_say_first_what_they_lost(ranks):
    four = ranks()
    four.lose(0, 2, 3)
    later(0.5, four.connections[1].send, Message("failed", {"why": "raised OSError: on fire"}))
    assert str(four.failure()) == "rank 1 raised OSError: on fire"


def test_the_first_of_two_causes_is_named(ranks):
    """A rank that goes because another went (NCCL's watchdog does) is not what went wrong."""
    four = ranks()
    four.go(2)
    four.pool._listen(30.0)
    four.tell(0, -6)
    four.pool._listen(30.0)
    four.tell(2, -9)
    assert str(four.failure()) == "rank 2 was killed by SIGKILL"


def test_a_rank_at_work_that_others_wait_for_is_the_cause(ranks):
    four = ranks()
    for rank, waiting_s in ((1, 9.0), (2, None), (3, 9.0)):
        beat = {"exchanges": 5, "waiting_s": waiting_s}
        four.connections[rank].send(Message("beat", beat))
    four.lose(0)
    assert str(four.failure()) == "rank 2 hangs: the others have waited for it for 9 s"


def test_an_exchange_that_fails_for_no_other_reason_names_both_ends(ranks, monkeypatch):
    four = ranks()
    monkeypatch.setattr(pool_module, "CAUSE_S", 0.5)
    four.lose(1)
    assert str(four.failure()) == "rank 1 " + LOST.fields["why"]
