"""What `packed_attention` hands to a backend."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sora_kernels import checks
from sora_kernels.segments import offsets_of


@dataclass(frozen=True, slots=True)
class Padding:
    """One further key, and its value, that segments see as often as they are said to.

    Models that pad every text to one length with one token have it: `n` equal keys are one key with
    `log n` added to its score, so a padded text costs what its own tokens cost.

    key, value: `[heads, head_dim]`, as k and v. counts: int32 or int64 `[segments]`, how many such
    keys each segment has, 0 or more. They are a segment's and not a query's, as a tile of queries
    then reads one number, and a stretch of the queries has the same ones.
    """

    key: Tensor
    value: Tensor
    counts: Tensor


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
    padding: Padding | None = None

    @staticmethod
    def of(*flat: Any) -> Operands:
        """From what the schema takes: padding last, in its three parts."""
        *rest, key, value, counts = flat
        given = [part is not None for part in (key, value, counts)]
        if any(given) and not all(given):
            raise ValueError("packed_attention: padding has key, value and counts; one is missing")
        call = Operands(*rest)
        return replace(call, padding=Padding(key, value, counts)) if any(given) else call

    def offsets(self) -> tuple[list[int], list[int]]:
        """Of queries and keys, as Python ints. On a device this waits for it."""
        return offsets_of(self.cu_seqlens_q), offsets_of(self.cu_seqlens_k)

    def padding_counts(self) -> list[int] | None:
        """Of each segment, as Python ints, where any is padded. On a device this waits for it."""
        counts = [] if self.padding is None else self.padding.counts.tolist()
        return counts if any(counts) else None

    def padding_parts(self, unread: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a kernel takes: dense key and value, and counts. Without padding it reads none of
        them, and others stand in."""
        if self.padding is None:
            return unread, unread, self.cu_seqlens_q
        return self.padding.key.contiguous(), self.padding.value.contiguous(), self.padding.counts

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
        if self.padding is not None:
            self._check_padding(op, self.padding)

    def _check_padding(self, op: str, padding: Padding) -> None:
        segments, heads = self.cu_seqlens_q.shape[0] - 1, self.q.shape[1:]
        for name, tensor in (("key", padding.key), ("value", padding.value)):
            checks.check_float(op, f"padding.{name}", tensor, like=self.q)
            if tensor.shape != heads:
                raise ValueError(
                    f"{op}: padding.{name} has shape {[*tensor.shape]}; {[*heads]} is due"
                )
        counts = padding.counts
        if counts.dtype not in checks.INDICES or counts.shape != (segments,):
            raise ValueError(
                f"{op}: padding.counts is {counts.dtype} {[*counts.shape]}; "
                f"int32 or int64 [{segments}] is due"
            )
        tensors = {"key": padding.key, "value": padding.value, "counts": counts}
        named = {f"padding.{name}": tensor for name, tensor in tensors.items()}
        checks.check_device(op, self.q, **named)

    def check_values(self, op: str) -> None:
        """What only the values tell, of tensors on the CPU: reading others would wait."""
        q_offsets, k_offsets = self.offsets()
        checks.check_offsets(op, "cu_seqlens_q", q_offsets, self.q.shape[0], self.max_seqlen_q)
        checks.check_offsets(op, "cu_seqlens_k", k_offsets, self.k.shape[0], self.max_seqlen_k)
        counts = self.padding_counts()
        if counts is not None and min(counts) < 0:
            raise ValueError(f"{op}: padding.counts {counts}; none may be below 0")


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
