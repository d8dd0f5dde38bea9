"""NaN and infinity become a typed error that says where, and never a video."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sora_engine as sora
from sora_engine.cli import main
from sora_engine.vae.finite import is_finite
from tests.faults.engines import difference, engine

SPRITES = Path(sora.__file__).parent / "checkpoints" / "sprites"
SMALL = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 4, "solver": "unipc"}
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


def request(**more):
    return sora.VideoRequest("a red circle", **{**SMALL, "seed": 1, **more})


def altered(folder, file, name, change):
    """A copy of the bundled checkpoint in which the first tensor of that name is changed."""
    path = folder / "model"
    shutil.copytree(SPRITES, path)
    weights = load_file(path / file)
    key = next(key for key in weights if key == name or key.endswith(f".{name}"))
    weights[key] = change(weights[key])
    save_file(weights, path / file)
    return path


@pytest.fixture
def overflowing(tmp_path):
    """Stands for a checkpoint whose activations leave the range of float16."""
    return altered(tmp_path, TRANSFORMER, "ffn.net.2.weight", lambda weight: weight * 3e4)


def test_latents_that_overflow_fail_the_job_with_stage_step_and_advice(overflowing):
    with sora.Engine.from_pretrained(overflowing, device="cpu", dtype="float16") as made:
        job = made.submit(request())
        with pytest.raises(sora.NonFiniteError, match=r"^denoising: step 1 of 4 .*") as told:
            job.result(300)
    assert (told.value.stage, told.value.step) == ("denoising", 1)
    assert "'bfloat16' or 'float32'" in str(told.value)
    assert job.state == "failed"
    assert job.latents is None


def test_the_advice_is_followed_to_a_video(overflowing):
    with sora.Engine.from_pretrained(overflowing, device="cpu", dtype="bfloat16") as made:
        assert torch.isfinite(made.generate(request()).latents).all()


def test_the_command_is_one_line_exit_code_1_and_no_file(overflowing, tmp_path, capsys):
    output = tmp_path / "out.mp4"
    arguments = ["generate", "a red circle", "--model", str(overflowing), "--dtype", "float16"]
    arguments += ["--size", "16x16", "--frames", "5", "--steps", "2", "--seed", "1"]
    assert main([*arguments, "-o", str(output)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("sora: error: denoising: step 1 of 2 ")
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_company_goes_on():
    """Noise of 1e38 is a number, and what a step makes of it is none."""
    with engine() as made:
        alone = [made.generate(request(seed=seed)) for seed in (1, 2)]
        wild = torch.full_like(alone[0].latents, 1e38)
        with made._workers[0]._wake:
            jobs = [made.submit(request(latents=wild))]
            jobs += [made.submit(request(seed=seed)) for seed in (1, 2)]
        with pytest.raises(sora.NonFiniteError, match="denoising"):
            jobs[0].result(300)
        for job, want in zip(jobs[1:], alone, strict=True):
            video = job.result(300)
            assert video.receipt.packed
            assert difference(video, want) < 1e-5


def test_a_saved_job_stays_at_its_last_good_step(tmp_path, monkeypatch):
    from sora_engine.samplers import UniPCSolver

    step, kept = UniPCSolver._step, tmp_path / "job.safetensors"

    def breaks(self, state, i, sample, *rest):
        stepped, after = step(self, state, i, sample, *rest)
        return (stepped * math.nan if i == 2 and not sample.is_meta else stepped), after

    with engine() as made:
        want = made.generate(request())
        monkeypatch.setattr(UniPCSolver, "_step", breaks)
        with pytest.raises(sora.NonFiniteError, match="step 3 of 4") as told:
            made.submit(request(), save_to=kept).result(300)
        assert told.value.step == 3
        monkeypatch.undo()
        assert torch.equal(made.resume(kept).result(300).latents, want.latents)


@pytest.mark.parametrize("loop", [False, True])
def test_frames_of_nan_fail_the_job_and_its_latents_are_kept(tmp_path, loop):
    model = altered(
        tmp_path,
        "vae/diffusion_pytorch_model.safetensors",
        "decoder.conv_out.bias",
        lambda bias: bias * math.nan,
    )
    frames = 8 if loop else 5
    with sora.Engine.from_pretrained(model, device="cpu") as made:
        job = made.submit(request(num_frames=frames, loop=loop))
        with pytest.raises(sora.NonFiniteError, match=r"^decoding: .* NaN or infinity") as told:
            job.result(300)
    assert told.value.stage == "decoding"
    assert told.value.step == (None if loop else 1)
    assert job.latents is not None
    assert torch.isfinite(job.latents).all()


def test_texts_and_clips_of_nan_are_found_while_encoding(tmp_path):
    text = altered(
        tmp_path / "text",
        "text_encoder/model.safetensors",
        "final_layer_norm.weight",
        lambda weight: weight * math.nan,
    )
    vae = altered(
        tmp_path / "vae",
        "vae/diffusion_pytorch_model.safetensors",
        "quant_conv.bias",
        lambda bias: bias * math.nan,
    )
    clip = np.zeros((5, 16, 16, 3), np.uint8)
    for model, asked, what in (
        (text, request(), "a prompt"),
        (vae, request(clips=[sora.Clip(clip[:1])]), "a known clip"),
        (vae, request(init=clip), "the start video"),
    ):
        with (
            sora.Engine.from_pretrained(model, device="cpu") as made,
            pytest.raises(sora.NonFiniteError, match=f"^encoding: {what}") as told,
        ):
            made.generate(asked)
        assert (told.value.stage, told.value.step) == ("encoding", None)


def test_noise_of_nan_is_the_callers():
    with engine() as made:
        noise = torch.zeros_like(made.generate(request()).latents)
        noise[0, 0, 0, 0] = math.nan
        with pytest.raises(sora.RequestError, match="latents hold NaN or infinity"):
            made.generate(request(latents=noise))


def test_ranks_tell_the_same(overflowing):
    parallel = sora.ParallelConfig(ulysses=2)
    with (
        sora.Engine.from_pretrained(
            overflowing, device="cpu", dtype="float16", parallel=parallel
        ) as made,
        pytest.raises(sora.NonFiniteError, match=r"^denoising: step 1 of 4 ") as told,
    ):
        made.generate(request())
    assert (told.value.stage, told.value.step) == ("denoising", 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_among_a_million_is_found(bad):
    values = torch.randn(1000, 1000)
    assert is_finite(values)
    values[313, 717] = bad
    assert not is_finite(values)
    values[0, 0] = -bad
    assert not is_finite(values)


def test_large_numbers_are_numbers():
    """Their sum is none in float32: it is the values that count."""
    assert is_finite(torch.full((1000,), 3e38))
    assert is_finite(torch.full((1000,), 6e4, dtype=torch.float16))
    assert is_finite(torch.tensor([3e38, 3e38, -3e38]))
    assert is_finite(torch.zeros(0))
    assert is_finite(torch.tensor(2**62))
