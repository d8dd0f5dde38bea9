"""A checkpoint's own defaults, from its generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sora_engine.errors import CheckpointError
from sora_engine.models.video_model import read_generation_config


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
    ],
)
def test_what_is_not_known_is_named(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        read_generation_config(tmp_path)
