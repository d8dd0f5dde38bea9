"""`quant_linear`: what it takes, what it checks, and who serves it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sora_kernels.dispatch import Case, check_gradless, declare, needs_grad
from sora_kernels.library import register
from sora_kernels.quant.formats import PLAIN
from sora_kernels.quant.operands import Operands

OP = declare(
    "quant_linear",
    modules={
        "reference": "sora_kernels.quant.reference",
        "native": "sora_kernels.quant.native",
        "triton": "sora_kernels.quant.triton",
        "int8": "sora_kernels.quant.int8",
        "scaled_mm": "sora_kernels.quant.scaled_mm",
    },
    order={"cpu": ("native",), "cuda": ("triton",)},
)


def quant_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    format: str | None = None,
    gelu: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """`x @ dequantised(weight).T + bias`, and GELU, where the weight stays quantised in memory.

    Only the weight is: its values are rounded to x's dtype, as a dense weight's would be, and
    nothing else is lost. Two backends quantise x too, row by row, and are in no list: `int8` (int8
    times int8 on a CPU) and `scaled_mm` (fp8 times fp8 on GPUs that have it). They serve by name.

    x: `[rows, in]`; fp32, fp16 or bf16 (fp64 by the reference), rows may be strided. weight:
    `[out, in]` int8, float8_e4m3fn or float8_e5m2, or uint8 `[out, bytes]`: rows of ggml's blocks.
    scale: float32, of int8 and fp8: `[1, 1]`, `[out, 1]`, or `[out, n]` for n equal stretches of
    each row; None is 1. bias: `[out]`. format: a name of `quant.formats.FORMATS`, such as "Q4_K";
    None: as the weight's dtype says. gelu: `"none"` or `"tanh"`, as `approximate` of
    `torch.nn.functional.gelu`; None leaves it out.

    Returns `[rows, out]` in x's dtype. By `native` and `triton` no row's bits depend on the rows
    beside it, for weights of 16 x 16 and more.
    Raises ValueError for what does not fit and KernelUnavailableError when a named backend
    cannot serve.
    """
    call = _op
    if format is None:
        format = next((name for name, dtype in PLAIN.items() if dtype == weight.dtype), "none")
    if needs_grad(x, scale, bias):
        check_gradless(OP, backend)
        call, backend = run, "reference"
    return call(x, weight, scale, bias, format, gelu or "", backend)


def run(*arguments: Any) -> Tensor:
    """Validate, dispatch, run: what the schema takes, the backend's name last."""
    *operands, backend = arguments
    call = Operands(*operands)
    call.check(OP.name)
    return OP.resolve(backend, Case.of(call.x, call.format)).run(call)


def _fake(*arguments: Any) -> Tensor:
    call = Operands(*arguments[:-1])
    call.check(OP.name)
    return call.out()


_op = register(
    OP.name,
    "(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, str format, str gelu, str backend) "
    "-> Tensor",
    run,
    _fake,
)
