"""A video's first frame and its sheet: made once somebody asks, of frames that are known."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sora_engine.io.video_writer import write_video
from sora_engine.serve import pictures
from sora_engine.serve.files import Files
from sora_engine.serve.pictures import picture_of

NAME = "video_0_a"
FRAMES = 31
SHOWN = [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30]


def colour(frame: int) -> tuple[int, int, int]:
    return 40 + 6 * frame, 230 - 6 * frame, 128


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    made = Files(tmp_path / "data")
    clip = np.stack([np.full((300, 600, 3), colour(i), np.uint8) for i in range(FRAMES)])
    write_video(made.begin(NAME) / "video.mp4", clip, 8)
    made.place(NAME)
    yield made
    made.close()


def test_they_show_the_frames_that_they_should(files: Files) -> None:
    with Image.open(picture_of(files, NAME, "thumbnail", FRAMES)) as picture:
        assert (picture.format, picture.size) == ("WEBP", (512, 256))
        assert np.abs(np.asarray(picture).astype(int) - colour(0)).max() < 12
    with Image.open(picture_of(files, NAME, "spritesheet", FRAMES)) as sheet:
        assert (sheet.format, sheet.size) == ("WEBP", (4 * 256, 4 * 128))
        cells = np.asarray(sheet).astype(int).reshape(4, 128, 4, 256, 3).swapaxes(1, 2)
    centres = cells.reshape(16, 128, 256, 3)[:, 40:90, 60:200].mean((1, 2))
    assert np.abs(centres - [colour(i) for i in SHOWN]).max() < 6
    few = Image.open(io.BytesIO(pictures.spritesheet(files.video(NAME) / "video.mp4", 3)))
    assert few.size == (3 * 256, 128)


def test_they_are_made_once(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    first = picture_of(files, NAME, "thumbnail", FRAMES).read_bytes()
    monkeypatch.setitem(pictures.MAKERS, "thumbnail", lambda *_: b"another")
    assert picture_of(files, NAME, "thumbnail", FRAMES).read_bytes() == first
    assert {path.name for path in files.video(NAME).iterdir()} == {"video.mp4", "thumbnail.webp"}
    assert not list(files.tmp.iterdir())


def test_of_a_video_that_goes_nothing_stays(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile(_video: Path, _frames: int) -> bytes:
        shutil.rmtree(files.video(NAME))
        return b"late"

    monkeypatch.setitem(pictures.MAKERS, "thumbnail", meanwhile)
    for _ in range(2):  # it goes while its picture is made, and has gone
        with pytest.raises(FileNotFoundError):
            picture_of(files, NAME, "thumbnail", FRAMES)
        assert not list(files.tmp.iterdir())
        assert not files.video(NAME).exists()
