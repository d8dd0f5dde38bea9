"""Registration of ops as `torch.ops.sora.*`.

An op's implementation is Python that validates and dispatches; its fake implementation gives
shapes to `torch.compile`. Ops are functional: Inductor can re-inplace mutating ones into wrong
results (pytorch issue 198031).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sora_kernels.replay import Replayed, kind_of, unobserved

LIBRARY = torch.library.Library("sora", "FRAGMENT")

SERVES: dict[str, dict[str, Callable[..., Any]]] = {}
"""For each op what serves tensors of a kind of device, by its dispatch key."""


def on_its_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` with the device of its first argument, a tensor, as the thread's current one.

    Triton launches to the current device, whatever device its tensors are on.
    """

    def guarded(first: torch.Tensor, *rest: Any) -> Any:
        if first.device.index == torch.cuda.current_device():
            return run(first, *rest)
        with torch.cuda.device(first.device):
            return run(first, *rest)

    return guarded


def on_card(tensor: torch.Tensor) -> bool:
    """Whether kernels are launched on it, and to the current device."""
    return tensor.is_cuda and tensor.get_device() == torch.cuda.current_device()


def register(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
) -> Callable[..., Any]:
    """Define `sora::name` and return what calls it. `run` serves CPU and CUDA tensors.

    A registered op without an autograd formula would lose gradients with no more than a warning,
    so inputs that require grad raise. Where torch's dispatcher has nothing to add to a call on a
    card, it is passed by.
    """
    LIBRARY.define(f"{name}{schema}")
    SERVES[name] = {"CPU": run, "CUDA": on_its_device(run)}
    for key, serve in SERVES[name].items():
        LIBRARY.impl(name, serve, key)
    torch.library.register_fake(f"sora::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.sora, name).default
    replayed = Replayed(run)

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

    def call(*args: Any) -> Any:
        if not torch.compiler.is_compiling() and on_card(args[0]) and unobserved():
            kind = kind_of(args)
            if kind is not None:
                return replayed(kind, args)
        return op(*args)

    return call
