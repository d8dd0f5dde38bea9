"""Score a sprites checkpoint with the reader.

    python examples/sprites/evaluate.py --tables vae prompts two lengths known

The prompts come from combinations of colour, shape, motion and background that training never
shows. Every score stands beside `chance`: the same clips read against another clip's prompt.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import reader
import torch
import world
from train_vae import load_vae, psnr, round_trip

import sora_engine as sora

Size = tuple[int, int]
SIZES: tuple[Size, ...] = ((64, 64), (64, 96), (96, 64))
FACTS = ("background", "colour", "shape", "size", "motion")


def facts(scene: world.Scene, reading: reader.SceneReading) -> dict[str, bool]:
    """Which attributes of `scene` a reading has right: of all its sprites, matched by colour."""
    read = {sprite.colour: sprite for sprite in reading.sprites}
    pairs = [(sprite, read.get(sprite.colour)) for sprite in scene.sprites]
    if len(pairs) == 1 and reading.sprites:  # one sprite need not be matched
        pairs = [(scene.sprites[0], reading.sprites[0])]
    right = {"background": reading.background == scene.background}
    for name in FACTS[1:]:
        right[name] = all(
            got is not None
            and (
                getattr(want, name) == getattr(got, name)
                or (name == "size" and want.motion == "grows")
                or (name == "motion" and got.motion is None)
            )
            for want, got in pairs
        )
    if len(reading.sprites) != len(scene.sprites):
        right["colour"] = False
    right["colour, shape and motion"] = right["colour"] and right["shape"] and right["motion"]
    return right


def table(scenes: Sequence[world.Scene], clips: Sequence[np.ndarray]) -> dict[str, object]:
    """Shares right, and at chance: the clips against the prompts, moved on by one."""
    readings = [reader.read(clip) for clip in clips]
    told = [facts(s, r) for s, r in zip(scenes, readings, strict=True)]
    other = [*scenes[1:], scenes[0]]
    chance = [facts(s, r) for s, r in zip(other, readings, strict=True)]
    names = list(told[0])
    return {
        "clips": len(clips),
        "right": {n: round(sum(t[n] for t in told) / len(told), 3) for n in names},
        "chance": {n: round(sum(t[n] for t in chance) / len(chance), 3) for n in names},
    }


def scenes_of(size: Size, count: int, seed: int, sprites: int = 1) -> list[world.Scene]:
    rng = random.Random(f"{size} {seed}")
    return [world.sample_scene(rng, *size, sprites=sprites, unseen=True) for _ in range(count)]


class Maker:
    """Makes clips of scenes with the engine, a few to a packed batch."""

    def __init__(self, engine: sora.Engine, options: dict[str, object], together: int) -> None:
        self.engine, self.options, self.together = engine, options, together

    def __call__(
        self,
        scenes: Sequence[world.Scene],
        num_frames: int | None = None,
        clips: Callable[[world.Scene], Sequence[sora.Clip]] = lambda scene: (),
    ) -> list[np.ndarray]:
        made: list[np.ndarray] = []
        for low in range(0, len(scenes), self.together):
            requests = [
                sora.VideoRequest(
                    # Sizes are said, but for sprites that grow: the caption leaves that out.
                    prompt=scene.caption(size=True),
                    height=scene.height,
                    width=scene.width,
                    num_frames=num_frames,
                    seed=low + i,
                    clips=clips(scene),
                    **self.options,
                )
                for i, scene in enumerate(scenes[low : low + self.together])
            ]
            made += [video.frames for video in self.engine.generate(requests)]
        return made


def prompts(make: Maker, count: int) -> dict[str, object]:
    """Held-out prompts of one sprite, by size of frame."""
    out = {}
    for size in SIZES:
        scenes = scenes_of(size, count, seed=1)
        start = time.monotonic()
        out[f"{size[0]}x{size[1]}"] = table(scenes, make(scenes))
        print(f"{size}: {(time.monotonic() - start) / count:.1f} s a clip", flush=True)
    return out


def two(make: Maker, count: int) -> dict[str, object]:
    """Held-out prompts of two sprites; right means that both are."""
    out = {}
    for size in SIZES:
        scenes = scenes_of(size, count, seed=2, sprites=2)
        out[f"{size[0]}x{size[1]}"] = table(scenes, make(scenes))
    return out


def lengths(make: Maker, count: int) -> dict[str, object]:
    """Held-out prompts by number of frames; of one frame only what a still shows is read."""
    scenes = scenes_of((64, 64), count, seed=3)
    return {str(n): table(scenes, make(scenes, num_frames=n)) for n in (1, 9, 17, 33)}


# Frames that are given, of 17. The first latent stands for one frame and each later one for four,
# and a latent is known only where all its frames are: so every second latent, not every nth frame.
NUM_FRAMES = 17
GIVEN: dict[str, tuple[tuple[int, int], ...]] = {
    "first frame": ((0, 1),),
    "first half": ((0, 9),),
    "last half": ((9, 17),),
    "both ends": ((0, 5), (13, 17)),
    "every second latent": ((0, 1), (5, 9), (13, 17)),
}


def known(make: Maker, count: int, vae_folder: Path) -> dict[str, object]:
    """Given frames: how well they are kept, and whether the rest goes on from them.

    `apart` is the median distance of the sprite's centre from the true clip's, in the frames that
    were not given, in pixels.
    """
    vae = load_vae(vae_folder)
    scenes = scenes_of((64, 96), count, seed=4)
    true = [(scene.render(NUM_FRAMES) * 255).round().to(torch.uint8).numpy() for scene in scenes]
    frames_of = {id(scene): frames for scene, frames in zip(scenes, true, strict=True)}
    out: dict[str, object] = {"true clips": table(scenes, true)}
    trips = [round_trip(vae, scene.render(NUM_FRAMES)) for scene in scenes]
    for name, stretches in GIVEN.items():

        def clips(
            scene: world.Scene, stretches: tuple[tuple[int, int], ...] = stretches
        ) -> list[sora.Clip]:
            frames = frames_of[id(scene)]
            return [sora.Clip(frames[a:b], at=a) for a, b in stretches]

        made = make(scenes, num_frames=NUM_FRAMES, clips=clips)
        given = np.zeros(NUM_FRAMES, dtype=bool)
        for a, b in stretches:
            given[a:b] = True
        kept, apart = [], []
        for frames, trip, clip in zip(made, trips, true, strict=True):
            kept.append(psnr(torch.from_numpy(frames[given]).float() / 255, trip[given]))
            got, want = reader.read(frames).sprites, reader.read(clip).sprites
            if got and want:
                step = got[0].path - want[0].path
                period = np.array(clip.shape[2:0:-1])
                step = (step + period / 2) % period - period / 2
                apart.append(np.median(np.linalg.norm(step[~given], axis=1)))
        scores = table(scenes, made)
        scores["kept_db"] = round(float(np.mean(kept)), 2)
        scores["apart"] = round(float(np.median(apart)), 3) if apart else None
        out[name] = scores
    return out


def vae_and_reader(vae_folder: Path, count: int) -> dict[str, object]:
    """The VAE's round trip on unseen clips of mixed sizes and lengths, and the reader on them."""
    vae = load_vae(vae_folder)
    rng = random.Random(99)
    scores, scenes, true, trips = [], [], [], []
    for _ in range(count):
        size = rng.choice(((64, 64), (128, 128), (64, 160), (160, 96), (96, 96)))
        scene = world.sample_scene(rng, *size, unseen=True)
        clip = scene.render(rng.choice((1, 9, 17, 33)), start=rng.randrange(500))
        trip = round_trip(vae, clip)
        scores.append(psnr(trip, clip))
        scenes.append(scene)
        true.append((clip * 255).round().to(torch.uint8).numpy())
        trips.append((trip * 255).round().to(torch.uint8).numpy())
    return {
        "clips": count,
        "mean_db": round(float(np.mean(scores)), 2),
        "worst_db": round(min(scores), 2),
        "reader on true clips": table(scenes, true),
        "reader on round trips": table(scenes, trips),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sprites", help="'sprites' or a folder")
    parser.add_argument(
        "--tables", nargs="+", default=["vae", "prompts", "two", "lengths", "known"]
    )
    parser.add_argument("--count", type=int, default=200, help="clips for each line of `prompts`")
    parser.add_argument("--few", type=int, default=50, help="clips for each line of the others")
    parser.add_argument("--solver", help="of the engine's, in place of the checkpoint's")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--together", type=int, default=8, help="requests in company")
    parser.add_argument("--json", type=Path, help="where to write the scores")
    args = parser.parse_args()
    folder = Path(args.model)
    if args.model == "sprites":
        folder = Path(sora.__file__).parent / "checkpoints" / "sprites"
    options: dict[str, object] = {}
    if args.solver is not None:
        options["solver"] = args.solver
    if args.steps is not None:
        options["num_inference_steps"] = args.steps
    if args.guidance is not None:
        options["guidance_scale"] = args.guidance
    scores: dict[str, object] = {}
    with sora.Engine.from_pretrained(args.model) as engine:
        make = Maker(engine, options, args.together)
        for name in args.tables:
            scores[name] = {
                "vae": lambda: vae_and_reader(folder / "vae", 100),
                "prompts": lambda: prompts(make, args.count),
                "two": lambda: two(make, args.few),
                "lengths": lambda: lengths(make, args.few),
                "known": lambda: known(make, args.few, folder / "vae"),
            }[name]()
            print(name, json.dumps(scores[name], indent=1), flush=True)
            if args.json is not None:
                args.json.write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main()
