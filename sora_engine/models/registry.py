"""The families that the engine knows, and whose a checkpoint is."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from sora_engine.errors import CheckpointError
from sora_engine.io.safetensors import refuse_pickle
from sora_engine.io.weights.opening import open_weights
from sora_engine.models.family import Checkpoint, Family
from sora_engine.models.folder import INDEX, read_index
from sora_engine.models.generation_config import (
    on_ladder,
    read_generation_config,
    with_own_defaults,
)
from sora_engine.models.kinds import part_kinds
from sora_engine.models.tiny_vae import split_off
from sora_engine.request.ladders import LADDERS, ladder_of_file, register_ladders

logger = logging.getLogger("sora_engine")

_FAMILIES: list[Family | str] = [
    "sora_engine.models.wan.family:WanFamily",
    "sora_engine.models.dit.family:DiTFamily",
    "sora_engine.models.latte.family:LatteFamily",
    "sora_engine.models.ltx.family:LTXFamily",
    "sora_engine.models.pixart.family:PixArtFamily",
    "sora_engine.models.uvit.family:UViTFamily",
    "sora_engine.models.stdit.family:STDiTFamily",
]
"""Each family, or where its class is: a new one is a line here."""

BUNDLED = {name: Path(__file__).parents[1] / "checkpoints" / name for name in ("sprites", "meadow")}
"""Checkpoints that come with the package, by name: plain shapes that move, and a world."""

ModelPath = str | PathLike[str] | Sequence[str | PathLike[str]]
"""A folder in diffusers' or ComfyUI's layout, a transformer file or two, or a bundled checkpoint's
name."""
Components = str | PathLike[str] | Mapping[str, str | PathLike[str]]
"""What a transformer file lacks: a folder in either layout, or by name a file or a folder of each
part."""

TRANSFORMER_FOLDERS = ("diffusion_models", "unet")
"""Where ComfyUI keeps transformers."""
COMFY_FOLDERS = ("text_encoders", "clip", "vae", "clip_vision", "loras", *TRANSFORMER_FOLDERS)
"""By which a folder of its layout is known."""


def register_family(family: Family) -> None:
    """Make a family known. ValueError where another has its name or a pipeline of its own."""
    for other in families():
        shared = set(other.layout.pipelines) & set(family.layout.pipelines)
        if other.name == family.name or shared:
            what = f"pipelines {sorted(shared)}" if shared else f"the name {family.name!r}"
            raise ValueError(f"{what} belong to the family {other.name!r} already")
    register_ladders(family.ladders)
    _FAMILIES.append(family)


def unregister_family(family: Family) -> None:
    """Forget a family that was registered."""
    _FAMILIES.remove(family)
    for name in family.ladders:
        del LADDERS[name]


def families() -> list[Family]:
    """All that are known, in the order in which they are asked."""
    for i, entry in enumerate(_FAMILIES):
        if isinstance(entry, str):
            module, _, name = entry.partition(":")
            family = _FAMILIES[i] = getattr(import_module(module), name)()
            register_ladders(family.ladders)
    return [entry for entry in _FAMILIES if not isinstance(entry, str)]


def family_named(name: str) -> Family:
    """The family of a checkpoint, by its name."""
    return next(family for family in families() if family.name == name)


def open_checkpoint(
    path: ModelPath, components: Components | None = None
) -> tuple[Checkpoint, str]:
    """A checkpoint by its path or name, with its own defaults, and the name that results carry.

    components: all that a transformer file lacks. No weights are read, and nothing is
    ever downloaded. Raises CheckpointError for what is missing, cannot be, or is of no family.
    """
    paths, name = _paths_of(path)
    components, tiny = split_off(components)
    folder = paths[0]
    settings = read_generation_config(folder)
    if len(paths) == 1 and folder.is_dir():
        if components is not None:
            raise CheckpointError(
                "a folder brings its own components; of others it takes tiny_vae alone",
                path=folder,
            )
        found = family_of_folder(folder).open_folder(folder, settings)
    else:
        companions: Path | dict[str, Path] | None = None
        if isinstance(components, Mapping):
            companions = {name: Path(part) for name, part in components.items()}
        elif components is not None:
            companions = Path(components)
        found = _on_its_ladder(
            family_of_file(folder).open_files(paths, companions, settings), paths
        )
    return replace(with_own_defaults(found, settings, folder), tiny_vae=tiny), name


def _on_its_ladder(found: Checkpoint, paths: Sequence[Path]) -> Checkpoint:
    """A model in files with the ladder that their names tell, where they tell one and the same."""
    ladders = {ladder_of_file(path.name) for path in paths}
    ladder = ladders.pop()
    return found if ladders else on_ladder_of(found, ladder, paths[0].name)


def on_ladder_of(found: Checkpoint, ladder: str | None, name: str) -> Checkpoint:
    """A model with the ladder that a file's name tells, unless it has one of its own."""
    if ladder is None or found.defaults.ladder is not None:
        return found
    logger.info("steps of ladder %s, as %s says by its name", ladder, name)
    return replace(found, defaults=on_ladder(replace(found.defaults, ladder=ladder)))


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
    if not shapes:
        raise CheckpointError("it holds no tensors: a download that failed?", path=path)
    usual = ", ".join(
        f.layout.usual["transformer"] for f in known if "transformer" in f.layout.usual
    )
    held = f"; people hold one as {usual}" if usual else ""
    parts = part_kinds(path)
    if parts:
        raise CheckpointError(
            f"no transformer but {parts[0].text}: give it as {parts[0].use}, beside a transformer"
            f"{held}",
            path=path,
        )
    seen = ", ".join(sorted(shapes)[:4])
    raise CheckpointError(
        f"of no known family of transformers: it holds {len(shapes)} tensors such as {seen}; known "
        f"are {', '.join(family.name for family in known)}",
        path=path,
    )


def _usual_transformers() -> str:
    """Under which names people hold transformers."""
    names = [family.layout.usual.get("transformer", "") for family in families()]
    return ", ".join(name for name in names if name)


def _paths_of(path: ModelPath) -> tuple[list[Path], str]:
    """The files or the folder, all there, and the name that results carry."""
    bundled = BUNDLED.get(path) if isinstance(path, str) else None
    if bundled is not None:
        if not bundled.exists():
            raise CheckpointError(f"the bundled checkpoint {path!r} is missing", path=bundled)
        return [bundled], str(path)
    given: list[Any] = [path]
    if isinstance(path, Sequence) and not isinstance(path, (str, bytes)):
        given = list(path)
    for each in given:
        if not isinstance(each, (str, PathLike)) or isinstance(fspath(each), bytes):
            raise CheckpointError(
                f"a model is one path, or those of two experts; {each!r} is no path but "
                f"{type(each).__name__}"
            )
    if not given:
        raise CheckpointError("a model is one path, or those of two experts; got none")
    if "" in given:
        raise CheckpointError(
            "the path of a model is empty; a folder, a file or 'sprites' would work"
        )
    found = [Path(p) for p in given]
    if len(found) > 2:
        raise CheckpointError(f"{len(found)} paths; a model is one path, or two experts")
    for each in found:
        refuse_pickle(each)
        if len(found) > 1 and str(each) in BUNDLED:
            raise CheckpointError(
                "a whole model; two paths are two experts, each a file of weights", path=each
            )
        if not each.exists():
            raise CheckpointError(
                "no such file or folder; a model is a diffusers folder, a .safetensors or .gguf "
                f"file, or one of {', '.join(BUNDLED)}, and nothing is downloaded",
                path=each,
            )
        if len(found) > 1 and each.is_dir():
            raise CheckpointError(
                "a folder; two paths are two experts, each a file of weights", path=each
            )
    if len(found) == 1 and found[0].is_dir() and not (found[0] / INDEX).exists():
        inside = _transformers_in(found[0])
        if inside:
            return inside, found[0].name
        others = [name for name in COMFY_FOLDERS if (found[0] / name).is_dir()]
        if others:
            held = _usual_transformers() or "a .safetensors or .gguf file"
            raise CheckpointError(
                f"no transformer: it has {', '.join(others)}/ as ComfyUI does, and no file in "
                f"{'/ or '.join(TRANSFORMER_FOLDERS)}/; people hold it as {held}",
                path=found[0],
            )
    return found, found[0].name


def _transformers_in(folder: Path) -> list[Path]:
    """The transformers in a folder of ComfyUI's layout: one, or two experts of which one's name
    has "high" in it. None where it is no such folder."""
    files = [
        file
        for name in TRANSFORMER_FOLDERS
        if (folder / name).is_dir()
        for file in sorted((folder / name).iterdir())
        if file.suffix in (".safetensors", ".gguf")
    ]
    high = [file for file in files if "high" in file.name.lower()]
    if len(files) == 2 and len(high) == 1:
        return [*high, *(file for file in files if file not in high)]
    if len(files) > 1:
        raise CheckpointError(
            f"{len(files)} transformers: {', '.join(file.name for file in files)}; name the one to "
            "load, or leave two of which one has 'high' in its name",
            path=files[0].parent,
        )
    return files


def plain_components(components: Components | None) -> str | dict[str, str] | None:
    """The same in what JSON holds."""
    if isinstance(components, Mapping):
        return {name: fspath(part) for name, part in components.items()}
    return None if components is None else fspath(components)
