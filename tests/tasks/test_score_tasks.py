"""The script that scores the tasks runs, and what it measures of true clips is as it must be."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from sora_engine.request import GenerationDefaults, LatentGrid, SparsePlan, WindowPlan

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "sprites"))

import minute
import score_tasks
import size_table
import task_scores
import world
from score_report import minute_table, report
from scoring import Clip, rendered

ALL = [*score_tasks.QUICK, "edit", "minute", "sizes"]
SHEETS = {
    "animate": "animate",
    "extend_before": "extend-before",
    "loop": "loop",
    "shots": "shots",
    "inpaint": "inpaint",
    "edit": "edit-0.45",
}
WORDS = {
    "extend_before": ("| extend, before |", "![](sheets/extend-before.png)"),
    "edit": ("| edit, strength 0.45 |",),
    "loop": ("Loop: the seam's",),
    "minute": ("| 0-10 s |",),
}


@pytest.mark.parametrize(
    "tasks",
    [["animate", "extend_before", "edit"], pytest.param(ALL, marks=pytest.mark.slow)],
    ids=["three", "all"],
)
def test_tasks_are_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tasks: list[str]
) -> None:
    arguments = ["--count", "1", "--steps", "3", "--frames", "17", "--sizes", "64x64"]
    arguments += ["--json", str(tmp_path / "scores.json"), "--sheets", str(tmp_path / "sheets")]
    monkeypatch.setattr(sys, "argv", ["score_tasks.py", *arguments, "--tasks", *tasks])
    monkeypatch.setattr(minute, "SECONDS", 6)
    monkeypatch.setattr(minute, "STRETCH_S", 3)
    monkeypatch.setattr(size_table, "SIDES", (64,))
    monkeypatch.setattr("score_report.SIDES", (64,))
    score_tasks.main()
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores) == set(tasks)
    for name in {"animate", "fill", "connect"} & set(tasks):
        assert {t["true"] for k, t in scores[name].items() if isinstance(t, dict)} == {1.0}, name
    # Frames at the beginning are decoded before any that is made: they are the round trip's own.
    for name in {"animate", "extend_after"} & set(tasks):
        assert scores[name]["kept_db"] > 50, name
    if "minute" in tasks:
        assert scores["minute"]["frames"] == 49
    sheets = {path.stem for path in (tmp_path / "sheets").iterdir()}
    assert {SHEETS[name] for name in tasks if name in SHEETS} <= sheets
    told = (tmp_path / "scores.md").read_text()
    for words in (words for name in tasks for words in WORDS.get(name, ())):
        assert words in told


def test_windows_by_name_are_the_checkpoints_own() -> None:
    """Under its own schedule its overlap and anchors count; under another they do not."""
    values = {"height": 64, "width": 64, "num_frames": 33, "fps": 8.0, "num_inference_steps": 2}
    defaults = GenerationDefaults(
        **values,
        guidance_scale=1.0,
        max_window=9,
        window_schedule="chained",
        window_overlap=4,
        window_anchors=2,
    )
    chained = WindowPlan(9, 4, schedule="chained", anchors=2)
    assert minute.plan_named("chained", defaults) == chained
    assert minute.plan_named("static", defaults) == WindowPlan(9, 2, schedule="static")
    assert minute.plan_named("sparse", defaults) == SparsePlan(4)
    assert minute.plan_named("default", defaults) is None


def test_distance_is_on_the_torus_and_in_short_sides() -> None:
    sprite = world.Sprite("red", "circle", "large", "still", 60.0, 30.0, 0.0)
    near = world.Sprite("red", "circle", "large", "still", 12.0, 30.0, 0.0)
    one, other = (Clip(rendered(world.Scene("white", (s,), 64, 64), 9)) for s in (sprite, near))
    assert one.apart(one, np.ones(9, bool)) == pytest.approx(0, abs=0.01)
    assert one.apart(other) == pytest.approx(16 / 64, abs=0.02)


def test_a_latent_is_whole_only_where_all_its_frames_are_known() -> None:
    grid = LatentGrid(channels=1, vae_spatial=8, patch=(1, 2, 2), time=4)
    known = np.array([1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1], bool)
    whole = task_scores.whole_latents(grid, known)
    assert np.flatnonzero(whole).tolist() == [0, 1, 2, 3, 4, 9, 10, 11, 12]


def test_true_scenes_close_after_as_many_frames_as_are_made_of_them() -> None:
    rng = random.Random(0)
    for _ in range(20):
        scene = world.sample_scene(rng, 64, 64, sprites=1)
        n = task_scores.closes(scene, 4)
        assert n % 4 == 0
        np.testing.assert_array_equal(rendered(scene, 1, start=n), rendered(scene, 1))
        # What bounces begins on its ground, where it is fastest.
        bound = 1.4 if scene.sprites[0].motion == "bounces" else 1.2
        assert task_scores.seam(rendered(scene, n), 4) < bound
    # A jump is seen, and so is a frame that stands still where all others move.
    moves = rendered(world.Scene("white", (_mover(),), 64, 64), 32)
    assert task_scores.seam(moves[:-4], 4) > 1.5
    seams = task_scores.latent_borders(moves[:-4], 4)
    assert len(seams) == 7
    assert seams[0] == task_scores.seam(moves[:-4], 4) == max(seams)


def test_joints_and_drift_of_a_clip() -> None:
    frames = rendered(world.Scene("white", (_mover(),), 64, 64), 97)
    begins = np.array([13, 29, 45])
    assert minute.border_ratios(frames, begins, 4) == pytest.approx((1, 1), abs=0.05)
    assert minute.drift(frames, 32) == pytest.approx((0, 0), abs=2)
    jumped = np.concatenate([frames[:29], frames[33:]])
    assert min(minute.border_ratios(jumped, np.array([29]), 4)) > 1.5
    faded = (frames * np.linspace(1, 0.9, 97)[:, None, None, None]).astype(np.uint8)
    assert minute.drift(faded, 32)[0] > 10


def test_the_report_names_the_least_share() -> None:
    fact = {"made": 0.9, "true": 1.0, "share": 0.9}
    names = ("background", "colour", "shape", "motion")
    line = {"clips": 50, **dict.fromkeys(names, fact)}
    line["shape"] = {"made": 0.5, "true": 1.0, "share": 0.5}
    assert (
        "| generate | 90% / 100% | 90% / 100% | 50% / 100% | 90% / 100% | 50% (shape) | 50 |"
        in (report({"generate": line}))
    )


def test_the_table_of_a_minute_has_a_row_for_what_no_word_tells() -> None:
    score = {
        "videos": 2,
        "frames": 481,
        "motion of 4 s clips": 1.0,
        "motion by stretch": [1.0, 0.5],
        "change at window borders over elsewhere": 1.0,
        "change at window borders over other latents' borders": 1.0,
        "background drift, levels of 255": 0.0,
        "sprite drift, levels of 255": 1.0,
    }
    for name in minute.KEPT:
        score[f"{name} as in the first stretch"] = [1.0, 0.75]
        score[f"{name} as in the first stretch, untold"] = [1.0, 0.25]
    table = minute_table(score)
    assert "|  | 0-10 s | 10-20 s |" in table
    assert "| colour as at first | 100% | 75% |" in table
    assert "| colour as at first, where no word tells it | 100% | 25% |" in table


def _mover() -> world.Sprite:
    return world.Sprite("red", "square", "large", "right", 20.0, 32.0, 0.0)
