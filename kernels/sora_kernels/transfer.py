"""What the host hands a device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; one of the host's goes to a GPU behind the work that is queued there.

    From pageable memory CUDA copies once the stream has come so far, and the host stands still
    until then (CUDA's API synchronisation behaviour, "Memcpy"). From pinned memory it goes on.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
