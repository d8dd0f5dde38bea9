"""`sora inspect` names each format and each part, from headers alone."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from safetensors.torch import save_file

from sora_engine.cli.app import main
from sora_engine.errors import CheckpointError
from sora_engine.io.safetensors import SafetensorsFile
from sora_engine.models.inspection import inspect_file
from sora_engine.models.wan.config import WanConfig
from sora_engine.models.wan.model import WanTransformer
from sora_engine.models.wan.names import to_wan_name
from sora_engine.vae.wan import WanVAE
from sora_engine.vae.wan_checkpoint import original_names
from sora_engine.vae.wan_config import WanVAEConfig
from tests.unit.test_checkpoint import original_name
from tests.unit.wan_folders import IMAGE, transformer
from tests.unit.weight_recipes import GGUF, SAFETENSORS, is_linear, write_gguf, write_safetensors

NAMED = {
    "fp8_scaled, legacy": "float8_e4m3fn scaled by tensor",
    "fp8 by row, LightX2V": "float8_e4m3fn scaled by row",
    "fp8 in blocks of 64, musubi": "float8_e4m3fn scaled by 64",
    "int8 by row": "int8 scaled by row",
    "int8 convrot 256": "int8 scaled by row, convrot 256",
    "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
    "fp8 e5m2 cast": "float8_e5m2",
    "bfloat16": "bfloat16",
}


def tensors(**changes):
    shape = {"num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 512, "num_layers": 1}
    if "added_kv_proj_dim" in changes:
        changes["added_kv_proj_dim"] = 256
    state = transformer(**{**shape, **changes}).state_dict()
    return {original_name(name): value for name, value in state.items()}


@pytest.mark.parametrize("kind", [*NAMED, *GGUF])
def test_a_format_is_named(tmp_path, kind):
    values, path = tensors(), tmp_path / "wan"
    if kind in SAFETENSORS:
        write_safetensors(path, kind, values)
    else:
        write_gguf(path, kind, values)
    report = inspect_file(path)
    quantised = sum(value.numel() for name, value in values.items() if is_linear(name, value))
    assert report.formats[NAMED.get(kind, kind)] >= quantised
    assert report.num_parameters == sum(value.numel() for value in values.values())
    assert report.kinds == (
        "wan transformer, t2v: 1 layers, 256 wide, 16 channels in; goes with wan_2.1_vae, umt5_xxl",
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (IMAGE, "i2v: 1 layers, 256 wide, 36 channels in; goes with wan_2.1_vae, umt5_xxl, clip_v"),
        ({"in_channels": 48, "out_channels": 48}, "ti2v: 1 layers, 256 wide, 48 channels in; goes"),
    ],
)
def test_a_variant_is_named(tmp_path, changes, says):
    save_file({n: v.contiguous() for n, v in tensors(**changes).items()}, tmp_path / "wan")
    assert says in inspect_file(tmp_path / "wan").kinds[0]


def test_a_14b_file_of_28_gb_by_its_header(tmp_path):
    """A file with holes in the place of its values, which nobody reads."""
    config = WanConfig()
    with torch.device("meta"):
        shapes = {n: list(v.shape) for n, v in WanTransformer(config).state_dict().items()}
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[to_wan_name(name)] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    path = tmp_path / "wan2.2_t2v_high_noise_14B_bf16.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    if path.stat().st_blocks * 512 > 1 << 24:
        pytest.skip("this file system has no files with holes")
    began = time.process_time()
    report = inspect_file(path)
    assert time.process_time() - began < 1
    assert report.kinds[0].startswith("wan transformer, t2v: 40 layers, 5120 wide, 16 channels in")
    assert report.size_bytes == pytest.approx(28.6e9, rel=0.01)
    assert "takes 28.5" in report.lines()[-1]


def test_a_folder_is_told_by_its_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"a folder; .*this one holds none"):
        inspect_file(tmp_path)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "wan_2.1_vae.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"it holds vae.wan_2\.1_vae\.safetensors$"):
        inspect_file(tmp_path)


def test_a_vae_and_a_stranger_on_the_command_line(tmp_path, capsys, monkeypatch):
    config = WanVAEConfig(base_dim=8, num_res_blocks=1)
    names = original_names(config)
    state = {names[name]: value.contiguous() for name, value in WanVAE(config).state_dict().items()}
    save_file(state, tmp_path / "vae.safetensors")
    save_file({"a": torch.zeros(3)}, tmp_path / "other.safetensors")
    # No value is read: headers are enough.
    monkeypatch.setattr(SafetensorsFile, "read", None)
    files = [str(tmp_path / "vae.safetensors"), str(tmp_path / "other.safetensors")]
    assert main(["inspect", *files]) == 0
    said = capsys.readouterr().out
    assert "AutoencoderKLWan with 16 latent channels" in said
    assert "of no kind that is known" in said
    assert main(["inspect", str(tmp_path / "none.gguf")]) == 2
    assert "cannot be read" in capsys.readouterr().err
