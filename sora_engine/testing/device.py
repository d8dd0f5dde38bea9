"""A CUDA device that is not there: tensors that say `cuda:0` and hold their values on the CPU.

The engine's own code runs on them, unchanged, in whatever dtype it runs in on a GPU. Values are
real, so host code that reads them works; what mixes devices raises as it would on a GPU; and each
wait for the device and each copy to or from it is counted, with its line (`crossings.Trace`).

torch's FakeTensorMode is no use here: its tensors have no values, so the half of the engine that
runs on the host (`unique`, `tolist`) cannot, and on a build without CUDA it raises wherever a
binding guards the device. So this is a wrapper subclass (to torch's C++ on the meta device), a
dispatch mode for what makes tensors from none, and a function mode for what never gets to dispatch.

What it cannot show: kernels, streams, races, the allocator, cuDNN's and cuBLAS's numbers, times.
Ops of `sora_kernels` run by their reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from sora_engine.testing.crossings import WAIT
from sora_engine.testing.state import ACTIVE, Shadow
from sora_engine.testing.tensors import modes
from sora_kernels import launch, triton_support
from sora_kernels.dispatch import OPS
from sora_kernels.windowed.plan import build_cached

CAPABILITY = (9, 0)
MEMORY_BYTES = 141 << 30


def _stand_ins(shadow: Shadow) -> dict[str, Callable[..., Any] | bool]:
    """What `torch.cuda` has in the place of its own."""
    card = SimpleNamespace(
        name="shadow", major=9, minor=0, multi_processor_count=132, total_memory=MEMORY_BYTES
    )
    return {
        "_initialized": True,
        "_lazy_init": lambda: None,
        "is_initialized": lambda: True,
        "is_available": lambda: True,
        "device_count": lambda: shadow.count,
        "current_device": lambda: shadow.current,
        "_exchange_device": shadow.exchange,
        "_maybe_exchange_device": shadow.exchange,
        "set_device": lambda device: shadow.exchange(torch.device(device).index or 0),
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_name": lambda device=None: card.name,
        "get_device_properties": lambda device=None: card,
        "mem_get_info": lambda device=None: (MEMORY_BYTES, MEMORY_BYTES),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: shadow.trace.cross(WAIT, "synchronize"),
    }


def _forget_devices() -> None:
    """What `sora_kernels` keeps of the devices that it met."""
    triton_support.problem.cache_clear()
    launch._cuda_architecture.cache_clear()
    build_cached.cache_clear()
    for op in OPS.values():
        for key in [key for key in op._chosen if key[1].device_type == "cuda"]:
            del op._chosen[key]


@contextmanager
def shadow_device(count: int = 1) -> Iterator[Shadow]:
    """Have `count` CUDA devices in this process, and let this thread make tensors on them.

    Tensors of theirs are of no use outside. On a build of torch for CUDA it raises RuntimeError: a
    real device would be taken for the shadow.
    """
    if torch.version.cuda is not None or torch.version.hip is not None:
        raise RuntimeError("a shadow device needs a build of torch for CPUs alone")
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]
    shadow = Shadow(count)
    stand_ins = _stand_ins(shadow)
    kept = {name: getattr(torch.cuda, name) for name in stand_ins}
    threads = torch.get_num_threads()
    _forget_devices()
    ACTIVE.append(shadow)
    try:
        # Tests' tensors are small: threads that meet at each of them cost more than they do.
        torch.set_num_threads(1)
        for name, stand_in in stand_ins.items():
            setattr(torch.cuda, name, stand_in)
        functions, dispatch = modes(shadow)
        with functions, dispatch:
            yield shadow
    finally:
        for name, own in kept.items():
            setattr(torch.cuda, name, own)
        torch.set_num_threads(threads)
        ACTIVE.remove(shadow)
        _forget_devices()
