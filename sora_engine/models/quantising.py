"""A model's transformer, quantised into a file under its published names."""

from __future__ import annotations

from pathlib import Path

from sora_engine.errors import CheckpointError
from sora_engine.io.weights.opening import open_weights
from sora_engine.io.weights.quantising import Report, quantise
from sora_engine.io.weights.selected import under_prefix
from sora_engine.models.registry import family_named, family_of_file, open_checkpoint

PREFIXES = ("model.diffusion_model.", "diffusion_model.")


def quantise_model(model: str, path: Path, to: str, expert: int = 0) -> Report:
    """Quantise a transformer; `to` as of `io.weights.quantising.quantise`.

    model: a folder, or a transformer's file, which needs no companions here. expert: of a folder
    with several. Raises CheckpointError, OSError.
    """
    given = Path(model)
    if given.is_file():
        family, weights = family_of_file(given), given
    else:
        checkpoint, name = open_checkpoint(model)
        if expert >= len(checkpoint.experts):
            raise CheckpointError(f"{name} has one transformer, and no expert for low noise")
        family, weights = family_named(checkpoint.family), checkpoint.experts[expert].path
    if weights.resolve() == path.resolve():
        raise CheckpointError("the output is the file that is read", path=path)
    with under_prefix(open_weights(weights), PREFIXES) as source:
        return quantise(source, path, to, rename=family.published_name, architecture=family.name)
