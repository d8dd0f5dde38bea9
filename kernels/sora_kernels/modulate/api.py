"""`norm_modulate`: what it takes, what it checks, and who serves it."""

from __future__ import annotations

from torch import Tensor

from sora_kernels import checks
from sora_kernels.dispatch import Case, check_gradless, declare, needs_grad
from sora_kernels.library import register

OP = declare(
    "norm_modulate",
    modules={
        "reference": "sora_kernels.modulate.reference",
        "native": "sora_kernels.modulate.native",
        "triton": "sora_kernels.modulate.triton",
    },
    order={"cpu": ("native",), "cuda": ("triton",)},
)


def norm_modulate(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    index: Tensor | None = None,
    *,
    kind: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Normalise and modulate each token: `norm(x) * (1 + scale) + shift` (adaLN, arXiv 2212.09748).

    x: `[tokens, channels]`, fp32, fp16 or bf16 (fp64 by the reference). scale, shift:
    `[rows, channels]`, any float dtype, row-strided views allowed; None leaves them out.
    index: int32 or int64 `[tokens]`, each token's row; None with one row for all or one a token.
    kind: "layer" (LayerNorm) or "rms" (RMSNorm, without bias). weight, bias: `[channels]`.

    Returns `[tokens, channels]` in x's dtype; statistics and arithmetic are fp32, rounded once.
    Raises ValueError for what does not fit and KernelUnavailableError when a named backend
    cannot serve.
    """
    if needs_grad(x, scale, shift, weight, bias):
        check_gradless(OP, backend)
        return run(x, scale, shift, index, kind, weight, bias, eps, "reference")
    return _op(x, scale, shift, index, kind, weight, bias, eps, backend)


def check(
    x: Tensor,
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
    checks.check_kind(op, kind, bias)
    checks.check_vector(op, "weight", weight, x.shape[1])
    checks.check_vector(op, "bias", bias, x.shape[1])
    checks.check_rows(op, x, index, scale=scale, shift=shift)
    checks.check_device(op, x, scale=scale, shift=shift, index=index, weight=weight, bias=bias)


def run(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    kind: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str,
) -> Tensor:
    """Validate, dispatch, run."""
    check(x, scale, shift, index, kind, weight, bias)
    checks.check_row_values(OP.name, index, scale, shift)
    module = OP.resolve(backend, Case.of(x, kind))
    return module.run(x, scale, shift, index, kind=kind, weight=weight, bias=bias, eps=eps)


def _fake(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    kind: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str,
) -> Tensor:
    check(x, scale, shift, index, kind, weight, bias)
    return x.new_empty(x.shape)


_op = register(
    OP.name,
    "(Tensor x, Tensor? scale, Tensor? shift, Tensor? index, str kind, Tensor? weight, "
    "Tensor? bias, float eps, str backend) -> Tensor",
    run,
    _fake,
)
