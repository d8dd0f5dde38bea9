"""What the names, dtypes and marks in a safetensors file say of its quantisation.

Marks that are known:

- none: fp8 values stand for themselves;
- `scaled_fp8`, an empty tensor or one of two elements, with `LAYER.scale_weight` (ComfyUI until
  2025, WanVideoWrapper, LightX2V's files for ComfyUI, musubi-tuner);
- `LAYER.weight_scale` (LightX2V), with `LAYER.comfy_quant` or the header's
  `_quantization_metadata` (ComfyUI since 2025), which name one of `FORMATS`.

Scales of activations (`scale_input`, `input_scale`) serve fp8 products, which are not taken here.
Whatever else marks a quantised file is refused by its name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from sora_engine.errors import CheckpointError
from sora_engine.io.config_file import parse_json_object
from sora_engine.io.safetensors import Weights
from sora_engine.io.weights.codings import MXFP8, MXFP8_BLOCK, NVFP4, NVFP4_BLOCK, Coding, Scaled

METADATA = "_quantization_metadata"
MARKER = "scaled_fp8"
FORMATS = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8_tensorwise": torch.int8,
    "mxfp8": torch.float8_e4m3fn,
    "nvfp4": torch.uint8,
}
"""Formats of ComfyUI that are read, and the dtype of the weights in each."""
WORKS = "bf16, fp16, fp8_scaled, int8, mxfp8, nvfp4, or GGUF of Q2_K to Q8_0 would work"

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = ("scale_weight", "weight_scale")
_UNUSED = ("scale_input", "input_scale")
_OWN = (*_SCALES, *_UNUSED, "weight_scale_2", "comfy_quant")
_SETTINGS = {"format", "full_precision_matrix_mult", "convrot", "convrot_groupsize", "orig_dtype"}
_ELSE = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "bitsandbytes__nf4": "bitsandbytes nf4",
    "bitsandbytes__fp4": "bitsandbytes fp4",
    "wscales": "svdquant",
    "smooth_factor": "svdquant",
    "smooth_orig": "svdquant",
    "int8_weight": "TurboDiffusion's int8",
    "weight_scale_inv": "fp8 by tiles of 128 x 128",
    "weight_packed": "compressed-tensors",
}
"""Last parts of the names that mark formats which are not read."""


def find_codings(weights: Weights) -> tuple[dict[str, Coding], set[str]]:
    """By name each weight that is to be decoded, and the names that are but its scales and marks.

    Raises CheckpointError for marks that are unknown, contradict each other, or do not fit.
    """
    return _Marks(weights).codings()


class _Marks:
    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.of_layer: dict[str, dict[str, str]] = {}
        """By layer and kind of mark its tensor's name."""
        self.markers: set[str] = set()
        """Of each part of an all-in-one file its own."""
        for name in weights:
            layer, _, leaf = name.rpartition(".")
            if leaf in _ELSE:
                raise self.error(f"{name!r} marks {_ELSE[leaf]}, which is not read; {WORKS}", name)
            if leaf == MARKER:
                self.check_marker(name)
            elif leaf in _OWN:
                self.of_layer.setdefault(layer, {})[leaf] = name
        self.settings = self.read_settings()

    def error(self, message: str, name: str) -> CheckpointError:
        path = self.weights.path_of(name) if name in self.weights else self.weights.path
        return CheckpointError(message, path=path, tensor=name)

    def check_marker(self, name: str) -> None:
        info = self.weights.info(name)
        if info.shape not in ((0,), (2,)) or info.dtype not in (*_FP8, torch.float32):
            raise self.error(
                f"the mark {name!r} is {info.dtype} {list(info.shape)}; fp8 of shape [0] or [2] is "
                "known",
                name,
            )
        self.markers.add(name)

    def codings(self) -> tuple[dict[str, Coding], set[str]]:
        found: dict[str, Coding] = {}
        hidden = set(self.markers)
        for layer, marks in self.of_layer.items():
            hidden |= set(marks.values())
            name = f"{layer}.weight" if layer else "weight"
            if name not in self.weights:
                mark = next(iter(marks.values()))
                raise self.error(f"tensor {mark!r} belongs to {name!r}, which is not there", mark)
        for name in self.weights:
            if name in hidden:
                continue
            layer, _, leaf = name.rpartition(".")
            if leaf != "weight":
                continue
            coding = self.coding(name, layer)
            if coding is not None:
                found[name] = coding
        return found, hidden

    def coding(self, name: str, layer: str) -> Coding | None:
        info = self.weights.info(name)
        marks = self.of_layer.get(layer, {})
        settings = self.settings.get(layer)
        scale = self.scale_of(marks)
        if settings is not None:
            return self.native(name, scale, marks, settings)
        if scale is None:
            if info.dtype == torch.int8:
                raise self.error(f"tensor {name!r} is int8 and has no weight_scale; {WORKS}", name)
            marked = any(name.startswith(mark.removesuffix(MARKER)) for mark in self.markers)
            if info.dtype in _FP8 and marked:
                raise self.error(
                    f"tensor {name!r} is fp8 and has no scale_weight, in a file marked scaled_fp8",
                    name,
                )
            return None
        if info.dtype not in (*_FP8, torch.int8):
            raise self.error(
                f"tensor {name!r} is {info.dtype} and has the scale {scale!r}; scales are of fp8 "
                "and int8, and packed formats need a comfy_quant that names them",
                name,
            )
        return self.scaled(name, scale, 0)

    def scale_of(self, marks: Mapping[str, str]) -> str | None:
        scales = [marks[kind] for kind in _SCALES if kind in marks]
        if len(scales) > 1:
            raise self.error(f"{scales[0]!r} and {scales[1]!r} scale one layer", scales[1])
        return scales[0] if scales else None

    def native(
        self, name: str, scale: str | None, marks: Mapping[str, str], settings: Mapping[str, Any]
    ) -> Coding:
        """By what `comfy_quant` or the header says."""
        kind, info = settings.get("format"), self.weights.info(name)
        if kind not in FORMATS:
            raise self.error(
                f"tensor {name!r} has the format {kind!r}; {', '.join(FORMATS)} are read; {WORKS}",
                name,
            )
        unknown = sorted(set(settings) - _SETTINGS)
        if unknown:
            raise self.error(f"comfy_quant of {name!r} has unknown settings {unknown}", name)
        if info.dtype != FORMATS[kind]:
            raise self.error(
                f"tensor {name!r} is {info.dtype}; the format {kind} has {FORMATS[kind]}", name
            )
        if scale is None:
            raise self.error(f"tensor {name!r} is {kind} and has no weight_scale", name)
        rotation = self.rotation(name, settings)
        if kind == "mxfp8":
            self.check_tiled(name, scale, MXFP8_BLOCK, 1, (torch.float8_e8m0fnu, torch.uint8))
            return MXFP8(info.shape, name, scale)
        if kind == "nvfp4":
            whole = marks.get("weight_scale_2")
            if whole is None or math.prod(self.weights.info(whole).shape) != 1:
                raise self.error(f"nvfp4 tensor {name!r} has no weight_scale_2 of one value", name)
            self.check_tiled(name, scale, NVFP4_BLOCK, 2, (torch.float8_e4m3fn, torch.uint8))
            return NVFP4((info.shape[0], 2 * info.shape[1]), name, scale, whole)
        return self.scaled(name, scale, rotation)

    def rotation(self, name: str, settings: Mapping[str, Any]) -> int:
        rotated, size = settings.get("convrot", False), settings.get("convrot_groupsize", 256)
        if not isinstance(rotated, bool):
            raise self.error(f"convrot of {name!r} is {rotated!r}; true or false would work", name)
        if not rotated:
            return 0
        shape = self.weights.info(name).shape
        power = isinstance(size, int) and size in (4, 16, 64, 256, 1024)
        if settings.get("format") != "int8_tensorwise" or len(shape) != 2 or not power:
            raise self.error(
                f"convrot_groupsize of {name!r} is {size!r}; int8 matrices in groups of 4, 16, 64, "
                "256 or 1024 are read",
                name,
            )
        if shape[1] % size:
            raise self.error(f"tensor {name!r} {list(shape)} is no multiple of {size} wide", name)
        return int(size)

    def scaled(self, name: str, scale: str, rotation: int) -> Scaled:
        info, own = self.weights.info(name), self.weights.info(scale)
        if not own.dtype.is_floating_point:
            raise self.error(f"tensor {scale!r} is {own.dtype}; scales are floating-point", scale)
        rows, width = info.shape[0] if info.shape else 1, math.prod(info.shape[1:])
        if own.shape in ((), (1,)):
            blocks = 0
        elif own.shape in ((rows,), (rows, 1), (1, 1)):
            blocks = 1 if math.prod(own.shape) == rows else 0
        elif len(own.shape) == 3 and (own.shape[0], own.shape[2]) == (rows, 1):
            blocks = own.shape[1]
        else:
            raise self.error(
                f"tensor {scale!r} has shape {list(own.shape)}; a scale of {name!r} "
                f"{list(info.shape)} is [], [1], [{rows}], [{rows}, 1] or [{rows}, blocks, 1]",
                scale,
            )
        if blocks and width % blocks:
            raise self.error(
                f"tensor {scale!r} has {blocks} blocks for a width of {width}; a number that "
                "divides it would work",
                scale,
            )
        kind = str(info.dtype).removeprefix("torch.")
        by = {0: "tensor", 1: "row"}.get(blocks, f"{width // max(blocks, 1)}")
        turned = f", convrot {rotation}" if rotation else ""
        return Scaled(info.shape, f"{kind} scaled by {by}{turned}", name, scale, blocks, rotation)

    def check_tiled(
        self, name: str, scale: str, block: int, packed: int, dtypes: Iterable[torch.dtype]
    ) -> None:
        """That the scales are those of such a matrix, in tiles of 128 x 4."""
        info, own = self.weights.info(name), self.weights.info(scale)
        if len(info.shape) != 2 or info.shape[1] * packed % block:
            raise self.error(
                f"tensor {name!r} has shape {list(info.shape)}; a matrix in blocks of {block} "
                "would work",
                name,
            )
        want = [
            math.ceil(info.shape[0] / 128) * 128,
            math.ceil(info.shape[1] * packed // block / 4) * 4,
        ]
        if list(own.shape) != want or own.dtype not in dtypes:
            raise self.error(
                f"tensor {scale!r} is {own.dtype} {list(own.shape)}; scales of {name!r} are "
                f"{want}, in tiles of 128 x 4",
                scale,
            )

    def read_settings(self) -> dict[str, dict[str, Any]]:
        """By layer what `comfy_quant` and the header say of it."""
        settings: dict[str, dict[str, Any]] = {}
        for layer, marks in self.of_layer.items():
            if "comfy_quant" in marks:
                settings[layer] = self.read_mark(marks["comfy_quant"])
        for file in self.weights.files:
            if METADATA not in file.metadata:
                continue
            text = file.metadata[METADATA].encode()
            told = parse_json_object(text, file.path, METADATA).get("layers")
            if not isinstance(told, dict) or not all(isinstance(v, dict) for v in told.values()):
                raise CheckpointError(f"{METADATA} has no layers", path=file.path)
            for given, values in told.items():
                layer = self.full_name(given)
                if settings.setdefault(layer, values) != values:
                    raise self.error(
                        f"{METADATA} says {json.dumps(values)} of {layer!r}, and its comfy_quant "
                        f"{json.dumps(settings[layer])}",
                        f"{layer}.comfy_quant",
                    )
        return settings

    def read_mark(self, name: str) -> dict[str, Any]:
        info = self.weights.info(name)
        if info.dtype != torch.uint8 or len(info.shape) != 1:
            raise self.error(
                f"tensor {name!r} is {info.dtype} {list(info.shape)}; comfy_quant is JSON in uint8",
                name,
            )
        text = bytes(self.weights.read(name).tolist())
        try:
            return parse_json_object(text, self.weights.path_of(name), name)
        except CheckpointError as error:
            raise CheckpointError(
                str(error).removeprefix(f"{error.path}: "), path=error.path, tensor=name
            ) from None

    def full_name(self, layer: str) -> str:
        """The layer's name in the tensors: the header may lack their prefix."""
        if f"{layer}.weight" in self.weights:
            return layer
        ends = f".{layer}.weight"
        found = [name for name in self.weights if name.endswith(ends)]
        if len(found) != 1:
            raise CheckpointError(
                f"{METADATA} names the layer {layer!r}, and {len(found)} tensors end in its name",
                path=self.weights.path,
                tensor=f"{layer}.weight",
            )
        return found[0].removesuffix(".weight")
