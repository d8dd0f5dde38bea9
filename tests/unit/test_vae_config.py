"""`WanVAEConfig`: what it reads, what it refuses and how it says so."""

from __future__ import annotations

import json

import pytest

from sora_engine.errors import CheckpointError
from sora_engine.vae.wan_config import WanVAEConfig


def test_defaults_are_wan_21():
    config = WanVAEConfig.from_dict(
        {"_class_name": "AutoencoderKLWan", "_diffusers_version": "0.35"}
    )
    assert (config.factor_temporal, config.factor_spatial, config.z_dim) == (4, 8, 16)
    assert config == WanVAEConfig()


def test_factors_come_from_the_layers():
    config = WanVAEConfig(dim_mult=(1, 2), temperal_downsample=(True,), patch_size=2,
                          in_channels=12, out_channels=12)  # fmt: skip
    assert (config.factor_temporal, config.factor_spatial) == (2, 4)


def test_a_file_and_a_folder(tmp_path):
    config = WanVAEConfig(base_dim=8, clip_output=False)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_dict()))
    assert WanVAEConfig.from_file(file) == config
    assert WanVAEConfig.from_file(tmp_path) == config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"_class_name": "AutoencoderKL"}, "'AutoencoderKL'"),
        ({"base_dims": 4}, "base_dims"),
        ({"base_dim": "96"}, "base_dim .*'96'"),
        ({"base_dim": 0}, "base_dim .*0"),
        ({"z_dim": True}, "z_dim .*True"),
        ({"dim_mult": 4}, "dim_mult .*4"),
        ({"dim_mult": []}, "dim_mult"),
        ({"dim_mult": [1, -2, 4, 4]}, r"dim_mult\[1\] .*-2"),
        ({"temperal_downsample": [True]}, "temperal_downsample has 1 .* needs 3"),
        ({"temperal_downsample": [1, 0, 0]}, "temperal_downsample .*1"),
        ({"attn_scales": ["half"]}, "attn_scales .*'half'"),
        ({"dropout": 1.5}, "dropout .*1.5"),
        ({"z_dim": 4}, "latents_mean has 16 .* 4"),
        ({"latents_std": [0.0] * 16}, "latents_std .*0.0"),
        ({"latents_mean": [float("nan")] * 16}, "latents_mean .*nan"),
        ({"is_residual": "yes"}, "is_residual .*'yes'"),
        ({"patch_size": 2}, "in_channels is 3.*multiple of 4"),
        ({"scale_factor_spatial": 32}, "scale_factor_spatial is 32.*make 8"),
        ({"scale_factor_temporal": 8}, "scale_factor_temporal is 8.*make 4"),
    ],
)
def test_bad_values_are_named(tmp_path, values, words):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=words) as caught:
        WanVAEConfig.from_file(file)
    assert caught.value.path == file
    assert str(caught.value).count(str(file)) == 1


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_unreadable_files(tmp_path, text):
    file = tmp_path / "config.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        WanVAEConfig.from_file(file)
