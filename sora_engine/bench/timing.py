"""Timing of rivals side by side.

A machine that is shared or that heats up slows everything down for a while, so that two runs one
after the other say as much about the hour as about the code. Here rivals take turns, each round in
another order, and what is compared is the ratio within a round.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

import torch


def synchronise() -> None:
    """Wait for the device's work, where there is a device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call, the device's work included."""
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - start


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU time that this process spends on one call, in all its threads: it hardly notices who else
    is at work on the machine."""
    start = time.process_time()
    call()
    return time.process_time() - start


def interleaved(
    rivals: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 1,
    clock: Callable[[Callable[[], object]], float] = seconds,
) -> dict[str, list[float]]:
    """Seconds of every rival in each of `rounds`; entry i of all lists is one round.

    The order of a round is the last one's, reversed. clock: measures one call.
    """
    order = list(rivals)
    for name in order * warmup:
        rivals[name]()
    times: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(rounds):
        for name in order:
            times[name].append(clock(rivals[name]))
        order.reverse()
    return times


class Turns:
    """Two long runs in two threads that alternate stretch by stretch, so that they can be paired.

    Each run calls `start` once, `boundary` between its stretches, and `end` once. Only one of them
    is ever at work: A's first stretch, B's first and second, A's second and third, and so on.
    """

    def __init__(self, first: str, second: str) -> None:
        self.stretches: dict[str, list[float]] = {first: [], second: []}
        self.cpu: dict[str, list[float]] = {first: [], second: []}
        """CPU time of each stretch, all threads: it hardly notices who else is at work."""
        self._names = (first, second)
        self._ended: set[str] = set()
        self._turn = threading.Condition()
        self._started = 0.0
        self._cpu_started = 0.0

    def start(self, name: str) -> None:
        """Wait for the first turn of the run `name`."""
        self._await(name)

    def boundary(self, name: str) -> None:
        """One stretch of the run is over; wait until the next may begin."""
        self._book(name)
        self._await(name)

    def end(self, name: str) -> None:
        """The run is over, or has failed: it is not waited for any more."""
        with self._turn:
            mine = self._whose() == name
        if mine:
            self._book(name)
        with self._turn:
            self._ended.add(name)
            self._turn.notify_all()

    def _book(self, name: str) -> None:
        synchronise()
        with self._turn:
            self.stretches[name].append(time.perf_counter() - self._started)
            self.cpu[name].append(time.process_time() - self._cpu_started)
            self._turn.notify_all()

    def _await(self, name: str) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self._whose() == name)
            self._started, self._cpu_started = time.perf_counter(), time.process_time()

    def _whose(self) -> str | None:
        """Whose turn it is: that of the one behind; in a tie they begin by turns."""
        running = [name for name in self._names if name not in self._ended]
        if len(running) < 2:
            return running[0] if running else None
        a, b = self._names
        done_a, done_b = len(self.stretches[a]), len(self.stretches[b])
        if done_a != done_b:
            return a if done_a < done_b else b
        return self._names[done_a % 2]
