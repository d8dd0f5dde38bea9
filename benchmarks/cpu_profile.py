"""Where a step with guidance spends its time on a CPU, by operation.

    python benchmarks/cpu_profile.py bf16
    python benchmarks/cpu_profile.py bf16 --diffusers

The step is that of `sora bench --only cpu`, in fp32, bf16 or int8. An operation's time is its own,
without those that it calls. Cores busy are CPU time over wall time of steps that are not profiled.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile

from sora_engine.bench.models import WAN_1_3B
from sora_engine.bench.precision import StepTask
from sora_engine.io.system import keep_memory

GRID = (2, 22, 24)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dtype", choices=["fp32", "bf16", "int8"])
    parser.add_argument(
        "--diffusers", action="store_true", help="its step in place of the engine's"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_memory()
    task = StepTask(replace(WAN_1_3B, layers=args.layers), GRID)
    step = task.theirs(args.dtype) if args.diffusers else task.step_of(task.ours(args.dtype))
    step()
    walls, busy = [], []
    for _ in range(args.steps):
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        walls.append(time.perf_counter() - wall)
        busy.append((time.process_time() - cpu) / walls[-1])
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    events = sorted(seen.key_averages(), key=lambda e: -e.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in events)
    print(f"a step: {min(walls):.3f} s at best, {max(busy):.2f} cores busy")
    print("| operation | calls | ms | of the step |\n|---|---|---|---|")
    for event in events:
        if event.self_cpu_time_total > whole / 200:
            share = event.self_cpu_time_total / whole
            took = event.self_cpu_time_total / 1e3
            print(f"| {event.key} | {event.count} | {took:.1f} | {share:.1%} |")


if __name__ == "__main__":
    main()
