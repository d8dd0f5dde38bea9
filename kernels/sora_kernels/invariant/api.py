"""`invariant_linear`: what it takes, what it checks, and who serves it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sora_kernels.dispatch import Case, check_gradless, declare, needs_grad
from sora_kernels.invariant.operands import Operands
from sora_kernels.library import register

OP = declare(
    "invariant_linear",
    modules={
        "reference": "sora_kernels.invariant.reference",
        "triton": "sora_kernels.invariant.triton",
    },
    order={"cuda": ("triton",)},
)


def invariant_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gelu: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """`x @ weight.T + bias`, and GELU, where a row's bits do not depend on the rows beside it.

    Libraries choose tiles, and where sums are split, by the number of rows; here both are fixed
    for a dtype and a device ("batch-invariant", as Thinking Machines' "Defeating Nondeterminism in
    LLM Inference" has it). Slower than a library's product, most of all for few rows.

    x: `[rows, in]`; weight: `[out, in]`; fp32, fp16 or bf16 (fp64 by the reference), rows may be
    strided. bias: `[out]`, any of these dtypes. gelu: `"none"` or `"tanh"`, as `approximate` of
    `torch.nn.functional.gelu`; None leaves it out.

    Returns `[rows, out]` in x's dtype; sums, bias and GELU are fp32, rounded once.
    Raises ValueError for what does not fit and KernelUnavailableError when a named backend
    cannot serve.
    """
    call = _op
    if needs_grad(x, weight, bias):
        check_gradless(OP, backend)
        call, backend = run, "reference"
    return call(x, weight, bias, gelu or "", backend)


def run(*arguments: Any) -> Tensor:
    """Validate, dispatch, run: what the schema takes, the backend's name last."""
    *operands, backend = arguments
    call = Operands(*operands)
    call.check(OP.name)
    return OP.resolve(backend, Case.of(call.x, call.gelu and f"gelu {call.gelu}")).run(call)


def _fake(*arguments: Any) -> Tensor:
    call = Operands(*arguments[:-1])
    call.check(OP.name)
    return call.out()


_op = register(
    OP.name,
    "(Tensor x, Tensor weight, Tensor? bias, str gelu, str backend) -> Tensor",
    run,
    _fake,
)
