"""Two results side by side: what became slower by more than the noise.

Where both results hold a measurement beside a rival, taken in turns, the ratios to that rival are
compared: a slow hour of the machine is in both and drops out. Absolute values are compared where
there is no rival, and on one machine alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from sora_engine.bench.results import SUBJECT, Measurement, Result, ResultError

FLOOR = 0.03
"""No change below this share counts, however steady the samples are."""
SINGLE = 0.10
"""The share that stands for the noise of what was measured once."""
SIGMAS = 3.0


class Verdict(StrEnum):
    REGRESSION = "REGRESSION"
    IMPROVEMENT = "improvement"
    SAME = "same"
    SKIPPED = "not compared"


@dataclass(frozen=True, slots=True)
class Finding:
    """One comparison. change: how many times better `after` is (below 1: worse); noise: the share
    by which it may differ from 1 by chance."""

    name: str
    before: float
    after: float
    unit: str
    change: float
    noise: float
    verdict: Verdict
    why: str = ""

    def __str__(self) -> str:
        if self.verdict is Verdict.SKIPPED:
            return f"{self.verdict:<12} {self.name}: {self.why}"
        return (
            f"{self.verdict:<12} {self.name}: {self.before:.4g} -> {self.after:.4g} {self.unit}, "
            f"{self.change:.3f}x (noise {self.noise:.1%})"
        )


def compare(before: Result, after: Result) -> list[Finding]:
    """A finding or more for each measurement of either result, the regressions first.

    Raises ResultError where no measurement is in both.
    """
    found: list[Finding] = []
    matched = 0
    same_machine = _fingerprint(before) == _fingerprint(after)
    for old in before.measurements:
        new = after.find(old.name)
        if new is None:
            found.append(_skipped(old.name, "only in the first result"))
            continue
        matched += 1
        found += _compare(old, new, same_machine)
    known = {m.name for m in before.measurements}
    for new in after.measurements:
        if new.name not in known:
            found.append(_skipped(new.name, "only in the second result"))
    if not matched:
        raise ResultError(
            f"the results have no measurement in common: {before.profile!r}, {after.profile!r}"
        )
    order = list(Verdict)
    return sorted(found, key=lambda finding: order.index(finding.verdict))


def _compare(old: Measurement, new: Measurement, same_machine: bool) -> Iterator[Finding]:
    rivals = [name for name in old.rivals if name in new.samples]
    beside = old.paired and new.paired and SUBJECT in old.samples and SUBJECT in new.samples
    if beside and rivals:
        for rival in rivals:
            name = f"{old.name}, times {rival}"
            yield _judge(name, "x", old.ratios(rival), new.ratios(rival), higher_is_better=True)
    elif not same_machine:
        yield _skipped(old.name, "another machine, and no rival to pair with")
    elif SUBJECT in old.samples and SUBJECT in new.samples:
        higher = old.better == "higher"
        ours = old.samples[SUBJECT], new.samples[SUBJECT]
        yield _judge(old.name, old.unit, *ours, higher_is_better=higher)
    else:
        yield _skipped(old.name, f"{SUBJECT} itself was not measured")


def _judge(
    name: str, unit: str, old: Sequence[float], new: Sequence[float], *, higher_is_better: bool
) -> Finding:
    before, after = statistics.median(old), statistics.median(new)
    change = after / before if higher_is_better else before / after
    noise = max(FLOOR, SIGMAS * math.hypot(_error(old), _error(new)))
    verdict = Verdict.SAME
    if change < 1 - noise:
        verdict = Verdict.REGRESSION
    elif change > 1 + noise:
        verdict = Verdict.IMPROVEMENT
    return Finding(name, before, after, unit, change, noise, verdict)


def _error(samples: Sequence[float]) -> float:
    """The standard error of a median as a share of it, from the median absolute deviation."""
    if len(samples) < 3:
        return SINGLE / SIGMAS
    median = statistics.median(samples)
    deviation = 1.4826 * statistics.median(abs(x - median) for x in samples)
    return 1.2533 * deviation / math.sqrt(len(samples)) / abs(median)


def _skipped(name: str, why: str) -> Finding:
    return Finding(name, 0.0, 0.0, "", 1.0, 0.0, Verdict.SKIPPED, why)


def _fingerprint(result: Result) -> tuple[object, ...]:
    return tuple(result.machine.get(key) for key in ("cpu", "cores", "threads", "gpu"))
