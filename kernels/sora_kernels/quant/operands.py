"""What `quant_linear` hands to a backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sora_kernels import checks
from sora_kernels.quant.formats import BLOCKS, FORMATS, PLAIN, width_of

GELUS = ("", "none", "tanh")


@dataclass(frozen=True, slots=True)
class Operands:
    """One call. `scale` is `[rows, stretches]` or `[1, 1]`; `gelu` is empty where there is none,
    else torch's `approximate`."""

    x: Tensor
    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None
    format: str
    gelu: str = ""

    @property
    def outs(self) -> int:
        return self.weight.shape[0]

    @property
    def ins(self) -> int:
        return self.x.shape[1]

    def check(self, op: str) -> None:
        """Everything that metadata can tell."""
        x, weight = self.x, self.weight
        checks.check_packed_channels(op, "x", x)
        checks.check_float(op, "x", x)
        if self.format not in FORMATS:
            raise ValueError(f"{op}: format {self.format!r}; known are {', '.join(FORMATS)}")
        due = PLAIN.get(self.format, torch.uint8)
        if weight.dtype != due:
            raise ValueError(f"{op}: weight is {weight.dtype}; {self.format} is {due}")
        if weight.dim() != 2 or weight.shape[0] < 1 or not weight.is_contiguous():
            raise ValueError(
                f"{op}: weight has shape {checks.shape_of(weight)} and strides "
                f"{list(weight.stride())}; a dense [out, bytes] is due"
            )
        block = BLOCKS.get(self.format)
        if block is not None and (x.shape[1] % block.values or weight.shape[1] % block.size_bytes):
            raise ValueError(
                f"{op}: x is {x.shape[1]} wide and a row has {weight.shape[1]} bytes; {self.format}"
                f" has {block.values} values in {block.size_bytes} bytes"
            )
        if width_of(self.format, weight.shape[1]) != x.shape[1]:
            raise ValueError(
                f"{op}: weight {checks.shape_of(weight)} of {self.format} has rows of "
                f"{width_of(self.format, weight.shape[1])} values; {x.shape[1]} are due"
            )
        self._check_scale(op)
        checks.check_vector(op, "bias", self.bias, weight.shape[0])
        checks.check_device(op, x, weight=weight, scale=self.scale, bias=self.bias)
        if self.gelu not in GELUS:
            raise ValueError(f"{op}: gelu {self.gelu!r}; 'none', 'tanh' and None are known")

    def _check_scale(self, op: str) -> None:
        scale, rows = self.scale, self.weight.shape[0]
        if scale is None:
            return
        if self.format in BLOCKS:
            raise ValueError(f"{op}: {self.format} has its scales in its blocks; scale=None is due")
        if scale.dtype != torch.float32 or not scale.is_contiguous():
            raise ValueError(f"{op}: scale is {scale.dtype}; dense float32 is due")
        fits = scale.dim() == 2 and scale.shape[1] > 0 and self.x.shape[1] % scale.shape[1] == 0
        if not fits or (scale.shape[0] != rows and tuple(scale.shape) != (1, 1)):
            raise ValueError(
                f"{op}: scale has shape {checks.shape_of(scale)}; [1, 1], [{rows}, 1] or "
                f"[{rows}, stretches] with stretches that divide {self.x.shape[1]} is due"
            )

    def out(self) -> Tensor:
        """Room for the result."""
        return self.x.new_empty(self.x.shape[0], self.outs)
