"""Rewrites the launch table from measurements on this machine's GPU.

`python -m sora_kernels.tune` times every candidate for each op and head_dim on shapes of video
models, leaves out those that spill, and writes the fastest into `launch.json` under this GPU's
architecture. It is run once for a kind of GPU; no request ever tunes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sora_kernels import launch, replay

OPS = tuple(launch.KINDS)


def candidates(op: str, key: str) -> Iterator[Any]:
    """What is tried for an entry, the present one aside."""
    if op == "packed_attention":
        size, _ = (int(part) for part in key.split("x"))
        queries, keys = ((32, 64, 128),) * 2 if size == 2 else ((16, 32, 64), (16, 32))
        for m, n in itertools.product(queries, keys):
            for warps, stages in itertools.product((4, 8), (1, 2, 3)):
                yield launch.Launch(m, n, warps, stages)
    elif op == "invariant_linear":
        blocks = (64, 128, 256) if key == "2" else (32, 64)
        for m, n, k in itertools.product(blocks[:2], blocks, (32, 64)):
            for warps, stages in itertools.product((4, 8), (2, 3, 4)):
                yield launch.MatmulLaunch(m, n, k, warps, stages)
    elif op in ("lora_linear", "quant_linear"):
        for m, n, k in itertools.product((32, 64, 128), (32, 64, 128), (32, 64)):
            for warps, stages in itertools.product((4, 8), (2, 3)):
                yield launch.MatmulLaunch(m, n, k, warps, stages)
    elif op in ("windowed_attention", "temporal_attention"):
        for tokens, warps, stages in itertools.product((16, 32, 64), (4, 8), (1, 2, 3)):
            yield launch.TileLaunch(tokens, warps, stages)
    else:
        for warps in (1, 2, 4, 8, 16):
            yield launch.RowLaunch(warps)


def workload(op: str, key: str, device: torch.device) -> Callable[[], object]:
    """A call of the op by its Triton kernel, at the size of a short video."""
    import sora_kernels as sk

    def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    if op in ("norm_modulate", "qk_norm_rope"):
        elements = int(key)
        tokens = (1 << 26) // elements
        if op == "norm_modulate":
            channels = elements if elements >= 2048 else elements // 4
            x, table = randn(tokens, channels), randn(1, channels, dtype=torch.float32)
            return lambda: sk.norm_modulate(x, table, table, backend="triton")
        q = randn(tokens, max(1, elements // 128), min(128, elements))
        angle = randn(tokens, q.shape[-1] // 2, dtype=torch.float32)
        return lambda: sk.qk_norm_rope(
            q, None, None, None, angle, angle, across_heads=True, backend="triton"
        )
    if op == "invariant_linear":
        dtype = torch.bfloat16 if key == "2" else torch.float32
        x, weight = randn(20_280, 1536, dtype=dtype), randn(8960, 1536, dtype=dtype)
        return lambda: sk.invariant_linear(x, weight, backend="triton")
    if op == "quant_linear":
        dtype = torch.bfloat16 if key == "2" else torch.float32
        x = randn(20_280, 1536, dtype=dtype)
        weight = torch.randint(0, 60, (8960, 864), device=device, dtype=torch.uint8)
        return lambda: sk.quant_linear(x, weight, format="Q4_K", backend="triton")
    if op == "lora_linear":
        dtype = torch.bfloat16 if key == "2" else torch.float32
        x, base = randn(20_280, 1536, dtype=dtype), randn(20_280, 1536, dtype=dtype)
        down, up = randn(32, 1536, dtype=dtype), randn(1536, 32, dtype=dtype)
        halves = [(0, 10_140), (10_140, 20_280)]
        return lambda: sk.lora_linear(
            x, base, [down, down], [up, up], halves, [1.0, 0.5], backend="triton"
        )
    size, width = (int(part) for part in key.split("x"))
    dtype = torch.bfloat16 if size == 2 else torch.float32
    grid = (13, 30, 52)
    tokens = grid[0] * grid[1] * grid[2]
    q, k, v = (randn(tokens, 12, width, dtype=dtype) for _ in range(3))
    cu = torch.tensor([0, tokens], device=device, dtype=torch.int32)
    if op == "packed_attention":
        # Two segments of unequal length take the table of tiles, as packed requests do.
        cu = torch.tensor([0, tokens // 3, tokens], device=device, dtype=torch.int32)
        most = tokens - tokens // 3
        return lambda: sk.packed_attention(
            q, k, v, cu, cu, max_seqlen_q=most, max_seqlen_k=most, backend="triton"
        )
    if op == "temporal_attention":
        return lambda: sk.temporal_attention(q, k, v, [grid], backend="triton")
    return lambda: sk.windowed_attention(q, k, v, cu, [grid], (5, 13, 13), backend="triton")


def spills(op: str, arch: int, key: str) -> bool:
    """Whether the entry now in the table spills or takes too much shared memory."""
    from sora_kernels import aot

    builds = [build for build in aot.builds(arch) if build.entry == (op, key)]
    return any(aot.faults(build.key, aot.resources(build)) for build in builds)


def milliseconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=50, return_mode="median"))


def tune_entry(
    table: launch.Table,
    op: str,
    arch: int,
    key: str,
    time: Callable[[], float],
    spilled: Callable[[], bool],
    report: Callable[[str], None],
) -> None:
    """Set the table's entry to the fastest candidate; it stays as it is where none is faster.

    `table` is the one that kernels read, so `time` and `spilled` see the candidate in it.
    """
    entries = table[op][arch]
    best = entries[key]
    fastest = time()
    report(f"{op} sm_{arch} {key}: {best} {fastest:.3f} ms")
    for candidate in candidates(op, key):
        if candidate == best:
            continue
        kept, entries[key] = entries[key], candidate
        replay.forget()
        try:
            took = time()
            better = took < 0.98 * fastest and not spilled()
        except Exception as error:  # out of resources, or shapes that the compiler refuses
            report(f"  {candidate}: {type(error).__name__}")
            better = False
        if better:
            report(f"  {candidate}: {took:.3f} ms")
            best, fastest = candidate, took
        else:
            entries[key] = kept
    entries[key] = best
    replay.forget()


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or 1 where there is no GPU that Triton can use."""
    parser = argparse.ArgumentParser(prog="sora_kernels.tune", description=__doc__)
    parser.add_argument("--op", action="append", choices=OPS, help="an op to tune (default: all)")
    parser.add_argument("--output", type=Path, default=launch.FILE, help="the table to write")
    parser.add_argument("--dry-run", action="store_true", help="say what would be tried")
    options = parser.parse_args(arguments)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else None
    if device is None and not options.dry_run:
        print("tuning needs an NVIDIA GPU; --dry-run says what would be tried", file=sys.stderr)
        return 1
    arch = 90 if device is None else launch.architecture(device)
    table = launch.table()
    for op in options.op or OPS:
        # An architecture that borrows an older one's entries gets its own.
        table[op].setdefault(arch, dict(launch.entries(op, arch)))
        for key in list(table[op][arch]):
            if device is None:
                count = sum(1 for _ in candidates(op, key))
                print(f"{op} sm_{arch} {key}: {count} candidates")
                continue
            call = workload(op, key, device)
            tune_entry(
                table,
                op,
                arch,
                key,
                lambda call=call: milliseconds(call),  # type: ignore[misc]
                lambda op=op, key=key: spills(op, arch, key),  # type: ignore[misc]
                lambda line: print(line, flush=True),
            )
            launch.write(table, options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
