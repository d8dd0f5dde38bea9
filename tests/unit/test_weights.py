"""Quantised weights of safetensors files against comfy-kitchen and float64."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from sora_engine.io.weights import source as seam
from sora_engine.io.weights.dequantised import DequantisedWeights
from sora_engine.io.weights.opening import open_weights
from tests.unit.weight_recipes import SAFETENSORS, write_safetensors

PREFIX = "model.diffusion_model."


def tensors():
    torch.manual_seed(3)
    wide = torch.randn(160, 512) * torch.linspace(0.5, 3, 160)[:, None]
    return {
        "blocks.0.q.weight": wide,
        "blocks.0.q.bias": torch.randn(160).bfloat16(),
        "blocks.0.ffn.0.weight": torch.randn(384, 256) / 3,
        "head.weight": torch.randn(4, 6, dtype=torch.float16),
    }


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("kind", SAFETENSORS)
def test_a_format_gives_the_values_of_another_reader(tmp_path, monkeypatch, kind, prefix):
    monkeypatch.setattr(seam, "PIECE_VALUES", 512 * 7)  # pieces end within tiles of 128 rows
    path = tmp_path / "w.safetensors"
    values = write_safetensors(path, kind, tensors(), prefix)
    with open_weights(path) as weights:
        assert set(weights) == set(values)
        assert len(weights) == len(values)
        for name, value in values.items():
            assert name in weights
            assert weights.info(name).shape == tuple(value.shape)
            got = weights.read(name, dtype=torch.float32)
            # One rounding of a product; rotations add up 256 of them.
            error = (got - value.float()).abs().max()
            assert error <= value.float().abs().max() * (2e-6 if "convrot" in kind else 1.2e-7)
            half = weights.read(name, dtype=torch.bfloat16)
            assert torch.equal(half, got.bfloat16())
            rows = weights.read(name, dtype=torch.float32, rows=range(1, len(value) - 1))
            assert torch.allclose(rows, got[1:-1], rtol=1e-6, atol=1e-6)
            assert weights.read(name, device="meta", dtype=torch.float16).shape == value.shape


def test_each_part_of_a_larger_file_has_its_own_mark(tmp_path):
    path, prefixes = tmp_path / "w.safetensors", (PREFIX, "text_encoders.umt5xxl.transformer.")
    stored, values = {}, {}
    for prefix in prefixes:
        values |= write_safetensors(path, "fp8_scaled, legacy", tensors(), prefix)
        stored |= load_file(path)
    cast = torch.randn(8, 8).to(torch.float8_e4m3fn)
    save_file({**stored, "vae.conv.weight": cast}, path)  # of a part without a mark
    with open_weights(path) as weights:
        assert set(weights) == {*values, "vae.conv.weight"}
        for name, value in values.items():
            assert torch.allclose(weights.read(name, dtype=torch.float32), value.float())
        assert torch.equal(weights.read("vae.conv.weight", dtype=torch.float32), cast.float())


@pytest.mark.parametrize("kind", [k for k in SAFETENSORS if SAFETENSORS[k].config])
def test_the_marks_are_what_tells(tmp_path, kind):
    """The bytes mean nothing without them: a reader that ignored them would be far off."""
    path = tmp_path / "w.safetensors"
    values = write_safetensors(path, kind, tensors())
    with open_weights(path) as weights:
        assert isinstance(weights, DequantisedWeights)
        raw = weights.weights.read("blocks.0.q.weight").float()
        value = values["blocks.0.q.weight"]
        assert raw.shape != value.shape or (raw - value).norm() > value.norm()
