"""What the host computes before a device has work: plans of memory and of sparse attention.

    PYTHONPATH=.:kernels python benchmarks/host_costs.py

At the shapes of published models, on the meta device: nothing is downloaded, nothing is run. The
first plan of a model also builds the layers without weights; "a new size" is what a request of
another size waits for then. Medians of five.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator

import predict_memory
import torch

import sora_kernels as sk
from sora_engine.bench.models import WAN_1_3B, WAN_14B
from sora_engine.config import Limits
from sora_engine.request import VideoRequest, resolve_request
from sora_engine.runtime.memory import MemoryPlanner

ROUNDS = 5
VIDEOS = (
    ("Wan 1.3B, 480p, 5 s", WAN_1_3B, (480, 832, 81)),
    ("Wan 14B, 720p, 5 s", WAN_14B, (720, 1280, 81)),
    ("Wan 1.3B, 480p, 60 s", WAN_1_3B, (480, 832, 961)),
)
SPANS = ((21, 30, 52), (21, 45, 80), (61, 30, 52), (53, 45, 80))


def milliseconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def plan_memory(
    planner: MemoryPlanner, height: int, width: int, num_frames: int, words: int = 1
) -> float:
    """Milliseconds for a prompt of so many words."""
    asked = VideoRequest("a " * words, height=height, width=width, num_frames=num_frames)
    request = resolve_request(asked, planner.model, Limits())
    return milliseconds(lambda: planner.plan(request))


def memory_plans() -> Iterator[str]:
    yield "| memory plan | the first of a model | a new size | a size that was met |"
    yield "|---|---|---|---|"
    for name, shape, (height, width, num_frames) in VIDEOS:
        predict_memory.WAN_1_3B = shape
        model = predict_memory.hollow_model(torch.bfloat16)
        planner = MemoryPlanner(model, Limits().max_batch_tokens, None)
        first = plan_memory(planner, height, width, num_frames)
        sizes = range(height - 16 * ROUNDS, height, 16)
        new = statistics.median(plan_memory(planner, n, width, num_frames) for n in sizes)
        texts = range(2, 2 + ROUNDS)
        met = statistics.median(plan_memory(planner, height, width, num_frames, n) for n in texts)
        yield f"| {name} | {first:.0f} ms | {new:.0f} ms | {met:.1f} ms |"


def plan_frames(grid: tuple[int, int, int]) -> tuple[float, int]:
    """Milliseconds, and entries of the plan: each frame sees ten on either side, the first one and
    the middle one."""
    frames, rows, columns = grid
    at = torch.arange(frames)
    mask = (at[:, None] - at).abs() <= 10
    mask[:, [0, frames // 2]] = True
    tokens = frames * rows * columns
    offsets = torch.tensor([0, tokens], dtype=torch.int32)
    shape = {"num_tokens": tokens, "head_dim": 128, "dtype": torch.bfloat16}
    began = time.perf_counter()
    plan = sk.plan_attention(offsets, **shape, grids=[grid], masks=mask)
    return (time.perf_counter() - began) * 1e3, plan.blocks.numel()


def sparse_plans() -> Iterator[str]:
    yield "| tokens in one span | plan of sparse attention | entries |"
    yield "|---|---|---|"
    for grid in SPANS:
        found = [plan_frames(grid) for _ in range(ROUNDS)]
        took = statistics.median(took for took, _ in found)
        yield f"| {math.prod(grid):,} | {took:.1f} ms | {found[0][1]:,} |"


if __name__ == "__main__":
    print("\n".join([*memory_plans(), "", *sparse_plans()]))
