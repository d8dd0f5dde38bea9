"""Fills a module's parameters from open weights, and says exactly what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

import torch
from torch import nn

from sora_engine.errors import CheckpointError
from sora_engine.io.mapped_file import Copies
from sora_engine.io.weights.merging import Merge
from sora_engine.io.weights.source import WeightSource


class Keep(Protocol):
    """Takes weights that stay as they are stored.

    copies: what it takes it puts in place untouched.
    """

    copies: bool

    def __call__(
        self,
        module: nn.Module,
        name: str,
        weights: WeightSource,
        source: str,
        *,
        device: torch.device | str,
        merge: Merge | None,
    ) -> bool:
        """Asked of each parameter, by its name in `module` and in the file: whether it has put the
        weight in place itself. merge: where adapters change it."""
        ...


def load_into(
    module: nn.Module,
    weights: WeightSource,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    rename: Callable[[str], str] | None = None,
    keep_fp32: Collection[str] = (),
    ignore: Collection[str] = (),
    tied: Mapping[str, str] | None = None,
    buffers: Mapping[str, torch.Tensor] | None = None,
    loose_ones: bool = False,
    shard: Callable[[nn.Module], Mapping[str, range]] | None = None,
    merge: Merge | None = None,
    keep: Keep | None = None,
) -> None:
    """Give `module`, built on the meta device, its parameters and persistent buffers.

    Each tensor goes straight to `device` as `dtype` (None: as stored), a few at a time, and
    replaces what the module had under its name. Integers keep their dtype.

    `rename` maps a name in the file to one in the module. `keep_fp32` lists parts of names (between
    dots) whose tensors become float32 whatever `dtype` is, as diffusers' `_keep_in_fp32_modules`.
    `ignore` lists parts of names that the file may have and the module need not. `tied` maps a name
    to that of the parameter it shares; the file may have either or both. `buffers` gives those that
    no file holds. `loose_ones` takes shapes that differ in axes of size 1 alone: a product's weight
    kept as a convolution's. `shard` makes the module one of several that share its weights out: it
    is called once the module has the dtypes that are wanted, still on the meta device, and tells
    for names whose parameters are now DTensors which rows of them this process has; no others are
    read.
    `merge` changes parameters as they are read, by the module's names. `keep` takes those that stay
    as they are stored.

    Raises `CheckpointError` for missing, unexpected and wrong-shape tensors, before anything is
    read, and leaves the module as it was.
    """
    tied = dict(tied or {})
    wanted = dict(module.state_dict(keep_vars=True))
    sources = _match(wanted, weights, rename or (lambda name: name), ignore, tied, loose_ones)

    rows: Mapping[str, range] = {}
    if shard is not None:
        for name, source in sources.items():
            stored = weights.info(source).dtype
            own_dtype = _target(name, stored, dtype, keep_fp32) or stored
            _assign(module, name, wanted[name].to(own_dtype), wanted[name])
        rows = shard(module)
        wanted = dict(module.state_dict(keep_vars=True))
    order = {name: position for position, name in enumerate(weights)}

    def give(name: str, source: str) -> None:
        stored = weights.info(source).dtype
        target = _target(name, stored, dtype, keep_fp32)
        own = rows.get(name)
        changes = merge if merge is not None and name in merge else None
        if keep is not None and keep(module, name, weights, source, device=device, merge=changes):
            return
        if changes is not None:
            value = changes.read(name, weights, source, device=device, dtype=target, rows=own)
        else:
            value = weights.read(source, device=device, dtype=target, rows=own)
        if own is None:
            if loose_ones:
                value = value.reshape(wanted[name].shape)
            _assign(module, name, value, wanted[name])
        else:
            sharded: Any = wanted[name]
            sharded.to_local().copy_(value)

    def way(name: str, source: str) -> AbstractContextManager[None]:
        """Behind, where nobody looks yet at what the file's bytes become."""
        if rows or (merge is not None and name in merge) or (keep is not None and not keep.copies):
            return nullcontext()
        if keep is not None and weights.kept_format(source) is not None:
            return copies.behind(kept=True)
        stored = weights.info(source)
        target = _target(name, stored.dtype, dtype, keep_fp32)
        # Beside weights that are kept, others are few: what is converted is so on this thread.
        wanted_so = keep is not None or target in (None, stored.dtype)
        return copies.behind() if stored.is_plain and wanted_so else nullcontext()

    with Copies() as copies:
        for name, source in sorted(sources.items(), key=lambda item: order[item[1]]):
            with way(name, source):
                give(name, source)
    for alias, name in tied.items():
        owner, leaf = _owner(module, alias)
        setattr(owner, leaf, module.get_parameter(name))
    for name, value in (buffers or {}).items():
        owner, leaf = _owner(module, name)
        owner._buffers[leaf] = value.to(device)
    left = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    if left and torch.device(device).type != "meta":
        raise ValueError(f"buffers {left} are in no file; pass them in `buffers`")


def _target(
    name: str, stored: torch.dtype, dtype: torch.dtype | None, keep_fp32: Collection[str]
) -> torch.dtype | None:
    """The dtype that a tensor is read as; None: as stored."""
    if dtype is None or not stored.is_floating_point:
        return None
    return torch.float32 if _has_part(name, keep_fp32) else dtype


def _match(
    wanted: Mapping[str, torch.Tensor],
    weights: WeightSource,
    rename: Callable[[str], str],
    ignore: Collection[str],
    tied: Mapping[str, str],
    loose_ones: bool,
) -> dict[str, str]:
    """Map each name of the module to one of the file, or raise."""
    sources: dict[str, str] = {}
    unexpected = []
    for source in weights:
        name = rename(source)
        if name in sources:
            raise CheckpointError(
                f"tensors {sources[name]!r} and {source!r} are both {name!r}",
                path=weights.path_of(source),
                tensor=source,
            )
        if name in wanted:
            sources[name] = source
        elif not _has_part(name, ignore):
            unexpected.append(source)
    for alias, name in tied.items():
        if alias in sources:
            source = sources.pop(alias)
            sources.setdefault(name, source)
    missing = [name for name in wanted if name not in sources and name not in tied]

    # A wrong name shows up on both sides, so one message tells both.
    complaints = []
    if missing:
        complaints.append(f"missing tensors: {_some(missing)}")
    if unexpected:
        complaints.append(f"unexpected tensors: {_some(unexpected)}")
    if complaints:
        first = unexpected[0] if unexpected else missing[0]
        path = weights.path_of(unexpected[0]) if unexpected and not missing else weights.path
        raise CheckpointError("; ".join(complaints), path=path, tensor=first)

    for name, source in sources.items():
        info, tensor = weights.info(source), wanted[name]
        called = source if source == name else f"{source} ({name})"
        if not _same_shape(info.shape, tuple(tensor.shape), loose_ones):
            raise CheckpointError(
                f"tensor {called} has shape {list(info.shape)}, the model has {list(tensor.shape)}",
                path=weights.path_of(source),
                tensor=source,
            )
        if info.dtype.is_floating_point != tensor.dtype.is_floating_point:
            raise CheckpointError(
                f"tensor {called} has dtype {info.dtype}, the model has {tensor.dtype}",
                path=weights.path_of(source),
                tensor=source,
            )
    return sources


def _same_shape(stored: tuple[int, ...], own: tuple[int, ...], loose_ones: bool) -> bool:
    if not loose_ones:
        return stored == own
    return [n for n in stored if n != 1] == [n for n in own if n != 1]


def _assign(module: nn.Module, name: str, value: torch.Tensor, old: torch.Tensor) -> None:
    owner, leaf = _owner(module, name)
    if isinstance(old, nn.Parameter):
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=old.requires_grad)
    else:
        owner._buffers[leaf] = value


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return submodule(module, path), leaf


def submodule(module: nn.Module, path: str) -> nn.Module:
    """`module.get_submodule(path)` of one that is there, in a tenth of its time."""
    for part in path.split(".") if path else ():
        module = cast(nn.Module, module._modules[part])
    return module


def _has_part(name: str, parts: Collection[str]) -> bool:
    return any(part in parts for part in name.split("."))


def _some(names: list[str], limit: int = 6) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
