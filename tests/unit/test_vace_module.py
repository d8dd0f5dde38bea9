"""VACE's blocks in a file of their own, laid over a text to video transformer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sora_engine as sora
from sora_engine import Clip, VideoRequest
from sora_engine.cli.app import UsageError
from sora_engine.cli.options import Common
from sora_engine.errors import CheckpointError
from sora_engine.models.inspection import inspect_file
from sora_engine.models.registry import open_checkpoint
from tests.parity.oracles import tiny_pipeline, tiny_vace
from tests.unit.test_checkpoint import original_name
from tests.unit.weight_recipes import write_gguf, write_safetensors

SHAPE = {"num_attention_heads": 1, "attention_head_dim": 128}
CLIP = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
REQUEST = VideoRequest(
    "red circle", height=32, width=32, num_frames=5, num_inference_steps=2, seed=1,
    clips=[Clip(CLIP[:1], at=0)],
)  # fmt: skip


def is_vace(name):
    return name.startswith("vace_")


def wans_name(name):
    """As in the published files: VACE's blocks are named as the others, but for two layers."""
    if not name.startswith("vace_blocks"):
        return original_name(name)
    name = name.replace("proj_in", "before_proj").replace("proj_out", "after_proj")
    return "vace_" + original_name(name.removeprefix("vace_"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vace")
    pipe = tiny_pipeline("vace", 0)
    pipe.transformer = tiny_vace(0, **SHAPE)
    pipe.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tensors(folder):
    stored = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return {wans_name(name): value for name, value in stored.items()}


@pytest.fixture(scope="module")
def files(tensors, tmp_path_factory):
    """The transformer without its blocks, and the blocks."""
    root = tmp_path_factory.mktemp("files")
    rest = {n: v for n, v in tensors.items() if not is_vace(n)}
    save_file(rest, root / "wan_t2v.safetensors")
    save_file({n: v for n, v in tensors.items() if is_vace(n)}, root / "vace_module.safetensors")
    return root / "wan_t2v.safetensors", root / "vace_module.safetensors"


@pytest.fixture(scope="module")
def parts(folder):
    return {name: folder / name for name in ("vae", "text_encoder", "tokenizer", "scheduler")}


def latents(path, **options):
    with sora.Engine.from_pretrained(path, device="cpu", **options) as engine:
        return engine.generate(REQUEST).latents


def test_laid_over_a_transformer_it_is_the_whole_model(folder, files, parts):
    base, module = files
    whole = latents(folder)
    found = latents(base, components={**parts, "vace": module})
    assert torch.equal(found, whole)
    alone, _ = open_checkpoint(base, parts)
    checkpoint, _ = open_checkpoint(base, {**parts, "vace": module})
    assert (alone.variant, checkpoint.variant) == ("t2v", "vace")
    assert module in checkpoint.weights_paths  # results are named by it too
    added = sum(value.numel() for value in load_file(module).values())
    assert checkpoint.experts[0].num_parameters == alone.experts[0].num_parameters + added


@pytest.mark.parametrize("form", ["fp8_scaled, Kijai", "Q8_0"])
def test_a_quantised_module_under_a_prefix(tensors, files, parts, tmp_path, form):
    base, _ = files
    own = {n: v for n, v in tensors.items() if is_vace(n)}

    def chosen(name, value):
        return name.endswith("ffn.0.weight")

    path = tmp_path / "module"
    if form == "Q8_0":
        values = write_gguf(path, form, own, chosen=chosen)
    else:
        values = write_safetensors(path, form, own, "diffusion_model.", chosen=chosen)
    found = latents(base, components={**parts, "vace": path})
    plain = tmp_path / "plain.safetensors"
    save_file({n: v.contiguous() for n, v in values.items()}, plain)
    want = latents(base, components={**parts, "vace": plain})
    assert (found - want).abs().max() < 1e-5


def test_alone_it_says_what_it_goes_with(files):
    _, module = files
    with pytest.raises(CheckpointError, match=r"components=\{'vace': ...\} \(on .* --vace\)") as e:
        open_checkpoint(module)
    assert e.value.path == module
    (kind,) = inspect_file(module).kinds
    assert kind.startswith("wan VACE module: 2 blocks, 128 wide; laid over a t2v transformer")


def changed(tensors, **changes):
    own = {n: v for n, v in tensors.items() if is_vace(n)}
    for name, value in changes.items():
        name = name.replace("__", ".")
        own.pop(name, None)
        if value is not None:
            own[name] = value
    return own


def test_modules_that_do_not_fit(tensors, files, parts, folder, tmp_path):
    base, module = files
    path = tmp_path / "vace.safetensors"
    part = "vace_blocks.1.after_proj.weight"
    assert part in tensors
    for own, says, tensor in (
        ({n: v for n, v in tensors.items() if not is_vace(n)}, "no VACE module: it holds", None),
        (tensors, "a whole VACE transformer; give it as the model", None),
        ({n: v for n, v in changed(tensors).items() if n != part},
         "half a VACE module: no tensor 'vace_blocks.1.proj_out.weight' and 0 more of block 1",
         "vace_blocks.1.proj_out.weight"),
        (changed(tensors, vace_patch_embedding__weight=torch.ones(64, 96, 1, 2, 2)),
         r"the VACE module is 64 wide and wan_t2v\.safetensors 128", "vace_patch_embedding.weight"),
        (changed(tensors, vace_patch_embedding__weight=None),
         "of 5 dimensions; here it has 0", "vace_patch_embedding.weight"),
    ):  # fmt: skip
        save_file({n: v.contiguous() for n, v in own.items()}, path)
        with pytest.raises(CheckpointError, match=says) as caught:
            open_checkpoint(base, {**parts, "vace": path})
        assert (caught.value.path, caught.value.tensor) == (path, tensor)
    whole = tmp_path / "whole.safetensors"
    save_file({n: v.contiguous() for n, v in tensors.items()}, whole)
    with pytest.raises(CheckpointError, match="has VACE blocks of its own; leave the module out"):
        open_checkpoint(whole, {**parts, "vace": module})
    with pytest.raises(CheckpointError, match="two experts need a VACE module each"):
        open_checkpoint([base, base], {**parts, "vace": module})
    with pytest.raises(CheckpointError, match="vace_2 is for the second of two experts"):
        open_checkpoint(base, {**parts, "vace_2": module})
    both, _ = open_checkpoint([base, base], {**parts, "vace": module, "vace_2": module})
    assert both.variant == "vace, two experts"


def test_modules_on_the_command_line():
    assert Common(vace=["a", "b"], vae="v").parts() == {"vae": "v", "vace": "a", "vace_2": "b"}
    with pytest.raises(UsageError, match="--vace: given 3 times; once an expert"):
        Common(vace=["a", "b", "c"]).parts()
    with pytest.raises(UsageError, match="--vace: --components folder names a folder"):
        Common(vace=["a"], components="folder").parts()
