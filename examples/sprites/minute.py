"""A minute of video: whether it goes on as it began, its joints, its drift, and its memory."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import time
from typing import Any

import numpy as np
import reader
import world
from evaluate import facts
from scoring import Bench, asked, changes, mean

import sora_engine as sora
from sora_engine.denoise.windows import plan_windows
from sora_engine.request import GenerationDefaults, SparsePlan, WindowPlan
from sora_engine.request.windows import default_plan

SECONDS = 60
STRETCH_S = 10
KEPT = ("colour", "shape", "size")
INK = 64
"""Levels of 255 from the background's colour at which a pixel counts as the sprite's."""

Plan = WindowPlan | SparsePlan | None


def plan_named(mode: str, defaults: GenerationDefaults) -> Plan:
    """The windows of a long video by name, with the overlap and the anchors that the checkpoint
    asks for under its own schedule; None leaves them to the engine."""
    if mode == "default" or defaults.max_window is None:
        return None
    if mode == "sparse":
        return SparsePlan(defaults.max_window // 2)
    return default_plan(defaults, mode)


def minute(bench: Bench, plan: Plan) -> dict[str, Any]:
    """Facts by stretch of 10 seconds, what the prompt leaves out, joints and drift."""
    fps = bench.model.defaults.fps
    n, stretch = length(bench, SECONDS), int(STRETCH_S * fps)
    scenes = bench.scenes(10, max(2, bench.count // 10), bench.sizes[:1])
    # Every second one is asked for by its motion and background alone.
    untold = np.arange(len(scenes)) % 2 == 1
    prompts = [
        f"a shape {world.MOTIONS[s.sprites[0].motion]} on a {s.background} background"
        if bare
        else asked(s)["prompt"]
        for s, bare in zip(scenes, untold, strict=True)
    ]
    long = [
        sora.VideoRequest(p, height=s.height, width=s.width, num_frames=n, window=plan)
        for p, s in zip(prompts, scenes, strict=True)
    ]
    short = [dataclasses.replace(r, num_frames=length(bench, 4), window=None) for r in long]
    started = time.monotonic()
    made = [clip.frames for clip in bench.make(long)]
    took_s = (time.monotonic() - started) / len(made)
    motions = [c.right(s)["motion"] for s, c in zip(scenes, bench.make(short), strict=True)]
    starts = range(0, n - stretch + 1, stretch)
    readings = [[reader.read(frames[a : a + stretch]) for a in starts] for frames in made]
    right = [
        [facts(s, r)["motion"] for r in told] for s, told in zip(scenes, readings, strict=True)
    ]
    kept = {
        name: np.array([[as_first(told, i, name) for i in range(len(starts))] for told in readings])
        for name in KEPT
    }
    begins = joints(bench, long[0], n)
    borders = [border_ratios(frames, begins, bench.model.grid.time) for frames in made]
    bench.sheets.draw("minute", made[:4], columns=13)
    return {
        "videos": len(made),
        "frames": n,
        "seconds_each": round(took_s, 1),
        "motion of 4 s clips": mean(motions),
        "motion by stretch": np.mean(right, axis=0).round(3).tolist(),
        **{
            f"{name} as in the first stretch{where}": shares.mean(axis=0).round(3).tolist()
            for name, every in kept.items()
            for where, shares in (("", every), (", untold", every[untold]))
        },
        "change at window borders over elsewhere": mean([b[0] for b in borders]),
        "change at window borders over other latents' borders": mean([b[1] for b in borders]),
        "background drift, levels of 255": round(max(drift(f, stretch)[0] for f in made), 2),
        "sprite drift, levels of 255": round(max(drift(f, stretch)[1] for f in made), 2),
    }


def length(bench: Bench, seconds: int) -> int:
    """The frames of a video that lasts so long, at least."""
    grid = bench.model.grid.time
    return math.ceil(seconds * bench.model.defaults.fps / grid) * grid + 1


def as_first(readings: list[reader.SceneReading], i: int, name: str) -> bool:
    """Whether a stretch shows a sprite of the same colour (shape, size) as the first one does."""
    first, here = readings[0].sprites, readings[i].sprites
    return bool(first and here) and getattr(first[0], name) == getattr(here[0], name)


def joints(bench: Bench, request: sora.VideoRequest, num_frames: int) -> np.ndarray:
    """The frames at which what a window makes begins, or ends."""
    grid = bench.model.grid
    total = grid.latent_frames(num_frames, loop=False)
    plan = bench.engine.resolve(request).window
    ends = set()
    for window in plan_windows(plan, total, wraps=False, step=0):
        ends |= {window.start + window.lead, window.start + window.length}
    inner = sorted(end for end in ends if 0 < end < total)
    return np.array([grid.frames_of(end, loop=False).start for end in inner], int)


def border_ratios(frames: np.ndarray, begins: np.ndarray, time: int) -> tuple[float, float]:
    """The change at window borders over that elsewhere, and over that at other latents' borders.

    (A decoder's frames may differ more from latent to latent than within one.)
    """
    change = changes(frames)
    arrives = np.arange(1, len(frames))
    at, latent = np.isin(arrives, begins), arrives % time == 1
    if not at.any():  # one span
        return 1.0, 1.0
    inner = change[latent & ~at]
    here = float(change[at].mean())
    return here / float(change[~at].mean()), here / float(inner.mean()) if len(inner) else math.nan


def drift(frames: np.ndarray, stretch: int) -> tuple[float, float]:
    """How far the colours of background and sprite go from the first stretch to the last."""

    def colours(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pixels = part.reshape(-1, 3)
        ground = np.median(pixels, axis=0)
        ink = pixels[(np.abs(pixels - ground) > INK).any(axis=1)]
        return ground, ink.mean(axis=0) if len(ink) else ground

    first, last = colours(frames[:stretch]), colours(frames[-stretch:])
    ground, sprite = (float(np.abs(b - a).max()) for a, b in zip(first, last, strict=True))
    return ground, sprite


def memory(bench: Bench) -> dict[str, Any]:
    """Peak memory of a minute and of a quarter of one, each in a process of its own."""
    height, width = bench.sizes[0]
    out: dict[str, Any] = {}
    for seconds in (SECONDS // 4, SECONDS):
        frames = length(bench, seconds)
        code = (
            "import sora_engine as sora\n"
            f"with sora.Engine.from_pretrained({bench.path!r}) as engine:\n"
            f"    engine.generate(sora.VideoRequest('a red circle moves right', height={height}, "
            f"width={width}, num_frames={frames}, num_inference_steps=2, seed=1))\n"
            # Not ru_maxrss, which begins at what this process had when it started that one.
            "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        canvas = math.prod(bench.model.grid.shape(height, width, frames, loop=False)) * 4
        out[f"{seconds} s"] = {
            "peak_mib": round(int(run.stdout.split()[-1]) / 1024, 1),
            "frames_mib": round(frames * height * width * 3 / 2**20, 1),
            "canvas_mib": round(canvas / 2**20, 1),
        }
    quarter, whole = out.values()
    out["ratio"] = round(whole["peak_mib"] / quarter["peak_mib"], 3)
    out["allowed_mib"] = round(1.1 * quarter["peak_mib"] + whole["canvas_mib"], 1)
    return out
