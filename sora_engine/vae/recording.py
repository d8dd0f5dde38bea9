"""Steps that are recorded once on fixed places in memory and replayed: CUDA graphs.

Written against torch's `torch.cuda.graph`; it has not run on hardware yet.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch

from sora_engine.errors import BackendError

SETTINGS = ("auto", "on", "off")

Recorder = Callable[[Callable[[], None], torch.device], tuple[Callable[[], None], int]]
"""Takes a step that reads and writes tensors at fixed places of a device, and records it without
running it. Returns what runs it, and the bytes that stay reserved for what it works in."""


def record(step: Callable[[], None], device: torch.device) -> tuple[Callable[[], None], int]:
    """A `Recorder` by `torch.cuda.graph`."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        # Other threads of the process may go on using the device.
        with torch.cuda.graph(
            graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"
        ):
            step()
        return graph.replay, max(0, torch.cuda.memory_reserved(device) - before)


class Recorded:
    """A recorded step. `replay()` runs it; `workspace_bytes` of its device are reserved for it as
    long as it lives, and nothing else can use them."""

    def __init__(self, step: Callable[[], None], device: torch.device, recorder: Recorder) -> None:
        self.device = device
        self.replay, self.workspace_bytes = recorder(step, device)
        _ALIVE.add(self)


_ALIVE: weakref.WeakSet[Recorded] = weakref.WeakSet()


def reserved_bytes(device: torch.device) -> int:
    """Memory of a device in which recorded steps work: torch counts it as its own and unused."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return sum(step.workspace_bytes for step in list(_ALIVE) if step.device.index == index)


def wanted(setting: str, device: torch.device) -> bool:
    """Whether steps on a device are recorded, by the setting: "auto" where it is CUDA, "on" always,
    "off" never. BackendError for another setting, and for "on" without a CUDA device."""
    if setting not in SETTINGS:
        raise BackendError(f"CUDA graphs are {', '.join(SETTINGS)}, not {setting!r}")
    if setting == "on" and device.type != "cuda":
        raise BackendError(f"CUDA graphs need a CUDA device, not {device}; auto or off would work")
    return setting != "off" and device.type == "cuda"
