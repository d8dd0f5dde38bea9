"""Files that are no sessions and no recordings, and those that are damaged, are told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import sora_engine as sora
from tests.unit.world_folder import WORLD, save_world

LIMITS = sora.Limits(pack_tokens=512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def engine(folder) -> Iterator[sora.Engine]:
    with sora.Engine.from_pretrained(folder, device="cpu", limits=LIMITS) as made:
        yield made


@pytest.fixture
def world(engine) -> Iterator[sora.Session]:
    with engine.open_session(WORLD) as opened:
        yield opened


def test_files_that_are_no_sessions_are_told(engine, world, folder, tmp_path):
    world.step(sora.Action("right"))
    path = world.save(tmp_path / "good.world")
    text = tmp_path / "text.world"
    text.write_text("a world")
    save_file({"latents": torch.zeros(2)}, tmp_path / "other.world")
    half = tmp_path / "half.world"
    half.write_bytes(path.read_bytes()[:-100])
    for file, words in (
        (tmp_path / "none.world", "cannot be read as a saved session"),
        (text, "cannot be read as a saved session"),
        (half, "cannot be read as a saved session"),
        (tmp_path / "other.world", "this is no saved session of this version: it holds 1 tensors"),
    ):
        with pytest.raises(sora.CheckpointError, match=words) as caught:
            engine.reopen_session(file)
        assert str(file) in str(caught.value)
    with pytest.raises(sora.CheckpointError, match="no saved job of this version"):
        engine.resume(path)
    with pytest.raises(sora.RequestError, match="a saved session must be a path"):
        engine.reopen_session(3)
    with pytest.raises(OSError, match="no file"):
        world.save("")
    other = save_world(tmp_path / "elsewhere", seed=1)
    with sora.Engine.from_pretrained(other, device="cpu", limits=LIMITS) as theirs:
        with pytest.raises(sora.CheckpointError, match="saved from another model: weights"):
            theirs.reopen_session(path)
        with world.record(tmp_path / "play.mp4"):
            world.step()
        with pytest.raises(sora.CheckpointError, match="recorded from another model: weights"):
            theirs.replay(tmp_path / "play.mp4")


@pytest.mark.parametrize(
    "damage",
    [
        lambda said, tensors: said.update(context=[9]),
        lambda said, tensors: said.update(context=[]),
        lambda said, tensors: said["moments"].pop(),
        lambda said, tensors: said.pop("log"),
        lambda said, tensors: said.update(log=[[{"press": ["right"]}, 0]]),
        lambda said, tensors: said["request"].update(strength=1),
        lambda said, tensors: said.update(decoder={"latent_frames": 2, "caches": [True] * 99}),
        lambda said, tensors: tensors.pop("frames"),
        lambda said, tensors: tensors.update(latents=tensors["latents"].half()),
        lambda said, tensors: tensors.update(latents=tensors["latents"][:, :, :2].contiguous()),
    ],
)
def test_a_damaged_file_is_told(engine, world, tmp_path, damage):
    world.step(sora.Action("right"))
    path = world.save(tmp_path / "a.world")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        said = json.loads(file.metadata()["sora_session"])
    damage(said, tensors)
    save_file(tensors, path, {"sora_session": json.dumps(said)})
    with pytest.raises(sora.CheckpointError, match="is damaged as a saved session"):
        engine.reopen_session(path)


def test_recordings_that_cannot_be_are_told(engine, world, tmp_path):
    for path, words in (
        (tmp_path / "play.gif", "a session is recorded to an .mp4 file"),
        (tmp_path / "none" / "play.mp4", "does not exist"),
    ):
        with pytest.raises(sora.MediaError, match=words):
            world.record(path)
    with (
        pytest.raises(sora.MediaError, match="at least one frame"),
        world.record(tmp_path / "a.mp4"),
    ):
        pass
    recording = world.record(tmp_path / "a.mp4")
    world.step()
    recording.__exit__(RuntimeError, RuntimeError("mine"), None)
    assert list(tmp_path.iterdir()) == []
    video = engine.generate(sora.VideoRequest("a cat", num_frames=5))
    video.save(tmp_path / "video.mp4")
    with pytest.raises(sora.MediaError, match="is no recording of a session"):
        engine.replay(tmp_path / "video.mp4")
    with engine.open_session(WORLD, memory=world.memory), world.record(tmp_path / "two.mp4"):
        world.step()
    with pytest.raises(sora.SessionError, match="another session had the same memory"):
        engine.replay(tmp_path / "two.mp4")
