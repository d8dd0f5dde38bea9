"""One request over 1, 2 and 4 single-thread CPU ranks: seconds a step, and efficiency.

    PYTHONPATH=.:kernels python benchmarks/bench_ranks.py

The ranks of a layout are on as many cores as there are; efficiency is against one thread, and
against what the cores allow. Steps are timed by the engine, medians after the first two.
"""

from __future__ import annotations

import os
import statistics
import time

os.environ["OMP_NUM_THREADS"] = "1"

import sora_engine as sora

LAYOUTS = {
    1: [sora.ParallelConfig()],
    2: [
        sora.ParallelConfig(ulysses=2),
        sora.ParallelConfig(ring=2),
        sora.ParallelConfig(guidance=2),
    ],
    4: [sora.ParallelConfig(ulysses=4), sora.ParallelConfig(ulysses=2, guidance=2)],
}
REQUEST = sora.VideoRequest(
    "a red circle moves right", height=128, width=128, num_frames=17, num_inference_steps=8, seed=1
)


def step_seconds(layout: sora.ParallelConfig) -> float:
    import torch

    torch.set_num_threads(1)
    times: list[float] = []
    last = [time.monotonic()]

    def tick(progress: sora.Progress) -> None:
        now = time.monotonic()
        if progress.state == "denoising":
            times.append(now - last[0])
        last[0] = now

    with sora.Engine.from_pretrained("sprites", device="cpu", parallel=layout) as engine:
        engine.submit(REQUEST, on_progress=tick).result()
    return statistics.median(times[2:])


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, {REQUEST.width}x{REQUEST.height}, {REQUEST.num_frames} frames")
    alone = 0.0
    for ranks, layouts in LAYOUTS.items():
        for layout in layouts:
            seconds = step_seconds(layout)
            alone = alone or seconds
            gain = alone / seconds
            print(
                f"{layout!s:<24} {seconds:7.3f} s a step, {gain:4.2f}x, {gain / ranks:4.0%} of "
                f"ranks, {gain / min(ranks, cores):4.0%} of cores",
                flush=True,
            )


if __name__ == "__main__":
    main()
