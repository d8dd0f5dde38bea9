"""Wan checkpoints as diffusers saves them and under Wan's own names: the same weights."""

from __future__ import annotations

import json
import re
import shutil

import diffusers
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file

from sora_engine.errors import CheckpointError
from sora_engine.models.folder import ModelFolder
from sora_engine.models.wan.checkpoint import (
    KEEP_FP32,
    LAYOUT,
    TransformerSource,
    infer_config,
    resolve_model,
)
from sora_engine.models.wan.config import WanConfig
from sora_engine.models.wan.model import WanTransformer
from sora_engine.models.wan.names import to_diffusers_name
from sora_engine.samplers.config import read_config
from tests.unit.wan_folders import IMAGE, VARIANTS, pipeline, transformer


@pytest.fixture(scope="module")
def t2v(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t2v")
    pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def i2v(tmp_path_factory):
    folder = tmp_path_factory.mktemp("i2v")
    pipeline(image=True, **IMAGE).save_pretrained(folder)
    return folder


# Wan's names from diffusers', written down on their own: each pattern from one published file list.
ORIGINAL_NAMES = [
    (r"^condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"^condition_embedder\.time_proj", "time_projection.1"),
    (r"^condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"^condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"^condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
    (r"^condition_embedder\.image_embedder\.pos_embed", "img_emb.emb_pos"),
    (r"^scale_shift_table", "head.modulation"),
    (r"^proj_out", "head.head"),
    (r"^(blocks\.\d+)\.scale_shift_table", r"\1.modulation"),
    (r"^(blocks\.\d+)\.norm2", r"\1.norm3"),
    (r"^(blocks\.\d+)\.attn1", r"\1.self_attn"),
    (r"^(blocks\.\d+)\.attn2", r"\1.cross_attn"),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"\.add_([kv])_proj\.", r".\1_img."),
    (r"\.norm_added_k\.", ".norm_k_img."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".o."),
]


def original_name(name):
    for pattern, replacement in ORIGINAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def save_original(folder, path, prefix="", part="transformer"):
    tensors = load_file(folder / part / "diffusion_pytorch_model.safetensors")
    renamed = {prefix + original_name(name): value for name, value in tensors.items()}
    assert len(renamed) == len(tensors)
    save_file(renamed, path)
    return renamed


def loaded(source, **options):
    with torch.device("meta"):
        module = WanTransformer(source.config)
    source.load(module, **options)
    return module.state_dict()


def identical(ours, theirs):
    assert set(ours) == set(theirs)
    return all(ours[n].dtype == theirs[n].dtype and ours[n].equal(theirs[n]) for n in theirs)


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_file_under_wans_names_gives_the_weights_of_the_folder(tmp_path, kind, prefix):
    model = transformer(**VARIANTS[kind])
    model.save_pretrained(tmp_path / "transformer")
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    folder = TransformerSource(
        tmp_path / "transformer" / "diffusion_pytorch_model.safetensors",
        WanConfig.from_dict(config),
    )
    stored = save_original(tmp_path, tmp_path / "wan.safetensors", prefix)
    inferred = infer_config(
        {to_diffusers_name(name): tuple(value.shape) for name, value in stored.items()}, head_dim=12
    )
    single = TransformerSource(tmp_path / "wan.safetensors", inferred)
    # The longest time line is no matter of shapes, and the engine computes positions as it needs.
    assert inferred.to_dict() == {**folder.config.to_dict(), "rope_max_seq_len": 1024}
    assert identical(loaded(folder), model.state_dict())
    assert identical(loaded(single), model.state_dict())
    assert single.num_parameters == sum(p.numel() for p in model.parameters())


def test_the_names_are_those_of_diffusers_own_conversion():
    names = transformer(**IMAGE).state_dict()
    theirs = convert_wan_transformer_to_diffusers({original_name(n): n for n in names})
    assert theirs == {name: name for name in names}  # the map of the tests is right
    assert {to_diffusers_name(original_name(n)): n for n in names} == theirs
    assert to_diffusers_name("blocks.3.norm3.weight") == "blocks.3.norm2.weight"
    assert all(to_diffusers_name(n) == n for n in names)  # a diffusers file under any prefix


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_dtypes_of_diffusers(t2v, dtype):
    theirs = WanTransformer3DModel.from_pretrained(t2v / "transformer", torch_dtype=dtype)
    ours = loaded(resolve_model(t2v).transformer, dtype=dtype)
    assert identical(ours, theirs.state_dict())
    assert {v.dtype for v in ours.values()} == {dtype, torch.float32}
    # diffusers' models are not driven by actions: their embedding is kept as that of the levels.
    assert {*WanTransformer3DModel._keep_in_fp32_modules, "action_embedder"} == set(KEEP_FP32)


@pytest.mark.parametrize("options", [{"max_shard_size": "20KB"}, {"variant": "fp16"}, {}])
def test_folders_sharded_or_in_variants(tmp_path, options):
    model = transformer(seed=3)
    pipe = pipeline()
    pipe.transformer = model
    pipe.save_pretrained(tmp_path, **options)
    files = sorted(p.name for p in (tmp_path / "transformer").iterdir())
    assert len(files) > 3 if "max_shard_size" in options else len(files) == 2
    assert identical(loaded(resolve_model(tmp_path).transformer), model.state_dict())


def test_a_hub_cache_of_links_works_and_nothing_follows_the_names(t2v, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    for number, path in enumerate(p for p in t2v.rglob("*") if p.is_file()):
        shutil.copy(path, blobs / f"{number:064x}")
        link = snapshot / path.relative_to(t2v)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / f"{number:064x}")
    got, expected = (loaded(resolve_model(f).transformer) for f in (snapshot, t2v))
    assert identical(got, expected)


def test_a_folder_lists_its_parts(t2v, i2v):
    folder = ModelFolder.open(t2v, LAYOUT)
    assert folder.pipeline == "WanPipeline"
    names = {"transformer", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert set(folder.components) == names
    assert folder["vae"].config["z_dim"] == 16
    model = resolve_model(i2v)
    assert model.image_encoder is not None
    assert model.image_encoder.weights_path == i2v / "image_encoder" / "model.safetensors"
    assert model.scheduler_config["flow_shift"] == 3.0
    assert (model.transformer_2, model.boundary_ratio) == (None, None)


def test_two_experts_in_a_folder_and_in_two_files(tmp_path):
    pipe = pipeline(boundary_ratio=0.8, second=transformer(seed=7))
    pipe.save_pretrained(tmp_path / "a14b")
    high, low = tmp_path / "high.safetensors", tmp_path / "low.safetensors"
    save_original(tmp_path / "a14b", high)
    save_original(tmp_path / "a14b", low, part="transformer_2")
    folder = resolve_model(tmp_path / "a14b")
    files = resolve_model([high, low], components=tmp_path / "a14b", attention_head_dim=12)
    for model in (folder, files):
        assert model.boundary_ratio == 0.8
        assert model.transformer_2 is not None
        assert identical(loaded(model.transformer), pipe.transformer.state_dict())
        assert identical(loaded(model.transformer_2), pipe.transformer_2.state_dict())
    # Without a folder that says it, where published A14B models change experts.
    (tmp_path / "a14b" / "model_index.json").unlink()
    options = {"components": tmp_path / "a14b", "attention_head_dim": 12}
    assert resolve_model([high, low], **options).boundary_ratio == 0.875
    assert resolve_model([high, low], boundary_ratio=0.5, **options).boundary_ratio == 0.5


def test_a_single_file_takes_its_components_from_a_folder(t2v, i2v, tmp_path):
    path = tmp_path / "wan.safetensors"
    save_original(t2v, path)
    model = resolve_model(path, components=t2v, attention_head_dim=12)
    assert model.vae.folder == t2v / "vae"
    assert model.tokenizer.folder == t2v / "tokenizer"
    assert model.scheduler_config == ModelFolder.open(t2v, LAYOUT)["scheduler"].config

    # By default that folder is its own.
    with pytest.raises(CheckpointError, match="give `components`, a folder with vae/"):
        resolve_model(path, attention_head_dim=12)
    shutil.copytree(t2v / "vae", tmp_path / "vae")
    for name in ("text_encoder", "tokenizer"):
        with pytest.raises(CheckpointError, match=f"no folder for the {name}"):
            resolve_model(path, attention_head_dim=12)
        shutil.copytree(t2v / name, tmp_path / name)
    model = resolve_model(path, attention_head_dim=12)
    assert model.text_encoder.folder == tmp_path / "text_encoder"
    assert model.scheduler_config["flow_shift"] == 3.0
    assert model.scheduler_path is None
    theirs = UniPCMultistepScheduler.from_config(dict(model.scheduler_config)).config
    assert read_config(model.scheduler_config) == read_config(dict(theirs))

    save_original(i2v, path)
    with pytest.raises(CheckpointError, match="no folder for the image_encoder"):
        resolve_model(path, attention_head_dim=12)
    model = resolve_model(path, components=i2v, attention_head_dim=12)
    assert model.image_processor is not None
    assert model.transformer.config.image_dim == 16


def test_every_scheduler_on_the_list_can_be_read():
    for name in LAYOUT.components["scheduler"]:
        config = dict(getattr(diffusers, name)().config) | {"_class_name": name}
        assert read_config(config).solver


def test_diffusers_own_transformer_file_is_a_model_too(t2v, tmp_path):
    path = t2v / "transformer" / "diffusion_pytorch_model.safetensors"
    model = resolve_model(path, components=t2v)  # its config.json says what shapes do not
    assert model.transformer.config.attention_head_dim == 12
    lone = shutil.copy(path, tmp_path / "lone.safetensors")
    model = resolve_model(lone, components=t2v, attention_head_dim=12)
    assert model.transformer.config.num_attention_heads == 2


def test_ti2v_5b_is_known_by_its_channels(t2v, tmp_path):
    transformer(**VARIANTS["5b"]).save_pretrained(tmp_path / "transformer")
    save_original(tmp_path, tmp_path / "5b.safetensors")
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(t2v / part, tmp_path / part)
    model = resolve_model(tmp_path / "5b.safetensors", attention_head_dim=12)
    assert model.expand_timesteps
    assert model.scheduler_config["flow_shift"] == 5.0


def test_heads_are_128_wide_unless_told_otherwise():
    names = transformer(num_attention_heads=3, attention_head_dim=128, num_layers=1).state_dict()
    config = infer_config({name: tuple(value.shape) for name, value in names.items()})
    assert (config.num_attention_heads, config.attention_head_dim) == (3, 128)
