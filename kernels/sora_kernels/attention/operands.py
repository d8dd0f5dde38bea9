"""What `packed_attention` hands to a backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sora_kernels import checks
from sora_kernels.segments import offsets_of


@dataclass(frozen=True, slots=True)
class Operands:
    """One call. The fields are as `packed_attention` has them; `tiles` and `block` are a plan's."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    scale: float
    tiles: Tensor | None = None
    block: int = 0
    return_lse: bool = False

    def offsets(self) -> tuple[list[int], list[int]]:
        """Of queries and keys, as Python ints. On a device this waits for it."""
        return offsets_of(self.cu_seqlens_q), offsets_of(self.cu_seqlens_k)

    def lse(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Room for the log-sum-exp: `[tokens, heads]`, or nothing where it was not asked for."""
        return self.q.new_empty(self.q.shape[:2] if self.return_lse else (0,), dtype=dtype)

    def without_keys(self) -> tuple[Tensor, Tensor]:
        """What queries that see nothing give: 0, and a log-sum-exp of -inf."""
        return self.q.new_zeros(self.q.shape), self.lse().fill_(float("-inf"))

    def check(self, op: str) -> None:
        """Everything that metadata can tell."""
        q, k, v, cu_q, cu_k = self.q, self.k, self.v, self.cu_seqlens_q, self.cu_seqlens_k
        check_heads(op, q, k, v)
        checks.check_cu_seqlens(op, "cu_seqlens_q", cu_q)
        checks.check_cu_seqlens(op, "cu_seqlens_k", cu_k)
        if cu_q.shape != cu_k.shape:
            raise ValueError(
                f"{op}: cu_seqlens_q has {cu_q.shape[0]} offsets, "
                f"cu_seqlens_k {cu_k.shape[0]}; they must be as many"
            )
        checks.check_device(op, q, k=k, v=v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, plan=self.tiles)
        if self.max_seqlen_q < 0 or self.max_seqlen_k < 0:
            raise ValueError(
                f"{op}: max_seqlen_q {self.max_seqlen_q}, max_seqlen_k {self.max_seqlen_k} below 0"
            )
        check_scale(op, self.scale)
        tiles = self.tiles
        if tiles is not None and (
            tiles.dtype != torch.int32 or tiles.dim() != 2 or tiles.shape[1] != 2
        ):
            raise ValueError(
                f"{op}: a plan of {tiles.dtype} {[*tiles.shape]}; int32 [tiles, 2] is due"
            )


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Packed queries, and keys and values of their heads, dtype and head_dim."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.check_packed_heads(op, name, tensor)
        checks.check_float(op, name, tensor, like=q)
    if k.shape != v.shape or k.shape[1:] != q.shape[1:]:
        raise ValueError(
            f"{op}: q {[*q.shape]}, k {[*k.shape]}, v {[*v.shape]}; "
            "k and v must be equal in shape, and equal to q in heads and head_dim"
        )


def check_scale(op: str, scale: float) -> None:
    if not 0 < scale < float("inf"):
        raise ValueError(f"{op}: scale {scale}; a positive number is due")
