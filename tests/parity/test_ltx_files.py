"""Files of LTX-Video: its authors', with all in one or beside folders, and bad ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import LTXPipeline
from diffusers.loaders.single_file_utils import convert_ltx_vae_checkpoint_to_diffusers
from safetensors.torch import save_file

import sora_engine as sora
from sora_engine.errors import CheckpointError
from sora_engine.models.inspection import inspect_file
from sora_engine.models.registry import open_checkpoint
from tests.parity.ltx_models import tiny_ltx_pipeline, tiny_ltx_vae

GIVEN = sora.VideoRequest(
    "a red panda", negative_prompt="ugly", height=32, width=64, num_frames=17, seed=3,
    num_inference_steps=2, guidance_scale=3.0,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipeline():
    return tiny_ltx_pipeline()


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("ltx")
    pipeline.save_pretrained(path)
    return path


@pytest.fixture
def texts(folder):
    return {name: folder / name for name in ("text_encoder", "tokenizer")}


CONFIG, INDEX, VAE = "transformer/config.json", "model_index.json", "vae/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
BAD_FOLDERS = [
    (CONFIG, {"norm_elementwise_affine": True}, "norm_elementwise_affine is True; an LTX-Video"),
    (CONFIG, {"patch_size": 2}, "patch_size is 2; an LTX-Video transformer has 1"),
    (CONFIG, {"num_layers": 0}, "num_layers is 0; it must be a positive integer"),
    (CONFIG, {"num_layers": 3}, r"missing tensors: transformer_blocks\.2\."),
    (CONFIG, {"cross_attention_dim": 64}, "cross_attention_dim is 64; texts are projected to 32"),
    (CONFIG, {"out_channels": 16}, "out_channels is 16; a flow has as many as in_channels, 8"),
    (CONFIG, {"caption_channels": 16}, "reads texts of 16 channels and the encoder gives 32"),
    (CONFIG, {"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'"),
    (CONFIG, {"pixel_times": True}, r"unknown configuration keys \['pixel_times'\]"),
    (CONFIG, {"_class_name": "LTX2VideoTransformer3DModel"}, "class is 'LTX2VideoTransformer3D"),
    (INDEX, {"text_encoder": ["transformers", "UMT5EncoderModel"]}, "transformers.UMT5Encoder"),
    (INDEX, {"vae": [None, None]}, "the model has no vae"),
    (VAE, {"latent_channels": 16}, "latents_mean has 8 values; 16 numbers are wanted"),
    (VAE, {"encoder_causal": False}, "encoder_causal False; 1 and true are supported"),
    (VAE, {"layers_per_block": [1, 1]}, "layers_per_block has 2 entries; 5 would go with"),
    (VAE, {"spatial_compression_ratio": 32}, "spatial_compression_ratio is 32; .* compress by 8"),
    (VAE, {"down_block_types": ["CogVideoXDownBlock3D"] * 4}, "all LTXVideoDownBlock3D or all"),
    (SCHEDULER, {"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
    (SCHEDULER, {"shift_terminal": 2.0}, "shift_terminal = 2.0.*must be under 1"),
]


@pytest.mark.parametrize(("path", "values", "message"), BAD_FOLDERS)
def test_bad_folders_are_refused(folder, tmp_path, path, values, message):
    bad = tmp_path / "bad"
    bad.mkdir()
    for part in folder.iterdir():  # links to what stays, copies of what changes
        (bad / part.name).symlink_to(part)
    place = bad / path
    name = path.partition("/")[0]
    (bad / name).unlink()
    if "/" in path:
        place.parent.mkdir()
        for file in (folder / name).iterdir():
            (place.parent / file.name).symlink_to(file)
        place.unlink()
    place.write_text(json.dumps({**json.loads((folder / path).read_text()), **values}))
    with pytest.raises(CheckpointError, match=message) as raised:
        sora.Engine.from_pretrained(bad, device="cpu").close()
    assert "\n" not in str(raised.value)
    assert str(bad) in str(raised.value)


def authors_names(oracle) -> dict[str, torch.Tensor]:
    """A transformer's weights as its authors' files name them."""
    back = {"proj_in": "patchify_proj", "time_embed": "adaln_single"}
    names = {}
    for name, value in oracle.state_dict().items():
        first, _, rest = name.partition(".")
        name = f"{back.get(first, first)}.{rest}" if rest else name
        name = name.replace(".norm_q", ".q_norm").replace(".norm_k", ".k_norm")
        names[f"model.diffusion_model.{name}"] = value.contiguous()
    return names


def test_a_file_under_the_authors_names_loads(pipeline, folder, tmp_path):
    (tmp_path / "transformer").mkdir()
    file = tmp_path / "transformer" / "ltx-video.safetensors"
    save_file(authors_names(pipeline.transformer), file)
    (tmp_path / "transformer" / "config.json").symlink_to(folder / CONFIG)
    report = inspect_file(file)
    assert report.kinds == (
        "ltx transformer, ti2v: 2 layers, 32 wide, 8 latent channels; goes with an "
        "AutoencoderKLLTXVideo and a T5 encoder",
    )
    with sora.Engine.from_pretrained(folder, device="cpu") as engine:
        want = engine.generate(GIVEN)
    with sora.Engine.from_pretrained(file, components=folder, device="cpu") as other:
        got = other.generate(GIVEN)
    assert torch.equal(got.latents, want.latents)


BLOCKS = {
    "0.9.0": {
        "blocks": [
            ["res_x", 1], ["compress_all", 1], ["res_x_y", 1], ["res_x", 1], ["compress_all", 1],
            ["res_x_y", 1], ["res_x", 1], ["compress_all", 1], ["res_x", 1], ["res_x", 1],
        ],
        "base_channels": 8,
    },
    "0.9.5": {
        "encoder_blocks": [
            ["res_x", {"num_layers": 1}], ["compress_space_res", {"multiplier": 2}],
            ["res_x", {"num_layers": 1}], ["compress_time_res", {"multiplier": 2}],
            ["res_x", {"num_layers": 1}], ["compress_all_res", {"multiplier": 2}],
            ["res_x", {"num_layers": 1}], ["compress_all_res", {"multiplier": 2}],
            ["res_x", {"num_layers": 1}],
        ],
        "decoder_blocks": [
            ["res_x", {"num_layers": 1, "inject_noise": False}],
            *[
                ["compress_all", {"residual": True, "multiplier": 2}],
                ["res_x", {"num_layers": 1, "inject_noise": False}],
            ] * 3,
        ],
        "encoder_base_channels": 8, "decoder_base_channels": 4, "timestep_conditioning": True,
    },
}  # fmt: skip
"""As the published headers list them, with fewer layers and channels."""
HEADER = {
    "transformer": {
        "_class_name": "Transformer3DModel", "num_attention_heads": 4, "attention_head_dim": 8,
        "in_channels": 8, "out_channels": 8, "num_layers": 2, "caption_channels": 32,
        "qk_norm": "rms_norm", "standardization_norm": "rms_norm", "positional_embedding_type":
        "rope", "positional_embedding_theta": 10000.0, "norm_elementwise_affine": False,
        "positional_embedding_max_pos": [20, 2048, 2048], "adaptive_norm": "single_scale_shift",
        "activation_fn": "gelu-approximate", "norm_eps": 1e-6, "attention_bias": True,
        "cross_attention_dim": 4096, "timestep_scale_multiplier": 1000,
    },
    "vae": {
        "_class_name": "CausalVideoAutoencoder", "dims": 3, "in_channels": 3, "out_channels": 3,
        "latent_channels": 8, "scaling_factor": 1.0, "norm_layer": "pixel_norm", "patch_size": 1,
        "latent_log_var": "uniform", "use_quant_conv": False, "causal_decoder": False,
    },
    "scheduler": {
        "_class_name": "RectifiedFlowScheduler", "num_train_timesteps": 1000, "shifting": "SD3",
        "base_resolution": None, "target_shift_terminal": 0.1,
    },
}  # fmt: skip


def authors_vae(oracle, version) -> dict[str, torch.Tensor]:
    """An autoencoder's weights as its authors' files name them: what diffusers' own converter has
    the oracle's names of."""
    blocks = BLOCKS[version]
    encoder = blocks.get("encoder_blocks", blocks.get("blocks"))
    decoder = blocks.get("decoder_blocks", blocks.get("blocks"))[::-1]
    places: dict[str, str] = {}
    stage = -1
    for i, (kind, _) in enumerate(encoder):
        stage += kind == "res_x"
        part = {"res_x": "resnets.", "res_x_y": "conv_out."}.get(kind, "downsamplers.0.")
        of = "mid_block" if i == len(encoder) - 1 else f"down_blocks.{stage}"
        places[f"encoder.{of}.{part}"] = f"encoder.down_blocks.{i}." + (
            "res_blocks." if kind == "res_x" else ""
        )
    stage = -1
    for i, (kind, _) in enumerate(decoder):
        part = {"res_x": "resnets.", "res_x_y": "conv_in."}.get(kind, "upsamplers.0.")
        of = "mid_block" if i == 0 else f"up_blocks.{stage + (i > 0)}"
        places[f"decoder.{of}.{part}"] = f"decoder.up_blocks.{i}." + (
            "res_blocks." if kind == "res_x" else ""
        )
        if kind == "res_x":  # its embedding of the noise level stands beside its blocks
            places[f"decoder.{of}.time_embedder."] = f"decoder.up_blocks.{i}.time_embedder."
            stage += i > 0
    whole = {
        "decoder.time_embedder.": "decoder.last_time_embedder.",
        "decoder.scale_shift_table": "decoder.last_scale_shift_table",
        "latents_mean": "per_channel_statistics.mean-of-means",
        "latents_std": "per_channel_statistics.std-of-means",
    }
    state = {}
    for name, value in oracle.state_dict().items():
        for ours, theirs in {**places, **whole}.items():
            if name.startswith(ours):
                name = theirs + name[len(ours) :]
                break
        name = name.replace("conv_shortcut.conv.", "conv_shortcut.")
        state["vae." + name.replace(".norm3.", ".norm3.norm.")] = value.contiguous()
    as_published = dict(state)
    if version == "0.9.5":  # by which the converter knows that version
        as_published["vae.encoder.conv_out.conv.weight"] = torch.empty(9, 2048, 3, 3, 3)
    back = convert_ltx_vae_checkpoint_to_diffusers(as_published)
    assert set(back) >= set(oracle.state_dict()) - {"latents_mean", "latents_std"}
    return state


@pytest.mark.parametrize("version", BLOCKS)
def test_an_authors_file_with_all_in_it_loads(version, pipeline, texts, tmp_path):
    """Its header tells the transformer, the autoencoder and the levels; texts come from folders."""
    changes = {} if version == "0.9.5" else {
        "block_out_channels": (8, 16, 32, 32), "decoder_block_out_channels": (8, 16, 32, 32),
    }  # fmt: skip
    vae = tiny_ltx_vae(version, **changes)
    whole = LTXPipeline(**{**pipeline.components, "vae": vae})
    whole.save_pretrained(tmp_path / "folder")
    header = {**HEADER, "vae": {**HEADER["vae"], **BLOCKS[version]}}
    file = tmp_path / "ltx-video-2b.safetensors"
    weights = {**authors_names(whole.transformer), **authors_vae(vae, version)}
    save_file(weights, file, metadata={"config": json.dumps(header)})
    with sora.Engine.from_pretrained(tmp_path / "folder", device="cpu") as one:
        want = one.generate(GIVEN)
    with sora.Engine.from_pretrained(file, components=texts, device="cpu") as other:
        got = other.generate(GIVEN)
    assert torch.equal(got.latents, want.latents)
    assert np.array_equal(got.frames, want.frames)
    kinds = inspect_file(file).kinds
    assert any("ltx transformer, ti2v: 2 layers" in kind for kind in kinds)


BAD_HEADERS = [
    ("vae", {"blocks": [["res_x", 1], ["attn_res_x", 1], ["res_x", 1]]}, "'attn_res_x' of the enc"),
    ("vae", {"spatial_padding_mode": "reflect"}, "spatial_padding_mode is 'reflect'; 'zeros'"),
    ("vae", {"surprise": 1}, r"unknown keys \['surprise'\] of the vae"),
    ("vae", {"blocks": 3}, "lists no blocks of the encoder"),
    ("vae", {"blocks": [["res_x", 1], ["compress_all"]]}, "list of blocks cannot be read"),
    ("transformer", {"cross_attention_adaln": True}, r"unknown keys \['cross_attention_adaln'\]"),
    ("transformer", {"positional_embedding_theta": 1.0}, "positional_embedding_theta is 1.0"),
    ("scheduler", {"sampler": "Beta"}, "sampler 'Beta' and shifting 'SD3'"),
]


@pytest.mark.parametrize(("part", "values", "message"), BAD_HEADERS)
def test_bad_headers_are_refused(part, values, message, pipeline, texts, tmp_path):
    header = {**HEADER, "vae": {**HEADER["vae"], **BLOCKS["0.9.0"]}}
    header[part] = {**header[part], **values}
    changes = {"block_out_channels": (8, 16, 32, 32), "decoder_block_out_channels": (8, 16, 32, 32)}
    vae = authors_vae(tiny_ltx_vae("0.9.0", **changes), "0.9.0")
    file = tmp_path / "ltx.safetensors"
    weights = {**authors_names(pipeline.transformer), **vae}
    save_file(weights, file, metadata={"config": json.dumps(header)})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(file, texts)


def test_a_distilled_file_is_on_its_ladder(pipeline, folder, tmp_path):
    file = tmp_path / "ltxv-2b-0.9.8-distilled.safetensors"
    save_file(authors_names(pipeline.transformer), file)
    (tmp_path / "config.json").symlink_to(folder / CONFIG)
    found, _ = open_checkpoint(file, folder)
    assert found.defaults.ladder == "ltxv-7"
    assert found.defaults.num_inference_steps == 7
    assert found.defaults.guidance_scale == 1.0
