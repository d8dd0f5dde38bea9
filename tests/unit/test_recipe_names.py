"""Results carry the names of clips and never where they lay."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import sora_engine as sora
from sora_engine.errors import MediaError
from sora_engine.io.video_writer import write_video
from sora_engine.request.recipe import provenance_of, request_of
from tests.faults.engines import engine, sprites

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
SIZE = {"height": 16, "width": 16, "num_frames": 9, "num_inference_steps": 1, "seed": 1}


@pytest.fixture
def secret(tmp_path):
    """A folder of a server's own."""
    folder = tmp_path / "srv" / "tenant-4711" / "uploads"
    folder.mkdir(parents=True)
    return folder


def told(request):
    with engine() as made:
        return provenance_of(made.resolve(request), sprites())


def test_no_path_is_in_a_result(secret, tmp_path):
    clip = write_video(secret / "clip.gif", FRAMES, 8)
    folder = write_video(secret / "frames", FRAMES, 8)
    inner = told(sora.VideoRequest("inner", clips=[sora.Clip(clip)], **SIZE))
    made = sora.Video(frames=FRAMES, latents=None, fps=8, seed=1, provenance=inner)
    for request in (
        sora.VideoRequest("a", clips=[sora.Clip(str(clip))], **SIZE),
        sora.VideoRequest("a", clips=[sora.Clip(sora.Footage(clip, 0, 3), at=1)], **SIZE),
        sora.VideoRequest("a", clips=[sora.Clip(folder)], **SIZE),
        sora.VideoRequest("a", init=clip, strength=1.0, **{**SIZE, "num_frames": 5}),
        sora.VideoRequest("a", clips=[sora.Clip(made)], **SIZE),
    ):
        text = told(request).to_json()
        assert "tenant" not in text
        assert str(tmp_path) not in text
        assert '"name": "' in text


def test_names_of_a_path_that_ends_in_none(secret, monkeypatch):
    write_video(secret / "frames", FRAMES, 8)
    monkeypatch.chdir(secret / "frames")
    clip = told(sora.VideoRequest("a", clips=[sora.Clip(".")], **SIZE)).settings["clips"][0]
    assert clip["frames"]["name"] == "frames"


def none_made(_):
    raise AssertionError("nothing is to be made")


def test_a_clip_is_found_beside_the_result_or_in_the_current_folder(secret, tmp_path, monkeypatch):
    clip = write_video(secret / "clip.gif", FRAMES, 8)
    provenance = told(sora.VideoRequest("a", clips=[sora.Clip(clip)], **SIZE))
    beside, here = tmp_path / "results", tmp_path / "here"
    beside.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(MediaError, match="not there any more") as error:
        request_of(provenance, none_made, folder=beside)
    assert str(beside) in str(error.value)
    assert str(here) in str(error.value)
    assert "a copy of it, or a link to it, beside the result would work" in str(error.value)
    shutil.copy(clip, here)
    again = request_of(provenance, none_made, folder=beside)
    assert again.clips[0].frames.resolve() == here / "clip.gif"
    # One of the same name that is another: the hash decides, not the place.
    write_video(beside / "clip.gif", FRAMES[::-1], 8)
    again = request_of(provenance, none_made, folder=beside)
    assert again.clips[0].frames.resolve() == here / "clip.gif"
    (here / "clip.gif").unlink()
    with pytest.raises(MediaError, match="is not the file it was"):
        request_of(provenance, none_made, folder=beside)


def test_a_name_that_someone_made_a_path_of_does_not_leave_the_folder(secret, tmp_path):
    clip = write_video(secret / "clip.gif", FRAMES, 8)
    provenance = told(sora.VideoRequest("a", clips=[sora.Clip(clip)], **SIZE))
    settings = json.loads(json.dumps(provenance.settings))
    settings["clips"][0]["frames"]["name"] = str(clip)
    forged = sora.io.provenance.Provenance(prompt="a", seed=1, settings=settings)
    with pytest.raises(MediaError, match="not there any more"):
        request_of(forged, none_made, folder=tmp_path)


def test_results_of_before_are_read(secret):
    clip = write_video(secret / "clip.gif", FRAMES, 8)
    provenance = told(sora.VideoRequest("a", clips=[sora.Clip(clip)], **SIZE))
    settings = json.loads(json.dumps(provenance.settings))
    record = settings["clips"][0]["frames"]
    record["path"] = str(clip)
    del record["name"]
    older = sora.io.provenance.Provenance(prompt="a", seed=1, settings=settings)
    assert request_of(older, none_made).clips[0].frames == clip
