"""Folders and files of each family that are damaged, of something else, or ask for what is not
carried out: a typed error each, which names the file and what is wrong."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

import sora_engine as sora
from sora_engine.errors import CheckpointError
from sora_engine.models.registry import open_checkpoint
from tests.parity.latent_models import (
    tiny_dit_pipeline,
    tiny_latte_pipeline,
    tiny_pixart_pipeline,
)

CONFIG, INDEX = "transformer/config.json", "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
MAKERS = {"dit": tiny_dit_pipeline, "latte": tiny_latte_pipeline, "pixart": tiny_pixart_pipeline}
BAD_FOLDERS = {
    "dit": [
        (CONFIG, {"norm_type": "ada_norm_single"}, "norm_type is 'ada_norm_single'; a DiT has"),
        (CONFIG, {"patch_size": 0}, "patch_size is 0; it must be a positive integer"),
        (CONFIG, {"num_layers": 10**7}, "num_layers is 10000000"),
        (CONFIG, {"num_layers": 3}, "missing tensors: transformer_blocks.2."),
        (CONFIG, {"attention_head_dim": 16}, "has shape"),
        (CONFIG, {"out_channels": 6}, "out_channels is 6; 4, or with a learned variance 8"),
        (CONFIG, {"activation_fn": "geglu"}, "activation_fn is 'geglu'"),
        (CONFIG, {"surprise": 1}, r"unknown configuration keys \['surprise'\]"),
        (
            CONFIG,
            {"_class_name": "PixArtTransformer2DModel"},
            "class is 'PixArtTransformer2DModel'",
        ),
        (INDEX, {"id2label": {"1000": "nothing"}}, "id2label has '1000': 'nothing'"),
        (INDEX, {"id2label": ["tench"]}, "id2label must name classes by number"),
        (INDEX, {"vae": [None, None]}, "the model has no vae"),
        (INDEX, {"safety": 1}, r"unknown keys \['safety'\]"),
        ("vae/config.json", {"latent_channels": 16}, "takes 4 channels and .* have 16"),
        ("scheduler/scheduler_config.json", {"_class_name": "PNDMScheduler"}, "PNDMScheduler"),
    ],
    "latte": [
        (CONFIG, {"norm_type": "ada_norm_zero"}, "norm_type is 'ada_norm_zero'; a Latte has"),
        (CONFIG, {"video_length": 0}, "video_length is 0; it must be a positive integer"),
        (CONFIG, {"num_layers": 10**7}, "num_layers is 10000000"),
        (CONFIG, {"num_layers": 3}, r"missing tensors: transformer_blocks\.2\."),
        (CONFIG, {"attention_head_dim": 16, "cross_attention_dim": None}, "has shape"),
        (
            CONFIG,
            {"cross_attention_dim": 32},
            "is 32; texts are projected to 24",
        ),
        (CONFIG, {"out_channels": 4}, "out_channels is 4; with its learned variance 8"),
        (CONFIG, {"activation_fn": "geglu"}, "activation_fn is 'geglu'"),
        (CONFIG, {"caption_channels": 16}, "reads texts of 16 channels and the encoder gives 32"),
        (CONFIG, {"surprise": 1}, r"unknown configuration keys \['surprise'\]"),
        (CONFIG, {"_class_name": "DiTTransformer2DModel"}, "class is 'DiTTransformer2DModel'"),
        (INDEX, {"text_encoder": ["transformers", "UMT5EncoderModel"]}, "transformers.UMT5Encoder"),
        (INDEX, {"tokenizer": [None, None]}, "the model has no tokenizer"),
        ("text_encoder/config.json", {"num_layers": -1}, "num_layers is -1"),
        ("vae/config.json", {"latent_channels": 16}, "takes 4 channels and .* have 16"),
        ("scheduler/scheduler_config.json", {"_class_name": "PNDMScheduler"}, "PNDMScheduler"),
    ],
    "pixart": [
        (CONFIG, {"norm_type": "ada_norm_zero"}, "norm_type is 'ada_norm_zero'; a PixArt has"),
        (CONFIG, {"patch_size": 0}, "patch_size is 0; it must be a positive integer"),
        (CONFIG, {"num_layers": 10**7}, "num_layers is 10000000"),
        (CONFIG, {"num_layers": 3}, r"missing tensors: transformer_blocks\.2\."),
        (CONFIG, {"attention_head_dim": 16, "cross_attention_dim": None}, "has shape"),
        (
            CONFIG,
            {"cross_attention_dim": 32},
            "is 32; texts are projected to 24",
        ),
        (CONFIG, {"out_channels": 6}, "out_channels is 6; 4, or with a learned variance 8"),
        (CONFIG, {"use_additional_conditions": True}, "picture sizes are not read"),
        (CONFIG, {"sample_size": 128, "use_additional_conditions": None}, "which means true"),
        (CONFIG, {"interpolation_scale": "2"}, "interpolation_scale is '2'; null or a number"),
        (CONFIG, {"caption_channels": None}, "caption_channels is None; it must be a positive"),
        (CONFIG, {"activation_fn": "geglu"}, "activation_fn is 'geglu'"),
        (CONFIG, {"caption_channels": 16}, "reads texts of 16 channels and the encoder gives 32"),
        (CONFIG, {"surprise": 1}, r"unknown configuration keys \['surprise'\]"),
        (CONFIG, {"_class_name": "DiTTransformer2DModel"}, "class is 'DiTTransformer2DModel'"),
        (INDEX, {"text_encoder": ["transformers", "UMT5EncoderModel"]}, "transformers.UMT5Encoder"),
        (INDEX, {"tokenizer": [None, None]}, "the model has no tokenizer"),
        ("text_encoder/config.json", {"num_layers": -1}, "num_layers is -1"),
        ("vae/config.json", {"latent_channels": 16}, "takes 4 channels and .* have 16"),
        ("scheduler/scheduler_config.json", {"_class_name": "PNDMScheduler"}, "PNDMScheduler"),
    ],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One of each family, as diffusers saves it."""
    made = {}
    for name, make in MAKERS.items():
        made[name] = tmp_path_factory.mktemp(name)
        make().save_pretrained(made[name])
    return made


def copy_but(folder, bad, path):
    """A folder of links to another one's files, but one, which is not there; where it goes."""
    place, name = bad / path, path.partition("/")[0]
    bad.mkdir()
    for part in folder.iterdir():
        (bad / part.name).symlink_to(part)
    (bad / name).unlink()
    if "/" in path:
        place.parent.mkdir()
        for file in (folder / name).iterdir():
            (place.parent / file.name).symlink_to(file)
        place.unlink()
    return place


CASES = [(name, *case) for name, cases in BAD_FOLDERS.items() for case in cases]


@pytest.mark.parametrize(("family", "path", "values", "message"), CASES)
def test_bad_folders_are_refused(folders, tmp_path, family, path, values, message):
    place = copy_but(folders[family], tmp_path / "bad", path)
    place.write_text(json.dumps({**json.loads((folders[family] / path).read_text()), **values}))
    with pytest.raises(CheckpointError, match=message):
        sora.Engine.from_pretrained(tmp_path / "bad", device="cpu").close()


@pytest.mark.parametrize("family", MAKERS)
def test_damaged_weights_are_refused(folders, tmp_path, family):
    path = f"transformer/{WEIGHTS}"
    whole = (folders[family] / path).read_bytes()
    bad = tmp_path / "bad"
    place = copy_but(folders[family], bad, path)
    with pytest.raises(CheckpointError, match="transformer"):  # none at all
        sora.Engine.from_pretrained(bad, device="cpu").close()
    place.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=WEIGHTS):
        sora.Engine.from_pretrained(bad, device="cpu").close()
    tensors = load_file(folders[family] / path)
    gone = next(name for name in tensors if "blocks.1." in name and "ff" in name)
    del tensors[gone]
    save_file(tensors, place)
    with pytest.raises(CheckpointError, match=f"missing tensors: {gone}"):
        sora.Engine.from_pretrained(bad, device="cpu").close()
    # By itself, and as a pickle.
    lone = tmp_path / "lone.safetensors"
    save_file(tensors, lone)
    with pytest.raises(CheckpointError, match=r"config\.json beside it would"):
        open_checkpoint(lone, folders[family])
    pickled = tmp_path / f"{family}.pt"
    pickled.write_bytes(b"PK\x03\x04 pickle")
    with pytest.raises(CheckpointError, match="safetensors"):
        open_checkpoint(pickled, folders[family])
