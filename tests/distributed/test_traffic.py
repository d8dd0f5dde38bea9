"""Whether a rank waits for others, on a host and on a device whose exchanges are only queued.

The device is a stand-in: it says how far it has come.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sora_engine.distributed import comm
from sora_engine.distributed.comm import Channel, Pending, Traffic, waiting
from sora_engine.distributed.message import Message
from sora_engine.distributed.rank import Control
from tests.distributed.test_pool import ranks  # noqa: F401

CUDA = torch.device("cuda", 0)


class Device:
    """A queue of work, of which `done` pieces are through. Marks are places in it."""

    def __init__(self):
        self.queued = self.done = 0

    def work(self, pieces=1):
        self.queued += pieces

    def mark(self, device):
        assert device.type == "cuda"
        place = self.queued
        return lambda: self.done >= place

    def finish(self):
        self.done = self.queued


class Work:
    """NCCL's: `wait` queues a wait on the device, and returns at once."""

    def __init__(self, device):
        self.device, self.waits = device, 0

    def wait(self):
        self.waits += 1
        self.device.work()


@pytest.fixture
def device(monkeypatch):
    made = Device()
    monkeypatch.setattr(comm, "mark", made.mark)
    return made


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(comm, "time", SimpleNamespace(monotonic=lambda: Clock.now))
    return Clock


def exchange(traffic, device):
    """A ring step's receive, as NCCL makes it."""
    channel = Channel(None, 1, 0, "ring", traffic)
    work = Work(device)
    Pending(channel, [work], [0], {}, None, CUDA).wait()
    assert work.waits == 1


def test_an_exchange_that_the_device_is_in_is_a_wait(device, clock):
    """The host is by then in a synchronize, of which `Traffic` knows nothing."""
    traffic = Traffic()
    device.work()
    device.finish()
    exchange(traffic, device)
    assert traffic.waiting_since is None  # the host went on
    assert traffic.waiting_s() == 0.0
    clock.now += 42.0
    assert traffic.waiting_s() == 42.0
    device.finish()
    assert traffic.waiting_s() is None
    assert traffic.exchanges == 1


def test_what_is_computed_before_an_exchange_is_no_wait(device, clock):
    """A long step of its own is no reason to name a neighbour."""
    traffic = Traffic()
    device.work(3)
    exchange(traffic, device)
    for _ in range(3):
        clock.now += 400.0
        assert traffic.waiting_s() is None
        device.done += 1
    assert traffic.waiting_s() == 0.0  # from here on it is


def test_each_exchange_is_waited_for_anew(device, clock):
    traffic = Traffic()
    for _ in range(5):
        exchange(traffic, device)
    for _ in range(5):
        clock.now += 10.0
        assert traffic.waiting_s() == 0.0
        clock.now += 10.0
        assert traffic.waiting_s() == 10.0
        device.done += 1
    assert traffic.waiting_s() is None
    assert not traffic._queued
    device.finish()
    for _ in range(1000):  # what is through is not kept
        exchange(traffic, device)
        device.finish()
    assert len(traffic._queued) <= 1


def test_a_host_that_waits_itself_says_so(clock):
    traffic = Traffic()
    with waiting(traffic, torch.device("cpu")):
        clock.now += 3.0
        assert traffic.waiting_s() == 3.0
    assert traffic.waiting_s() is None
    assert traffic.waited_s == 3.0
    assert not traffic._queued


def test_a_stalled_peer_on_nccl_is_named_within_the_timeout(ranks, device, clock):  # noqa: F811
    """Three ranks whose devices are in an exchange, and one whose host never came to it."""
    four = ranks()
    for rank in range(4):
        control, traffic = Control.__new__(Control), Traffic()
        control.mesh = type("Mesh", (), {"traffic": traffic})
        device.finish()
        if rank != 2:
            exchange(traffic, device)
        control._progress()
        clock.now += four.pool.config.timeout_s + 1
        four.connections[rank].send(Message("beat", control._progress()))
    assert str(four.failure()) == "rank 2 hangs: the others have waited for it for 4 s"
