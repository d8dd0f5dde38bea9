"""Sessions: the latents that a rollout laid out by hand gives, marks, files, recordings."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import sora_engine as sora
from sora_engine.denoise.drive import sight
from sora_engine.denoise.packing import Packer, Segment
from sora_engine.io.provenance import read_provenance
from sora_engine.io.video_reader import read_video
from sora_engine.runtime.session_step import seed_of_step
from sora_engine.samplers.noise import initial_noise, noise_for
from sora_engine.vae.decoding import to_uint8
from tests.unit.world_folder import BUTTONS, MOVES, WORLD, latents, played, same, save_world

WALK = "right*2 act down right act left*3 up*2 act"
LIMITS = sora.Limits(pack_tokens=512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def engine(folder) -> Iterator[sora.Engine]:
    with sora.Engine.from_pretrained(folder, device="cpu", limits=LIMITS) as made:
        yield made


# What a step is.


def by_hand(engine: sora.Engine, text: str, seed: int, context: int = 2, recall: int = 2):
    """A rollout from the transformer's segments alone: latents `[C, 1, H, W]` and frames."""
    model = engine.loaded_model
    transformer, packer = model.transformer(0), Packer((1, 2, 2), torch.device("cpu"))
    (words,) = transformer.encode_contexts(model.prompt_encoder.encode(["a red circle"]))
    made, rows, places, frames, state = [], [], [], [], None
    seen: dict[tuple[int, int], int] = {}
    actions = [None, *text]
    for k, button in enumerate(actions):
        down, right = MOVES.get(button, (0, 0))
        place = (places[-1][0] + down / 8, places[-1][1] + right / 8) if k else (0.0, 0.0)
        cells = {((place[0] + r) % 20, (place[1] + c) % 20) for r in range(4) for c in range(4)}
        before = list(range(max(0, k - context), k))
        owners = [seen[cell] for cell in cells if cell in seen and seen[cell] not in before]
        often = sorted(set(owners), key=lambda i: (owners.count(i), i), reverse=True)
        picked = sorted(often[:recall])
        rows.append([float(button == name) for name in BUTTONS])
        places.append(place)
        shown = [*picked, *before]
        steps = 2 if k else 3
        levels = [1 - i / steps for i in range(steps + 1)]
        own = seed if k == 0 else seed_of_step(seed, k)
        sample = initial_noise(own, (16, 1, 4, 4))
        told = torch.tensor([places[i] for i in [*shown, k]])
        near = (told - torch.tensor(place) + 10) % 20 - 10
        for i in range(steps):
            segment = Segment(
                torch.cat([*(made[j] for j in shown), sample], dim=1),
                torch.tensor([0.0] * len(shown) + [1000 * levels[i]]),
                ((words, len(shown) + 1),),
                sees=sight(len(picked), len(before)),
                num_anchors=len(picked),
                actions=torch.tensor([rows[j] for j in [*shown, k]]),
                places=near,
            )
            batch = packer.pack([segment])
            with torch.inference_mode():
                (predicted,) = packer.unpack(transformer(batch), batch, 16)
            clean = sample - levels[i] * predicted[:, -1:]
            fresh = noise_for(own, i, (16, len(before) + 1, 4, 4))[:, -1:]
            sample = (1 - levels[i + 1]) * clean + levels[i + 1] * fresh
        made.append(sample)
        seen |= dict.fromkeys(cells, k)
        with torch.inference_mode():
            chunk, state = model.vae.decode_chunk(sample[None], state)
        frames.append(to_uint8(chunk[0]).numpy())
    return made, frames


def test_a_session_is_the_rollout_that_is_laid_out_by_hand(engine):
    buttons = ["right", "right", "right", "act", "left", "left", "left", "down", "up", "up", "act"]
    expected, frames = by_hand(engine, buttons, seed=7)
    with engine.open_session(WORLD) as world:
        found, shown = [latents(world)], [world.frames]
        for button in buttons:
            shown.append(world.step(sora.Action(button)))
            found.append(latents(world))
        assert world.place == (-8.0, 0.0)
        assert world.log[:2] == [(sora.Action("right"), 3), (sora.Action("act"), 1)]
    for k, (own, reference) in enumerate(zip(found, expected, strict=True)):
        assert (own - reference).norm() / reference.norm() < 1e-5, k
    for own, reference in zip(shown, frames, strict=True):
        assert own.shape == reference.shape
        assert abs(own.astype(int) - reference).max() <= 1  # a rounding of a latent may be another
    assert [len(chunk) for chunk in shown] == [1] + [4] * len(buttons)


def test_noise_is_a_function_of_seed_and_step():
    """The numbers stand here because recordings are made again from them."""
    assert seed_of_step(7, 0) == 7
    assert seed_of_step(7, 1) == 3_130_849_555_803_574_188
    seeds = {seed_of_step(seed, step) for seed in range(50) for step in range(50)}
    assert len(seeds) == 50 * 50
    assert max(seeds) < 2**63


def test_the_first_frame_is_the_picture_of_its_seed(engine):
    picture = engine.generate(
        sora.VideoRequest("a red circle", seed=7, num_frames=1, sigmas=[1.0, 2 / 3, 1 / 3])
    )
    with engine.open_session(WORLD) as world:
        assert np.array_equal(world.frames, picture.frames)
        given = replace(WORLD, first=picture.frames[0], seed=3)
    with engine.open_session(given) as world:
        assert world.frames.shape == (1, 32, 32, 3)
        first = latents(world)
    video = torch.from_numpy(picture.frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.inference_mode():
        assert torch.equal(engine.loaded_model.vae.encode(video)[0], first)


def test_each_of_its_inputs_counts(engine):
    way = "right*2 act left*3"

    def last(request: sora.SessionRequest, text: str = way) -> torch.Tensor:
        with engine.open_session(request) as world:
            played(world, text)
            return latents(world)

    usual = last(WORLD)
    assert torch.equal(last(WORLD), usual)
    for other in (
        {"seed": 8},
        {"prompt": "a blue square"},
        {"context": 1},
        {"recall": 0},
        {"num_inference_steps": 3},
        {"guidance_scale": 3.0, "negative_prompt": "blue"},
        {"solver": "euler"},
        {"sigmas": [1.0, 0.6]},
        {"memory_bytes": 0},
    ):
        assert not torch.equal(last(replace(WORLD, **other)), usual), other
    assert not torch.equal(last(WORLD, way + " left"), last(WORLD, way + " right"))
    with engine.open_session(WORLD) as world:
        played(world, "right*2 act left*2")
        world.step(sora.Action("left", prompt="a blue square"))
        assert world.prompt == "a blue square"
        assert not torch.equal(latents(world), usual)


# The past.


@pytest.mark.parametrize("seed", range(3))
def test_from_a_mark_the_same_actions_make_the_same_bytes(engine, seed):
    rng = random.Random(seed)
    words = [rng.choice(BUTTONS) for _ in range(12)]
    with engine.open_session(replace(WORLD, seed=seed)) as world:
        for _ in range(3):
            played(world, " ".join(words[: rng.randrange(1, 12)]))
            mark, m = world.mark(), rng.randrange(1, 10)
            then, stats, place = world.frames, world.stats, world.place
            way = " ".join(rng.choice(BUTTONS) for _ in range(m))
            once = played(world, way)
            memory = world.stats.num_places
            world.rewind(mark)
            assert np.array_equal(world.frames, then)
            assert (world.stats.num_places, world.place) == (stats.num_places, place)
            assert same(once, played(world, way))
            assert world.stats.num_places == memory
            world.rewind(steps=m)
            assert same(once, played(world, way))
            with world.branch(mark) as twin:
                assert twin.num_steps == mark.step
                assert same(once, played(twin, way))
                assert same(played(world, "act"), played(twin, "act"))
            world.rewind(mark)
            assert not same(once, played(world, " ".join(["still"] * m)))


def test_going_back_leads_to_what_was_before_that(engine):
    with engine.open_session(WORLD) as world:
        played(world, "right*4")
        early = world.mark()
        late = played(world, "left act*3")
        world.rewind(early)
        world.rewind(steps=2)  # what lay before the mark is still kept
        assert world.num_steps == 2
        world.rewind(early)
        assert same(late, played(world, "left act*3"))
        world.rewind(steps=0)
        assert world.num_steps == 8
    short = replace(WORLD, rewind=1)
    with engine.open_session(short) as world:
        played(world, "right*4")
        world.rewind(steps=1)
        with pytest.raises(
            sora.MarkError, match=r"1 steps back .* the oldest step .* is 3, 0 back"
        ):
            world.rewind(steps=1)


def test_a_saved_session_goes_on_in_another_process(engine, folder, tmp_path):
    path = tmp_path / "meadow.world"
    with engine.open_session(replace(WORLD, guidance_scale=2.0)) as world:
        played(world, WALK)
        mark = world.mark()
        world.step(sora.Action(prompt="a blue square"))
        assert world.save(path) == path
        world.save(tmp_path / "mark.world", mark)
        expected = played(world, "left act right*4")
        world.rewind(mark)
        from_mark = played(world, "up*2")
    code = f"""
import hashlib, sys
import numpy as np
import sora_engine as sora
engine = sora.Engine.from_pretrained({str(folder)!r}, device="cpu")
with engine.open_session(sora.SessionRequest("a cat")) as other:
    other.step()
with engine.reopen_session({str(path)!r}) as world:
    assert world.num_steps == 13 and world.prompt == "a blue square", world.log
    frames = [world.step(action) for action in world.actions.parse("left act right*4")]
print(hashlib.sha256(np.concatenate(frames).tobytes()).hexdigest())
engine.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    digest = hashlib.sha256(np.concatenate(expected).tobytes()).hexdigest()
    assert done.stdout.strip() == digest
    with engine.reopen_session(tmp_path / "mark.world") as world:
        assert same(from_mark, played(world, "up*2"))
        with pytest.raises(sora.MarkError, match="the oldest step that is kept is 12, 2 back"):
            world.rewind(steps=3)


def test_a_recording_is_made_again_from_its_actions(engine, tmp_path):
    path, again = tmp_path / "play.mp4", tmp_path / "again.mp4"
    with engine.open_session(WORLD) as world:
        played(world, "right*3")
        with world.record(path):
            shown = played(world, "act right*2")
            world.rewind(steps=2)
            shown += [world.step(sora.Action("down", prompt="a blue square"))]
            assert not path.exists()
        played(world, "up")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["play.mp4"]
    frames = list(engine.replay(path, record=again))
    assert same(shown, frames)
    assert again.read_bytes() == path.read_bytes()
    video, fps = read_video(path)[:2]
    assert (len(video), fps) == (16, 16)
    said = read_provenance(path)
    assert (said.prompt, said.seed) == ("a red circle", 7)
    assert said.settings["session"]["parts"][1] == [
        [[{"press": ["right"]}, 3], [{"press": ["act"]}, 1]],
        [[{"press": ["down"], "prompt": "a blue square"}, 1]],
    ]
    assert said.settings["session"]["alone"] is True


def test_a_recording_from_a_picture_holds_it(engine, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    with engine.open_session(replace(WORLD, first=picture)) as world:
        picture[:] = 0  # the session has its own
        with world.record(tmp_path / "play.mp4"):
            shown = played(world, "right act")
    assert same(shown, list(engine.replay(tmp_path / "play.mp4")))
    with engine.open_session(replace(WORLD, first=picture)) as world:
        assert not same(shown, played(world, "right act"))


def test_a_session_is_told_as_json(engine):
    with engine.open_session(replace(WORLD, exact=True)) as world:
        said = json.loads(json.dumps(world.settings.to_json()))
        assert set(said) == set(sora.SessionRequest.__slots__) - {"first"}
