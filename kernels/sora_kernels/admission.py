"""Backends that `auto` takes because they were measured on a card: right there, and faster.

`admitted.json` holds them; it is empty where no card has been measured. `benchmarks/gpu_day.py
--admit` writes it from the lines of a run. An entry counts on the architecture, at the head_dim and
dtypes, and under the Triton, that it was measured with: nothing is taken on hope.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sora_kernels.launch import architecture

FILE = Path(__file__).with_name("admitted.json")
logger = logging.getLogger("sora_kernels")


@dataclass(frozen=True, slots=True)
class Admission:
    """One backend of an op on one kind of card.

    triton: major and minor version that compiled it. gain: of its least favourable shape, how many
    times as fast as the backend that `auto` took. device, commit: of the run.
    """

    op: str
    backend: str
    architecture: int
    head_dims: tuple[int, ...]
    dtypes: tuple[str, ...]
    triton: str
    gain: float
    device: str
    commit: str


@functools.cache
def read(file: Path = FILE) -> tuple[Admission, ...]:
    """All entries, the one with the greatest gain first."""
    entries = json.loads(file.read_text(encoding="utf-8"))
    lists = ("head_dims", "dtypes")
    made = [Admission(**entry | {name: tuple(entry[name]) for name in lists}) for entry in entries]
    return tuple(sorted(made, key=lambda entry: -entry.gain))


def write(entries: list[Admission], file: Path = FILE) -> None:
    """An entry a line."""
    lines = ",\n".join(" " + json.dumps(asdict(entry)) for entry in entries)
    file.write_text(f"[\n{lines}\n]\n" if lines else "[]\n", encoding="utf-8")


def admitted(op: str, device: torch.device, dtype: torch.dtype, width: int) -> Iterator[str]:
    """The backends that go before the op's own order there, for this dtype and head_dim."""
    entries = [entry for entry in read() if entry.op == op]
    if not entries or device.type != "cuda":
        return
    arch, name = architecture(device), str(dtype).removeprefix("torch.")
    for entry in entries:
        if entry.architecture != arch or width not in entry.head_dims or name not in entry.dtypes:
            continue
        if entry.triton != triton_version():
            logger.info(
                "%s by %s is not taken: measured with Triton %s", op, entry.backend, entry.triton
            )
            continue
        yield entry.backend


def triton_version() -> str:
    """Major and minor; empty where there is no Triton."""
    try:
        import triton
    except ImportError:
        return ""
    return ".".join(triton.__version__.split(".")[:2])
