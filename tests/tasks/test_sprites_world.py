"""The sprite world's reader against its renderer: what is drawn is what is read."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "sprites"))

import reader
import world


def facts(scene: world.Scene, *, moving: bool) -> tuple[str, set[tuple[str, ...]]]:
    """What a reading of `scene` has to say. A sprite that grows has no size."""
    return scene.background, {
        (
            s.colour,
            s.shape,
            "" if s.motion == "grows" else s.size,
            s.motion if moving else "",
        )
        for s in scene.sprites
    }


def reading_facts(scene: world.Scene, frames: torch.Tensor) -> tuple[str, set[tuple[str, ...]]]:
    reading = reader.read((frames * 255).round().to(torch.uint8))
    growing = {s.colour for s in scene.sprites if s.motion == "grows"}
    return reading.background, {
        (s.colour, s.shape, "" if s.colour in growing else s.size, s.motion or "")
        for s in reading.sprites
    }


def every_motion_and_size() -> Iterator[object]:
    """Quick are one size for each motion, in turn."""
    for i, (height, width) in enumerate([(64, 64), (64, 160), (160, 96), (128, 128)]):
        for j, motion in enumerate(world.MOTIONS):
            marks = [pytest.mark.slow] if i != j % 4 else []
            yield pytest.param(motion, height, width, marks=marks)


@pytest.mark.parametrize(("motion", "height", "width"), list(every_motion_and_size()))
def test_reads_every_motion_shape_and_size(motion: str, height: int, width: int) -> None:
    rng = random.Random(f"{motion} {height} {width}")
    wanted = {(shape, size) for shape in world.SHAPES for size in world.SIZES}
    if motion == "grows":
        wanted = {(shape, "small") for shape in world.SHAPES}
    while wanted:
        scene = world.sample_scene(rng, height, width, sprites=1, unseen=rng.random() < 0.5)
        sprite = scene.sprites[0]
        if sprite.motion != motion or (sprite.shape, sprite.size) not in wanted:
            continue
        wanted.discard((sprite.shape, sprite.size))
        frames = scene.render(9, start=rng.randrange(500))
        assert reading_facts(scene, frames) == facts(scene, moving=True), scene.caption(size=True)


@pytest.mark.parametrize("num_frames", [1, 17, 33])
def test_reads_noisy_clips_of_one_and_two_sprites(num_frames: int) -> None:
    rng = random.Random(num_frames)
    noise = torch.Generator().manual_seed(0)
    for count in (1, 2, 2, 2, 1, 2):
        height, width = rng.randrange(64, 161, 16), rng.randrange(64, 161, 16)
        scene = world.sample_scene(rng, height, width, sprites=count)
        frames = scene.render(num_frames)
        frames = (frames + 0.04 * torch.randn(frames.shape, generator=noise)).clamp(0, 1)
        want = facts(scene, moving=num_frames > 1)
        assert reading_facts(scene, frames) == want, scene.caption(size=True)


def test_every_colour_and_background_is_read() -> None:
    pairs = [(c, b) for c in world.COLOURS for b in world.BACKGROUNDS if b != c]
    for colour, background in pairs:
        sprite = world.Sprite(colour, "circle", "small", "still", 20.0, 30.0, 0.0)
        scene = world.Scene(background, (sprite,), 64, 64)
        reading = reader.read(scene.render(1))
        assert (reading.background, [s.colour for s in reading.sprites]) == (background, [colour])
        assert np.abs(reading.sprites[0].path[0] - [20, 30]).max() < 0.1


def test_the_world_is_stationary() -> None:
    """A clip's later stretch is read as its first one is, and straight motion wraps."""
    rng = random.Random(3)
    for _ in range(8):
        scene = world.sample_scene(rng, 80, 112)
        want = facts(scene, moving=True)
        for start in (0, 41, 479):
            assert reading_facts(scene, scene.render(9, start=start)) == want
    sprite = world.Sprite("red", "star", "small", "right", 30.0, 32.0, 0.0)
    scene = world.Scene("white", (sprite,), 64, 96)
    period = 96 / world.SPEED
    later = world.Sprite("red", "star", "small", "right", 30.0, 32.0, period)
    again = world.Scene("white", (later,), 64, 96)
    torch.testing.assert_close(scene.render(3), again.render(3), atol=2e-3, rtol=0)


def test_a_crop_is_a_part_of_the_whole() -> None:
    scene = world.sample_scene(random.Random(5), 96, 128, sprites=2)
    whole = scene.render(3, start=7)
    torch.testing.assert_close(
        scene.render(3, start=7, crop=(16, 40, 48, 64)), whole[:, 16:64, 40:104]
    )


def test_an_edge_pixel_is_covered_as_far_as_the_shape_covers_it() -> None:
    """Analytic anti-aliasing against counting 16 x 16 points in each pixel."""
    for shape in world.SHAPES:
        points = (torch.arange(40 * 16) + 0.5) / 16 - 20.3
        dense = world.distance(shape, points[None, :], points[:, None], 12.0) < 0
        counted = dense.float().reshape(40, 16, 40, 16).mean(dim=(1, 3))
        centres = torch.arange(40) + 0.5 - 20.3
        cover = (0.5 - world.distance(shape, centres[None, :], centres[:, None], 12.0)).clamp(0, 1)
        assert (cover - counted).abs().mean() < 0.004, shape
        area = float(cover.sum())
        assert area == pytest.approx(world.AREA[shape] * 144, rel=0.02), shape


def test_captions_say_what_is_shown_and_leave_things_out_at_times() -> None:
    sprites = (
        world.Sprite("orange", "circle", "large", "right", 20.0, 16.0, 0.0),
        world.Sprite("blue", "square", "small", "grows", 20.0, 48.0, 0.0),
    )
    scene = world.Scene("white", sprites, 64, 64)
    assert scene.caption() == (
        "an orange circle moves right and a blue square grows on a white background"
    )
    assert scene.caption(size=True).startswith("a large orange circle moves right and a blue")
    said = [scene.caption(random.Random(i)) for i in range(300)]
    for word in ("orange", "circle", "large", "moves right", "grows", "on a white background"):
        assert 0.35 < sum(word in text for text in said) / 300 < 0.99, word
    assert any("shape" in text for text in said)


def test_held_out_combinations_are_never_sampled_for_training() -> None:
    rng = random.Random(0)
    assert not any(world.held_out(world.sample_scene(rng, 64, 64)) for _ in range(200))
    unseen = [world.sample_scene(rng, 64, 64, unseen=True) for _ in range(200)]
    assert all(world.held_out(scene) for scene in unseen)
    # An eighth of all combinations, spread over every colour, shape and motion.
    sprites = [s for scene in unseen for s in scene.sprites]
    assert {s.colour for s in sprites} == set(world.COLOURS)
    assert {s.shape for s in sprites} == set(world.SHAPES)
    assert {s.motion for s in sprites} == set(world.MOTIONS)
