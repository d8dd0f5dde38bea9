"""One program of an emulated Gluon kernel: its partitions, what is in flight, and who goes next.

Partitions of `warp_specialize` are threads of which one runs at a time. At every operation that
others can see, a seeded scheduler decides whether somebody else goes on, and whether a copy or a
product that is in flight takes place.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sora_kernels.testing.faults import FaultError

LANDINGS = ("any", "late", "early")
"""When what is in flight takes place: at random, when nobody can go on, or at once."""


class _Stopped(BaseException):
    """Ends a partition's thread once another has failed."""


@dataclass(eq=False)
class Partition:
    """A partition of warps. `bit` stands for it in masks; `until` is what it waits for."""

    name: str
    bit: int
    body: Callable[[], object]
    until: Callable[[], bool] | None = None
    products: list[Flight] = field(default_factory=list)  # that it has not waited for, oldest first
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))


@dataclass(eq=False)
class Flight:
    """A copy or a product between its issue and its end. Those of one `queue` end in order."""

    queue: Hashable
    land: Callable[[], object]
    landed: bool = False


class Machine:
    """A program of the grid.

    seed: of the schedule; `landing`: one of LANDINGS. A schedule also has a stickiness, drawn from
    the seed: how likely the partition that runs goes on, so that one gets far ahead of the others.
    """

    def __init__(self, seed: int, program: int, programs: int, landing: str) -> None:
        if landing not in LANDINGS:
            raise ValueError(f"landing {landing!r}; one of {LANDINGS}")
        self.rng = random.Random(f"{seed}.{program}")
        self.program, self.programs, self.landing = program, programs, landing
        self.sticky = self.rng.choice((0.0, 0.5, 0.95))
        self.partitions: list[Partition] = []
        self.current: Partition | None = None
        self.flights: list[Flight] = []
        self.copies: list[tuple[str, int, int, int]] = []  # argument, row, column, bytes
        self.counts = {"copies": 0, "products": 0, "waits": 0, "most in flight": 0}
        self._failure: BaseException | None = None
        self._over = threading.Event()

    def specialize(self, bodies: Mapping[str, Callable[[], object]]) -> None:
        """Run partitions until all have ended. Raises FaultError, or what a partition raised."""
        if self.current is not None:
            raise FaultError("warp_specialize inside a partition")
        self.partitions = [
            Partition(name, 1 << i, body) for i, (name, body) in enumerate(bodies.items())
        ]
        threads = [
            threading.Thread(target=self._run, args=(partition,), daemon=True)
            for partition in self.partitions
        ]
        for thread in threads:
            thread.start()
        self._hand_on()
        self._over.wait()
        for thread in threads:
            thread.join()
        self.current = None
        if self._failure is not None:
            raise self._failure
        if self.flights:
            raise FaultError(
                f"the program ended with {len(self.flights)} copies or products in flight"
            )

    def pause(self, until: Callable[[], bool] | None = None) -> None:
        """Let others go on; come back once `until` holds. Outside partitions nothing happens."""
        me = self.current
        if me is None:
            if until is not None and not until():
                raise FaultError("deadlock: a wait outside warp_specialize")
            return
        me.until = until
        self._hand_on()
        me.go.acquire()
        if self._failure is not None:
            raise _Stopped
        me.until = None

    def launch(self, queue: Hashable, land: Callable[[], object]) -> Flight:
        """Put a copy or a product in flight."""
        flight = Flight(queue, land)
        self.flights.append(flight)
        self.counts["most in flight"] = max(self.counts["most in flight"], len(self.flights))
        return flight

    def _run(self, partition: Partition) -> None:
        partition.go.acquire()
        try:
            if self._failure is None:
                partition.body()
                if partition.products:
                    raise FaultError(f"{partition.name} ended without waiting for its products")
        except _Stopped:
            return
        except BaseException as failure:
            self._fail(failure)
            return
        self.partitions = [other for other in self.partitions if other is not partition]
        self._hand_on()

    def _fail(self, failure: BaseException) -> None:
        self._failure = self._failure or failure
        for partition in self.partitions:
            partition.go.release()
        self._over.set()

    def _hand_on(self) -> None:
        """Wake whoever goes next."""
        try:
            chosen = self._choose()
        except Exception as failure:
            self._fail(failure)
            return
        self.current = chosen
        if chosen is None:
            self._over.set()
        else:
            chosen.go.release()

    def _choose(self) -> Partition | None:
        while True:
            able = [p for p in self.partitions if p.until is None or p.until()]
            heads = list({flight.queue: flight for flight in reversed(self.flights)}.values())
            if not able and not heads:
                if self.partitions:
                    names = ", ".join(p.name for p in self.partitions)
                    raise FaultError(f"deadlock: {names} wait and nothing is in flight")
                return None
            if self.landing == "late" and able:
                heads = []
            elif self.landing == "early" and heads:
                able = []
            if self.current in able and self.rng.random() < self.sticky:
                return self.current
            choice: Any = self.rng.choice([*able, *heads])
            if isinstance(choice, Partition):
                return choice
            self.flights.remove(choice)
            choice.land()
            choice.landed = True
