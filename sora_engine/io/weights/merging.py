"""Adapters merged into weights while these are read, a piece at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sora_engine.io.safetensors import Weights
from sora_engine.io.weights.changes import Change, pieces
from sora_engine.io.weights.source import WeightSource


@dataclass(frozen=True, slots=True)
class Applied:
    """A change, the file that has its tensors, and how strongly it is applied."""

    change: Change
    path: Path
    strength: float


@dataclass(frozen=True, slots=True)
class Merge:
    """What adapters change of one transformer's parameters, by their names.

    Each change is of the weight as it was, so the order of adapters does not matter: of W becomes
    `W + s1 * delta1(W) + s2 * delta2(W)`. All in float32; the sum is then cast.
    """

    changes: Mapping[str, Sequence[Applied]]

    def __contains__(self, name: object) -> bool:
        return name in self.changes

    def read(
        self,
        name: str,
        weights: WeightSource,
        source: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        rows: range | None = None,
    ) -> Tensor:
        """A parameter merged; as `WeightSource.read` of `source`, which is `name` in the file."""
        stored = weights.info(source)
        wanted = range(stored.shape[0]) if rows is None else rows
        width = math.prod(stored.shape[1:])
        target = torch.empty(
            (len(wanted), *stored.shape[1:]), dtype=dtype or stored.dtype, device=device
        )
        if target.is_meta:
            return target

        def base(piece: range) -> Tensor:
            read = weights.read(source, device=device, dtype=torch.float32, rows=piece)
            return read.reshape(len(piece), width)

        with ExitStack() as files:
            deltas = [
                (
                    applied.strength,
                    applied.change.delta(
                        files.enter_context(Weights.open(applied.path)), device, base
                    ),
                )
                for applied in self.changes[name]
            ]
            for piece in pieces(wanted, width):
                values = base(piece)
                total = values.clone()
                for strength, delta in deltas:
                    total.add_(delta(piece, values), alpha=strength)
                first = piece.start - wanted.start
                shape = (len(piece), *stored.shape[1:])
                target[first : first + len(piece)].copy_(total.view(shape))
        return target
