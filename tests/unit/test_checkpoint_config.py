"""WanConfig reads what diffusers writes, and refuses everything else by name."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest
from diffusers import WanTransformer3DModel

from sora_engine.errors import CheckpointError
from sora_engine.models.wan.config import WanConfig

WAN_21_I2V = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.33.0.dev0",
    "patch_size": [1, 2, 2],
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 36,
    "image_dim": 1280,
    "added_kv_proj_dim": 5120,
}


def test_fields_and_defaults_are_those_of_diffusers():
    parameters = inspect.signature(WanTransformer3DModel.__init__).parameters
    theirs = {name: p.default for name, p in parameters.items() if name != "self"}
    ours = {field.name: field.default for field in dataclasses.fields(WanConfig)}
    # None unless the checkpoint is a VACE one, which has these two besides.
    assert ours.pop("vace_layers") is None
    assert ours.pop("vace_in_channels") is None
    # Of a model that is driven: diffusers has none.
    assert ours.pop("action_dim") is None
    assert ours.pop("rope_pairs") is None
    assert ours.pop("rope_theta") == 10_000.0
    # And of one that is told where the camera is.
    assert ours.pop("in_dim_control_adapter") is None
    assert ours.pop("downscale_factor_control_adapter") == 8
    assert ours == theirs


def test_what_diffusers_saves_is_read_back(tmp_path):
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=36,
        out_channels=16,
        text_dim=32,
        ffn_dim=48,
        num_layers=1,
        image_dim=20,
        added_kv_proj_dim=24,
        pos_embed_seq_len=10,
    )
    model.save_config(tmp_path)
    config = WanConfig.from_dict(json.loads((tmp_path / "config.json").read_text()))
    assert {name: getattr(config, name) for name in model.config if not name.startswith("_")} == {
        name: value for name, value in model.config.items() if not name.startswith("_")
    }
    assert config.inner_dim == 24
    assert WanConfig.from_dict(config.to_dict()) == config


def test_null_out_channels_means_in_channels():
    assert WanConfig.from_dict({"in_channels": 48, "out_channels": None}).out_channels == 48


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"_class_name": "WanAnimateTransformer3DModel"}, "WanAnimateTransformer3DModel"),
        ({"auto_map": {}}, "auto_map"),
        ({"patch_size": [1, 2]}, "patch_size"),
        ({"patch_size": [1, 0, 2]}, "patch_size"),
        ({"patch_size": 2}, "patch_size"),
        ({"num_layers": 0}, "num_layers"),
        ({"num_layers": True}, "num_layers"),
        ({"ffn_dim": "13824"}, "ffn_dim"),
        ({"text_dim": 4096.0}, "text_dim"),
        ({"attention_head_dim": 127}, "attention_head_dim"),
        ({"freq_dim": 255}, "freq_dim"),
        ({"qk_norm": "rms_norm"}, "rms_norm_across_heads"),
        ({"qk_norm": None}, "rms_norm_across_heads"),
        ({"cross_attn_norm": 1}, "cross_attn_norm"),
        ({"eps": float("nan")}, "eps"),
        ({"eps": "1e-6"}, "eps"),
        ({"image_dim": None}, "added_kv_proj_dim"),
        ({"added_kv_proj_dim": 1280}, "5120"),
        ({"image_dim": None, "added_kv_proj_dim": None, "pos_embed_seq_len": 4}, "image_dim"),
    ],
)
def test_a_bad_value_is_named(change, says):
    WanConfig.from_dict(WAN_21_I2V)
    with pytest.raises(CheckpointError, match=says) as caught:
        WanConfig.from_dict({**WAN_21_I2V, **change}, path="transformer/config.json")
    assert str(caught.value).startswith("transformer/config.json: ")
    assert str(caught.value.path) == "transformer/config.json"
