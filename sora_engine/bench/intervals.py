"""How sure a ratio of medians is, of figures that were taken in a few traces."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DRAWS = 1000


def ratio_interval(
    ours: Sequence[Sequence[float]],
    theirs: Sequence[Sequence[float]],
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> tuple[float, float]:
    """The 5% and 95% quantiles of median(theirs) / median(ours), by the bootstrap.

    ours, theirs: values by trace; trace i is the same one for both. Traces are drawn first, for
    both sides alike, and then values within each (a bootstrap of clusters: Davison and Hinkley,
    "Bootstrap Methods and their Application", section 3.8): what hangs on where a trace's few large
    requests fall widens the interval as it should.
    """
    if len(ours) != len(theirs) or not ours or not all(map(len, (*ours, *theirs))):
        raise ValueError(f"{len(ours)} traces beside {len(theirs)}, and each has values")
    rng = np.random.default_rng(seed)
    sides = [[np.asarray(trace) for trace in side] for side in (ours, theirs)]
    found = np.empty(draws)
    for draw in range(draws):
        traces = rng.integers(len(ours), size=len(ours))
        mine, other = (
            np.median(np.concatenate([rng.choice(side[i], len(side[i])) for i in traces]))
            for side in sides
        )
        found[draw] = other / mine
    low, high = np.quantile(found, (0.05, 0.95))
    return float(low), float(high)
