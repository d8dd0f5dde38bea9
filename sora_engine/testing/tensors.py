"""Tensors of a shadow device, and what each operation on them is there."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sora_engine.testing.crossings import TO_DEVICE, TO_HOST
from sora_engine.testing.state import Shadow, active

# What hands the host a value or a size that only the device knows.
_READS = {
    "aten::_local_scalar_dense": "item",
    "aten::nonzero": "nonzero",
    "aten::masked_select": "masked_select",
    "aten::equal": "equal",
    "aten::is_nonzero": "is_nonzero",
    "aten::_unique2": "unique",
    "aten::unique_dim": "unique",
    "aten::unique_consecutive": "unique_consecutive",
    "aten::bincount": "bincount",
}
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
# Composite operations that are one launch, or one that their parts would not show.
_WHOLE = {
    "aten::linear",
    "aten::matmul",
    "aten::einsum",
    "aten::conv2d",
    "aten::conv3d",
    "aten::conv_transpose2d",
    "aten::scaled_dot_product_attention",
}


def _addmm_activation(
    bias: Tensor, x: Tensor, weight: Tensor, *, use_gelu: bool = False, **scales: Any
) -> Tensor:
    """cuBLAS has the tanh form of GELU where torch on a CPU has the exact one."""
    out = torch.addmm(bias, x, weight, **scales)
    return torch.nn.functional.gelu(out, approximate="tanh") if use_gelu else out.relu()


_AS_ON_CUDA = {"aten::_addmm_activation": _addmm_activation}
"""What CUDA computes otherwise than a CPU."""


class ShadowTensor(Tensor):
    """A tensor on a shadow device. `elem`: its values, on the CPU; `place`: where it says it is."""

    elem: Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, elem: Tensor, place: torch.device) -> ShadowTensor:
        # Whether values may be written is for `elem` to say; a view of one wrapper would not be an
        # inference tensor where that is none, and torch asks.
        with torch.inference_mode(False):
            made: ShadowTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                elem.size(),
                strides=elem.stride(),
                storage_offset=elem.storage_offset(),
                dtype=elem.dtype,
                layout=elem.layout,
                device=torch.device("meta"),
                requires_grad=False,
            )
        made.elem, made.place = elem, place
        return made

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"ShadowTensor({self.elem}, {self.place})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _run(active(), func, args, kwargs or {}, None)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        active().trace.cross(TO_HOST, "cpu()")
        return self.elem.clone()

    def tolist(self) -> Any:
        active().trace.cross(TO_HOST, "tolist()")
        return self.elem.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise TypeError(f"can't convert {self.place} device type tensor to numpy")

    def __array__(self, dtype: Any = None) -> np.ndarray:
        return self.numpy()

    def data_ptr(self) -> int:
        return self.elem.data_ptr()


def host(value: Any) -> Any:
    """The values of shadow tensors in any nest of containers, on the CPU, without a crossing."""
    return tree_map(lambda x: x.elem if isinstance(x, ShadowTensor) else x, value)


class _Dispatch(TorchDispatchMode):
    """Sends what makes tensors to the shadow device.

    meta_is: what the meta device stands for while a composite operation on a shadow tensor is taken
    apart, in which torch's C++ takes that tensor to be there.
    """

    def __init__(self, shadow: Shadow, meta_is: torch.device | None = None) -> None:
        super().__init__()
        self._shadow, self._meta_is = shadow, meta_is

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _run(self._shadow, func, args, kwargs or {}, self._meta_is)


class _Functions(TorchFunctionMode):
    """What torch answers before it dispatches: constructors from Python values, pinning."""

    def __init__(self, shadow: Shadow) -> None:
        super().__init__()
        self._shadow = shadow

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs, shadow = dict(kwargs or {}), self._shadow
        # A device's index is settled here: torch's C++ would ask a driver for the current one.
        place = shadow.place(kwargs.get("device"))
        if place is not None:
            kwargs["device"] = place
        if func is Tensor.cuda:
            func, args = Tensor.to, (args[0], kwargs.pop("device", "cuda"), *args[1:])
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], str | torch.device):
            args = (args[0], shadow.place(args[1]) or args[1], *args[2:])
        first = args[0] if args else None
        values = func in (torch.tensor, torch.as_tensor, torch.asarray)
        if values and place is not None and not isinstance(first, ShadowTensor):
            made = func(*args, **{**kwargs, "device": "cpu"})
            shadow.trace.cross(TO_DEVICE, f"{func.__name__}(values)")
            return ShadowTensor(made, place)
        if func is Tensor.new_tensor and isinstance(first, ShadowTensor):
            kwargs.setdefault("dtype", first.dtype)
            there = kwargs.pop("device", first.place)
            made = torch.tensor(*args[1:], **kwargs)
            if shadow.place(there) is None:
                return made.to(there)
            shadow.trace.cross(TO_DEVICE, "new_tensor(values)")
            return ShadowTensor(made, there)
        if func is Tensor.pin_memory:
            if isinstance(first, ShadowTensor):
                raise RuntimeError(f"cannot pin a tensor on {first.place}: only the host's can be")
            return shadow.pin(args[0])
        if func is Tensor.is_pinned:
            return not isinstance(first, ShadowTensor) and shadow.is_pinned(args[0])
        return func(*args, **kwargs)


def modes(shadow: Shadow) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What a thread enters, in this order, to make tensors on a shadow device. The one that made
    the device has done so; another one that does needs never leave them."""
    return _Functions(shadow), _Dispatch(shadow)


def _run(
    shadow: Shadow, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], meta_is: Any
) -> Any:
    """One operation, on tensors of which some may be on a shadow device."""
    name = func._schema.name
    leaves = tree_leaves((args, kwargs))
    places = {x.place for x in leaves if isinstance(x, ShadowTensor)}
    if name.startswith("sora::"):
        return _launch(shadow, func, args, leaves)
    if name == "aten::to":
        return _to(shadow, func, args, kwargs, meta_is)
    device, pinned = kwargs.get("device"), bool(kwargs.get("pin_memory"))
    if not places and (device is None or device.type == "cpu") and not pinned:
        return func(*args, **kwargs)
    if _is_composite(func):
        with _Dispatch(shadow, next(iter(places), meta_is)):
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
    if name == "aten::_to_copy":
        return _copied(shadow, args[0], kwargs, meta_is)
    if name == "aten::copy_":
        return _copy(shadow, *args, **kwargs)

    made_at = next(iter(places), None)
    if device is not None:
        made_at = meta_is if device.type == "meta" else shadow.place(device)
        if made_at is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
    if pinned:
        kwargs = {**kwargs, "pin_memory": False}
    _check_places(name, args, leaves, places)
    if places:
        _note_reads(shadow, func, name, args, kwargs)
    if made_at is not None:
        shadow.trace.launch(name)
    carry_out = _AS_ON_CUDA.get(name, func) if places else func
    out = carry_out(*host(args), **host(kwargs))
    if pinned:
        return shadow.pin(out)
    written = _written(func, args, kwargs)
    if written and isinstance(out, Tensor):
        assert written[0].shape == out.shape, f"{name} changed the shape of a shadow tensor"
        return written[0]
    if made_at is None:
        return out
    at = made_at
    return tree_map(lambda x: ShadowTensor(x, at) if type(x) is Tensor else x, out)


@functools.cache
def _is_composite(func: Any) -> bool:
    """Whether an operation is to be taken apart."""
    composite: bool = torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    )
    return composite and func._schema.name not in _WHOLE


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[ShadowTensor]:
    """The shadow tensors that an operation writes to and gives back."""
    given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
    return [
        given[argument.name]
        for argument in func._schema.arguments
        if argument.alias_info is not None
        and argument.alias_info.is_write
        and isinstance(given.get(argument.name), ShadowTensor)
    ]


def _check_places(name: str, args: Sequence[Any], leaves: Sequence[Any], places: set[Any]) -> None:
    """Raise where torch would: numbers without dimensions are all that may come from elsewhere."""
    if not places:
        return
    strangers = [
        x for x in leaves if isinstance(x, Tensor) and not isinstance(x, ShadowTensor) and x.dim()
    ]
    if name in _INDEXING:  # torch moves indices itself, and waits for it
        strangers = [x for x in strangers if not any(x is i for i in tree_leaves(args[1]))]
    if strangers or len(places) > 1:
        found = ", ".join(sorted({*map(str, places), *(str(x.device) for x in strangers)}))
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found {found} ({name})"
        )


def _note_reads(
    shadow: Shadow, func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Count what an operation on the device makes the host wait for."""
    if name in _READS:
        shadow.trace.cross(TO_HOST, _READS[name])
    elif name in _INDEXING:
        for index in tree_leaves(args[1]):
            if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                shadow.trace.cross(TO_HOST, "index by a mask (nonzero)")
            elif isinstance(index, Tensor) and not isinstance(index, ShadowTensor) and index.dim():
                shadow.trace.cross(TO_DEVICE, "index from the host")
    elif name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
        shadow.trace.cross(TO_HOST, "repeat_interleave without output_size")


def _launch(shadow: Shadow, func: Any, args: Sequence[Any], leaves: Sequence[Any]) -> Any:
    """An op of `sora_kernels`, whose Triton and CUDA kernels run on the current device."""
    name = func._schema.name
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    places = {x.device for x in tensors}
    if not any(isinstance(x, ShadowTensor) for x in tensors):
        return func(*args)
    if len(places) > 1:
        found = ", ".join(sorted(map(str, places)))
        raise RuntimeError(
            f"{name}: its tensors are on {found}; a kernel reads those of one device"
        )
    (place,) = places
    if place.index != shadow.current:
        raise RuntimeError(
            f"{name}: its tensors are on {place}, and cuda:{shadow.current} is current: the kernel "
            "would be launched there"
        )
    shadow.trace.launch(name)
    shadow.trace.dtypes[name, str(tensors[0].dtype)] += 1
    out = func(*host(args)[:-1], "reference")
    return tree_map(lambda x: ShadowTensor(x, place) if type(x) is Tensor else x, out)


def _to(
    shadow: Shadow, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], meta_is: Any
) -> Any:
    """`Tensor.to`, which copies nothing where nothing changes."""
    given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
    source, other = given["self"], given.get("other")
    options: dict[str, Any] = {"dtype": given.get("dtype"), "device": given.get("device")}
    options["memory_format"] = given.get("memory_format")
    if other is not None:
        options |= {"dtype": other.dtype, "device": other.device}
    options["non_blocking"] = given.get("non_blocking", False)
    same_place = options["device"] is None or _target(shadow, source, options, meta_is) == (
        source.device
    )
    same = same_place and options["dtype"] in (None, source.dtype)
    if same and not given.get("copy") and given.get("memory_format") is None:
        return source
    return _copied(shadow, source, options, meta_is)


def _target(
    shadow: Shadow, source: Tensor, options: Mapping[str, Any], meta_is: Any
) -> torch.device:
    """Where a copy goes. On the meta device is, to torch's C++, what is on a shadow device."""
    device = options.get("device")
    if device is None:
        return source.device
    if torch.device(device).type == "meta" and not source.is_meta:
        if isinstance(source, ShadowTensor):
            return source.place
        return meta_is or torch.device("cuda", shadow.current)
    return shadow.place(device) or torch.device(device)


def _copied(shadow: Shadow, source: Tensor, options: Mapping[str, Any], meta_is: Any) -> Tensor:
    """`_to_copy`."""
    target = _target(shadow, source, options, meta_is)
    values = host(source)
    if values.is_meta or target.type == "meta":
        return values.to(target, options.get("dtype"))
    layout = options.get("memory_format") or torch.preserve_format
    made = values.to(dtype=options.get("dtype") or values.dtype, copy=True, memory_format=layout)
    here = isinstance(source, ShadowTensor)
    if target.type != "cuda":
        if here:
            # Without waiting, torch copies into pinned memory.
            waits = not options.get("non_blocking")
            shadow.trace.cross(TO_HOST, "to(host)", waits=waits)
            return made if waits else shadow.pin(made)
        return made
    if not here:
        _note_upload(shadow, source, bool(options.get("non_blocking")), "to(device)")
    else:
        shadow.trace.launch("aten::_to_copy")
    return ShadowTensor(made, target)


def _copy(shadow: Shadow, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`copy_`."""
    host(target).copy_(host(source))
    to, of = isinstance(target, ShadowTensor), isinstance(source, ShadowTensor)
    if to and of:
        shadow.trace.launch("aten::copy_")
    elif to:
        _note_upload(shadow, source, non_blocking, "copy_")
    elif of:
        waits = not (non_blocking and shadow.is_pinned(target))
        shadow.trace.cross(TO_HOST, "copy_", waits=waits)
    return target


def _note_upload(shadow: Shadow, source: Tensor, non_blocking: bool, what: str) -> None:
    if source.numel():  # from pageable memory the host waits, whatever it asks for
        waits = not (non_blocking and shadow.is_pinned(source))
        shadow.trace.cross(TO_DEVICE, what, waits=waits)
