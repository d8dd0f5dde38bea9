"""What the host does for a card, alone: ops on the host's tensors go the way of CUDA's, up to a
driver that does nothing.

On the meta device torch's own operations are dispatched as ever and compute nothing. So a pass
takes the time of Python, of torch's dispatcher and of the launchers; what CUDA's driver and cuBLAS
add is not in it. Tensors of the CPU have addresses, too.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sora_kernels import launch, library, triton_support
from sora_kernels.dispatch import OPS
from sora_kernels.testing.launches.card import forget
from sora_kernels.testing.launches.driver import Driver

_NO_LAUNCH = frozenset(
    f"aten::{name}"
    for name in (
        "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach",
        "_unsafe_view", "_reshape_alias", "lift_fresh",
    )
)  # fmt: skip
"""Operations that are no views and launch nothing."""


class _Idle:
    """Of one compiled kernel: counts its launches."""

    def __init__(self, source: Any, metadata: Any, driver: IdleDriver) -> None:
        self._name, self._counts = metadata.name, driver.counts

    def __call__(self, *arguments: Any) -> None:
        self._counts[self._name] += 1


class IdleDriver(Driver):
    """Triton's driver for a card that launches nothing and checks nothing. `counts`: by kernel."""

    def __init__(self, arch: int) -> None:
        super().__init__(arch, 1)
        self.counts: Counter[str] = Counter()

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return _Idle(source, metadata, self)


class _Launches(TorchDispatchMode):
    """Counts torch's own operations that would be a kernel on a device, those of ops' launchers
    among them."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        if name.startswith("sora::"):
            with self:  # what its launcher makes and copies counts, too
                return library.SERVES[name.removeprefix("sora::")]["CPU"](*args)
        if not func.is_view and name not in _NO_LAUNCH:
            self._counts[name] += 1
        return func(*args, **(kwargs or {}))


def _anything(tensor: Tensor) -> bool:
    return True


def _product(bias: Tensor, x: Tensor, weight: Tensor, **scales: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _gelu(x: Tensor, **form: Any) -> Tensor:
    return x.new_empty(x.shape)


_SHAPES = {"addmm": _product, "_addmm_activation": _product, "gelu": _gelu}
"""Results of torch's operations in a block. Its own functions for the meta device take 100 us of
Python, which no card has."""


@contextlib.contextmanager
def as_card(kind: str, arch: int, driver: Driver | None = None) -> Iterator[Driver]:
    """While it lasts, tensors of a kind of device, "meta" or "cpu", are a card's of `arch` to ops.

    driver: in the place of an `IdleDriver`. For a process of its own: what torch has registered for
    meta tensors is another thing from then on.
    """
    from triton.runtime import driver as triton_driver

    driver = driver or IdleDriver(arch)
    registered = []
    if kind == "meta":
        registered = [torch.library.Library(name, "IMPL") for name in ("sora", "aten")]
        for name, serves in library.SERVES.items():
            registered[0].impl(name, serves["CPU"], "Meta", allow_override=True)
        for name, empty in _SHAPES.items():
            registered[1].impl(name, empty, "Meta", allow_override=True)
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context
        patch(mock.patch.object(triton_driver, "_active", driver))
        patch(mock.patch.object(launch, "INTERPRETED", arch))
        patch(mock.patch.object(launch, "_cuda_architecture", return_value=arch))
        patch(mock.patch.object(library, "on_card", _anything))
        for op in OPS.values():
            patch(mock.patch.dict(op._chosen, clear=True))
            if "cuda" in op.order:  # some are for CPUs alone
                patch(mock.patch.dict(op.order, {kind: op.order["cuda"]}))
        patch(mock.patch.dict(triton_support.__dict__, {"problem": lambda device_type: None}))
        forget()
        try:
            yield driver
        finally:
            forget()
            for library_ in registered:
                library_._destroy()


def count_launches(call: Any, driver: IdleDriver) -> Counter[str]:
    """What one call launches: torch's kernels and Triton's, by name."""
    driver.counts.clear()
    found: Counter[str] = Counter()
    with torch.no_grad(), _Launches(found):  # composite operations come as their parts
        call()
    return found + driver.counts
