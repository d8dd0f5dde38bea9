"""A tiny autoencoder beside a model: found, checked against its latents, and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch

from sora_engine.errors import BackendError, CheckpointError
from sora_engine.io.weights.opening import open_weights
from sora_engine.models.family import Checkpoint
from sora_engine.vae.tiny import TinyVAE, load_tiny_vae
from sora_engine.vae.tiny_config import USUAL, TinyVAEConfig, infer_tiny, is_tiny

KEY = "tiny_vae"
FOLDER = "vae_approx"
"""Where ComfyUI keeps tiny autoencoders."""


def split_off(
    components: str | PathLike[str] | Mapping[str, str | PathLike[str]] | None,
) -> tuple[str | PathLike[str] | Mapping[str, str | PathLike[str]] | None, Path | None]:
    """What a family is to look for, and the tiny autoencoder, which is no part of it. Raises
    CheckpointError where that is not there."""
    if not isinstance(components, Mapping) or KEY not in components:
        return components, None
    path = Path(components[KEY])
    if not path.is_file():
        raise CheckpointError(f"no such file for the {KEY}", path=path)
    return {name: part for name, part in components.items() if name != KEY} or None, path


def tiny_in_file(path: Path) -> TinyVAEConfig | None:
    """Its configuration; None for another file. Raises CheckpointError."""
    with open_weights(path) as weights:
        shapes = {name: weights.info(name).shape for name in weights}
    return infer_tiny(shapes, path=path) if is_tiny(shapes) else None


def tiny_near(found: Checkpoint) -> Path:
    """The tiny autoencoder of a model: as it was given, or the one in ComfyUI's folder that fits.
    Raises BackendError with what would work where there is none, or more than one."""
    if found.tiny_vae is not None:
        return found.tiny_vae
    folders = [parent / FOLDER for parent in list(found.path.parents)[:2]]
    files = [
        file
        for folder in folders
        if folder.is_dir()
        for file in sorted(folder.iterdir())
        if file.suffix in (".safetensors", ".gguf")
    ]
    channels = found.grid.channels
    fitting = []
    for file in files:
        config = tiny_in_file(file)
        if config is not None and config.z_dim == channels:
            fitting.append(file)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        named = ", ".join(str(file) for file in fitting)
        raise BackendError(
            f"vae_backend 'tiny': {len(fitting)} files fit: {named}; name one as "
            f"components={{{KEY!r}: ...}} (on the command line --tiny-vae)"
        )
    usual = USUAL.get(channels, "one for these latents")
    raise BackendError(
        f"vae_backend 'tiny' needs a tiny autoencoder for latents of {channels} channels: give "
        f"components={{{KEY!r}: ...}} (on the command line --tiny-vae); people hold it as {usual}"
    )


def load_tiny(found: Checkpoint, path: Path, device: torch.device, dtype: torch.dtype) -> TinyVAE:
    """The decoder of a file, for the latents of a model. Raises CheckpointError where it is for
    others."""
    config = tiny_in_file(path)
    grid = found.grid
    if config is not None and config.z_dim != grid.channels:
        usual = USUAL.get(grid.channels)
        goes = "" if usual is None else f"; {usual} goes with them"
        raise CheckpointError(
            f"a tiny autoencoder for latents of {config.z_dim} channels, and this model's have "
            f"{grid.channels}{goes}",
            path=path,
        )
    if config is not None and (config.factor_spatial, config.factor_temporal) != (
        grid.vae_spatial,
        grid.time,
    ):
        raise CheckpointError(
            f"a tiny autoencoder that makes {config.factor_spatial} pixels and "
            f"{config.factor_temporal} frames of a latent, where this model's makes "
            f"{grid.vae_spatial} and {grid.time}",
            path=path,
        )
    return load_tiny_vae(path, device, dtype)
