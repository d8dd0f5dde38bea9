"""Whole models out of quantised files: the latents of the same values in a plain folder."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import sora_engine as sora
from sora_engine import VideoRequest
from tests.parity.oracles import tiny_pipeline, tiny_transformer
from tests.unit.test_checkpoint import original_name
from tests.unit.weight_recipes import write_gguf, write_safetensors

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
# Heads are 128 wide in every published Wan, and blocks of quantisation up to 256.
SHAPE = {"num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 512}
REQUEST = VideoRequest(
    "a red circle",
    height=32,
    width=32,
    num_frames=5,
    num_inference_steps=4,
    guidance_scale=2.0,
    seed=1,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain")
    made = tiny_pipeline("t2v", 0)
    made.transformer = tiny_transformer(0, **SHAPE)
    made.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def originals(folder):
    return {original_name(name): value for name, value in load_file(folder / WEIGHTS).items()}


def latents(path, **options):
    """In float32: by itself a machine may take bfloat16 for such files."""
    with sora.Engine.from_pretrained(path, device="cpu", dtype="float32", **options) as engine:
        return engine.generate(REQUEST).latents


@pytest.fixture(scope="module")
def unquantised(folder):
    return latents(folder)


def plain_latents(folder, tmp_path, values):
    """Of a folder that holds `values`, which have Wan's own names."""
    names = {original_name(name): name for name in load_file(folder / WEIGHTS)}
    plain = shutil.copytree(folder, tmp_path / "dequantised")
    save_file({names[n]: v.float().contiguous() for n, v in values.items()}, plain / WEIGHTS)
    found = latents(plain)
    shutil.rmtree(plain)
    return found


MODELS = [
    "bfloat16", "fp8 e4m3 cast", "fp8_scaled, legacy", "fp8_scaled e5m2, Kijai", "fp8, native",
    "fp8 by row, LightX2V", "fp8 in blocks of 64, musubi", "int8 by tensor", "int8 by row",
    "int8 convrot 256", "mxfp8", "nvfp4",
]  # fmt: skip
"""One of each arithmetic: their marks' variants are read to the same values (test_weights.py)."""


@pytest.mark.parametrize("kind", MODELS)
def test_a_safetensors_file_gives_the_latents_of_its_values(
    folder, originals, unquantised, tmp_path, kind
):
    path = tmp_path / "wan.safetensors"
    values = write_safetensors(path, kind, originals)
    found = latents(path, components=folder)
    assert (found - plain_latents(folder, tmp_path, values)).abs().max() < 1e-5
    if kind != "bfloat16":  # what is compared is not the original
        assert found.abs().max() < 100
        assert (found - unquantised).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q5_1", "Q2_K", "Q4_K", "Q6_K"])
def test_a_gguf_file_gives_the_latents_of_its_values(folder, originals, tmp_path, kind):
    path = tmp_path / "wan.gguf"
    values = write_gguf(path, kind, originals)
    found = latents(path, components=folder)
    assert (found - plain_latents(folder, tmp_path, values)).abs().max() < 1e-5
    assert found.abs().max() < 100


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_the_transformer_of_a_larger_file(folder, originals, tmp_path, prefix):
    path = tmp_path / "all.safetensors"
    kind = "fp8_scaled, legacy"
    values = write_safetensors(path, kind, originals, prefix)
    others = {"vae.conv1.weight": torch.zeros(2), "text_encoders.spiece_model": torch.zeros(1)}
    stored = {**load_file(path), **(others if prefix.startswith("model.") else {})}
    save_file(stored, path)
    found = latents(path, components=folder)
    values = {name.removeprefix(prefix): value for name, value in values.items()}
    assert (found - plain_latents(folder, tmp_path, values)).abs().max() < 1e-5


def test_two_experts_in_two_formats(folder, originals, tmp_path):
    high, low = tmp_path / "high.safetensors", tmp_path / "low"
    first = write_safetensors(high, "fp8_scaled, Kijai", originals)
    low = low.with_suffix(".gguf")
    second = write_gguf(low, "Q8_0", originals)
    plain = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, values in zip(plain, (first, second), strict=True):
        save_file({name: value.float().contiguous() for name, value in values.items()}, path)
    found = latents([high, low], components=folder)
    assert (found - latents(plain, components=folder)).abs().max() < 1e-5
    assert (found - latents([high, high], components=folder)).abs().max() > 1e-4
