"""The image autoencoder against diffusers' `AutoencoderKL`: layers, files, streaming, ONNX."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from sora_engine.errors import CheckpointError
from sora_engine.models.autoencoder import load_vae
from sora_engine.models.folder import Component
from sora_engine.vae import kl, stream_decode
from sora_engine.vae.decoding import last_lap_state
from sora_engine.vae.kl import KLVAE
from sora_engine.vae.kl_config import KLConfig
from sora_engine.vae.meter import StorageMeter
from sora_engine.vae.rehearsal import decode_memory, encode_memory
from sora_engine.vae.tiling import TiledCoder, TilePlan
from tests.parity.vae_models import relative

TOLERANCE = 1e-5
LAYOUTS = {
    "one-stage": {"block_out_channels": (8,), "layers_per_block": 1},
    "published-depth": {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 2},
    "no-attention": {
        "block_out_channels": (8, 12),
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
    },
}
CPU = torch.device("cpu")


def make_oracle(layout: str, seed: int = 0, **overrides: object) -> AutoencoderKL:
    """diffusers' class with random weights, gains and biases too."""
    torch.manual_seed(seed)
    values = {"norm_num_groups": 2, "latent_channels": 4, **LAYOUTS[layout], **overrides}
    stages = len(values["block_out_channels"])
    oracle = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        **values,
    )
    oracle = oracle.eval().requires_grad_(False)
    for name, parameter in oracle.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
        elif name.endswith("bias"):
            parameter.copy_(0.1 * torch.randn_like(parameter))
        elif re.search(r"attentions.0.to_[qkv]", name):
            parameter.mul_(4)
    return oracle


def make_pair(layout: str, *, prepared: bool = True) -> tuple[AutoencoderKL, KLVAE]:
    oracle = make_oracle(layout)
    ours = KLVAE(KLConfig.from_dict(dict(oracle.config))).requires_grad_(False)
    ours.load_state_dict(oracle.state_dict())
    return oracle, ours.prepare(prepared)


def raw(oracle: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """As diffusers' pipelines go from a model's latents to those of the autoencoder."""
    return latents / oracle.config.scaling_factor + (oracle.config.shift_factor or 0.0)


def by_frames(run, video: torch.Tensor) -> torch.Tensor:
    return torch.stack([run(frame) for frame in video.unbind(2)], dim=2)


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_frames_equal_diffusers(layout, prepared):
    oracle, ours = make_pair(layout, prepared=prepared)
    factor = ours.scale_factor_spatial
    latents = torch.randn(2, ours.z_dim, 3, 5, 7)
    want = by_frames(lambda z: oracle.decode(raw(oracle, z)).sample, latents)
    got = ours.decode(latents)
    assert got.shape == (2, 3, 3, 5 * factor, 7 * factor)
    assert relative(got, want) < TOLERANCE
    # Sizes between latents round down.
    video = torch.rand(1, 3, 4, 5 * factor + factor // 2, 6 * factor) * 2 - 1
    want = by_frames(lambda frame: oracle.encode(frame).latent_dist.mean, video)
    mean, logvar = ours.encode_moments(video)
    assert relative(mean, want) < TOLERANCE
    assert relative(raw(oracle, ours.encode(video)), want) < TOLERANCE
    assert relative(logvar[:, :, 2], oracle.encode(video[:, :, 2]).latent_dist.logvar) < TOLERANCE


def test_fused_norms_are_those_op_by_op(monkeypatch):
    _, ours = make_pair("published-depth")
    latents = torch.randn(2, ours.z_dim, 2, 5, 7)
    with torch.inference_mode():
        fused = ours.decode(latents)
        monkeypatch.setattr(kl, "group_norm", None)  # nobody asks for it
        monkeypatch.setattr(kl, "fuses", lambda *tensors: False)
        assert relative(fused, ours.decode(latents)) < 1e-6


@pytest.mark.parametrize("part", ["attentions.0.to_v", "attentions.0.group_norm", "conv_shortcut"])
def test_the_comparison_would_notice(part):
    oracle, ours = make_pair("published-depth", prepared=False)
    latents = torch.randn(1, 4, 1, 5, 7)
    want = oracle.decode(raw(oracle, latents[:, :, 0])).sample
    for name, parameter in ours.named_parameters():
        if part in name and name.startswith("decoder") and name.endswith("weight"):
            parameter.mul_(0.9)
    assert relative(ours.decode(latents)[:, :, 0], want) > 100 * TOLERANCE


def test_frames_stream_and_remember_nothing():
    _, ours = make_pair("published-depth")
    latents = torch.randn(1, 4, 5, 4, 4)
    whole = ours.decode(latents)
    assert torch.equal(torch.cat(list(stream_decode(ours, latents)), dim=2), whole)
    assert torch.equal(ours.decode(latents[:, :, 3:4]), whole[:, :, 3:4])
    frames, state = ours.decode_chunk(latents[:, :, :2])
    assert frames.shape[2] == 2
    assert (state.nbytes, state.latent_frames) == (0, 2)
    # A loop needs no laps: one frame tells that there is nothing to remember.
    assert sum(1 for _ in last_lap_state(latents[0], ours)) <= 1
    latents, _ = ours.encode_chunk(torch.rand(1, 3, 7, 32, 40))
    assert latents.shape == (1, 4, 7, 4, 5)


def test_tiles_cover_the_frame():
    _, ours = make_pair("published-depth")
    latents = torch.randn(1, 4, 2, 12, 10)
    tiled = TiledCoder(ours, TilePlan(8, 8, overlap=4))
    # An approximation: norms and attention see the whole picture, or in tiles a tile.
    assert relative(tiled.decode(latents), ours.decode(latents)) < 0.5
    assert torch.equal(TiledCoder(ours, TilePlan(12, 12, 4)).decode(latents), ours.decode(latents))


@pytest.mark.parametrize("side", ["decode", "encode"])
def test_memory_is_what_was_rehearsed(side):
    _, ours = make_pair("published-depth")
    run, shape, memory = ours.decode_chunk, (1, 4, 1, 24, 20), decode_memory
    if side == "encode":
        run, shape, memory = ours.encode_chunk, (1, 3, 1, 24 * 8, 20 * 8), encode_memory
    run(torch.zeros(shape))  # lays out the weights
    x = torch.randn(shape)
    with StorageMeter([x, *ours.parameters()]) as meter, torch.inference_mode():
        run(x)
    promised = memory(ours.config, 24, 20)
    assert promised.cache == 0
    assert 0.7 * promised.peak < meter.peak <= promised.peak


def save_folder(oracle: AutoencoderKL, folder: Path, rename=lambda name: name) -> Component:
    oracle.save_pretrained(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file)
    return Component.open("vae", folder, ("AutoencoderKL",))


def older(name: str) -> str:
    """The names of diffusers before 0.14, in which published folders are."""
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
        name = name.replace(f".{new}.", f".{old}.")
    return name.replace(".to_out.0.", ".proj_attn.")


def original(oracle: AutoencoderKL) -> dict[str, torch.Tensor]:
    """The tensors as latent diffusion's own code has them, under a checkpoint's prefix."""
    layers, stages = oracle.config.layers_per_block, len(oracle.config.block_out_channels)
    names = {}
    for side in ("encoder", "decoder"):
        names |= {f"{side}.conv_{end}": f"{side}.conv_{end}" for end in ("in", "out")}
        names[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        for i in range(2):
            names[f"{side}.mid_block.resnets.{i}"] = f"{side}.mid.block_{i + 1}"
        names[f"{side}.mid_block.attentions.0"] = f"{side}.mid.attn_1"
    for i in range(stages):
        down, up = f"encoder.down_blocks.{i}", f"decoder.up_blocks.{i}"
        for j in range(layers):
            names[f"{down}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
        for j in range(layers + 1):
            names[f"{up}.resnets.{j}"] = f"decoder.up.{stages - 1 - i}.block.{j}"
        names[f"{down}.downsamplers.0"] = f"encoder.down.{i}.downsample"
        names[f"{up}.upsamplers.0"] = f"decoder.up.{stages - 1 - i}.upsample"
    inside = {
        "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
        "conv_shortcut": "nin_shortcut",
    }  # fmt: skip
    tensors = {"first_stage_model.loss.logvar": torch.zeros(1), "model.out.bias": torch.zeros(3)}
    for name, tensor in oracle.state_dict().items():
        stem = next((stem for stem in names if name.startswith(f"{stem}.")), "")
        rest = name[len(stem) :]
        if "attentions" in stem and tensor.dim() == 2:
            tensor = tensor[:, :, None, None]  # products are convolutions there
        for ours, theirs in inside.items():
            rest = rest.replace(f".{ours}.", f".{theirs}.")
        tensors["first_stage_model." + names.get(stem, "") + rest] = tensor.contiguous()
    return tensors


def test_every_published_naming_gives_the_same_bits(tmp_path):
    oracle = make_oracle("published-depth", norm_num_groups=32, block_out_channels=(32, 64, 64, 64))
    latents = torch.randn(1, 4, 1, 3, 3)
    folder = save_folder(oracle, tmp_path / "vae")
    want = load_vae(folder, CPU, torch.float32).decode(latents)
    assert relative(want[:, :, 0], oracle.decode(raw(oracle, latents[:, :, 0])).sample) < TOLERANCE
    before = save_folder(oracle, tmp_path / "older", older)
    assert torch.equal(load_vae(before, CPU, torch.float32).decode(latents), want)
    file = tmp_path / "ldm.safetensors"
    save_file(original(oracle), file)
    config = KLConfig.from_dict(dict(oracle.config))
    single = Component("vae", "AutoencoderKL", file, config.to_dict())
    assert torch.equal(load_vae(single, CPU, torch.float32).decode(latents), want)
    # What a file without a configuration is, its shapes tell.
    from sora_engine.models.inspection import inspect_file
    from sora_engine.vae.registry import vae_in_file

    inferred = vae_in_file({name: tuple(t.shape) for name, t in original(oracle).items()})
    assert inferred == KLConfig.from_dict(
        {**oracle.config, "sample_size": 32, "force_upcast": True}
    )
    assert "AutoencoderKL with 4 latent channels" in inspect_file(file).kinds


BAD = [
    ({"down_block_types": ["AttnDownEncoderBlock2D"]}, r"down_block_types is .*DownEncoderBlock2D"),
    ({"block_out_channels": [12], "norm_num_groups": 8}, "12, no multiple of norm_num_groups 8"),
    ({"block_out_channels": []}, "0 stages"),
    ({"block_out_channels": 8}, "block_out_channels must be a list"),
    ({"layers_per_block": 10**6}, "layers_per_block is 1000000; at most"),
    ({"latent_channels": 0}, "latent_channels must be a positive whole number, not 0"),
    ({"act_fn": "gelu"}, "act_fn is 'gelu'; 'silu' is supported"),
    ({"scaling_factor": 0}, "scaling_factor must be a positive number"),
    ({"shift_factor": "0"}, "shift_factor must be a number or null"),
    ({"latents_mean": [0.0] * 4}, "latents_mean is .* null is supported"),
    ({"use_quant_conv": 1}, "use_quant_conv must be true or false"),
    ({"surprise": 1}, "unknown keys surprise"),
    ({"_class_name": "VQModel"}, "_class_name is 'VQModel'"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_what_is_not_carried_out_is_refused(values, message):
    with pytest.raises(CheckpointError, match=message) as raised:
        KLConfig.from_dict(values, path="config.json")
    assert "config.json" in str(raised.value)


def test_configurations_go_round():
    for layout in LAYOUTS:
        config = KLConfig.from_dict(dict(make_oracle(layout).config))
        assert KLConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert AutoencoderKL.from_config(config.to_dict()).config.block_out_channels is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("encoder.down.1.block.0.conv2.weight"), "is missing"),
        (lambda t: t.update({"decoder.conv_in.weight": torch.zeros(64, 16, 3, 3)}), "16 latent"),
        (lambda t: t.update({"decoder.conv_in.weight": torch.zeros(64)}), "of 4 dimensions"),
    ],
)
def test_damaged_single_files_are_refused(change, message):
    from sora_engine.vae.kl_checkpoint import infer_config

    oracle = make_oracle("one-stage", norm_num_groups=32, block_out_channels=(32, 64))
    tensors = {
        name.removeprefix("first_stage_model."): tensor for name, tensor in original(oracle).items()
    }
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        infer_config({name: tuple(tensor.shape) for name, tensor in tensors.items()})


@pytest.mark.slow
def test_exported_graphs_equal_the_layers(tmp_path):
    pytest.importorskip("onnxscript", reason="needs the onnx extra")
    pytest.importorskip("onnxruntime", reason="needs the onnx extra")
    from sora_engine.vae.onnx_export import export_onnx
    from sora_engine.vae.onnx_run import OnnxVAE

    _, ours = make_pair("one-stage")
    export_onnx(ours, tmp_path)
    exported = OnnxVAE(tmp_path, CPU)
    for height, width in pairwise((3, 6, 5)):
        latents = torch.randn(1, 4, 3, height, width)
        assert relative(exported.decode(latents), ours.decode(latents)) < TOLERANCE
        video = torch.rand(1, 3, 2, height, width)
        assert relative(exported.encode(video), ours.encode(video)) < TOLERANCE
