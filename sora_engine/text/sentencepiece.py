"""SentencePiece models read without the library that writes them: their pieces and normaliser.

A `.model` file is one protocol buffer, ModelProto of SentencePiece's sentencepiece_model.proto
(https://github.com/google/sentencepiece), in the wire format of
https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sora_engine.errors import CheckpointError
from sora_engine.io.file_kind import kind_of

MAX_BYTES = 64 * 2**20  # UMT5's is 4.5 MB
UNIGRAM = 1
UNKNOWN = 2
"""A piece's type, of the one that stands for what is in no other."""


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """pieces: each with its log-probability, in the order of their ids. unk_id: of the unknown.
    charsmap: the compiled normaliser, where there is one."""

    pieces: list[tuple[str, float]]
    unk_id: int
    charsmap: bytes | None

    @classmethod
    def read(cls, path: Path) -> SentencePieceModel:
        """Raises CheckpointError for a file that is no unigram model."""
        try:
            if path.stat().st_size > MAX_BYTES:
                raise CheckpointError(f"more than {MAX_BYTES} bytes of pieces", path=path)
            return cls.parse(path.read_bytes(), path)
        except OSError as error:
            raise CheckpointError(f"cannot be read ({error.strerror})", path=path) from None

    @classmethod
    def parse(cls, data: bytes, path: Path) -> SentencePieceModel:
        """A model from its bytes; `path` is for errors. Raises CheckpointError for what is none."""
        try:
            return cls._parse(data, path)
        except (ValueError, IndexError, struct.error) as error:
            if isinstance(error, CheckpointError):
                raise
            what = kind_of(path)
            why = f": it is {what}" if what else ""
            raise CheckpointError(f"not a SentencePiece model{why}", path=path) from None

    @classmethod
    def _parse(cls, data: bytes, path: Path) -> SentencePieceModel:
        pieces: list[tuple[str, float]] = []
        unknown: list[int] = []
        kind, charsmap = UNIGRAM, b""
        for number, value in _fields(data):
            if number == 1:
                text, score, piece_kind = "", 0.0, 1
                for inner, part in _fields(_bytes(value)):
                    if inner == 1:
                        text = _bytes(part).decode("utf-8")
                    elif inner == 2:
                        (score,) = struct.unpack("<f", _bytes(part))
                    elif inner == 3:
                        piece_kind = int(part)
                if piece_kind == UNKNOWN:
                    unknown.append(len(pieces))
                pieces.append((text, score))
            elif number == 2:
                kind = next((int(part) for inner, part in _fields(_bytes(value)) if inner == 3), 1)
            elif number == 3:
                charsmap = next((_bytes(v) for n, v in _fields(_bytes(value)) if n == 2), b"")
        if len(unknown) != 1:
            raise ValueError("no piece for what is unknown")
        if kind != UNIGRAM:
            raise CheckpointError(
                "a SentencePiece model of another kind than unigram, which T5 is of", path=path
            )
        return cls(pieces, unknown[0], charsmap or None)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: their numbers, and integers or bytes. ValueError for rubbish."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            number, at = _varint(data, at)
            yield key >> 3, number
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("cut off")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number without an end")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where bytes belong")
    return value
