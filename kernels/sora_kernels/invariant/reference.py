"""The linear layer in plain PyTorch, in products of one shape. Differentiable.

A library picks its kernel, and with it the order of a row's sums, by the number of rows. So rows go
through in tiles of one size, the last one filled up.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels.dispatch import Case
from sora_kernels.invariant.operands import Operands

TILE = 64


def unsupported(case: Case) -> str | None:
    return None


def run(call: Operands) -> Tensor:
    x, wide = call.x, torch.promote_types(call.x.dtype, torch.float32)
    rows = x.shape[0]
    weight = call.weight.to(wide)
    bias = None if call.bias is None else call.bias.to(wide)
    tiles = F.pad(x.to(wide), (0, 0, 0, -rows % TILE)).split(TILE)
    done = [F.linear(tile, weight, bias) for tile in tiles if len(tile)]
    if call.gelu:  # of whole tiles too: a vector's worth of values goes another way than the rest
        done = [F.gelu(tile, approximate=call.gelu) for tile in done]
    return torch.cat(done)[:rows].to(x.dtype) if done else call.out()
