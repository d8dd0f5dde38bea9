"""Opens whatever file of weights there is."""

from __future__ import annotations

from pathlib import Path

from sora_engine.errors import CheckpointError
from sora_engine.io.safetensors import Weights, refuse_pickle
from sora_engine.io.weights.dequantised import DequantisedWeights
from sora_engine.io.weights.gguf import GGUFWeights, is_gguf
from sora_engine.io.weights.marks import find_codings
from sora_engine.io.weights.source import WeightSource


def open_weights(path: str | Path) -> WeightSource:
    """Open a `.safetensors` or `.gguf` file, or the shards of a `.safetensors.index.json`.

    Nothing but headers and marks is read. Raises CheckpointError for what is no such file, is
    damaged, or is in a format that is not read, which it names.
    """
    path = Path(path)
    refuse_pickle(path)
    if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe would be waited for
        raise CheckpointError("a device, a pipe or a socket; a file would work", path=path)
    if path.suffix == ".gguf" or is_gguf(path):
        return GGUFWeights(path)
    weights = Weights.open(path)
    try:
        codings, hidden = find_codings(weights)
    except BaseException:
        weights.close()
        raise
    if not codings and not hidden:
        return weights
    return DequantisedWeights(weights, codings, hidden)
