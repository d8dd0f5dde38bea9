"""The script that makes the README's pictures, on clips that are drawn and not made."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sora_engine.io.video_reader import read_video
from sora_engine.io.video_writer import write_video

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "sprites"))

import pictures
import world
from scoring import rendered


@pytest.fixture(autouse=True)
def _drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sora generate` draws a square that goes once round."""
    sprite = world.Sprite("red", "square", "large", "right", 20.0, 32.0, 0.0)
    frames = rendered(world.Scene("white", (sprite,), 64, 64), 16)

    def sora(arguments: list[str]) -> int:
        assert arguments[:2] == ["generate", pictures.PROMPTS[int(arguments[-3])]]
        write_video(arguments[-1], frames, 8)
        return 0

    monkeypatch.setattr(pictures, "sora", sora)


def test_clips_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gif, stills = tmp_path / "a.gif", tmp_path / "a.png"
    monkeypatch.setattr(sys, "argv", ["pictures.py", "--gif", str(gif), "--stills", str(stills)])
    pictures.main()
    frames, fps = read_video(gif)
    assert frames.shape == (16, 2 * 68, 3 * 68, 3)
    assert fps == pytest.approx(8, rel=0.02)
    assert stills.is_file()


def test_a_gif_over_the_budget_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gif = tmp_path / "a.gif"
    monkeypatch.setattr(sys, "argv", ["pictures.py", "--gif", str(gif)])
    monkeypatch.setattr(pictures, "BUDGET_KB", 1)
    with pytest.raises(SystemExit, match=r"over 1: fewer --frames would do"):
        pictures.main()
    assert not gif.exists()


def test_the_readme_shows_the_picture_beside_its_prompts() -> None:
    top = (Path(__file__).parents[2] / "README.md").read_text()[:3000]
    assert "docs/sprites.gif" in top
    for prompt in pictures.PROMPTS:
        assert prompt in top
