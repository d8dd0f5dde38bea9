"""What every score is made of: true clips, clips that the engine makes, and how both are read."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import reader
import torch
import world
from evaluate import facts
from sheets import Sheets

import sora_engine as sora
from sora_engine.denoise.known import to_unit_range
from sora_engine.vae.decoder import VideoDecoder

NEAR = 0.12
"""How far, in short sides, a centre may lie from the true one to count as in its place."""

KEPT_DB = 30.0
"""What counts as kept: PSNR of known frames against the autoencoder's own round trip of them."""

Size = tuple[int, int]
Facts = dict[str, bool]


def rendered(scene: world.Scene, num_frames: int, start: int = 0) -> np.ndarray:
    return (scene.render(num_frames, start) * 255).round().to(torch.uint8).numpy()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = float(((a.astype(np.float64) - b) ** 2).mean())
    return 10 * np.log10(255**2 / max(error, 1e-3))


def changes(frames: np.ndarray) -> np.ndarray:
    """Mean change of a pixel from each frame to the next, in levels of 255: `[n - 1]`."""
    steps = (np.abs(b.astype(np.int16) - a).mean() for a, b in itertools.pairwise(frames))
    return np.fromiter(steps, float)


class Clip:
    """A clip and what the reader finds in it, looked up once."""

    def __init__(self, frames: np.ndarray) -> None:
        self.frames = frames

    @cached_property
    def reading(self) -> reader.SceneReading:
        return reader.read(self.frames)

    def right(self, scene: world.Scene) -> Facts:
        """Which facts of the scene it shows."""
        return facts(scene, self.reading)

    def apart(self, other: Clip, where: np.ndarray | None = None) -> float:
        """Median distance of the two clips' sprites, in short sides; 9 where one has none.

        where: bool `[n]`, the frames that count; None stands for all.
        """
        mine, others = self.reading.sprites, other.reading.sprites
        if not mine or not others:
            return 9.0
        period = np.array(self.frames.shape[2:0:-1])
        step = (mine[0].path - others[0].path + period / 2) % period - period / 2
        far = np.linalg.norm(step, axis=1)
        return float(np.median(far if where is None else far[where])) / min(self.frames.shape[1:3])


class Bench:
    """An engine, and the scenes that it is scored on: combinations that training never shows."""

    def __init__(
        self,
        engine: sora.Engine,
        *,
        path: str,
        count: int,
        sizes: Sequence[Size],
        num_frames: int,
        steps: int | None,
        sheets: Path | None,
    ) -> None:
        self.engine, self.model, self.path = engine, engine.model, path
        self.count, self.sizes, self.num_frames = count, list(sizes), num_frames
        self.sheets = Sheets(sheets)
        self.options: dict[str, Any] = {} if steps is None else {"num_inference_steps": steps}
        self._truth: dict[tuple[int, int], list[Clip]] = {}
        self._trips: dict[int, list[np.ndarray]] = {}

    def scenes(
        self, seed: int, count: int | None = None, sizes: Sequence[Size] | None = None
    ) -> list[world.Scene]:
        """Scenes of one sprite, going round the sizes."""
        rng = random.Random(seed)
        size = itertools.cycle(sizes or self.sizes)
        return [
            world.sample_scene(rng, *next(size), sprites=1, unseen=True)
            for _ in range(count or self.count)
        ]

    def truth(self, seed: int, num_frames: int | None = None) -> list[Clip]:
        """The scenes of a seed as true clips, drawn once for all tasks that share them."""
        n = num_frames or self.num_frames
        if (seed, n) not in self._truth:
            self._truth[seed, n] = [Clip(rendered(scene, n)) for scene in self.scenes(seed)]
        return self._truth[seed, n]

    def round_trips(self, seed: int) -> list[np.ndarray]:
        """The autoencoder's own frames of the true clips."""
        if seed not in self._trips:
            self._trips[seed] = [self.round_trip(clip.frames) for clip in self.truth(seed)]
        return self._trips[seed]

    @torch.inference_mode()
    def round_trip(self, frames: np.ndarray) -> np.ndarray:
        """What the autoencoder alone makes of a clip."""
        latents = self.model.vae.encode(to_unit_range(frames))[0].float()
        decoder = VideoDecoder(self.model.vae, self.model.vae_dtype, self.model.device)
        return torch.cat(list(decoder.decode(latents, wraps=False))).numpy()

    def make(self, requests: Sequence[sora.VideoRequest], **options: Any) -> list[Clip]:
        """What the engine makes of the requests, all in company, each with its number as seed."""
        options = {**self.options, **options}
        seeded = [dataclasses.replace(r, seed=i, **options) for i, r in enumerate(requests)]
        return [Clip(video.frames) for video in self.engine.generate(seeded)]


def asked(scene: world.Scene) -> dict[str, Any]:
    """What a request says of a scene."""
    return {"prompt": scene.caption(size=True), "height": scene.height, "width": scene.width}


def mean(values: Sequence[float] | np.ndarray, digits: int = 3) -> float:
    return round(float(np.mean(values)), digits)


def shares(made: Sequence[Facts], true: Sequence[Facts]) -> dict[str, Any]:
    """The share of clips that are right in each fact, beside the true clips'."""
    out: dict[str, Any] = {"clips": len(made)}
    for name in made[0]:
        ours, theirs = mean([m[name] for m in made]), mean([t[name] for t in true])
        share = round(ours / theirs, 3) if theirs else None
        out[name] = {"made": ours, "true": theirs, "share": share}
    return out


def against_truth(
    scenes: Sequence[world.Scene], made: Sequence[Clip], true: Sequence[Clip]
) -> dict[str, Any]:
    """As `shares`, of what the reader finds of the scenes."""
    return shares(
        [clip.right(scene) for scene, clip in zip(scenes, made, strict=True)],
        [clip.right(scene) for scene, clip in zip(scenes, true, strict=True)],
    )


def recoloured(scene: world.Scene) -> world.Scene:
    """The scene with its sprite in the next colour that is not the background's."""
    (sprite,) = scene.sprites
    names = [name for name in world.COLOURS if name not in (scene.background, sprite.colour)]
    other = names[sum(map(ord, sprite.colour)) % len(names)]
    return dataclasses.replace(scene, sprites=(dataclasses.replace(sprite, colour=other),))
