"""What `norm_modulate` and `gate_residual_norm_modulate` hand to a backend."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sora_kernels import checks


@dataclass(frozen=True, slots=True)
class Operands:
    """One call. The fields are as `norm_modulate` has them; `residual` and `gate` are the gated
    form's, which `residual` tells from the plain one."""

    x: Tensor
    scale: Tensor | None
    shift: Tensor | None
    index: Tensor | None
    kind: str
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    residual: Tensor | None = None
    gate: Tensor | None = None

    def check(self, op: str) -> None:
        """Everything that metadata can tell."""
        x = self.x
        checks.check_packed_channels(op, "x", x)
        checks.check_float(op, "x", x)
        if self.residual is not None:
            checks.check_float(op, "residual", self.residual)
            if self.residual.shape != x.shape:
                raise ValueError(
                    f"{op}: residual has shape {[*self.residual.shape]}, x {[*x.shape]}"
                )
        checks.check_kind(op, self.kind, self.bias)
        checks.check_vector(op, "weight", self.weight, x.shape[1])
        checks.check_vector(op, "bias", self.bias, x.shape[1])
        tables = {"gate": self.gate, "scale": self.scale, "shift": self.shift}
        checks.check_rows(op, x, self.index, **tables)
        others = {"residual": self.residual, "index": self.index}
        vectors = {"weight": self.weight, "bias": self.bias}
        checks.check_device(op, x, **tables, **others, **vectors)

    def check_values(self, op: str) -> None:
        """What only data can tell, on the CPU."""
        checks.check_row_values(op, self.index, self.gate, self.scale, self.shift)
