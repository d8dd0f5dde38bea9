"""`gate_residual_norm_modulate`: what it takes, what it checks, and who serves it."""

from __future__ import annotations

from torch import Tensor

from sora_kernels import checks
from sora_kernels.dispatch import Case, check_gradless, declare, needs_grad
from sora_kernels.library import register

OP = declare(
    "gate_residual_norm_modulate",
    modules={
        "reference": "sora_kernels.gated.reference",
        "native": "sora_kernels.gated.native",
        "triton": "sora_kernels.gated.triton",
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


def check(
    x: Tensor,
    residual: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    kind: str,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Everything that metadata can tell."""
    op = OP.name
    checks.check_packed_channels(op, "x", x)
    checks.check_float(op, "x", x)
    checks.check_float(op, "residual", residual)
    if residual.shape != x.shape:
        raise ValueError(f"{op}: residual has shape {[*residual.shape]}, x {[*x.shape]}")
    checks.check_kind(op, kind, bias)
    checks.check_vector(op, "weight", weight, x.shape[1])
    checks.check_vector(op, "bias", bias, x.shape[1])
    checks.check_rows(op, x, index, gate=gate, scale=scale, shift=shift)
    checks.check_device(
        op,
        x,
        residual=residual,
        gate=gate,
        scale=scale,
        shift=shift,
        index=index,
        weight=weight,
        bias=bias,
    )


def run(
    x: Tensor,
    residual: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    kind: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Validate, dispatch, run."""
    check(x, residual, gate, scale, shift, index, kind, weight, bias)
    checks.check_row_values(OP.name, index, gate, scale, shift)
    wide_residual = residual.dtype != x.dtype
    case = Case.of(x, kind, f"residual {residual.dtype}" if wide_residual else "")
    module = OP.resolve(backend, case)
    return module.run(
        x, residual, gate, scale, shift, index, kind=kind, weight=weight, bias=bias, eps=eps
    )


def _fake(
    x: Tensor,
    residual: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    kind: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check(x, residual, gate, scale, shift, index, kind, weight, bias)
    return residual.new_empty(residual.shape), x.new_empty(x.shape)


_op = register(
    OP.name,
    "(Tensor x, Tensor residual, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? index, "
    "str kind, Tensor? weight, Tensor? bias, float eps, str backend) -> (Tensor, Tensor)",
    run,
    _fake,
)
