"""`sora quantize`: files that the packages of others read, bit for bit, and that load here."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import comfy_kitchen as ck
import gguf
import numpy as np
import pytest
import torch
from comfy_kitchen.tensor.int8 import TensorWiseINT8Layout
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

import sora_engine as sora
from sora_engine.cli import main  # noqa: F401 - registers the commands
from sora_engine.cli.app import app
from sora_engine.io.weights.opening import open_weights
from sora_engine.io.weights.quantising import ERROR, q8_0
from sora_engine.models.inspection import inspect_file
from sora_engine.models.quantised import quantised_layers
from sora_engine.models.wan.names import to_diffusers_name, to_wan_name
from tests.parity.oracles import tiny_pipeline, tiny_transformer
from tests.unit.test_checkpoint import original_name
from tests.unit.test_weights_models import REQUEST, SHAPE, WEIGHTS


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


@pytest.fixture(scope="module")
def files(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("files")
    found = {}
    for to, suffix in (("int8", "safetensors"), ("fp8", "safetensors"), ("q8_0", "gguf")):
        found[to] = out / f"{to}.{suffix}"
        result = CliRunner().invoke(
            app, ["quantize", str(folder), "--to", to, "-o", str(found[to])]
        )
        assert result.exit_code == 0, result.output
        assert "20 weights" in result.output
    return found


def chosen(name, value):
    return name.startswith("blocks.") and name.endswith(".weight") and value.ndim == 2


def test_names_are_wan_s_own_and_back():
    for name in ("blocks.3.norm2.weight", "blocks.0.scale_shift_table", "scale_shift_table",
                 "condition_embedder.time_proj.weight",
                 "blocks.1.attn1.to_out.0.weight", "patch_embedding.bias"):  # fmt: skip
        assert to_wan_name(name) == original_name(name)
        assert to_diffusers_name(to_wan_name(name)) == name
        assert to_wan_name(to_wan_name(name)) == to_wan_name(name)
    assert to_wan_name("vace_blocks.1.proj_out.bias") == "vace_blocks.1.after_proj.bias"


def test_int8_is_comfy_kitchen_s(files, originals):
    stored = load_file(files["int8"])
    for name, value in originals.items():
        if not chosen(name, value):
            assert torch.equal(stored[name], value)
            continue
        layer = name.removesuffix(".weight")
        told = json.loads(bytes(stored[f"{layer}.comfy_quant"].tolist()))
        assert told == {"format": "int8_tensorwise"}
        codes, params = TensorWiseINT8Layout.quantize(value.float(), per_channel=True)
        assert (stored[name].dtype, stored[f"{layer}.weight_scale"].shape) == (
            torch.int8, params.scale.shape,
        )  # fmt: skip
        torch.testing.assert_close(stored[f"{layer}.weight_scale"], params.scale)
        assert (stored[name].int() - codes.int()).abs().max() <= 1
        params = replace(params, scale=stored[f"{layer}.weight_scale"])
        read = TensorWiseINT8Layout.dequantize(stored[name], params).float()
        assert float((read - value).norm() / value.norm()) < 0.015


def test_fp8_is_comfy_kitchen_s(files, originals):
    stored = load_file(files["fp8"])
    for name, value in originals.items():
        if not chosen(name, value):
            continue
        layer = name.removesuffix(".weight")
        told = json.loads(bytes(stored[f"{layer}.comfy_quant"].tolist()))
        assert told == {"format": "float8_e4m3fn"}
        scale = stored[f"{layer}.weight_scale"]
        assert scale.shape == ()
        torch.testing.assert_close(scale, value.float().abs().amax() / 448)
        theirs = ck.quantize_per_tensor_fp8(value.float(), scale, torch.float8_e4m3fn)
        read, want = (
            ck.dequantize_per_tensor_fp8(x, scale, torch.float32) for x in (stored[name], theirs)
        )
        assert float((read - value).norm() / value.norm()) < 0.03
        assert float((read != want).float().mean()) < 1e-3  # halves, rounded through reciprocals


def test_q8_0_is_the_gguf_package_s_bit_for_bit(files, originals):
    reader = gguf.GGUFReader(files["q8_0"])
    assert str(reader.fields["general.architecture"].parts[-1].tobytes(), "utf8") == "wan"
    seen = {}
    for tensor in reader.tensors:
        seen[tensor.name] = tensor
    assert set(seen) == set(originals)
    for name, value in originals.items():
        own = seen[name]
        assert list(reversed(own.shape.tolist())) == list(value.shape)
        if chosen(name, value):
            assert own.tensor_type == gguf.GGMLQuantizationType.Q8_0
            blocks = gguf.quants.quantize(value.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
            assert np.array_equal(own.data, blocks)
        else:
            read = gguf.quants.dequantize(own.data, own.tensor_type)
            assert torch.equal(torch.from_numpy(read.copy()).reshape(value.shape), value)


def test_q8_0_of_zeros_and_halves():
    rows = torch.tensor([[0.0] * 32, [127.0, 0.5, 1.5, -0.5, -2.5] + [0.0] * 27])
    theirs = gguf.quants.quantize(rows.numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(q8_0(rows).numpy(), theirs)


@pytest.mark.parametrize("to", ["int8", "fp8", "q8_0"])
def test_a_written_file_makes_videos_kept_as_it_is(folder, files, to):
    options = {"components": folder, "device": "cpu"}
    with sora.Engine.from_pretrained(files[to], dtype="float32", **options) as dense:
        expected = dense.generate(REQUEST).latents
    with sora.Engine.from_pretrained(files[to], dtype="as-stored:float32", **options) as kept:
        assert len(list(quantised_layers(kept.model.transformer(0)))) == 20
        found = kept.generate(REQUEST).latents
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def test_the_error_that_is_told_is_that_of_the_values(files, originals):
    with safe_open(files["int8"], "pt") as opened:
        told = float(opened.metadata()[ERROR])
    lost = whole = 0.0
    with open_weights(files["int8"]) as weights:
        for name, value in originals.items():
            if chosen(name, value):
                read = weights.read(name, dtype=torch.float32).double()
                lost += float((read - value.double()).square().sum())
                whole += float(value.double().square().sum())
    assert told == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    reader = gguf.GGUFReader(files["q8_0"])
    assert 0.001 < float(reader.fields[ERROR].parts[-1][0]) < 0.01


def test_inspect_names_what_was_written(files):
    for to, said in (("int8", "int8 scaled by row"), ("fp8", "float8_e4m3fn"), ("q8_0", "Q8_0")):
        assert any(said in line for line in inspect_file(files[to]).lines())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--to", "q4_0", "-o", "x.gguf"], "'q4_0' is not known; int8, fp8, q8_0 are"),
        (["--to", "int8", "-o", "x.gguf"], "must end in .safetensors"),
        (["--to", "q8_0", "-o", "no/such/x.gguf"], "No such file"),
        (["--to", "q8_0", "-o", "x.gguf", "--expert", "low"], "one transformer"),
        (["--to", "q8_0", "-o", "x.gguf", "--expert", "third"], "'third'"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(folder, tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["quantize", str(folder), *arguments])
    assert result.exit_code != 0
    assert named in f"{result.output} {result.exception}"
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_file_that_fails(folder, tmp_path, monkeypatch):
    from sora_engine.io.weights import quantising

    def broken(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(quantising, "_quantised_rows", broken)
    arguments = ["quantize", str(folder), "--to", "int8", "-o", str(tmp_path / "x.safetensors")]
    assert CliRunner().invoke(app, arguments).exit_code != 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(tmp_path):
    out = tmp_path / "sprites.safetensors"
    command = [sys.executable, "-m", "sora_engine", "quantize", "sprites", "--to", "int8"]
    done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True, check=True)
    assert "weights as int8" in done.stdout + done.stderr
    assert out.stat().st_size > 1000
