"""A pretended card: tensors that say they are on it, and what torch says of it.

A tensor's memory is real, on the host, and never touched: its pages are not even taken. So the
tensors of a 1080p video are as large as they would be, with true addresses and strides.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from sora_kernels import launch, library, replay, triton_support
from sora_kernels.dispatch import OPS
from sora_kernels.testing.launches.driver import PROCESSORS, Driver, Record

HOST = torch.device("cpu")


class OnCard(Tensor):
    """A host tensor that says it is on a card. `card`: which one."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    card: int

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", self.card)

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def get_device(self) -> int:
        return self.card


def on_card(tensor: Tensor, index: int) -> OnCard:
    made = tensor.as_subclass(OnCard)
    made.card = index
    return made


def _on_host(value: Any) -> Any:
    return HOST if isinstance(value, torch.device) else value


class _Card(TorchFunctionMode):
    """What is made on the card, or from its tensors, is of the card; ops are served as on CUDA."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.pin_memory:  # there is nothing to pin it for
            return args[0]
        args, kwargs = tuple(args), dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        indices = {x.card for x in leaves if isinstance(x, OnCard)}
        asked = [x for x in leaves if isinstance(x, torch.device) and x.type == "cuda"]
        if asked:
            indices = {asked[0].index or 0}
            args, kwargs = tree_map(_on_host, (args, kwargs))
        if indices and getattr(function, "namespace", "") == "sora":
            name = function._schema.name.removeprefix("sora::")
            with self:
                return library.SERVES[name]["CUDA"](*args, **kwargs)
        result = function(*args, **kwargs)
        if not indices:
            return result
        index = max(indices)
        return tree_map(lambda x: on_card(x, index) if type(x) is Tensor else x, result)


def empty(*shape: int, dtype: torch.dtype, index: int) -> OnCard:
    """Memory that nothing is written to."""
    return on_card(torch.empty(shape, dtype=dtype), index)


@contextlib.contextmanager
def pretend(arch: int, *, devices: int = 1) -> Iterator[Record]:
    """While it lasts there are `devices` cards of `arch` (sm_90 as 90), and ops launch to them.

    Ops are called as torch calls them for CUDA tensors. Yields the record of what is launched.
    Raises RuntimeError where Triton's kernels were made for its interpreter.
    """
    import triton
    from triton.runtime import driver as triton_driver

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, and not compiled")
    driver = Driver(arch, devices)
    properties = SimpleNamespace(multi_processor_count=PROCESSORS[arch], name=f"sm_{arch}")
    caches = (launch._cuda_architecture, triton_support.problem)
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context
        patch(mock.patch.object(triton_driver, "_active", driver))
        patch(mock.patch("torch.cuda.get_device_capability", driver.get_device_capability))
        patch(mock.patch("torch.cuda.get_device_properties", return_value=properties))
        patch(mock.patch("torch.cuda.current_device", driver.get_current_device))
        patch(mock.patch("torch.cuda._exchange_device", driver.exchange_device))
        patch(mock.patch("torch.cuda._maybe_exchange_device", driver.exchange_device))
        for op in OPS.values():
            patch(mock.patch.dict(op._chosen, clear=True))
        forget()
        for cached in caches:
            cached.cache_clear()
        try:
            with _Card():
                yield driver.record
        finally:
            for cached in caches:
                cached.cache_clear()
            forget()


def forget() -> None:
    """Kernels that were compiled for another device, and its limit of shared memory."""
    from triton.compiler import compiler

    compiler.max_shared_mem.cache_clear()
    replay.forget()
    for kernel in kernels():
        kernel.device_caches.clear()


def kernels() -> list[Any]:
    """Every kernel of this library that was imported."""
    from triton.runtime.jit import JITFunction

    modules = [module for name, module in list(sys.modules.items()) if "sora_kernels." in name]
    found = (value for module in modules for value in vars(module).values())
    return [value for value in found if isinstance(value, JITFunction)]
