"""A transformer's weights in a file of its own, and the parts of a model that go with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import nn

from sora_engine.errors import CheckpointError
from sora_engine.io.loading import Keep, load_into
from sora_engine.io.weights.merging import Merge
from sora_engine.io.weights.opening import open_weights
from sora_engine.io.weights.selected import SelectedWeights, under_prefix
from sora_engine.io.weights.source import WeightSource
from sora_engine.models.authors_names import Names
from sora_engine.models.family import Shapes, ShardWeights
from sora_engine.models.folder import Component, FolderLayout
from sora_engine.models.transformer_config import TransformerConfig
from sora_engine.vae.registry import vae_in_file

ConfigT = TypeVar("ConfigT", bound=TransformerConfig)
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""Under which other programs' files have a transformer."""


def open_transformer(path: Path) -> WeightSource:
    """The transformer of a file, without a prefix of its names."""
    return under_prefix(open_weights(path), PREFIXES)


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Its tensors, from the headers."""
    with open_transformer(path) as weights:
        return {name: weights.info(name).shape for name in weights}


def without_prefix(shapes: Shapes) -> Shapes:
    """The tensors under the first prefix that names have, without it; all where none has one."""
    for prefix in PREFIXES:
        found = {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}
        if found:
            return found
    return shapes


@dataclass(frozen=True, slots=True)
class TransformerSource(Generic[ConfigT]):
    """Where a transformer's weights are and what they are the weights of.

    translate: where files have other names than the engine, from the shapes of all tensors. ignored
    and keep_fp32: parts of names, as of `load_into`.
    """

    path: Path
    config: ConfigT
    translate: Callable[[Shapes], Names | None] = lambda shapes: None
    ignored: tuple[str, ...] = ()
    keep_fp32: tuple[str, ...] = ()

    def open(self) -> WeightSource:
        """The weights under the engine's names. Raises CheckpointError."""
        weights = open_transformer(self.path)
        names = self.translate({name: weights.info(name).shape for name in weights})
        return weights if names is None else SelectedWeights(weights, names)

    def load(
        self,
        module: nn.Module,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        shard: ShardWeights | None = None,
        merge: Merge | None = None,
        keep: Keep | None = None,
    ) -> None:
        """Fill `module`, which was built of `self.config` on the meta device; `shard`, `merge` and
        `keep` as of `load_into`."""
        with self.open() as weights:
            load_into(
                module,
                weights,
                device=device,
                dtype=dtype,
                keep_fp32=self.keep_fp32,
                ignore=self.ignored,
                loose_ones=True,
                shard=shard,
                merge=merge,
                keep=keep,
            )

    @property
    def num_parameters(self) -> int:
        """Counted from the headers; nothing is read."""
        with self.open() as weights:
            return sum(math.prod(weights.info(name).shape) for name in weights)


def companions(
    file: Path,
    components: Path | Mapping[str, Path] | None,
    layout: FolderLayout,
    *,
    spared: tuple[str, ...] = (),
) -> dict[str, Component]:
    """The other parts of a model, for a transformer file: in a folder, or in one each; of the
    autoencoder a file would do. spared: parts that may be missing. Raises CheckpointError."""
    given = components if isinstance(components, Mapping) else {}
    others = sorted(set(layout.components) - {"transformer"})
    unknown = sorted(set(given) - set(others))
    if unknown:
        raise CheckpointError(f"unknown components {unknown}; known are {others}")
    around = file.parent.parent if file.parent.name == "transformer" else file.parent
    folder = components if isinstance(components, Path) else around
    found = {}
    for name in others:
        place, classes = given.get(name, folder / name), layout.components[name]
        if name not in given and name in (*spared, *layout.optional) and not place.is_dir():
            continue
        if name == "vae" and place.is_file():
            found[name] = _vae_file(place, classes)
        else:
            found[name] = Component.open(name, place, classes)
    return found


def _vae_file(path: Path, classes: tuple[str, ...]) -> Component:
    with open_weights(path) as weights:
        shapes = {name: weights.info(name).shape for name in weights}
    config = vae_in_file(shapes, path=path)
    if config is None or config.class_name not in classes:
        seen = ", ".join(sorted(shapes)[:4])
        raise CheckpointError(
            f"no {' or '.join(classes)}, which this model decodes by: it holds {seen}", path=path
        )
    return Component("vae", config.class_name, path, config.to_dict())
