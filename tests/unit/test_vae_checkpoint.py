"""Names of VAE tensors: Wan's own files and diffusers' folders give the same weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import save_file

from sora_engine.errors import CheckpointError
from sora_engine.io.weights.opening import open_weights
from sora_engine.models.autoencoder import load_vae
from sora_engine.models.folder import Component
from sora_engine.vae.registry import vae_in_file
from sora_engine.vae.wan import WanVAE
from sora_engine.vae.wan_checkpoint import infer_config, original_names
from sora_engine.vae.wan_config import WAN22_MEAN, WAN22_STD, WanVAEConfig
from tests.parity.vae_models import LAYOUTS, make_pair

WAN22 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "latents_mean": WAN22_MEAN,
    "latents_std": WAN22_STD,
}


def _meta(config: WanVAEConfig) -> WanVAE:
    with torch.device("meta"):
        return WanVAE(config)


def test_wan21_names_against_diffusers_conversion():
    vae = _meta(WanVAEConfig())
    names = original_names(vae.config)
    originals = {original: name for name, original in names.items()}
    assert len(originals) == len(names) == len(vae.state_dict())
    converted = convert_wan_vae_to_diffusers(dict(originals))
    assert converted.keys() == AutoencoderKLWan(base_dim=4).state_dict().keys()
    for name, ours in converted.items():
        assert ours == name


def test_wan22_names_as_published():
    # The names of Wan2.2_VAE.pth: nested lists, shortcuts without parameters.
    names = original_names(WanVAEConfig(**WAN22))
    back = {original: name for name, original in names.items()}
    assert len(back) == len(names)
    for original, name in {
        "conv1.weight": "quant_conv.weight",
        "conv2.bias": "post_quant_conv.bias",
        "encoder.conv1.weight": "encoder.conv_in.weight",
        "encoder.downsamples.0.downsamples.0.residual.0.gamma":
            "encoder.down_blocks.0.resnets.0.norm1.gamma",
        "encoder.downsamples.1.downsamples.2.time_conv.weight":
            "encoder.down_blocks.1.downsampler.time_conv.weight",
        "encoder.downsamples.1.downsamples.0.shortcut.bias":
            "encoder.down_blocks.1.resnets.0.conv_shortcut.bias",
        "encoder.head.2.weight": "encoder.conv_out.weight",
        "decoder.middle.1.to_qkv.weight": "decoder.mid_block.attentions.0.to_qkv.weight",
        "decoder.middle.2.residual.6.bias": "decoder.mid_block.resnets.1.conv2.bias",
        "decoder.upsamples.0.upsamples.3.resample.1.weight":
            "decoder.up_blocks.0.upsampler.resample.1.weight",
        "decoder.upsamples.1.upsamples.3.time_conv.bias":
            "decoder.up_blocks.1.upsampler.time_conv.bias",
        "decoder.upsamples.3.upsamples.2.residual.3.gamma":
            "decoder.up_blocks.3.resnets.2.norm2.gamma",
        "decoder.head.0.gamma": "decoder.norm_out.gamma",
    }.items():  # fmt: skip
        assert back[original] == name


@pytest.mark.parametrize(
    "values", [{}, WAN22, {"dim_mult": (1, 2), "temperal_downsample": (True,)}]
)
@pytest.mark.parametrize("prefix", ["", "vae."])
def test_the_config_is_read_from_the_shapes(values, prefix):
    config = WanVAEConfig(**({"decoder_base_dim": 96} | values))
    shapes = {name: tuple(t.shape) for name, t in _meta(config).state_dict().items()}
    original = {prefix + name: shapes[ours] for ours, name in original_names(config).items()}
    assert infer_config(original) == config


def load(path, class_name="AutoencoderKLWan", config=None):
    """The VAE of a single file, whose configuration is the file's own unless one is given."""
    with open_weights(path) as weights:
        found = config or vae_in_file({n: weights.info(n).shape for n in weights}, path=path)
    assert found is not None
    component = Component("vae", class_name, path, found.to_dict())
    return load_vae(component, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("layout", ["wan21", "wan21-deep", "wan22", "two-stages-residual"])
@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_both_sets_of_names_give_the_same_bits(tmp_path, layout, prefix):
    _, vae = make_pair(layout)
    names = original_names(vae.config)
    state = vae.state_dict()
    latents = torch.randn(1, vae.z_dim, 2, 2, 3)
    want = vae.decode(latents)
    single = {prefix + names[name]: tensor.contiguous() for name, tensor in state.items()}
    if prefix:  # of an all-in-one file it is a part
        single["model.diffusion_model.head.weight"] = torch.zeros(2)
    path = tmp_path / "vae.safetensors"
    for tensors in (state, single):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        loaded = load(path, config=vae.config)
        assert loaded.state_dict().keys() == state.keys()
        assert torch.equal(loaded.decode(latents), want)


def test_what_is_wrong_is_named(tmp_path):
    config = WanVAEConfig.from_dict(LAYOUTS["wan21"])
    state = WanVAE(config).state_dict()
    names = original_names(config)
    single = {names[name]: tensor for name, tensor in state.items()}
    key = "decoder.conv_in.weight"
    path = tmp_path / "vae.safetensors"

    for tensors, says, tensor in (
        ({k: v for k, v in state.items() if k != key}, f"missing tensors: {key}", key),
        (
            single | {"decoder.conv9.weight": single["conv1.bias"].clone()},
            "unexpected tensors: decoder.conv9.weight",
            "decoder.conv9.weight",
        ),
        (state | {key: torch.zeros(3, 3)}, r"\[3, 3\]", key),
    ):
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
        with pytest.raises(CheckpointError, match=says) as caught:
            load(path, config=config)
        assert caught.value.tensor == tensor
        assert caught.value.path == path
    # diffusers' names say nothing about the latents' statistics
    assert vae_in_file({k: tuple(v.shape) for k, v in state.items()}) is None
    with pytest.raises(CheckpointError, match="names of Wan's own"):
        infer_config({k: tuple(v.shape) for k, v in state.items()})
    with pytest.raises(CheckpointError, match="32 latent channels"):
        infer_config({k: tuple(v.shape) for k, v in single.items()} | {"conv2.weight": (32, 32)})
