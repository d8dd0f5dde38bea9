"""A checkpoint's own defaults, from its generation_config.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import sora_engine as sora
from sora_engine.errors import CheckpointError
from sora_engine.models.generation_config import read_generation_config
from sora_engine.models.registry import BUNDLED


def test_no_file_sets_nothing(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == {}


def test_what_stands_in_it_is_taken(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"solver": "renoise", "_note": 1}')
    assert read_generation_config(tmp_path) == {"solver": "renoise"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 4}, r"unknown keys \['steps'\]; known are .*'num_inference_steps'"),
        ({"solver": "heun"}, "solver must be one of .*'unipc'.*, got 'heun'"),
        ({"window_schedule": "x"}, "window_schedule must be one of .*'chained'.*, got 'x'"),
        ({"text_tokens": 0}, "text_tokens must be an integer of at least 1, got 0"),
        ({"text_tokens": "512"}, "text_tokens must be an integer of at least 1, got '512'"),
    ],
)
def test_what_is_not_known_is_named(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        read_generation_config(tmp_path)


@pytest.mark.parametrize(
    ("settings", "index", "message"),
    [
        ({"max_window": 0}, {}, "window length must be at least 1 latent frame, got 0"),
        ({"max_window": 2, "window_overlap": None}, {}, "at least 2 latent frames.*got overlap 1"),
        ({"window_overlap": 1}, {}, "share at least 2 latent frames.*got overlap 1"),
        ({"window_overlap": 5}, {}, "overlap must be from 0 to 4 latent frames.*got 5"),
        ({"window_anchors": 5}, {}, "window anchors must be from 0 to 4 latent frames.*got 5"),
        ({"window_anchors": 1, "window_schedule": "static"}, {}, "got 1 with schedule 'static'"),
        ({}, {"expand_timesteps": False}, "'chained' takes a model .*expand_timesteps"),
        ({"height": "64"}, {}, "height must be an integer, got '64'"),
        ({"width": 0}, {}, "width must be an integer of at least 1, got 0"),
        ({"num_frames": None}, {}, "num_frames must be an integer of at least 1, got None"),
        ({"num_inference_steps": 4.5}, {}, "num_inference_steps must be an integer, got 4.5"),
        ({"fps": 0}, {}, "fps must be over 0, got 0"),
        ({"fps": "24"}, {}, "fps must be a number, got '24'"),
        ({"guidance_scale": float("nan")}, {}, "guidance_scale must be finite, got nan"),
        ({"guidance_scale": [5]}, {}, r"guidance_scale must be a number, got \[5\]"),
        ({"guidance_scale_2": True}, {}, "guidance_scale_2 must be a number, got True"),
        ({"negative_prompt": None}, {}, "negative_prompt must be a string, got None"),
        ({"example_prompt": 7}, {}, "example_prompt must be a string, got 7"),
        ({"max_window": "5"}, {}, "max_window must be an integer, got '5'"),
    ],
)
def test_values_that_cannot_be_are_refused_when_a_model_is_loaded(
    tmp_path: Path, settings: dict[str, object], index: dict[str, bool], message: str
) -> None:
    shutil.copytree(BUNDLED["sprites"], tmp_path, dirs_exist_ok=True)
    for name, changes in (("generation_config.json", settings), ("model_index.json", index)):
        path = tmp_path / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message) as raised:
        sora.Engine.from_pretrained(tmp_path)
    assert "generation_config.json" in str(raised.value)


@pytest.mark.parametrize("tokens", [1, 2, 3, 65])
def test_a_model_of_few_text_tokens_is_planned_and_runs(tmp_path: Path, tokens: int) -> None:
    """Lengths between which the plan is drawn coincide there."""
    shutil.copytree(BUNDLED["sprites"], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"text_tokens": tokens}))
    request = sora.VideoRequest(
        "a red circle " * 50, height=16, width=16, num_frames=1, num_inference_steps=1, seed=1
    )
    with sora.Engine.from_pretrained(tmp_path, device="cpu") as engine:
        assert engine.plan(request).peak > 0
        assert engine.generate(request).frames.shape == (1, 16, 16, 3)
