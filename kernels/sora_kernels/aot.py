"""Compiles the Triton kernels ahead of time, with no GPU, and reads what they take.

`python -m sora_kernels.aot --write FILE` writes the table of every kernel at every launch
configuration for sm_80, sm_90, sm_100 and sm_120; `--check FILE` compares; with `--only REGEX`
either takes a part. Compilation must not see TRITON_INTERPRET, which is read when a kernel is
decorated.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sora_kernels import launch
from sora_kernels.machine_code import read_cubin

ARCHITECTURES = (80, 90, 100, 120)
# Shared memory that one block may take, in bytes (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}
QUANTISED = ("Q4_K", "Q8_0", "Q5_1", "Q6_K", "int8", "float8_e4m3fn")
"""Formats of weights that are compiled: one of each way in which values are put together."""
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Build:
    """One kernel at one configuration. `types` maps its run-time arguments to Triton's types.

    entry: the op and the key of the launch table that it takes its parameters from.
    """

    name: str
    entry: tuple[str, str]
    arch: int
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    gluon: bool = False

    @property
    def key(self) -> str:
        return f"{self.name}/sm_{self.arch}"


def _precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _strided() -> dict[str, str]:
    """Types of the strides of q, k and v, and of their heads."""
    types = {f"{operand}_stride": "i32" for operand in "qkv"}
    return types | {f"{operand}_head_stride": "i32" for operand in "qkv"}


def _padding(name: str) -> dict[str, str]:
    """Types of padding's key, its value and its counts."""
    pointers = {f"padding_{part}_ptr": f"*{name}" for part in ("key", "value")}
    return {**pointers, "counts_ptr": "*i32"}


def _attention(arch: int, dtype: torch.dtype, width: int, tma: bool) -> Build:
    from sora_kernels.attention.triton import packed_attention_kernel, parts_of

    name, parts = _NAMES[dtype], parts_of(dtype, width)
    parameters = launch.find("packed_attention", arch, dtype, width)
    blocks = {
        "q": (parameters.block_m, width // parts),
        "k": (parameters.block_n, width // parts),
        "v": (parameters.block_n, width),
    }
    types = {
        f"{operand}_source": f"tensordesc<{name}[{rows},1,{columns}]>" if tma else f"*{name}"
        for operand, (rows, columns) in blocks.items()
    }
    types |= {"out_ptr": f"*{name}", "lse_ptr": "*fp32", **_strided()}
    types |= {"tiles_ptr": "*i32", "cu_q_ptr": "*i32", "cu_k_ptr": "*i32"} | _padding(name)
    types |= {"q_len": "i32", "k_len": "i32", "heads": "i32", "head_dim": "i32", "scale2": "fp32"}
    constants = {
        "UNIFORM": False,
        "HAS_LSE": True,
        "HAS_PADDING": True,
        "TMA": tma,
        "PRECISION": _precision(dtype),
        "PARTS": parts,
        "BLOCK_M": parameters.block_m,
        "BLOCK_N": parameters.block_n,
        "WIDTH": width,
    }
    options = {"num_warps": parameters.num_warps, "num_stages": parameters.num_stages}
    # Where the strides of a tensor do not suit TMA, pointers serve on any architecture.
    form = "/pointers" if launch.has_tma(arch) and not tma else ""
    key = f"packed_attention/{name}/{width}{form}"
    entry = ("packed_attention", launch.key_of(dtype, width))
    return Build(key, entry, arch, packed_attention_kernel, types, constants, options)


def _gluon(arch: int, width: int, name: str = "gluon") -> Build:
    """Packed attention for Hopper, or as `name` says for Blackwell."""
    from sora_kernels.attention import blackwell, gluon
    from sora_kernels.attention.items import BLOCK_N, shared_layout

    backend: Any = blackwell if name == "blackwell" else gluon
    kernel = {
        "gluon": gluon.hopper_attention_kernel,
        "blackwell": blackwell.blackwell_attention_kernel,
    }[name]
    layout = shared_layout()
    blocks = {"q": backend.ROWS.value, "k": BLOCK_N.value, "v": BLOCK_N.value}
    types = {
        f"{operand}_source": f"tensordesc<bf16[{rows}, {width}],{layout!r}>"
        for operand, rows in blocks.items()
    }
    types |= {"out_ptr": "*bf16", "lse_ptr": "*fp32"}
    types |= {"tiles_ptr": "*i32", "cu_q_ptr": "*i32", "cu_k_ptr": "*i32"} | _padding("bf16")
    types |= {"items": "i32", "heads": "i32", "scale2": "fp32"}
    constants = {"HAS_LSE": True, "HAS_PADDING": True, "WIDTH": width}
    entry = ("packed_attention", name)
    key = f"packed_attention/bf16/{width}/{name}"
    options = {"num_warps": backend.WARPS}
    return Build(key, entry, arch, kernel, types, constants, options, gluon=True)


def _temporal(arch: int, dtype: torch.dtype, width: int) -> Build:
    from sora_kernels.factorised.triton import temporal_attention_kernel

    name, frames = _NAMES[dtype], 16
    parameters = launch.find("temporal_attention", arch, dtype, width)
    types = {f"{operand}_ptr": f"*{name}" for operand in ("q", "k", "v", "out")} | _strided()
    types |= dict.fromkeys(("first_token", "frames", "positions", "heads", "head_dim"), "i32")
    types |= {"scale2": "fp32"}
    constants: dict[str, Any] = {"PRECISION": _precision(dtype), "WIDTH": width}
    constants |= {"FRAMES": frames, "SEQUENCES": parameters.tokens // frames}
    options = {"num_warps": parameters.num_warps, "num_stages": parameters.num_stages}
    key = f"temporal_attention/{name}/{width}"
    entry = ("temporal_attention", launch.key_of(dtype, width))
    return Build(key, entry, arch, temporal_attention_kernel, types, constants, options)


def _windowed(arch: int, dtype: torch.dtype, width: int, masked: bool = True) -> Build:
    from sora_kernels.windowed.plan import shapes_of
    from sora_kernels.windowed.triton import windowed_attention_kernel

    name = _NAMES[dtype]
    parameters = launch.find("windowed_attention", arch, dtype, width)
    types = {f"{operand}_ptr": f"*{name}" for operand in ("q", "k", "v", "out")} | _strided()
    types |= {"segments_ptr": "*i32", "tiles_ptr": "*i32", "blocks_ptr": "*i32"}
    types |= {"patterns_ptr": "*i32", "bits_ptr": "*i64"}
    types |= {"heads": "i32", "head_dim": "i32", "scale2": "fp32"}
    types |= {"reach_t": "i32", "reach_h": "i32", "reach_w": "i32"}
    constants: dict[str, Any] = {"PRECISION": _precision(dtype), "HAS_MASK": masked, "WIDTH": width}
    constants |= dict(zip(("TT", "TH", "TW"), shapes_of(parameters.tokens)[0], strict=True))
    options = {"num_warps": parameters.num_warps, "num_stages": parameters.num_stages}
    key = f"windowed_attention/{name}/{width}" + ("/mask" if masked else "")
    entry = ("windowed_attention", launch.key_of(dtype, width))
    return Build(key, entry, arch, windowed_attention_kernel, types, constants, options)


def _norm(arch: int, elements: int, gated: bool) -> Build:
    from sora_kernels.modulate.triton import norm_rows

    types = {"x_ptr": "*bf16", "x_stride": "i32", "y_ptr": "*bf16"}
    types |= {"residual_ptr": "*fp32", "residual_stride": "i32", "residual_out_ptr": "*fp32"}
    for table in ("gate", "scale", "shift"):
        types |= {f"{table}_ptr": "*fp32", f"{table}_stride": "i32"}
    types |= {"index_ptr": "*i32", "rows_by": "i32", "table_rows": "i32"}
    types |= {"weight_ptr": "*bf16", "bias_ptr": "*bf16"}
    types |= {"tokens": "i32", "channels": "i32", "eps": "fp32"}
    # Up to 2,048 elements they are several rows.
    rows = 4 if elements <= 2048 else 1
    flags = ("HAS_SCALE", "HAS_SHIFT")
    constants: dict[str, Any] = {"GATED": gated, "HAS_GATE": gated, "RMS": False}
    constants |= dict.fromkeys(flags, True)
    constants |= dict.fromkeys(("HAS_WEIGHT", "HAS_BIAS"), False)
    constants |= {"ROWS": rows, "BLOCK": elements // rows}
    options = {"num_warps": launch.row_warps("norm_modulate", arch, elements)}
    op = "gate_residual_norm_modulate" if gated else "norm_modulate"
    entry = ("norm_modulate", str(elements))
    return Build(f"{op}/bf16/{elements}", entry, arch, norm_rows, types, constants, options)


def _causal(arch: int, channels: int) -> Build:
    from sora_kernels.causal.triton import causal_norm_silu_rows

    types = {f"{name}_ptr": "*bf16" for name in ("x", "past", "weight", "joined", "cache")}
    types |= {"rows": "i32", "fresh": "i32", "kept": "i32", "channels": "i32", "eps": "fp32"}
    block, rows = launch.norm_block(channels)
    options = {"num_warps": launch.row_warps("norm_modulate", arch, block * rows)}
    constants: dict[str, Any] = {"ROWS": rows, "BLOCK": block}
    key = f"causal_norm_silu/bf16/{channels}"
    entry = ("norm_modulate", str(block * rows))
    return Build(key, entry, arch, causal_norm_silu_rows, types, constants, options)


def _rope(arch: int, elements: int, across_heads: bool, interleaved: bool) -> Build:
    from sora_kernels.rope.triton import norm_rope_rows

    types = {"cos_ptr": "*fp32", "cos_stride": "i32", "sin_ptr": "*fp32", "sin_stride": "i32"}
    types |= {"head_dim": "i32", "eps": "fp32"}
    for side in "qk":
        types |= {f"{side}_{name}ptr": "*bf16" for name in ("", "out_", "weight_")}
        types |= {f"{side}_{name}": "i32" for name in ("stride", "head_stride", "heads")}
    constants: dict[str, Any] = {"ACROSS_HEADS": across_heads, "INTERLEAVED": interleaved}
    constants |= {"SIDES": 2, "HAS_WEIGHT": True, "ROTATE": True}
    constants |= {"HEADS": elements // 128, "WIDTH": 128}
    options = {"num_warps": launch.row_warps("qk_norm_rope", arch, elements)}
    form = ("across" if across_heads else "each") + ("" if interleaved else "-split")
    key = f"qk_norm_rope/bf16/{elements}/{form}"
    entry = ("qk_norm_rope", str(elements))
    return Build(key, entry, arch, norm_rope_rows, types, constants, options)


def _linear(arch: int, key: str, tma: bool) -> Build:
    from sora_kernels.invariant.triton import GROUP, invariant_linear_kernel

    dtype = torch.bfloat16 if key == "2" else torch.float32
    name, parameters = _NAMES[dtype], launch.matmul("invariant_linear", arch, dtype)
    blocks = {"x": parameters.block_m, "weight": parameters.block_n}
    types = {
        f"{operand}_source": f"tensordesc<{name}[{rows},{parameters.block_k}]>"
        if tma
        else f"*{name}"
        for operand, rows in blocks.items()
    }
    types |= {"bias_ptr": f"*{name}", "out_ptr": f"*{name}", "x_stride": "i32"}
    types |= dict.fromkeys(("weight_stride", "rows", "outs", "ins"), "i32")
    constants: dict[str, Any] = {"HAS_BIAS": True, "GELU": 2, "TMA": tma, "GROUP": GROUP}
    constants |= {"PRECISION": _precision(dtype), "BLOCK_M": parameters.block_m}
    constants |= {"BLOCK_N": parameters.block_n, "BLOCK_K": parameters.block_k}
    options = {"num_warps": parameters.num_warps, "num_stages": parameters.num_stages}
    form = "/pointers" if launch.has_tma(arch) and not tma else ""
    entry = ("invariant_linear", key)
    kernel = invariant_linear_kernel
    return Build(f"invariant_linear/{name}{form}", entry, arch, kernel, types, constants, options)


def _lora(arch: int, key: str, up: bool) -> Build:
    from sora_kernels.lora.triton import BLOCK_R, lora_down_kernel, lora_up_kernel

    dtype = torch.bfloat16 if key == "2" else torch.float32
    name, parameters = _NAMES[dtype], launch.matmul("lora_linear", arch, dtype)._asdict()
    kernel = lora_up_kernel if up else lora_down_kernel
    values = dict.fromkeys(("x", "base", "out"), name) | {"tiles": "i64", "entries": "i64"}
    named = {argument: argument.removesuffix("_ptr") for argument in kernel.arg_names}
    types = {a: "i32" if a == n else f"*{values.get(n, 'fp32')}" for a, n in named.items()}
    sizes = {k: parameters[k.lower()] for k in ("BLOCK_M", "BLOCK_N" if up else "BLOCK_K")}
    sizes |= {"PRECISION": _precision(dtype), "BLOCK_R": BLOCK_R}
    options = {option: parameters[option] for option in ("num_warps", "num_stages")}
    types = {argument: kind for argument, kind in types.items() if argument not in sizes}
    build = f"lora_linear/{name}/{'up' if up else 'down'}"
    return Build(build, ("lora_linear", key), arch, kernel, types, sizes, options)


def _quant(arch: int, key: str, form: str) -> Build:
    from sora_kernels.quant.formats import BLOCKS, FORMATS
    from sora_kernels.quant.triton import GROUP, quant_linear_kernel

    dtype = torch.bfloat16 if key == "2" else torch.float32
    name, parameters = _NAMES[dtype], launch.matmul("quant_linear", arch, dtype)
    block = BLOCKS.get(form)
    types = {f"{operand}_ptr": f"*{name}" for operand in ("x", "bias", "out")}
    types |= {"weight_ptr": "*u8", "half_ptr": "*fp16", "scale_ptr": "*fp32"}
    whole = ("x_stride", "row_bytes", "scale_stride", "stretch", "rows", "outs", "ins")
    types |= dict.fromkeys(whole, "i32")
    constants: dict[str, Any] = {"HAS_BIAS": True, "GELU": 2, "GROUP": GROUP}
    constants |= {"FORMAT": FORMATS.index(form), "HAS_SCALE": block is None}
    constants |= {"VALUES": 1 if block is None else block.values}
    constants |= {"BYTES": 1 if block is None else block.size_bytes}
    constants |= {"PRECISION": _precision(dtype), "BLOCK_M": parameters.block_m}
    constants |= {"BLOCK_N": parameters.block_n, "BLOCK_K": parameters.block_k}
    options = {"num_warps": parameters.num_warps, "num_stages": parameters.num_stages}
    entry = ("quant_linear", key)
    build = f"quant_linear/{name}/{form}"
    return Build(build, entry, arch, quant_linear_kernel, types, constants, options)


def builds(arch: int) -> Iterator[Build]:
    """Every kernel at every configuration for one architecture.

    Entries for 2-byte elements are compiled for bf16; fp16 differs in the type of products alone.
    """
    for key in launch.entries("temporal_attention", arch):
        yield _temporal(arch, *_dtype_width(key))
    for key in launch.entries("windowed_attention", arch):
        yield _windowed(arch, *_dtype_width(key), masked=False)
        yield _windowed(arch, *_dtype_width(key), masked=True)
    for key in launch.entries("packed_attention", arch):
        if launch.has_tma(arch):
            yield _attention(arch, *_dtype_width(key), True)
        yield _attention(arch, *_dtype_width(key), False)
    for gluon_arch, name in ((90, "gluon"), (100, "blackwell")):
        if arch == gluon_arch:
            for width in (64, 128):
                yield _gluon(arch, width, name)
    for key in launch.entries("invariant_linear", arch):
        if launch.has_tma(arch):
            yield _linear(arch, key, True)
        yield _linear(arch, key, False)
    for key in launch.entries("lora_linear", arch):
        yield from (_lora(arch, key, up) for up in (False, True))
    for key in launch.entries("quant_linear", arch):
        for form in QUANTISED if key == "2" else QUANTISED[:1]:
            yield _quant(arch, key, form)
    for key in launch.entries("norm_modulate", arch):
        yield _norm(arch, int(key), gated=False)
        yield _norm(arch, int(key), gated=True)
    for channels in (384,):  # of most of Wan's autoencoder; others make programs as wide
        yield _causal(arch, channels)
    for key in launch.entries("qk_norm_rope", arch):
        yield _rope(arch, int(key), across_heads=True, interleaved=True)
        yield _rope(arch, int(key), across_heads=False, interleaved=False)


def _dtype_width(key: str) -> tuple[torch.dtype, int]:
    size, width = key.split("x")
    return (torch.bfloat16 if size == "2" else torch.float32), int(width)


def _attributes(build: Build) -> dict[tuple[int, ...], list[list[Any]]]:
    """Pointers, strides and widths are multiples of 16, as they are in the models."""
    names = list(build.kernel.arg_names)
    aligned = ("*", "i32")
    loose = {param.name for param in build.kernel.params if param.do_not_specialize}
    loose |= {name for name in names if name.endswith("heads")}
    return {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in build.types.items()
        if kind.startswith(aligned) and name not in loose
    }


def compiled(build: Build) -> Any:
    """Triton's compiled kernel: `asm["cubin"]` is its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    make: Any = ASTSource
    if build.gluon:
        from triton.experimental.gluon._runtime import GluonASTSource

        make = GluonASTSource
    signature = {name: build.types.get(name, "constexpr") for name in build.kernel.arg_names}
    source = make(
        fn=build.kernel,
        signature=signature,
        constexprs={(build.kernel.arg_names.index(k),): v for k, v in build.constants.items()},
        attrs=_attributes(build),
    )
    return triton.compile(source, target=GPUTarget("cuda", build.arch, 32), options=build.options)


def resources(build: Build) -> dict[str, Any]:
    """Compile, and read registers, stack, shared memory and instructions of the machine code."""
    kernel = compiled(build)
    return {**read_cubin(kernel.asm["cubin"]), "shared_bytes": kernel.metadata.shared}


def faults(key: str, row: dict[str, Any]) -> list[str]:
    """What no kernel may have: spills, a stack, more shared memory than there is."""
    limit = SHARED_LIMIT[int(key.rsplit("sm_", 1)[1])]
    wrong = [f"{key}: {row[name]} {name}" for name in ("spills", "stack_bytes") if row[name]]
    if row["shared_bytes"] > limit:
        wrong.append(f"{key}: {row['shared_bytes']} bytes of shared memory of {limit}")
    return wrong


def compile_all(pattern: str, report: Callable[[str], None]) -> tuple[Rows, list[str]]:
    """Compile the builds whose key matches. Returns their rows and what is wrong."""
    rows: Rows = {}
    wrong: list[str] = []
    for arch in ARCHITECTURES:
        for build in builds(arch):
            if not re.search(pattern, build.key):
                continue
            try:
                rows[build.key] = resources(build)
            except Exception as error:
                wrong.append(f"{build.key}: does not compile: {str(error)[:300]}")
                continue
            wrong += faults(build.key, rows[build.key])
            report(f"{build.key} {json.dumps(rows[build.key])}")
    return rows, wrong


def write_table(file: Path, rows: Rows) -> None:
    """A kernel a line, and the compiler's version."""
    import triton

    lines = [f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(rows.items())]
    table = ",\n".join(lines)
    file.write_text(f'{{\n "triton": "{triton.__version__}",\n "kernels": {{\n{table}\n }}\n}}\n')


def differences(rows: Rows, committed: dict[str, Any]) -> list[str]:
    """Where rows differ from a committed table, as far as one compiler version made both."""
    import triton

    wrong = [f"{key}: not in the table" for key in rows if key not in committed["kernels"]]
    if committed["triton"] == triton.__version__:
        wrong += [
            f"{key}: {row} is not the table's {committed['kernels'][key]}"
            for key, row in rows.items()
            if committed["kernels"].get(key, row) != row
        ]
    return wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--check", type=Path, metavar="FILE")
    parser.add_argument("--only", default="", metavar="REGEX", help="keys to compile")
    options = parser.parse_args(arguments)
    rows, wrong = compile_all(options.only, lambda line: print(line, flush=True))
    if options.write:
        kept: Rows = {}
        if options.only and options.write.exists():
            kept = json.loads(options.write.read_text())["kernels"]
        known = {build.key for arch in ARCHITECTURES for build in builds(arch)}
        write_table(options.write, {k: v for k, v in {**kept, **rows}.items() if k in known})
    if options.check:
        wrong += differences(rows, json.loads(options.check.read_text()))
    print(*wrong, sep="\n", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
