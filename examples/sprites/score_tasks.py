"""Score every task on a sprites checkpoint by the reader, beside the same score of true clips.

    python examples/sprites/score_tasks.py --json docs/scores.json --sheets docs/sheets

Scenes are combinations of colour, shape, motion and background that training never shows. `made`
is what the engine made, `true` the same measurement of rendered clips, and `share` the one over the
other. `kept_db` is the PSNR of known frames against the autoencoder's own round trip of them.
Scores in the JSON file stay when other tasks are scored; the page beside it, in Markdown, has the
tables of all and the sheets.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import task_scores
from minute import memory, minute, plan_named
from score_report import report
from scoring import Bench, Size
from size_table import sizes

import sora_engine as sora

QUICK: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "generate": task_scores.generate,
    "image": task_scores.image,
    "animate": task_scores.animate,
    "extend_after": task_scores.extend_after,
    "extend_before": task_scores.extend_before,
    "connect": task_scores.connect,
    "fill": task_scores.fill,
    "inpaint": task_scores.inpaint,
    "upscale": task_scores.upscale,
    "draft": task_scores.draft,
    "loop": task_scores.loop,
    "shots": task_scores.shots,
}
LONG = ("minute", "memory", "sizes")


def size(text: str) -> Size:
    width, height = text.split("x")
    return int(height), int(width)


def pages(args: argparse.Namespace) -> list[str]:
    """The sheets so far, by their paths from the report's folder."""
    if args.sheets is None:
        return []
    folder = args.json.parent.resolve()
    return [os.path.relpath(path.resolve(), folder) for path in sorted(args.sheets.glob("*.png"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [*QUICK, "edit", *LONG]
    parser.add_argument("--model", default="sprites", help="'sprites' or a folder")
    parser.add_argument("--tasks", nargs="+", choices=names, default=names)
    parser.add_argument(
        "--count", type=int, default=50, help="clips a task; a tenth for minute and for each size"
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=size,
        default=[size(s) for s in ("64x64", "96x64", "64x96", "128x128")],
        help="WIDTHxHEIGHT in turn; loop, minute and memory take the first",
    )
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--strengths", nargs="+", type=float, default=[0.45], help="of edit")
    parser.add_argument(
        "--window",
        choices=["default", "static", "moving", "sparse"],
        default="default",
        help="of minute",
    )
    parser.add_argument("--json", type=Path, help="where the scores go, task by task")
    parser.add_argument("--sheets", type=Path, help="folder for sheets of frames")
    args = parser.parse_args()
    scores: dict[str, Any] = {}
    if args.json is not None and args.json.exists():
        scores = json.loads(args.json.read_text())
    with sora.Engine.from_pretrained(args.model) as engine:
        bench = Bench(
            engine,
            path=args.model,
            count=args.count,
            sizes=args.sizes,
            num_frames=args.frames,
            steps=args.steps,
            sheets=args.sheets,
        )
        plan = plan_named(args.window, engine.model.defaults)
        score: dict[str, Callable[[Bench], dict[str, Any]]] = {
            **QUICK,
            "edit": task_scores.edits(args.strengths),
            "minute": lambda bench: minute(bench, plan),
            "memory": memory,
            "sizes": sizes,
        }
        for name in args.tasks:
            started = time.monotonic()
            scores[name] = score[name](bench)
            print(name, json.dumps(scores[name], indent=1), flush=True)
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
            if args.json is not None:
                args.json.write_text(json.dumps(scores, indent=1) + "\n")
                args.json.with_suffix(".md").write_text(report(scores, pages(args)))


if __name__ == "__main__":
    main()
