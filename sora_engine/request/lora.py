"""Adapters (LoRA and its kin) as a caller names them, and as results do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from sora_engine.errors import RequestError
from sora_engine.request.checks import finite, several, shown

EXPERTS = ("high", "low")
"""The experts of a checkpoint that has two: for high noise, and for low."""
MOST = 100.0
"""Strengths beyond this are a slip of the pen."""


@dataclass(frozen=True, slots=True)
class Lora:
    """An adapter and how strongly it is applied.

    path_or_name: its `.safetensors` file, or PEFT's folder.
    strength: of the change; 1 is as trained, negative values take it away, 0 leaves it out.
    expert: of a checkpoint with two experts the one that it is for, `"high"` or `"low"` noise; None
        for both.
    """

    path_or_name: str | PathLike[str]
    strength: float = 1.0
    expert: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for another process."""
        return {**asdict(self), "path_or_name": fspath(self.path_or_name)}

    @property
    def name(self) -> str:
        """As results have it: without folders, which are none of others' business."""
        given = fspath(self.path_or_name)
        return Path(given).name or Path(given).resolve().name

    def serves(self, expert: int, num_experts: int) -> bool:
        """Whether it is for an expert, by its index."""
        return self.expert is None or num_experts == 1 or EXPERTS.index(self.expert) == expert


@dataclass(frozen=True, slots=True)
class LoraRecord:
    """An adapter as results name it. sha256: of its file."""

    name: str
    sha256: str
    strength: float
    expert: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        where = "" if self.expert is None else f":{self.expert}"
        return f"{self.name}:{self.strength:g}{where}"


def checked_loras(loras: Sequence[Lora], num_experts: int) -> tuple[Lora, ...]:
    """The adapters, their numbers plain ones; RequestError for a value that cannot be."""
    return tuple(
        _checked(lora, num_experts) for lora in several("loras", loras, "Lora(path, strength)")
    )


def _checked(lora: Lora, num_experts: int) -> Lora:
    if not isinstance(lora, Lora):
        raise RequestError(f"loras must be sora_engine.Lora, got {shown(lora)}")
    path = lora.path_or_name
    if not isinstance(path, (str, PathLike)) or isinstance(fspath(path), bytes) or not fspath(path):
        raise RequestError(f"a Lora's path must be a text or a Path, got {shown(path)}")
    strength = finite("a Lora's strength", lora.strength, 1.0)
    if abs(strength) > MOST:
        raise RequestError(
            f"a Lora's strength must be from -{MOST:g} to {MOST:g}, got {strength:g}"
        )
    if lora.expert is not None and lora.expert not in EXPERTS:
        raise RequestError(f"a Lora's expert must be 'high', 'low' or None, got {lora.expert!r}")
    if lora.expert is not None and num_experts == 1:
        raise RequestError(
            f"a Lora's expert is {lora.expert!r}, and this checkpoint has one transformer; None "
            "would work"
        )
    return Lora(fspath(path), strength, lora.expert)
