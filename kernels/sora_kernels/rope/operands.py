"""What `qk_norm_rope` hands to a backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sora_kernels import checks


@dataclass(frozen=True, slots=True)
class Operands:
    """One call. The fields are as `qk_norm_rope` has them."""

    q: Tensor
    k: Tensor | None
    q_weight: Tensor | None
    k_weight: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    across_heads: bool
    interleaved: bool
    eps: float

    def each(self, norm_rope: Callable[[Tensor, Tensor | None], Tensor]) -> tuple[Tensor, Tensor]:
        """q and k by a function of them and their weights; an empty k where there is none."""
        q = norm_rope(self.q, self.q_weight)
        return q, q.new_empty(0) if self.k is None else norm_rope(self.k, self.k_weight)

    def check(self, op: str) -> None:
        """Everything that metadata can tell."""
        q, k, cos, sin = self.q, self.k, self.cos, self.sin
        checks.check_packed_heads(op, "q", q)
        checks.check_float(op, "q", q)
        head_dim = q.shape[2]
        checks.check_vector(op, "q_weight", self.q_weight, self._weights(q))
        if k is None:
            if self.k_weight is not None:
                raise ValueError(f"{op}: k_weight without k")
        else:
            checks.check_packed_heads(op, "k", k)
            checks.check_float(op, "k", k, like=q)
            if k.shape[0] != q.shape[0] or k.shape[2] != head_dim:
                raise ValueError(
                    f"{op}: q {[*q.shape]}, k {[*k.shape]}; tokens and head_dim must be equal"
                )
            checks.check_vector(op, "k_weight", self.k_weight, self._weights(k))
        if (cos is None) != (sin is None):
            raise ValueError(f"{op}: cos and sin come together or not at all")
        if cos is not None and sin is not None:
            if head_dim % 2:
                raise ValueError(f"{op}: head_dim {head_dim} is odd; rotation pairs channels")
            for name, table in (("cos", cos), ("sin", sin)):
                if table.dtype not in (torch.float32, torch.float64):
                    raise ValueError(f"{op}: {name} is {table.dtype}; float32 is due")
                if table.dim() != 2 or tuple(table.shape) != (q.shape[0], head_dim // 2):
                    raise ValueError(
                        f"{op}: {name} has shape {[*table.shape]}; "
                        f"[{q.shape[0]}, {head_dim // 2}] is due"
                    )
        others = {"k": k, "q_weight": self.q_weight, "k_weight": self.k_weight}
        checks.check_device(op, q, **others, cos=cos, sin=sin)

    def _weights(self, x: Tensor) -> int:
        return x.shape[2] * (x.shape[1] if self.across_heads else 1)
