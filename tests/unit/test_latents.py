"""Finished latents in a file, and `sora decode` going on from them."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sora_engine as sora
from sora_engine import cli
from sora_engine.errors import MediaError
from sora_engine.io.latents import SavedLatents
from sora_engine.io.provenance import Provenance
from sora_engine.io.video_reader import read_video
from sora_engine.vae.fit import FittedCoder
from tests.parity.oracles import tiny_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("t2v")
    tiny_pipeline("t2v", 0).save_pretrained(path)
    return path


def test_what_is_written_is_read(tmp_path):
    latents = torch.randn(16, 3, 4, 6)
    how = Provenance(prompt="a cat", seed=3)
    SavedLatents(latents, 23.976, True, "sprites", how).write(tmp_path / "a.safetensors")
    read = SavedLatents.read(tmp_path / "a.safetensors")
    assert torch.equal(read.latents, latents)
    assert (read.fps, read.loop, read.model, read.provenance) == (23.976, True, "sprites", how)
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read as latents"),
        (b"not a file of tensors", "cannot be read as latents"),
        ({"weight": torch.zeros(2)}, r"holds \['weight'\]"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file(content, path)
    with pytest.raises(MediaError, match=message):
        SavedLatents.read(path)


@pytest.mark.parametrize("several", [False, True])
def test_paths_in_no_encoding_are_kept(tmp_path, several):
    """The header of the file is UTF-8, and a model's path need not be."""
    path = os.fsdecode(b"/models/m\xff")
    model = (path, path + "2") if several else path
    parts = {"vae": path} if several else path
    SavedLatents(torch.ones(1, 1, 2, 2), 8.0, False, model, components=parts).write(tmp_path / "a")
    read = SavedLatents.read(tmp_path / "a")
    assert (read.model, read.components) == (model, parts)


@pytest.mark.parametrize("loop", [False, True])
def test_decode_goes_on_from_finished_latents(folder, tmp_path, loop):
    request = sora.VideoRequest(
        "a cat",
        height=32,
        width=32,
        num_frames=8 if loop else 9,
        num_inference_steps=2,
        seed=1,
        loop=loop,
    )
    file = tmp_path / "kept.safetensors"
    with sora.Engine.from_pretrained(folder, device="cpu") as engine:

        def keep(latents):
            SavedLatents(latents, 8.0, loop, str(folder)).write(file)

        video = engine.submit(request, on_latents=keep).result(120)
    assert cli.main(["decode", str(file), "-o", str(tmp_path / "frames")]) == 0
    frames, _ = read_video(tmp_path / "frames")
    assert np.array_equal(frames, video.frames)


@pytest.mark.parametrize("kind", ["components", "a hub's link", "two experts", "a relative path"])
def test_decode_goes_on_for_models_in_single_files(tmp_path, kind, monkeypatch, capsys):
    """By the very command that the interrupted run advises, from another folder."""
    model = tmp_path / "model"
    pipe = tiny_pipeline("a14b-t2v" if kind == "two experts" else "t2v", 0)
    pipe.save_pretrained(model)
    weights = "diffusion_pytorch_model.safetensors"
    given = ["--model", str(model / "transformer" / weights), "--components", str(model)]
    if kind == "two experts":
        given[2:2] = ["--model", str(model / "transformer_2" / weights)]
    elif kind == "a relative path":
        monkeypatch.chdir(tmp_path)
        given = ["--model", f"model/transformer/{weights}", "--components", "model"]
    elif kind == "a hub's link":
        blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
        blobs.mkdir()
        snapshot.mkdir(parents=True)
        (model / "transformer" / weights).rename(blobs / "deadbeef")
        (model / "transformer" / "config.json").rename(snapshot / "config.json")
        (snapshot / "model.safetensors").symlink_to("../../blobs/deadbeef")
        for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
            (snapshot / part).symlink_to(model / part)
        given = ["--model", str(snapshot / "model.safetensors")]
    command = ["generate", "a cat", *given, "--size", "32x32", "--frames", "9", "--steps", "2"]
    command += ["--seed", "5"]
    assert cli.main([*command, "-o", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as broken:
        broken.setattr("sora_engine.runtime.executor.decoding", lambda *_, **__: 1 / 0)
        assert cli.main([*command, "-o", str(tmp_path / "a result")]) == 1
    said = capsys.readouterr().out
    advice = shlex.split(re.search(r"`(sora decode .*)` goes on", said)[1])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli.main(advice[1:]) == 0
    again, whole = (read_video(tmp_path / name)[0] for name in ("a result", "whole"))
    assert np.array_equal(again, whole)


def test_what_a_decoder_needs_is_in_the_file(tmp_path):
    latents, path = torch.ones(1, 1, 2, 2), tmp_path / "a.safetensors"
    for model, components in (
        ("a/model", None),
        ("model.safetensors", "parts"),
        (("high.safetensors", "low.safetensors"), "parts"),
        ('["odd"]', None),
    ):
        SavedLatents(latents, 8.0, False, model, components=components).write(path)
        read = SavedLatents.read(path)
        assert (read.model, read.components) == (model, components)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><title>404</title>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer"),
        (b"\x00\x00\x00\x20ftypisom", "it is an MP4"),
        (b"GGUF\x03\x00\x00\x00", "it is a GGUF file"),
        ("folder", "it is a folder"),
        ({f"w{i}": torch.zeros(1) for i in range(900)}, "900 tensors such as w0, w1, w10: these"),
        ("job", "is a saved job, which has not been denoised to its end: `Engine.resume`"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_other_files_are_named(tmp_path, content, words):
    path = tmp_path / "x.safetensors"
    if content == "folder":
        path.mkdir()
    elif content == "job":
        save_file({"latents": torch.zeros(1)}, path, {"sora_engine": "{}"})
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(content, path)
    with pytest.raises(MediaError) as told:
        SavedLatents.read(path)
    assert words in str(told.value)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 300


def test_latents_are_scaled_once(folder, monkeypatch):
    """What is decoded follows from what is kept."""
    calls = []
    plain = FittedCoder.denormalise

    def spy(coder, latents):
        calls.append(latents.shape)
        return plain(coder, latents)

    monkeypatch.setattr(FittedCoder, "denormalise", spy)
    request = sora.VideoRequest("a", height=32, width=32, num_frames=9, num_inference_steps=1)
    with sora.Engine.from_pretrained(folder, device="cpu") as engine:
        engine.generate(request)
    assert calls == [(1, 16, 3, 4, 4)]


def test_a_decode_that_was_killed_loses_nothing(folder, tmp_path):
    """SIGKILL in the middle of decoding; `sora decode` makes the video that would have been."""
    command = [sys.executable, "-m", "sora_engine", "generate", "a cat", "--model", str(folder)]
    command += ["--size", "64x64", "--frames", "81", "--steps", "1", "--seed", "5"]
    process = subprocess.Popen(
        [*command, "-o", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    for line in process.stdout:
        if line.startswith("decode"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    kept = tmp_path / "out.latents.safetensors"
    assert kept.exists()
    assert not (tmp_path / "out").exists()
    assert cli.main(["decode", str(kept), "-o", str(tmp_path / "again")]) == 0
    assert cli.main([*command[3:], "-o", str(tmp_path / "whole")]) == 0
    assert not (tmp_path / "whole.latents.safetensors").exists()
    again, whole = (read_video(tmp_path / name)[0] for name in ("again", "whole"))
    assert again.shape == whole.shape == (81, 64, 64, 3)
    assert np.array_equal(again, whole)


def test_cancel_while_encoding_stops_within_a_latent_frame(folder, monkeypatch):
    encoded, jobs, submitted = [], [], threading.Event()
    plain = FittedCoder.encode_chunk

    def spy(coder, frames, state=None, *, consume=False):
        encoded.append(frames.shape[2])
        if len(encoded) == 2:
            assert submitted.wait(30)
            jobs[0].cancel()
        return plain(coder, frames, state, consume=consume)

    monkeypatch.setattr(FittedCoder, "encode_chunk", spy)
    clip = np.zeros((13, 32, 32, 3), np.uint8)
    request = sora.VideoRequest(
        "a cat", height=32, width=32, num_frames=17, num_inference_steps=2, seed=1,
        clips=(sora.Clip(clip, at=0),),
    )  # fmt: skip
    with sora.Engine.from_pretrained(folder, device="cpu") as engine:
        jobs.append(engine.submit(request))
        submitted.set()
        with pytest.raises(sora.JobCancelledError, match="while encoding"):
            jobs[0].result(timeout_s=60)
    assert encoded == [1, 4]


def test_bad_values(folder, tmp_path, capsys):
    save_file({"w": torch.zeros(1)}, tmp_path / "w.safetensors")
    for arguments, words in [
        (["decode", str(tmp_path / "none"), "-o", str(tmp_path / "x.mp4")], "cannot be read"),
        (["decode", str(tmp_path / "w.safetensors"), "-o", str(tmp_path / "x.mp4")], "holds ['w']"),
        (["export-vae", str(folder), "--backend", "vulkan"], "onnx or tensorrt"),
        (["export-vae", str(folder), "--sizes", "big"], "--sizes: 'big'"),
        (["export-vae", str(tmp_path / "none")], "no such file or folder"),
    ]:
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
