"""Every bad file of a list is a `CheckpointError` that names the file and the tensor."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sora_engine.errors import CheckpointError
from sora_engine.io.safetensors import SafetensorsFile
from sora_engine.io.weights.opening import open_weights
from tests.unit.weight_recipes import write_safetensors

LAYER = "blocks.0.q"
WEIGHT = f"{LAYER}.weight"


def changed(**changes):
    """Tensors of the layer in place of the file's own; None takes one out."""

    def spoil(tensors, metadata):
        for leaf, value in changes.items():
            tensors.pop(f"{LAYER}.{leaf}", None)
            if value is not None:
                tensors[f"{LAYER}.{leaf}"] = value

    return spoil


def added(name, value):
    return lambda tensors, metadata: tensors.update({name: value})


def mark(values):
    text = values if isinstance(values, bytes) else json.dumps(values).encode()
    return changed(comfy_quant=torch.tensor(list(text), dtype=torch.uint8))


def header(text):
    def spoil(tensors, metadata):
        metadata["_quantization_metadata"] = text if isinstance(text, str) else json.dumps(text)

    return spoil


def of_layer(values, layer=LAYER):
    return header({"format_version": "1.0", "layers": {layer: values}})


LEGACY, NATIVE, ROWS = "fp8_scaled, legacy", "fp8, native", "fp8 by row, LightX2V"
BLOCKS, INT8, ROTATED = "fp8 in blocks of 64, musubi", "int8 by row", "int8 convrot 256"
ONE = torch.ones(())

# kind: (a format, what is done to its tensors, what the message says, the tensor it names)
BAD = {
    "scale missing": (LEGACY, changed(scale_weight=None), "fp8 and has no scale_weight", WEIGHT),
    "weight missing": (BLOCKS, changed(weight=None), "which is not there", f"{LAYER}.scale_weight"),
    "two scales": (LEGACY, changed(weight_scale=ONE), "scale one layer", f"{LAYER}.weight_scale"),
    "scale of another length": (
        ROWS, changed(weight_scale=torch.ones(7, 1)),
        r"shape \[7, 1\]; a scale of 'blocks.0.q.weight' \[64, 256\] is \[\], \[1\], \[64\]",
        f"{LAYER}.weight_scale",
    ),
    "scale by column": (
        ROWS, changed(weight_scale=torch.ones(1, 256)), r"\[1, 256\]", f"{LAYER}.weight_scale",
    ),
    "scale of integers": (
        ROWS, changed(weight_scale=torch.ones(64, 1, dtype=torch.int32)),
        "is torch.int32; scales are floating-point", f"{LAYER}.weight_scale",
    ),
    "blocks that do not divide": (
        BLOCKS, changed(scale_weight=torch.ones(64, 3, 1)), "3 blocks for a width of 256",
        f"{LAYER}.scale_weight",
    ),
    "scale of a dense weight": (
        LEGACY, changed(weight=torch.ones(64, 256)), "is torch.float32 and has the scale", WEIGHT,
    ),
    "marker of another shape": (
        LEGACY, added("scaled_fp8", torch.zeros(3).to(torch.float8_e4m3fn)), r"\[3\]; fp8 of shape",
        "scaled_fp8",
    ),
    "int8 without a scale": (
        INT8, changed(weight_scale=None, comfy_quant=None), "int8 and has no weight_scale", WEIGHT,
    ),
    "native without a scale": (
        NATIVE, changed(weight_scale=None), "float8_e4m3fn and has no weight_scale", WEIGHT,
    ),
    "unknown format": (
        NATIVE, mark({"format": "svdquant_w4a4"}),
        r"format 'svdquant_w4a4'; float8_e4m3fn, .*; bf16, fp16, fp8_scaled", WEIGHT,
    ),
    "no format": (NATIVE, mark({}), "format None", WEIGHT),
    "format of another dtype": (
        NATIVE, mark({"format": "int8_tensorwise"}), "the format int8_tensorwise has torch.int8",
        WEIGHT,
    ),
    "unknown setting": (
        NATIVE, mark({"format": "float8_e4m3fn", "permuted": 1}),
        r"unknown settings \['permuted'\]", WEIGHT,
    ),
    "mark that is not JSON": (
        NATIVE, mark(b"{,"), "not JSON", f"{LAYER}.comfy_quant",
    ),
    "mark of floats": (
        NATIVE, changed(comfy_quant=torch.ones(4)), "comfy_quant is JSON in uint8",
        f"{LAYER}.comfy_quant",
    ),
    "rotation of no power of 4": (
        ROTATED, mark({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 128}),
        "convrot_groupsize of 'blocks.0.q.weight' is 128", WEIGHT,
    ),
    "rotation wider than the weight": (
        ROTATED, mark({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 1024}),
        "no multiple of 1024 wide", WEIGHT,
    ),
    "rotation of fp8": (
        NATIVE, mark({"format": "float8_e4m3fn", "convrot": True}), "int8 matrices in groups",
        WEIGHT,
    ),
    "rotation neither true nor false": (
        ROTATED, mark({"format": "int8_tensorwise", "convrot": "yes"}), "convrot of .* is 'yes'",
        WEIGHT,
    ),
    "header and mark that differ": (
        NATIVE, of_layer({"format": "mxfp8"}), 'says {"format": "mxfp8"} of',
        f"{LAYER}.comfy_quant",
    ),
    "header without layers": (NATIVE, header({}), "has no layers", None),
    "header that is not JSON": (NATIVE, header("{"), "_quantization_metadata is not JSON", None),
    "header of an absent layer": (
        NATIVE, of_layer({"format": "mxfp8"}, "blocks.9.q"), "0 tensors end in its name",
        "blocks.9.q.weight",
    ),
    "tiles of another shape": (
        "mxfp8", changed(weight_scale=torch.ones(64, 8).to(torch.float8_e8m0fnu)),
        r"are \[128, 8\], in tiles of 128 x 4", f"{LAYER}.weight_scale",
    ),
    "tiles of another dtype": (
        "nvfp4", changed(weight_scale=torch.ones(128, 16)), "is torch.float32",
        f"{LAYER}.weight_scale",
    ),
    "width that no block divides": (
        "mxfp8", changed(weight=torch.ones(64, 40).to(torch.float8_e4m3fn)),
        r"shape \[64, 40\]; a matrix in blocks of 32", WEIGHT,
    ),
    "nvfp4 without its second scale": (
        "nvfp4", changed(weight_scale_2=None), "no weight_scale_2 of one value", WEIGHT,
    ),
    "GPTQ": (
        "float32", added(f"{LAYER}.qweight", torch.ones(4, dtype=torch.int32)),
        "marks GPTQ or AWQ, which is not read; bf16", f"{LAYER}.qweight",
    ),
    "bitsandbytes": (
        "float32", added(f"{WEIGHT}.quant_state.bitsandbytes__nf4", torch.ones(4)),
        "marks bitsandbytes nf4", f"{WEIGHT}.quant_state.bitsandbytes__nf4",
    ),
    "svdquant": (
        "float32", added(f"{LAYER}.wscales", torch.ones(4)), "marks svdquant", f"{LAYER}.wscales",
    ),
    "tiles of fp8": (
        "fp8 e4m3 cast", added(f"{LAYER}.weight_scale_inv", torch.ones(1, 2)),
        "marks fp8 by tiles of 128 x 128", f"{LAYER}.weight_scale_inv",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_names_itself_and_the_tensor(tmp_path, kind):
    form, spoil, says, tensor = BAD[kind]
    path = tmp_path / "w.safetensors"
    torch.manual_seed(0)
    values = write_safetensors(path, form, {WEIGHT: torch.randn(64, 256)})
    with open_weights(path) as weights:  # good before it is spoiled
        assert weights.read(WEIGHT).shape == values[WEIGHT].shape
    with SafetensorsFile(path) as file:
        metadata = dict(file.metadata)
    tensors = load_file(path)
    spoil(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=says) as caught:
        open_weights(path)
    assert caught.value.path == path
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).count(str(path)) == 1
    assert caught.value.tensor == tensor


def test_scales_and_marks_are_no_weights(tmp_path):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, NATIVE, {WEIGHT: torch.randn(64, 256)})
    with open_weights(path) as weights:
        for name in (f"{LAYER}.weight_scale", f"{LAYER}.comfy_quant", f"{LAYER}.input_scale"):
            assert name not in weights
            for ask in (weights.read, weights.info, weights.path_of):
                with pytest.raises(CheckpointError, match="no tensor") as caught:
                    ask(name)
                assert caught.value.tensor == name


def snapshot(folder):
    """A hub's layout of one file: a link in a snapshot to a blob."""
    blob = folder / "models--a--b" / "blobs" / "0123abcd"
    link = folder / "models--a--b" / "snapshots" / "fedc" / "transformer" / "w.safetensors"
    for path in (blob, link):
        path.parent.mkdir(parents=True)
    save_file({"w": torch.arange(3.0)}, blob)
    link.symlink_to("../../../blobs/0123abcd")
    return link, blob


def test_a_snapshot_is_read_through_its_links(tmp_path):
    link, blob = snapshot(tmp_path)
    assert not blob.suffix
    for path in (link, link.parents[2] / "fedc" / ".." / "fedc" / "transformer" / link.name):
        with open_weights(path) as weights:
            assert weights.read("w").tolist() == [0, 1, 2]
    moved = tmp_path / "disk"
    (tmp_path / "models--a--b").rename(moved)  # a cache may itself be linked to
    (tmp_path / "models--a--b").symlink_to(moved)
    with open_weights(link) as weights:
        assert weights.read("w").tolist() == [0, 1, 2]


@pytest.mark.parametrize("target", ["secret.safetensors", "models--a--c/blobs/1"])
def test_a_link_out_of_its_repository_is_refused(tmp_path, target):
    link, blob = snapshot(tmp_path)
    stranger = tmp_path / target
    stranger.parent.mkdir(parents=True, exist_ok=True)
    blob.rename(stranger)
    link.unlink()
    link.symlink_to(stranger)
    with pytest.raises(CheckpointError, match="outside the repository of its snapshot") as caught:
        open_weights(link)
    assert caught.value.path == link
    index = link.with_name("w.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"w": link.name}}))
    with pytest.raises(CheckpointError, match="outside the repository") as caught:
        open_weights(index)
    assert caught.value.path == link
    config = link.with_name("w.safetensors.index.json")
    config.rename(tmp_path / "stray.json")
    config.symlink_to(tmp_path / "stray.json")
    with pytest.raises(CheckpointError, match="outside the repository") as caught:
        open_weights(config)
    assert caught.value.path == config
