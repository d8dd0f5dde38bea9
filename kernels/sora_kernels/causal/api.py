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

WIDER = "edges"
"""The trait of a call with a bias, without a weight, with repeated frames, or that keeps another
number of them than it was given."""


def causal_norm_silu(
    x: Tensor,
    past: Tensor,
    weight: Tensor | None,
    *,
    bias: Tensor | None = None,
    before: int = 0,
    after: int = 0,
    keep: int | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """What a convolution over a video's time reads after norm and SiLU, and what it keeps, in a
    pass.

    x: `[batch, frames, pixels, channels]`, fp32, fp16 or bf16 (fp64 by the reference). past:
    `[batch, kept, pixels, channels]` of x's dtype, the frames before, done already; there may be
    none. weight, bias: `[channels]`, of the RMSNorm. before, after: how often the first frame
    stands before itself, and the last one behind itself. keep: how many frames are kept, by default
    as many as past has.

    Returns `[batch, before + kept + frames + after, pixels, channels]`, the past and then
    `silu(x / sqrt(mean(x^2) + eps) * weight + bias)`, with the repeated frames around them; and a
    copy of its last `keep` frames: the past of the next call. Arithmetic is fp32, rounded once.
    (Data movement of video decoders: sglang issue 34125.)
    Raises ValueError for what does not fit and KernelUnavailableError when a named backend
    cannot serve.
    """
    keep = past.shape[1] if keep is None else keep
    given = (x, past, weight, bias, eps, before, after, keep)
    if needs_grad(x, past, weight, bias):
        check_gradless(OP, backend)
        return run(*given, "reference")
    return _op(*given, backend)


def check(
    x: Tensor,
    past: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    before: int,
    after: int,
    keep: int,
) -> None:
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
    frames = past.shape[1] + x.shape[1]
    if min(before, after) < 0 or (frames == 0 and before + after > 0):
        raise ValueError(
            f"{op}: {before} frames before and {after} behind {frames}; 0 or more are due, and 0 "
            "where there is no frame to repeat"
        )
    if not 0 <= keep <= before + frames + after:
        raise ValueError(f"{op}: keep is {keep}; 0 to {before + frames + after} frames may be kept")
    checks.check_vector(op, "weight", weight, x.shape[3])
    checks.check_vector(op, "bias", bias, x.shape[3])
    checks.check_device(op, x, past=past, weight=weight, bias=bias)


def run(
    x: Tensor,
    past: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    before: int,
    after: int,
    keep: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Validate, dispatch, run."""
    check(x, past, weight, bias, before, after, keep)
    plain = weight is not None and bias is None and not before + after and keep == past.shape[1]
    chosen = OP.resolve(backend, Case.of(x, "" if plain else WIDER))
    if plain:
        return chosen.run(x, past, weight, eps=eps)
    return chosen.run(x, past, weight, eps=eps, bias=bias, before=before, after=after, keep=keep)


def _fake(
    x: Tensor,
    past: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    before: int,
    after: int,
    keep: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check(x, past, weight, bias, before, after, keep)
    frames = before + past.shape[1] + x.shape[1] + after
    return tuple(x.new_empty(x.shape[0], n, *x.shape[2:]) for n in (frames, keep))  # type: ignore[return-value]


_op = register(
    OP.name,
    "(Tensor x, Tensor past, Tensor? weight, Tensor? bias, float eps, SymInt before, "
    "SymInt after, SymInt keep, str backend) -> (Tensor, Tensor)",
    run,
    _fake,
)
