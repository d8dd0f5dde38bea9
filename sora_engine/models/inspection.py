"""What a file of weights is, from its header and marks alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sora_engine.errors import CheckpointError
from sora_engine.io.weights.adapters import read_adapter
from sora_engine.io.weights.dequantised import DequantisedWeights
from sora_engine.io.weights.gguf import GGUFWeights
from sora_engine.io.weights.opening import open_weights
from sora_engine.io.weights.source import WeightSource
from sora_engine.models.adapters import describe
from sora_engine.models.kinds import ADAPTER, part_kinds
from sora_engine.models.registry import families


@dataclass(frozen=True, slots=True)
class FileReport:
    """kinds: what is in the file, for people. formats: by how its tensors are stored, how many
    values. size_bytes: of the file."""

    path: Path
    kinds: tuple[str, ...]
    formats: dict[str, int]
    num_tensors: int
    size_bytes: int

    @property
    def quantised(self) -> bool:
        """Whether any of it is in a form that `dtype="as-stored"` may keep."""
        dense = {"float32", "float16", "bfloat16", "F32", "F16", "BF16", "uint8", "int64"}
        return not dense >= set(self.formats)

    @property
    def num_parameters(self) -> int:
        return sum(self.formats.values())

    def lines(self) -> list[str]:
        """The report, for people."""
        stored = ", ".join(
            f"{form} {count / max(1, self.num_parameters):.1%}"
            for form, count in sorted(self.formats.items(), key=lambda item: -item[1])
        )
        count = self.num_parameters
        return [
            f"{self.path}: {'; '.join(self.kinds) or 'of no kind that is known'}",
            f"  {self.num_tensors} tensors, {count:,} values in {self.size_bytes / 1e9:.3f} GB",
            f"  stored as {stored or 'nothing'}",
            f"  takes {count * 2 / 1e9:.3f} GB in bf16, {count * 4 / 1e9:.3f} GB in fp32"
            + (f", {self.size_bytes / 1e9:.3f} GB as stored" if self.quantised else ""),
        ]


def inspect_file(path: str | Path) -> FileReport:
    """Read the headers of a file, or of an index's shards. Raises CheckpointError."""
    path = Path(path)
    if path.is_dir():
        near = sorted((*path.glob("*"), *path.glob("*/*")))
        found = [str(p.relative_to(path)) for p in near if p.suffix in (".safetensors", ".gguf")]
        held = f"it holds {', '.join(found[:8])}" if found else "this one holds none"
        raise CheckpointError(f"a folder; give files of weights: {held}", path=path)
    with open_weights(path) as weights:
        shapes = {name: weights.info(name).shape for name in weights}
        formats: Counter[str] = Counter()
        for name, shape in shapes.items():
            formats[_stored_as(weights, name)] += math.prod(shape)
        size = sum(file.stat().st_size for file in {weights.path_of(name) for name in weights})
    kinds = [f.describe_file(path) for f in families() if f.claims_file(shapes)]
    parts = part_kinds(path)
    if any(part.text == ADAPTER for part in parts):
        kinds += [] if kinds else [describe(read_adapter(path, whole=False))]
    else:
        kinds += [part.text for part in parts]
    return FileReport(path, tuple(kinds), dict(formats), len(shapes), size)


def _stored_as(weights: WeightSource, name: str) -> str:
    if isinstance(weights, GGUFWeights):
        return weights.info(name).format.name
    if isinstance(weights, DequantisedWeights) and name in weights.codings:
        return weights.codings[name].format
    return str(weights.info(name).dtype).removeprefix("torch.")
