"""Rehearsals on meta tensors, which have shapes and no storage: what they would hold is counted."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sora_engine.vae.meta_ops import META, on_meta


class StorageMeter(TorchDispatchMode):
    """Sums the bytes of the storages that are alive, and keeps the highest sum.

    apart: what was there before, such as weights: it counts for nothing, nor do views of it.
    """

    def __init__(self, apart: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}
        self.now = self.peak = 0
        for tensor in apart:
            if tensor.layout is torch.strided:
                self._watch(tensor.untyped_storage(), 0)

    def count(self, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                self._watch(storage, storage.nbytes())

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: the compiler would be imported to say so. What is rehearsed is never compiled."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = on_meta(func, args, kwargs or {})
        self.count(out if isinstance(out, tuple | list) else (out,))
        return out


class NoScores(TorchFunctionMode):
    """Attention whose scores are never stored, as the fused kernels on real devices do it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


class OnOneDevice(TorchFunctionMode):
    """Tensors stay where they are when they are asked for on the host: meta tensors have nothing
    that could go there."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.cpu, Tensor.numpy) and args[0].device == META:
            return args[0]
        return func(*args, **(kwargs or {}))
