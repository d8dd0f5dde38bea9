"""The script that scores the tasks runs, and what it measures of true clips is as it must be."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "sprites"))

import score_tasks
import world


def test_every_task_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = ["image", "animate", "extend", "connect", "fill", "inpaint", "edit", "upscale"]
    tasks += ["draft", "loop", "shots"]
    arguments = ["--count", "1", "--steps", "4", "--frames", "17", "--size", "64x64"]
    arguments += ["--json", str(tmp_path / "scores.json"), "--sheets", str(tmp_path / "sheets")]
    monkeypatch.setattr(sys, "argv", ["score_tasks.py", *arguments, "--tasks", *tasks])
    score_tasks.main()
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores) == set(tasks)
    for name in ("animate", "fill", "connect"):
        assert {t["true"] for k, t in scores[name].items() if isinstance(t, dict)} == {1.0}, name
    # Frames at the beginning are decoded before any that is made: they are the round trip's own.
    assert scores["animate"]["kept_db"] > 50
    assert scores["extend"]["after"]["kept_db"] > 50
    sheets = {path.stem for path in (tmp_path / "sheets").iterdir()}
    assert {"animate", "extend-before", "loop", "shots", "inpaint", "edit-0.6"} <= sheets


def test_distance_is_on_the_torus_and_in_short_sides() -> None:
    sprite = world.Sprite("red", "circle", "large", "still", 60.0, 30.0, 0.0)
    near = world.Sprite("red", "circle", "large", "still", 12.0, 30.0, 0.0)
    clips = [score_tasks.rendered(world.Scene("white", (s,), 64, 64), 9) for s in (sprite, near)]
    every = np.ones(9, bool)
    assert score_tasks.apart(clips[0], clips[0], every) == pytest.approx(0, abs=0.01)
    assert score_tasks.apart(clips[0], clips[1], every) == pytest.approx(16 / 64, abs=0.02)


def test_a_latent_is_whole_only_where_all_its_frames_are_known() -> None:
    class Bench:
        class model:  # noqa: N801
            from sora_engine.request import LatentGrid

            grid = LatentGrid(channels=1, vae_spatial=8, patch=(1, 2, 2), time=4)

    known = np.array([1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1], bool)
    whole = score_tasks._whole_latents(Bench(), known)
    assert np.flatnonzero(whole).tolist() == [0, 1, 2, 3, 4, 9, 10, 11, 12]
