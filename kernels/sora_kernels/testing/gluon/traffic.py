"""What the Hopper kernel's order of work items makes its keys and values cost in memory traffic."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from sora_kernels.attention.plan import plan_tiles
from sora_kernels.testing import offsets
from sora_kernels.testing.gluon.language import Emulator, kernel_source, load_kernel
from sora_kernels.testing.gluon.registers import Array, Pointer, Scalar

H100_PROCESSORS = 132
H100_L2_BYTES = 50 * 1000 * 1000  # NVIDIA H100 Tensor Core GPU architecture, 2022


def items_of(
    lengths: Sequence[int], heads: int, source: str | None = None
) -> list[tuple[int, int, int]]:
    """For each work item in the kernel's own order: its head, its first key and its last."""
    module = load_kernel(source or kernel_source(), "emulated_order", Emulator())
    cu = offsets(lengths)
    table = plan_tiles(cu, sum(lengths), module.BLOCK_M)
    tiles, starts = Pointer(Array(table)), Pointer(Array(cu))
    found = []
    for item in range(len(table) * heads):
        decoded = module.decode(Scalar(item), Scalar(len(table)), tiles, starts, starts)
        _, head, _, _, k_first, k_last, _ = decoded
        found.append((int(head), int(k_first), int(k_last)))
    return found


def bytes_from_memory(
    items: Sequence[tuple[int, int, int]],
    block_bytes: int,
    *,
    block: int = 128,
    processors: int = H100_PROCESSORS,
    cache_bytes: int = H100_L2_BYTES,
) -> int:
    """Bytes of keys and values that come from memory, and not from the second-level cache.

    The programs of a persistent grid go in step: each holds one item, and all ask for one block of
    keys and values (`block` tokens, `block_bytes` together) at a time. The cache keeps what was
    used last, and holds nothing else.
    """
    kept: OrderedDict[tuple[int, int], None] = OrderedDict()
    room, misses = cache_bytes // block_bytes, 0
    for start in range(0, len(items), processors):
        held = set(items[start : start + processors])
        longest = max(last - first for _, first, last in held)
        for at in range(0, longest, block):
            for head, first, last in held:
                if at >= last - first:
                    continue
                key = (head, first + at)
                if key in kept:
                    kept.move_to_end(key)
                    continue
                misses += 1
                kept[key] = None
                if len(kept) > room:
                    kept.popitem(last=False)
    return misses * block_bytes
