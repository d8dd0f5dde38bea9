"""A model folder in diffusers' layout: which components it has and where their files are.

    model_index.json            the pipeline's class, each component's library and class
    transformer/config.json     and diffusion_pytorch_model*.safetensors; vae/ likewise
    text_encoder/config.json    and model*.safetensors; image_encoder/ likewise
    tokenizer/ scheduler/ image_processor/

A family's `FolderLayout` says which classes it knows. They are names to be looked up in a list,
never something to be imported: nothing in a folder is executed, and what is not on the list is
refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sora_engine.errors import CheckpointError
from sora_engine.io.config_file import read_json_object
from sora_engine.io.safetensors import find_weights, refuse_pickle
from sora_engine.io.weights.opening import open_weights
from sora_engine.io.weights.source import WeightSource

INDEX = "model_index.json"
EVERYWHERE = ("tiny_vae",)
"""Components that every family's models may have, whatever their layout: see `models.registry`."""

_FROM_TRANSFORMERS = ("text_encoder", "tokenizer", "image_encoder", "image_processor")
_NUMBER = re.compile(r"_\d+$")
"""Of a further component of a kind, such as `text_encoder_2`."""
_BOOKKEEPING = ("_class_name", "_diffusers_version", "_name_or_path")
_CONFIG_FILES = {
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
    "image_processor": "preprocessor_config.json",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderLayout:
    """What folders of a family hold.

    pipelines: the classes of whole models. components: by name the classes that each may be, as
    diffusers and transformers write them. optional: the components that a folder may lack.
    settings: further keys of `model_index.json` that the family reads itself. usual: by component
    the names under which people hold it as a single file, for errors.
    """

    pipelines: tuple[str, ...]
    components: Mapping[str, tuple[str, ...]]
    optional: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    usual: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Component:
    """One part of a model: where it is, and its configuration, as read and not yet interpreted.

    folder: that it has to itself. Of a part in a single file it is the file, and `config` is what
    the file's header tells.
    """

    name: str
    class_name: str
    folder: Path
    config: dict[str, Any] = field(repr=False)

    @classmethod
    def open(
        cls, name: str, folder: Path, classes: Sequence[str], class_name: str | None = None
    ) -> Component:
        """Read the component `name` in `folder`.

        classes: those that it may be. class_name: what the index calls it. Raises `CheckpointError`
        if there is no folder, no configuration, or another class in it.
        """
        if not folder.is_dir():
            raise CheckpointError(f"no folder for the {name}", path=folder)
        path = folder / config_file(name)
        # Tokenizers are published without one; the files that are there say what they are.
        bare = _kind(name) == "tokenizer" and not path.exists() and any(folder.iterdir())
        config = {} if bare else read_json_object(path)
        if "auto_map" in config:
            raise CheckpointError("auto_map asks for code of the folder's own", path=path)
        found = _class_in(name, config)
        if found is None:
            found = classes[0] if bare and class_name is None else class_name
        if found is None or found not in classes:
            raise CheckpointError(
                f"the {name}'s class is {found!r}; supported: {', '.join(classes)}", path=path
            )
        return cls(name, found, folder, config)

    @property
    def config_path(self) -> Path:
        """What the configuration was read from."""
        return self.folder if self.folder.is_file() else self.folder / config_file(self.name)

    @property
    def weights_path(self) -> Path:
        """The `.safetensors` file, or the shards' index. `CheckpointError` if there is none."""
        if self.folder.is_file():
            return self.folder
        stem = "model" if _kind(self.name) in _FROM_TRANSFORMERS else "diffusion_pytorch_model"
        return find_weights(self.folder, stem)

    def open_weights(self) -> WeightSource:
        """The component's weights, open; to be closed, or used as a context manager."""
        return open_weights(self.weights_path)


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder that diffusers saved, checked: every class known, every configuration there.

    settings: what `model_index.json` says under the layout's further keys.
    """

    path: Path
    pipeline: str
    components: dict[str, Component]
    settings: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path, layout: FolderLayout) -> ModelFolder:
        """Read `model_index.json` and each component's configuration; no weights are read."""
        path = Path(path)
        index = read_index(path)
        index_path = path / INDEX
        pipeline = index.get("_class_name")
        if pipeline not in layout.pipelines:
            raise CheckpointError(
                f"pipeline class {pipeline!r}; supported: {', '.join(layout.pipelines)}",
                path=index_path,
            )
        unknown = sorted(set(index) - {*layout.components, *_BOOKKEEPING, *layout.settings})
        if unknown:
            raise CheckpointError(f"unknown keys {unknown}", path=index_path)
        components = {}
        for name, classes in layout.components.items():
            optional = name in layout.optional
            class_name = _class_of(name, index.get(name), classes, optional, index_path)
            if class_name is not None:
                components[name] = Component.open(name, path / name, classes, class_name)
        settings = {key: index[key] for key in layout.settings if key in index}
        return cls(path, str(pipeline), components, settings)

    def __getitem__(self, name: str) -> Component:
        return self.components[name]

    def get(self, name: str) -> Component | None:
        return self.components.get(name)


def read_index(path: Path) -> dict[str, Any]:
    """What `model_index.json` of a folder says; CheckpointError where there is none."""
    index_path = path / INDEX
    if not path.is_dir():
        refuse_pickle(path)
        raise CheckpointError("no such folder", path=path)
    if not index_path.exists():
        found = sorted(entry.name for entry in path.iterdir())
        inside = f"it holds {', '.join(found[:6])}" if found else "it is empty"
        raise CheckpointError(f"not a model folder: no {INDEX}; {inside}", path=path)
    return read_json_object(index_path)


def config_file(name: str) -> str:
    """The file that configures the component `name`."""
    return _CONFIG_FILES.get(_kind(name), "config.json")


def _kind(name: str) -> str:
    return _NUMBER.sub("", name)


def _class_of(
    name: str, entry: object, classes: Sequence[str], optional: bool, path: Path
) -> str | None:
    """The class that `model_index.json` gives a component; None where it is null."""
    if entry is None or entry == [None, None]:
        if optional:
            return None
        raise CheckpointError(f"the model has no {name}", path=path)
    library = "transformers" if _kind(name) in _FROM_TRANSFORMERS else "diffusers"
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(e, str) for e in entry):
        raise CheckpointError(f"{name} is {entry!r}; it must be [library, class]", path=path)
    if entry[0] != library or entry[1] not in classes:
        raise CheckpointError(
            f"{name} is {entry[0]}.{entry[1]}; "
            f"supported: {', '.join(f'{library}.{known}' for known in classes)}",
            path=path,
        )
    return str(entry[1])


def _class_in(name: str, config: dict[str, Any]) -> str | None:
    """The class that a component's own configuration names, in whichever way its library does."""
    kind = _kind(name)
    if kind == "tokenizer":
        found = config.get("tokenizer_class")
    elif kind == "image_processor":
        found = config.get("image_processor_type")
    elif kind in _FROM_TRANSFORMERS:
        architectures = config.get("architectures")
        found = architectures[0] if isinstance(architectures, list) and architectures else None
    else:
        found = config.get("_class_name")
    return None if found is None else str(found)
