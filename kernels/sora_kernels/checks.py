"""Checks that ops share. Each raises a ValueError that names the value.

Metadata checks never read a tensor's data, so they cost no synchronisation and can be traced.
`check_*_values` read data and are for tensors on the CPU; for tensors elsewhere they do nothing,
because reading them would wait for the device.
"""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INDICES = (torch.int32, torch.int64)
MAX_HEAD_DIM = 256


def shape_of(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)


def check_float(op: str, name: str, tensor: torch.Tensor, like: torch.Tensor | None = None) -> None:
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{op}: {name} is {tensor.dtype}; it must be one of {FLOATS}")
    if like is not None and tensor.dtype != like.dtype:
        raise ValueError(f"{op}: {name} is {tensor.dtype} beside {like.dtype}; they must be equal")


def check_device(op: str, like: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != like.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}, the other tensors on {like.device}"
            )


def check_packed_heads(op: str, name: str, tensor: torch.Tensor) -> None:
    """`tensor` is `[tokens, heads, head_dim]` with 1 <= head_dim <= 256."""
    if tensor.dim() != 3:
        raise ValueError(
            f"{op}: {name} has shape {shape_of(tensor)}; [tokens, heads, head_dim] is due"
        )
    if not 1 <= tensor.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(
            f"{op}: head_dim {tensor.shape[2]} of {name}; 1 to {MAX_HEAD_DIM} is supported"
        )
    if tensor.shape[1] < 1:
        raise ValueError(f"{op}: {name} has shape {shape_of(tensor)}, so no heads")


def check_packed_channels(op: str, name: str, tensor: torch.Tensor) -> None:
    """`tensor` is `[tokens, channels]` with at least one channel."""
    if tensor.dim() != 2 or tensor.shape[1] < 1:
        raise ValueError(f"{op}: {name} has shape {shape_of(tensor)}; [tokens, channels] is due")


def check_vector(op: str, name: str, tensor: torch.Tensor | None, length: int) -> None:
    if tensor is None:
        return
    check_float(op, name, tensor)
    if tensor.dim() != 1 or tensor.shape[0] != length:
        raise ValueError(f"{op}: {name} has shape {shape_of(tensor)}; [{length}] is due")


def check_kind(op: str, kind: str, bias: torch.Tensor | None) -> None:
    if kind not in ("layer", "rms"):
        raise ValueError(f"{op}: kind {kind!r}; 'layer' and 'rms' are known")
    if kind == "rms" and bias is not None:
        raise ValueError(f"{op}: kind 'rms' takes no bias")


def check_rows(
    op: str, x: torch.Tensor, index: torch.Tensor | None, **tables: torch.Tensor | None
) -> None:
    """Modulation `tables` are `[rows, channels]`; `index [tokens]` picks each token's row.

    Without `index` there is one row for all tokens, or one for each.
    """
    tokens, channels = x.shape
    rows: int | None = None
    for name, table in tables.items():
        if table is None:
            continue
        check_float(op, name, table)
        if table.dim() != 2 or table.shape[1] != channels:
            raise ValueError(f"{op}: {name} has shape {shape_of(table)}; [rows, {channels}] is due")
        if rows is not None and table.shape[0] != rows:
            raise ValueError(f"{op}: {name} has {table.shape[0]} rows, the table before it {rows}")
        rows = table.shape[0]
    if index is None:
        if rows is not None and rows not in (1, tokens):
            raise ValueError(f"{op}: {rows} modulation rows for {tokens} tokens need an index")
        return
    if index.dtype not in INDICES or index.dim() != 1 or index.shape[0] != tokens:
        raise ValueError(
            f"{op}: index is {index.dtype} {shape_of(index)}; int32 or int64 [{tokens}] is due"
        )


def check_row_values(op: str, index: torch.Tensor | None, *tables: torch.Tensor | None) -> None:
    """`index` stays within the tables' rows (CPU alone; device kernels clamp)."""
    if index is None or index.device.type != "cpu" or index.numel() == 0:
        return
    rows = next((table.shape[0] for table in tables if table is not None), None)
    if rows is None:
        return
    low, high = (int(bound) for bound in torch.aminmax(index))
    if low < 0 or high >= rows:
        raise ValueError(f"{op}: index runs from {low} to {high}; there are {rows} modulation rows")


def check_cu_seqlens(op: str, name: str, cu_seqlens: torch.Tensor) -> None:
    if cu_seqlens.dtype not in INDICES or cu_seqlens.dim() != 1:
        raise ValueError(
            f"{op}: {name} is {cu_seqlens.dtype} {shape_of(cu_seqlens)}; "
            "int32 or int64 [segments + 1] is due"
        )
    if cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{op}: {name} has shape {shape_of(cu_seqlens)}, an empty batch; [segments + 1] of one "
            "segment or more is due"
        )


def check_offsets(op: str, name: str, offsets: list[int], tokens: int, longest: int) -> None:
    """Offsets start at 0, never fall, end at `tokens`, and no segment is longer than `longest`."""
    if offsets[0] != 0 or offsets[-1] != tokens:
        raise ValueError(
            f"{op}: {name} runs from {offsets[0]} to {offsets[-1]}; 0 to {tokens} tokens is due"
        )
    for i in range(len(offsets) - 1):
        length = offsets[i + 1] - offsets[i]
        if length < 0:
            raise ValueError(f"{op}: {name} falls from {offsets[i]} to {offsets[i + 1]} at {i + 1}")
        if length > longest:
            raise ValueError(
                f"{op}: segment {i} of {name} has {length} tokens, its max_seqlen says {longest}"
            )
