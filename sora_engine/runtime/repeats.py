"""Blocks of one kind take the same: a rehearsal of a step's memory runs two of them, not forty."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sora_engine.models.transformer import DiffusionTransformer
from sora_engine.vae.meter import META, StorageMeter


class Footprint(NamedTuple):
    """What a call took: bytes at its peak above those before it, and its results (no storage)."""

    peak: int
    results: Any


class Repeats:
    """Stands before the methods of a transformer's blocks, to count repeated calls without a run.

    A call on a block of the same kind and sizes, with inputs of the same shapes and the same
    objects beside them, takes what the one before took, once that left nothing behind but its
    results: plans that the first of the layers makes for all of them are made by then. Whole
    numbers, such as a layer's index, count for nothing.

    transformer: on the meta device; it is for rehearsals alone from here on.
    """

    def __init__(self, transformer: DiffusionTransformer) -> None:
        self._meter: StorageMeter | None = None
        self._known: dict[tuple[object, ...], Footprint] = {}
        for block in transformer.blocks_in_order:
            for name in transformer.block_methods:
                kind = name, type(block), repr(block)
                setattr(block, name, partial(self._call, kind, getattr(block, name)))
        # What a batch's calls hold beside tensors is that batch's, and its ids are used again.
        transformer.register_forward_pre_hook(lambda *_: self._known.clear())

    def count_with(self, meter: StorageMeter) -> None:
        """Count what comes with this meter."""
        self._meter = meter
        self._known.clear()

    def _call(
        self, kind: tuple[object, ...], method: Callable[..., Any], *inputs: Any, **named: Any
    ) -> Any:
        meter = self._meter
        assert meter is not None
        key = (*kind, *map(_sight, inputs), *((name, _sight(x)) for name, x in named.items()))
        before = meter.now
        known = self._known.get(key)
        if known is not None:
            meter.peak = max(meter.peak, before + known.peak)
            return _empty(known.results)
        highest, meter.peak = meter.peak, before
        results = method(*inputs, **named)
        shapes = _shapes(results)
        if meter.now - before == _size(shapes):
            self._known[key] = Footprint(meter.peak - before, shapes)
        meter.peak = max(highest, meter.peak)
        return results


def _sight(value: Any) -> object:
    """What of an input decides what a call takes."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, int):
        return int
    if isinstance(value, tuple | list):
        return tuple(map(_sight, value))
    return value if isinstance(value, str) else id(value)


def _shapes(results: Any) -> Any:
    if isinstance(results, Tensor):
        return results.shape, results.dtype
    return [_shapes(result) for result in results]


def _size(shapes: Any) -> int:
    if isinstance(shapes, list):
        return sum(map(_size, shapes))
    shape, dtype = shapes
    return int(shape.numel()) * dtype.itemsize


def _empty(shapes: Any) -> Any:
    if isinstance(shapes, list):
        return tuple(map(_empty, shapes))
    shape, dtype = shapes
    return torch.empty(shape, dtype=dtype, device=META)
