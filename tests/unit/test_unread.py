"""What a request gives and nothing reads is told."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

import sora_engine as sora
from sora_engine.cli import main
from tests.faults.engines import engine

SMALL = {"height": 16, "width": 16, "num_frames": 1, "num_inference_steps": 4, "seed": 1}
OFF = "guidance is off at scale 1"


def told(caplog, made, **values):
    """The lines that a request brings, and its video."""
    caplog.clear()
    video = made.generate(sora.VideoRequest("a red circle", **{**SMALL, **values}))
    return [r.getMessage() for r in caplog.records if r.name == "sora_engine.runtime.intake"], video


@pytest.mark.parametrize(
    ("values", "without", "lines"),
    [
        (
            {"guidance_scale": 1, "negative_prompt": "blue"},
            {"guidance_scale": 1},
            [f"negative_prompt is not read: {OFF}"],
        ),
        (
            {"guidance_scale": 1.0, "guidance": sora.Guidance("apg", rescale=0.5)},
            {"guidance_scale": 1},
            [f"guidance is not read: {OFF}"],
        ),
        (
            {"guidance_scale": 0.5, "guidance": sora.Guidance(stop=0.5), "negative_prompt": "x"},
            {"guidance_scale": 1},
            [
                "negative_prompt is not read: guidance is off at scale 0.5",
                "guidance is not read: guidance is off at scale 0.5",
            ],
        ),
        (
            {"guidance_scale": 5, "guidance": sora.Guidance(start=0.3, stop=0.4)},
            {"guidance_scale": 1},
            ["guidance is not read: guidance from 0.3 to 0.4 covers none of 4 steps"],
        ),
        (
            {"guidance_scale_2": 5.0},
            {},
            ["guidance_scale_2 is not read: this checkpoint has one expert"],
        ),
    ],
    ids=["negative prompt", "apg", "both", "interval", "second expert"],
)
def test_a_setting_that_changes_nothing_is_told(caplog, values, without, lines):
    """And it does change nothing: not a bit of the video that comes without it."""
    caplog.set_level(logging.WARNING)
    with engine() as made:
        said, video = told(caplog, made, **values)
        plain_said, plain = told(caplog, made, **without)
    assert said == lines
    assert plain_said == []
    assert torch.equal(video.latents, plain.latents)


@pytest.mark.parametrize(
    "values",
    [
        {"negative_prompt": "blue"},
        {"negative_prompt": "", "guidance_scale": 1},
        {"negative_prompt": "  ", "guidance_scale": 1},
        {"guidance": sora.Guidance(start=0.25, stop=0.5)},
        {"guidance": sora.Guidance(), "guidance_scale": 1},
        {"guidance": sora.Guidance("cfg_zero_star", zero_init_steps=1), "guidance_scale": 1},
    ],
    ids=str,
)
def test_what_is_read_or_says_nothing_is_not_told(caplog, values):
    caplog.set_level(logging.WARNING)
    with engine() as made:
        assert told(caplog, made, **values)[0] == []


def test_taking_steps_again_without_clips_is_told(tmp_path, caplog):
    from tests.parity.oracles import tiny_pipeline

    caplog.set_level(logging.WARNING)
    tiny_pipeline("t2v", 0).save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    with sora.Engine.from_pretrained(tmp_path, device="cpu") as made:
        said, _ = told(caplog, made, resample=2, **size)
        assert said == ["resample is not read: there are no clips that the rest could agree with"]
        clip = sora.Clip(np.zeros((1, 32, 32, 3), np.uint8))
        assert told(caplog, made, resample=2, clips=[clip], num_frames=5, **size)[0] == []


def test_the_command_tells_it_in_one_line(tmp_path, capsys):
    arguments = ["--size", "16x16", "--frames", "1", "--steps", "1", "--seed", "1"]
    arguments += ["--guidance", "1", "--negative-prompt", "blue", "-o", str(tmp_path / "a.png")]
    assert main(["generate", "a red circle", *arguments]) == 0
    assert capsys.readouterr().err == f"sora: warning: negative_prompt is not read: {OFF}\n"
