"""Which tokens of a batch have which adapters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


class Adapters(Protocol):
    """What a request's adapters change of one transformer.

    Denoising knows that two are the same, or not: `models.lora.AdapterSet` is what there is.
    """

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class AdapterRun:
    """Consecutive tokens, from `start` to below `stop`, with the same adapters.

    stop: None stands for all there are.
    """

    adapters: Adapters
    start: int = 0
    stop: int | None = None


def adapter_runs(segments: Iterable[tuple[Adapters | None, int]]) -> tuple[AdapterRun, ...]:
    """The runs of tokens that have adapters, of segments of so many tokens each."""
    runs: list[AdapterRun] = []
    start = 0
    for adapters, length in segments:
        stop = start + length
        if adapters is not None:
            if runs and runs[-1].adapters is adapters and runs[-1].stop == start:
                start = runs.pop().start
            runs.append(AdapterRun(adapters, start, stop))
        start = stop
    return tuple(runs)
