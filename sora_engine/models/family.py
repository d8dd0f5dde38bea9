"""The seam: what a family of checkpoints is, and what the engine asks of it.

A family recognises its files, opens them as a `Checkpoint`, and says how its transformers are built
and filled. Nothing outside a family's own folder names it but one line of `models.registry`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from sora_engine.denoise.model import TransformerShape
from sora_engine.io.loading import Keep
from sora_engine.io.weights.merging import Merge
from sora_engine.models.folder import Component, FolderLayout
from sora_engine.models.transformer import DiffusionTransformer
from sora_engine.request import GenerationDefaults, KnownMode, LatentGrid
from sora_engine.request.driving import Driving
from sora_engine.request.labels import Labels
from sora_engine.request.ladders import Ladder
from sora_engine.samplers.config import Spread

Shapes = Mapping[str, tuple[int, ...]]
"""The tensors of a file: their names and shapes."""
Sizes = Mapping[str, tuple[int, int]]
"""Of modules, by the engine's names: rows of the weight, and values of a row."""
ShardWeights = Callable[[nn.Module], Mapping[str, range]]
"""Makes a module on the meta device one of several that share its weights out; tells which rows of
which parameters this process then has. See `io.loading.load_into`."""


class Fill(Protocol):
    """Reads a transformer's weights from its files."""

    def __call__(
        self,
        module: nn.Module,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        shard: ShardWeights | None = None,
        merge: Merge | None = None,
        keep: Keep | None = None,
    ) -> None:
        """Fill a module that was built on the meta device, adapters merged in; `keep` as of
        `load_into`. Raises CheckpointError."""
        ...


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ExpertSource:
    """One transformer of a checkpoint, of which nothing is read yet but headers.

    also: further files of its weights, laid over those of `path`.
    from_fraction: it serves the noise levels from this fraction of them on, down to the next
        expert's; 0 for the last.
    build: from the name of an attention backend, on the current default device.
    """

    path: Path
    shape: TransformerShape
    num_parameters: int
    build: Callable[[str], DiffusionTransformer]
    fill: Fill
    also: tuple[Path, ...] = ()
    from_fraction: float = 0.0


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TextSource:
    """A text encoder of a checkpoint: built by the kind that the encoder's class names.

    tokenizer: None for kinds that need none, such as an embedding of class labels, and where the
        encoder's file brings it.
    max_tokens: where prompts are cut.
    """

    encoder: Component
    tokenizer: Component | None
    max_tokens: int


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ImageSource:
    """An image encoder of a checkpoint, and what prepares pictures for it; None: as CLIP does."""

    encoder: Component
    processor: Component | None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Checkpoint:
    """Everything that a model is made of, found and checked, with no weights read yet.

    variant: which of its family's it is, for people.
    experts: by falling noise level.
    text_encoders: by the names under which the transformer reads them. A table of labels is one
        too; there is none where the transformer reads nothing but the video.
    takes_last_image: whether the image encoder is shown the last frame too.
    learned_variance: whether predictions carry as many channels again, of a variance.
    labels: the classes that it makes, where it reads a class in place of a text.
    takes_camera: whether it is told how the camera moves.
    shares_tokens: whether ranks can share the tokens of one pass out (ulysses, ring).
    spread: how its pipelines spread levels; None: as the scheduler's class does by itself.
    defaults: of the family's published pipelines; a checkpoint's own go before them.
    """

    family: str
    variant: str
    path: Path
    experts: tuple[ExpertSource, ...]
    vae: Component
    scheduler_config: Mapping[str, Any]
    grid: LatentGrid
    known_mode: KnownMode
    defaults: GenerationDefaults
    text_encoders: Mapping[str, TextSource] = field(default_factory=dict)
    image_encoder: ImageSource | None = None
    takes_last_image: bool = False
    learned_variance: bool = False
    labels: Labels | None = None
    takes_camera: bool = False
    shares_tokens: bool = True
    spread: Spread | None = None
    scheduler_path: Path | None = None
    """The file of `scheduler_config`, where it is one, for errors."""
    driving: Driving | None = None
    """How its worlds are driven, where it takes actions."""
    tiny_vae: Path | None = None
    """A tiny autoencoder for its latents, where one was given: see `models.tiny_vae`."""

    @property
    def shape(self) -> TransformerShape:
        """Of its transformers, which are all built alike."""
        return self.experts[0].shape

    @property
    def weights_paths(self) -> list[Path]:
        """The files by which results name what made them."""
        text = [source.encoder.weights_path for source in self.text_encoders.values()]
        own = [path for expert in self.experts for path in (expert.path, *expert.also)]
        return [*own, self.vae.weights_path, *text]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What models of a family can do, for people: `models.overview` makes a table of it.

    known_modes: what their known content is to them, by variant. windows: the schedules of windows,
    and `sparse` for a `SparsePlan`. ranks: the axes over which a job can be shared out. adapters:
    those that requests and loading take. page: of the docs.
    """

    makes: str
    reads: str
    known_modes: tuple[KnownMode, ...]
    windows: tuple[str, ...]
    ranks: tuple[str, ...]
    adapters: tuple[str, ...]
    page: str


class Family(Protocol):
    """A kind of checkpoint."""

    @property
    def capabilities(self) -> Capabilities:
        """What its models can do."""
        ...

    @property
    def name(self) -> str:
        """For people, and for `Checkpoint.family`."""
        ...

    @property
    def layout(self) -> FolderLayout:
        """What its folders hold in diffusers' layout; its pipeline classes are its alone."""
        ...

    @property
    def ladders(self) -> Mapping[str, Ladder]:
        """Of its few-step models, by names that are its alone."""
        ...

    def claims_file(self, shapes: Shapes) -> bool:
        """Whether a single file with these tensors is a transformer of this family.

        Two families never claim one file.
        """
        ...

    def describe_file(self, path: Path) -> str:
        """What a transformer file that it claims is, and what goes with it, for people. Raises
        CheckpointError."""
        ...

    def own_name(self, module: str) -> str | None:
        """The module or parameter that an adapter's name for it means, in any published naming,
        with dots or with underscores in their place; None for one that is no naming's."""
        ...

    def published_name(self, name: str) -> str:
        """The name that its authors give a tensor, and that files for other programs have, by the
        engine's name or by that itself."""
        ...

    def is_further_input(self, name: str) -> bool:
        """Whether a parameter serves an input that some of its transformers do not take, such as
        an image's tokens: adapters' changes of it are left out there, and logged."""
        ...

    def describe_adapter(self, sizes: Sizes) -> str | None:
        """Which of its models has such parameters, for people; None where none of them are its."""
        ...

    def open_folder(self, path: Path, settings: Mapping[str, Any]) -> Checkpoint:
        """Open a folder whose pipeline class is in `layout`.

        settings: of the folder's `generation_config.json`: defaults of requests, and `text_tokens`,
        the length that texts are padded to.
        Raises CheckpointError.
        """
        ...

    def open_files(
        self,
        paths: Sequence[Path],
        components: Path | Mapping[str, Path] | None,
        settings: Mapping[str, Any],
    ) -> Checkpoint:
        """Open transformer files, the first of which it claims, the expert for high noise first.

        components: the folder with all else, or by name a file or a folder of each part; None
        stands for the first file's own. Raises CheckpointError.
        """
        ...
