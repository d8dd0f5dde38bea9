"""Latte checkpoints: folders of diffusers, and transformer files out of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sora_engine.errors import CheckpointError
from sora_engine.io.config_file import read_json_object
from sora_engine.io.loading import Keep, load_into
from sora_engine.io.weights.merging import Merge
from sora_engine.io.weights.opening import open_weights
from sora_engine.models.family import ShardWeights
from sora_engine.models.folder import Component, FolderLayout, config_file
from sora_engine.models.latte.config import CLASS_NAME, LatteConfig

LAYOUT = FolderLayout(
    pipelines=("LattePipeline",),
    components={
        "transformer": (CLASS_NAME,),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("T5EncoderModel",),
        "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
        "scheduler": (
            "DDIMScheduler",
            "DDPMScheduler",
            "DPMSolverMultistepScheduler",
            "UniPCMultistepScheduler",
        ),
    },
)
IGNORED = ("pos_embed", "temp_pos_embed")
"""Fixed positions, which some files hold: they are made for each video's size here."""
KEEP_FP32 = ("scale_shift_table",)


@dataclass(frozen=True, slots=True)
class TransformerSource:
    """Where a transformer's weights are and what they are the weights of."""

    path: Path
    config: LatteConfig

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
        """Fill `module`, a `LatteTransformer` of `self.config` built on the meta device; `shard`,
        `merge` and `keep` as of `load_into`."""
        with open_weights(self.path) as weights:
            load_into(
                module,
                weights,
                device=device,
                dtype=dtype,
                keep_fp32=KEEP_FP32,
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
            "a Latte's file does not tell its heads and its size: diffusers' config.json beside it "
            "would",
            path=path,
        )
    config = LatteConfig.from_dict(read_json_object(config_path), path=config_path)
    return TransformerSource(path, config)


def companions(file: Path, components: Path | Mapping[str, Path] | None) -> dict[str, Component]:
    """The other parts of a model, for a transformer file: in a folder, or in one each. Raises
    CheckpointError."""
    given = components if isinstance(components, Mapping) else {}
    others = sorted(set(LAYOUT.components) - {"transformer"})
    unknown = sorted(set(given) - set(others))
    if unknown:
        raise CheckpointError(f"unknown components {unknown}; known are {others}")
    around = file.parent.parent if file.parent.name == "transformer" else file.parent
    folder = components if isinstance(components, Path) else around
    return {
        name: Component.open(name, given.get(name, folder / name), LAYOUT.components[name])
        for name in others
    }
