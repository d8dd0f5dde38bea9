"""Which layouts there can be: how many ranks, heads and devices allow what. No torch here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from sora_engine.config import ParallelConfig
from sora_engine.errors import LayoutError


def layouts(num_ranks: int, *, num_heads: int, windows: int | None = None) -> list[ParallelConfig]:
    """Every layout of one replica over exactly `num_ranks` ranks.

    Ulysses shares out heads, so it goes up to `num_heads`; `windows` bounds the window groups.
    """
    found = []
    for guidance in (1, 2):
        for window in _divisors(num_ranks // guidance if num_ranks % guidance == 0 else 0):
            if windows is not None and window > windows:
                continue
            rest = num_ranks // guidance // window
            for ulysses in _divisors(rest):
                if ulysses <= num_heads:
                    found.append(
                        ParallelConfig(
                            ulysses=ulysses, ring=rest // ulysses, guidance=guidance, window=window
                        )
                    )
    return found


def nearest(wanted: ParallelConfig, num_ranks: int, *, num_heads: int) -> list[ParallelConfig]:
    """The three possible layouts over `num_ranks` ranks that are most like `wanted`."""
    found = sorted(
        layouts(num_ranks, num_heads=num_heads), key=lambda layout: _distance(layout, wanted)
    )[:3]
    return [replace(x, shard_weights=wanted.shard_weights and x.sequence > 1) for x in found]


def check_heads(config: ParallelConfig, num_heads: int) -> None:
    """Raises LayoutError where Ulysses has more ranks than there are heads to share out."""
    if config.ulysses > num_heads:
        raise LayoutError(
            f"ulysses={config.ulysses} shares out heads, and this model has {num_heads}; "
            f"over {config.num_ranks} ranks these would work: "
            f"{_listed(nearest(config, config.num_ranks, num_heads=num_heads))}"
        )


def check_devices(config: ParallelConfig, available: int, what: str, *, num_heads: int) -> None:
    """Raises LayoutError where `available` ranks or devices are too few for the layout."""
    needed = config.num_ranks * config.data
    if needed > available:
        raise LayoutError(
            f"{config} takes {needed} {what}, and {available} are there; these would work: "
            f"{_listed(nearest(config, available, num_heads=num_heads))}"
        )


def check_world(config: ParallelConfig, world_size: int) -> None:
    """Raises LayoutError where a launcher started another number of ranks than the layout has."""
    if config.data > 1:
        raise LayoutError(
            f"data={config.data} makes replicas for separate requests: an engine that starts its "
            "own workers has them; under torchrun data=1 would work"
        )
    if config.num_ranks != world_size:
        raise LayoutError(
            f"{config} takes {config.num_ranks} ranks, and {world_size} were started; these "
            f"would work: {_listed(nearest(config, world_size, num_heads=world_size))}"
        )


def share(count: int, parts: int) -> list[int]:
    """`count` things over `parts` places, as even as can be: the first get one more."""
    return [count // parts + (i < count % parts) for i in range(parts)]


def bounds(count: int, parts: int) -> tuple[int, ...]:
    """Offsets `[parts + 1]` of the places in `share`."""
    return tuple(itertools.accumulate(share(count, parts), initial=0))


def _listed(found: list[ParallelConfig]) -> str:
    return "; ".join(str(layout) for layout in found)


def _distance(a: ParallelConfig, b: ParallelConfig) -> float:
    pairs = ((a.ulysses, b.ulysses), (a.ring, b.ring), (a.guidance, b.guidance))
    return sum(abs(math.log(x / y)) for x, y in (*pairs, (a.window, b.window)))


def _divisors(n: int) -> Iterator[int]:
    return (d for d in range(1, n + 1) if n % d == 0)
