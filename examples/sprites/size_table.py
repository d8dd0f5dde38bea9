"""Scores by size of frame: 64 to 160 each way in steps of 16, portrait and landscape."""

from __future__ import annotations

from typing import Any

from scoring import Bench, asked, mean

import sora_engine as sora

SIDES = range(64, 161, 16)
NAMES = ("background", "colour", "shape", "motion")


def sizes(bench: Bench) -> dict[str, Any]:
    """Shares of clips that are right in each fact, by `WIDTHxHEIGHT`; a tenth of the count each."""
    few = max(2, bench.count // 10)
    table: dict[str, Any] = {"clips a size": few}
    for height in SIDES:
        # A row goes through the engine together.
        scenes = [
            scene
            for width in SIDES
            for scene in bench.scenes(height * 1000 + width, few, [(height, width)])
        ]
        requests = [sora.VideoRequest(**asked(s), num_frames=bench.num_frames) for s in scenes]
        told = [clip.right(s) for clip, s in zip(bench.make(requests), scenes, strict=True)]
        for i, width in enumerate(SIDES):
            here = told[i * few : (i + 1) * few]
            table[f"{width}x{height}"] = {k: mean([t[k] for t in here]) for k in NAMES}
        print(f"sizes: {height} rows done", flush=True)
    return table
