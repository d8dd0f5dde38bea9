"""One request over 1, 2 and 4 single-thread CPU ranks: seconds a step, and efficiency.

    python benchmarks/bench_ranks.py [--rounds 12] [-o benchmarks/results/ranks.json]

Under three minutes on two cores that do nothing else. The layouts' engines are all there at once
and take turns, a step each in every round, so that a machine that is slow for a while slows them
all; ratios are taken within a round. Efficiency is how many times faster than one rank a layout is,
over its number of ranks; ranks that share cores cannot have more than their share of them. `CPU` is
the processor time of all ranks together over one rank's: what sharing out adds to the work. `waits`
is how long the rank that waits most is held up by others in a step: for bytes, for a rank that is
later, or for one that has the core that it needs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from contextlib import ExitStack
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch

import sora_engine as sora
from sora_engine.bench.results import SUBJECT, Measurement, Result

LAYOUTS = [
    sora.ParallelConfig(),
    sora.ParallelConfig(ulysses=2),
    sora.ParallelConfig(ring=2),
    sora.ParallelConfig(guidance=2),
    sora.ParallelConfig(ulysses=4),
    sora.ParallelConfig(ulysses=2, ring=2),
    sora.ParallelConfig(ulysses=2, guidance=2),
]
# 1,280 tokens in each of two branches.
REQUEST = sora.VideoRequest(
    "a red circle moves right", height=256, width=256, num_frames=17, num_inference_steps=99, seed=1
)
LIMIT_S = 600.0


class Stepper:
    """An engine with a job that takes a step whenever it is told to; it has taken one."""

    def __init__(self, layout: sora.ParallelConfig) -> None:
        self.layout = layout
        self.times: list[float] = []
        self.cpu: list[float] = []
        self.waits: list[float] = []
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self.engine = sora.Engine.from_pretrained("sprites", device="cpu", parallel=layout)
        self._job = self.engine.submit(REQUEST, on_progress=self._stepped)
        self._wait()

    def _stepped(self, progress: sora.Progress) -> None:
        self._done.release()
        self._go.acquire()

    def _wait(self) -> None:
        if not self._done.acquire(timeout=LIMIT_S):
            raise RuntimeError(f"{self.layout} took no step in {LIMIT_S:g} s: {self._job.state}")

    def step(self) -> None:
        began, cpu = time.monotonic(), self._cpu_s()
        self._go.release()
        self._wait()
        self.times.append(time.monotonic() - began)
        self.cpu.append(self._cpu_s() - cpu)
        self.waits.append(max(getattr(self.engine._workers[0].executor, "waited_s", [0.0])))

    def _cpu_s(self) -> float:
        """Processor time of this process and of the ranks so far."""
        pool = getattr(self.engine._workers[0].executor, "pool", None)
        ranks: list[str] = []
        if pool is not None:
            launcher = pool._launcher.pid
            ranks = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        ticks = 0
        for rank in ranks:
            fields = Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self._job.cancel()
        self._go.release()
        self.engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("-o", "--output", help="keep the result in this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        steppers = []
        for layout in LAYOUTS:
            steppers.append(Stepper(layout))
            stack.callback(steppers[-1].close)
        for index in range(arguments.rounds):
            for stepper in steppers if index % 2 else reversed(steppers):
                stepper.step()

    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, {REQUEST.width}x{REQUEST.height}, {REQUEST.num_frames} frames")
    found: list[Measurement] = []
    alone = steppers[0]
    for stepper in steppers:
        name, ranks = str(stepper.layout), stepper.layout.num_ranks
        step, wait = statistics.median(stepper.times), statistics.median(stepper.waits)
        gains = [a / b for a, b in zip(alone.times, stepper.times, strict=True)]
        gain, cpu = statistics.median(gains), sum(stepper.cpu) / sum(alone.cpu)
        of_cores = gain / min(ranks, cores)
        print(
            f"{name:<22} {step:6.3f} s a step, {gain:4.2f}x, {gain / ranks:4.0%} of {ranks} ranks, "
            f"{of_cores:4.0%} of the cores, CPU {cpu:4.2f}x, waits {wait / step:4.0%}"
        )
        if ranks > 1:
            figures = {"efficiency of cores": of_cores, "CPU": cpu, "waits": wait / step}
            samples = {SUBJECT: stepper.times, "one rank": alone.times}
            found.append(Measurement(f"ranks: step, {name}", "s", samples, figures=figures))
            share = {SUBJECT: [x / ranks for x in gains]}
            what, unit = f"ranks: efficiency, {name}", f"of {ranks} ranks"
            found.append(Measurement(what, unit, share, better="higher"))
    if arguments.output:
        Result.here("ranks", found).write(arguments.output)


if __name__ == "__main__":
    main()
