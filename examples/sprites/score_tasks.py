"""Score every task on a sprites checkpoint by the reader, beside the same score of true clips.

    python examples/sprites/score_tasks.py --tasks extend loop --sheets docs/sheets

Scenes are combinations of colour, shape, motion and background that training never shows. `made`
is what the engine made, `true` the same measurement of rendered clips, and `share` the one over the
other. `kept_db` is the PSNR of known frames against the autoencoder's own round trip of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import reader
import torch
import world
from evaluate import facts
from PIL import Image

import sora_engine as sora
from sora_engine import tasks
from sora_engine.clips import to_unit_range
from sora_engine.denoise import decode

NEAR = 0.12
"""How far, in short sides, a centre may lie from the true one to count as in its place."""


class Bench:
    """An engine, the scenes of one size, and where sheets of frames go."""

    def __init__(self, engine: sora.Engine, args: argparse.Namespace) -> None:
        self.engine, self.model, self.path = engine, engine.model, args.model
        self.count, self.together, self.sheets = args.count, args.together, args.sheets
        self.size: tuple[int, int] = args.size
        self.num_frames: int = args.frames
        self.window = _window(args.window, engine.model.defaults.max_window)
        self.options: dict[str, Any] = {}
        if args.steps is not None:
            self.options["num_inference_steps"] = args.steps

    def scenes(self, seed: int, size: tuple[int, int] | None = None) -> list[world.Scene]:
        rng = random.Random(seed)
        size = size or self.size
        return [world.sample_scene(rng, *size, sprites=1, unseen=True) for _ in range(self.count)]

    def make(self, requests: Sequence[sora.VideoRequest]) -> list[np.ndarray]:
        """Frames of the requests, a few to a packed batch, each with its number as its seed."""
        made: list[np.ndarray] = []
        for low in range(0, len(requests), self.together):
            group = [
                dataclasses.replace(request, seed=low + i, **self.options)
                for i, request in enumerate(requests[low : low + self.together])
            ]
            made += [video.frames for video in self.engine.generate(group)]
        return made

    def round_trip(self, clip: np.ndarray) -> np.ndarray:
        """The autoencoder's own frames of a clip."""
        with torch.inference_mode():
            latents = self.model.vae.encode(to_unit_range(clip))[0].float()
            return torch.cat(list(decode(latents, self.model, wraps=False))).numpy()

    def words(self, scene: world.Scene) -> dict[str, Any]:
        return {
            "prompt": scene.caption(size=True),
            "height": scene.height,
            "width": scene.width,
        }

    def sheet(self, name: str, rows: Iterable[np.ndarray], columns: int = 9) -> None:
        """A picture of clips, one a row, at evenly spaced frames."""
        if self.sheets is None:
            return
        lines = []
        for clip in rows:
            picks = np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)
            framed = np.pad(clip[picks], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=90)
            lines.append(np.concatenate(list(framed), axis=1))
        width = max(line.shape[1] for line in lines)
        lines = [
            np.pad(x, ((0, 0), (0, width - x.shape[1]), (0, 0)), constant_values=255) for x in lines
        ]
        self.sheets.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(np.concatenate(lines)).quantize(128)
        picture.save(self.sheets / f"{name}.png", optimize=True)


def _window(mode: str, trained: int | None) -> sora.WindowPlan | sora.SparsePlan | None:
    """The windows of a long video by name; None leaves them to the engine."""
    if mode == "default" or trained is None:
        return None
    if mode == "sparse":
        return sora.SparsePlan(trained // 2)
    return sora.WindowPlan(trained, max(1, trained // 3), schedule=mode)


def rendered(scene: world.Scene, num_frames: int, start: int = 0) -> np.ndarray:
    return (scene.render(num_frames, start) * 255).round().to(torch.uint8).numpy()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = float(((a.astype(np.float64) - b) ** 2).mean())
    return 10 * np.log10(255**2 / max(error, 1e-3))


def apart(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> float:
    """Median distance of two clips' sprites in some frames, in short sides; 9 where none is."""
    one, other = reader.read(a).sprites, reader.read(b).sprites
    if not one or not other:
        return 9.0
    period = np.array(b.shape[2:0:-1])
    step = (one[0].path - other[0].path + period / 2) % period - period / 2
    return float(np.median(np.linalg.norm(step[where], axis=1))) / min(b.shape[1:3])


def right(scene: world.Scene, clip: np.ndarray) -> dict[str, bool]:
    return facts(scene, reader.read(clip))


def shares(made: Sequence[dict[str, bool]], true: Sequence[dict[str, bool]]) -> dict[str, Any]:
    """The share of clips that are right in each fact, beside the true clips'."""
    out: dict[str, Any] = {"clips": len(made)}
    for name in made[0]:
        ours = float(np.mean([m[name] for m in made]))
        theirs = float(np.mean([t[name] for t in true]))
        out[name] = {
            "made": round(ours, 3),
            "true": round(theirs, 3),
            "share": round(ours / theirs, 3) if theirs else None,
        }
    return out


def words(bench: Bench) -> dict[str, Any]:
    """Text to video."""
    scenes = bench.scenes(1)
    made = bench.make(
        [sora.VideoRequest(**bench.words(s), num_frames=bench.num_frames) for s in scenes]
    )
    bench.sheet("generate", made[:3])
    return _against_true(bench, scenes, made)


def draft(bench: Bench) -> dict[str, Any]:
    """A draft of half the size in half the steps, and the full size from it."""
    scenes = bench.scenes(1)
    full = [
        sora.VideoRequest(**bench.words(s), num_frames=bench.num_frames, **bench.options)
        for s in scenes
    ]
    steps, bench.options = bench.options, {}
    small = bench.make([tasks.draft(bench.model, request) for request in full])
    made = bench.make([tasks.refine(r, d) for r, d in zip(full, small, strict=True)])
    bench.options = steps
    bench.sheet("draft", made[:3])
    return _against_true(bench, scenes, made)


def still(bench: Bench) -> dict[str, Any]:
    """Images: what one frame shows."""
    scenes = bench.scenes(2)
    made = bench.make([tasks.image(**bench.words(s)) for s in scenes])
    bench.sheet("image", [np.concatenate(made[i : i + 9]) for i in (0, 9) if made[i : i + 9]])
    true = [rendered(s, 1) for s in scenes]
    return shares(
        [right(s, m) for s, m in zip(scenes, made, strict=True)],
        [right(s, t) for s, t in zip(scenes, true, strict=True)],
    )


def _against_true(
    bench: Bench, scenes: Sequence[world.Scene], made: Sequence[np.ndarray]
) -> dict[str, Any]:
    true = [rendered(s, bench.num_frames) for s in scenes]
    return shares(
        [right(s, m) for s, m in zip(scenes, made, strict=True)],
        [right(s, t) for s, t in zip(scenes, true, strict=True)],
    )


def _known(
    bench: Bench,
    name: str,
    build: Callable[[world.Scene, np.ndarray], sora.VideoRequest],
    given: Callable[[int], np.ndarray],
) -> dict[str, Any]:
    """A task with known frames: how they are kept, and whether the rest goes on from them.

    build: the request, of a true clip. given: which of n frames are known.
    """
    scenes = bench.scenes(3)
    true = [rendered(s, bench.num_frames) for s in scenes]
    made = bench.make([build(s, t) for s, t in zip(scenes, true, strict=True)])
    known = given(bench.num_frames)
    whole = _whole_latents(bench, known)
    kept = [psnr(m[whole], bench.round_trip(t)[whole]) for m, t in zip(made, true, strict=True)]
    ours, theirs = [], []
    for scene, m, t in zip(scenes, made, true, strict=True):
        told = right(scene, m)
        told["continues"] = told["motion"] and apart(m, t, ~known) < NEAR
        told["kept over 30 dB"] = kept[len(ours)] > 30
        ours.append(told)
        theirs.append({**right(scene, t), "continues": right(scene, t)["motion"]})
        theirs[-1]["kept over 30 dB"] = True
    bench.sheet(name, [row for m, t in zip(made[:2], true[:2], strict=True) for row in (t, m)])
    worst = round(float(np.min(kept)), 2)
    return {**shares(ours, theirs), "kept_db": round(float(np.mean(kept)), 2), "worst_db": worst}


def _whole_latents(bench: Bench, known: np.ndarray) -> np.ndarray:
    """Known frames in latents that are known whole."""
    whole = np.zeros_like(known)
    grid = bench.model.grid
    for i in range(grid.latent_frames(len(known), loop=False)):
        span = list(grid.frames_of(i, loop=False))
        whole[span] = known[span].all()
    return whole


def animate(bench: Bench) -> dict[str, Any]:
    def build(scene: world.Scene, clip: np.ndarray) -> sora.VideoRequest:
        return tasks.animate(
            bench.model, clip[:1], num_frames=bench.num_frames, **bench.words(scene)
        )

    return _known(bench, "animate", build, lambda n: np.arange(n) < 1)


def extend(bench: Bench) -> dict[str, Any]:
    """Half a clip is given; the other half is made, forward and then backward."""
    half = bench.num_frames // 2 // 4 * 4
    seconds = half / bench.model.defaults.fps

    def forward(scene: world.Scene, clip: np.ndarray) -> sora.VideoRequest:
        return tasks.extend(bench.model, clip[:-half], after_s=seconds, **bench.words(scene))

    def backward(scene: world.Scene, clip: np.ndarray) -> sora.VideoRequest:
        return tasks.extend(bench.model, clip[half:], before_s=seconds, **bench.words(scene))

    return {
        "after": _known(bench, "extend-after", forward, lambda n: np.arange(n) < n - half),
        "before": _known(bench, "extend-before", backward, lambda n: np.arange(n) >= half),
    }


def connect(bench: Bench) -> dict[str, Any]:
    n = bench.num_frames
    end = n // 3 // 4 * 4
    seconds = (n - 2 * end - 1) / bench.model.defaults.fps

    def build(scene: world.Scene, clip: np.ndarray) -> sora.VideoRequest:
        return tasks.connect(
            bench.model, clip[: end + 1], clip[-end:], gap_s=seconds, **bench.words(scene)
        )

    def given(n: int) -> np.ndarray:
        return (np.arange(n) <= end) | (np.arange(n) >= n - end)

    return _known(bench, "connect", build, given)


def fill(bench: Bench) -> dict[str, Any]:
    """Every other latent frame is missing."""
    n = bench.num_frames
    missing = [range(i, i + 4) for i in range(5, n - 4, 8)]

    def build(scene: world.Scene, clip: np.ndarray) -> sora.VideoRequest:
        return tasks.fill(bench.model, clip, missing, **bench.words(scene))

    return _known(
        bench, "fill", build, lambda n: ~np.isin(np.arange(n), [i for r in missing for i in r])
    )


def inpaint(bench: Bench) -> dict[str, Any]:
    """The sprite is taken away by a mask that follows it, and one of another colour asked for."""
    scenes = bench.scenes(4)
    others = [_recoloured(scene) for scene in scenes]
    requests, masks = [], []
    for scene, other in zip(scenes, others, strict=True):
        clip = rendered(scene, bench.num_frames)
        backdrop = np.array(world.BACKGROUNDS[scene.background])
        differs = (np.abs(clip.astype(int) - backdrop).sum(-1) > 30).any(axis=0)
        # All that the sprite ever touches, grown to whole tokens and one more.
        unit = bench.model.grid.multiple[0]
        tokens = differs.reshape(scene.height // unit, unit, scene.width // unit, unit).any((1, 3))
        grown = tokens | np.roll(tokens, 1, 0) | np.roll(tokens, -1, 0)
        grown = grown | np.roll(grown, 1, 1) | np.roll(grown, -1, 1)
        mask = grown.repeat(unit, 0).repeat(unit, 1)
        if mask.all():  # it leaves nothing to keep: the edge stays
            mask[:, :unit] = mask[:unit] = False
        masks.append(mask)
        requests.append(tasks.inpaint(bench.model, clip, mask, **bench.words(other)))
    made = bench.make(requests)
    true = [rendered(s, bench.num_frames) for s in scenes]
    kept = [
        psnr(m[:, ~k], bench.round_trip(t)[:, ~k])
        for m, t, k in zip(made, true, masks, strict=True)
    ]
    bench.sheet("inpaint", [row for m, t in zip(made[:2], true[:2], strict=True) for row in (t, m)])
    goals = [rendered(s, bench.num_frames) for s in others]
    scores = shares(
        [right(s, m) for s, m in zip(others, made, strict=True)],
        [right(s, t) for s, t in zip(others, goals, strict=True)],
    )
    return {**scores, "kept_db": round(float(np.mean(kept)), 2)}


def edit(bench: Bench) -> dict[str, Any]:
    """Another colour is asked for; shape, motion and place are to stay."""
    scenes = bench.scenes(5)
    others = [_recoloured(scene) for scene in scenes]
    true = [rendered(s, bench.num_frames) for s in scenes]
    goals = [rendered(s, bench.num_frames) for s in others]
    out = {}
    for strength in (0.3, 0.45, 0.6):
        made = bench.make(
            [
                tasks.edit(bench.model, t, strength=strength, **bench.words(other))
                for t, other in zip(true, others, strict=True)
            ]
        )
        every = np.ones(bench.num_frames, bool)

        def told(scene: world.Scene, clip: np.ndarray, goal: np.ndarray) -> dict[str, bool]:
            found = right(scene, clip)
            layout = apart(clip, goal, every) < NEAR  # noqa: B023
            return {**found, "layout": layout, "colour and layout": found["colour"] and layout}

        ours = [told(s, m, g) for s, m, g in zip(others, made, goals, strict=True)]
        theirs = [told(s, g, g) for s, g in zip(others, goals, strict=True)]
        out[f"strength {strength}"] = shares(ours, theirs)
        pairs = zip(made[:2], true[:2], strict=True)
        bench.sheet(f"edit-{strength}", [row for m, t in pairs for row in (t, m)])
    return out


def _recoloured(scene: world.Scene) -> world.Scene:
    """The scene with its sprite in the next colour that is not the background's."""
    (sprite,) = scene.sprites
    names = [name for name in world.COLOURS if name not in (scene.background, sprite.colour)]
    other = names[sum(map(ord, sprite.colour)) % len(names)]
    return dataclasses.replace(scene, sprites=(dataclasses.replace(sprite, colour=other),))


def upscale(bench: Bench) -> dict[str, Any]:
    """From half the size: facts at the full size, and PSNR beside that of plain enlarging."""
    height, width = bench.size
    unit = bench.model.grid.multiple[0]
    half = (max(unit, height // 2 // unit * unit), max(unit, width // 2 // unit * unit))
    scenes = bench.scenes(6)
    small = [_resized(rendered(s, bench.num_frames), half) for s in scenes]
    made = bench.make(
        [
            tasks.upscale(bench.model, clip, **bench.words(s))
            for s, clip in zip(scenes, small, strict=True)
        ]
    )
    true = [rendered(s, bench.num_frames) for s in scenes]
    plain = [_resized(clip, bench.size) for clip in small]
    bench.sheet(
        "upscale", [row for m, t in zip(made[:2], plain[:2], strict=True) for row in (t, m)]
    )
    return {
        **_against_true(bench, scenes, made),
        "db": round(float(np.mean([psnr(m, t) for m, t in zip(made, true, strict=True)])), 2),
        "enlarged_db": round(
            float(np.mean([psnr(p, t) for p, t in zip(plain, true, strict=True)])), 2
        ),
    }


def _resized(clip: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    return np.stack(
        [
            np.asarray(Image.fromarray(f).resize((width, height), Image.Resampling.LANCZOS))
            for f in clip
        ]
    )


def loop(bench: Bench) -> dict[str, Any]:
    """The change across the seam, over the change from frame to frame elsewhere."""
    scenes = bench.scenes(7)
    n = bench.num_frames // 4 * 4
    made = bench.make(
        [sora.VideoRequest(**bench.words(s), num_frames=n, loop=True) for s in scenes]
    )
    ratios = []
    for frames in made:
        f = frames.astype(np.float32)
        inner = np.abs(np.diff(f, axis=0)).mean()
        ratios.append(float(np.abs(f[0] - f[-1]).mean() / max(inner, 0.05)))
    bench.sheet("loop", [np.concatenate([m, m]) for m in made[:3]], columns=12)
    true = [rendered(s, n) for s in scenes]
    scores = shares(
        [right(s, m) for s, m in zip(scenes, made, strict=True)],
        [right(s, t) for s, t in zip(scenes, true, strict=True)],
    )
    return {
        **scores,
        "seam_ratio": round(float(np.mean(ratios)), 3),
        "seam_ratio_median": round(float(np.median(ratios)), 3),
        "seams_over_1.2": round(float(np.mean(np.array(ratios) > 1.2)), 3),
    }


def shots(bench: Bench) -> dict[str, Any]:
    """Two shots, each read against its own prompt, and against the other's."""
    first, second = bench.scenes(8), bench.scenes(9)
    a = bench.num_frames // 2 // 4 * 4 + 1
    b = bench.num_frames // 2 // 4 * 4
    requests = []
    for one, two in zip(first, second, strict=True):
        told = bench.words(one)
        prompts = [told.pop("prompt"), bench.words(two)["prompt"]]
        requests.append(tasks.shots(prompts, [a, b], **told))
    made = bench.make(requests)
    bench.sheet("shots", made[:3])
    ours, theirs, swapped = [], [], []
    for one, two, m in zip(first, second, made, strict=True):
        ours += [right(one, m[:a]), right(two, m[a:])]
        swapped += [right(two, m[:a]), right(one, m[a:])]
        theirs += [right(one, rendered(one, a)), right(two, rendered(two, b))]
    chance = {k: round(float(np.mean([s[k] for s in swapped])), 3) for k in swapped[0]}
    return {**shares(ours, theirs), "other shot's prompt": chance}


def minute(bench: Bench, seconds: float = 60.0) -> dict[str, Any]:
    """A minute: facts by 10-second stretch, what the prompt leaves out, borders and drift."""
    fps = bench.model.defaults.fps
    n = int(seconds * fps) // 4 * 4 + 1
    stretch = int(10 * fps)
    scenes = bench.scenes(10)[: max(1, bench.count // 10)]
    # The odd ones are asked for by motion and background alone.
    prompts = [
        s.caption(size=True)
        if i % 2 == 0
        else f"a shape {world.MOTIONS[s.sprites[0].motion]} on a {s.background} background"
        for i, s in enumerate(scenes)
    ]
    started = time.monotonic()
    made = bench.make(
        [
            sora.VideoRequest(p, height=s.height, width=s.width, num_frames=n, window=bench.window)
            for p, s in zip(prompts, scenes, strict=True)
        ]
    )
    took = (time.monotonic() - started) / len(scenes)
    short = bench.make(
        [
            sora.VideoRequest(p, height=s.height, width=s.width, num_frames=int(4 * fps) + 1)
            for p, s in zip(prompts, scenes, strict=True)
        ]
    )
    out: dict[str, Any] = {"videos": len(made), "frames": n, "seconds_each": round(took, 1)}
    motion = [right(s, c)["motion"] for s, c in zip(scenes, short, strict=True)]
    out["motion, 4 s clips"] = round(float(np.mean(motion)), 3)
    starts = range(0, n - stretch + 1, stretch)
    readings = [[reader.read(m[a : a + stretch]) for a in starts] for m in made]
    out["motion by stretch"] = [
        round(
            float(
                np.mean([facts(s, r[i])["motion"] for s, r in zip(scenes, readings, strict=True)])
            ),
            3,
        )
        for i in range(len(starts))
    ]
    for name in ("colour", "shape", "size"):
        same = [
            [
                bool(r.sprites and reading[0].sprites)
                and getattr(r.sprites[0], name) == getattr(reading[0].sprites[0], name)
                for r in reading
            ]
            for reading in readings
        ]
        out[f"{name} as in the first stretch"] = np.mean(same, axis=0).round(3).tolist()
    plan = _plan_of(bench, n)
    borders, drift = [], []
    for frames in made:
        change = np.abs(np.diff(frames.astype(np.float32), axis=0)).mean(axis=(1, 2, 3))
        at = np.isin(np.arange(1, n), plan)
        borders.append(float(change[at].mean() / change[~at].mean()))
        ground = np.median(frames.reshape(n, -1, 3), axis=1)
        drift.append(float(np.abs(ground[-stretch:].mean(0) - ground[:stretch].mean(0)).max()))
    out["change at window borders over elsewhere"] = round(float(np.mean(borders)), 3)
    out["background drift, levels of 255"] = round(float(np.max(drift)), 2)
    bench.sheet("minute", made[:2], columns=13)
    return out


def memory(bench: Bench) -> dict[str, Any]:
    """Peak memory of a minute and of a quarter of one, each in a process of its own."""
    height, width = bench.size
    fps = bench.model.defaults.fps
    out: dict[str, Any] = {}
    for seconds in (15, 60):
        frames = int(seconds * fps) // 4 * 4 + 1
        code = (
            "import resource, sora_engine as sora\n"
            f"with sora.Engine.from_pretrained({bench.path!r}) as engine:\n"
            f"    engine.generate(sora.VideoRequest('a red circle moves right', height={height}, "
            f"width={width}, num_frames={frames}, num_inference_steps=2, seed=1))\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        grid = bench.model.grid
        canvas = math.prod(grid.shape(height, width, frames, loop=False)) * 4
        out[f"{seconds} s"] = {
            "peak_mib": round(int(run.stdout.split()[-1]) / 1024, 1),
            "frames_mib": round(frames * height * width * 3 / 2**20, 1),
            "canvas_mib": round(canvas / 2**20, 1),
        }
    out["ratio"] = round(out["60 s"]["peak_mib"] / out["15 s"]["peak_mib"], 3)
    return out


def _plan_of(bench: Bench, num_frames: int) -> list[int]:
    """The frames at which a window begins or ends."""
    from sora_engine.denoise import window_plan
    from sora_engine.windows import plan_windows

    height, width = bench.size
    request = sora.VideoRequest("x", height=height, width=width, num_frames=num_frames)
    resolved = bench.engine.resolve(dataclasses.replace(request, window=bench.window))
    grid = bench.model.grid
    total = grid.latent_frames(num_frames, loop=False)
    plan = window_plan(resolved, bench.model, total)
    ends = set()
    for window in plan_windows(plan, total, wraps=False, step=0):
        for latent in (window.start, window.start + window.length):
            if 0 < latent < total:
                ends.add(grid.frames_of(latent, loop=False).start)
    return sorted(ends)


def sizes(bench: Bench) -> dict[str, Any]:
    """Colour, shape and motion by size of frame, 64 to 160 each way in steps of 16."""
    table = {}
    few = bench.count
    for height in range(64, 161, 16):
        for width in range(64, 161, 16):
            bench.count = max(2, few // 10)
            scenes = bench.scenes(height * 1000 + width, (height, width))
            made = bench.make(
                [sora.VideoRequest(**bench.words(s), num_frames=bench.num_frames) for s in scenes]
            )
            told = [right(s, m) for s, m in zip(scenes, made, strict=True)]
            table[f"{width}x{height}"] = {
                k: round(float(np.mean([t[k] for t in told])), 3)
                for k in ("background", "colour", "shape", "motion")
            }
            print(f"{width}x{height}", json.dumps(table[f"{width}x{height}"]), flush=True)
    bench.count = few
    return table


TASKS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "generate": words,
    "image": still,
    "animate": animate,
    "extend": extend,
    "connect": connect,
    "fill": fill,
    "inpaint": inpaint,
    "edit": edit,
    "upscale": upscale,
    "draft": draft,
    "loop": loop,
    "shots": shots,
    "minute": minute,
    "memory": memory,
    "sizes": sizes,
}


def _size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(height), int(width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sprites", help="'sprites' or a folder")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--count", type=int, default=50, help="clips a task; a tenth for minute")
    parser.add_argument("--size", type=_size, default=(64, 96), help="WIDTHxHEIGHT")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--steps", type=int)
    parser.add_argument(
        "--window", choices=["default", "static", "moving", "sparse"], default="default"
    )
    parser.add_argument("--together", type=int, default=8, help="requests in company")
    parser.add_argument("--json", type=Path, help="where the scores go, task by task")
    parser.add_argument("--sheets", type=Path, help="folder for sheets of frames")
    args = parser.parse_args()
    scores: dict[str, Any] = {}
    if args.json is not None and args.json.exists():
        scores = json.loads(args.json.read_text())
    with sora.Engine.from_pretrained(args.model) as engine:
        bench = Bench(engine, args)
        for name in args.tasks:
            started = time.monotonic()
            scores[name] = TASKS[name](bench)
            print(name, json.dumps(scores[name], indent=1), flush=True)
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
            if args.json is not None:
                args.json.write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main()
