"""What an adapter changes of one tensor, and how much that is: rows of the change in float32.

Of a tensor W, with a strength s, becomes `W + s * delta`. Formulas, with `scale` most often alpha /
rank:

- lora (arXiv 2106.09685): `scale * up @ down`; of a convolution `up`, `mid` and `down` may be a
  Tucker decomposition (LyCORIS, arXiv 2309.14859);
- loha (arXiv 2108.06098): `scale * (w1_a @ w1_b) * (w2_a @ w2_b)`, entry by entry;
- lokr (LyCORIS): `scale * kron(w1, w2)`, each whole or a product;
- diff: the difference itself; set: `value - W`;
- with a magnitude, DoRA (arXiv 2402.09353), on any of the first three:
  `magnitude * (W + d) / norm(W + d) - W`, where the norm is of rows or of columns.

The norm is that of the changed weight, as DoRA was trained (the paper, PEFT, LyCORIS).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sora_engine.errors import CheckpointError
from sora_engine.io.safetensors import Weights

Rows = Callable[[range], Tensor]
"""Some rows of a matrix in float32, `[len(rows), width]`."""
Delta = Callable[[range, Tensor], Tensor]
"""Rows of the change, given the same rows of the tensor that is changed; float32 both."""


@dataclass(frozen=True, slots=True)
class Change:
    """What an adapter changes of one tensor, as rows of a matrix: dimensions behind the first are
    flattened.

    kind: lora, loha, lokr, diff or set. tensors: by part the tensor in the adapter's file. shape:
    `(rows, width)`. rank: of its factors, 0 where it has none. stored: the shape in the file, of a
    diff or a value.
    """

    kind: str
    tensors: Mapping[str, str]
    shape: tuple[int, int]
    scale: float = 1.0
    rank: int = 0
    stored: tuple[int, ...] | None = None

    @property
    def decorated(self) -> bool:
        """Whether it is DoRA's."""
        return "magnitude" in self.tensors

    @property
    def example(self) -> str:
        """One of its tensors, for errors."""
        return next(iter(self.tensors.values()))

    def delta(self, weights: Weights, device: torch.device | str, base: Rows) -> Delta:
        """Reads the factors once; what comes back computes rows on `device`.

        base: rows of the tensor that is changed, where more than those given are needed.
        """
        parts = {
            part: weights.read(name, device=device, dtype=torch.float32)
            for part, name in self.tensors.items()
        }
        scale = self.scale
        if self.kind in ("diff", "set"):
            values = parts[self.kind].reshape(self.shape)
            if self.kind == "diff":
                return lambda rows, _: values[rows.start : rows.stop] * scale
            return lambda rows, base_rows: values[rows.start : rows.stop] - base_rows
        low_rank = {"lora": _lora, "loha": _loha, "lokr": _lokr}[self.kind](parts)
        if not self.decorated:
            return lambda rows, _: low_rank(rows).mul_(scale)
        changed: Rows = lambda rows: base(rows) + low_rank(rows).mul_(scale)  # noqa: E731
        return self._dora(changed, parts["magnitude"])

    def _dora(self, changed: Rows, magnitude: Tensor) -> Delta:
        if by_rows(magnitude.shape, self.shape):
            column = magnitude.reshape(-1, 1)

            def of_rows(rows: range, base_rows: Tensor) -> Tensor:
                whole = changed(rows)
                norm = torch.linalg.vector_norm(whole, dim=1, keepdim=True)
                return whole * (column[rows.start : rows.stop] / norm) - base_rows

            return of_rows
        squares = torch.zeros(self.shape[1], dtype=torch.float64, device=magnitude.device)
        for piece in pieces(range(self.shape[0]), self.shape[1]):
            squares += changed(piece).double().square().sum(dim=0)
        factor = (magnitude.reshape(-1).double() / squares.sqrt()).float()
        return lambda rows, base_rows: changed(rows) * factor - base_rows


PIECE_VALUES = 1 << 20
"""Values that are merged at a time: 4 MiB in float32."""


def pieces(rows: range, width: int) -> list[range]:
    """The rows in stretches of about `PIECE_VALUES` values."""
    step = max(1, PIECE_VALUES // max(1, width))
    return [rows[i : i + step] for i in range(0, len(rows), step)]


def by_rows(magnitude: tuple[int, ...], shape: tuple[int, int]) -> bool:
    """Whether DoRA's magnitudes are of rows (`[rows]`, `[rows, 1, ...]`), and not of columns
    (`[1, width]`)."""
    return math.prod(magnitude) == shape[0] and magnitude[0] == shape[0]


def finite(weights: Weights, name: str) -> None:
    """CheckpointError for a tensor with NaN or infinity in it."""
    values = weights.read(name, dtype=torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(
            f"tensor {name!r} holds NaN or infinity: a training that failed?",
            path=weights.path_of(name),
            tensor=name,
        )


def _lora(parts: Mapping[str, Tensor]) -> Rows:
    up, down = parts["up"].flatten(1), parts["down"]
    if "mid" in parts:
        down = torch.einsum("ab...,bi->ai...", parts["mid"], down.flatten(1))
    down = down.flatten(1)
    return lambda rows: up[rows.start : rows.stop] @ down


def _loha(parts: Mapping[str, Tensor]) -> Rows:
    first, second = _hada(parts, 1), _hada(parts, 2)
    return lambda rows: first(rows) * second(rows)


def _hada(parts: Mapping[str, Tensor], n: int) -> Rows:
    a, b = parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"]
    if f"hada_t{n}" in parts:  # [rank, out], [rank, in] and the core [rank, rank, ...]
        whole = _tucker(parts[f"hada_t{n}"], a, b)
        return lambda rows: whole[rows.start : rows.stop].flatten(1)
    return lambda rows: a[rows.start : rows.stop] @ b


def _lokr(parts: Mapping[str, Tensor]) -> Rows:
    w1 = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if "lokr_w2" in parts:
        w2 = parts["lokr_w2"]
    elif "lokr_t2" in parts:
        w2 = _tucker(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
    else:
        w2 = parts["lokr_w2_a"] @ parts["lokr_w2_b"].flatten(1)
    w1, w2 = w1.flatten(1), w2.flatten(2) if w2.ndim > 2 else w2[..., None]

    def rows_of(rows: range) -> Tensor:
        index = torch.arange(rows.start, rows.stop, device=w1.device)
        left, right = w1[index // len(w2)], w2[index % len(w2)]
        return (left[:, :, None, None] * right[:, None]).flatten(1)

    return rows_of


def _tucker(core: Tensor, out: Tensor, into: Tensor) -> Tensor:
    """`[out, in, ...]` of a core `[rank, rank, ...]`, `out [rank, out]` and `into [rank, in]`."""
    return torch.einsum("ij...,jr,ip->pr...", core, into, out)
