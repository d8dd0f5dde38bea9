"""Requests: defaults, the grid of sizes, and an error that names each bad value."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sora_engine.config import Limits
from sora_engine.errors import RequestError
from sora_engine.request import (
    Clip,
    GenerationDefaults,
    Guidance,
    KnownMode,
    LatentGrid,
    Shot,
    VideoRequest,
    check_for_mode,
    resolve_request,
)

DEFAULTS = GenerationDefaults(
    height=480,
    width=832,
    num_frames=81,
    fps=16,
    num_inference_steps=50,
    guidance_scale=5.0,
    guidance_scale_2=3.0,
)
GRID = LatentGrid(channels=16, vae_spatial=8, patch=(1, 2, 2), time=4)
STRICT = {"strict_grid": True}
FACTS = SimpleNamespace(grid=GRID, defaults=DEFAULTS, known_mode=KnownMode.REPLACEMENT, labels=None)


def resolve(*, limits=None, **values):
    values.setdefault("prompt", "a cat")
    request = VideoRequest(**values)
    return resolve_request(request, FACTS, limits or Limits(), solvers=("euler", "unipc"))


def test_defaults_fill_what_is_silent():
    resolved = resolve()
    assert (resolved.height, resolved.width, resolved.num_frames) == (480, 832, 81)
    assert (resolved.guidance_scale, resolved.guidance_scale_2) == (5.0, 3.0)
    assert resolved.num_inference_steps == 50
    assert 0 <= resolved.seed < 2**32


def test_the_second_expert_follows_a_given_scale():
    """As in diffusers: guidance_scale_2 defaults to the guidance_scale that a caller gives."""
    assert resolve(guidance_scale=6.0).guidance_scale_2 == 6.0
    assert resolve(guidance_scale=6.0, guidance_scale_2=2.0).guidance_scale_2 == 2.0


def test_numpy_integers_and_floats_are_numbers():
    resolved = resolve(height=np.int64(64), guidance_scale=np.float32(2.5), seed=np.int32(3))
    assert (resolved.height, resolved.guidance_scale, resolved.seed) == (64, 2.5, 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": None}, "prompt must be a string, got NoneType"),
        ({"negative_prompt": 3}, "negative_prompt must be a string, got int"),
        ({"height": 0}, "height must be at least 1, got 0"),
        ({"height": -16, **STRICT}, "height must be at least 16, got -16"),
        (
            {"height": 100, "strict_grid": True},
            "height must be a multiple of 16, got 100; the nearest are 96 or 112",
        ),
        (
            {"width": 7, "strict_grid": True},
            "width must be a multiple of 16, got 7; the nearest are 16",
        ),
        ({"width": 64.0}, "width must be an integer, got 64.0"),
        ({"width": True}, "width must be an integer, got True"),
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        (
            {"num_frames": 80, "strict_grid": True},
            "a multiple of 4 plus 1, got 80; the nearest are 77 or 81",
        ),
        ({"num_frames": 81, "loop": True}, "a multiple of 4, got 81; the nearest are 80 or 84"),
        ({"num_inference_steps": 0}, "num_inference_steps must be from 1 to 1000, got 0"),
        ({"num_inference_steps": 1.5}, "num_inference_steps must be an integer, got 1.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be finite, got nan"),
        ({"guidance_scale": "5"}, "guidance_scale must be a number, got '5'"),
        ({"guidance_scale_2": float("inf")}, "guidance_scale_2 must be finite, got inf"),
        ({"shift": 0}, "shift must be over 0, got 0"),
        ({"fps": -8}, "fps must be over 0, got -8"),
        ({"seed": -1}, "seed must be from 0 to"),
        ({"seed": 2**64}, "seed must be from 0 to"),
        ({"solver": "heun"}, r"solver must be one of \['euler', 'unipc'\], got 'heun'"),
        ({"sigmas": []}, r"sigmas must fall strictly, within \(0, 1\], got \[\]"),
        ({"sigmas": [0.5, 0.9]}, "sigmas must fall strictly"),
        ({"strength": 0.5}, "give an `init` video too"),
        ({"init": "x.mp4", "strength": 1.5}, r"strength must lie in \(0, 1\], got 1.5"),
        ({"init": "x.mp4", "strength": 0}, r"strength must lie in \(0, 1\], got 0"),
        (
            {"init": "x.mp4", "strength": 0.3, "num_inference_steps": 3},
            "strength = 0.3 of 3 steps leaves no step; the least that does is 0.3334",
        ),
        ({"clips": ["x.png"]}, "clips must be Clip objects, got str"),
        ({"clips": Clip("x.png")}, r"clips must be a list of Clip\(frames, at\), got Clip"),
        ({"shots": Shot("a", 81)}, "shots must be a list of Shot.*, got Shot"),
        ({"sigmas": 0.5}, "sigmas must be a list of noise levels, got float"),
        ({"window": 21}, "window must be a WindowPlan or a SparsePlan, got int 21"),
        ({"clips": [Clip("x.png", at=81)]}, "begins at frame 81; frames run from 0 to 80"),
        ({"clips": [Clip("x.png", at=-1)]}, "begins at frame -1"),
        (
            {"shots": [Shot("a", 40), Shot("b", 40)], "strict_grid": True},
            "num_frames must be a multiple of 4 plus 1",
        ),
        ({"shots": [Shot("a", 40)], "num_frames": 81}, "the shots have 40 frames together"),
        ({"shots": [Shot("a", 0)]}, "a shot's num_frames must be at least 1, got 0"),
        ({"latents": torch.zeros(16, 21, 60, 100)}, r"\(16, 21, 60, 104\) for this request"),
        ({"latents": [1]}, "got list"),
        ({"latents": np.zeros((16, 21, 60, 104), np.float32)}, "for this request, got ndarray"),
        ({"latents": torch.zeros(16, 21, 60, 104, dtype=torch.int32)}, "got torch.int32"),
        ({"latents": torch.zeros(16, 21, 60, 104, device="meta")}, "104. on meta"),
        ({"latents": torch.zeros(16, 21, 60, 104).to_sparse()}, "cpu, torch.sparse_coo"),
        ({"loop": "no"}, "loop must be True or False, got 'no'"),
        ({"round_to_grid": "false"}, "round_to_grid must be True or False, got 'false'"),
        ({"strict_grid": 2}, "strict_grid must be True or False, got 2"),
        ({"guidance_scale": b"5"}, "guidance_scale must be a number, got b'5'"),
        ({"guidance_scale": np.True_}, "guidance_scale must be a number, got np.True_"),
        ({"guidance_scale": torch.ones(2)}, r"must be a number, got tensor\(\[1., 1.\]\)"),
        ({"height": torch.tensor(True)}, r"height must be an integer, got tensor\(True\)"),
        ({"original_prompt": 7}, "original_prompt must be a string, got int"),
        (
            {"num_inference_steps": 4, "sigmas": [1.0, 0.5]},
            "num_inference_steps = 4 and 2 sigmas disagree; leave one out",
        ),
        (
            {"num_inference_steps": 2, "guidance": Guidance("cfg_zero_star", zero_init_steps=2)},
            "zero_init_steps = 2 of 2 steps leaves none that moves the video; at most 1",
        ),
        *(
            (values, "is no text: character 2 is the lone surrogate '.ud83e'")
            for values in (
                {"prompt": "a \ud83e"},
                {"negative_prompt": "a \ud83e"},
                {"original_prompt": "a \ud83e"},
                {"shots": [Shot("a \ud83e", 81)]},
            )
        ),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(RequestError, match=message):
        resolve(**values)


def test_a_value_is_named_in_one_line():
    for bad in (np.zeros((30, 30)), "x" * 5000, torch.zeros(9, 9)):
        with pytest.raises(RequestError, match="height must be an integer, got ") as told:
            resolve(height=bad)
        assert "\n" not in str(told.value)
        assert len(str(told.value)) < 150


def test_numbers_of_numpy_become_plain_ones_wherever_they_stand():
    """A request goes into files as JSON, which has no others."""
    resolved = resolve(
        num_frames=np.int64(9),
        shots=[Shot("a", np.int64(5)), Shot("b", np.int32(4))],
        clips=[Clip("x.png", at=np.int64(3))],
        sigmas=np.array([1.0, 0.5]),
        loop=np.False_,
    )
    numbers = [resolved.num_frames, *(shot.num_frames for shot in resolved.shots)]
    assert json.dumps([*numbers, resolved.clips[0].at]) == "[9, 5, 4, 3]"
    assert json.dumps(resolved.sigmas) == "[1.0, 0.5]"
    assert resolved.loop is False


@pytest.mark.parametrize(
    ("asked", "canvas"),
    [
        ((1080, 1920, 81), (1088, 1920, 81)),
        ((1920, 1080, 33), (1920, 1088, 33)),
        ((281, 500, 34), (288, 512, 37)),
        ((1, 1, 2), (16, 16, 5)),
        ((480, 832, 81), (480, 832, 81)),
    ],
)
def test_sizes_are_as_asked_on_the_next_canvas_of_the_grid(asked, canvas):
    height, width, num_frames = asked
    resolved = resolve(height=height, width=width, num_frames=num_frames)
    assert (resolved.height, resolved.width, resolved.num_frames) == asked
    assert (resolved.canvas_height, resolved.canvas_width, resolved.canvas_frames) == canvas
    assert (resolved.canvas is None) == (asked == canvas)
    latents = (canvas[2] - 1) // 4 + 1, canvas[0] // 8, canvas[1] // 8
    assert resolved.latent_shape(GRID) == (16, *latents)


def test_limits_count_the_canvas():
    with pytest.raises(RequestError, match="2048x2064 is 4227072 pixels; at most 4194304"):
        resolve(height=2050, width=2046)
    with pytest.raises(RequestError, match="num_frames is 101; at most 100, so 97 would work"):
        resolve(num_frames=98, limits=Limits(max_frames=100))
    with pytest.raises(RequestError, match="give one of them"):
        resolve(round_to_grid=True, strict_grid=True)


def test_rounding_to_the_grid_is_by_request_alone():
    resolved = resolve(height=100, width=7, num_frames=80, round_to_grid=True)
    assert (resolved.height, resolved.width, resolved.num_frames) == (96, 16, 81)
    assert resolve(num_frames=82, loop=True, round_to_grid=True).num_frames == 80


def test_limits_are_checked():
    small = Limits(max_pixels=64 * 64, max_frames=9, max_inference_steps=4, max_prompt_chars=5)
    fits = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 4}
    resolve(limits=small, **fits)
    for change, message in [
        ({"width": 80}, "80x64 is 5120 pixels; at most 4096, so 128x32 would work"),
        ({"num_frames": 13}, "num_frames is 13; at most 9, so 9 would work"),
        ({"num_inference_steps": 5}, "from 1 to 4, got 5"),
        ({"prompt": "a cat sat"}, "prompt has 9 characters; at most 5"),
        ({"shots": [Shot("a cat sat", 9)]}, "a shot's prompt has 9 characters; at most 5"),
        ({"sigmas": [0.9, 0.7, 0.5, 0.3, 0.1]}, "sigmas has 5 noise levels; at most 4"),
    ]:
        with pytest.raises(RequestError, match=message):
            resolve(limits=small, **{**fits, **change})
    assert json.dumps(Limits(max_frames=np.int64(9)).max_frames) == "9"
    for bad in ("9", 9.0, True, None):
        with pytest.raises(ValueError, match=r"max_frames must be a positive integer, got"):
            Limits(max_frames=bad)
    with pytest.raises(ValueError, match="max_frames must be a positive integer, got 0"):
        Limits(max_frames=0)


def test_latent_frames_and_the_frames_they_hold():
    assert [GRID.latent_frames(n, loop=False) for n in (1, 5, 81)] == [1, 2, 21]
    assert GRID.latent_frames(80, loop=True) == 20
    assert [list(GRID.frames_of(i, loop=False)) for i in (0, 1, 2)] == [
        [0],
        [1, 2, 3, 4],
        [5, 6, 7, 8],
    ]
    assert list(GRID.frames_of(1, loop=True)) == [4, 5, 6, 7]


def test_unknown_arguments_raise():
    with pytest.raises(TypeError, match="num_steps"):
        VideoRequest("a cat", num_steps=3)


@pytest.mark.parametrize(
    ("size", "nearest"),
    [((4096, 4096), "2048x2048"), ((4320, 7680), "2720x1536"), ((16, 10**6), "131072x32")],
)
def test_sizes_over_the_limit_name_one_that_works(size, nearest):
    with pytest.raises(RequestError, match=f"at most 4194304, so {nearest} would work"):
        resolve(height=size[0], width=size[1])
    width, height = map(int, nearest.split("x"))
    assert resolve(height=height, width=width).width == width


def test_the_checkpoint_may_name_a_solver():
    named = dataclasses.replace(DEFAULTS, solver="renoise")
    for request, defaults, solver in (
        (VideoRequest("a cat"), DEFAULTS, None),
        (VideoRequest("a cat"), named, "renoise"),
        (VideoRequest("a cat", solver="euler"), named, "euler"),
    ):
        facts = SimpleNamespace(**{**vars(FACTS), "defaults": defaults})
        assert resolve_request(request, facts, Limits()).solver == solver


def test_a_start_video_of_some_strength_leaves_fewer_steps():
    assert resolve(num_inference_steps=10).steps_taken == 10
    assert resolve(num_inference_steps=10, init="x.mp4", strength=0.35).steps_taken == 3
    assert resolve(num_inference_steps=10, init="x.mp4", strength=1.0).steps_taken == 10


def test_a_kind_of_guidance_without_a_scale_takes_the_checkpoints():
    plain = resolve()
    other = resolve(guidance=Guidance("apg", eta=0.5))
    assert plain.guidance_scale > 1
    assert (other.guidance_scale, other.guidance_scale_2) == (
        plain.guidance_scale,
        plain.guidance_scale_2,
    )
    assert resolve(guidance=Guidance("apg", scale=2.5)).guidance_scale == 2.5


def test_the_second_experts_scale_alone_takes_unconditional_predictions():
    assert resolve(guidance_scale=1.0, guidance_scale_2=3.0).guided
    assert resolve(guidance_scale=3.0, guidance_scale_2=1.0).guided
    assert not resolve(guidance_scale=1.0).guided


@pytest.mark.parametrize("mode", list(KnownMode))
def test_what_a_way_of_knowing_frames_cannot_do_is_told_at_once(mode):
    often, with_picture = resolve(resample=2), resolve(clips=[Clip("x.png")])
    looped = resolve(clips=[Clip("x.png")], loop=True, num_frames=8)
    if mode is KnownMode.REPLACEMENT:
        check_for_mode(often, mode)
    else:
        with pytest.raises(RequestError, match="resample is 2: this checkpoint was trained"):
            check_for_mode(often, mode)
    if mode in (KnownMode.CHANNELS, KnownMode.FIRST_FRAME, KnownMode.CHANNELS_AND_LEVEL):
        with pytest.raises(RequestError, match="animates an image: give one"):
            check_for_mode(resolve(), mode)
        with pytest.raises(
            RequestError, match="first latent frame holds one frame alone, and a loop"
        ):
            check_for_mode(looped, mode)
    else:
        check_for_mode(resolve(), mode)
        check_for_mode(looped, mode)
    check_for_mode(with_picture, mode)
