"""Small safetensors files, read whole into memory: finished latents, and saved jobs.

What is mapped changes with the file: another process that cuts it short ends this one (SIGBUS), and
one that writes into it changes the video.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor

MAX_HEADER_BYTES = 100_000_000
"""As the format's own library has it."""
_LENGTH = 8

Check = Callable[[Sequence[str], Mapping[str, str]], None]


def read_whole(path: Path, check: Check) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors of a file, on the host, and its metadata.

    check: is given the names of the tensors and the metadata before any tensor is read, and raises
        for a file of another kind: one of weights may be larger than memory.
    Raises OSError, ValueError, and safetensors' SafetensorError.
    """
    if path.exists() and not path.is_file():
        raise OSError("it is no file")
    with path.open("rb") as file:
        length = file.read(_LENGTH)
        size = int.from_bytes(length, "little")
        if len(length) < _LENGTH or not 0 < size <= MAX_HEADER_BYTES:
            raise ValueError("it does not begin as a safetensors file")
        header = file.read(size)
        fields: Any = json.loads(header)
        if not isinstance(fields, dict) or not isinstance(fields.get("__metadata__", {}), dict):
            raise ValueError("it does not begin as a safetensors file")
        metadata = {str(k): str(v) for k, v in fields.pop("__metadata__", {}).items()}
        check(list(fields), metadata)
        return load(length + header + file.read()), metadata
