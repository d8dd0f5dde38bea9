"""What families of one transformer have in common: files, names, and checks of their parts."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol

from sora_engine.denoise.model import TransformerShape
from sora_engine.errors import CheckpointError
from sora_engine.io.config_file import read_json_object
from sora_engine.models.authors_names import AuthorsNames, Names
from sora_engine.models.family import (
    Capabilities,
    Checkpoint,
    ExpertSource,
    Shapes,
    Sizes,
    TextSource,
)
from sora_engine.models.folder import Component, FolderLayout, ModelFolder, config_file
from sora_engine.models.transformer import DiffusionTransformer
from sora_engine.models.transformer_files import (
    ConfigT,
    TransformerSource,
    companions,
    shapes_in,
    without_prefix,
)
from sora_engine.request import GenerationDefaults, LatentGrid
from sora_engine.request.ladders import Ladder
from sora_engine.vae.registry import read_vae_config
from sora_engine.vae.shapes import VAEConfig


class BuildsTransformer(Protocol):
    """A family's class of transformers."""

    def __call__(self, config: Any, *, attention_backend: str) -> DiffusionTransformer: ...


class PlainFamily(ABC, Generic[ConfigT]):
    """A family whose models have one transformer each, with diffusers' names; a `Family`.

    config: of the transformer. transformer: its class. marks: tensors that every file of one has,
    of which the first must be there. foreign: tensors that none has, and another family's do.
    layers: those that adapters name with underscores in the place of dots; `#` is a number.
    ignored, keep_fp32: as of `TransformerSource`. default_scheduler: for files without one; None:
    files need one. authors: the names that their authors' files have. adapted: the attention that
    tells an adapter's width and, as its group, the layer. adapted_elsewhere: names that no adapter
    of this family has.
    """

    name: ClassVar[str]
    config: ClassVar[type[Any]]
    layout: ClassVar[FolderLayout]
    ladders: ClassVar[Mapping[str, Ladder]] = {}
    capabilities: ClassVar[Capabilities]
    transformer: ClassVar[BuildsTransformer]
    marks: ClassVar[tuple[str, ...]]
    foreign: ClassVar[tuple[str, ...]] = ()
    layers: ClassVar[tuple[str, ...]]
    ignored: ClassVar[tuple[str, ...]] = ()
    keep_fp32: ClassVar[tuple[str, ...]] = ()
    default_scheduler: ClassVar[Mapping[str, Any] | None] = None
    authors: ClassVar[AuthorsNames | None] = None
    adapted: ClassVar[str]
    adapted_elsewhere: ClassVar[str] = r"(?!)"

    @abstractmethod
    def described(self, config: ConfigT) -> str:
        """Its sizes, and what goes with it, for people."""

    @abstractmethod
    def assemble(
        self,
        path: Path,
        source: TransformerSource[ConfigT],
        parts: Mapping[str, Component],
        settings: Mapping[str, Any],
    ) -> Checkpoint:
        """What was found, checked, as the engine sees it. Raises CheckpointError.

        parts: by name those of the layout that are there. settings: what `model_index.json` says
        under the layout's keys; none of files.
        """

    @abstractmethod
    def shape(self, config: ConfigT) -> TransformerShape:
        """The sizes of the transformer that a configuration describes."""

    def translate(self, shapes: Shapes) -> Names | None:
        """The file's names for the engine's, where they are its authors'; None where they are the
        engine's."""
        return None if self.authors is None else self.authors.names(shapes)

    def told_by(self, shapes: Shapes) -> ConfigT | None:
        """The configuration of a file that has none beside it, where its shapes tell it."""
        return None

    def of_pipeline(self, config: ConfigT, pipeline: str) -> ConfigT:
        """The configuration, with what the class of a folder's pipeline says."""
        return config

    # The seam.

    def claims_file(self, shapes: Shapes) -> bool:
        """Whether most of the tensors that every one has are there, the first among them: a file
        with most is one, if a damaged one."""
        bare = without_prefix(shapes)
        names = self.translate(bare)
        has = [mark in (bare if names is None else names) for mark in self.marks]
        others = any(name in bare for name in self.foreign)
        return has[0] and sum(has) > len(has) // 2 and not others

    def describe_file(self, path: Path) -> str:
        """Its sizes, and what goes with it."""
        return f"{self.name} transformer, {self.described(self.source_in_file(path).config)}"

    def own_name(self, module: str) -> str | None:
        """diffusers' names, which are the engine's; with underscores in their place, too."""
        if "." in module:
            return module
        for layer in self.layers:
            found = re.fullmatch(layer.replace(".", "_").replace("#", r"(\d+)"), module)
            if found is not None:
                for number in found.groups():
                    layer = layer.replace("#", number, 1)
                return layer
        return None

    def published_name(self, name: str) -> str:
        """diffusers', as the files have them."""
        return name

    def is_further_input(self, name: str) -> bool:
        """All of its transformers take the same."""
        return False

    def describe_adapter(self, sizes: Sizes) -> str | None:
        """Width and layers, from the attention that it changes."""
        found = [
            (int(match[1]), rows)
            for name, (rows, _) in sizes.items()
            if (match := re.fullmatch(self.adapted, name))
        ]
        widths = {rows for _, rows in found}
        if len(widths) != 1 or any(re.search(self.adapted_elsewhere, name) for name in sizes):
            return None
        layers = max(layer for layer, _ in found) + 1
        return f"a {self.name} transformer {widths.pop()} wide of {layers} layers or more"

    def open_folder(self, path: Path, settings: Mapping[str, Any]) -> Checkpoint:
        """A folder that diffusers' pipeline saved."""
        folder = ModelFolder.open(path, self.layout)
        part = folder["transformer"]
        config: ConfigT = self.config.from_dict(part.config, path=part.config_path)
        source = self._source(part.weights_path, self.of_pipeline(config, folder.pipeline))
        return self.assemble(path, source, folder.components, folder.settings)

    def open_files(
        self,
        paths: Sequence[Path],
        components: Path | Mapping[str, Path] | None,
        settings: Mapping[str, Any],
    ) -> Checkpoint:
        """A transformer file, and the other parts."""
        if len(paths) != 1:
            raise CheckpointError(
                f"{len(paths)} files; a model of {self.name} is one", path=paths[1]
            )
        source = self.source_in_file(paths[0])
        spared = () if self.default_scheduler is None else ("scheduler",)
        parts = companions(paths[0], components, self.layout, spared=spared)
        return self.assemble(paths[0], source, parts, {})

    # For `assemble`.

    def source_in_file(self, path: Path) -> TransformerSource[ConfigT]:
        """A transformer file and its configuration, which lies beside it or is told by its shapes.
        Raises CheckpointError."""
        beside = path.parent / config_file("transformer")
        if beside.is_file():
            config = self.config.from_dict(read_json_object(beside), path=beside)
        else:
            told = self.told_by(shapes_in(path))
            if told is None:
                raise CheckpointError(
                    f"a file of {self.name} does not tell its heads and its size: diffusers' "
                    "config.json beside it would",
                    path=path,
                )
            config = told
        return self._source(path, config)

    def expert(self, source: TransformerSource[ConfigT]) -> ExpertSource:
        """The transformer, with nothing of it read."""
        return ExpertSource(
            path=source.path,
            shape=self.shape(source.config),
            num_parameters=source.num_parameters,
            build=self._builder(source.config),
            fill=source.load,
        )

    def trained_at_one_size(
        self,
        path: Path,
        source: TransformerSource[ConfigT],
        parts: Mapping[str, Component],
        *,
        channels: int,
        side: int,
        patch: int,
        defaults: Mapping[str, Any],
        **more: Any,
    ) -> Checkpoint:
        """A checkpoint of square videos or pictures, for which known frames are the first thing
        that the family's capabilities name.

        channels: of latents, which the autoencoder must have: CheckpointError. side: of the
        latents. patch: of a patch, in latents. defaults: of a request, without its size, and of
        pictures without length and rate. more: what is this family's own of a `Checkpoint`.
        """
        coder = vae_of(parts, channels)
        pictures = self.capabilities.makes == "pictures"
        size = side * coder.factor_spatial
        still: dict[str, Any] = {"num_frames": 1, "fps": 1.0} if pictures else {}
        return Checkpoint(
            family=self.name,
            path=path,
            experts=(self.expert(source),),
            vae=parts["vae"],
            **self.scheduler(parts),
            grid=LatentGrid(
                channels=channels,
                vae_spatial=coder.factor_spatial,
                patch=(1, patch, patch),
                time=1 if pictures else coder.factor_temporal,
                images=pictures,
            ),
            known_mode=self.capabilities.known_modes[0],
            defaults=GenerationDefaults(height=size, width=size, **still, **defaults),
            **more,
        )

    def scheduler(self, parts: Mapping[str, Component]) -> dict[str, Any]:
        """`scheduler_config` and `scheduler_path` of a `Checkpoint`."""
        if "scheduler" in parts:
            found = parts["scheduler"]
            return {"scheduler_config": found.config, "scheduler_path": found.config_path}
        assert self.default_scheduler is not None
        return {"scheduler_config": self.default_scheduler, "scheduler_path": None}

    def _source(self, path: Path, config: ConfigT) -> TransformerSource[ConfigT]:
        return TransformerSource(path, config, self.translate, self.ignored, self.keep_fp32)

    def _builder(self, config: ConfigT) -> Callable[[str], DiffusionTransformer]:
        build = type(self).transformer
        return lambda backend: build(config, attention_backend=backend)


def vae_of(parts: Mapping[str, Component], channels: int) -> VAEConfig:
    """The autoencoder's configuration, whose latents have so many channels. Raises
    CheckpointError."""
    vae = parts["vae"]
    coder = read_vae_config({"_class_name": vae.class_name, **vae.config}, path=vae.config_path)
    if coder.z_dim != channels:
        raise CheckpointError(
            f"the transformer takes {channels} channels and the autoencoder's latents have "
            f"{coder.z_dim}",
            path=vae.config_path,
        )
    return coder


def check_texts(parts: Mapping[str, Component], channels: int) -> None:
    """That the text encoder gives so many channels. Raises CheckpointError."""
    text = parts["text_encoder"]
    if text.config.get("d_model", channels) != channels:
        raise CheckpointError(
            f"the transformer reads texts of {channels} channels and the encoder gives "
            f"{text.config['d_model']!r}",
            path=text.config_path,
        )


DISCRETE_SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
"""Those that models of discrete noise levels are published with, and that are carried out."""


def t5_texts(parts: Mapping[str, Component], tokens: int) -> dict[str, TextSource]:
    """T5's embeddings of texts, padded to so many tokens, as `"text"`, and how many of them are a
    text's own, as `"count"`."""
    text = parts["text_encoder"]
    encoders = {"text": text, "count": replace(text, class_name="T5TokenCounts")}
    return {
        name: TextSource(encoder=part, tokenizer=parts["tokenizer"], max_tokens=tokens)
        for name, part in encoders.items()
    }
