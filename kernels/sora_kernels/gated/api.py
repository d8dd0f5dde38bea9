"""`gate_residual_norm_modulate`: what it takes, what it checks, and who serves it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from sora_kernels.dispatch import Case, check_gradless, declare, needs_grad
from sora_kernels.library import register
from sora_kernels.modulate.operands import Operands

OP = declare(
    "gate_residual_norm_modulate",
    modules={
        "reference": "sora_kernels.gated.reference",
        "native": "sora_kernels.gated.native",
        "triton": "sora_kernels.gated.triton",
        "cuda": "sora_kernels.gated.cuda",
    },
    order={"cpu": ("native",), "cuda": ("triton",)},
)


def gate_residual_norm_modulate(
    x: Tensor,
    residual: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    index: Tensor | None = None,
    *,
    kind: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add a gated branch to the residual stream, then normalise and modulate it for the next one.

    `residual = residual + gate * x; y = norm(residual) * (1 + scale) + shift` (adaLN-Zero,
    arXiv 2212.09748). x: `[tokens, channels]`, the branch's output; residual: the same shape, in
    its own dtype (fp32 beside bf16 branches, say). gate, scale, shift, index, kind, weight, bias:
    as in `norm_modulate`; no gate means 1.

    Returns the new residual in residual's dtype and y in x's dtype. The norm reads the residual as
    it was rounded, so y depends on the returned residual alone.
    Raises ValueError for what does not fit and KernelUnavailableError when a named backend
    cannot serve.
    """
    if needs_grad(x, residual, gate, scale, shift, weight, bias):
        check_gradless(OP, backend)
        call, backend = run, "reference"
    else:
        call = _op
    return call(x, residual, gate, scale, shift, index, kind, weight, bias, eps, backend)


def _checked(x: Tensor, residual: Tensor, gate: Tensor | None, *others: Any) -> Operands:
    """The call of the schema's arguments, the backend's name aside."""
    call = replace(Operands(x, *others), residual=residual, gate=gate)
    call.check(OP.name)
    return call


def run(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Validate, dispatch, run: what the schema takes, the backend's name last."""
    x, residual, *_, kind, _, _, _, backend = arguments
    call = _checked(*arguments[:-1])
    call.check_values(OP.name)
    wide_residual = residual.dtype != x.dtype
    case = Case.of(x, kind, f"residual {residual.dtype}" if wide_residual else "")
    return OP.resolve(backend, case).run(call)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = _checked(*arguments[:-1])
    return arguments[1].new_empty(call.x.shape), call.x.new_empty(call.x.shape)


_op = register(
    OP.name,
    "(Tensor x, Tensor residual, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? index, "
    "str kind, Tensor? weight, Tensor? bias, float eps, str backend) -> (Tensor, Tensor)",
    run,
    _fake,
)
