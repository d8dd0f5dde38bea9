"""What the host hands a device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def constant(values: Sequence[Any], like: Tensor) -> Tensor:
    """Numbers in any nest of sequences as a tensor of the dtype of `like`, on its device."""
    if like.device.type != "cuda":
        return like.new_tensor(values)
    return to_device(torch.tensor(values, dtype=like.dtype), like.device)
