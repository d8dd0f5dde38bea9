"""What passes between a host and its device, counted by phase and by the line that asks for it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import sora_engine
import sora_kernels

WAIT, TO_DEVICE, TO_HOST = "wait", "to device", "to host"
KINDS = (WAIT, TO_DEVICE, TO_HOST)
_HERE = Path(__file__).parent
_CARRIERS = {"sora_kernels/transfer.py"}
"""What carries something for whoever asks: the place is theirs."""
_ROOTS = tuple(Path(str(module.__file__)).parent for module in (sora_engine, sora_kernels))


class Site(NamedTuple):
    """A place in the engine or its kernels; `function` stays where lines move."""

    file: str
    function: str
    line: int

    @property
    def name(self) -> str:
        return f"{self.file}:{self.function}"


class Crossing(NamedTuple):
    """kind: of KINDS; waits: whether the host stands still for it; what: the operation."""

    kind: str
    waits: bool
    what: str
    site: Site


@dataclass(slots=True)
class Tally:
    """One phase's waits for the device, copies to it and copies to the host.

    launches: how often each operation was queued on the device.
    """

    crossings: Counter[Crossing] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)

    @property
    def waits(self) -> int:
        """How often the host stands still: for a value, a copy, or all that was launched."""
        return sum(n for crossing, n in self.crossings.items() if crossing.waits)

    def copies(self, kind: str) -> int:
        """Copies of one kind, awaited or not."""
        return sum(n for crossing, n in self.crossings.items() if crossing.kind == kind)

    def figures(self) -> dict[str, int]:
        """Waits, copies to the device, and copies to the host."""
        return {WAIT: self.waits, **{kind: self.copies(kind) for kind in (TO_DEVICE, TO_HOST)}}

    def sites(self) -> dict[str, int]:
        """How often each function crosses or waits."""
        found: Counter[str] = Counter()
        for crossing, n in self.crossings.items():
            found[crossing.site.name] += n
        return dict(sorted(found.items()))


class Trace:
    """All that crossed so far, by phase."""

    def __init__(self) -> None:
        self.phases: dict[str, Tally] = {}
        self.dtypes: Counter[tuple[str, str]] = Counter()
        """How often each op of `sora_kernels` ran: by op and the dtype of its first tensor."""
        self._phase = "-"

    @contextmanager
    def phase(self, name: str) -> Iterator[Tally]:
        """Count what happens inside under this name."""
        before, self._phase = self._phase, name
        try:
            yield self.tally
        finally:
            self._phase = before

    @property
    def tally(self) -> Tally:
        """That of the phase that is going on."""
        return self.phases.setdefault(self._phase, Tally())

    def cross(self, kind: str, what: str, *, waits: bool = True) -> None:
        self.tally.crossings[Crossing(kind, waits, what, site())] += 1

    def launch(self, name: str) -> None:
        self.tally.launches[name] += 1


def site() -> Site:
    """The innermost line of the engine or its kernels that is being carried out."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if _HERE not in path.parents:
            for root in _ROOTS:
                if root in path.parents:
                    name = path.relative_to(root.parent).as_posix()
                    if name in _CARRIERS:
                        break
                    return Site(name, frame.f_code.co_qualname, frame.f_lineno)
        back = frame.f_back
        if back is None:
            break
        frame = back
    return Site("elsewhere", "-", 0)


def table(phases: Mapping[str, Tally]) -> Iterator[str]:
    """Lines of text: each phase's figures, and below them its crossings by line."""
    for name, tally in phases.items():
        figures = ", ".join(f"{kind} {n}" for kind, n in tally.figures().items())
        yield f"{name}: {figures}; {tally.launches.total()} launches"
        for crossing, n in sorted(tally.crossings.items(), key=lambda item: (-item[1], item[0])):
            at = f"{crossing.site.file}:{crossing.site.line} {crossing.site.function}"
            mark = "waits" if crossing.waits else ""
            yield f"  {n:4d} x {crossing.kind:9s} {mark:5s} {crossing.what:28s} {at}"
