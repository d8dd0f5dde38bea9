"""What is to be had of a device's memory."""

from __future__ import annotations

import os

import torch

from sora_engine.config import NO_LIMIT
from sora_engine.io.memory_limits import left_under_limits
from sora_engine.vae.recording import reserved_bytes


def free_bytes(device: torch.device) -> int:
    """Memory that is to be had on a device, what torch keeps for itself but does not use included,
    and not what CUDA graphs work in.

    On the host no more than the limits of a container and of the shell leave. Where the system does
    not say, it counts as unlimited.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept - reserved_bytes(device)
    left = left_under_limits()
    return _free_here() if left is None else min(left, _free_here())


def _free_here() -> int:
    """The machine's own."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":") for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, LookupError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return NO_LIMIT
