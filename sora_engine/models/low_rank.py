"""Changes of a weight as one product `up @ down`, exactly: what adapters beside weights need.

LoRA is one. Entry by entry, LoHa's two products of ranks p and q are one of rank p * q: its columns
are all products of a column of the one and a column of the other (Khatri-Rao). LoKr's Kronecker
product of two products is the product of the Kronecker products of their factors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sora_engine.io.weights.changes import Change

_CORES = ("mid", "hada_t1", "hada_t2", "lokr_t2")
"""Parts of Tucker's form, which convolutions have."""


def is_product(change: Change) -> bool:
    """Whether a change of a matrix is one product of low rank, or may be."""
    plain = not change.decorated and not any(part in change.tensors for part in _CORES)
    return plain and change.kind in ("lora", "loha", "lokr")


def as_product(change: Change, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Factors `down [rank, in]` and `up [out, rank]` whose product, times `change.scale`, is the
    change that `is_product`; float32, where the parts are."""
    if change.kind == "lora":
        return parts["down"].flatten(1), parts["up"].flatten(1)
    if change.kind == "loha":
        (a, b), (c, d) = ((parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"]) for n in (1, 2))
        up = (a[:, :, None] * c[:, None, :]).flatten(1)
        return (b[:, None, :] * d[None, :, :]).flatten(0, 1), up
    (a, b), (c, d) = (_factors(parts, n) for n in (1, 2))
    return torch.kron(b, d), torch.kron(a, c)


def pays(change: Change, down: Tensor, up: Tensor) -> bool:
    """Whether the product takes no more than the whole change would."""
    return down.numel() + up.numel() <= change.shape[0] * change.shape[1]


def _factors(parts: Mapping[str, Tensor], n: int) -> tuple[Tensor, Tensor]:
    """One of LoKr's factors as a product; a whole one with the identity on its shorter side."""
    if f"lokr_w{n}" not in parts:
        return parts[f"lokr_w{n}_a"], parts[f"lokr_w{n}_b"].flatten(1)
    whole = parts[f"lokr_w{n}"].flatten(1)
    rows, columns = whole.shape
    eye = torch.eye(min(rows, columns), dtype=whole.dtype, device=whole.device)
    return (whole, eye) if columns <= rows else (eye, whole)
