"""Each task's score by the reader, beside the same score of true clips."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import world
from PIL import Image
from scoring import (
    KEPT_DB,
    NEAR,
    Bench,
    Clip,
    Facts,
    against_truth,
    asked,
    changes,
    mean,
    psnr,
    recoloured,
    rendered,
    shares,
)

import sora_engine as sora
from sora_engine import tasks

Score = dict[str, Any]

# Scenes by their seeds: tasks of one seed share true clips and their round trips.
WORDS, IMAGE, KNOWN, INPAINT, EDIT, UPSCALE, LOOP, SHOTS = range(1, 9)

STILL = 0.25
"""Changes under this, in levels of 255 a pixel, are a picture that stands still."""


def generate(bench: Bench) -> Score:
    """Text to video."""
    scenes = bench.scenes(WORDS)
    made = bench.make([sora.VideoRequest(**asked(s), num_frames=bench.num_frames) for s in scenes])
    bench.sheets.draw("generate", [clip.frames for clip in made[:4]])
    return against_truth(scenes, made, bench.truth(WORDS))


def draft(bench: Bench) -> Score:
    """A draft of half the size in half the steps, and the full size from it."""
    scenes = bench.scenes(WORDS)
    full = [
        sora.VideoRequest(**asked(s), num_frames=bench.num_frames, **bench.options) for s in scenes
    ]
    small = [tasks.draft(bench.model, request) for request in full]
    drafts = bench.make(small, num_inference_steps=small[0].num_inference_steps)
    made = bench.make([tasks.refine(r, d.frames) for r, d in zip(full, drafts, strict=True)])
    bench.sheets.draw("draft", [clip.frames for clip in made[:4]])
    return against_truth(scenes, made, bench.truth(WORDS))


def image(bench: Bench) -> Score:
    """Images: what one frame shows. They have no motion to read."""
    scenes = bench.scenes(IMAGE)
    made = bench.make([tasks.image(**asked(s)) for s in scenes])
    by_size = [c.frames for c in made if c.frames.shape == made[0].frames.shape][:18]
    bench.sheets.draw("image", [np.concatenate(by_size[i : i + 9]) for i in (0, 9) if by_size[i:]])
    return against_truth(scenes, made, bench.truth(IMAGE, 1))


def known(
    bench: Bench,
    name: str,
    build: Callable[[world.Scene, np.ndarray], sora.VideoRequest],
    given: np.ndarray,
) -> Score:
    """A task with known frames: how they are kept, and whether the rest goes on from them.

    build: the request, of a true clip. given: bool `[n]`, which frames are known.
    """
    scenes, true, trips = bench.scenes(KNOWN), bench.truth(KNOWN), bench.round_trips(KNOWN)
    made = bench.make([build(s, t.frames) for s, t in zip(scenes, true, strict=True)])
    whole = whole_latents(bench.model.grid, given)
    kept = [psnr(m.frames[whole], t[whole]) for m, t in zip(made, trips, strict=True)]

    def told(scene: world.Scene, clip: Clip, goal: Clip, kept_db: float) -> Facts:
        found = clip.right(scene)
        goes_on = found["motion"] and clip.apart(goal, ~given) < NEAR
        return {**found, "continues": goes_on, "kept": kept_db > KEPT_DB}

    bench.sheets.draw(name, pairs(true[:2], made[:2]))
    ours = map(told, scenes, made, true, kept)
    theirs = map(told, scenes, true, true, [math.inf] * len(true))
    scores = shares(list(ours), list(theirs))
    return {**scores, "kept_db": mean(kept, 2), "worst_db": round(float(np.min(kept)), 2)}


def whole_latents(grid: Any, given: np.ndarray) -> np.ndarray:
    """Known frames in latents that are known whole: bool `[n]`, as `given`."""
    whole = np.zeros_like(given)
    for i in range(grid.latent_frames(len(given), loop=False)):
        span = list(grid.frames_of(i, loop=False))
        whole[span] = given[span].all()
    return whole


def pairs(first: Iterable[Clip], second: Iterable[Clip]) -> list[np.ndarray]:
    """Rows of a sheet: of each two clips the one above the other."""
    return [clip.frames for clip in chain.from_iterable(zip(first, second, strict=True))]


def animate(bench: Bench) -> Score:
    """The first frame is given."""

    def build(scene: world.Scene, clip: np.ndarray) -> sora.VideoRequest:
        return tasks.animate(bench.model, clip[:1], num_frames=bench.num_frames, **asked(scene))

    return known(bench, "animate", build, np.arange(bench.num_frames) < 1)


def _half(bench: Bench) -> int:
    """Half of the frames, in whole latents."""
    time = bench.model.grid.time
    return bench.num_frames // 2 // time * time


def extend_after(bench: Bench) -> Score:
    """The first half is given."""
    half = _half(bench)

    def build(scene: world.Scene, clip: np.ndarray) -> sora.VideoRequest:
        seconds = half / bench.model.defaults.fps
        return tasks.extend(bench.model, clip[:-half], after_s=seconds, **asked(scene))

    return known(
        bench, "extend-after", build, np.arange(bench.num_frames) < bench.num_frames - half
    )


def extend_before(bench: Bench) -> Score:
    """The last half is given."""
    half = _half(bench)

    def build(scene: world.Scene, clip: np.ndarray) -> sora.VideoRequest:
        seconds = half / bench.model.defaults.fps
        return tasks.extend(bench.model, clip[half:], before_s=seconds, **asked(scene))

    return known(bench, "extend-before", build, np.arange(bench.num_frames) >= half)


def connect(bench: Bench) -> Score:
    """A third is given at each end."""
    n, time = bench.num_frames, bench.model.grid.time
    end = n // 3 // time * time

    def build(scene: world.Scene, clip: np.ndarray) -> sora.VideoRequest:
        gap_s = (n - 2 * end - 1) / bench.model.defaults.fps
        first, second = clip[: end + 1], clip[n - end :]
        return tasks.connect(bench.model, first, second, gap_s=gap_s, **asked(scene))

    return known(bench, "connect", build, (np.arange(n) <= end) | (np.arange(n) >= n - end))


def fill(bench: Bench) -> Score:
    """Every other latent frame is missing."""
    n, time = bench.num_frames, bench.model.grid.time
    missing = [range(i, i + time) for i in range(time + 1, n - time, 2 * time)]

    def build(scene: world.Scene, clip: np.ndarray) -> sora.VideoRequest:
        return tasks.fill(bench.model, clip, missing, **asked(scene))

    return known(bench, "fill", build, ~np.isin(np.arange(n), list(chain.from_iterable(missing))))


def inpaint(bench: Bench) -> Score:
    """The sprite's way is taken out, and a sprite of another colour asked for."""
    unit = bench.model.grid.multiple[0]
    scenes, true, masks = [], [], []
    for scene in bench.scenes(INPAINT, 10 * bench.count):
        clip = rendered(scene, bench.num_frames)
        mask = way(scene, clip, unit)
        if len(scenes) < bench.count and not mask.all():  # something is left to be kept
            scenes, true, masks = [*scenes, scene], [*true, Clip(clip)], [*masks, mask]
    others = [recoloured(scene) for scene in scenes]
    made = bench.make(
        [
            tasks.inpaint(bench.model, clip.frames, mask, **asked(other))
            for clip, mask, other in zip(true, masks, others, strict=True)
        ]
    )
    trips = [bench.round_trip(clip.frames) for clip in true]
    kept = [
        psnr(m.frames[:, ~mask], t[:, ~mask]) for m, t, mask in zip(made, trips, masks, strict=True)
    ]
    bench.sheets.draw("inpaint", pairs(true[:2], made[:2]))
    goals = [Clip(rendered(s, bench.num_frames)) for s in others]
    ours = [
        {**m.right(s), "kept": db > KEPT_DB} for m, s, db in zip(made, others, kept, strict=True)
    ]
    theirs = [{**g.right(s), "kept": True} for g, s in zip(goals, others, strict=True)]
    worst = round(float(np.min(kept)), 2)
    return {**shares(ours, theirs), "kept_db": mean(kept, 2), "worst_db": worst}


def way(scene: world.Scene, clip: np.ndarray, unit: int) -> np.ndarray:
    """All that the sprite ever touches, in whole tokens: bool `[height, width]`.

    Grown by a token each way where that leaves anything over.
    """
    backdrop = np.array(world.BACKGROUNDS[scene.background])
    touched = (np.abs(clip.astype(int) - backdrop).sum(-1) > 30).any(axis=0)
    tokens = touched.reshape(scene.height // unit, unit, scene.width // unit, unit).any((1, 3))
    grown = tokens
    for axis in (0, 1):
        grown = grown | np.roll(grown, 1, axis) | np.roll(grown, -1, axis)
    return (tokens if grown.all() else grown).repeat(unit, 0).repeat(unit, 1)


def edit(bench: Bench, strength: float) -> Score:
    """Another colour is asked for; shape, motion and place are to stay."""
    scenes, true = bench.scenes(EDIT), bench.truth(EDIT)
    others = [recoloured(scene) for scene in scenes]
    made = bench.make(
        [
            tasks.edit(bench.model, clip.frames, strength=strength, **asked(other))
            for clip, other in zip(true, others, strict=True)
        ]
    )

    def told(scene: world.Scene, clip: Clip, goal: Clip) -> Facts:
        found = clip.right(scene)
        layout = clip.apart(goal) < NEAR
        return {**found, "layout": layout, "colour and layout": found["colour"] and layout}

    goals = [Clip(rendered(s, bench.num_frames)) for s in others]
    bench.sheets.draw(f"edit-{strength:g}", pairs(true[:2], made[:2]))
    return shares(list(map(told, others, made, goals)), list(map(told, others, goals, goals)))


def upscale(bench: Bench) -> Score:
    """From half the size: facts at the full size, and PSNR beside that of plain enlarging."""
    unit = bench.model.grid.multiple[0]
    scenes, true = bench.scenes(UPSCALE), bench.truth(UPSCALE)

    def halved(side: int) -> int:
        return max(unit, side // 2 // unit * unit)

    small = [
        resized(t.frames, halved(s.height), halved(s.width))
        for s, t in zip(scenes, true, strict=True)
    ]
    requests = [
        tasks.upscale(bench.model, clip, **asked(s)) for s, clip in zip(scenes, small, strict=True)
    ]
    made = bench.make(requests)
    plain = [Clip(resized(clip, s.height, s.width)) for s, clip in zip(scenes, small, strict=True)]
    bench.sheets.draw("upscale", pairs(plain[:2], made[:2]))
    return {
        **against_truth(scenes, made, true),
        "db": mean([psnr(m.frames, t.frames) for m, t in zip(made, true, strict=True)], 2),
        "enlarged_db": mean(
            [psnr(p.frames, t.frames) for p, t in zip(plain, true, strict=True)], 2
        ),
    }


def resized(clip: np.ndarray, height: int, width: int) -> np.ndarray:
    size, how = (width, height), Image.Resampling.LANCZOS
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, how)) for frame in clip])


def loop(bench: Bench) -> Score:
    """The change across the seam, over the changes round about it; of true clips too.

    Loops are as long as it takes the scene's motion to come round, in the first of the sizes.
    """
    scenes = bench.scenes(LOOP, sizes=bench.sizes[:1])
    lengths = [closes(scene, bench.model.grid.time) for scene in scenes]
    made = bench.make(
        [
            sora.VideoRequest(**asked(s), num_frames=n, loop=True)
            for s, n in zip(scenes, lengths, strict=True)
        ]
    )
    true = [Clip(rendered(s, n)) for s, n in zip(scenes, lengths, strict=True)]
    reach = bench.model.grid.time
    borders = [latent_borders(clip.frames, reach) for clip in made]
    seams = np.array([ratios[0] for ratios in borders])
    elsewhere = np.concatenate([ratios[1:] for ratios in borders])
    true_seams = np.array([seam(clip.frames, reach) for clip in true])
    bench.sheets.draw("loop", [np.concatenate([c.frames] * 2) for c in made[:4]], columns=12)
    return {
        **against_truth(scenes, made, true),
        "seam_ratio": mean(seams),
        "seam_ratio_median": round(float(np.median(seams)), 3),
        "seams_under_1.2": mean(seams < 1.2),
        "other_borders_ratio": mean(elsewhere),
        "other_borders_under_1.2": mean(elsewhere < 1.2),
        "true_seam_ratio": mean(true_seams),
        "true_seams_under_1.2": mean(true_seams < 1.2),
    }


def closes(scene: world.Scene, time: int) -> int:
    """The fewest frames, whole latents, after which a scene's motion is where it began."""
    (sprite,) = scene.sprites
    sides = {"left": scene.width, "right": scene.width, "up": scene.height, "down": scene.height}
    period = {
        "still": 4.0 * time,
        "bounces": float(world.BOUNCE_PERIOD),
        "orbits": float(world.ORBIT_PERIOD),
        "grows": float(world.GROW_PERIOD),
        **{motion: side / world.SPEED for motion, side in sides.items()},
    }[sprite.motion]
    for n in range(2 * time, 64 * time + 1, time):
        if abs(n / period - round(n / period)) < 1e-6:
            return n
    raise ValueError(f"{sprite.motion} with a period of {period} frames fits no length")


def seam(frames: np.ndarray, reach: int) -> float:
    """The change from the last frame to the first, over the mean of `reach` changes on each side.

    What stands still counts as changing by `STILL`, below which nothing is seen.
    """
    inner = changes(frames)
    near = np.concatenate([inner[:reach], inner[-reach:]]).mean()
    across = changes(frames[[-1, 0]])[0]
    return float(max(across, STILL) / max(near, STILL))


def latent_borders(frames: np.ndarray, time: int) -> np.ndarray:
    """`seam` at every border of two latents of a loop; first at its seam."""
    turns = range(0, len(frames), time)
    return np.array([seam(np.roll(frames, -turn, axis=0), time) for turn in turns])


def shots(bench: Bench) -> Score:
    """Two shots, each read against its own prompt, and against the other's."""
    first, second = bench.scenes(SHOTS), bench.scenes(SHOTS + 100)
    a, b = bench.num_frames, bench.num_frames - 1
    requests = []
    for one, two in zip(first, second, strict=True):
        words = asked(one)
        prompts = [words.pop("prompt"), asked(two)["prompt"]]
        requests.append(tasks.shots(prompts, [a, b], **words))
    made = bench.make(requests)
    bench.sheets.draw("shots", [clip.frames for clip in made[:4]])
    cut = [(Clip(clip.frames[:a]), Clip(clip.frames[a:])) for clip in made]
    ours, theirs, swapped = [], [], []
    for one, two, (before, after) in zip(first, second, cut, strict=True):
        ours += [before.right(one), after.right(two)]
        swapped += [before.right(two), after.right(one)]
        theirs += [Clip(rendered(one, a)).right(one), Clip(rendered(two, b)).right(two)]
    chance = {name: mean([s[name] for s in swapped]) for name in swapped[0]}
    return {**shares(ours, theirs), "other shot's prompt": chance}


def edits(strengths: Sequence[float]) -> Callable[[Bench], Score]:
    """`edit` at several strengths."""
    return lambda bench: {f"strength {s:g}": edit(bench, s) for s in strengths}
