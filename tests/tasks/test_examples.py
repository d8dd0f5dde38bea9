"""The examples of embedding run, and do what they say."""

from __future__ import annotations

import asyncio
import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import sora_engine as sora
from sora_engine.io.video_reader import read_video

FOLDER = Path(__file__).parents[2] / "examples" / "embedding"


def example(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def a_cache_of_their_own(tmp_path_factory):
    """The first engine measures the batches that saturate it, and the others find them there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def test_an_asyncio_service(capsys):
    videos = asyncio.run(example("asyncio_service").main())
    assert [video.frames.shape for video in videos] == [(9, 32, 32, 3)] * 3
    assert "a blue square: completed, step 6 of 6" in capsys.readouterr().out


def test_a_threaded_service():
    first, refused, *others = example("threaded_service").main()
    assert refused == "RefusedError: this service does not show secrets"
    for video in (first, *others):
        assert isinstance(video, sora.Video)
        assert (video.frames[:, -2:, -2:] == 255).all()


def test_a_batch_over_a_csv_of_prompts(tmp_path, capsys):
    table = tmp_path / "prompts.csv"
    table.write_text(
        "prompt,name,seed,height,width,num_frames,num_inference_steps\n"
        "a red circle,circle,1,32,32,5,2\n"
        "a bad size,bad,1,0,32,5,2\n"
        '"a square, blue",,2,32,48,9,2\n'
    )
    written = example("batch_csv").main(str(table), str(tmp_path / "out"))
    assert [path.name for path in written] == ["circle.mp4", "0002.mp4"]
    assert read_video(written[1])[0].shape == (9, 32, 48, 3)
    assert "row 2: height must be at least 1, got 0" in capsys.readouterr().err


def test_a_progress_ui_in_the_terminal():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120)
    videos = example("progress_ui").main(console=console)
    assert [len(video.frames) for video in videos] == [9, 17, 25]
    assert all(isinstance(video.frames, np.ndarray) for video in videos)
    assert "a green triangle grows" in text.getvalue()
    assert "completed" in text.getvalue()
