"""What is wrong with a session or an action is said, with what would work; and the session stands
where it stood."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import sora_engine as sora
from sora_engine.errors import error_from_fields
from sora_engine.runtime import executor as executor_module
from sora_engine.runtime.sessions import Sessions
from tests.unit.world_folder import BUTTONS, WORLD, save_world, say

LIMITS = sora.Limits(pack_tokens=512, max_sessions=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def engine(folder) -> Iterator[sora.Engine]:
    with sora.Engine.from_pretrained(folder, device="cpu", limits=LIMITS) as made:
        yield made


@pytest.fixture
def world(engine) -> Iterator[sora.Session]:
    with engine.open_session(WORLD) as opened:
        yield opened


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (sora.Action("rigth"), "button 'rigth' is not known; the nearest is 'right', and there"),
        (sora.Action({"left", "jump"}), "button 'jump' is not known"),
        (sora.Action(axes={"turn": 0.5}), "axis 'turn' is not known; this checkpoint has none"),
        ("right", r"an action is an Action, got 'right'; Action\(\"up\"\) would work"),
    ],
)
def test_an_action_that_is_not_known_names_the_nearest(world, action, words):
    before = world.mark()
    with pytest.raises(sora.ActionError, match=words):
        world.step(action)
    assert world.num_steps == before.step == 0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"press": 3}, "press must be names of buttons, got 3"),
        ({"press": [1]}, "press must be names of buttons"),
        ({"axes": 1.0}, "axes must be values by name, got 1.0"),
        ({"axes": {"turn": "far"}}, "axis 'turn' must be a number, got 'far'"),
        ({"axes": {"turn": float("nan")}}, "axis 'turn' must be finite"),
        ({"move": (1,)}, "an action's move must be two numbers, down and right"),
        ({"prompt": 5}, "an action's prompt must be a text, got 5"),
    ],
)
def test_an_action_of_the_wrong_kind_is_told(values, words):
    with pytest.raises(sora.ActionError, match=words):
        sora.Action(**values)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("right*8 akt", "button 'akt' is not known; the nearest is 'act'"),
        ("right*0", r"'right\*0' is to be done '0' times; a number from 1 to"),
        ("right*-1", "a number from 1 to"),
        ("turn=far", "'turn=far' puts axis 'turn' at 'far'; a number from -1 to 1 would work"),
        (8, "actions are a text such as"),
    ],
)
def test_a_text_of_actions_that_cannot_be_read_is_told(world, text, words):
    with pytest.raises(sora.ActionError, match=words):
        world.actions.parse(text)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"context": 0}, "context must be from 1 to 256, got 0"),
        ({"recall": -1}, "recall must be from 0 to"),
        ({"num_inference_steps": 0}, "num_inference_steps must be from 1 to 1000, got 0"),
        ({"sigmas": [0.5, 1.0]}, "sigmas must fall strictly"),
        ({"sigmas": [1.0], "num_inference_steps": 2}, "2 and 1 sigmas disagree; leave one out"),
        ({"first_steps": 2000}, "first_steps must be from 1 to 1000"),
        ({"fps": 0}, "fps must be over 0"),
        ({"seed": -1}, "seed must be from 0 to"),
        ({"memory_bytes": -1}, "memory_bytes must be from 0"),
        ({"rewind": 1.5}, "rewind must be an integer"),
        ({"place": 3}, "place must be pixels down and right, got 3"),
        ({"solver": "fast"}, "solver must be one of"),
        ({"exact": "no"}, "exact must be True or False"),
        ({"height": 10_000, "width": 10_000}, "pixels; at most"),
        ({"prompt": 5}, "prompt must be a string"),
        (
            {"first": np.zeros((48, 32, 3), np.uint8)},
            "the first picture is 32x48 and the session's frames are 32x32; a picture of that size,"
            " or height=48 and width=32, would work",
        ),
        ({"first": np.zeros((2, 32, 32, 3), np.uint8)}, "one picture, got 2 frames"),
        ({"first": np.zeros((32, 32))}, "a session's frames are uint8"),
    ],
)
def test_a_request_that_cannot_be_names_the_value(engine, values, words):
    for ask in (engine.plan, engine.open_session):
        with pytest.raises(sora.RequestError, match=words):
            ask(replace(WORLD, **values))
    assert engine._sessions._count == 0


def test_a_file_that_is_no_picture_is_told(engine, tmp_path):
    with pytest.raises(sora.MediaError, match=r"none\.png"):
        engine.open_session(replace(WORLD, first=tmp_path / "none.png"))
    with pytest.raises(sora.RequestError, match="must be a SessionRequest, got VideoRequest"):
        engine.open_session(sora.VideoRequest("a cat"))
    with pytest.raises(sora.SessionError, match=r"a memory is what `Session\.memory` is, got dict"):
        engine.open_session(WORLD, memory={})


def test_a_checkpoint_without_actions_says_which_take_them(tmp_path):
    with sora.Engine.from_pretrained("sprites", device="cpu") as engine:
        with pytest.raises(
            sora.SessionError, match="sprites takes no actions: it makes whole vide"
        ):
            engine.open_session(WORLD)
        with pytest.raises(sora.SessionError, match='"actions" in their generation'):
            engine.plan(WORLD)


def test_an_engine_over_ranks_opens_no_sessions(engine):
    over_ranks = Sessions(replace(engine._intake, planner=None))
    for ask in (over_ranks.plan, lambda request: over_ranks.open(engine, request)):
        with pytest.raises(sora.SessionError, match="an engine without `parallel` opens sessions"):
            ask(WORLD)


def test_a_checkpoint_that_takes_known_frames_otherwise_says_so(tmp_path):
    folder = save_world(tmp_path / "world")
    index = json.loads((folder / "model_index.json").read_text())
    del index["expand_timesteps"]
    say(folder / "model_index.json", index)
    with (
        sora.Engine.from_pretrained(folder, device="cpu") as engine,
        pytest.raises(sora.SessionError, match="known frames by replacement; a checkpoint with ex"),
    ):
        engine.open_session(WORLD)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"actions": {"buttons": ["up"]}}, "has 1 buttons and axes, and the transformer reads 5"),
        ({"actions": ["up"]}, "actions must have buttons, axes and moves alone"),
        ({"actions": {"buttons": ["a b"]}}, "buttons must be different names without blanks"),
        ({"actions": {"buttons": "updown"}}, "buttons must be names"),
        (
            {"actions": {"buttons": BUTTONS, "moves": {"jump": [0, 1]}}},
            "moves must be of the buttons",
        ),
        ({"actions": {"buttons": BUTTONS, "moves": {"up": [1]}}}, "the move of 'up' must be two"),
        ({"session": {"context": 0}}, "session's context must be at least 1, got 0"),
        ({"session": {"sigmas": [1.0], "num_inference_steps": 2}}, "is 2 and there are 1 sigmas"),
        ({"session": {"memory": 1}}, "session must have .* alone"),
        ({"session": {"world": [20]}}, "session's world must be rows and columns, or null"),
        ({"session": {"fps": -1}}, "session's fps must be over 0"),
        ({"actions": None, "session": {}}, "actions must have"),
    ],
)
def test_what_a_checkpoint_says_of_sessions_is_checked(folder, change, words, tmp_path):
    values = json.loads((folder / "generation_config.json").read_text())
    copy = tmp_path / "copy"
    copy.mkdir()
    for part in folder.iterdir():
        (copy / part.name).symlink_to(part)
    (copy / "generation_config.json").unlink()
    say(copy / "generation_config.json", {**values, **change})
    with pytest.raises(sora.CheckpointError, match=words):
        sora.Engine.from_pretrained(copy, device="cpu")


def test_going_back_to_what_is_not_there_is_told(engine, world):
    world.step(sora.Action("right"))
    mark = world.mark()
    with engine.open_session(WORLD) as other:
        with pytest.raises(sora.MarkError, match="the mark at step 1 is another session's"):
            other.rewind(mark)
        theirs = other.mark()
    with pytest.raises(sora.MarkError, match="another session's"):
        world.branch(theirs)
    assert theirs.forgotten
    with pytest.raises(sora.MarkError, match="2 steps back from step 1 is forgotten, or was never"):
        world.rewind(steps=2)
    for wrong, words in (
        ({"steps": -1}, "steps go back, so 0 or more would work; got -1"),
        ({"steps": 0.5}, "steps must be an integer"),
        ({}, "a mark, or a number of steps: one of the two"),
        ({"mark": mark, "steps": 1}, "one of the two"),
        ({"mark": 3}, "a mark is what `Session.mark` returns, got 3"),
    ):
        with pytest.raises(sora.RequestError, match=words):
            world.rewind(**wrong)
    marks = [world.mark() for _ in range(64)]
    assert mark.forgotten
    with pytest.raises(sora.MarkError, match=r"mark at step 1 is forgotten; the oldest .* is 0"):
        world.rewind(mark)
    world.rewind(marks[0])
    assert "forgotten" in repr(mark)


def test_what_is_closed_says_so(engine, folder):
    world = engine.open_session(WORLD)
    mark = world.mark()
    world.close()
    world.close()
    assert world.closed
    for use in (world.step, world.mark, world.branch, lambda: world.rewind(mark)):
        with pytest.raises(sora.SessionClosedError, match="the session is closed; open a new one"):
            use()
    assert issubclass(sora.SessionClosedError, sora.EngineClosedError)
    with sora.Engine.from_pretrained(folder, device="cpu", limits=LIMITS) as made:
        world = made.open_session(WORLD)
    with pytest.raises(sora.EngineClosedError, match="the engine is closed"):
        world.step()
    with pytest.raises(sora.EngineClosedError, match="the engine is closed"):
        made.open_session(WORLD)
    assert made._sessions._count == 1
    world.close()
    assert made._sessions._count == 0


def test_a_session_that_is_closed_in_the_middle_of_a_step_stops(engine, monkeypatch):
    world = engine.open_session(WORLD)
    step = executor_module.denoise_step

    def closed(canvases, *rest):
        world._closed = True
        world.cancel()
        return step(canvases, *rest)

    monkeypatch.setattr(executor_module, "denoise_step", closed)
    with pytest.raises(sora.SessionClosedError):
        world.step()
    world.close()
    assert engine._sessions._count == 0


def test_too_many_sessions_are_told(engine):
    worlds = [engine.open_session(WORLD) for _ in range(3)]
    for ask in (lambda: engine.open_session(WORLD), worlds[0].branch):
        with pytest.raises(sora.SessionLimitError, match=r"3 sessions are open") as caught:
            ask()
        assert caught.value.retry_after_s > 0
    assert issubclass(sora.SessionLimitError, sora.QueueFullError)
    worlds.pop().close()
    with worlds[0].branch() as again:
        again.step()
    for world in worlds:
        world.close()


def test_a_session_for_which_there_is_no_memory_is_told(folder):
    limits = replace(LIMITS, memory_bytes=40 * 2**20)
    with sora.Engine.from_pretrained(folder, device="cpu", limits=limits) as engine:
        for ask in (engine.plan, engine.open_session):
            with pytest.raises(sora.MemoryLimitError, match="less memory_bytes") as caught:
                ask(WORLD)
            assert caught.value.needed > caught.value.limit == 40 * 2**20
        small = replace(WORLD, memory_bytes=16 * 2**20)
        assert engine.plan(small).peak < 40 * 2**20
        with engine.open_session(small):
            with pytest.raises(sora.SessionLimitError, match="no memory is left for another"):
                engine.open_session(replace(small, memory_bytes=20 * 2**20))
            with pytest.raises(sora.MemoryLimitError):
                engine.plan(sora.VideoRequest("a cat", height=480, width=480))
        engine.open_session(replace(small, memory_bytes=20 * 2**20)).close()
        assert engine._planner.limit == 40 * 2**20


def test_a_device_that_fails_leaves_the_last_good_mark(engine, world, monkeypatch, tmp_path):
    world.step(sora.Action("right"))
    world.step(sora.Action("act"))
    mark = world.mark()
    expected = world.step(sora.Action("left"))
    world.rewind(mark)
    step = executor_module.denoise_step

    def broken(*rest):
        raise torch.AcceleratorError("CUDA error: an illegal memory access")

    monkeypatch.setattr(executor_module, "denoise_step", broken)
    with pytest.raises(sora.SessionLostError, match="the session was at step 2") as caught:
        world.step(sora.Action("left"))
    monkeypatch.setattr(executor_module, "denoise_step", step)
    error = caught.value
    assert error.log == [[{"press": ["right"]}, 1], [{"press": ["act"]}, 1]]
    assert error.mark.step == 2
    assert isinstance(error.__cause__, sora.DeviceError)
    for copy in (pickle.loads(pickle.dumps(error)), error_from_fields(error.to_fields())):
        assert isinstance(copy, sora.SessionLostError)
        assert (copy.log, copy.mark, str(copy)) == (error.log, None, str(error))
    json.dumps(error.to_fields())
    world.save(tmp_path / "kept.world", error.mark)
    world.rewind(error.mark)
    assert np.array_equal(world.step(sora.Action("left")), expected)
    with engine.reopen_session(tmp_path / "kept.world") as again:
        assert np.array_equal(again.step(sora.Action("left")), expected)


def test_a_step_that_fails_leaves_the_session_as_it_was(engine, world, monkeypatch):
    world.step(sora.Action("right"))
    mark = world.mark()
    expected = world.step(sora.Action("act"))
    world.rewind(mark)
    decode = type(engine.loaded_model.vae).decode_chunk
    monkeypatch.setattr(
        type(engine.loaded_model.vae),
        "decode_chunk",
        lambda *a, **k: (torch.full((1, 3, 4, 32, 32), float("nan")), None),
    )
    with pytest.raises(sora.NonFiniteError, match="a latent frame"):
        world.step(sora.Action("act"))
    monkeypatch.setattr(type(engine.loaded_model.vae), "decode_chunk", decode)
    assert world.num_steps == 1
    with pytest.raises(sora.RequestError, match="a session's prompt has 20001 characters"):
        world.step(sora.Action(prompt="a" * 20_001))
    assert np.array_equal(world.step(sora.Action("act")), expected)


def test_hooks_see_what_a_session_reads_and_makes(folder):
    def check_request(request):
        if "cat" in request.prompt:
            raise sora.RefusedError("no cats")

    def check_frames(frames, span):
        seen.append((frames.shape, span.request.prompt, span.start, span.stop))
        if len(seen) == 3:
            raise sora.RefusedError("not this")
        return 255 - frames

    seen = []
    hooks = sora.Hooks(check_request=check_request, check_frames=check_frames)
    with sora.Engine.from_pretrained(folder, device="cpu", limits=LIMITS, hooks=hooks) as engine:
        with pytest.raises(sora.RefusedError, match="no cats"):
            engine.open_session(sora.SessionRequest("a cat"))
        assert engine._sessions._count == 0
        with engine.open_session(WORLD) as world:
            with pytest.raises(sora.RefusedError, match="no cats"):
                world.step(sora.Action(prompt="a cat"))
            world.step()
            with pytest.raises(sora.RefusedError, match="not this"):
                world.step()
            assert world.num_steps == 1
    assert seen[:2] == [
        ((1, 32, 32, 3), "a red circle", 0, 1),
        ((4, 32, 32, 3), "a red circle", 0, 4),
    ]


def test_sources_that_give_no_actions_are_told(world):
    for source, words in ((3, "stream takes a function"), ("right", "stream takes a function")):
        with pytest.raises(sora.RequestError, match=words):
            next(world.stream(source))
    with pytest.raises(sora.ActionError, match="an action is an Action"):
        next(world.stream(["right"]))
    with pytest.raises(sora.RequestError, match="fps must be over 0"):
        world.stream([], fps=0)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        pickle.dumps(world)


def test_axes_are_from_minus_one_to_one():
    from sora_engine.request import ActionSpace

    space = ActionSpace(("act",), ("turn", "rise"), {})
    assert space.encode(sora.Action("act", {"rise": -0.5})) == (1.0, 0.0, -0.5)
    with pytest.raises(sora.ActionError, match=r"axis 'turn' is 1\.5; it must be from -1 to 1"):
        space.encode(sora.Action(axes={"turn": 1.5}))
    with pytest.raises(sora.ActionError, match="axis 'tern' is not known; the nearest is 'turn'"):
        space.encode(sora.Action(axes={"tern": 1.0}))
    assert space.parse("act+turn=-1*2 still") == [
        sora.Action("act", {"turn": -1}),
        sora.Action("act", {"turn": -1}),
        sora.Action(),
    ]
