"""`lora_linear`: what it takes, what it checks, and who serves it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sora_kernels.dispatch import Case, check_gradless, declare, needs_grad
from sora_kernels.library import register
from sora_kernels.lora.operands import Operands

OP = declare(
    "lora_linear",
    modules={
        "reference": "sora_kernels.lora.reference",
        "native": "sora_kernels.lora.native",
        "triton": "sora_kernels.lora.triton",
    },
    order={"cpu": ("native",), "cuda": ("triton",)},
)


def lora_linear(
    x: Tensor,
    base: Tensor,
    down: Sequence[Tensor],
    up: Sequence[Tensor],
    rows: Sequence[tuple[int, int]],
    scale: Sequence[float],
    *,
    backend: str = "auto",
) -> Tensor:
    """Add to a linear layer's result what adapters (LoRA, arXiv 2106.09685) change of it, where
    stretches of rows have adapters of their own: `base + scale * (x @ down.T) @ up.T`.

    One call serves a batch of requests with different adapters, of any ranks (as Punica, arXiv
    2310.18547, and S-LoRA, 2311.03285, do for texts). No row's bits depend on the rows beside it by
    `native` and `triton`.

    x: `[rows, in]`, what the layer read, and base: `[rows, out]`, what it gave; fp32, fp16 or bf16
    (fp64 by the reference). down, up: for each adapter `[rank, in]` and `[out, rank]`, in x's
    dtype. rows: for each the stretch that it changes, from the first row to below the last;
    stretches may overlap, and add up in order then. scale: of each.

    Returns a new `[rows, out]` in x's dtype; sums are fp32, and base and all changes are rounded
    together once.
    Raises ValueError for what does not fit and KernelUnavailableError when a named backend
    cannot serve.
    """
    call = _op
    flat = [int(place) for pair in rows for place in pair]
    if needs_grad(x, base, *down, *up):
        check_gradless(OP, backend)
        call, backend = run, "reference"
    return call(x, base, list(down), list(up), flat, [float(s) for s in scale], backend)


def run(*arguments: Any) -> Tensor:
    """Validate, dispatch, run: what the schema takes, the backend's name last."""
    *operands, backend = arguments
    call = Operands(*operands)
    call.check(OP.name)
    return OP.resolve(backend, Case.of(call.x)).run(call)


def _fake(*arguments: Any) -> Tensor:
    call = Operands(*arguments[:-1])
    call.check(OP.name)
    return call.base.new_empty(call.base.shape)


_op = register(
    OP.name,
    "(Tensor x, Tensor base, Tensor[] down, Tensor[] up, SymInt[] rows, float[] scale, "
    "str backend) -> Tensor",
    run,
    _fake,
)
