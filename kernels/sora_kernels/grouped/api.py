"""`group_norm`: what it takes, what it checks, and who serves it."""

from __future__ import annotations

from torch import Tensor

from sora_kernels import checks
from sora_kernels.dispatch import Case, check_gradless, declare, needs_grad
from sora_kernels.library import register

OP = declare(
    "group_norm",
    modules={
        "reference": "sora_kernels.grouped.reference",
        "native": "sora_kernels.grouped.native",
    },
    order={"cpu": ("native",)},
)


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    silu: bool = False,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """GroupNorm of pictures whose channels lie last (arXiv 1803.08494), and SiLU behind it.

    x: `[pictures, pixels, channels]`, fp32, fp16 or bf16 (fp64 by the reference). groups: how many
    the channels are split into, neighbours together. weight, bias: `[channels]`.

    Returns x's shape and dtype: `(x - mean) / sqrt(variance + eps) * weight + bias`, both moments
    over the pixels and the channels of a group of one picture, and with `silu` its SiLU. Arithmetic
    is at least fp32, rounded once. No picture's bits depend on the others.
    Raises ValueError for what does not fit and KernelUnavailableError when a named backend
    cannot serve.
    """
    if needs_grad(x, weight, bias):
        check_gradless(OP, backend)
        return run(x, groups, weight, bias, eps, silu, "reference")
    return _op(x, groups, weight, bias, eps, silu, backend)


def check(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None) -> None:
    """Everything that metadata can tell."""
    op = OP.name
    checks.check_float(op, "x", x)
    if x.dim() != 3 or x.shape[2] < 1:
        raise ValueError(f"{op}: x has shape {[*x.shape]}; [pictures, pixels, channels] is due")
    if groups < 1 or x.shape[2] % groups:
        raise ValueError(f"{op}: {groups} groups do not divide {x.shape[2]} channels")
    checks.check_vector(op, "weight", weight, x.shape[2])
    checks.check_vector(op, "bias", bias, x.shape[2])
    checks.check_device(op, x, weight=weight, bias=bias)


def run(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    backend: str,
) -> Tensor:
    """Validate, dispatch, run."""
    check(x, groups, weight, bias)
    return OP.resolve(backend, Case.of(x)).run(x, groups, weight, bias, eps=eps, silu=silu)


def _fake(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    backend: str,
) -> Tensor:
    check(x, groups, weight, bias)
    return x.new_empty(x.shape)


_op = register(
    OP.name,
    "(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, bool silu, str backend) "
    "-> Tensor",
    run,
    _fake,
)
