"""Launch parameters of the Triton kernels, from a table: nothing is tuned on a request.

Keys are (op, element bytes, head_dim rounded up to a power of two). An architecture without a table
of its own uses the one of the nearest older architecture.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Launch:
    """Tile sizes in queries and keys, warps, and stages of the software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


INTERPRETED = 0  # the "architecture" of TRITON_INTERPRET=1: small tiles, so that tails are met

# fp32 as three tf32 products. Wider heads spill at every tile that was tried, so they are left to
# SDPA.
FP32 = {
    (4, 16): Launch(32, 32, 4, 2),
    (4, 32): Launch(32, 32, 4, 2),
    (4, 64): Launch(32, 32, 8, 1),
}

ATTENTION: dict[int, dict[tuple[int, int], Launch]] = {
    INTERPRETED: {
        (size, width): Launch(32, 16, 4, 1) for size in (2, 4) for width in (16, 32, 64, 128, 256)
    },
    80: {
        (2, 16): Launch(128, 64, 4, 3),
        (2, 32): Launch(128, 64, 4, 3),
        (2, 64): Launch(128, 64, 4, 3),
        (2, 128): Launch(128, 64, 8, 2),
        (2, 256): Launch(32, 32, 8, 1),
        **FP32,
    },
    90: {
        (2, 16): Launch(128, 128, 8, 3),
        (2, 32): Launch(128, 128, 8, 3),
        (2, 64): Launch(128, 128, 8, 3),
        (2, 128): Launch(128, 128, 8, 2),
        (2, 256): Launch(128, 32, 8, 1),
        **FP32,
    },
    # Blackwell as Hopper, without the width that spills there.
    100: {
        (2, 16): Launch(128, 128, 8, 3),
        (2, 32): Launch(128, 128, 8, 3),
        (2, 64): Launch(128, 128, 8, 3),
        (2, 128): Launch(128, 128, 8, 2),
        **FP32,
    },
    # 99 KB of shared memory, and matrix products that keep their accumulators in registers.
    120: {
        (2, 16): Launch(128, 64, 4, 3),
        (2, 32): Launch(128, 64, 4, 3),
        (2, 64): Launch(128, 64, 4, 3),
        (2, 128): Launch(128, 64, 8, 2),
        (2, 256): Launch(32, 32, 8, 1),
        **FP32,
    },
}


def architecture(device: torch.device) -> int:
    """sm_90 as 90; 0 for the CPU, where Triton kernels run interpreted."""
    if device.type != "cuda":
        return INTERPRETED
    return _cuda_architecture(device.index)


@functools.cache
def _cuda_architecture(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def attention_table(arch: int) -> dict[tuple[int, int], Launch]:
    return ATTENTION[max(key for key in ATTENTION if key <= arch)]


def attention_launch(arch: int, dtype: torch.dtype, width: int) -> Launch:
    """The parameters of packed attention for a head_dim padded to `width`.

    Raises ValueError where the architecture has none, which is where every tile spills.
    """
    found = attention_table(arch).get((dtype.itemsize, width))
    if found is None:
        raise ValueError(f"no launch parameters for {dtype} head_dim {width} on sm_{arch}")
    return found


def has_tma(arch: int) -> bool:
    """Host tensor descriptors compile to TMA from Hopper on; the interpreter reads them too."""
    return arch >= 90


def row_launch(channels: int) -> dict[str, Any]:
    """For kernels that hold whole rows: about 16 values a thread, several rows for narrow ones."""
    import triton

    block = triton.next_power_of_2(channels)
    rows = max(1, 2048 // block)
    warps = min(16, max(1, rows * block // 512))
    return {"BLOCK": block, "ROWS": rows, "num_warps": warps}
