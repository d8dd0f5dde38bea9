"""The VQ-VAE against diffusers' `VQModel`: latents, codes, frames, files, memory."""

from __future__ import annotations

import json
import re

import pytest
import torch
from diffusers import VQModel
from safetensors.torch import load_file, save_file

from sora_engine.errors import CheckpointError, RequestError
from sora_engine.models.autoencoder import load_vae
from sora_engine.models.folder import Component
from sora_engine.models.kinds import part_kinds
from sora_engine.vae.kl_checkpoint import original_names
from sora_engine.vae.meter import StorageMeter
from sora_engine.vae.rehearsal import decode_memory
from sora_engine.vae.vq import VQVAE, VQConfig
from tests.parity.vae_models import relative

LAYOUTS = {
    "attention": {"block_out_channels": (8, 16), "num_vq_embeddings": 40, "latent_channels": 3},
    "wide codes": {
        "block_out_channels": (8,), "num_vq_embeddings": 30, "latent_channels": 6,
        "vq_embed_dim": 2, "mid_block_add_attention": False, "scaling_factor": 0.7,
    },
}  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", params=LAYOUTS)
def oracle(request):
    torch.manual_seed(0)
    values = LAYOUTS[request.param]
    stages = len(values["block_out_channels"])
    model = VQModel(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        norm_num_groups=2,
        **values,
    ).eval().requires_grad_(False)  # fmt: skip
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
        elif name.endswith("bias"):
            parameter.copy_(0.1 * torch.randn_like(parameter))
        elif "quantize" in name:
            parameter.copy_(torch.randn_like(parameter))  # as far apart as latents are
        elif re.search(r"attentions.0.to_", name) or name == "quant_conv.weight":
            parameter.mul_(4.0)
    return model


@pytest.fixture(scope="module")
def ours(oracle):
    made = VQVAE(VQConfig.from_dict(dict(oracle.config)))
    made.load_state_dict(oracle.state_dict())
    return made.eval().requires_grad_(False).prepare()


@pytest.fixture(scope="module")
def video():
    return torch.rand(1, 3, 3, 16, 24, generator=torch.Generator().manual_seed(2)) * 2 - 1


def test_frames_and_codes_equal_diffusers(oracle, ours, video):
    pictures = video[0].transpose(0, 1)
    latents = oracle.encode(pictures).latents
    raw = ours.denormalise(ours.encode(video))
    assert relative(raw[0].transpose(0, 1), latents) < 1e-5
    _, _, (_, _, codes) = oracle.quantize(latents)
    made = ours.encode_to_codes(video)
    assert torch.equal(made.flatten(), codes)
    assert len(codes.unique()) >= 4  # or that they are equal would say little
    # The nearest in float64, by every distance that there is.
    book = oracle.quantize.embedding.weight.double()
    away = (latents.double().movedim(1, -1)[..., None, :] - book).square().sum(-1)
    assert torch.equal(made[0], away.argmin(-1))
    want = oracle.decode(latents).sample
    got = ours.decode(ours.encode(video))[0].transpose(0, 1)
    assert relative(got, want) < 1e-5
    assert torch.equal(ours.decode_from_codes(made), ours.decode(ours.encode(video)))
    shape = (3, *made.shape[2:], oracle.quantize.vq_embed_dim)
    entries = oracle.quantize.get_codebook_entry(codes, shape)
    by_codes = oracle.decode(entries, force_not_quantize=True).sample
    assert relative(by_codes, want) < 1e-5
    # Another code would be noticed.
    assert relative(ours.decode_from_codes((made + 1) % len(book))[0].transpose(0, 1), want) > 1e-2


def test_what_is_no_code_is_refused(ours, oracle):
    count = oracle.config.num_vq_embeddings
    for codes, message in [
        (torch.zeros(1, 1, 2, 2), "codes must be integers"),
        (torch.zeros(2, 2, dtype=torch.int64), r"codes must be integers \[B, n, h, w\]"),
        (torch.full((1, 1, 2, 2), count), f"codes go from 0 to {count - 1}"),
        (torch.full((1, 1, 2, 2), -1), "got -1 to -1"),
    ]:
        with pytest.raises(RequestError, match=message):
            ours.decode_from_codes(codes)


def test_folders_and_files_load(oracle, ours, video, tmp_path):
    oracle.save_pretrained(tmp_path)
    want = ours.encode(video)
    place = Component.open("vae", tmp_path, ("VQModel",))
    read = load_vae(place, torch.device("cpu"), torch.float32)
    assert torch.equal(read.encode(video), want)
    # Under the names of latent diffusion's own code, with the configuration of the folder.
    state = load_file(tmp_path / WEIGHTS)
    config = VQConfig.from_dict(dict(oracle.config))
    names = original_names(config)
    assert names["quantize.embedding.weight"] == "quantize.embedding.weight"
    file = tmp_path / "vq.safetensors"
    save_file({f"first_stage_model.{names[n]}": t for n, t in state.items()}, file)
    lone = Component("vae", "VQModel", file, config.to_dict())
    assert torch.equal(load_vae(lone, torch.device("cpu"), torch.float32).encode(video), want)
    with pytest.raises(CheckpointError, match="whose scale of latents is not in the file"):
        part_kinds(file)
    assert VQConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "VQModel is wanted"),
        ({"num_vq_embeddings": 0}, "num_vq_embeddings must be a positive whole number, not 0"),
        ({"vq_embed_dim": "3"}, "vq_embed_dim must be a positive whole number, not '3'"),
        ({"norm_type": "spatial"}, "norm_type is 'spatial'; 'group' is supported"),
        ({"use_quant_conv": True}, "unknown keys use_quant_conv"),
        ({"layers_per_block": 10**6}, "layers_per_block is 1000000"),
        ({"act_fn": "relu"}, "act_fn is 'relu'"),
        ({"scaling_factor": -1}, "scaling_factor must be a positive number"),
        ({"block_out_channels": [7]}, "no multiple of norm_num_groups"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"]}, "UpDecoderBlock2D for each"),
    ],
)
def test_what_is_not_carried_out_is_refused(tmp_path, values, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        VQConfig.from_dict(values, path=path)


def test_decoding_holds_what_was_rehearsed(ours):
    size = (12, 16)
    said = decode_memory(ours.config, *size).peak
    latents = torch.randn(1, ours.config.z_dim, 1, *size)
    ours.decode_chunk(latents)  # lays out the weights
    with StorageMeter([latents, *ours.parameters()]) as meter, torch.inference_mode():
        ours.decode_chunk(latents)
    assert 0.7 * said < meter.peak <= said
