"""Each parameter of a request has its field, each task its route; what cannot be is a 400."""

from __future__ import annotations

import base64
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import sora_engine as sora
from sora_engine import tasks
from sora_engine.io.video_writer import write_video
from sora_engine.request import VideoRequest
from sora_engine.request.camera import resolve_camera
from sora_engine.serve import wire
from sora_engine.serve.orders import checked
from sora_engine.serve.translate import Translator, stored_of
from tests.faults.engines import engine
from tests.serve.servers import Server

PLACES = {
    "height": "size",
    "width": "size",
    "clips": "timeline",
    "init": "timeline",
}
"""Parameters of `VideoRequest` that a body has under another name."""


def moving(num_frames: int, size: int = 32) -> np.ndarray:
    frames = np.zeros((num_frames, size, size, 3), np.uint8)
    for i in range(num_frames):
        frames[i, 4:12, i : i + 8] = (200, 40, 40)
    return frames


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uploads by their names, which stand for hashes here."""
    made = tmp_path_factory.mktemp("uploads")
    write_video(made / "clip.mp4", moving(9), fps=8)
    shutil.copy(made / "clip.mp4", made / "clip")
    write_video(made / "other.mp4", moving(5), fps=8)
    shutil.copy(made / "other.mp4", made / "other")
    Image.fromarray(moving(1)[0]).save(made / "picture", "PNG")
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :16] = 255
    Image.fromarray(mask).save(made / "mask", "PNG")
    return made


@pytest.fixture(scope="module")
def made_engine() -> Any:
    with engine() as made:
        yield made


@pytest.fixture(scope="module")
def translator(folder: Path, made_engine: sora.Engine) -> Translator:
    loras = {"detail": folder / "detail.safetensors"}
    return Translator(made_engine.model, lambda name: folder / name, loras, made_engine.resolve)


def request_for(translator: Translator, task: str, model: Any, **fields: Any) -> VideoRequest:
    body = checked(model, fields)

    def keep(media: wire.Media, _name: str) -> dict[str, Any]:
        kept = {"upload": media.video_id, "start": media.start, "stop": media.stop}
        return {name: value for name, value in kept.items() if value is not None}

    stored = stored_of(task, body, keep)
    return translator.request_of(stored)


def same(got: VideoRequest, want: VideoRequest) -> None:
    for field in dataclasses.fields(VideoRequest):
        a, b = getattr(got, field.name), getattr(want, field.name)
        if field.name == "clips":
            assert len(a) == len(b)
            for one, other in zip(a, b, strict=True):
                assert one.at == other.at
                assert np.array_equal(one.mask, other.mask)
                assert read_any(one.frames).tolist() == read_any(other.frames).tolist()
        elif field.name == "init":
            assert (a is None) == (b is None)
            assert a is None or np.array_equal(read_any(a), read_any(b))
        elif field.name in ("sigmas", "latents"):
            assert (a is None and b is None) or np.array_equal(np.asarray(a), np.asarray(b))
        else:
            assert a == b, field.name


def read_any(frames: Any) -> np.ndarray:
    from sora_engine.request.frames import load_frames

    return load_frames(frames, 32, 32, fps=8)


def test_each_parameter_of_a_request_has_its_field():
    for field in dataclasses.fields(VideoRequest):
        assert PLACES.get(field.name, field.name) in wire.CreateVideo.model_fields, field.name
    for kind, body in (
        (sora.Guidance, wire.GuidanceBody),
        (sora.WindowPlan, wire.WindowBody),
        (sora.SparsePlan, wire.WindowBody),
        (sora.Shot, wire.ShotBody),
    ):
        assert {field.name for field in dataclasses.fields(kind)} <= set(body.model_fields)


def test_what_a_body_says_is_what_the_engine_is_asked(translator: Translator, folder: Path):
    noise = np.random.default_rng(0).standard_normal((24, 3, 4, 4)).astype(np.float32)
    fields: dict[str, Any] = {
        "prompt": "a red circle",
        "negative_prompt": "blue",
        "original_prompt": "circle",
        "size": "32x32",
        "num_frames": 9,
        "fps": 8,
        "num_inference_steps": 3,
        "guidance_scale": 2.5,
        "shift": 3.0,
        "sigmas": [1.0, 0.6, 0.2],
        "ladder": "",
        "solver": "euler",
        "seed": 11,
        "window": {"length": 3, "overlap": 2, "schedule": "moving"},
        "latents": base64.b64encode(noise.tobytes()).decode(),
        "round_to_grid": True,
        "guidance": {"kind": "apg", "eta": 0.5},
        "timeline": {
            "clips": [
                {"video_id": "picture", "at": 0},
                {"video_id": "clip", "at": 4, "start": 2, "stop": 5, "mask": {"video_id": "mask"}},
            ],
            "shots": [{"prompt": "x", "num_frames": 5}, {"prompt": "y", "num_frames": 4}],
            "init": {"video_id": "clip"},
            "strength": 0.7,
        },
    }
    known = np.ones((32, 32), bool)
    known[:, :16] = False
    want = VideoRequest(
        "a red circle",
        negative_prompt="blue",
        original_prompt="circle",
        height=32,
        width=32,
        num_frames=9,
        fps=8,
        num_inference_steps=3,
        guidance_scale=2.5,
        shift=3.0,
        sigmas=[1.0, 0.6, 0.2],
        ladder="",
        solver="euler",
        seed=11,
        clips=[
            sora.Clip(folder / "picture", at=0),
            sora.Clip(sora.Footage(folder / "clip", 2, 5), at=4, mask=known),
        ],
        init=folder / "clip",
        strength=0.7,
        shots=(sora.Shot("x", 5), sora.Shot("y", 4)),
        window=sora.WindowPlan(3, 2, schedule="moving"),
        latents=torch.from_numpy(noise),
        round_to_grid=True,
        guidance=sora.Guidance("apg", eta=0.5),
    )
    same(request_for(translator, "create", wire.CreateVideo, **fields), want)
    more = {
        "prompt": "a",
        "num_frames": 8,
        "guidance_scale_2": 1.5,
        "strict_grid": True,
        "loop": True,
        "flow_shift": 2.0,
        "label": "207",
        "resample": 2,
        "loras": [{"name": "detail", "strength": 0.5, "expert": "high"}],
        "window": {"reach": 2, "num_keys": 1},
        "camera": "pan left, zoom in x0.5",
    }
    want = VideoRequest(
        "a",
        num_frames=8,
        guidance_scale_2=1.5,
        strict_grid=True,
        loop=True,
        shift=2.0,
        label=207,
        resample=2,
        loras=(sora.Lora("detail", 0.5, "high"),),
        window=sora.SparsePlan(2, 1),
        camera=["pan left, zoom in x0.5"],
    )
    same(request_for(translator, "create", wire.CreateVideo, **more), want)


def test_a_camera_is_never_a_path(translator: Translator, folder: Path):
    """Moves and poses come through; a text that is none of them names no file of the server's."""
    poses = folder / "poses.txt"
    pose = [0.0, 0.5, 0.9, 0.5, 0.5, 0.0, 0.0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0]
    poses.write_text("\n".join(" ".join(map(str, pose)) for _ in range(9)))
    for camera in ([pose] * 9, ["acw"]):
        asked = request_for(translator, "create", wire.CreateVideo, prompt="a", camera=camera)
        assert asked.camera == camera
    asked = request_for(translator, "create", wire.CreateVideo, prompt="a", camera=str(poses))
    with pytest.raises(sora.RequestError, match=r"camera move '.*poses\.txt' is none of static"):
        resolve_camera(asked.camera, 9)


def test_each_task_is_the_tasks_own_request(translator: Translator, folder: Path, made_engine):
    model, clip, other = made_engine.model, folder / "clip", folder / "other"
    video, given = {"video_id": "clip"}, {"prompt": "p", "seed": 1}
    cases: list[tuple[str, Any, dict[str, Any], VideoRequest]] = [
        ("create", wire.CreateVideo, given, VideoRequest("p", seed=1)),
        (
            "create",
            wire.CreateVideo,
            {**given, "seconds": "1.5"},
            VideoRequest("p", seed=1, num_frames=12),
        ),
        (
            "create",
            wire.CreateVideo,
            {**given, "input_reference": {"video_id": "picture"}, "num_frames": 9},
            tasks.animate(model, folder / "picture", "p", seed=1, num_frames=9),
        ),
        (
            "create",
            wire.CreateVideo,
            {**given, "input_reference": video, "strength": 0.5},
            tasks.edit(model, clip, "p", seed=1, strength=0.5),
        ),
        (
            "create",
            wire.CreateVideo,
            {**given, "draft": True, "size": "64x64"},
            tasks.draft(model, VideoRequest("p", seed=1, height=64, width=64)),
        ),
        ("image", wire.CreateImages, given, tasks.image("p", seed=1)),
        ("edit", wire.EditVideo, {**given, "video": video}, tasks.edit(model, clip, "p", seed=1)),
        (
            "edit",
            wire.EditVideo,
            {**given, "video": video, "mask": {"video_id": "mask"}},
            tasks.inpaint(model, clip, folder / "mask", "p", seed=1),
        ),
        (
            "edit",
            wire.EditVideo,
            {**given, "video": video, "missing": "2-5"},
            tasks.fill(model, clip, [range(2, 6)], "p", seed=1),
        ),
        (
            "extend",
            wire.ExtendVideo,
            {**given, "video": {**video, "start": 1}, "seconds": 1, "before_s": 0.5},
            tasks.extend(model, sora.Footage(clip, 1), "p", after_s=1, before_s=0.5, seed=1),
        ),
        (
            "connect",
            wire.ConnectVideos,
            {**given, "first": video, "second": {"video_id": "other"}, "gap_s": 1},
            tasks.connect(model, clip, other, "p", gap_s=1, seed=1),
        ),
    ]
    for task, body, fields, want in cases:
        same(request_for(translator, task, body, **fields), want)
    for task, body, more, want in (
        ("loop", wire.LoopVideo, {"gap_s": 1}, tasks.loop(model, clip, "p", gap_s=1, seed=1)),
        (
            "upscale",
            wire.UpscaleVideo,
            {"scale": 2, "strength": 0.3},
            tasks.upscale(model, clip, "p", scale=2, strength=0.3, seed=1),
        ),
    ):
        stored = stored_of(task, checked(body, {**given, **more}), lambda *_: {})
        stored["fields"]["video"] = {"upload": "clip"}
        same(translator.request_of(stored), want)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": 3}, "prompt"),
        ({"strength": "x"}, "strength"),
        ({"timeline": {"clips": [{"at": 0}]}}, "timeline"),
        ({"timeline": {"loop": True}, "loop": True}, "loop"),
        ({"input_reference": {"image_url": "http://127.0.0.1/x.png"}}, "input_reference"),
        ({"input_reference": {"image_url": "file:///etc/passwd"}}, "input_reference"),
        ({"input_reference": {"upload": "upload_" + "0" * 64}}, "input_reference"),
        ({"input_reference": {"upload": "../../etc/passwd"}}, "input_reference"),
        ({"input_reference": {"video_id": "../x"}}, None),
        ({"input_reference": {"path": "/etc/passwd"}}, "input_reference"),
        ({"latents": "AAAA"}, "latents"),
        ({"loras": [{"name": "x"}]}, "loras"),
        ({"window": {"reach": 1, "length": 2}}, "window"),
        ({"priority": 3}, "priority"),
        ({"size": "32x32", "height": 32}, None),
        ({"num_frames": 10**9}, None),
        ({"size": "999999x999999"}, None),
    ],
)
def test_what_cannot_be_is_named(server: Server, fields: dict[str, Any], param: str | None):
    answer = server.http.post("/v1/videos", json={"prompt": "a", **fields})
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert param is None or error["param"] == param


NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(width=64).filter(lambda x: x == x and abs(x) != float("inf")),
    st.sampled_from(["", "4s", "NaN", "1e308", "0x10", None, True, [], {}, [1], {"a": 1}]),
)
NAMES = sorted(set(wire.CreateVideo.model_fields) - {"prompt", "user"})


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(fields=st.dictionaries(st.sampled_from([*NAMES, "unknown"]), NUMBERS, max_size=3))
def test_no_value_is_a_500(server: Server, fields: dict[str, Any]):
    body = {"prompt": "a", "size": "16x16", "num_inference_steps": 1, "num_frames": 1, **fields}
    answer = server.http.post("/v1/videos/plan", json=body)
    assert answer.status_code in (200, 400), (body, answer.text)
    if answer.status_code == 400:
        assert answer.json()["error"]["code"] in (
            *("invalid_value", "memory_limit", "model_not_found"),
        )
