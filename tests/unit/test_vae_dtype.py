"""`vae_dtype`: which dtype the autoencoder has, what is refused, and that results carry it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import sora_engine as sora
from sora_engine.cli.app import UsageError, app
from sora_engine.config import NO_LIMIT
from sora_engine.errors import BackendError
from sora_engine.io.provenance import read_provenance
from sora_engine.models.device import resolve_vae_dtype
from sora_engine.models.loading import load_video_decoder, load_video_model
from sora_engine.testing.device import shadow_device
from sora_engine.testing.shadow import walk
from sora_engine.vae.blocks import RMSNorm
from sora_engine.vae.native import native_kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FP32 = torch.bfloat16, torch.float32
REQUEST = sora.VideoRequest(
    "a red circle moves left", seed=3, num_frames=5, height=48, width=48, num_inference_steps=4
)


@pytest.mark.parametrize(
    ("asked", "device", "dtype", "backend", "found"),
    [
        ("auto", CPU, BF16, "auto", FP32),
        ("auto", CUDA, BF16, "auto", BF16),
        ("auto", CUDA, FP32, "torch", FP32),
        ("auto", CUDA, BF16, "onnx", FP32),
        ("fp32", CUDA, BF16, "auto", FP32),
        ("bfloat16", CPU, FP32, "torch", BF16),
        (torch.float16, CUDA, BF16, "tensorrt", torch.float16),
        ("float32", CPU, BF16, "onnx", FP32),
    ],
)
def test_which_dtype(asked, device, dtype, backend, found):
    assert resolve_vae_dtype(asked, device, dtype, backend) == found


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"vae_dtype": "int8"}, r"vae_dtype 'int8' is not supported; use auto, float32"),
        ({"vae_dtype": "bf16", "vae_backend": "onnx"}, r"vae_dtype='float32' would work"),
    ],
)
def test_what_is_refused(settings, says):
    with pytest.raises(BackendError, match=says):
        sora.Engine.from_pretrained("sprites", device="cpu", **settings)


def test_frames_in_bfloat16_are_close_and_say_so():
    frames = {}
    for dtype in ("auto", "bfloat16"):
        with sora.Engine.from_pretrained("sprites", device="cpu", vae_dtype=dtype) as engine:
            video = engine.generate(REQUEST)
        frames[dtype] = video.frames.astype(np.float64)
        assert video.receipt.dtype == "float32"
        assert video.receipt.vae_dtype == ("float32" if dtype == "auto" else dtype)
        assert video.provenance.settings.get("vae_dtype") == (None if dtype == "auto" else dtype)
    error = np.mean((frames["bfloat16"] - frames["auto"]) ** 2)
    assert 0 < error < 255**2 / 10**4.5  # over 45 dB, and not the same arithmetic


def test_like_and_decode_take_the_dtype_of_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = ["--size", "48x48", "--frames", "5", "--steps", "3", "--seed", "4"]
    run = CliRunner().invoke
    first = run(app, ["generate", "a", *size, "--vae-dtype", "bfloat16", "-o", "a.gif"])
    assert first.exit_code == 0, first.output
    again = run(app, ["generate", "--like", "a.gif", "-o", "b.gif"])
    assert again.exit_code == 0, again.output
    assert read_provenance("b.gif").settings["vae_dtype"] == "bfloat16"
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()
    wrong = run(app, ["generate", "a", "--vae-dtype", "fp8"])
    assert isinstance(wrong.exception, UsageError)
    assert "--vae-dtype: vae_dtype 'fp8' is not supported" in str(wrong.exception)


def test_float32_beside_a_transformer_in_bfloat16_on_a_gpu():
    """On the shadow device, where what mixes devices raises: frames as a CPU decodes them."""
    with shadow_device() as shadow:
        model = load_video_model("sprites", device="cuda", vae_dtype="fp32", cuda_graphs="off")
        assert (model.dtype, model.vae_dtype) == (BF16, FP32)
        assert {weight.dtype for weight in model.vae.layers.parameters()} == {FP32}
        model.vae.limit(NO_LIMIT)
        made = walk(model, REQUEST, shadow)
    decoder = load_video_decoder("sprites", device="cpu")
    latents = decoder.vae.normalise(made.latents[None])[0]
    due = torch.cat(list(decoder.decode(latents, wraps=False)))
    # Ops run by their reference there, and by C++ here.
    assert int((made.frames.int() - due.int()).abs().max()) <= 1


@pytest.mark.skipif(not native_kernels(), reason="needs the C++ kernels")
@pytest.mark.parametrize(("dtype", "error"), [(FP32, 2e-6), (BF16, 2**-8 + 2e-4)])
def test_norm_and_silu_are_one_pass_with_a_past_and_without(dtype, error):
    """Each is float64's, rounded once; and a frame is the same behind a past as without one. In
    bfloat16 rounding is 2^-8 at the most, beside a power of 7e-5 and a reciprocal of 2^-14."""
    torch.manual_seed(0)
    norm = RMSNorm(96).to(dtype).requires_grad_(False)
    norm.gamma.copy_(torch.rand_like(norm.gamma) + 0.5)
    x = (3 * torch.randn(1, 96, 3, 5, 7)).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    past = torch.randn(1, 96, 2, 5, 7).to(dtype)
    wide = x.double()
    gain = 96**0.5 * norm.gamma.double()
    due = torch.nn.functional.silu(wide / wide.square().sum(1, keepdim=True).sqrt() * gain)
    with torch.inference_mode():
        alone = norm.silu(x)
        behind, _ = norm.silu_behind(past, x)
    assert ((alone.double() - due).abs() <= due.abs() * error + 1e-6).all()
    assert torch.equal(behind[:, :, 2:], alone)
    assert torch.equal(behind[:, :, :2], past)
