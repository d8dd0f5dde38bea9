"""A memory-mapped reader of safetensors files that checks everything before it trusts anything.

The format (https://github.com/huggingface/safetensors#format): eight bytes of header length,
little-endian; a JSON header that gives each tensor's dtype, shape and range of bytes; the bytes.

Tensors are read straight into the memory that keeps them, or, where they change their dtype or
device, copied out of the map in pieces whose pages are handed back. So loading a model peaks at its
own size and one piece, whatever dtype the file has, and a file that is replaced later can neither
crash nor change a running model.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar

import torch

from sora_engine.errors import CheckpointError
from sora_engine.io.config_file import parse_json_object, read_json_object
from sora_engine.io.file_kind import SAFETENSORS, kind_of
from sora_engine.io.links import refuse_stray_link
from sora_engine.io.mapped_file import MappedFile
from sora_engine.io.weights.source import Kept, kept_format_of

MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own library
FP8 = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
VARIANTS = ("bf16", "fp16")
"""Suffixes of half-precision files, tried in this order where there is no plain file."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor; `start` and `end` are offsets in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int
    is_plain: ClassVar[bool] = True


def refuse_pickle(path: Path) -> None:
    """Raise `CheckpointError` if the name is that of a pickle, which can run code when opened."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path.suffix} files are pickles, which can run code, and are not read; "
            "convert the weights to .safetensors",
            path=path,
        )


class SafetensorsFile:
    """One open file. Its header is checked on opening; use it as a context manager, or close it.

    Raises `CheckpointError` for a file that is missing, truncated, too long, or that says
    anything of its tensors that cannot be.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        refuse_pickle(self.path)
        refuse_stray_link(self.path)
        try:
            with open(self.path, "rb") as file:
                self._size = os.fstat(file.fileno()).st_size
                self.tensors, self.metadata = _read_header(file.read, self._size, self.path)
            self.bytes = MappedFile(self.path)
        except FileNotFoundError:
            raise CheckpointError("no such file", path=self.path) from None
        except (OSError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"cannot be read ({reason})", path=self.path) from None

    def view(self, name: str) -> torch.Tensor:
        """The tensor in the map itself, on the CPU, in its stored dtype: to be read, not written,
        and not after the file changes. A tensor of a misaligned file comes as a copy."""
        info = self._info(name)
        if info.start == info.end:
            return torch.empty(info.shape, dtype=info.dtype)
        flat = self.bytes.view(info.start, info.end)
        if info.start % info.dtype.itemsize:
            flat = flat.clone()
        return flat.view(info.dtype).view(info.shape)

    def read(
        self,
        name: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        rows: range | None = None,
    ) -> torch.Tensor:
        """A copy of the tensor on `device`, as `dtype` (None: as stored), owning its memory.

        rows: a stretch of the first dimension; of the file's bytes only its own are read.
        """
        info = self._info(name)
        shape, start = info.shape, info.start
        if rows is not None:
            start += rows.start * math.prod(shape[1:]) * info.dtype.itemsize
            shape = (len(rows), *shape[1:])
        return self.bytes.read(start, shape, info.dtype, device=device, dtype=dtype)

    def close(self) -> None:
        """Unmap the file; views that are still held keep it mapped until they go."""
        self.bytes.close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"no tensor {name!r}", path=self.path, tensor=name)
        return self.tensors[name]


class Weights:
    """The tensors of one model: of one file, or of several that share them out.

    Every name belongs to one file. Use it as a context manager, or close it.
    """

    def __init__(self, files: Sequence[SafetensorsFile]):
        self.files = tuple(files)
        self._file_of: dict[str, SafetensorsFile] = {}
        for file in self.files:
            for name in file.tensors:
                other = self._file_of.setdefault(name, file)
                if other is not file:
                    raise CheckpointError(
                        f"tensor {name!r} is also in {other.path.name}", path=file.path, tensor=name
                    )

    @classmethod
    def open(cls, path: str | Path) -> Weights:
        """Open a `.safetensors` file, or the shards that a `.safetensors.index.json` lists."""
        path = Path(path)
        if path.suffix != ".json":
            return cls([SafetensorsFile(path)])
        weight_map = _read_index(path)
        files: list[SafetensorsFile] = []
        try:
            for shard in sorted(set(weight_map.values())):
                if not (path.parent / shard).exists():
                    raise CheckpointError(
                        f"missing shard, which {path.name} lists", path=path.parent / shard
                    )
                files.append(SafetensorsFile(path.parent / shard))
            weights = cls(files)
            for name, shard in weight_map.items():
                if name not in weights._file_of or weights.path_of(name).name != shard:
                    raise CheckpointError(
                        f"{path.name} lists tensor {name!r} here, and it is not",
                        path=path.parent / shard,
                        tensor=name,
                    )
        except CheckpointError:
            for file in files:
                file.close()
            raise
        return weights

    def __iter__(self) -> Iterator[str]:
        """Names in the order of the files, so that reading them in turn is reading straight on."""
        for file in self.files:
            yield from sorted(file.tensors, key=lambda name: file.tensors[name].start)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __len__(self) -> int:
        return len(self._file_of)

    @property
    def path(self) -> Path:
        """The file, or the folder of the shards."""
        return self.files[0].path if len(self.files) == 1 else self.files[0].path.parent

    def info(self, name: str) -> TensorInfo:
        return self._file(name).tensors[name]

    def path_of(self, name: str) -> Path:
        """The file that holds the tensor."""
        return self._file(name).path

    def view(self, name: str) -> torch.Tensor:
        """See `SafetensorsFile.view`."""
        return self._file(name).view(name)

    def read(
        self,
        name: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        rows: range | None = None,
    ) -> torch.Tensor:
        """See `SafetensorsFile.read`."""
        return self._file(name).read(name, device=device, dtype=dtype, rows=rows)

    def kept_format(self, name: str) -> str | None:
        """See `WeightSource`: fp8 without a scale stands for itself."""
        info = self.info(name)
        return FP8.get(info.dtype) if len(info.shape) == 2 else None

    def read_kept(self, name: str, *, device: torch.device | str = "cpu") -> Kept:
        """See `WeightSource`."""
        return Kept(kept_format_of(self, name), self.read(name, device=device))

    def close(self) -> None:
        for file in self.files:
            file.close()

    def __enter__(self) -> Weights:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._file_of:
            raise CheckpointError(f"no tensor {name!r}", path=self.path, tensor=name)
        return self._file_of[name]


def sampled_hash(paths: Sequence[str | Path]) -> str:
    """A hash of weights that reads no more than half a megabyte of each file (16 hex digits).

    Of each file, or each shard that an index lists: its size, its first bytes and 64 blocks spread
    evenly over it. Files of other weights differ in it; it is no proof against forgery.
    """
    digest = hashlib.sha256()
    for path in paths:
        path = Path(path)
        shards = sorted(set(_read_index(path).values())) if path.suffix == ".json" else [path.name]
        for name in (path.parent / shard for shard in shards):
            size = name.stat().st_size
            digest.update(f"{size}:".encode())
            with name.open("rb") as file:
                digest.update(file.read(1 << 18))
                for i in range(64):
                    file.seek(size * i // 64)
                    digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def find_weights(folder: Path, stem: str) -> Path:
    """The weights of a component's folder: `stem.safetensors.index.json`, `stem.safetensors`, or
    a half-precision variant of either, bf16 before fp16. Raises `CheckpointError` if none is there.

    diffusers' models have the stem `diffusion_pytorch_model`, transformers' have `model`.
    """
    candidates = [f"{stem}.safetensors.index.json", f"{stem}.safetensors"]
    for variant in VARIANTS:
        candidates += [
            f"{stem}.safetensors.index.{variant}.json",
            f"{stem}.{variant}.safetensors",
        ]
    for name in candidates:
        if (folder / name).exists():
            return folder / name
    if not folder.is_dir():
        raise CheckpointError("no such folder", path=folder)
    for path in sorted(folder.iterdir()):
        refuse_pickle(path)
    raise CheckpointError(
        f"no weights; looked for {candidates[1]} and {candidates[0]}", path=folder
    )


def _read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of an index: tensor name -> name of a file beside the index."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("no 'weight_map' from tensor names to files", path=path)
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"weight_map has {shard!r} for {name!r}", path=path, tensor=name)
        # A plain name, so that an index cannot reach out of its folder. What the name links to is
        # not looked at: hub caches are made of links.
        if not shard or shard in (".", "..") or re.search(r"[/\\:\0]", shard):
            raise CheckpointError(
                f"weight_map leaves the folder: {shard!r} for {name!r}; shards lie beside it",
                path=path,
                tensor=name,
            )
        refuse_pickle(path.parent / shard)
        if not shard.endswith(".safetensors"):
            raise CheckpointError(f"{shard!r} is not a .safetensors file", path=path, tensor=name)
    return weight_map


def _read_header(
    read: Callable[[int], bytes], size: int, path: Path
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read and check the header with `read(n) -> bytes`; returns the tensors and the metadata."""
    prefix = read(8)
    if len(prefix) < 8:
        empty = f"; it is {kind_of(path)}" if size == 0 else ""
        raise CheckpointError(f"truncated: {size} bytes, too few for a header{empty}", path=path)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        if prefix == b"version ":
            raise CheckpointError("a Git LFS pointer, not the weights: `git lfs pull`", path=path)
        if prefix[:4] in (b"PK\x03\x04", b"\x80\x02\x8a\n"):
            raise CheckpointError(
                "a pickle under another name; convert the weights to .safetensors", path=path
            )
        what = kind_of(path)
        if what not in (None, SAFETENSORS):
            raise CheckpointError(f"not a safetensors file: it is {what}", path=path)
        raise CheckpointError(
            f"not a safetensors file: a header of {length} bytes, {MAX_HEADER_BYTES} is the most",
            path=path,
        )
    if 8 + length > size:
        what = kind_of(path)
        if what not in (None, SAFETENSORS):
            raise CheckpointError(f"not a safetensors file: it is {what}", path=path)
        raise CheckpointError(
            f"truncated: a header of {length} bytes in a file of {size} bytes", path=path
        )
    header = parse_json_object(read(length), path, "the header")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError("__metadata__ must map strings to strings", path=path)

    base = 8 + length
    tensors = {name: _tensor_info(name, entry, base, path) for name, entry in header.items()}
    expected, previous = base, ""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start < expected:
            raise CheckpointError(
                f"the bytes of {name!r} overlap those of {previous!r}", path=path, tensor=name
            )
        if info.start > expected:
            raise CheckpointError(
                f"{info.start - expected} bytes before {name!r} belong to no tensor",
                path=path,
                tensor=name,
            )
        if info.end > size:
            raise CheckpointError(
                f"truncated: {name!r} ends at byte {info.end} of a file of {size} bytes",
                path=path,
                tensor=name,
            )
        expected, previous = info.end, name
    if size > expected:
        raise CheckpointError(f"{size - expected} bytes after the last tensor", path=path)
    return tensors, metadata


def _tensor_info(name: str, entry: object, base: int, path: Path) -> TensorInfo:
    """One entry of the header, checked on its own."""

    def fail(message: str) -> CheckpointError:
        return CheckpointError(f"tensor {name!r}: {message}", path=path, tensor=name)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fail("the header must give dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise fail(f"unsupported dtype {entry['dtype']!r}; supported are {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or len(shape) > 16:
        raise fail(f"shape {shape!r} is not a list of sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fail(f"data_offsets {offsets!r} is not a range of bytes")
    start, end = offsets
    count = math.prod(shape)
    if count * dtype.itemsize != end - start:
        raise fail(
            f"shape {shape} of {entry['dtype']} is {count * dtype.itemsize} bytes, "
            f"the header gives {end - start}"
        )
    return TensorInfo(dtype, tuple(shape), base + start, base + end)


def _naturals(values: object) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values
    )
