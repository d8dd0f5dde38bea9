"""How quantised weights of safetensors files become float32 values, rows at a time.

fp8 and int8 with scales as ComfyUI, WanVideoWrapper, LightX2V and musubi-tuner write them; MXFP8
(OCP Microscaling Formats 1.0) and NVFP4, whose scales lie in cuBLAS's tiles of 128 x 4
(docs.nvidia.com/cuda/cublas, "1D Block Scaling Factors Layout"). Products are taken in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from sora_engine.errors import CheckpointError
from sora_engine.io.mapped_file import at_once
from sora_engine.io.safetensors import Weights
from sora_engine.io.weights.source import Decode

MXFP8_BLOCK = 32
NVFP4_BLOCK = 16
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_H4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


class Coding(Protocol):
    """How one weight is stored. shape: of its values."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def format(self) -> str:
        """For people."""
        ...

    def decoder(self, weights: Weights, device: torch.device | str) -> Decode:
        """Reads the scales once; what comes back decodes rows on `device`."""
        ...


@dataclass(frozen=True, slots=True)
class Scaled:
    """fp8 or int8 values times a scale: of the tensor, of each row, or of each block of a row.

    blocks: how many a row has; 1 where scales are of whole rows, 0 where there is but one.
    rotation: size of the groups of inputs that a Hadamard matrix has mixed (ConvRot); 0 for none.
    """

    shape: tuple[int, ...]
    format: str
    weight: str
    scale: str
    blocks: int = 0
    rotation: int = 0

    def read_scale(self, weights: Weights, device: torch.device | str) -> Tensor:
        """Float32, in the file's shape. Raises CheckpointError for one that no weight can have."""
        with at_once():
            scale = weights.read(self.scale, dtype=torch.float32)
        if not bool(torch.isfinite(scale).all()):
            raise CheckpointError(
                f"tensor {self.scale!r} has a scale that is NaN or infinite: the file is damaged",
                path=weights.path_of(self.scale),
                tensor=self.scale,
            )
        return scale.to(device)

    def decoder(self, weights: Weights, device: torch.device | str) -> Decode:
        scale = self.read_scale(weights, device)
        scale = scale.reshape((self.shape[0], -1, 1) if self.blocks else ())

        def decode(rows: range) -> Tensor:
            values = weights.read(self.weight, device=device, rows=rows).float()
            if self.blocks:
                own = scale[rows.start : rows.stop]
                values = values.view(len(rows), self.blocks, -1).mul_(own)
            else:
                values.mul_(scale)
            if self.rotation:
                groups = values.view(len(rows), -1, self.rotation)
                values = groups @ hadamard(self.rotation).to(values.device)
            return values.view(len(rows), *self.shape[1:])

        return decode


@dataclass(frozen=True, slots=True)
class MXFP8:
    """e4m3 values, and for each 32 of a row a power of two (e8m0)."""

    shape: tuple[int, ...]
    weight: str
    scale: str
    format: str = "mxfp8"

    def decoder(self, weights: Weights, device: torch.device | str) -> Decode:
        stored = weights.read(self.scale, device=device).view(torch.uint8)
        exponents = untile(stored, self.shape[0], self.shape[1] // MXFP8_BLOCK)

        def decode(rows: range) -> Tensor:
            values = weights.read(self.weight, device=device, rows=rows).float()
            own = exponents[rows.start : rows.stop].contiguous().view(torch.float8_e8m0fnu).float()
            blocks = values.view(len(rows), -1, MXFP8_BLOCK).mul_(own[..., None])
            return blocks.view(len(rows), -1)

        return decode


@dataclass(frozen=True, slots=True)
class NVFP4:
    """e2m1 values, two a byte and the first in its high half; for each 16 of a row an e4m3 scale,
    and one scale of the tensor."""

    shape: tuple[int, ...]
    weight: str
    scale: str
    scale_2: str
    format: str = "nvfp4"

    def decoder(self, weights: Weights, device: torch.device | str) -> Decode:
        stored = weights.read(self.scale, device=device).view(torch.uint8)
        scales = untile(stored, self.shape[0], self.shape[1] // NVFP4_BLOCK)
        whole = weights.read(self.scale_2, device=device, dtype=torch.float32).reshape(())
        table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=device)

        def decode(rows: range) -> Tensor:
            packed = weights.read(self.weight, device=device, rows=rows)
            codes = torch.stack((packed >> 4, packed & 15), dim=-1)
            values = table[codes.int()].view(len(rows), -1, NVFP4_BLOCK)
            own = scales[rows.start : rows.stop].contiguous().view(torch.float8_e4m3fn).float()
            return values.mul_((own * whole)[..., None]).view(len(rows), -1)

        return decode


def untile(stored: Tensor, rows: int, columns: int) -> Tensor:
    """`[rows, columns]` out of cuBLAS's tiles: of each 128 rows and 4 columns, 32 x 4 x 4 values by
    row modulo 32, row divided by 32, column."""
    tiles = stored.reshape(math.ceil(rows / 128), math.ceil(columns / 4), 32, 4, 4)
    plain = tiles.permute(0, 3, 2, 1, 4).reshape(tiles.shape[0] * 128, -1)
    return plain[:rows, :columns]


@lru_cache(maxsize=8)
def hadamard(size: int) -> Tensor:
    """ConvRot's regular Hadamard matrix of a power of 4; symmetric, and its own inverse."""
    h4 = torch.tensor(_H4, dtype=torch.float32)
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, h4)
    return matrix / math.sqrt(size)
