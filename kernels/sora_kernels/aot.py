"""Compiles the Triton kernels ahead of time, with no GPU, and reads what they take.

`python -m sora_kernels.aot --write FILE` writes the table of every kernel at every launch
configuration for sm_80, sm_90, sm_100 and sm_120; `--check FILE` compares. Compilation must not see
TRITON_INTERPRET, which is read when a kernel is decorated.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sora_kernels import launch

ARCHITECTURES = (80, 90, 100, 120)
# Shared memory that one block may take, in bytes (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Build:
    """One kernel at one configuration. `types` maps its run-time arguments to Triton's types."""

    name: str
    arch: int
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]

    @property
    def key(self) -> str:
        return f"{self.name}/sm_{self.arch}"


def _attention(arch: int, dtype: torch.dtype, width: int) -> Build:
    from sora_kernels.attention.triton import packed_attention_kernel

    name = _NAMES[dtype]
    parameters = launch.attention_launch(arch, dtype, width)
    tma = launch.has_tma(arch)
    blocks = {"q": parameters.block_m, "k": parameters.block_n, "v": parameters.block_n}
    types = {
        f"{operand}_source": f"tensordesc<{name}[{block},1,{width}]>" if tma else f"*{name}"
        for operand, block in blocks.items()
    }
    types |= {"out_ptr": f"*{name}", "lse_ptr": "*fp32"}
    types |= {f"{operand}_stride": "i32" for operand in "qkv"}
    types |= {f"{operand}_head_stride": "i32" for operand in "qkv"}
    types |= {"tiles_ptr": "*i32", "cu_q_ptr": "*i32", "cu_k_ptr": "*i32"}
    types |= {"q_len": "i32", "k_len": "i32", "heads": "i32", "head_dim": "i32", "scale2": "fp32"}
    constants = {
        "UNIFORM": False,
        "HAS_LSE": True,
        "TMA": tma,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
        "BLOCK_M": parameters.block_m,
        "BLOCK_N": parameters.block_n,
        "WIDTH": width,
    }
    options = {"num_warps": parameters.num_warps, "num_stages": parameters.num_stages}
    return Build(
        f"packed_attention/{name}/{width}", arch, packed_attention_kernel, types, constants, options
    )


def _norm(arch: int, channels: int, gated: bool) -> Build:
    from sora_kernels.modulate.triton import norm_rows

    types = {"x_ptr": "*bf16", "x_stride": "i32", "y_ptr": "*bf16"}
    types |= {"residual_ptr": "*fp32", "residual_stride": "i32", "residual_out_ptr": "*fp32"}
    for table in ("gate", "scale", "shift"):
        types |= {f"{table}_ptr": "*fp32", f"{table}_stride": "i32"}
    types |= {"index_ptr": "*i32", "table_rows": "i32", "weight_ptr": "*bf16", "bias_ptr": "*bf16"}
    types |= {"tokens": "i32", "channels": "i32", "eps": "fp32"}
    parameters = launch.row_launch(channels)
    options = {"num_warps": parameters.pop("num_warps")}
    flags = ("HAS_SCALE", "HAS_SHIFT", "HAS_INDEX")
    constants = dict.fromkeys(flags, True) | {"GATED": gated, "HAS_GATE": gated, "RMS": False}
    constants |= dict.fromkeys(("PER_TOKEN", "HAS_WEIGHT", "HAS_BIAS"), False) | parameters
    op = "gate_residual_norm_modulate" if gated else "norm_modulate"
    return Build(f"{op}/bf16/{channels}", arch, norm_rows, types, constants, options)


def _rope(arch: int, heads: int, width: int, across_heads: bool, interleaved: bool) -> Build:
    from sora_kernels.rope.triton import norm_rope_rows

    types = {"x_ptr": "*bf16", "token_stride": "i32", "head_stride": "i32", "y_ptr": "*bf16"}
    types |= {"weight_ptr": "*bf16", "cos_ptr": "*fp32", "cos_stride": "i32"}
    types |= {"sin_ptr": "*fp32", "sin_stride": "i32", "heads": "i32", "head_dim": "i32"}
    types |= {"eps": "fp32"}
    rows = 1 << (heads - 1).bit_length()
    constants: dict[str, Any] = {"ACROSS_HEADS": across_heads, "INTERLEAVED": interleaved}
    constants["HAS_WEIGHT"] = True
    constants |= {"ROTATE": True, "HEADS": rows, "WIDTH": width}
    options = {"num_warps": min(16, max(1, width * rows // 512))}
    form = ("across" if across_heads else "each") + ("" if interleaved else "-split")
    return Build(
        f"qk_norm_rope/bf16/{heads}x{width}/{form}", arch, norm_rope_rows, types, constants, options
    )


def _strided(dtype: torch.dtype) -> tuple[str, dict[str, str]]:
    """Types of q, k, v and out, and of the strides of q, k and v."""
    name = _NAMES[dtype]
    types = {f"{operand}_ptr": f"*{name}" for operand in ("q", "k", "v", "out")}
    types |= {f"{operand}_stride": "i32" for operand in "qkv"}
    return name, types | {f"{operand}_head_stride": "i32" for operand in "qkv"}


def _temporal(arch: int, dtype: torch.dtype, width: int, frames: int) -> Build:
    from sora_kernels.factorised.triton import temporal_attention_kernel, tile_tokens

    name, types = _strided(dtype)
    types |= dict.fromkeys(("first_token", "frames", "positions", "heads", "head_dim"), "i32")
    types |= {"scale2": "fp32"}
    sequences = tile_tokens(dtype, width) // frames
    constants: dict[str, Any] = {"PRECISION": "tf32x3" if dtype == torch.float32 else "tf32"}
    constants |= {"FRAMES": frames, "SEQUENCES": sequences, "WIDTH": width}
    key = f"temporal_attention/{name}/{width}/{frames}"
    options = {"num_warps": 4, "num_stages": 2}
    return Build(key, arch, temporal_attention_kernel, types, constants, options)


def _windowed(arch: int, dtype: torch.dtype, width: int) -> Build:
    from sora_kernels.windowed.triton import tile_shape, warps_of, windowed_attention_kernel

    name, types = _strided(dtype)
    types |= {"segments_ptr": "*i32", "tiles_ptr": "*i32", "blocks_ptr": "*i32"}
    types |= {"heads": "i32", "head_dim": "i32", "scale2": "fp32"}
    types |= {"reach_t": "i32", "reach_h": "i32", "reach_w": "i32"}
    t, h, w = tile_shape(arch, dtype, width)
    constants: dict[str, Any] = {"PRECISION": "tf32x3" if dtype == torch.float32 else "tf32"}
    constants |= {"TT": t, "TH": h, "TW": w, "WIDTH": width}
    options = {"num_warps": warps_of(arch, dtype, width), "num_stages": 2}
    return Build(
        f"windowed_attention/{name}/{width}",
        arch,
        windowed_attention_kernel,
        types,
        constants,
        options,
    )


def builds(arch: int) -> Iterator[Build]:
    """Every kernel at every configuration for one architecture."""
    for size, width in launch.attention_table(arch):
        yield _attention(arch, torch.bfloat16 if size == 2 else torch.float32, width)
    for dtype, width in ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64)):
        yield _temporal(arch, dtype, width, 16)
        yield _windowed(arch, dtype, width)
    for channels in (1536, 5120):
        yield _norm(arch, channels, gated=False)
        yield _norm(arch, channels, gated=True)
    for heads, width in ((12, 128), (40, 128)):
        yield _rope(arch, heads, width, across_heads=True, interleaved=True)
        yield _rope(arch, heads, width, across_heads=False, interleaved=False)


def _attributes(build: Build) -> dict[tuple[int, ...], list[list[Any]]]:
    """Pointers, strides and widths are multiples of 16, as they are in the models."""
    names = list(build.kernel.arg_names)
    aligned = ("*", "i32")
    loose = (
        *("tokens", "table_rows", "heads", "q_len", "k_len", "first_token", "frames", "positions"),
        *("reach_t", "reach_h", "reach_w"),
    )
    return {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in build.types.items()
        if kind.startswith(aligned) and name not in loose
    }


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def resources(build: Build) -> dict[str, Any]:
    """Compile, and read registers, stack, shared memory and instructions of the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: build.types.get(name, "constexpr") for name in build.kernel.arg_names}
    source = ASTSource(
        fn=build.kernel,
        signature=signature,
        constexprs={(build.kernel.arg_names.index(k),): v for k, v in build.constants.items()},
        attrs=_attributes(build),
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", build.arch, 32), options=build.options
    )
    return {**read_cubin(compiled.asm["cubin"]), "shared_bytes": compiled.metadata.shared}


def read_cubin(cubin: bytes) -> dict[str, Any]:
    """Registers, stack, and counts of telling instructions of one kernel's machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run(
                [_tool("cuobjdump"), flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no resources: {usage}")
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", sass, re.MULTILINE)
    telling = {
        "spills": ("STL", "LDL"),
        "hgmma": ("HGMMA",),
        "mma": ("HMMA", "QMMA"),
        "tcgen05": ("UTCHMMA", "UTCQMMA"),
        "tma": ("UTMALDG",),
        "setmaxreg": ("USETMAXREG",),
    }
    return {
        "registers": int(found[1]),
        "stack_bytes": int(found[2]),
        "instructions": len(opcodes),
        **{name: sum(opcodes.count(code) for code in codes) for name, codes in telling.items()},
    }


def faults(key: str, row: dict[str, Any]) -> list[str]:
    """What no kernel may have: spills, a stack, more shared memory than there is."""
    limit = SHARED_LIMIT[int(key.rsplit("sm_", 1)[1])]
    wrong = [f"{key}: {row[name]} {name}" for name in ("spills", "stack_bytes") if row[name]]
    if row["shared_bytes"] > limit:
        wrong.append(f"{key}: {row['shared_bytes']} bytes of shared memory of {limit}")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--check", type=Path, metavar="FILE")
    parser.add_argument("--only", default="", help="a part of the keys to compile")
    options = parser.parse_args(arguments)
    import triton

    rows: dict[str, dict[str, Any]] = {}
    wrong: list[str] = []
    for arch in ARCHITECTURES:
        for build in builds(arch):
            if not re.search(options.only, build.key):
                continue
            try:
                rows[build.key] = resources(build)
            except Exception as error:
                wrong.append(f"{build.key}: does not compile: {str(error)[:300]}")
                continue
            wrong += faults(build.key, rows[build.key])
            print(build.key, rows[build.key], flush=True)
    if options.write:
        lines = [f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(rows.items())]
        table = ",\n".join(lines)
        options.write.write_text(
            f'{{\n "triton": "{triton.__version__}",\n "kernels": {{\n{table}\n }}\n}}\n'
        )
    if options.check:
        committed = json.loads(options.check.read_text())
        missing = [key for key in rows if key not in committed["kernels"]]
        wrong += [f"{key}: not in the table" for key in missing]
        if committed["triton"] == triton.__version__:
            wrong += [
                f"{key}: {rows[key]} is not the table's {committed['kernels'][key]}"
                for key in rows
                if key not in missing and rows[key] != committed["kernels"][key]
            ]
    print(*wrong, sep="\n", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
