"""Quantises the matrices of a transformer's blocks into a file that others read too.

int8 and fp8 go into safetensors files with ComfyUI's marks: `weight_scale`, and `comfy_quant` that
names the format (`int8_tensorwise`, a scale a row; `float8_e4m3fn`, one for the tensor). Q8_0
goes into a GGUF file. A file is written beside its place, a piece of a tensor at a time, and put
there whole.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from sora_engine.io.atomic import refuse_no_name, temporary_beside, written_through
from sora_engine.io.safetensors import DTYPES
from sora_engine.io.weights.source import PIECE_VALUES, WeightSource

TARGETS = {"int8": ".safetensors", "fp8": ".safetensors", "q8_0": ".gguf"}
"""What can be made, and the suffix of its file."""
ERROR = "sora_quantised_error"
"""In the header: the relative error of the weights that were quantised."""
COMFY = {"int8": "int8_tensorwise", "fp8": "float8_e4m3fn"}
ALIGNMENT = 32  # of GGUF
FP8_TOP = 448.0
SMALL = 1024
"""Tensors of as many values are float32 in GGUF files, as ComfyUI-GGUF's converter has it."""
_GGUF_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
_Q8_0, _Q8_0_FILE = 8, 7


@dataclass(frozen=True, slots=True)
class Report:
    """What was written. error: of the quantised weights, relative. size_bytes: of the file."""

    num_quantised: int
    num_dense: int
    error: float
    size_bytes: int


@dataclass(slots=True)
class _Loss:
    lost: float = 0.0
    whole: float = 0.0
    count: int = 0

    def add(self, values: Tensor, made: Tensor) -> None:
        self.lost += float((made - values).square().sum(dtype=torch.float64))
        self.whole += float(values.square().sum(dtype=torch.float64))

    @property
    def relative(self) -> float:
        return math.sqrt(self.lost / self.whole) if self.whole else 0.0


def quantise(
    source: WeightSource,
    path: Path,
    to: str,
    *,
    rename: Callable[[str], str],
    architecture: str,
) -> Report:
    """Write `source` with its blocks' matrices quantised; the rest as it is stored.

    to: of `TARGETS`. rename: to the names that the file is to have. architecture: what a GGUF file
    says that it is. Raises OSError, leaving no half
    a file; CheckpointError for what cannot be read.
    """
    refuse_no_name(path)
    target = written_through(path)
    temporary = temporary_beside(target)
    loss = _Loss()
    try:
        with temporary.open("xb") as file:
            if to == "q8_0":
                _write_gguf(file, source, architecture, rename, loss)
            else:
                _write_safetensors(file, source, to, rename, loss)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return Report(loss.count, len(source) - loss.count, loss.relative, target.stat().st_size)


def is_chosen(source: WeightSource, name: str, block: int = 1) -> bool:
    """Whether it is a matrix of a block, in rows of whole blocks of values."""
    shape = source.info(name).shape
    matrix = len(shape) == 2 and name.endswith(".weight") and 0 not in shape
    return bool(matrix and shape[1] % block == 0 and re.match(r"\w*blocks\.\d+\.", name))


def _pieces(source: WeightSource, name: str) -> Iterator[tuple[range, Tensor]]:
    """A tensor's rows in float32."""
    rows, *rest = source.info(name).shape
    step = max(1, PIECE_VALUES // max(1, math.prod(rest)))
    for first in range(0, rows, step):
        part = range(first, min(rows, first + step))
        yield part, source.read(name, dtype=torch.float32, rows=part)


def _put(file: BinaryIO, at: int, tensor: Tensor) -> None:
    file.seek(at)
    file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _copy(file: BinaryIO, at: int, source: WeightSource, name: str, dtype: torch.dtype) -> None:
    shape = source.info(name).shape
    if not shape:
        return _put(file, at, source.read(name, dtype=dtype).reshape(1))
    for part, values in _pieces(source, name):
        _put(file, at + part.start * math.prod(shape[1:]) * dtype.itemsize, values.to(dtype))
    return None


# safetensors.


def _write_safetensors(
    file: BinaryIO, source: WeightSource, to: str, rename: Callable[[str], str], loss: _Loss
) -> None:
    stored = torch.int8 if to == "int8" else torch.float8_e4m3fn
    mark = torch.tensor(list(json.dumps({"format": COMFY[to]}).encode()), dtype=torch.uint8)
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in source:
        info, own = source.info(name), rename(name)
        if not is_chosen(source, name):
            entries[own] = info.dtype, tuple(info.shape)
            continue
        layer = own.removesuffix(".weight")
        entries[own] = stored, tuple(info.shape)
        scales = (info.shape[0], 1) if to == "int8" else ()
        entries[f"{layer}.weight_scale"] = torch.float32, scales
        entries[f"{layer}.comfy_quant"] = torch.uint8, tuple(mark.shape)
    # As the format's own library does: wide elements first, so that all are aligned.
    order = sorted(entries, key=lambda name: (-entries[name][0].itemsize, name))
    ends, at = {}, 0
    for name in order:
        dtype, shape = entries[name]
        at += math.prod(shape) * dtype.itemsize
        ends[name] = at
    # The error is known last: its place is held by as many characters.
    begin = _safetensors_header(file, entries, ends, order, f"{0.0:.6e}")
    for name in source:
        own = rename(name)
        first = begin + ends[own] - math.prod(entries[own][1]) * entries[own][0].itemsize
        if not is_chosen(source, name):
            _copy(file, first, source, name, entries[own][0])
            continue
        layer = own.removesuffix(".weight")
        scale = _quantised_rows(file, first, source, name, to, loss)
        _put(file, begin + ends[f"{layer}.weight_scale"] - scale.nbytes, scale)
        _put(file, begin + ends[f"{layer}.comfy_quant"] - mark.nbytes, mark)
        loss.count += 1
    _safetensors_header(file, entries, ends, order, f"{loss.relative:.6e}")


def _safetensors_header(
    file: BinaryIO,
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    ends: Mapping[str, int],
    order: list[str],
    error: str,
) -> int:
    """Writes it; where the tensors begin."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt", ERROR: error}}
    for name in order:
        dtype, shape = entries[name]
        size = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": names[dtype],
            "shape": list(shape),
            "data_offsets": [ends[name] - size, ends[name]],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.seek(0)
    file.write(struct.pack("<Q", len(text)) + text)
    return 8 + len(text)


def _quantised_rows(
    file: BinaryIO, at: int, source: WeightSource, name: str, to: str, loss: _Loss
) -> Tensor:
    """Writes a weight a byte a value; returns its scales."""
    width = source.info(name).shape[1]
    tiny = torch.finfo(torch.float32).tiny
    scales = []
    whole = torch.tensor(0.0)
    if to == "fp8":
        for _, values in _pieces(source, name):
            whole = torch.maximum(whole, values.abs().amax())
        whole = whole.clamp_min(tiny) / FP8_TOP
    for part, values in _pieces(source, name):
        if to == "int8":
            scale = values.abs().amax(dim=1, keepdim=True).clamp_min(tiny) / 127
            codes = (values / scale).round_().to(torch.int8)
            scales.append(scale)
        else:
            scale = whole
            codes = (values / scale).clamp_(-FP8_TOP, FP8_TOP).to(torch.float8_e4m3fn)
        loss.add(values, codes.float() * scale)
        _put(file, at + part.start * width, codes)
    return torch.cat(scales) if scales else whole


# GGUF.


def q8_0(values: Tensor) -> Tensor:
    """Rows `[n, width]` (float32) as blocks, uint8 `[n, width / 32 * 34]`, bit for bit as ggml's
    own quantiser: halves are rounded away from zero."""
    blocks = values.reshape(-1, 32)
    d = blocks.abs().amax(dim=1, keepdim=True) / 127
    scaled = blocks * torch.where(d == 0, 0.0, 1 / d)
    codes = (scaled.sign() * (scaled.abs() + 0.5).floor()).to(torch.int8)
    raw = torch.cat((d.half().view(torch.uint8), codes.view(torch.uint8)), dim=1)
    return raw.view(len(values), -1)


def _write_gguf(
    file: BinaryIO,
    source: WeightSource,
    architecture: str,
    rename: Callable[[str], str],
    loss: _Loss,
) -> None:
    types: dict[str, int] = {}
    dtypes: dict[str, torch.dtype] = {}
    sizes: dict[str, int] = {}
    for name in source:
        shape = source.info(name).shape
        count = math.prod(shape)
        if is_chosen(source, name, 32) and count > SMALL:
            types[name], sizes[name] = _Q8_0, count // 32 * 34
            continue
        dtype = source.info(name).dtype
        small = len(shape) <= 1 or "modulation" in name or count <= SMALL
        dtypes[name] = torch.float32 if small or dtype not in _GGUF_TYPES else dtype
        types[name], sizes[name] = _GGUF_TYPES[dtypes[name]], count * dtypes[name].itemsize
    begin = _gguf_header(file, source, architecture, rename, types, sizes, 0.0)
    at = begin
    for name in source:
        if types[name] == _Q8_0:
            row_bytes = source.info(name).shape[1] // 32 * 34
            for part, values in _pieces(source, name):
                raw = q8_0(values)
                pairs = raw.view(-1, 34)
                made = pairs[:, :2].contiguous().view(torch.float16).float()
                made = made * pairs[:, 2:].contiguous().view(torch.int8).float()
                loss.add(values, made.view(values.shape))
                _put(file, at + part.start * row_bytes, raw)
            loss.count += 1
        else:
            _copy(file, at, source, name, dtypes[name])
        at += -(-sizes[name] // ALIGNMENT) * ALIGNMENT
    file.truncate(at)
    _gguf_header(file, source, architecture, rename, types, sizes, loss.relative)


def _gguf_header(
    file: BinaryIO,
    source: WeightSource,
    architecture: str,
    rename: Callable[[str], str],
    types: Mapping[str, int],
    sizes: Mapping[str, int],
    error: float,
) -> int:
    """Writes it; where the tensors begin. Shapes stand with the fastest dimension first."""

    def text(value: str) -> bytes:
        raw = value.encode()
        return struct.pack("<Q", len(raw)) + raw

    values = [
        text("general.architecture") + struct.pack("<I", 8) + text(architecture),
        text("general.quantization_version") + struct.pack("<II", 4, 2),
        text("general.file_type") + struct.pack("<II", 4, _Q8_0_FILE),
        text(ERROR) + struct.pack("<If", 6, error),
    ]
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(types), len(values)), *values]
    offset = 0
    for name in source:
        shape = source.info(name).shape or (1,)
        parts.append(text(rename(name)) + struct.pack("<I", len(shape)))
        parts.append(struct.pack(f"<{len(shape)}Q", *reversed(shape)))
        parts.append(struct.pack("<IQ", types[name], offset))
        offset += -(-sizes[name] // ALIGNMENT) * ALIGNMENT
    raw = b"".join(parts)
    raw += b"\0" * (-len(raw) % ALIGNMENT)
    file.seek(0)
    file.write(raw)
    return len(raw)
