"""What a compiled kernel's machine code takes, as NVIDIA's own tools read it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any


def tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def dump(cubin: bytes, what: str) -> str:
    """What cuobjdump says of machine code: `-sass` or `-res-usage`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("cuobjdump"), what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(cubin: bytes) -> list[str]:
    """The instructions of machine code with their widths, such as `LDG.E.128`."""
    pattern = r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9.]+)"
    return re.findall(pattern, dump(cubin, "-sass"), re.MULTILINE)


def read_cubin(cubin: bytes) -> dict[str, Any]:
    """Registers, stack, and counts of telling instructions of one kernel's machine code."""
    usage = dump(cubin, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no resources: {usage}")
    opcodes = [instruction.partition(".")[0] for instruction in instructions(cubin)]
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
