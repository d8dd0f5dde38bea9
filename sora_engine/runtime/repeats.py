"""What is done again takes what it took: a rehearsal of a step's memory runs it once.

A transformer's blocks are of one kind, and the passes over a long video's windows are of one size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sora_engine.denoise.packing import PackedBatch
from sora_engine.models.transformer import DiffusionTransformer
from sora_engine.vae.meter import META, StorageMeter


class Footprint(NamedTuple):
    """What a call took: bytes at its peak above those before it, and its results (no storage)."""

    peak: int
    results: Any


class Repeats:
    """Stands before a transformer and its blocks, to count repeated calls without running them.

    A call on a block of the same kind and sizes, with inputs of the same shapes and the same
    objects beside them, takes what the one before took, once that left nothing behind but its
    results: what the first of the layers makes for all of them is made by then. Whole numbers, such
    as a layer's index, count for nothing. A pass over a batch of the same shapes does too.

    transformer: on the meta device; it is for rehearsals alone from here on.
    """

    def __init__(self, transformer: DiffusionTransformer) -> None:
        self._meter: StorageMeter | None = None
        self._passes: dict[object, Footprint] = {}
        self._calls: dict[object, Footprint] = {}
        for block in transformer.blocks_in_order:
            for name in transformer.block_methods:
                kind = name, type(block), repr(block)
                setattr(block, name, partial(self._call, kind, getattr(block, name)))
        transformer.forward = partial(self._pass, transformer.forward)  # type: ignore[method-assign]

    def count_with(self, meter: StorageMeter) -> None:
        """Count what comes with this meter."""
        self._meter = meter
        self._passes.clear()
        self._calls.clear()

    def _pass(self, forward: Callable[[PackedBatch], Tensor], batch: PackedBatch) -> Any:
        self._calls.clear()  # ids of what lies beside a batch's tensors are used again
        if batch.video.sees is not None:  # its plan follows from values
            return forward(batch)
        return self._count(self._passes, _sizes(batch), forward, batch)

    def _call(
        self, kind: tuple[object, ...], method: Callable[..., Any], *inputs: Any, **named: Any
    ) -> Any:
        beside = ((name, _sight(value)) for name, value in named.items())
        key = (*kind, *map(_sight, inputs), *beside)
        return self._count(self._calls, key, method, *inputs, **named)

    def _count(
        self,
        known: dict[object, Footprint],
        key: object,
        method: Callable[..., Any],
        *inputs: Any,
        **named: Any,
    ) -> Any:
        meter = self._meter
        assert meter is not None
        before = meter.now
        if key in known:
            meter.peak = max(meter.peak, before + known[key].peak)
            return _empty(known[key].results)
        highest, meter.peak = meter.peak, before
        results = method(*inputs, **named)
        shapes = _shapes(results)
        if meter.now - before == _num_bytes(shapes):
            known[key] = Footprint(meter.peak - before, shapes)
        meter.peak = max(highest, meter.peak)
        return results


def _sight(value: Any) -> object:
    """What of an input decides what a block takes: shapes, and which objects there are."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, int):
        return int
    if isinstance(value, tuple | list):
        return tuple(map(_sight, value))
    return value if isinstance(value, str) else id(value)


def _sizes(value: Any) -> object:
    """The shapes of all tensors within, and what else there is."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if is_dataclass(value):
        return tuple(_sizes(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, Mapping):
        return tuple((name, _sizes(part)) for name, part in value.items())
    if isinstance(value, tuple | list):
        return tuple(map(_sizes, value))
    return value


def _shapes(results: Any) -> Any:
    if isinstance(results, Tensor):
        return results.shape, results.dtype
    return [_shapes(result) for result in results]


def _num_bytes(shapes: Any) -> int:
    if isinstance(shapes, list):
        return sum(map(_num_bytes, shapes))
    shape, dtype = shapes
    return int(shape.numel()) * dtype.itemsize


def _empty(shapes: Any) -> Any:
    if isinstance(shapes, list):
        return tuple(map(_empty, shapes))
    shape, dtype = shapes
    return torch.empty(shape, dtype=dtype, device=META)
