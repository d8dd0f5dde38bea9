"""Ranks that exchange tensors: process groups, with what they send counted and their waits known.

Tensors cross as bytes, so that every dtype crosses on every backend, and nothing is padded.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

# Its name before PyTorch 2.13.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class ExchangeError(RuntimeError):
    """An exchange between ranks failed. As a rule the other end is gone, so that this is never
    taken for the first cause of a failure."""


@contextmanager
def exchanging(what: str) -> Iterator[None]:
    """Raise what gloo or NCCL raises inside as an ExchangeError, which `what` begins.

    Memory that ran out stays what it is: that is this rank's own.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, OSError) as error:
        raise ExchangeError(f"{what}: {type(error).__name__}: {error}") from error


def exchange_error(error: BaseException) -> ExchangeError | None:
    """The failed exchange that an error is, or came of."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, ExchangeError):
        found = found.__cause__ or found.__context__
    return found


Told = Callable[[], bool]
"""Whether something has happened on a device by now, asked without waiting for it."""


@dataclass(slots=True)
class Traffic:
    """What one rank sent to others, by purpose, and whether it waits for them now.

    exchanges: how many it has begun; waiting_since: on the monotonic clock, None while its host
    does not wait; waited_s: in all so far.
    Written by the rank's own thread, read by the one that reports to the engine.

    NCCL's exchanges wait on the device: the host goes on at once, and stands still somewhere later,
    where it needs a result. So those are kept (`queue`), and asked whether the device has come to
    them and no further. What the device computes before it comes to an exchange is no wait.
    """

    sent_bytes: Counter[str] = field(default_factory=Counter)
    exchanges: int = 0
    waiting_since: float | None = None
    waited_s: float = 0.0
    _queued: deque[tuple[Told, Told]] = field(default_factory=deque)
    _stuck: tuple[tuple[Told, Told], float] | None = None
    """The queued exchange that the device was last seen in, and since when."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> None:
        self.exchanges += 1
        self.waiting_since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        if self.waiting_since is not None:
            self.waited_s += time.monotonic() - self.waiting_since
        self.waiting_since = None

    def queue(self, reached: Told, done: Told) -> None:
        """An exchange that the device makes in its turn: has it come to it, and is it through."""
        with self._lock:
            self._drop_done()
            self._queued.append((reached, done))

    def waiting_s(self) -> float | None:
        """For how long this rank waits for others by now; None where it does not.

        On a device it is counted from when it was first asked for, so it is to be asked for often.
        """
        now, since = time.monotonic(), self.waiting_since
        if since is not None:
            return now - since
        with self._lock:
            self._drop_done()
            if not self._queued or not self._queued[0][0]():
                self._stuck = None
                return None
            if self._stuck is None or self._stuck[0] is not self._queued[0]:
                self._stuck = self._queued[0], now
            return now - self._stuck[1]

    def _drop_done(self) -> None:
        while self._queued and self._queued[0][1]():
            self._queued.popleft()


def mark(device: torch.device) -> Told | None:
    """Tells whether a GPU has come to what is queued next; None on a device without a queue."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event.query


@contextmanager
def waiting(traffic: Traffic, device: torch.device) -> Iterator[None]:
    """Count what is inside as an exchange: the host's, or one that the device makes in its turn."""
    reached = mark(device)
    with traffic:
        yield
    done = mark(device)
    if reached is not None and done is not None:
        traffic.queue(reached, done)


class Pending:
    """Transfers on their way; `wait` returns what arrives, by peer.

    peers: of each of `works`, where there is one for each transfer (NCCL joins them all into one).
    """

    def __init__(
        self,
        channel: Channel,
        works: Sequence[dist.Work],
        peers: Sequence[int],
        received: Mapping[int, Tensor],
        sent: object,
        device: torch.device,
    ) -> None:
        self._channel, self._received, self._sent = channel, received, sent
        self._device = device
        each: list[Sequence[int]] = [peers] * len(works)
        if len(peers) == len(works):
            each = [[peer] for peer in peers]
        self._works = list(zip(works, each, strict=True))

    def wait(self) -> Mapping[int, Tensor]:
        with waiting(self._channel.traffic, self._device):
            for work, peers in self._works:
                with self._channel.exchanging(peers):
                    work.wait()
        self._sent = None  # it had to live until now
        return self._received


class Channel:
    """One group of ranks, as one of them sees it.

    Args:
        group: the process group; None where this rank is alone.
        size, index: of the group, and of this rank in it.
        purpose: under which its bytes are counted.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        size: int,
        index: int,
        purpose: str,
        traffic: Traffic,
    ) -> None:
        self.group, self.size, self.index = group, size, index
        self.purpose, self.traffic = purpose, traffic
        self._ranks = [0] if group is None else dist.get_process_group_ranks(group)

    def exchanging(self, peers: Sequence[int]) -> AbstractContextManager[None]:
        """Have the errors inside name these peers (by index)."""
        names = ", ".join(str(self._ranks[peer]) for peer in sorted(set(peers)))
        ranks = f"rank{'s' if ',' in names else ''} {names}"
        return exchanging(f"lost its exchange with {ranks} ({self.purpose})")

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Send `send[i]` elements of a flat tensor to each rank i; `receive[i]` come from it.

        Returns what came, in order of ranks. What a rank sends to itself is copied, not counted.
        """
        if self.size == 1:
            return rows
        assert rows.dim() == 1
        assert sum(send) == len(rows)
        width = rows.element_size()
        out = rows.new_empty(sum(receive))
        self.traffic.sent_bytes[self.purpose] += width * (sum(send) - send[self.index])
        others = [i for i in range(self.size) if i != self.index]
        with waiting(self.traffic, rows.device), self.exchanging(others):
            dist.all_to_all_single(
                out.view(torch.uint8),
                rows.contiguous().view(torch.uint8),
                [width * n for n in receive],
                [width * n for n in send],
                group=self.group,
            )
        return out

    def start(self, send: Mapping[int, Tensor], receive: Mapping[int, Tensor]) -> Pending:
        """Begin to send contiguous tensors to peers (by index) and to fill those that come."""
        operations = []
        for peer, tensor in receive.items():
            operations.append(self._operation(dist.irecv, tensor, peer))
        for peer, tensor in send.items():
            self.traffic.sent_bytes[self.purpose] += tensor.nbytes
            operations.append(self._operation(dist.isend, tensor, peer))
        peers = [*receive, *send]
        with self.exchanging(peers):  # a connection that is lost already shows here
            works = dist.batch_isend_irecv(operations) if operations else []
        tensors = [*receive.values(), *send.values()]
        device = tensors[0].device if tensors else torch.device("cpu")
        return Pending(self, works, peers, receive, send, device)

    def _operation(self, kind: object, tensor: Tensor, peer: int) -> dist.P2POp:
        data = tensor.view(-1).view(torch.uint8)
        return dist.P2POp(kind, data, group=self.group, group_peer=peer)  # type: ignore[arg-type]

    def all_gather(self, rows: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Every rank's tensor, of any shapes (which all know), in order of ranks."""
        rows = rows.contiguous()
        assert tuple(rows.shape) == tuple(shapes[self.index])
        if self.size == 1:
            return [rows]
        parts = [rows if i == self.index else rows.new_empty(*s) for i, s in enumerate(shapes)]
        peers = [(self.index + step) % self.size for step in range(1, self.size)]
        send = {peer: rows for peer in peers if rows.numel()}
        receive = {peer: parts[peer] for peer in peers if parts[peer].numel()}
        self.start(send, receive).wait()
        return parts

    def gather_into(self, out: Tensor, own: Tensor) -> None:
        """Every rank's flat `own`, all of one length, one after the other into the flat `out`."""
        self.traffic.sent_bytes[self.purpose] += (self.size - 1) * own.nbytes
        others = [i for i in range(self.size) if i != self.index]
        with waiting(self.traffic, own.device), self.exchanging(others):
            _gather(out.view(torch.uint8), own.view(torch.uint8), group=self.group)

    def all_agree(self, flag: bool) -> bool:
        """Whether `flag` is true at every rank."""
        if self.size == 1:
            return flag
        mine = torch.tensor([int(flag)], dtype=torch.uint8)
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        parts = self.all_gather(mine.to(device), [(1,)] * self.size)
        return all(bool(part.item()) for part in parts)
