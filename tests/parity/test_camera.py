"""Fun-Control-Camera checkpoints: final latents against diffusers with an adapter written out, and
against the published classes."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sora_engine as sora
from sora_engine.denoise.camera import CameraRays
from sora_engine.denoise.denoise import predict, prepare
from sora_engine.denoise.packing import Packer
from sora_engine.errors import CheckpointError, RequestError
from sora_engine.models.inspection import inspect_file
from sora_engine.models.registry import open_checkpoint
from sora_engine.models.wan.checkpoint import transformer_in_file
from sora_engine.models.wan.config import WanConfig
from sora_engine.request import check_for_mode
from sora_engine.request.camera import resolve_camera
from sora_engine.request.recipe import request_of
from tests.parity.camera_models import (
    KINDS,
    Published,
    Reading,
    adapted,
    diffsynth,
    kinds_channels,
    published_rays,
    rays,
    tiny_camera,
)
from tests.parity.metering import measured, saved_midway
from tests.parity.oracles import relative_error

FRAMES = 9
PROMPT = {"prompt": "a red circle moves right", "negative_prompt": "blue square"}
STEPS = {"num_inference_steps": 5, "guidance_scale": 4.0}
VARIANTS = {"2.1": "i2v with a camera", "a14b": "i2v with a camera, two experts"}
VARIANTS["5b"] = "ti2v with a camera"


def some_poses(frames: int = FRAMES, seed: int = 0) -> np.ndarray:
    """Poses of a camera that moves, turns and zooms, and does not begin at the origin."""
    rng = np.random.default_rng(seed)
    at, turned, rows = rng.normal(size=3), 0.3 * rng.normal(size=3), []
    for i in range(frames):
        at, turned = at + 0.2 * rng.normal(size=3), turned + 0.1 * rng.normal(size=3)
        x, y, z = turned
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        rotation = torch.linalg.matrix_exp(torch.from_numpy(cross)).numpy()
        matrix = np.concatenate([rotation, at[:, None]], axis=1)
        lens = [0.5 + 0.02 * i, 0.9 + 0.01 * i, 0.48, 0.53]
        rows.append([1000.0 * i, *lens, 0, 0, *matrix.flatten()])
    return np.array(rows)


def pose_file(path, poses):
    """As RealEstate10K has it: a link, and a pose a line."""
    lines = ["https://example.org/watch", *(" ".join(map(repr, map(float, p))) for p in poses)]
    path.write_text("\n".join(lines) + "\n")
    return path


def an_image(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def size_of(kind):
    return (64, 96) if kind == "5b" else (32, 48)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    made = {}

    def build(kind):
        if kind not in made:
            tiny = tiny_camera(kind, tmp_path_factory.mktemp(kind))
            engine = sora.Engine.from_pretrained(
                tuple(tiny.files) if len(tiny.files) > 1 else tiny.files[0],
                components=tiny.parts,
                device="cpu",
            )
            made[kind] = tiny, engine
        return made[kind]

    yield build
    for _, engine in made.values():
        engine.close()


def a_request(kind, camera, seed=1, frames=FRAMES, **more):
    height, width = size_of(kind)
    clip = sora.Clip(an_image(width, height, more.pop("image", 0)), at=0)
    values = {**PROMPT, **STEPS, "height": height, "width": width, "num_frames": frames}
    return sora.VideoRequest(**{**values, **more}, seed=seed, clips=[clip], camera=camera)


def theirs(tiny, poses, seed=1, frames=FRAMES):
    """Final latents of diffusers' pipeline, as its decoder takes them."""
    pipe, (height, width) = tiny.pipe, size_of(tiny.kind)
    image = an_image(width, height)
    reading = Reading(tiny, poses, image, height, width, frames)
    with reading:
        return run(pipe, image, height, width, seed, frames)


def run(pipe, image, height, width, seed, frames):
    latents = pipe(
        image=image, **PROMPT, **STEPS, height=height, width=width, num_frames=frames,
        output_type="latent", generator=torch.Generator().manual_seed(seed),
    ).frames[0]  # fmt: skip
    config = pipe.vae.config
    mean, std = (
        torch.tensor(v)[:, None, None, None] for v in (config.latents_mean, config.latents_std)
    )
    return latents * std + mean


@pytest.mark.parametrize("kind", KINDS)
def test_final_latents_equal_diffusers_with_the_adapter_written_out(pair, kind, tmp_path):
    tiny, engine = pair(kind)
    poses = some_poses()
    expected = theirs(tiny, poses)
    path = pose_file(tmp_path / "poses.txt", poses)
    video = engine.generate(a_request(kind, path))
    assert relative_error(video.latents, expected) < 1e-4
    assert video.receipt.camera == "poses.txt"
    # As numbers it is the same camera; still, another one and none are other videos.
    same = engine.generate(a_request(kind, poses.tolist())).latents
    assert torch.equal(same, video.latents)
    for camera in ("static", some_poses(seed=1), None):
        other = engine.generate(a_request(kind, camera)).latents
        assert relative_error(other, expected) > 1e-2, camera
    assert relative_error(other, theirs(tiny, None)) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_final_latents_equal_the_published_classes(pair, kind):
    if diffsynth() is None:
        pytest.skip("diffsynth and einops are not installed (pip install --no-deps)")
    tiny, engine = pair(kind)
    pipe, (height, width) = tiny.pipe, size_of(kind)
    image, poses = an_image(width, height), some_poses()
    seen = published_rays(poses, height, width, FRAMES)
    before = kinds_channels(tiny, image, height, width, FRAMES)
    own = pipe.transformer, pipe.transformer_2
    try:
        weights = [load_file(f) for f in tiny.files]
        published = [Published(tiny, i, w, seen, before) for i, w in enumerate(weights)]
        pipe.transformer, pipe.transformer_2 = (*published, None)[:2]
        expected = run(pipe, image, height, width, 1, FRAMES)
    finally:
        pipe.transformer, pipe.transformer_2 = own
    video = engine.generate(a_request(kind, poses))
    assert relative_error(video.latents, expected) < 1e-4


def test_zooms_equal_the_published_ones():
    """DiffSynth's zooms are half as fast as VideoX-Fun's. (Its pans shear the view, where
    VideoX-Fun's move the camera; see tests/unit/test_camera_path.py.)"""
    if diffsynth() is None:
        pytest.skip("diffsynth and einops are not installed (pip install --no-deps)")
    generate = sys.modules[diffsynth().SimpleAdapter.__module__].generate_camera_coordinates
    for direction, moves in {"In": "zoom in x0.5", "Out": "Zoom Out x0.5"}.items():
        want = np.array(generate(direction, 81))
        found = np.array(resolve_camera(moves, 81).poses)
        assert np.abs(found - np.delete(want, [0, 5, 6], axis=1)).max() < 1e-12


def test_company_changes_nothing(pair, tmp_path):
    """Beside others with another camera, another size and none, and each alone."""
    _, engine = pair("a14b")
    requests = [
        a_request("a14b", some_poses()),
        a_request("a14b", "zoom in, acw x2", seed=2, height=48, width=32, image=1),
        a_request("a14b", None, seed=3),
        a_request("a14b", some_poses(13, seed=4), seed=4, frames=13, guidance_scale=1.0),
    ]
    together = engine.generate(requests)
    assert max(video.receipt.most_in_company for video in together) > 1
    for request, company in zip(requests, together, strict=True):
        alone = engine.generate(request).latents
        assert relative_error(company.latents, alone) < 1e-5
    # Where the first of a batch has a camera and the second none, the second is told of none.
    assert relative_error(together[2].latents, together[0].latents) > 1e-2


def test_a_window_has_the_rays_of_its_own_frames(pair):
    """Windows of a camera that stands still all see one thing, and of one that moves their own."""
    _, engine = pair("a14b")
    plan = sora.WindowPlan(3, 1)
    whole = engine.generate(a_request("a14b", some_poses(), window=plan)).latents
    assert torch.equal(whole, engine.generate(a_request("a14b", some_poses())).latents)
    poses = some_poses(25)
    resolved = engine.resolve(a_request("a14b", poses, frames=25, window=plan))
    canvas = prepare(resolved, engine.model)
    with torch.inference_mode():
        predict([canvas], 0, engine.model, Packer((1, 2, 2), torch.device("cpu")), 1 << 20)
    for window in canvas.windows():
        segment = canvas.segment(window, 0, conditional=True)
        for i, frame in enumerate(window.indices().tolist()):
            want = adapted(pair("a14b")[0].adapters[0], rays(poses, frame, 32, 48), 8)
            found = segment.control[i].T.unflatten(1, (2, 3))
            assert relative_error(found, want) < 1e-4, (window, frame)


def test_a_margin_is_seen_by_its_own_rays(pair):
    """What is off the grid is the middle of a larger canvas: its own pixels keep their rays."""
    _, engine = pair("2.1")
    resolved = engine.resolve(a_request("2.1", some_poses(), height=28, width=42))
    assert (resolved.canvas_height, resolved.canvas_width) == (32, 48)
    found = CameraRays.of(resolved, engine.model.grid).of_frame(2, torch.device("cpu"))
    assert relative_error(found[:, 2:-2, 3:-3], rays(some_poses(), 2, 28, 42)) < 1e-5


def test_a_saved_job_ends_in_the_same_video(pair, tmp_path):
    _, engine = pair("5b")
    whole, again = saved_midway(engine, a_request("5b", some_poses()), tmp_path / "job")
    assert again.receipt.resumed_at == 1
    assert again.receipt.camera == whole.receipt.camera
    assert relative_error(again.latents, whole.latents) < 1e-6


def test_memory_is_promised(pair, monkeypatch):
    """What the camera adds is held from step to step, for each expert, and is in the promise."""
    tiny, engine = pair("a14b")
    requests = [
        a_request("a14b", camera, frames=49, num_inference_steps=4) for camera in (None, "zoom in")
    ]
    without, promised = map(engine.plan, requests)
    held = 13 * 6 * 24 * 4
    assert promised.denoise > without.denoise + 2 * held
    _, peak = measured(
        monkeypatch, tuple(tiny.files), *requests, torch.float32, components=tiny.parts
    )
    assert 0.7 * promised.peak < peak <= promised.peak


def test_a_video_says_how_its_camera_moved(pair, tmp_path):
    """Its file makes the same request again: moves by their words, a pose file by its hash."""
    _, engine = pair("2.1")
    image = tmp_path / "first.png"
    an_image(48, 32).save(image)
    path = pose_file(tmp_path / "poses.txt", some_poses())

    def made(camera):
        asked = replace(a_request("2.1", camera), clips=[sora.Clip(image, at=0)])
        return asked, engine.generate(asked)

    for camera, told in (("Pan  left, zoom in x0.5", "pan left, zoom in x0.5"), (path, path)):
        _, video = made(camera)
        again = request_of(video.provenance, engine.generate, folder=tmp_path)
        assert again.camera == told
        assert torch.equal(engine.generate(again).latents, video.latents)
    path.write_text(path.read_text() + "\n")
    with pytest.raises(sora.MediaError, match=r"pose file .*poses\.txt is not the file it was"):
        request_of(video.provenance, engine.generate, folder=tmp_path)
    _, video = made(some_poses())
    with pytest.raises(RequestError, match="made from camera poses given in memory"):
        request_of(video.provenance, engine.generate, folder=tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_files_and_folders_are_recognised(pair, kind, tmp_path):
    """By their shapes, and by the class that a folder in diffusers' layout names."""
    tiny, engine = pair(kind)
    checkpoint, _ = open_checkpoint(
        tuple(tiny.files) if len(tiny.files) > 1 else tiny.files[0], tiny.parts
    )
    assert checkpoint.variant == VARIANTS[kind]
    assert checkpoint.takes_camera
    (told, *_) = inspect_file(tiny.files[0]).kinds
    assert "with a camera (Control-Camera): 2 layers, 24 wide" in told
    assert told.startswith("wan transformer, ti2v" if kind == "5b" else "wan transformer, i2v")
    source = transformer_in_file(tiny.files[0])
    assert WanConfig.from_dict(source.config.to_dict()) == source.config
    folder = tmp_path / "folder"
    tiny.pipe.save_pretrained(folder)
    for file, name in zip(tiny.files, ("transformer", "transformer_2"), strict=False):
        shutil.rmtree(folder / name)
        (folder / name).mkdir()
        shutil.copy(file, folder / name)
        (folder / name / "config.json").write_text(json.dumps(source.config.to_dict()))
    index = json.loads((folder / "model_index.json").read_text())
    for name in ("transformer", "transformer_2"):
        if index[name][1] is not None:
            index[name] = ["diffusers", "WanCameraTransformer3DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with sora.Engine.from_pretrained(folder, device="cpu") as other:
        request = a_request(kind, some_poses(), num_inference_steps=2)
        assert torch.equal(other.generate(request).latents, engine.generate(request).latents)


def test_what_does_not_fit_is_refused(pair, tmp_path):
    tiny, engine = pair("2.1")
    with pytest.raises(RequestError, match="camera has 5 poses, and the video 9 frames; num_fr"):
        engine.submit(a_request("2.1", some_poses(5)))
    with pytest.raises(RequestError, match="this checkpoint animates an image"):
        engine.submit(replace(a_request("2.1", "static"), clips=()))
    late = replace(a_request("2.1", "static"), clips=[sora.Clip(an_image(48, 32), at=4)])
    with pytest.raises(RequestError, match="told its first frame, whole, and no other"):
        engine.submit(late).result()
    _, five = pair("5b")
    late = replace(a_request("5b", "static"), clips=[sora.Clip(an_image(96, 64), at=4)])
    with pytest.raises(RequestError, match="begins with a frame that is known whole"):
        five.submit(late).result()
    resolved = engine.resolve(a_request("2.1", "pan left"))
    with pytest.raises(RequestError, match="camera is pan left, and this checkpoint takes none"):
        check_for_mode(resolved, engine.model.known_mode)
    weights = load_file(tiny.files[0])
    for change, message in (
        ({"control_adapter.conv.weight": torch.zeros(24, 1500, 2, 2)}, "reads 1500 channels"),
        ({"control_adapter.conv.weight": torch.zeros(24, 6144, 2, 2)}, "channels of 16 x 16"),
        ({"ref_conv.weight": torch.zeros(24, 16, 2, 2)}, "reads a reference picture"),
        ({"control_adapter.residual_blocks.0.conv2.bias": None}, "residual_blocks.0.conv2.bias"),
    ):
        changed = {n: v for n, v in {**weights, **change}.items() if v is not None}
        path = tmp_path / "changed.safetensors"
        save_file(changed, path)
        shutil.copy(tiny.files[0].parent / "config.json", tmp_path / "config.json")
        with pytest.raises(CheckpointError, match=re.escape(message)):
            sora.Engine.from_pretrained(path, components=tiny.parts, device="cpu")
    for change in ({"patch_size": [2, 2, 2]}, {"in_dim_control_adapter": 0}):
        values = {"_class_name": "WanCameraTransformer3DModel", **change}
        with pytest.raises(CheckpointError, match=r"camera|in_dim_control_adapter is 0"):
            WanConfig.from_dict(values)
    with pytest.raises(CheckpointError, match="unknown configuration keys"):
        WanConfig.from_dict({"in_dim_control_adapter": 24})
