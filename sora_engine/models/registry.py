"""The families that the engine knows, and whose a checkpoint is."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from os import PathLike
from pathlib import Path

from sora_engine.errors import CheckpointError
from sora_engine.io.safetensors import refuse_pickle
from sora_engine.io.weights.opening import open_weights
from sora_engine.models.family import Checkpoint, Family
from sora_engine.models.folder import INDEX, read_index
from sora_engine.models.generation_config import read_generation_config, with_own_defaults

_FAMILIES: list[Family | str] = [
    "sora_engine.models.wan.family:WanFamily",
]
"""Each family, or where its class is: a new one is a line here."""

BUNDLED = {"sprites": Path(__file__).parents[1] / "checkpoints" / "sprites"}
"""Checkpoints that come with the package, by name."""

ModelPath = str | PathLike[str] | Sequence[str | PathLike[str]]
"""A folder in diffusers' layout, a transformer file or two, or a bundled checkpoint's name."""


def register_family(family: Family) -> None:
    """Make a family known. ValueError where another has its name or a pipeline of its own."""
    for other in families():
        shared = set(other.layout.pipelines) & set(family.layout.pipelines)
        if other.name == family.name or shared:
            what = f"pipelines {sorted(shared)}" if shared else f"the name {family.name!r}"
            raise ValueError(f"{what} belong to the family {other.name!r} already")
    _FAMILIES.append(family)


def unregister_family(family: Family) -> None:
    """Forget a family that was registered."""
    _FAMILIES.remove(family)


def families() -> list[Family]:
    """All that are known, in the order in which they are asked."""
    for i, entry in enumerate(_FAMILIES):
        if isinstance(entry, str):
            module, _, name = entry.partition(":")
            _FAMILIES[i] = getattr(import_module(module), name)()
    return [entry for entry in _FAMILIES if not isinstance(entry, str)]


def open_checkpoint(
    path: ModelPath, components: str | PathLike[str] | None = None
) -> tuple[Checkpoint, str]:
    """A checkpoint by its path or name, with its own defaults, and the name that results carry.

    components: folder with all that a transformer file lacks. No weights are read, and nothing is
    ever downloaded. Raises CheckpointError for what is missing, cannot be, or is of no family.
    """
    paths, name = _paths_of(path)
    folder = paths[0]
    settings = read_generation_config(folder)
    if len(paths) == 1 and folder.is_dir():
        if components is not None:
            raise CheckpointError("a folder brings its own components", path=folder)
        found = family_of_folder(folder).open_folder(folder, settings)
    else:
        companions = None if components is None else Path(components)
        found = family_of_file(folder).open_files(paths, companions, settings)
    return with_own_defaults(found, settings, folder), name


def family_of_folder(folder: Path) -> Family:
    """The family whose pipeline class `model_index.json` names."""
    pipeline = read_index(folder).get("_class_name")
    known = families()
    for family in known:
        if pipeline in family.layout.pipelines:
            return family
    supported = ", ".join(name for family in known for name in family.layout.pipelines)
    raise CheckpointError(
        f"pipeline class {pipeline!r}; supported: {supported}", path=folder / INDEX
    )


def family_of_file(path: Path) -> Family:
    """The family that knows the tensors of a transformer file."""
    with open_weights(path) as weights:
        shapes = {name: weights.info(name).shape for name in weights}
    known = families()
    for family in known:
        if family.claims_file(shapes):
            return family
    seen = ", ".join(sorted(shapes)[:4])
    raise CheckpointError(
        f"of no known family of transformers: it holds {len(shapes)} tensors such as {seen}; known "
        f"are {', '.join(family.name for family in known)}",
        path=path,
    )


def _paths_of(path: ModelPath) -> tuple[list[Path], str]:
    """The files or the folder, all there, and the name that results carry."""
    bundled = BUNDLED.get(path) if isinstance(path, str) else None
    if bundled is not None:
        if not bundled.exists():
            raise CheckpointError(f"the bundled checkpoint {path!r} is missing", path=bundled)
        return [bundled], str(path)
    paths = [path] if isinstance(path, (str, PathLike)) else list(path)
    if not paths:
        raise CheckpointError("a model is one path, or those of two experts; got none")
    found = [Path(p) for p in paths]
    if len(found) > 2:
        raise CheckpointError(f"{len(found)} paths; a model is one path, or two experts")
    for each in found:
        refuse_pickle(each)
        if not each.exists():
            raise CheckpointError(
                "no such file or folder; a model is a diffusers folder or a .safetensors file, "
                "and nothing is downloaded",
                path=each,
            )
    return found, found[0].name
