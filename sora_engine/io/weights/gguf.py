"""A memory-mapped reader of GGUF files that checks everything before it trusts anything.

The format (github.com/ggml-org/ggml, `docs/gguf.md`), versions 2 and 3, little-endian: magic,
counts, metadata, one entry a tensor, then their bytes at aligned offsets. Shapes stand with the
fastest dimension first, and are turned round here.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from sora_engine.errors import CheckpointError
from sora_engine.io.links import refuse_stray_link
from sora_engine.io.mapped_file import MappedFile
from sora_engine.io.weights.gguf_blocks import FORMATS, OTHERS, BlockFormat
from sora_engine.io.weights.source import Kept, kept_format_of, read_by_pieces

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 8  # ggml itself has 4; converted video models keep a convolution's 5
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""Before a tensor's name: its shape, where ggml could not hold it (ComfyUI-GGUF)."""
WORKS = "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K and Q6_K are read"

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of a value each, in which tensors are given as they are."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """What the header says of one tensor; `start` is its offset in the file."""

    format: BlockFormat
    shape: tuple[int, ...]
    start: int

    @property
    def dtype(self) -> torch.dtype:
        """Of its values: blocks are decoded in float32."""
        return PLAIN.get(self.format.name, torch.float32)

    @property
    def is_plain(self) -> bool:
        return self.format.name in PLAIN

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) // self.format.values * self.format.size_bytes


class GGUFWeights:
    """A `WeightSource` over one GGUF file.

    metadata: its values, arrays as lists; text as str. Raises CheckpointError for a file that is
    damaged, or has tensors of a type that is not read, which it names.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        refuse_stray_link(self._path)
        try:
            self.bytes = MappedFile(self._path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"cannot be read ({reason})", path=self._path) from None
        try:
            self.metadata, self.tensors = _Header(self.bytes.data, self._path).read()
        except BaseException:
            self.bytes.close()
            raise

    @property
    def path(self) -> Path:
        return self._path

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.tensors, key=lambda name: self.tensors[name].start))

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __len__(self) -> int:
        return len(self.tensors)

    def info(self, name: str) -> GGUFTensor:
        if name not in self.tensors:
            raise CheckpointError(f"no tensor {name!r}", path=self.path, tensor=name)
        return self.tensors[name]

    def path_of(self, name: str) -> Path:
        """The file itself."""
        self.info(name)
        return self.path

    def read(
        self,
        name: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        rows: range | None = None,
    ) -> Tensor:
        """See `WeightSource.read`."""
        info = self.info(name)
        width = math.prod(info.shape[1:])
        each = info.format
        if not info.shape or width % each.values:  # rows that end within a block: all or nothing
            whole = self._decoded(info, 0, math.prod(info.shape)).view(info.shape)
            part = whole if rows is None else whole[rows.start : rows.stop]
            return part.to(device, dtype or info.dtype, copy=True)

        stored = PLAIN.get(each.name)
        if stored is not None:
            wanted = range(info.shape[0]) if rows is None else rows
            start = info.start + wanted.start * width * each.size_bytes
            shape = (len(wanted), *info.shape[1:])
            return self.bytes.read(start, shape, stored, device=device, dtype=dtype)

        def decode(part: range) -> Tensor:
            values = self._decoded(info, part.start * width, part.stop * width, device)
            return values.view(len(part), *info.shape[1:])

        return read_by_pieces(
            info.shape, lambda: decode, device=device, dtype=dtype or info.dtype, rows=rows
        )

    def kept_format(self, name: str) -> str | None:
        """See `WeightSource`: matrices of blocks that no row ends within."""
        info = self.info(name)
        each = info.format
        whole = len(info.shape) == 2 and 0 not in info.shape and info.shape[1] % each.values == 0
        return each.name if whole and each.values > 1 else None

    def read_kept(self, name: str, *, device: torch.device | str = "cpu") -> Kept:
        """See `WeightSource`."""
        info, form = self.info(name), kept_format_of(self, name)
        row_bytes = info.size_bytes // info.shape[0]
        shape = (info.shape[0], row_bytes)
        return Kept(form, self.bytes.read(info.start, shape, torch.uint8, device=device))

    def close(self) -> None:
        """Unmap the file."""
        self.bytes.close()

    def __enter__(self) -> GGUFWeights:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _decoded(
        self, info: GGUFTensor, first: int, last: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The values from `first` to `last`, which are ends of blocks."""
        each = info.format
        start, end = (info.start + n // each.values * each.size_bytes for n in (first, last))
        if start == end:
            return torch.empty(0, device=device)
        raw = self.bytes.view(start, end)
        raw = raw.view(-1, each.size_bytes).to(device, copy=True)
        self.bytes.release(start, end)
        return each.decode(raw)


def is_gguf(path: Path) -> bool:
    """Whether the file begins as one, whatever its name; False where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


class _Header:
    """Reads from the start of a file, and never past its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def fail(self, message: str, tensor: str | None = None) -> CheckpointError:
        return CheckpointError(message, path=self.path, tensor=tensor)

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise self.fail(
                f"truncated: the header goes on for {size} bytes at byte {self.at} of a file of "
                f"{len(self.data)} bytes"
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def numbers(self, codes: str) -> tuple[Any, ...]:
        return struct.unpack("<" + codes, self.take(struct.calcsize("<" + codes)))

    def number(self, code: str) -> Any:
        return self.numbers(code)[0]

    def text(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"a name in the header is no text: {raw[:40]!r}") from None

    def value(self, kind: int, nested: bool = False) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or nested:
            raise self.fail(f"metadata of the unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            code = _SCALARS[kind]
            return list(self.numbers(f"{count}{code}"))
        if count > len(self.data):
            raise self.fail(f"truncated: an array of {count} texts")
        return [self.value(kind, nested=True) for _ in range(count)]

    def read(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        if self.take(4) != MAGIC:
            raise self.fail("not a GGUF file")
        version = self.number("I")
        if version not in VERSIONS:
            big = " (of a big-endian machine)" if version & 0xFFFF == 0 else ""
            raise self.fail(f"GGUF version {version}{big}; {VERSIONS} are read")
        num_tensors, num_values = self.number("Q"), self.number("Q")
        if max(num_tensors, num_values) > len(self.data):
            raise self.fail(f"truncated: a header of {num_tensors} tensors, {num_values} values")
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self.text()
            if key in metadata:
                raise self.fail(f"metadata has the key {key!r} twice")
            metadata[key] = self.value(self.number("I"))
        entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(num_tensors):
            name = self.text()
            if name in entries:
                raise self.fail(f"tensor {name!r} stands in the header twice", name)
            dims = self.number("I")
            if dims > MAX_DIMS:
                raise self.fail(
                    f"tensor {name!r} has {dims} dimensions, not {MAX_DIMS} at most", name
                )
            *shape, kind, offset = self.numbers(f"{dims}QIQ")
            entries[name] = (tuple(reversed(shape)), kind, offset)
        return metadata, self.placed(entries, metadata)

    def placed(
        self, entries: Mapping[str, tuple[tuple[int, ...], int, int]], metadata: Mapping[str, Any]
    ) -> dict[str, GGUFTensor]:
        """The tensors where their bytes are, checked."""
        align = metadata.get("general.alignment", 32)
        if not isinstance(align, int) or align <= 0 or align & (align - 1):
            raise self.fail(f"general.alignment is {align!r}; a power of two would work")
        base = math.ceil(self.at / align) * align
        tensors: dict[str, GGUFTensor] = {}
        end, previous = base, ""
        for name, (shape, kind, offset) in sorted(entries.items(), key=lambda item: item[1][2]):
            form = FORMATS.get(kind)
            if form is None:
                called = OTHERS.get(kind, f"number {kind}")
                raise self.fail(f"tensor {name!r} has the type {called}; {WORKS}", name)
            if offset % align:
                raise self.fail(f"tensor {name!r} at {offset} is not aligned to {align}", name)
            if shape and shape[-1] % form.values:
                raise self.fail(
                    f"tensor {name!r} of {form.name} is {shape[-1]} wide, no multiple of its "
                    f"blocks of {form.values}",
                    name,
                )
            tensor = GGUFTensor(form, self.original(name, shape, metadata), base + offset)
            if tensor.start < end and tensor.size_bytes:
                raise self.fail(f"the bytes of {name!r} overlap those of {previous!r}", name)
            end, previous = tensor.start + tensor.size_bytes, name
            if end > len(self.data):
                raise self.fail(
                    f"truncated: {name!r} ends at byte {end} of a file of {len(self.data)} bytes",
                    name,
                )
            tensors[name] = tensor
        return tensors

    def original(
        self, name: str, shape: tuple[int, ...], metadata: Mapping[str, Any]
    ) -> tuple[int, ...]:
        told = metadata.get(ORIGINAL_SHAPE + name)
        if told is None:
            return shape
        whole = isinstance(told, list) and all(isinstance(n, int) and n >= 0 for n in told)
        if not whole or math.prod(told) != math.prod(shape):
            raise self.fail(f"tensor {name!r} is {list(shape)} and was {told!r}", name)
        return tuple(told)
