"""Predicts waiting before 1 to 512 replicas, from measured service times: docs/replicas.md.

    python benchmarks/predict_serving.py --measure     # one minute: benchmarks/results/service.json
    python benchmarks/predict_serving.py --write       # the table and the picture of the page

Jobs of mixed sizes come at random, one by one (Poisson) or in bursts (Poisson, of batches). Each
replica takes its jobs in the order in which they came, one at a time. A job's service time is
drawn from those measured of its size. Choosing by the shortest queue knows each replica's tokens
that are left, exactly and at once, and no service time.
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sora_engine.bench.results import SUBJECT, Measurement, Result

ROOT = Path(__file__).parents[1]
TIMES = ROOT / "benchmarks" / "results" / "service.json"
PAGE = ROOT / "docs" / "replicas.md"
PICTURE = ROOT / "docs" / "pictures" / "waits.svg"
MARKS = "<!-- predicted -->\n", "<!-- /predicted -->"

SIZES = {  # size, frames, steps, and how many of a hundred jobs are such
    "picture": ("64x64", 1, 16, 50),
    "short clip": ("64x64", 17, 16, 35),
    "long clip": ("96x64", 65, 24, 15),
}
REPLICAS = (1, 2, 4, 8, 32, 128, 512)
LOAD = 0.8
BURST = 16
JOBS, WARM = 40_000, 4_000


@dataclass(frozen=True, slots=True)
class Job:
    """One that comes. at: seconds. service: seconds it takes alone. tokens: what is known of it."""

    at: float
    service: float
    tokens: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one simulation. times: from each job's arrival to its end. busy: the mean share of time
    that a replica worked."""

    times: np.ndarray
    busy: float

    def quantile(self, share: float) -> float:
        return float(np.quantile(self.times, share))


Choice = Callable[[np.ndarray, int], int]
"""From the tokens before each replica, and the number of the job, to the replica that has it."""


def shortest(tokens: np.ndarray, _number: int) -> int:
    """The least; of equals the first, which matters to no replica's time."""
    return int(tokens.argmin())


def round_robin(tokens: np.ndarray, number: int) -> int:
    return number % len(tokens)


def simulate(jobs: Sequence[Job], replicas: int, choose: Choice, *, warm: int = 0) -> Outcome:
    """Each replica is one server, first come, first served. warm: jobs at the beginning that are
    not counted, as they find empty queues."""
    lines: list[deque[Job]] = [deque() for _ in range(replicas)]
    waiting = np.zeros(replicas)
    size, begin, span = np.zeros(replicas), np.zeros(replicas), np.ones(replicas)
    ends: list[tuple[float, int]] = []
    times = np.zeros(len(jobs))
    numbers: list[deque[int]] = [deque() for _ in range(replicas)]
    worked = 0.0

    def begin_next(i: int, now: float) -> None:
        job = lines[i].popleft()
        waiting[i] -= job.tokens
        size[i], begin[i], span[i] = job.tokens, now, max(job.service, 1e-12)
        heapq.heappush(ends, (now + job.service, i))

    def end(now: float, i: int) -> None:
        number = numbers[i].popleft()
        times[number] = now - jobs[number].at
        size[i] = 0.0
        if lines[i]:
            begin_next(i, now)

    for number, job in enumerate(jobs):
        while ends and ends[0][0] <= job.at:
            end(*heapq.heappop(ends))
        left = waiting + size * np.clip(1 - (job.at - begin) / span, 0, 1)
        i = choose(left, number)
        lines[i].append(job)
        numbers[i].append(number)
        waiting[i] += job.tokens
        worked += job.service
        if len(numbers[i]) == 1:
            begin_next(i, job.at)
    last = 0.0
    while ends:
        last = ends[0][0]
        end(*heapq.heappop(ends))
    return Outcome(times[warm:], worked / (replicas * last))


def arrivals(rate: float, count: int, burst: int, rng: random.Random) -> Iterator[float]:
    """Moments of `count` jobs, `rate` a second; `burst` at a time."""
    now, made = 0.0, 0
    while made < count:
        now += rng.expovariate(rate / burst)
        for _ in range(min(burst, count - made)):
            made += 1
            yield now


def mixed(
    times: dict[str, Sequence[float]],
    tokens: dict[str, float],
    replicas: int,
    *,
    load: float,
    burst: int,
    count: int,
    seed: int,
) -> list[Job]:
    """Jobs of the measured sizes, so many that replicas are busy for `load` of their time."""
    rng = random.Random(seed)
    shares = {name: row[3] for name, row in SIZES.items()}
    mean = sum(shares[n] * statistics.mean(times[n]) for n in shares) / sum(shares.values())
    jobs = []
    for at in arrivals(load * replicas / mean, count, burst, rng):
        name = rng.choices(list(shares), list(shares.values()))[0]
        jobs.append(Job(at, rng.choice(times[name]), tokens[name]))
    return jobs


def measure(rounds: int) -> Result:
    """CPU seconds of one thread for a job of each size, alone, from its submission to its video: a
    machine that does something else makes no difference."""
    import torch

    from sora_engine import Engine, VideoRequest
    from sora_engine.denoise.denoise import num_steps, step_tokens

    torch.set_num_threads(1)
    measurements = []
    with Engine.from_pretrained("sprites", device="cpu", dtype="float32") as engine:
        for name, (size, frames, steps, _) in SIZES.items():
            width, height = (int(side) for side in size.split("x"))
            request = VideoRequest(
                "a red circle moves right",
                width=width,
                height=height,
                num_frames=frames,
                num_inference_steps=steps,
                seed=0,
            )
            resolved, grid = engine.resolve(request), engine.model.grid
            samples = []
            for i in range(rounds + 1):
                begun = time.process_time()
                engine.generate(request)
                if i:  # the first fills caches
                    samples.append(time.process_time() - begun)
            figures = {"tokens": float(step_tokens(resolved, grid) * num_steps(resolved, grid))}
            measurements.append(
                Measurement(f"service/{name}", "s", {SUBJECT: samples}, figures=figures)
            )
    return Result.here("service", measurements)


def predictions(result: Result) -> list[dict[str, float | str]]:
    """A row for each number of replicas and kind of arrival."""
    found = {m.name.removeprefix("service/"): m for m in result.measurements}
    times = {name: list(m.samples[SUBJECT]) for name, m in found.items()}
    tokens = {name: float(m.figures["tokens"]) for name, m in found.items()}
    rows: list[dict[str, float | str]] = []
    for kind, burst in (("one by one", 1), (f"{BURST} at once", BURST)):
        for replicas in REPLICAS:
            jobs = mixed(times, tokens, replicas, load=LOAD, burst=burst, count=JOBS, seed=replicas)
            row: dict[str, float | str] = {"arrivals": kind, "replicas": float(replicas)}
            for name, choose in (("shortest", shortest), ("round robin", round_robin)):
                outcome = simulate(jobs, replicas, choose, warm=WARM)
                row[f"{name} p50"] = outcome.quantile(0.5)
                row[f"{name} p95"] = outcome.quantile(0.95)
                row[f"{name} busy"] = outcome.busy
            rows.append(row)
    return rows


def table(rows: Sequence[dict[str, float | str]], result: Result) -> str:
    """The rows as Markdown."""
    lines = ["| arrivals | replicas | shortest queue, p50, p95 | round robin, p50, p95 | busy |"]
    lines.append("|---|---|---|---|---|")
    for row in rows:
        short = f"{row['shortest p50']:.2f} s, {row['shortest p95']:.2f} s"
        plain = f"{row['round robin p50']:.2f} s, {row['round robin p95']:.2f} s"
        lines.append(
            f"| {row['arrivals']} | {row['replicas']:.0f} | {short} | {plain} "
            f"| {row['shortest busy']:.0%} |"
        )
    means = ", ".join(
        f"{m.name.removeprefix('service/')} {statistics.mean(m.samples[SUBJECT]):.2f} s"
        for m in result.measurements
    )
    day = result.created.partition("T")[0]
    return "\n".join(
        [*lines, "", f"Service times: {means}; {result.machine['cpu']}, one thread; {day}."]
    )


def picture(rows: Sequence[dict[str, float | str]]) -> str:
    """p95 over the number of replicas, as SVG: a line for each choice and kind of arrival."""
    width, height, left, bottom = 640, 320, 56, 40
    highest = max(float(row["round robin p95"]) for row in rows)

    def at(row: dict[str, float | str], name: str) -> str:
        x = left + (width - left - 20) * np.log2(float(row["replicas"])) / np.log2(REPLICAS[-1])
        y = 20 + (height - 20 - bottom) * (1 - float(row[name]) / highest)
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        "<title>p95 by replicas: shortest queue and round robin</title>",
        "<style>text{font:12px system-ui,sans-serif;fill:#1f2328}.p{fill:#fff}.a{stroke:#d0d7de}"
        ".s{stroke:#0a69da}.r{stroke:#bc4c00}polyline{fill:none;stroke-width:2}.b{stroke-dasharray:"
        "6 4}@media(prefers-color-scheme:dark){text{fill:#e6edf3}.p{fill:#0d1117}.a{stroke:#3d444d}"
        ".s{stroke:#4493f8}.r{stroke:#f0883e}}</style>",
        f'<rect class="p" width="{width}" height="{height}"/>',
        f'<line class="a" x1="{left}" y1="{height - bottom}" x2="{width - 20}" '
        f'y2="{height - bottom}"/>',
    ]
    for i in range(5):
        value, y = highest * i / 4, height - bottom - (height - 20 - bottom) * i / 4
        parts.append(f'<text x="{left - 8}" y="{y + 4:.0f}" text-anchor="end">{value:.0f} s</text>')
    for row in rows[: len(REPLICAS)]:
        x = at(row, "shortest p95").split(",")[0]
        parts.append(
            f'<text x="{x}" y="{height - 20}" text-anchor="middle">{row["replicas"]:.0f}</text>'
        )
    for kind, dashes in ((rows[0]["arrivals"], ""), (rows[-1]["arrivals"], " b")):
        own = [row for row in rows if row["arrivals"] == kind]
        for name, letter in (("shortest", "s"), ("round robin", "r")):
            points = " ".join(at(row, f"{name} p95") for row in own)
            parts.append(f'<polyline class="{letter}{dashes}" points="{points}"/>')
    for i, (label, style) in enumerate(
        (
            ("round robin, in bursts", "r b"),
            ("round robin, one by one", "r"),
            ("shortest queue, in bursts", "s b"),
            ("shortest queue, one by one", "s"),
        )
    ):
        y = 30 + 18 * i
        parts.append(f'<polyline class="{style}" points="{width - 240},{y} {width - 205},{y}"/>')
        parts.append(f'<text x="{width - 196}" y="{y + 4}">{label}</text>')
    label = f"p95 from arrival to video, by replicas, at {LOAD:.0%} load"
    parts.append(f'<text x="{left}" y="14">{label}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="Measure the service times anew.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="Into the page and its picture.")
    given = parser.parse_args()
    if given.measure:
        measure(given.rounds).write(TIMES)
        return
    result = Result.read(TIMES)
    rows = predictions(result)
    told = table(rows, result)
    print(told)
    if given.write:
        page = PAGE.read_text(encoding="utf-8")
        head, _, rest = page.partition(MARKS[0])
        tail = rest.partition(MARKS[1])[2]
        PAGE.write_text(f"{head}{MARKS[0]}{told}\n{MARKS[1]}{tail}", encoding="utf-8")
        PICTURE.write_text(picture(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
