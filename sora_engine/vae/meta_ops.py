"""Operations on meta tensors without torch's Python references of them.

On the meta device torch runs most operations in Python. The first of them imports its compiler, for
a second of a cold start, and each takes some ten times as long as what is here: those that models
are made of. What is not here torch is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

META = torch.device("meta")

_UNTAGGED = (torch.ops.aten.where.ScalarOther, torch.ops.aten.where.ScalarSelf)
"""Elementwise, and not said to be."""
_PLAIN = frozenset({"alpha", "approximate", "rounding_mode", "value"})
_SINGLE = (int, float, bool, str, type(None))


def on_meta(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operation gives: its shape, dtype and strides are those that torch gives."""
    out = _SHORTCUTS.get(func, elementwise)(func, args, kwargs)
    return func(*args, **kwargs) if out is None else out


def elementwise(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """An elementwise operation; None where torch has to be asked.

    The dtype is that of the operation itself on a tensor of the host without elements; axes are
    ordered as in the operand that torch takes their order from.
    """
    if torch.Tag.pointwise not in func.tags and func not in _UNTAGGED:
        return None
    if not _PLAIN.issuperset(kwargs):
        return None
    tensors = [a for a in args if isinstance(a, Tensor)]
    wide = [t for t in tensors if t.dim()]
    if not wide or len(tensors) + sum(isinstance(a, _SINGLE) for a in args) != len(args):
        return None
    if any(not t.is_meta for t in wide):
        return None
    if func._schema.is_mutable:
        return args[0] if args[0].is_meta and len(func._schema.returns) == 1 else None
    shape = torch.broadcast_shapes(*(t.shape for t in wide))
    # The first operand whose strides tell axes apart decides their order; one of one axis does not.
    telling = [t for t in wide if sum(size > 1 for size in t.shape) > 1]
    decides = bool(telling) and telling[0].shape == shape and _ordered(telling[0])
    if not decides and not all(t.is_contiguous() for t in telling):
        return None
    sample = func(*(_sample(a) if isinstance(a, Tensor) else a for a in args), **kwargs)
    if not isinstance(sample, Tensor):
        return None
    if decides:
        return torch.empty_like(telling[0], dtype=sample.dtype)
    return torch.empty(shape, dtype=sample.dtype, device=META)


def _ordered(tensor: Tensor) -> bool:
    """Whether strides differ, and none is 0."""
    strides = [s for s, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    return 0 not in strides and len(set(strides)) == len(strides)


def _joined(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """`cat`. The channels of pictures and videos come last where they do so in all of them."""
    tensors = args[0]
    axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    first = tensors[0]
    if not all(t.is_meta and t.dim() == first.dim() for t in tensors):
        return None
    formats = {_format(t) for t in tensors}
    if None in formats:
        return None
    (layout,) = formats if len(formats) == 1 else (torch.contiguous_format,)
    shape = list(first.shape)
    shape[axis] = sum(t.shape[axis] for t in tensors)
    rest = shape[:axis] + shape[axis:][1:]
    if any([*t.shape[:axis], *t.shape[axis:][1:]] != rest for t in tensors):
        return None  # which torch refuses, or was told of an empty one
    dtype = func([_sample(t) for t in tensors]).dtype
    return torch.empty(shape, dtype=dtype, device=META, memory_format=layout)


_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _format(tensor: Tensor) -> torch.memory_format | None:
    """How a picture or video is laid out; None where that takes a closer look."""
    if tensor.is_contiguous():
        return torch.contiguous_format
    last = _LAST.get(tensor.dim())
    if last is None or tensor.stride(1) != 1:
        return torch.contiguous_format
    return last if tensor.is_contiguous(memory_format=last) else None


def _stacked(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """`stack` before the first axis."""
    tensors = args[0]
    first = tensors[0]
    if (args[1:] or kwargs.get("dim", 0)) not in ((), (0,), 0):
        return None
    if any(t.shape != first.shape or t.dtype != first.dtype for t in tensors):
        return None
    if not all(t.is_meta for t in tensors) or (first.dim() > 2 and not first.is_contiguous()):
        return None
    return torch.empty((len(tensors), *first.shape), dtype=first.dtype, device=META)


def _norm(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """`linalg_vector_norm` over axes that are kept."""
    x, _, axes, kept = (*args, None, None, None)[:4]
    dtype = kwargs.get("dtype") or x.dtype
    if not x.is_meta or not kept or axes is None or kwargs.keys() - {"dtype"}:
        return None
    if not x.is_floating_point() or not dtype.is_floating_point:
        return None
    if torch.promote_types(x.dtype, dtype) != dtype:
        return None  # a narrower one, which torch refuses
    away = {axis % x.dim() for axis in axes}
    shape = [1 if i in away else size for i, size in enumerate(x.shape)]
    return torch.empty(shape, dtype=dtype, device=META)


def _counted(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """`arange` of whole numbers."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    if device is None or torch.device(device).type != "meta":
        return None
    if not all(type(a) is int for a in args) or 0 in args[2:]:
        return None
    return torch.empty(len(range(*args)), dtype=dtype or torch.int64, device=META)


def _linear(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    x, weight, *_ = args
    if not (x.is_meta and weight.is_meta and x.dtype == weight.dtype and weight.dim() == 2):
        return None
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return None  # which torch refuses
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=META)


def _added_product(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """`addmm`."""
    bias, x, y = args
    if kwargs or not (x.is_meta and y.is_meta and bias.dtype == x.dtype == y.dtype):
        return None
    if x.shape[1] != y.shape[0] or bias.shape not in (y.shape[1:], (x.shape[0], y.shape[1])):
        return None
    return torch.empty(x.shape[0], y.shape[1], dtype=x.dtype, device=META)


def _mean(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """`mean` over axes, of a tensor that is not permuted."""
    x, axes, kept = (*args, False)[:3]
    if kwargs or not axes or not x.is_meta or not x.is_contiguous() or not x.is_floating_point():
        return None
    away = {axis % x.dim() for axis in axes}
    shape = [1 if i in away else n for i, n in enumerate(x.shape) if kept or i not in away]
    return torch.empty(shape, dtype=x.dtype, device=META)


_SHORTCUTS: dict[Any, Callable[..., Tensor | None]] = {
    torch.ops.aten.linear.default: _linear,
    torch.ops.aten.addmm.default: _added_product,
    torch.ops.aten.mean.dim: _mean,
    torch.ops.aten.cat.default: _joined,
    torch.ops.aten.stack.default: _stacked,
    torch.ops.aten.arange.default: _counted,
    torch.ops.aten.arange.start: _counted,
    torch.ops.aten.arange.start_step: _counted,
    torch.ops.aten.linalg_vector_norm.default: _norm,
}


def _sample(tensor: Tensor) -> Tensor:
    if not tensor.is_meta:
        return tensor  # a number, on the host
    shape = (0,) if tensor.dim() else ()
    return torch.ones(shape, dtype=tensor.dtype, device="cpu")
