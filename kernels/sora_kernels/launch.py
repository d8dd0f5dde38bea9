"""Launch parameters of the Triton kernels, from a table: nothing is tuned on a request.

`launch.json` holds them. Its keys are op, architecture, and `<element bytes>x<head_dim>` (head_dim
rounded up to a power of two), for the ops on rows `<elements a program>`, or for products
`<element bytes>`. An architecture without a table of its own uses that of the nearest older one; a
width without an entry is one where every tile that was tried spills. `python -m sora_kernels.tune`
rewrites the file.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

FILE = Path(__file__).with_name("launch.json")
INTERPRETED = 0  # the "architecture" of TRITON_INTERPRET=1: small tiles, so that tails are met
WIDTHS = (16, 32, 64, 128, 256)
ROW_ELEMENTS = tuple(1 << power for power in range(9, 15))  # 512 to 16,384


class Launch(NamedTuple):
    """Packed attention: tiles in queries and keys, warps, stages of the software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class TileLaunch(NamedTuple):
    """Windowed and temporal attention: tokens a tile (of queries, and of keys), warps, stages."""

    tokens: int
    num_warps: int
    num_stages: int


class MatmulLaunch(NamedTuple):
    """A product: tiles in rows, columns and what is summed over, warps, stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class RowLaunch(NamedTuple):
    """Ops on rows: warps of a program that holds so many elements."""

    num_warps: int


KINDS: Mapping[str, Callable[..., Any]] = {
    "packed_attention": Launch,
    "windowed_attention": TileLaunch,
    "temporal_attention": TileLaunch,
    "invariant_linear": MatmulLaunch,
    "lora_linear": MatmulLaunch,
    "quant_linear": MatmulLaunch,
    "norm_modulate": RowLaunch,
    "qk_norm_rope": RowLaunch,
}
_INTERPRETED: Mapping[str, Any] = {
    "packed_attention": Launch(32, 16, 4, 1),
    "windowed_attention": TileLaunch(32, 4, 1),
    "temporal_attention": TileLaunch(64, 4, 1),
    "invariant_linear": MatmulLaunch(16, 32, 32, 4, 1),
    "lora_linear": MatmulLaunch(16, 32, 32, 4, 1),
    "quant_linear": MatmulLaunch(16, 32, 32, 4, 1),
    "norm_modulate": RowLaunch(4),
    "qk_norm_rope": RowLaunch(4),
}


Table = dict[str, dict[int, dict[str, Any]]]


def read(file: Path = FILE) -> Table:
    """The table as op -> architecture -> key -> parameters."""
    table: Table = {}
    for op, architectures in json.loads(file.read_text()).items():
        table[op] = {
            int(arch.removeprefix("sm_")): {
                key: KINDS[op](**parameters) for key, parameters in entries.items()
            }
            for arch, entries in architectures.items()
        }
    return table


def write(table: Table, file: Path = FILE) -> None:
    """An entry a line, sorted, so that a tuning reads well as a diff."""

    def number(key: str) -> list[int]:
        return [int(part) for part in key.split("x")]

    ops = []
    for op, architectures in sorted(table.items()):
        groups = []
        for arch, entries in sorted(architectures.items()):
            lines = [
                f"   {json.dumps(key)}: {json.dumps(entries[key]._asdict())}"
                for key in sorted(entries, key=number)
            ]
            groups.append(f'  "sm_{arch}": {{\n' + ",\n".join(lines) + "\n  }")
        ops.append(f" {json.dumps(op)}: {{\n" + ",\n".join(groups) + "\n }")
    file.write_text("{\n" + ",\n".join(ops) + "\n}\n")


@functools.cache
def table() -> Table:
    return read()


def architecture(device: torch.device) -> int:
    """sm_90 as 90; 0 for the CPU, where Triton kernels run interpreted."""
    if device.type != "cuda":
        return INTERPRETED
    return _cuda_architecture(device.index)


@functools.cache
def _cuda_architecture(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def entries(op: str, arch: int) -> dict[str, Any]:
    """An op's entries for an architecture, its own or the nearest older one's."""
    known = table()[op]
    return known[max((key for key in known if key <= arch), default=min(known))]


def key_of(dtype: torch.dtype, width: int) -> str:
    return f"{dtype.itemsize}x{width}"


def find(op: str, arch: int, dtype: torch.dtype, width: int) -> Any:
    """An attention kernel's parameters for a head_dim padded to `width`, or None."""
    if arch == INTERPRETED:
        return _INTERPRETED[op]
    return entries(op, arch).get(key_of(dtype, width))


def find_or_raise(op: str, arch: int, dtype: torch.dtype, width: int) -> Any:
    """As `find`. Raises ValueError where there are none, which is where every tile spills."""
    found = find(op, arch, dtype, width)
    if found is None:
        raise ValueError(f"{op}: no launch parameters for {dtype} head_dim {width} on sm_{arch}")
    return found


def matmul(op: str, arch: int, dtype: torch.dtype) -> MatmulLaunch:
    """A product's parameters: one set for all numbers of rows, which is what makes it the same."""
    if arch == INTERPRETED:
        return _INTERPRETED[op]
    return entries(op, arch)[str(dtype.itemsize)]


def row_warps(op: str, arch: int, elements: int) -> int:
    """Warps for a program of so many elements, a power of two."""
    if arch == INTERPRETED:
        return 4
    bounded = min(max(elements, ROW_ELEMENTS[0]), ROW_ELEMENTS[-1])
    return int(entries(op, arch)[str(bounded)].num_warps)


def has_tma(arch: int) -> bool:
    """Host tensor descriptors compile to TMA from Hopper on; the interpreter reads them too."""
    return arch >= 90


def norm_block(channels: int) -> tuple[int, int]:
    """Channels rounded up, and rows a program: several where rows are narrow."""
    block = 1 << (channels - 1).bit_length()
    return block, max(1, 2048 // block)
