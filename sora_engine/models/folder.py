"""A model folder in diffusers' layout: which components it has and where their files are.

    model_index.json            the pipeline's class, each component's library and class
    transformer/config.json     and diffusion_pytorch_model*.safetensors; vae/ likewise
    text_encoder/config.json    and model*.safetensors; image_encoder/ likewise
    tokenizer/ scheduler/ image_processor/

Classes are names to be looked up in a list, never something to be imported: nothing in a folder is
executed, and what is not on the list is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sora_engine.errors import CheckpointError
from sora_engine.io.config_file import read_json_object
from sora_engine.io.safetensors import Weights, find_weights, refuse_pickle

INDEX = "model_index.json"
PIPELINES = ("WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline")
CLASSES: dict[str, tuple[str, ...]] = {
    "transformer": ("WanTransformer3DModel", "WanVACETransformer3DModel"),
    "transformer_2": ("WanTransformer3DModel", "WanVACETransformer3DModel"),
    "vae": ("AutoencoderKLWan",),
    "text_encoder": ("UMT5EncoderModel",),
    "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
    "scheduler": (
        "UniPCMultistepScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DDIMScheduler",
        "DDPMScheduler",
    ),
    "image_encoder": ("CLIPVisionModel",),
    "image_processor": (
        "CLIPImageProcessor",
        "CLIPImageProcessorFast",
        "CLIPImageProcessorPil",
        "CLIPFeatureExtractor",
    ),
}
"""What each component may be, by the names that diffusers and transformers write."""
OPTIONAL = ("transformer_2", "image_encoder", "image_processor")
_FROM_TRANSFORMERS = ("text_encoder", "tokenizer", "image_encoder", "image_processor")
_BOOKKEEPING = ("_class_name", "_diffusers_version", "_name_or_path")
_SETTINGS = ("boundary_ratio", "expand_timesteps")
_CONFIG_FILES = {
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
    "image_processor": "preprocessor_config.json",
}


@dataclass(frozen=True, slots=True)
class Component:
    """One part of a model: its folder and its configuration, as read and not yet interpreted."""

    name: str
    class_name: str
    folder: Path
    config: dict[str, Any] = field(repr=False)

    @classmethod
    def open(cls, name: str, folder: Path, class_name: str | None = None) -> Component:
        """Read the component `name` in `folder`; `class_name` is what the index calls it.

        Raises `CheckpointError` if there is no folder, no configuration, or another class in it.
        """
        if not folder.is_dir():
            raise CheckpointError(f"no folder for the {name}", path=folder)
        path = folder / config_file(name)
        config = read_json_object(path)
        if "auto_map" in config:
            raise CheckpointError("auto_map asks for code of the folder's own", path=path)
        found = _class_in(name, config)
        if found is None:
            found = class_name
        if found not in CLASSES[name]:
            raise CheckpointError(
                f"the {name}'s class is {found!r}; supported: {', '.join(CLASSES[name])}", path=path
            )
        return cls(name, found, folder, config)

    @property
    def config_path(self) -> Path:
        return self.folder / config_file(self.name)

    @property
    def weights_path(self) -> Path:
        """The `.safetensors` file, or the shards' index. `CheckpointError` if there is none."""
        stem = "model" if self.name in _FROM_TRANSFORMERS else "diffusion_pytorch_model"
        return find_weights(self.folder, stem)

    def open_weights(self) -> Weights:
        """The component's weights, open; to be closed, or used as a context manager."""
        return Weights.open(self.weights_path)


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder that diffusers saved, checked: every class known, every configuration there."""

    path: Path
    pipeline: str
    components: dict[str, Component]
    boundary_ratio: float | None = None
    """Where the second transformer takes over, as a fraction of the noise levels."""
    expand_timesteps: bool = False
    """Whether each token has its own timestep (Wan 2.2 TI2V-5B)."""

    @classmethod
    def open(cls, path: str | Path) -> ModelFolder:
        """Read `model_index.json` and each component's configuration; no weights are read."""
        path = Path(path)
        index_path = path / INDEX
        if not path.is_dir():
            refuse_pickle(path)
            raise CheckpointError("no such folder", path=path)
        if not index_path.exists():
            found = sorted(entry.name for entry in path.iterdir())
            inside = f"it holds {', '.join(found[:6])}" if found else "it is empty"
            raise CheckpointError(f"not a model folder: no {INDEX}; {inside}", path=path)
        index = read_json_object(index_path)

        pipeline = index.get("_class_name")
        if pipeline not in PIPELINES:
            raise CheckpointError(
                f"pipeline class {pipeline!r}; supported: {', '.join(PIPELINES)}", path=index_path
            )
        unknown = sorted(set(index) - set(CLASSES) - set(_BOOKKEEPING) - set(_SETTINGS))
        if unknown:
            raise CheckpointError(f"unknown keys {unknown}", path=index_path)
        boundary_ratio, expand_timesteps = _settings(index, index_path)

        components = {}
        for name in CLASSES:
            class_name = _class_of(name, index.get(name), index_path)
            if class_name is not None:
                components[name] = Component.open(name, path / name, class_name)
        if ("transformer_2" in components) != (boundary_ratio is not None):
            raise CheckpointError(
                f"boundary_ratio is {boundary_ratio} and transformer_2 is "
                f"{'there' if 'transformer_2' in components else 'null'}; two experts need both",
                path=index_path,
            )
        return cls(path, pipeline, components, boundary_ratio, expand_timesteps)

    def __getitem__(self, name: str) -> Component:
        return self.components[name]

    def get(self, name: str) -> Component | None:
        return self.components.get(name)


def config_file(name: str) -> str:
    """The file that configures the component `name`."""
    return _CONFIG_FILES.get(name, "config.json")


def _class_of(name: str, entry: object, path: Path) -> str | None:
    """The class that `model_index.json` gives a component; None where it is null."""
    if entry is None or entry == [None, None]:
        if name in OPTIONAL:
            return None
        raise CheckpointError(f"the model has no {name}", path=path)
    library = "transformers" if name in _FROM_TRANSFORMERS else "diffusers"
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(e, str) for e in entry):
        raise CheckpointError(f"{name} is {entry!r}; it must be [library, class]", path=path)
    if entry[0] != library or entry[1] not in CLASSES[name]:
        raise CheckpointError(
            f"{name} is {entry[0]}.{entry[1]}; "
            f"supported: {', '.join(f'{library}.{known}' for known in CLASSES[name])}",
            path=path,
        )
    return entry[1]


def _class_in(name: str, config: dict[str, Any]) -> str | None:
    """The class that a component's own configuration names, in whichever way its library does."""
    if name == "tokenizer":
        found = config.get("tokenizer_class")
    elif name == "image_processor":
        found = config.get("image_processor_type")
    elif name in _FROM_TRANSFORMERS:
        architectures = config.get("architectures")
        found = architectures[0] if isinstance(architectures, list) and architectures else None
    else:
        found = config.get("_class_name")
    return None if found is None else str(found)


def _settings(index: dict[str, Any], path: Path) -> tuple[float | None, bool]:
    boundary = index.get("boundary_ratio")
    number = isinstance(boundary, (int, float)) and not isinstance(boundary, bool)
    if boundary is not None and not (number and 0 < boundary < 1):
        raise CheckpointError(
            f"boundary_ratio is {boundary!r}; it must lie between 0 and 1, or be null", path=path
        )
    expand = index.get("expand_timesteps", False)
    if not isinstance(expand, bool):
        raise CheckpointError(
            f"expand_timesteps is {expand!r}; it must be true or false", path=path
        )
    return (None if boundary is None else float(boundary)), expand
