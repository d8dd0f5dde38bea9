"""A cascade beside one pass at the full size, by the reader.

    python examples/sprites/cascade.py --json cascade.json

Held-out prompts are made at 64x64 in 17 frames, then at 128x128, then in 33 frames at twice the
rate; and at 128x128 in 33 frames by one pass. What was filmed at twice the world's rate is read at
the world's own: once the frames that stood before, once those between, and a fact is right where it
is in both. `promised` is the peak that each was promised before work began, in MiB.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from scoring import Bench, Clip, mean

import sora_engine as sora
from sora_engine import tasks

FACTS = ("colour", "shape", "motion", "colour, shape and motion")
SMALL, LARGE, FRAMES, SEED = 64, 128, 17, 1


def shares(told: list[dict[str, bool]]) -> dict[str, float]:
    return {name: mean([each[name] for each in told]) for name in FACTS}


def table(scores: dict[str, Any]) -> str:
    """What the file has, as Markdown."""
    names = {"cascade": "the cascade", "one": "one pass at the full size"}
    rows = [
        f"| {names[which]} | {found['clips']} | "
        + " | ".join(f"{100 * found[fact]:.0f}%" for fact in FACTS)
        + f" | {found['promised']} MiB |"
        for which, found in scores.items()
    ]
    head = f"| way | clips | {' | '.join(FACTS)} | promised |"
    return "\n".join([head, "|---|" + "---|" * (len(FACTS) + 2), *rows])


def alone(scene: Any, video: sora.Video) -> dict[str, bool]:
    """Which facts are right."""
    found = Clip(video.frames).right(scene)
    return {name: bool(found[name]) for name in FACTS}


def both(scene: Any, video: sora.Video) -> dict[str, bool]:
    """Which facts are right in the frames that stood before and in those between."""
    first, between = (Clip(video.frames[i::2]).right(scene) for i in (0, 1))
    return {name: bool(first[name] and between[name]) for name in FACTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sprites", help="'sprites' or a folder")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument(
        "--which", nargs="+", choices=["cascade", "one"], default=["cascade", "one"]
    )
    parser.add_argument("--strengths", nargs=2, type=float, default=[0.4, 0.3])
    parser.add_argument("--guidance", type=float, default=1.0, help="of the stage between frames")
    parser.add_argument("--together", type=int, default=10, help="clips of a batch")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    scores: dict[str, Any] = {}
    if args.json is not None and args.json.exists():
        scores = json.loads(args.json.read_text())
    stages = [
        tasks.Stage(scale=2, strength=args.strengths[0]),
        tasks.Stage(frames=2, strength=args.strengths[1], guidance_scale=args.guidance),
    ]
    with sora.Engine.from_pretrained(args.model) as engine:
        bench = Bench(
            engine, path=args.model, count=args.count, sizes=[(LARGE, LARGE)],
            num_frames=2 * FRAMES - 1, steps=None, sheets=None,
        )  # fmt: skip
        scenes = bench.scenes(SEED)
        for which in args.which:
            side = SMALL if which == "cascade" else LARGE
            frames = FRAMES if which == "cascade" else bench.num_frames
            made = scores.get(which, {"told": [], "seconds": 0.0})
            told, promised = made["told"], made.get("promised", 0.0)
            while len(told) < len(scenes):
                started, first = time.monotonic(), len(told)
                batch = scenes[first : first + args.together]
                requests = [
                    sora.VideoRequest(
                        scene.caption(size=True), num_frames=frames, seed=i, height=side, width=side
                    )
                    for i, scene in enumerate(batch, start=first)
                ]
                if which == "cascade":
                    jobs = [sora.submit_cascade(tasks.cascade(r, stages), engine) for r in requests]
                    peaks = [job.plan.peak for job in jobs if job.plan is not None]
                    videos = [job.result() for job in jobs]
                    told += [both(scene, v) for scene, v in zip(batch, videos, strict=True)]
                else:
                    peaks = [engine.plan(request).peak for request in requests]
                    videos = engine.generate(requests)
                    told += [alone(scene, v) for scene, v in zip(batch, videos, strict=True)]
                promised = max(promised, round(max(peaks) / 2**20, 1))
                seconds = made["seconds"] + time.monotonic() - started
                made = scores[which] = {
                    **shares(told), "clips": len(told), "promised": promised,
                    "seconds": round(seconds, 1), "told": told,
                }  # fmt: skip
                print(which, len(told), f"{seconds:.0f} s", flush=True)
                if args.json is not None:
                    args.json.write_text(json.dumps(scores, indent=1) + "\n")
    print(table(scores))


if __name__ == "__main__":
    main()
