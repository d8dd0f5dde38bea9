"""The meadow: its rules, and a reader that is right about every true frame."""

from __future__ import annotations

import random

import numpy as np

from examples.meadow import reader, world


def test_every_true_frame_is_read_right() -> None:
    rng = random.Random(0)
    tiles = 0
    for _ in range(24):
        meadow = world.World(rng)
        for button in world.some_walk(rng, 16):
            frames = meadow.step(button)
            assert frames is not None
            found = reader.read(frames[-1], meadow.look)
            assert (found.tiles == meadow.tiles[meadow.seen()]).all()
            assert found.facing == meadow.facing
            assert found.unreadable == 0
            assert found.distance.max() == 0
            tiles += found.tiles.size
    assert tiles == 24 * 16 * 64


def test_the_look_is_read_where_it_shows() -> None:
    rng = random.Random(1)
    for _ in range(3):
        meadow = world.World(rng)
        meadow.tiles[meadow.place] = world.PAINT
        row, column = meadow.place
        meadow.tiles[row - 1, column] = world.BERRY
        frame = meadow.view()
        assert reader.look_of(frame) == meadow.look
        noisy = frame + np.random.default_rng(0).normal(0, 12, frame.shape)
        assert reader.look_of(noisy) == meadow.look
        assert (reader.read(noisy, meadow.look).tiles == meadow.tiles[meadow.seen()]).all()


def test_what_is_no_tile_is_told() -> None:
    meadow = world.World(random.Random(2), world.Look("green"))
    frame = meadow.view().astype(np.float32)
    frame[:8, :8] = (255.0, 0.0, 255.0)
    assert reader.read(frame, meadow.look).unreadable == 1


def test_who_walks_round_the_world_comes_home() -> None:
    meadow = world.World(random.Random(3), side=11)
    start, before = meadow.place, meadow.view()
    meadow.facing = "right"
    for _ in range(11):
        meadow.step("right")
    assert meadow.place == start
    meadow.facing = "down"
    assert np.array_equal(meadow.view(), before)


def test_acts_eat_and_paint_and_what_is_done_stays() -> None:
    meadow = world.World(random.Random(4))
    here = meadow.place
    meadow.tiles[here] = world.BERRY
    frames = meadow.step("act")
    assert frames is not None
    assert meadow.tiles[here] == world.EARTH
    kinds = [reader.read(frame, meadow.look).tiles[4, 4] for frame in frames]
    assert kinds == [world.BERRY, world.BERRY, world.EARTH, world.EARTH]
    meadow.step("act")
    assert meadow.tiles[here] == world.PAINT
    for button in ("left",) * 6 + ("right",) * 6:
        meadow.step(button)
    assert meadow.place == here
    assert reader.read(meadow.view(), meadow.look).tiles[4, 4] == world.PAINT


def test_a_step_pans_the_view_by_a_tile() -> None:
    meadow = world.World(random.Random(5))
    before = meadow.view()
    frames = meadow.step("right")
    assert frames is not None
    for i, frame in enumerate(frames, start=1):
        # Away from the player, all has moved by a quarter of a tile a frame.
        assert np.array_equal(frame[:24, : 64 - 2 * i], before[:24, 2 * i :])
    film = world.film(world.World(random.Random(6)), ["up", None, "act"])
    assert film.shape == (1 + 3 * world.FRAMES, world.SIDE, world.SIDE, 3)
    assert film.dtype == np.uint8
