"""Every bad checkpoint of a list is a `CheckpointError` that names the file and what is wrong."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sora_engine.errors import CheckpointError
from sora_engine.io.loading import load_into
from sora_engine.models.wan.checkpoint import resolve_model
from sora_engine.models.wan.model import WanTransformer
from sora_engine.models.wan.shapes import infer_config
from sora_engine.text import ImageEncoder
from sora_engine.text.umt5 import UMT5Encoder
from sora_engine.vae.wan import WanVAE
from sora_engine.vae.wan_config import WanVAEConfig
from tests.unit.wan_folders import IMAGE, pipeline, transformer

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
FREE = "blocks.0.attn1.to_q.bias"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pipeline(image=True, **IMAGE).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def load(path, **options):
    """Everything that an engine loads."""
    model = resolve_model(path, **options)
    for source in (model.transformer, model.transformer_2):
        if source is not None:
            with torch.device("meta"):
                module = WanTransformer(source.config)
            source.load(module)
    with torch.device("meta"):
        vae = WanVAE(WanVAEConfig.from_dict(model.vae.config, path=model.vae.config_path))
    with model.vae.open_weights() as weights:
        load_into(vae, weights)
    UMT5Encoder.from_folders(model.text_encoder.folder, model.tokenizer.folder)
    if model.image_encoder is not None and model.image_processor is not None:
        ImageEncoder.from_folders(model.image_encoder.folder, model.image_processor.folder)


def test_the_folder_is_good_before_it_is_spoiled(folder):
    load(folder)


def tensors(change):
    """Spoil the transformer's weights with a function of the state dict."""

    def spoil(folder):
        values = load_file(folder / WEIGHTS)
        change(values)
        save_file(values, folder / WEIGHTS)

    return spoil


def edit(file, **changes):
    """Spoil a JSON file; `...` takes a key out."""

    def spoil(folder):
        values = {**json.loads((folder / file).read_text()), **changes}
        values = {key: value for key, value in values.items() if value is not ...}
        (folder / file).write_text(json.dumps(values))

    return spoil


def write(file, content):
    return lambda folder: (folder / file).write_bytes(content)


def remove(file):
    def spoil(folder):
        path = folder / file
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def cut(file, keep):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:keep])


def to_pickle(folder):
    values = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(values, folder / "transformer" / "diffusion_pytorch_model.bin")


def overlap(folder):
    path = folder / WEIGHTS
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    first, second = sorted(
        (name for name in header if header[name].get("shape") == [24]),
        key=lambda name: header[name]["data_offsets"],
    )[:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def sharded(**weight_map):
    def spoil(folder):
        names = dict.fromkeys(load_file(folder / WEIGHTS), "diffusion_pytorch_model.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": {**names, **weight_map}}))

    return spoil


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


# kind: (what is done to the folder, what the message says, the file it names)
BAD = {
    "nonexistent path": (remove(""), "no such file or folder; a model is a diffusers folder", ""),
    "empty folder": (empty, "no model_index.json; it is empty", ""),
    "no index": (remove("model_index.json"), "no model_index.json; it holds image_encoder", ""),
    "index not JSON": (write("model_index.json", b"{,}"), "not JSON", "model_index.json"),
    "index a list": (write("model_index.json", b"[]"), "JSON list", "model_index.json"),
    "index not text": (write("model_index.json", b"{\xff}"), "not UTF-8", "model_index.json"),
    "unknown pipeline": (
        edit("model_index.json", _class_name="FluxPipeline"),
        "pipeline class 'FluxPipeline'; supported: WanPipeline",
        "model_index.json",
    ),
    "unknown component": (
        edit("model_index.json", lora=["os", "system"]),
        r"unknown keys \['lora'\]",
        "model_index.json",
    ),
    "unknown class": (
        edit("model_index.json", vae=["diffusers", "AutoencoderKL"]),
        "vae is diffusers.AutoencoderKL; supported: diffusers.AutoencoderKLWan",
        "model_index.json",
    ),
    "unknown library": (
        edit("model_index.json", transformer=["custom_code", "WanTransformer3DModel"]),
        "transformer is custom_code.WanTransformer3DModel",
        "model_index.json",
    ),
    "unknown scheduler": (
        edit("model_index.json", scheduler=["diffusers", "EvilScheduler"]),
        "EvilScheduler",
        "model_index.json",
    ),
    "component not a pair": (edit("model_index.json", vae="x"), "vae is 'x'", "model_index.json"),
    "component null": (
        edit("model_index.json", vae=[None, None]),
        "the model has no vae",
        "model_index.json",
    ),
    "boundary without a second expert": (
        edit("model_index.json", boundary_ratio=0.9),
        "boundary_ratio is 0.9 and transformer_2 is null",
        "model_index.json",
    ),
    "boundary out of range": (
        edit("model_index.json", boundary_ratio=1.5),
        "boundary_ratio is 1.5; it must lie between 0 and 1",
        "model_index.json",
    ),
    "expand_timesteps not a bool": (
        edit("model_index.json", expand_timesteps="yes"),
        "expand_timesteps is 'yes'",
        "model_index.json",
    ),
    "image encoder missing": (
        edit("model_index.json", image_encoder=None),
        "and the model has no image_encoder",
        "",
    ),
    "component folder missing": (remove("vae"), "no folder for the vae", "vae"),
    "config missing": (
        remove("transformer/config.json"),
        "no such file",
        "transformer/config.json",
    ),
    "config not JSON": (write("vae/config.json", b"hello"), "not JSON", "vae/config.json"),
    "config key unknown": (
        edit("transformer/config.json", window_size=[1, 1]),
        r"unknown configuration keys \['window_size'\]",
        "transformer/config.json",
    ),
    "config of the wrong type": (
        edit("transformer/config.json", num_layers="2"),
        "num_layers is '2'; it must be a positive integer up to 1000",
        "transformer/config.json",
    ),
    "config of a model that would take hours to build": (
        edit("transformer/config.json", num_layers=10**9),
        "num_layers is 1000000000; it must be a positive integer up to 1000",
        "transformer/config.json",
    ),
    "text encoder that would take hours to build": (
        edit("text_encoder/config.json", num_layers=10**9),
        "num_layers is 1000000000; 1000 is the most",
        "text_encoder/config.json",
    ),
    "config of another class": (
        edit("transformer/config.json", _class_name="FluxTransformer2DModel"),
        "FluxTransformer2DModel",
        "transformer/config.json",
    ),
    "code in a config": (
        edit("text_encoder/config.json", auto_map={"AutoModel": "evil.Model"}),
        "auto_map asks for code",
        "text_encoder/config.json",
    ),
    "pickle instead of safetensors": (
        to_pickle,
        r"\.bin files are pickles.*convert the weights to \.safetensors",
        "transformer/diffusion_pytorch_model.bin",
    ),
    "weights missing": (remove(WEIGHTS), "no weights; looked for", "transformer"),
    "weights empty": (write(WEIGHTS, b""), "truncated: 0 bytes", WEIGHTS),
    "weights truncated": (cut(WEIGHTS, -5), "truncated: .* ends at byte", WEIGHTS),
    "header truncated": (cut(WEIGHTS, 99), "truncated: a header of", WEIGHTS),
    "header oversized": (
        write(WEIGHTS, (10**15).to_bytes(8, "little") + b"{}"),
        "a header of 1000000000000000 bytes, 100000000 is the most",
        WEIGHTS,
    ),
    "header not JSON": (
        write(WEIGHTS, (4).to_bytes(8, "little") + b"{'a}"),
        "the header is not JSON",
        WEIGHTS,
    ),
    "overlapping tensors": (overlap, "overlap those of", WEIGHTS),
    "tensor missing": (
        tensors(lambda t: t.pop(FREE)),
        f"missing tensors: {FREE}",
        WEIGHTS,
    ),
    "tensor unexpected": (
        tensors(lambda t: t.update({"vace_blocks.0.x": torch.zeros(1)})),
        r"unexpected tensors: vace_blocks\.0\.x",
        WEIGHTS,
    ),
    "tensor of the wrong shape": (
        tensors(lambda t: t.update({FREE: torch.zeros(25)})),
        rf"tensor {FREE} has shape \[25\], the model has \[24\]",
        WEIGHTS,
    ),
    "tensor of the wrong kind": (
        tensors(lambda t: t.update({FREE: torch.zeros(24, dtype=torch.int64)})),
        f"tensor {FREE} has dtype torch.int64, the model has torch.float32",
        WEIGHTS,
    ),
    "tensor of an unsupported dtype": (
        tensors(lambda t: t.update({FREE: torch.zeros(24, dtype=torch.complex64)})),
        f"tensor '{FREE}': unsupported dtype 'C64'",
        WEIGHTS,
    ),
    "shard missing": (
        sharded(**{FREE: "other.safetensors"}),
        "missing shard",
        "transformer/other.safetensors",
    ),
    "shard without its tensor": (
        sharded(extra="diffusion_pytorch_model.safetensors"),
        "lists tensor 'extra' here, and it is not",
        WEIGHTS,
    ),
    "index that leaves the folder": (
        sharded(**{FREE: "../vae/diffusion_pytorch_model.safetensors"}),
        "weight_map leaves the folder",
        INDEX,
    ),
    "index to a pickle": (
        sharded(**{FREE: "model.bin"}),
        "convert the weights",
        "transformer/model.bin",
    ),
    "vae of another shape": (
        edit("vae/config.json", num_res_blocks=2),
        "missing tensors: ",
        "vae/diffusion_pytorch_model.safetensors",
    ),
    "text encoder's weights missing": (
        remove("text_encoder/model.safetensors"),
        r"no weights; looked for model\.safetensors",
        "text_encoder",
    ),
    "tokenizer missing": (remove("tokenizer"), "no folder for the tokenizer", "tokenizer"),
    "tokenizer's file missing": (
        remove("tokenizer/tokenizer.json"),
        r"no tokenizer\.json and no spiece\.model",
        "tokenizer",
    ),
    "tokenizer's file not JSON": (
        write("tokenizer/tokenizer.json", b"{"),
        "not JSON",
        "tokenizer/tokenizer.json",
    ),
    "image processor's config missing": (
        remove("image_processor/preprocessor_config.json"),
        "no such file",
        "image_processor/preprocessor_config.json",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_folder_names_the_file_and_what_is_wrong(folder, kind):
    spoil, says, file = BAD[kind]
    spoil(folder)
    with pytest.raises(CheckpointError, match=says) as caught:
        load(folder)
    path = folder / file if file else folder
    assert caught.value.path == path
    assert str(caught.value).startswith(f"{path}: ")
    if FREE in says:
        assert caught.value.tensor == FREE


def test_no_two_kinds_have_one_message(saved, tmp_path):
    seen: dict[str, str] = {}
    for kind, (spoil, _, _) in BAD.items():
        folder = shutil.copytree(saved, tmp_path / "model")
        spoil(folder)
        with pytest.raises(CheckpointError) as caught:
            load(folder)
        message = str(caught.value).replace(str(tmp_path), "")
        assert message not in seen, (kind, seen[message])
        seen[message] = kind
        shutil.rmtree(folder, ignore_errors=True)


def test_bad_paths_to_single_files(saved, tmp_path):
    wan = tmp_path / "wan.safetensors"
    shutil.copy(saved / WEIGHTS, wan)
    options = {"components": saved, "attention_head_dim": 12}
    load(wan, **options)
    for name in ("wan.ckpt", "wan.pt", "wan.bin"):
        with pytest.raises(CheckpointError, match=r"convert the weights to \.safetensors"):
            load(tmp_path / name, **options)
    with pytest.raises(CheckpointError, match="nothing is downloaded"):
        load("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    with pytest.raises(CheckpointError, match="3 paths"):
        load([wan, wan, wan], **options)
    with pytest.raises(CheckpointError, match="a folder brings its own components"):
        load(saved, components=saved)
    with pytest.raises(CheckpointError, match="24 wide, no multiple of attention_head_dim 128"):
        load(wan, components=saved)
    with pytest.raises(CheckpointError, match="no folder for the vae"):
        load(wan, components=tmp_path / "none", attention_head_dim=12)
    with pytest.raises(CheckpointError, match="boundary_ratio is 2"):
        load([wan, wan], boundary_ratio=2, **options)
    other = tmp_path / "other.safetensors"
    save_file(transformer(**{**IMAGE, "ffn_dim": 28}).state_dict(), other)
    with pytest.raises(CheckpointError, match="the two experts differ: ffn_dim 20 and 28"):
        load([wan, other], **options)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"patch_embedding.weight": None}, "no tensor 'patch_embedding.weight'"),
        ({"patch_embedding.weight": (24, 64)}, "has 5 dimensions|5 dimensions"),
        ({"patch_embedding.weight": (24, 16, 0, 2, 2)}, "5 dimensions"),
        ({"proj_out.weight": (65, 24)}, "proj_out has 65 outputs"),
        ({"blocks.3.scale_shift_table": (1, 6, 24)}, "no tensors of block 2 of 4"),
        ({"blocks.0.ffn.net.0.proj.weight": None}, "blocks.0.ffn"),
        ({"blocks.0.attn2.add_k_proj.weight": (24, 20)}, "added_kv_proj_dim is 20"),
    ],
)
def test_shapes_that_no_wan_has(tmp_path, changes, says):
    shapes = {name: tuple(v.shape) for name, v in transformer(**IMAGE).state_dict().items()}
    infer_config(shapes, head_dim=12)
    shapes = {name: shape for name, shape in {**shapes, **changes}.items() if shape is not None}
    with pytest.raises(CheckpointError, match=says) as caught:
        infer_config(shapes, head_dim=12, path=tmp_path)
    assert caught.value.path == tmp_path
