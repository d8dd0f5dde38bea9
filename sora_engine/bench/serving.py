"""Serving: requests that arrive at random, of mixed sizes, and bursts of small ones.

The same arrivals are served by the engine and by the same engine one job at a time (first come,
first served). The rate is set so that one at a time has work for 85% of its time: both finish all
that arrives, at equal throughput, and what differs is how long one waits. diffusers, one at a time,
is slower than they come, so that its queue grows as long as they do: it is given the first quarter.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from sora_engine.bench.intervals import ratio_interval
from sora_engine.bench.results import SUBJECT, Measurement
from sora_engine.bench.timing import interleaved
from sora_engine.config import Limits
from sora_engine.models.registry import BUNDLED
from sora_engine.request import VideoRequest
from sora_engine.runtime.engine import Engine
from sora_engine.runtime.job import Job

FIFO = "sora one at a time"
DIFFUSERS = "diffusers one at a time"
LOAD = 0.85

PROMPTS = (
    "a red circle moves right on a white background",
    "a blue square moves up on a black background",
    "a green triangle moves left on a white background",
)


@dataclass(frozen=True, slots=True)
class Kind:
    """A size of request, and how many in a hundred are of it."""

    width: int
    height: int
    num_frames: int
    steps: int
    share: int
    small: bool = True

    def arguments(self, seed: int) -> dict[str, Any]:
        return {
            "prompt": PROMPTS[seed % len(PROMPTS)],
            "negative_prompt": "",
            "height": self.height,
            "width": self.width,
            "num_frames": self.num_frames,
            "num_inference_steps": self.steps,
            "guidance_scale": 4.0,
        }

    def request(self, seed: int) -> VideoRequest:
        return VideoRequest(**self.arguments(seed), seed=seed)


MIXED = (
    Kind(64, 64, 1, 4, share=50),
    Kind(64, 64, 9, 4, share=25),
    Kind(96, 64, 5, 4, share=15),
    Kind(128, 128, 33, 20, share=10, small=False),
)
"""Images and short clips at few steps, and longer videos of some 20 times their work."""


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    kind: Kind
    seed: int


def arrivals(kinds: Sequence[Kind], count: int, mean_gap_s: float, seed: int) -> list[Arrival]:
    """`count` requests of a Poisson process. The shares are kept exactly, in a random order, so
    that a short trace is not all of one kind."""
    rng = random.Random(seed)
    total = sum(kind.share for kind in kinds)
    drawn = [kind for kind in kinds for _ in range(round(count * kind.share / total))]
    drawn += [kinds[0]] * (count - len(drawn))
    rng.shuffle(drawn)
    found, now = [], 0.0
    for i, kind in enumerate(drawn[:count]):
        found.append(Arrival(now, kind, seed * 1000 + i))
        now += rng.expovariate(1 / mean_gap_s)
    return found


Done = Callable[[], None]
Serve = Callable[[Arrival, Done], None]


def replay(trace: Sequence[Arrival], serve: Serve, timeout_s: float = 600.0) -> list[float]:
    """Seconds from each arrival to its finished video. `serve` returns at once and calls back."""
    latencies: list[float] = [0.0] * len(trace)
    left = threading.Semaphore(0)
    start = time.monotonic()

    def finisher(i: int) -> Done:
        def done() -> None:
            latencies[i] = time.monotonic() - start - trace[i].at_s
            left.release()

        return done

    for i, arrival in enumerate(trace):
        time.sleep(max(0.0, start + arrival.at_s - time.monotonic()))
        serve(arrival, finisher(i))
    for _ in trace:
        if not left.acquire(timeout=timeout_s):
            raise TimeoutError(f"a request is not done {timeout_s:g} s after the last one was")
    return latencies


def by_engine(engine: Engine) -> Serve:
    def serve(arrival: Arrival, done: Done) -> None:
        def finished(job: Job) -> None:
            done()

        engine.submit(arrival.kind.request(arrival.seed)).add_done_callback(finished)

    return serve


class OneAtATime:
    """diffusers behind a queue."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._queue: SimpleQueue[tuple[Arrival, Done] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def __call__(self, arrival: Arrival, done: Done) -> None:
        self._queue.put((arrival, done))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            arrival, done = item
            make(self._pipe, arrival.kind, arrival.seed)
            done()


def make(pipe: Any, kind: Kind, seed: int) -> None:
    """One video by diffusers."""
    generator = torch.Generator().manual_seed(seed)
    pipe(**kind.arguments(seed), generator=generator, output_type="np")


def open_diffusers(model: str | Path = "sprites") -> Any:
    """diffusers' pipeline on the same checkpoint. Raises ImportError without diffusers."""
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(BUNDLED.get(str(model), model), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def serving(
    *,
    model: str | Path = "sprites",
    kinds: Sequence[Kind] = MIXED,
    count: int = 80,
    rounds: int = 3,
    with_diffusers: bool = True,
) -> list[Measurement]:
    """Latencies of small and of all requests under Poisson arrivals, and the throughput.

    count: requests in each round. How long small ones wait hangs on where the few large ones fall,
        so that a ratio has an interval beside it (`intervals.ratio_interval`) over traces and
        requests; one trace tells little.
    """
    pipe = open_diffusers(model) if with_diffusers else None
    one = Limits(max_running_jobs=1)
    with (
        Engine.from_pretrained(model, device="cpu") as engine,
        Engine.from_pretrained(model, device="cpu", limits=one) as fifo,
    ):
        for kind in kinds:  # warm, and so that each size's cost is known
            engine.generate(kind.request(0))
            fifo.generate(kind.request(0))
        # What a batch may hold is measured when two requests meet for the first time on a machine.
        engine.generate([kinds[0].request(seed) for seed in (1, 2)])
        systems: dict[str, Serve] = {SUBJECT: by_engine(engine), FIFO: by_engine(fifo)}
        latencies: dict[str, list[list[tuple[Kind, float]]]] = {}
        rates: dict[str, list[float]] = {}
        gaps_s: list[float] = []

        def run(names: Sequence[str], trace: list[Arrival]) -> None:
            for name in names:
                served = trace[: -(-len(trace) // 4)] if name == DIFFUSERS else trace
                took = replay(served, systems[name])
                pairs = [(a.kind, s) for a, s in zip(served, took, strict=True)]
                latencies.setdefault(name, []).append(pairs)
                ends = (a.at_s + s for a, s in zip(served, took, strict=True))
                rates.setdefault(name, []).append(len(served) / max(ends))

        with ExitStack() as stack:
            if pipe is not None:
                systems[DIFFUSERS] = stack.enter_context(closing(OneAtATime(pipe)))
            names = list(systems)
            for i in range(rounds):
                # Before each round: what load the arrivals make hangs on the machine's speed then.
                gaps_s.append(_mean_service_s(fifo, kinds, min(count, 20)) / LOAD)
                run(names, arrivals(kinds, count, gaps_s[-1], seed=i + 1))
                names.reverse()
    about = f"Poisson arrivals, one at a time {LOAD:.0%} busy"
    small = {
        name: [[s for kind, s in trace if kind.small] for trace in traces]
        for name, traces in latencies.items()
    }
    everyone = {
        name: [[s for _, s in trace] for trace in traces] for name, traces in latencies.items()
    }
    found = [
        Measurement(
            f"serving: latency of small requests, {about}",
            "s",
            {name: [s for trace in traces for s in trace] for name, traces in small.items()},
            paired=False,
            figures={
                "requests a round": count,
                "mean gap, s": statistics.mean(gaps_s),
                **intervals(small),
            },
        ),
        Measurement(
            f"serving: latency of all requests, {about}",
            "s",
            {name: [s for trace in traces for s in trace] for name, traces in everyone.items()},
            paired=False,
            figures=intervals(everyone),
        ),
        Measurement(
            f"serving: small requests, their median by trace, {about}",
            "s",
            {
                name: [statistics.median(trace) for trace in traces]
                for name, traces in small.items()
            },
            figures=intervals(small),
        ),
        Measurement(
            f"serving: throughput, {about}", "videos/s", rates, better="higher", paired=False
        ),
    ]
    return [with_percentiles(m) if m.unit == "s" else m for m in found]


def intervals(latencies: dict[str, list[list[float]]]) -> dict[str, float | str]:
    """For each rival, between which ratios the median is better, 9 times out of 10."""
    found: dict[str, float | str] = {}
    for name, traces in latencies.items():
        if name != SUBJECT and all(traces) and all(latencies[SUBJECT]):
            low, high = ratio_interval(latencies[SUBJECT], traces)
            found[f"times better than {name}, 90% interval"] = f"{low:.2f} to {high:.2f}"
    return found


def with_percentiles(measurement: Measurement) -> Measurement:
    """The same, with p50 and p95 of each system."""
    figures: dict[str, float | str] = {**measurement.figures}
    for name, values in measurement.samples.items():
        figures[f"p50 of {name}"] = statistics.median(values)
        figures[f"p95 of {name}"] = sorted(values)[max(0, round(0.95 * len(values)) - 1)]
    return replace(measurement, figures=figures)


def _mean_service_s(engine: Engine, kinds: Sequence[Kind], count: int) -> float:
    """Seconds a request, of `count` in the kinds' shares that follow each other without a pause."""
    trace = [replace(a, at_s=0.0) for a in arrivals(kinds, count, 1.0, seed=0)]
    return max(replay(trace, by_engine(engine))) / count


def burst(
    *,
    model: str | Path = "sprites",
    kinds: Sequence[Kind] = MIXED,
    count: int = 16,
    rounds: int = 3,
) -> Measurement:
    """`count` small requests at once, the small `kinds` in their shares: packed, one by one through
    the engine, and one by one through diffusers. Raises ImportError without diffusers."""
    small = [kind for kind in kinds if kind.small]
    wanted = [(a.kind, a.seed) for a in arrivals(small, count, 1.0, seed=1)]
    pipe = open_diffusers(model)
    with Engine.from_pretrained(model, device="cpu") as engine:

        def packed() -> None:
            engine.generate([kind.request(seed) for kind, seed in wanted])

        def one_by_one() -> None:
            for kind, seed in wanted:
                engine.generate(kind.request(seed))

        def diffusers() -> None:
            for kind, seed in wanted:
                make(pipe, kind, seed)

        times = interleaved({SUBJECT: packed, FIFO: one_by_one, DIFFUSERS: diffusers}, rounds)
    return Measurement(
        f"serving: throughput of {count} small requests at once",
        "videos/s",
        {name: [count / s for s in values] for name, values in times.items()},
        better="higher",
    )
