"""Part 3: a step with guidance beside diffusers, one published size a stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shapes import DEVICE, DTYPE

from gpu.timing import DRY, figure
from sora_engine.bench.h200 import CASES, gemm_flops, measure, tiny
from sora_engine.bench.results import SUBJECT, Spread

Figures = Iterator[dict[str, Any]]


def wan_1_3b() -> Figures:
    """Wan 1.3B at 480p, all blocks."""
    yield from _case(0)


def wan_14b_480p() -> Figures:
    """Wan 14B at 480p, two depths."""
    yield from _case(1)


def wan_14b_720p() -> Figures:
    """Wan 14B at 720p, two depths."""
    yield from _case(2)


def wan_5b() -> Figures:
    """Wan 2.2 5B at 704p, two depths."""
    yield from _case(3)


def _case(index: int) -> Figures:
    published = CASES[index]
    case = tiny(published) if DRY else published
    gemm = gemm_flops(DEVICE, DTYPE, 128 if DRY else 8192)
    limit_s = published.share_s
    said: list[str] = []
    for found in measure(case, DEVICE, DTYPE, gemm, limit_s, dry_run=DRY, say=said.append):
        for rival in found.rivals:
            ratio = Spread.of(found.ratios(rival))
            ours = sorted(found.samples[SUBJECT])[len(found.samples[SUBJECT]) // 2]
            yield figure(
                f"step beside {rival}",
                f"{ours:.4g} s, {ratio.median:.2f} times as fast "
                f"({ratio.low:.2f} to {ratio.high:.2f})",
            )
        share = float(found.figures["share of the GEMM rate"])
        yield figure("share of the GEMM rate", f"{share:.1%}")
    for line in said:
        yield figure("left out", line)
