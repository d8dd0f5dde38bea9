"""Tiny files of each format of weights, and what an independent reader makes of their values."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy_kitchen as ck
import gguf
import numpy as np
import torch
from comfy_kitchen.tensor.int8 import TensorWiseINT8Layout
from safetensors.torch import save_file
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Tensors = dict[str, Tensor]


@dataclass
class Recipe:
    """How one layer's weight is stored, and how whole files are marked.

    layer: a weight to its tensors, by what follows the layer's name, and the values they stand for.
    config: what `comfy_quant` says, if it is there. told_in: "tensors", "header", "both" or
    "short", a header that lacks the tensors' prefix. marker: the tensor `scaled_fp8`.
    """

    layer: Callable[[Tensor], tuple[Tensors, Tensor]]
    config: dict[str, Any] | None = None
    told_in: str = "tensors"
    marker: Tensor | None = None


def cast(dtype):
    return lambda w: ({"weight": w.to(dtype)}, w.to(dtype).float())


def scaled(dtype, leaf="scale_weight", shape=(), by=None, scale_input=False):
    """fp8 by hand: amax over what a scale is of. by: rows ("row") or blocks of so many."""

    def make(w):
        top = torch.finfo(dtype).max
        if by is None:
            scale = w.abs().amax() / top
            parts, own = w / scale, scale.reshape(shape)
            stored = parts.to(dtype)
            values = stored.double() * scale.double()
        else:
            blocks = w.view(w.shape[0], -1, w.shape[1] if by == "row" else by)
            scale = blocks.abs().amax(dim=2, keepdim=True) / top
            stored = (blocks / scale).to(dtype)
            values = (stored.double() * scale.double()).reshape(w.shape)
            stored = stored.reshape(w.shape)
            own = scale.reshape({"row": (w.shape[0], *shape)}.get(by, scale.shape))
        tensors = {"weight": stored, leaf: own.contiguous()}
        if scale_input:
            tensors["scale_input"] = torch.tensor(0.7)
        return tensors, values.float()

    return make


def native_fp8(w):
    scale = (w.abs().amax() / 448).float()
    stored = ck.quantize_per_tensor_fp8(w, scale, E4M3)
    tensors = {"weight": stored, "weight_scale": scale, "input_scale": torch.tensor(0.5)}
    return tensors, ck.dequantize_per_tensor_fp8(stored, scale, torch.float32)


def int8(per_channel, convrot=0):
    options = {"convrot": True, "convrot_groupsize": convrot} if convrot else {}

    def make(w):
        q, params = TensorWiseINT8Layout.quantize(w, per_channel=per_channel, **options)
        return {"weight": q, "weight_scale": params.scale}, TensorWiseINT8Layout.dequantize(
            q, params
        ).float()

    return make


def mxfp8(w):
    q, scales = ck.quantize_mxfp8(w)
    return {"weight": q, "weight_scale": scales}, ck.dequantize_mxfp8(q, scales, torch.float32)


def nvfp4(w):
    whole = (w.abs().amax() / (448 * 6)).float()
    q, scales = ck.quantize_nvfp4(w, whole)
    tensors = {"weight": q, "weight_scale": scales, "weight_scale_2": whole}
    return tensors, ck.dequantize_nvfp4(q, whole, scales, torch.float32)


EMPTY, TWO = torch.zeros(0, dtype=E4M3), torch.zeros(2, dtype=E4M3)
FP8 = {"format": "float8_e4m3fn"}
INT8 = {"format": "int8_tensorwise"}
ROTATED = {**INT8, "convrot": True}

SAFETENSORS = {
    "float32": Recipe(cast(torch.float32)),
    "bfloat16": Recipe(cast(torch.bfloat16)),
    "float16": Recipe(cast(torch.float16)),
    "fp8 e4m3 cast": Recipe(cast(E4M3)),
    "fp8 e5m2 cast": Recipe(cast(E5M2)),
    "fp8_scaled, legacy": Recipe(scaled(E4M3, scale_input=True), marker=EMPTY),
    "fp8_scaled, Kijai": Recipe(scaled(E4M3, shape=(1,)), marker=EMPTY),
    "fp8_scaled e5m2, Kijai": Recipe(scaled(E5M2, shape=(1,)), marker=EMPTY.to(E5M2)),
    "fp8, LightX2V for ComfyUI": Recipe(scaled(E4M3), marker=TWO),
    "fp8 by row, LightX2V": Recipe(scaled(E4M3, "weight_scale", (1,), "row")),
    "fp8 by row, flat": Recipe(scaled(E4M3, "weight_scale", (), "row")),
    "fp8 in blocks of 64, musubi": Recipe(scaled(E4M3, by=64), marker=EMPTY),
    "fp8, native": Recipe(native_fp8, FP8),
    "fp8, native by header": Recipe(native_fp8, FP8, told_in="header"),
    "fp8, native by both": Recipe(native_fp8, FP8, told_in="both"),
    "fp8, native by a header without the prefix": Recipe(native_fp8, FP8, told_in="short"),
    "fp8 e5m2, native": Recipe(
        scaled(E5M2, "weight_scale"), {"format": "float8_e5m2", "full_precision_matrix_mult": True}
    ),
    "int8 by tensor": Recipe(int8(False), INT8),
    "int8 by row": Recipe(int8(True), INT8),
    "int8 by row, without a mark": Recipe(int8(True)),
    "int8 convrot 256": Recipe(int8(True, 256), {**ROTATED, "convrot_groupsize": 256}),
    "int8 convrot 64": Recipe(int8(True, 64), {**ROTATED, "convrot_groupsize": 64}),
    "int8 convrot, of the usual size": Recipe(int8(True, 256), ROTATED),
    "mxfp8": Recipe(mxfp8, {"format": "mxfp8"}),
    "nvfp4": Recipe(nvfp4, {"format": "nvfp4"}),
}


def is_linear(name: str, value: Tensor) -> bool:
    """What files quantise: the matrices of the blocks."""
    return name.startswith("blocks.") and name.endswith(".weight") and value.ndim == 2


def write_safetensors(path, kind, tensors, prefix="", chosen=is_linear):
    """A file of that format; returns what its tensors stand for, by their names in it."""
    recipe = SAFETENSORS[kind]
    stored, values, layers = {}, {}, {}
    for name, tensor in tensors.items():
        layer = prefix + name.removesuffix(".weight")
        if not chosen(name, tensor):
            stored[prefix + name] = values[prefix + name] = tensor
            continue
        parts, values[prefix + name] = recipe.layer(tensor.float())
        stored |= {f"{layer}.{leaf}": part for leaf, part in parts.items()}
        if recipe.config is None:
            continue
        if recipe.told_in in ("tensors", "both"):
            text = json.dumps(recipe.config).encode()
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
        if recipe.told_in != "tensors":
            layers[layer.removeprefix(prefix) if recipe.told_in == "short" else layer] = (
                recipe.config
            )
    metadata = {}
    if layers:
        told = {"format_version": "1.0", "layers": layers}
        metadata["_quantization_metadata"] = json.dumps(told)
    if recipe.marker is not None:
        stored[f"{prefix}scaled_fp8"] = recipe.marker
    save_file({name: value.contiguous() for name, value in stored.items()}, path, metadata=metadata)
    return values


# GGUF.

_SMALL = {  # of each type that the package cannot write, where its float16 fields are
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
GGUF = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", *_SMALL)


def to_blocks(weight: Tensor, kind: str) -> np.ndarray:
    """A weight in blocks of that type; random ones, about as large, where no one can write it."""
    form = gguf.GGMLQuantizationType[kind]
    if kind not in _SMALL:
        return gguf.quants.quantize(weight.float().numpy(), form)
    values, size = gguf.GGML_QUANT_SIZES[form]
    rows, width = weight.shape
    random = np.random.default_rng(int(weight.abs().sum() * 100) % 2**32)
    blocks = random.integers(0, 256, (rows * width // values, size), dtype=np.uint8)
    for at in _SMALL[kind]:
        scale = random.uniform(0.5, 1.5, len(blocks)) * 1e-4 * (10 if kind == "Q2_K" else 1)
        blocks[:, at : at + 2] = scale.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def write_gguf(path, kind, tensors, chosen=is_linear, arch="wan"):
    """A file with the chosen weights in that type; returns what its tensors stand for."""
    writer = gguf.GGUFWriter(path, arch=arch)
    writer.add_quantization_version(2)
    values = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        plain = "F32" if tensor.ndim == 1 or "modulation" in name else ("F16", "BF16")[i % 2]
        form = gguf.GGMLQuantizationType[kind if chosen(name, tensor) else plain]
        data = (
            to_blocks(tensor, kind)
            if chosen(name, tensor)
            else gguf.quants.quantize(tensor.float().numpy(), form)
        )
        writer.add_tensor(name, data, raw_dtype=form)
        decoded = gguf.quants.dequantize(data, form)
        values[name] = torch.from_numpy(np.ascontiguousarray(decoded)).reshape(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values
