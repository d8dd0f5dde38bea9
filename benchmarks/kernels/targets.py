"""The kernels' targets on a CPU, measured: what each aims at beside what it reaches.

    python benchmarks/kernels/targets.py -o benchmarks/results/kernels.json
    python benchmarks/kernels/targets.py --keep-memory -o benchmarks/results/kernels-kept.json

Rivals take turns (`sora_engine.bench.timing`), and a figure is the median of the ratios within a
round: of wall time and of CPU time. The result is one of `sora bench`, whose figures name the
target. Under 4 minutes on 2 cores that do nothing else.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from block import wan_blocks
from shapes import SHAPES, Shape, copy_rate, gemm_rate
from workloads import FUSED, packed_attention, temporal_attention

from sora_engine.bench.results import SUBJECT, Measurement, Result, Spread
from sora_engine.bench.timing import interleaved

EAGER = "eager PyTorch"
Rivals = dict[str, Callable[[], object]]
Part = Callable[[int], list[Measurement]]


def compare(
    name: str, rivals: Rivals, rounds: int, target: float, flops: dict[str, float] | None = None
) -> list[Measurement]:
    """Wall and CPU time of rivals that take turns; with `flops`, their rates in GFLOP/s.

    CPU time counts all threads, those that wait in a parallel region as well. It hardly notices
    who else is at work on the machine, which wall time does.
    """
    cpu: dict[str, list[float]] = {rival: [] for rival in rivals}

    def counted(rival: str) -> Callable[[], None]:
        def run() -> None:
            start = time.process_time()
            rivals[rival]()
            cpu[rival].append(time.process_time() - start)

        return run

    wall = interleaved({rival: counted(rival) for rival in rivals}, rounds)
    cpu = {rival: times[-rounds:] for rival, times in cpu.items()}  # without the warm-up
    found = []
    for clock, times in (("", wall), ("CPU time: ", cpu)):
        unit, better, samples = "s", "lower", times
        if flops is not None:
            unit, better = "GFLOP/s", "higher"
            samples = {rival: [flops[rival] / t / 1e9 for t in times[rival]] for rival in times}
        found.append(
            Measurement(clock + name, unit, samples, better=better, figures={"target": target})
        )
    return found


def fused(op: str, shape: Shape) -> Part:
    def measure(rounds: int) -> list[Measurement]:
        work = FUSED[op](shape)
        rivals = {SUBJECT: work.by("auto"), EAGER: work.eager}
        return compare(f"{op}, {shape.name}, 50 MB", rivals, rounds, 3.0)

    return measure


def temporal(shape: Shape) -> Part:
    def measure(rounds: int) -> list[Measurement]:
        work = temporal_attention(shape)
        rivals = {SUBJECT: work.by("auto"), "SDPA": work.eager, "SDPA on views": work.by("sdpa")}
        name = f"temporal_attention, {shape.name}, {shape.frames} frames, head_dim {shape.head_dim}"
        return compare(name, rivals, rounds, 5.0)

    return measure


def packed(rounds: int) -> list[Measurement]:
    """Rates of useful work: FLOPs of what is attended to."""
    work, dense_flops = packed_attention()
    dense = "SDPA on the longest segment"
    rivals = {SUBJECT: work.by("auto"), dense: work.eager}
    flops = {SUBJECT: work.flops, dense: dense_flops}
    return compare("packed_attention, five uneven segments", rivals, rounds, 0.9, flops)


def block(rounds: int) -> list[Measurement]:
    """With the text's keys and values computed each time, as diffusers does, and without."""
    blocks = wan_blocks()
    rivals = {SUBJECT: blocks.with_keys_and_values, "diffusers": blocks.diffusers}
    name = "a block of the Wan model, width 1536, 1280 tokens"
    found = compare(f"{name}, with the text's keys", rivals, 2 * rounds, 1.1)
    return found + compare(name, {**rivals, SUBJECT: blocks.ours}, rounds, 1.1)


def parts() -> Iterator[tuple[str, Part]]:
    yield "packed", packed
    for shape in SHAPES:
        yield f"temporal-{shape.name}", temporal(shape)
    yield "block", block
    for op in FUSED:
        for shape in SHAPES:
            yield f"{op}-{shape.name}", fused(op, shape)


def keep_memory() -> None:
    """Have glibc keep what is freed: results of 50 MB are then not new pages each time, whose
    zeroing takes longer than the op."""
    mmap_threshold, trim_threshold = -3, -1
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(mmap_threshold, 1 << 30) and libc.mallopt(trim_threshold, 2**31 - 1)):
        raise SystemExit("--keep-memory needs glibc's mallopt")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, help="where the result goes (JSON)")
    parser.add_argument("--only", default="", metavar="REGEX", help="parts to measure")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--keep-memory", action="store_true", help="the allocator reuses what was freed"
    )
    options = parser.parse_args()
    if options.keep_memory:
        keep_memory()
    profile = "kernels-kept" if options.keep_memory else "kernels"
    found = []
    with torch.inference_mode():
        copy, gemm = copy_rate() / 1e9, gemm_rate() / 1e9
        print(f"copy {copy:.1f} GB/s, GEMM {gemm:.0f} GFLOP/s", flush=True)
        found.append(Measurement("copy", "GB/s", {SUBJECT: [copy]}, better="higher"))
        found.append(Measurement("GEMM", "GFLOP/s", {SUBJECT: [gemm]}, better="higher"))
        for name, part in parts():
            if not re.search(options.only, name):
                continue
            for measured in part(options.rounds):
                found.append(measured)
                for rival in measured.rivals:
                    ratio = Spread.of(measured.ratios(rival))
                    print(
                        f"{measured.name}: {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
                        f" times {rival}, target {measured.figures['target']}",
                        flush=True,
                    )
            if options.output:  # after every part, so that a stop loses one alone
                Result.here(profile, found).write(options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
