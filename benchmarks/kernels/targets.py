"""The kernels' targets on a CPU, measured: what each aims at beside what it reaches.

    python benchmarks/kernels/targets.py -o benchmarks/results/kernels.json

Rivals take turns (`sora_engine.bench.timing`), and a figure is the median of the ratios within a
round. The result is one of `sora bench`, whose figures name the target. Under 3 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from block import wan_blocks
from shapes import SHAPES, copy_rate, gemm_rate
from workloads import FUSED, packed_attention, temporal_attention

from sora_engine.bench.results import SUBJECT, Measurement, Result, Spread
from sora_engine.bench.timing import interleaved

EAGER = "eager PyTorch"
Part = Callable[[int], Measurement]


def fused(op: str, index: int) -> Part:
    shape = SHAPES[index]

    def measure(rounds: int) -> Measurement:
        work = FUSED[op](shape)
        times = interleaved({SUBJECT: work.by("auto"), EAGER: work.eager}, rounds)
        rate = work.size_bytes / Spread.of(times[SUBJECT]).median / 1e9
        return Measurement(
            f"{op}, {shape.name}, 50 MB", "s", times, figures={"target": 3.0, "GB/s": rate}
        )

    return measure


def temporal(index: int) -> Part:
    shape = SHAPES[index]

    def measure(rounds: int) -> Measurement:
        work = temporal_attention(shape)
        rivals = {SUBJECT: work.by("auto"), "SDPA": work.eager, "SDPA on views": work.by("sdpa")}
        times = interleaved(rivals, rounds)
        rate = work.flops / Spread.of(times[SUBJECT]).median / 1e9
        name = f"temporal_attention, {shape.name}, {shape.frames} frames, head_dim {shape.head_dim}"
        return Measurement(name, "s", times, figures={"target": 5.0, "GFLOP/s": rate})

    return measure


def packed(rounds: int) -> Measurement:
    """Rates of useful work: FLOPs of what is attended to."""
    work, dense_flops = packed_attention()
    dense = "SDPA on the longest segment"
    times = interleaved({SUBJECT: work.by("auto"), dense: work.eager}, rounds)
    flops = {SUBJECT: work.flops, dense: dense_flops}
    rates = {name: [flops[name] / t / 1e9 for t in times[name]] for name in times}
    name = "packed_attention, five uneven segments"
    return Measurement(name, "GFLOP/s", rates, better="higher", figures={"target": 0.9})


def block(rounds: int) -> Measurement:
    blocks = wan_blocks()
    times = interleaved({SUBJECT: blocks.ours, "diffusers": blocks.diffusers}, 2 * rounds)
    name = "a block of the Wan model, width 1536, 1280 tokens"
    return Measurement(name, "s", times, figures={"target": 1.1})


def block_with_keys(rounds: int) -> Measurement:
    blocks = wan_blocks()
    rivals = {SUBJECT: blocks.with_keys_and_values, "diffusers": blocks.diffusers}
    name = "a block of the Wan model, width 1536, 1280 tokens, text's keys and values each time"
    return Measurement(name, "s", interleaved(rivals, rounds), figures={"target": 1.1})


def parts() -> Iterator[tuple[str, Part]]:
    yield "packed", packed
    for i, shape in enumerate(SHAPES):
        yield f"temporal-{shape.name}", temporal(i)
    for op in FUSED:
        for i, shape in enumerate(SHAPES):
            yield f"{op}-{shape.name}", fused(op, i)
    yield "block", block
    yield "block-with-keys", block_with_keys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, help="where the result goes (JSON)")
    parser.add_argument("--only", default="", metavar="REGEX", help="parts to measure")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    found = []
    with torch.inference_mode():
        copy, gemm = copy_rate() / 1e9, gemm_rate() / 1e9
        print(f"copy {copy:.1f} GB/s, GEMM {gemm:.0f} GFLOP/s", flush=True)
        found.append(Measurement("copy", "GB/s", {SUBJECT: [copy]}, better="higher"))
        found.append(Measurement("GEMM", "GFLOP/s", {SUBJECT: [gemm]}, better="higher"))
        for name, part in parts():
            if not re.search(options.only, name):
                continue
            measured = part(options.rounds)
            found.append(measured)
            for rival in measured.rivals:
                ratio = Spread.of(measured.ratios(rival))
                print(
                    f"{measured.name}: {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) "
                    f"times {rival}, target {measured.figures['target']}, {measured.figures}",
                    flush=True,
                )
    if options.output:
        Result.here("kernels", found).write(options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
