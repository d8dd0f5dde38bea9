"""DiT checkpoints: folders of diffusers, and transformer files out of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sora_engine.errors import CheckpointError
from sora_engine.io.config_file import read_json_object
from sora_engine.io.loading import Keep, load_into
from sora_engine.io.weights.merging import Merge
from sora_engine.io.weights.opening import open_weights
from sora_engine.models.dit.config import CLASS_NAMES, DiTConfig
from sora_engine.models.family import ShardWeights
from sora_engine.models.folder import Component, FolderLayout, config_file
from sora_engine.request.labels import Labels
from sora_engine.vae.registry import vae_in_file

LAYOUT = FolderLayout(
    pipelines=("DiTPipeline",),
    components={
        "transformer": CLASS_NAMES,
        "vae": ("AutoencoderKL",),
        "scheduler": (
            "DDIMScheduler",
            "DDPMScheduler",
            "DPMSolverMultistepScheduler",
            "UniPCMultistepScheduler",
        ),
    },
    settings=("id2label",),
)
IGNORED = ("pos_embed",)
"""Fixed positions, which some files hold: they are made for each picture's size here."""
DEFAULT_SCHEDULER = {"_class_name": "DDIMScheduler", "clip_sample": False}
"""Of the published folders, for transformer files without a scheduler."""


@dataclass(frozen=True, slots=True)
class TransformerSource:
    """Where a transformer's weights are and what they are the weights of."""

    path: Path
    config: DiTConfig

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
        """Fill `module`, a `DiT` of `self.config` built on the meta device; `shard`, `merge` and
        `keep` as of `load_into`."""
        with open_weights(self.path) as weights:
            load_into(
                module,
                weights,
                device=device,
                dtype=dtype,
                ignore=IGNORED,
                loose_ones=True,
                shard=shard,
                merge=merge,
                keep=keep,
            )

    @property
    def num_parameters(self) -> int:
        """Counted from the headers; nothing is read."""
        with open_weights(self.path) as weights:
            return sum(math.prod(weights.info(name).shape) for name in weights)


def transformer_in_file(path: Path) -> TransformerSource:
    """A transformer file and its configuration, which lies beside it. Raises CheckpointError."""
    config_path = path.parent / config_file("transformer")
    if not config_path.is_file():
        raise CheckpointError(
            "a DiT's file does not tell its heads and its size: diffusers' config.json beside it "
            "would",
            path=path,
        )
    config = DiTConfig.from_dict(read_json_object(config_path), path=config_path)
    return TransformerSource(path, config)


def companions(
    file: Path, components: Path | Mapping[str, Path] | None
) -> tuple[Component, Component | None]:
    """The autoencoder and the scheduler that go with a transformer file. Raises CheckpointError."""
    given = components if isinstance(components, Mapping) else {}
    unknown = sorted(set(given) - {"vae", "scheduler"})
    if unknown:
        raise CheckpointError(f"unknown components {unknown}; known are ['scheduler', 'vae']")
    around = file.parent.parent if file.parent.name == "transformer" else file.parent
    folder = components if isinstance(components, Path) else around
    place = given.get("vae", folder / "vae")
    classes = LAYOUT.components["vae"]
    if place.is_file():
        vae = _vae_file(place, classes)
    else:
        vae = Component.open("vae", place, classes)
    place = given.get("scheduler", folder / "scheduler")
    scheduler = None
    if "scheduler" in given or place.is_dir():
        scheduler = Component.open("scheduler", place, LAYOUT.components["scheduler"])
    return vae, scheduler


def _vae_file(path: Path, classes: Iterable[str]) -> Component:
    with open_weights(path) as weights:
        shapes = {name: weights.info(name).shape for name in weights}
    config = vae_in_file(shapes, path=path)
    if config is None or config.class_name not in classes:
        seen = ", ".join(sorted(shapes)[:4])
        raise CheckpointError(f"no autoencoder of images: it holds {seen}", path=path)
    return Component("vae", config.class_name, path, config.to_dict())


def read_labels(id2label: object, count: int, path: Path) -> Labels:
    """The classes of a model, and their names as `model_index.json` has them: by number one name,
    or several with commas between. Raises CheckpointError."""
    if id2label is None:
        return Labels(count)
    if not isinstance(id2label, Mapping):
        raise CheckpointError(f"id2label must name classes by number, not {id2label!r}", path=path)
    names: dict[str, int] = {}
    for key, value in id2label.items():
        known = re.fullmatch(r"\d{1,9}", str(key)) is not None and int(key) < count
        if not known or not isinstance(value, str):
            raise CheckpointError(
                f"id2label has {key!r}: {value!r}; the model has classes 0 to {count - 1}",
                path=path,
            )
        for name in value.split(","):
            names[" ".join(name.split())] = int(key)
    return Labels(count, names)
