"""What `invariant_linear` hands to a backend."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sora_kernels import checks

GELUS = ("", "none", "tanh")


@dataclass(frozen=True, slots=True)
class Operands:
    """One call. `gelu` is empty where there is none, else torch's `approximate`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    gelu: str = ""

    def check(self, op: str) -> None:
        """Everything that metadata can tell."""
        x, weight = self.x, self.weight
        checks.check_packed_channels(op, "x", x)
        checks.check_float(op, "x", x)
        checks.check_float(op, "weight", weight, like=x)
        if weight.dim() != 2 or weight.shape[1] != x.shape[1] or weight.shape[0] < 1:
            raise ValueError(
                f"{op}: weight has shape {checks.shape_of(weight)}; [out, {x.shape[1]}] is due"
            )
        checks.check_vector(op, "bias", self.bias, weight.shape[0])
        checks.check_device(op, x, weight=weight, bias=self.bias)
        if self.gelu not in GELUS:
            raise ValueError(f"{op}: gelu {self.gelu!r}; 'none', 'tanh' and None are known")

    def out(self) -> Tensor:
        """Room for the result."""
        return self.x.new_empty(self.x.shape[0], self.weight.shape[0])
