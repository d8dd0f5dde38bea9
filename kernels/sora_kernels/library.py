"""Registration of ops as `torch.ops.sora.*`.

An op's implementation is Python that validates and dispatches; its fake implementation gives
shapes to `torch.compile`. Ops are functional: Inductor can re-inplace mutating ones into wrong
results (pytorch issue 198031).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("sora", "FRAGMENT")


def on_their_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` with the device of its tensors current.

    torch's own operations see to that by themselves. A kernel of Triton's, and one of csrc's, is
    launched on whichever device is current in the thread: with another GPU's pointers.
    """

    def guarded(*args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
        if device.index == torch.cuda.current_device():
            return run(*args)
        with torch.cuda.device(device):
            return run(*args)

    return guarded


def register(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
) -> Callable[..., Any]:
    """Define `sora::name` and return it. `run` serves CPU and CUDA tensors.

    A registered op without an autograd formula would lose gradients with no more than a warning,
    so inputs that require grad raise.
    """
    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, run, "CPU")
    LIBRARY.impl(name, on_their_device(run), "CUDA")
    torch.library.register_fake(f"sora::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.sora, name).default

    def below_autograd(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args
        ):
            raise ValueError(
                f"torch.ops.sora.{name} has no gradient and an input requires grad; "
                f"use sora_kernels.{name}(backend='reference'), or torch.no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    LIBRARY.impl(name, below_autograd, "Autograd")
    return op
