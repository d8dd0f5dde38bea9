"""The block formats of GGUF files: bytes to float32 values.

Layouts are those of ggml (github.com/ggml-org/ggml, `ggml-common.h` and `ggml-quants.c`). A block
holds 32 or 256 neighbours of a row; `d` is its float16 scale and `m` or `dmin` that of its minima.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """One type of ggml: so many values in so many bytes.

    decode: `[blocks, size_bytes]` (uint8) to `[blocks, values]` (float32).
    """

    name: str
    values: int
    size_bytes: int
    decode: Callable[[Tensor], Tensor]


def _half(raw: Tensor, first: int) -> Tensor:
    """The float16 at a byte of each block, `[blocks, 1]` in float32."""
    return raw[:, first : first + 2].contiguous().view(torch.float16).float()


def _shifted(raw: Tensor, shifts: list[int], mask: int) -> Tensor:
    """Parts of bytes: `[blocks, n]` to `[blocks, len(shifts), n]`."""
    by = torch.tensor(shifts, dtype=torch.uint8, device=raw.device)
    return (raw[:, None, :] >> by[None, :, None]) & mask


def _nibbles(raw: Tensor) -> Tensor:
    """Of each byte the low half, all of them first, then the high halves."""
    return _shifted(raw, [0, 4], 15).flatten(1)


def _fifth_bits(raw: Tensor) -> Tensor:
    """32 bits of 4 bytes, times 16."""
    by = torch.arange(8, dtype=torch.uint8, device=raw.device)
    return (((raw[:, :, None] >> by) & 1) << 4).flatten(1)


def _plain(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda raw: raw.contiguous().view(dtype).float()


def _q4_0(raw: Tensor) -> Tensor:
    return _half(raw, 0) * (_nibbles(raw[:, 2:]).float() - 8)


def _q4_1(raw: Tensor) -> Tensor:
    return _half(raw, 0) * _nibbles(raw[:, 4:]).float() + _half(raw, 2)


def _q5_0(raw: Tensor) -> Tensor:
    codes = _nibbles(raw[:, 6:]) | _fifth_bits(raw[:, 2:6])
    return _half(raw, 0) * (codes.float() - 16)


def _q5_1(raw: Tensor) -> Tensor:
    codes = _nibbles(raw[:, 8:]) | _fifth_bits(raw[:, 4:8])
    return _half(raw, 0) * codes.float() + _half(raw, 2)


def _q8_0(raw: Tensor) -> Tensor:
    return _half(raw, 0) * raw[:, 2:].contiguous().view(torch.int8).float()


def _q2_k(raw: Tensor) -> Tensor:
    scales, d, dmin = raw[:, :16], _half(raw, 80), _half(raw, 82)
    # Two halves of 128 values, each of 32 bytes whose four pairs of bits follow one another.
    codes = _shifted(raw[:, 16:80].reshape(-1, 32), [0, 2, 4, 6], 3).view(len(raw), 16, 16)
    factor, least = d * (scales & 15).float(), dmin * (scales >> 4).float()
    return (factor[..., None] * codes.float() - least[..., None]).flatten(1)


def _q3_k(raw: Tensor) -> Tensor:
    low, high, d = raw[:, 96:104], raw[:, 104:108], _half(raw, 108)
    scales = _nibbles(low) | (_shifted(high, [0, 2, 4, 6], 3).flatten(1) << 4)
    factor = d * (scales.float() - 32)
    codes = _shifted(raw[:, 32:96].reshape(-1, 32), [0, 2, 4, 6], 3).view(len(raw), 256)
    # A bit that is not set takes 4 off.
    mask = _shifted(raw[:, :32], list(range(8)), 1).flatten(1)
    values = codes.float() - 4 + 4 * mask.float()
    return (factor[..., None] * values.view(len(raw), 16, 16)).flatten(1)


def _six_bit_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of eight sub-blocks, `[blocks, 8]`, out of 12 bytes."""
    first, second, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((first & 63, (rest & 15) | ((first >> 2) & 48)), dim=1)
    minima = torch.cat((second & 63, (rest >> 4) | ((second >> 2) & 48)), dim=1)
    return scales.float(), minima.float()


def _with_minima(raw: Tensor, codes: Tensor) -> Tensor:
    """Of Q4_K and Q5_K: codes `[blocks, 256]` in sub-blocks of 32."""
    scales, minima = _six_bit_scales(raw[:, 4:16])
    factor, least = _half(raw, 0) * scales, _half(raw, 2) * minima
    values = codes.float().view(len(raw), 8, 32)
    return (factor[..., None] * values - least[..., None]).flatten(1)


def _q4_k(raw: Tensor) -> Tensor:
    codes = _shifted(raw[:, 16:].reshape(-1, 32), [0, 4], 15)
    return _with_minima(raw, codes.view(len(raw), 256))


def _q5_k(raw: Tensor) -> Tensor:
    low = _shifted(raw[:, 48:].reshape(-1, 32), [0, 4], 15).view(len(raw), 256)
    high = _shifted(raw[:, 16:48], list(range(8)), 1).flatten(1)
    return _with_minima(raw, low | (high << 4))


def _q6_k(raw: Tensor) -> Tensor:
    low = _shifted(raw[:, :128].reshape(-1, 64), [0, 4], 15).view(len(raw), 256)
    high = _shifted(raw[:, 128:192].reshape(-1, 32), [0, 2, 4, 6], 3).view(len(raw), 256)
    scales = raw[:, 192:208].contiguous().view(torch.int8).float()
    factor = _half(raw, 208) * scales
    values = ((low | (high << 4)).float() - 32).view(len(raw), 16, 16)
    return (factor[..., None] * values).flatten(1)


FORMATS: dict[int, BlockFormat] = {
    0: BlockFormat("F32", 1, 4, _plain(torch.float32)),
    1: BlockFormat("F16", 1, 2, _plain(torch.float16)),
    2: BlockFormat("Q4_0", 32, 18, _q4_0),
    3: BlockFormat("Q4_1", 32, 20, _q4_1),
    6: BlockFormat("Q5_0", 32, 22, _q5_0),
    7: BlockFormat("Q5_1", 32, 24, _q5_1),
    8: BlockFormat("Q8_0", 32, 34, _q8_0),
    10: BlockFormat("Q2_K", 256, 84, _q2_k),
    11: BlockFormat("Q3_K", 256, 110, _q3_k),
    12: BlockFormat("Q4_K", 256, 144, _q4_k),
    13: BlockFormat("Q5_K", 256, 176, _q5_k),
    14: BlockFormat("Q6_K", 256, 210, _q6_k),
    30: BlockFormat("BF16", 1, 2, _plain(torch.bfloat16)),
}
"""By ggml's number of the type those that are read."""

OTHERS = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16",
    26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
    40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
"""By number the types that are refused by name."""
