"""`causal_norm_silu`: what it takes, what it checks, and who serves it."""

from __future__ import annotations

from torch import Tensor

from sora_kernels import checks
from sora_kernels.dispatch import Case, check_gradless, declare, needs_grad
from sora_kernels.library import register

OP = declare(
    "causal_norm_silu",
    modules={
        "reference": "sora_kernels.causal.reference",
        "native": "sora_kernels.causal.native",
        "triton": "sora_kernels.causal.triton",
    },
    order={"cpu": ("native",), "cuda": ("triton",)},
)


def causal_norm_silu(
    x: Tensor, past: Tensor, weight: Tensor, *, eps: float = 1e-6, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """What a causal convolution of a video reads after norm and SiLU, and what it keeps, in a pass.

    x: `[batch, frames, pixels, channels]`, fp32, fp16 or bf16 (fp64 by the reference). past:
    `[batch, kept, pixels, channels]` of x's dtype, the frames before, done already; there may be
    none. weight: `[channels]`, of the RMSNorm.

    Returns `[batch, kept + frames, pixels, channels]`, the past and then
    `silu(x / sqrt(mean(x^2) + eps) * weight)`, and a copy of its last `kept` frames: the past of
    the next call. Arithmetic is fp32, rounded once. (Data movement of video decoders: sglang
    issue 34125.)
    Raises ValueError for what does not fit and KernelUnavailableError when a named backend
    cannot serve.
    """
    if needs_grad(x, past, weight):
        check_gradless(OP, backend)
        return run(x, past, weight, eps, "reference")
    return _op(x, past, weight, eps, backend)


def check(x: Tensor, past: Tensor, weight: Tensor) -> None:
    """Everything that metadata can tell."""
    op = OP.name
    for name, tensor in (("x", x), ("past", past)):
        checks.check_float(op, name, tensor, like=x)
        if tensor.dim() != 4 or tensor.shape[3] < 1:
            raise ValueError(
                f"{op}: {name} has shape {[*tensor.shape]}; "
                "[batch, frames, pixels, channels] is due"
            )
    due = [x.shape[0], past.shape[1], *x.shape[2:]]
    if [*past.shape] != due:
        raise ValueError(
            f"{op}: past has shape {[*past.shape]} beside x of {[*x.shape]}; not {due}"
        )
    checks.check_vector(op, "weight", weight, x.shape[3])
    checks.check_device(op, x, past=past, weight=weight)


def run(x: Tensor, past: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    """Validate, dispatch, run."""
    check(x, past, weight)
    return OP.resolve(backend, Case.of(x)).run(x, past, weight, eps=eps)


def _fake(
    x: Tensor, past: Tensor, weight: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    check(x, past, weight)
    joined = (x.shape[0], past.shape[1] + x.shape[1], *x.shape[2:])
    return x.new_empty(joined), x.new_empty(past.shape)


_op = register(
    OP.name,
    "(Tensor x, Tensor past, Tensor weight, float eps, str backend) -> (Tensor, Tensor)",
    run,
    _fake,
)
