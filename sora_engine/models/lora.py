"""Adapters beside the weights: each stretch of a batch's rows has its own.

A layer with adapters adds `scale * up @ down` of its input's rows to its result. The weights stay
as they are, so requests with different adapters, and with none, share a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_engine.denoise.adapting import AdapterRun
from sora_engine.models.linear import InvariantLinear, linear_gelu
from sora_kernels import lora_linear

TILE = 64
"""Rows of a tile where no row's bits may depend on the others."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerChange:
    """What an adapter changes of one linear layer.

    down: `[rank, in]`, up: `[out, rank]`, and the scale of their product; or None both. bias:
    `[out]`, of the same dtype.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    scale: float = 1.0
    bias: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.down, self.up, self.bias) if tensor is not None]


@dataclass(frozen=True, slots=True, eq=False)
class AdapterSet:
    """What the adapters of one request change of one transformer: by layer each change, and how
    strongly it is applied. Compared by identity."""

    layers: Mapping[str, Sequence[tuple[LayerChange, float]]]

    @property
    def nbytes(self) -> int:
        changes = (change for each in self.layers.values() for change, _ in each)
        return sum(tensor.nbytes for change in changes for tensor in change.tensors)


class Stretch(NamedTuple):
    """Rows of a layer's input, and what changes for them."""

    changes: Sequence[tuple[LayerChange, float]]
    start: int
    stop: int | None


class AdaptedLinear(nn.Module):
    """A linear layer and its adapters, each for some of the rows.

    What is behind the last stretch is not changed: `linear.steady` adds rows there.
    """

    def __init__(self, base: nn.Module, stretches: Sequence[Stretch]) -> None:
        super().__init__()
        self.base = base
        self.stretches = tuple(stretches)

    def forward(self, x: Tensor) -> Tensor:
        return self._changed(x, self.base(x), self.stretches)

    def with_gelu(self, x: Tensor, approximate: str) -> Tensor:
        """`gelu(self(x))`; rows without adapters go the way that they go alone."""
        parts, done = [], 0
        for stretch in self.stretches:
            stop = len(x) if stretch.stop is None else stretch.stop
            if stretch.start > done:
                parts.append(linear_gelu(self.base, x[done : stretch.start], approximate))
            own = x[stretch.start : stop]
            changed = self._changed(own, self.base(own), [stretch._replace(start=0, stop=None)])
            parts.append(self._gelu(changed, approximate))
            done = stop
        if done < len(x):
            parts.append(linear_gelu(self.base, x[done:], approximate))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _gelu(self, x: Tensor, approximate: str) -> Tensor:
        exact = isinstance(self.base, InvariantLinear) or getattr(self.base, "exact", False)
        if not exact or x.device.type == "cuda":
            return F.gelu(x, approximate=approximate)
        # In tiles of one size: on a CPU the last values of a tensor go another way than the rest.
        tiles = F.pad(x, (0, 0, 0, -len(x) % TILE)).split(TILE)
        return torch.cat([F.gelu(tile, approximate=approximate) for tile in tiles])[: len(x)]

    def _changed(self, x: Tensor, base: Tensor, stretches: Sequence[Stretch]) -> Tensor:
        down, up, rows, scales = [], [], [], []
        for changes, start, end in stretches:
            stop = len(x) if end is None else end
            for change, strength in changes:
                if change.down is not None and change.up is not None:
                    down.append(change.down)
                    up.append(change.up)
                    rows.append((start, stop))
                    scales.append(strength * change.scale)
        out = lora_linear(x, base, down, up, rows, scales) if down else base.clone()
        for changes, start, end in stretches:
            for change, strength in changes:
                if change.bias is not None:
                    out[start:end].add_(change.bias, alpha=strength)
        return out


@contextmanager
def adapting(transformer: nn.Module, runs: Sequence[AdapterRun]) -> Iterator[None]:
    """While it lasts, adapters change what a transformer's layers make of these runs of rows."""
    stretches: dict[str, list[Stretch]] = {}
    for run in runs:
        assert isinstance(run.adapters, AdapterSet)
        for name, changes in run.adapters.layers.items():
            stretches.setdefault(name, []).append(Stretch(changes, run.start, run.stop))
    plain: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for name, own in stretches.items():
            parent, _, child = name.rpartition(".")
            owner = transformer.get_submodule(parent)
            layer = owner.get_submodule(child)
            plain.append((owner, child, layer))
            setattr(owner, child, AdaptedLinear(layer, own))
        yield
    finally:
        for owner, child, layer in plain:
            setattr(owner, child, layer)
