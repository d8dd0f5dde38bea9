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
from tests.unit.world_folder import save_world

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


def test_a_world_as_an_environment(tmp_path, capsys):
    """Episodes of one seed are the same, and are what a session does."""
    folder = save_world(tmp_path / "world")
    module = example("world_env")
    with sora.Engine.from_pretrained(folder) as engine:
        env = module.WorldEnv(engine, reward=lambda before, after: float(after.max()), max_steps=3)
        with pytest.raises(RuntimeError, match="reset begins an episode"):
            env.step(0)
        assert env.action_space.n == 6
        assert {env.action_space.sample() for _ in range(200)} == set(range(6))
        episodes = []
        for _ in range(2):
            first, info = env.reset(seed=7)
            assert (first.dtype, first.shape) == (np.uint8, (32, 32, 3))
            assert (info["step"], info["seed"], info["place"]) == (0, 7, (0.0, 0.0))
            steps = [env.step(action) for action in (4, 0, 5)]
            episodes.append([first, *(step[0] for step in steps)])
        assert [step[2:4] for step in steps] == [(False, False), (False, False), (False, True)]
        assert [step[1] for step in steps] == [float(step[0].max()) for step in steps]
        assert steps[-1][4]["place"] == (0.0, 8.0)
        assert np.array_equal(np.stack(episodes[0]), np.stack(episodes[1]))
        with engine.open_session(sora.SessionRequest(seed=7)) as world:
            for i, action in enumerate(world.actions.parse("right still act")):
                frames = world.step(action)
                assert np.array_equal(frames, steps[i][4]["frames"])
        other, _ = env.reset(seed=7, options={"prompt": "another meadow"})
        assert not np.array_equal(other, episodes[0][0])
        with pytest.raises(ValueError, match="action 6 is none of 0 to 5"):
            env.step(6)
        env.close()
    assert module.main(str(folder), 2) > 0
    assert "2 steps, at " in capsys.readouterr().out
