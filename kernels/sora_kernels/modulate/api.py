"""`norm_modulate`: what it takes, what it checks, and who serves it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sora_kernels.dispatch import Case, check_gradless, declare, needs_grad
from sora_kernels.library import register
from sora_kernels.modulate.operands import Operands

OP = declare(
    "norm_modulate",
    modules={
        "reference": "sora_kernels.modulate.reference",
        "native": "sora_kernels.modulate.native",
        "triton": "sora_kernels.modulate.triton",
        "cuda": "sora_kernels.modulate.cuda",
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


def run(*arguments: Any) -> Tensor:
    """Validate, dispatch, run: what the schema takes, the backend's name last."""
    *operands, backend = arguments
    call = Operands(*operands)
    call.check(OP.name)
    call.check_values(OP.name)
    return OP.resolve(backend, Case.of(call.x, call.kind)).run(call)


def _fake(*arguments: Any) -> Tensor:
    call = Operands(*arguments[:-1])
    call.check(OP.name)
    return call.x.new_empty(call.x.shape)


_op = register(
    OP.name,
    "(Tensor x, Tensor? scale, Tensor? shift, Tensor? index, str kind, Tensor? weight, "
    "Tensor? bias, float eps, str backend) -> Tensor",
    run,
    _fake,
)
