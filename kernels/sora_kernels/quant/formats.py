"""How quantised weights lie in memory, and what values they stand for.

int8 and fp8 are one value a byte, times a scale. The blocks of GGUF files are ggml's
(github.com/ggml-org/ggml, `ggml-common.h`, `ggml-quants.c`): 32 or 256 neighbours of a row with
their scales in so many bytes. Every one of them is

    value[j] = d * scale[j] * (code[j] - offset) - dmin * minimum[j]      or      ... + m

where codes, scales and minima are put together from parts of bytes. The tables here say which.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

INT8, E4M3, E5M2 = "int8", "float8_e4m3fn", "float8_e5m2"

PLAIN: dict[str, torch.dtype] = {
    INT8: torch.int8,
    E4M3: torch.float8_e4m3fn,
    E5M2: torch.float8_e5m2,
}
"""Formats of a value a byte, and the dtype of their weights."""


class Bits(NamedTuple):
    """A part of codes: of value j the byte `at[j]`, shifted right, masked, times `times`."""

    at: list[int]
    shift: list[int]
    mask: int
    times: int = 1


class Block(NamedTuple):
    """A block format of ggml. Bytes are counted from the block's first.

    codes, scales, minima: parts to add up, for each value. d, dmin, m: the byte of a float16, -1
    where there is none. signed: the code is an int8. scale_offset: taken off scales; signed_scales:
    these are int8.
    """

    values: int
    size_bytes: int
    codes: tuple[Bits, ...]
    d: int = 0
    offset: int = 0
    signed: bool = False
    m: int = -1
    dmin: int = -1
    scales: tuple[Bits, ...] = ()
    minima: tuple[Bits, ...] = ()
    scale_offset: int = 0
    signed_scales: bool = False


def _halves(first: int, times: int = 1) -> Bits:
    """32 codes in 16 bytes: low nibbles, then high ones."""
    return Bits([first + j % 16 for j in range(32)], [j // 16 * 4 for j in range(32)], 15, times)


def _fifth(first: int) -> Bits:
    """A bit of each of 32 codes, as their fifth."""
    return Bits([first + j // 8 for j in range(32)], [j % 8 for j in range(32)], 1, 16)


_ALL = range(256)


def _nibbles(first: int) -> Bits:
    """256 codes in 128 bytes: of each 32 bytes the low nibbles, then the high ones."""
    at = [first + j // 64 * 32 + j % 32 for j in _ALL]
    return Bits(at, [j // 32 % 2 * 4 for j in _ALL], 15)


def _pairs(first: int, times: int = 1) -> Bits:
    """256 pairs of bits in 64 bytes: of each 32 bytes four times 32 of them."""
    at = [first + j // 128 * 32 + j % 32 for j in _ALL]
    return Bits(at, [j // 32 % 4 * 2 for j in _ALL], 3, times)


def _planes(first: int, times: int) -> Bits:
    """A bit of each of 256 codes in 32 bytes: bit by bit of them."""
    return Bits([first + j % 32 for j in _ALL], [j // 32 for j in _ALL], 1, times)


def _six_bits(first: int) -> tuple[tuple[Bits, ...], tuple[Bits, ...]]:
    """Scales and minima of eight times 32 values, six bits each, in 12 bytes (Q4_K, Q5_K).

    The first four have theirs whole; of the others, four bits lie together, and the upper two
    above the first four's.
    """
    sub = [j // 32 for j in _ALL]

    def low(byte: int, shift: int) -> Bits:
        at = [first + (byte + s if s < 4 else 4 + s) for s in sub]
        return Bits(at, [0 if s < 4 else shift for s in sub], 15)

    def high(byte: int) -> Bits:
        at = [first + (byte + s if s < 4 else byte + s - 4) for s in sub]
        return Bits(at, [4 if s < 4 else 6 for s in sub], 3, 16)

    return (low(0, 0), high(0)), (low(4, 4), high(4))


_SCALES, _MINIMA = _six_bits(4)
_SIXTEENTHS = [j // 16 for j in _ALL]

BLOCKS: dict[str, Block] = {
    "Q4_0": Block(32, 18, (_halves(2),), offset=8),
    "Q4_1": Block(32, 20, (_halves(4),), m=2),
    "Q5_0": Block(32, 22, (_halves(6), _fifth(2)), offset=16),
    "Q5_1": Block(32, 24, (_halves(8), _fifth(4)), m=2),
    "Q8_0": Block(32, 34, (Bits(list(range(2, 34)), [0] * 32, 255),), signed=True),
    "Q2_K": Block(
        256,
        84,
        (_pairs(16),),
        d=80,
        dmin=82,
        scales=(Bits(_SIXTEENTHS, [0] * 256, 15),),
        minima=(Bits(_SIXTEENTHS, [4] * 256, 15),),
    ),
    "Q3_K": Block(
        256,
        110,
        (_pairs(32), _planes(0, 4)),
        d=108,
        offset=4,
        scales=(
            Bits([96 + k % 8 for k in _SIXTEENTHS], [k // 8 * 4 for k in _SIXTEENTHS], 15),
            Bits([104 + k % 4 for k in _SIXTEENTHS], [k // 4 * 2 for k in _SIXTEENTHS], 3, 16),
        ),
        scale_offset=32,
    ),
    "Q4_K": Block(256, 144, (_nibbles(16),), dmin=2, scales=_SCALES, minima=_MINIMA),
    "Q5_K": Block(
        256, 176, (_nibbles(48), _planes(16, 16)), dmin=2, scales=_SCALES, minima=_MINIMA
    ),
    "Q6_K": Block(
        256,
        210,
        (
            Bits(
                [j // 128 * 64 + j % 64 for j in _ALL], [j % 128 // 64 * 4 for j in _ALL], 15
            ),
            _pairs(128, 16),
        ),
        d=208,
        offset=32,
        scales=(Bits([192 + k for k in _SIXTEENTHS], [0] * 256, 255),),
        signed_scales=True,
    ),
}  # fmt: skip
"""By ggml's names."""

FORMATS: tuple[str, ...] = (*PLAIN, *BLOCKS)
"""All of them; the place of each is its number to the native kernels."""


def width_of(format: str, stored_width: int) -> int:
    """Values of a row that takes so many bytes."""
    if format in PLAIN:
        return stored_width
    block = BLOCKS[format]
    return stored_width // block.size_bytes * block.values


def dequantise(
    weight: Tensor, scale: Tensor | None, format: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values of a weight, `[rows, width]`, in float32 or float64.

    weight: `[rows, bytes]`: int8, fp8, or uint8 of blocks. scale: of int8 and fp8: `[1, 1]`,
    `[rows, 1]`, or `[rows, n]` for n stretches of each row; None is 1.
    """
    if format in BLOCKS:
        block = BLOCKS[format]
        raw = weight.reshape(-1, block.size_bytes)
        return _decode(block, raw, dtype).view(weight.shape[0], -1)
    values = weight.to(torch.float32).to(dtype)
    if scale is None:
        return values
    rows, width = values.shape
    stretches = values.view(rows, scale.shape[1], width // scale.shape[1])
    return (stretches * scale.to(dtype)[..., None]).view(rows, width)


def _decode(block: Block, raw: Tensor, dtype: torch.dtype) -> Tensor:
    def half(first: int) -> Tensor:
        return raw[:, first : first + 2].contiguous().view(torch.float16).to(dtype)

    def total(parts: tuple[Bits, ...], signed: bool = False) -> Tensor:
        found = torch.zeros((), dtype=torch.int32, device=raw.device)
        for bits in parts:
            at = torch.tensor(bits.at, device=raw.device)
            shift = torch.tensor(bits.shift, dtype=torch.uint8, device=raw.device)
            found = found + (((raw[:, at] >> shift) & bits.mask).int() * bits.times)
        return torch.where(found > 127, found - 256, found) if signed else found

    factor = half(block.d)
    if block.scales:
        scales = total(block.scales, block.signed_scales) - block.scale_offset
        factor = factor * scales.to(dtype)
    values = factor * (total(block.codes, block.signed) - block.offset).to(dtype)
    if block.dmin >= 0:
        values = values - half(block.dmin) * total(block.minima).to(dtype)
    return values + half(block.m) if block.m >= 0 else values
