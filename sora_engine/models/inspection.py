"""What a file of weights is, from its header and marks alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sora_engine.io.weights.adapter_keys import parse_key
from sora_engine.io.weights.adapters import read_adapter
from sora_engine.io.weights.dequantised import DequantisedWeights
from sora_engine.io.weights.gguf import GGUFWeights
from sora_engine.io.weights.opening import open_weights
from sora_engine.io.weights.source import WeightSource
from sora_engine.models.adapters import describe
from sora_engine.models.registry import families
from sora_engine.text.clip_file import is_clip
from sora_engine.text.gguf_tokenizer import TOKENS
from sora_engine.text.umt5_file import TOKENIZER, is_umt5
from sora_engine.vae.registry import vae_in_file
from sora_engine.vae.tiny_config import infer_tiny, is_tiny


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
            f"  takes {count * 2 / 1e9:.3f} GB in bf16, {count * 4 / 1e9:.3f} GB in fp32",
        ]


def inspect_file(path: str | Path) -> FileReport:
    """Read the headers of a file, or of an index's shards. Raises CheckpointError."""
    path = Path(path)
    with open_weights(path) as weights:
        shapes = {name: weights.info(name).shape for name in weights}
        formats: Counter[str] = Counter()
        for name, shape in shapes.items():
            formats[_stored_as(weights, name)] += math.prod(shape)
        embedded_tokens = isinstance(weights, GGUFWeights) and TOKENS in weights.metadata
        size = sum(file.stat().st_size for file in {weights.path_of(name) for name in weights})
    kinds = [f.describe_file(path) for f in families() if f.claims_file(shapes)]
    config = vae_in_file(shapes, path=path)
    if config is not None:
        kinds.append(f"{config.class_name} with {config.z_dim} latent channels")
    if is_tiny(shapes):
        tiny = infer_tiny(shapes, path=path)
        form = ", super" if tiny.deep else ""
        kinds.append(f"tiny autoencoder (TAEHV{form}) for {tiny.z_dim} latent channels: --tiny-vae")
    if is_umt5(path):
        tokens = embedded_tokens or any(n.rpartition(".")[2] == TOKENIZER for n in shapes)
        kinds.append(f"UMT5 text encoder, {'with' if tokens else 'without'} its tokenizer")
    if is_clip(path):
        kinds.append("CLIP image encoder")
    if not kinds and any(parse_key(name) is not None for name in shapes):
        kinds.append(describe(read_adapter(path, whole=False)))
    return FileReport(path, tuple(kinds), dict(formats), len(shapes), size)


def _stored_as(weights: WeightSource, name: str) -> str:
    if isinstance(weights, GGUFWeights):
        return weights.info(name).format.name
    if isinstance(weights, DequantisedWeights) and name in weights.codings:
        return weights.codings[name].format
    return str(weights.info(name).dtype).removeprefix("torch.")
