"""LTX-Video checkpoints: folders of diffusers, and transformer files out of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from sora_engine.models.ltx.config import CLASS_NAME, LTXConfig

LAYOUT = FolderLayout(
    pipelines=("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline"),
    components={
        "transformer": (CLASS_NAME,),
        "vae": ("AutoencoderKLLTXVideo",),
        "text_encoder": ("T5EncoderModel",),
        "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
        "scheduler": ("FlowMatchEulerDiscreteScheduler",),
    },
)
KEEP_FP32 = ("scale_shift_table",)


@dataclass(frozen=True, slots=True)
class TransformerSource:
    """Where a transformer's weights are and what they are the weights of."""

    path: Path
    config: LTXConfig

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
        """Fill `module`, an `LTXTransformer` of `self.config` built on the meta device; `shard`,
        `merge` and `keep` as of `load_into`."""
        with open_weights(self.path) as weights:
            load_into(
                module,
                weights,
                device=device,
                dtype=dtype,
                keep_fp32=KEEP_FP32,
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
            "an LTX-Video file does not tell its heads: diffusers' config.json beside it would",
            path=path,
        )
    config = LTXConfig.from_dict(read_json_object(config_path), path=config_path)
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


def with_statistics(vae: Component) -> Component:
    """An autoencoder with the statistics of its latents in its configuration. diffusers keeps them
    beside the weights, as `latents_mean` and `latents_std`. Raises CheckpointError."""
    found = {}
    with vae.open_weights() as weights:
        for name in ("latents_mean", "latents_std"):
            if name not in weights:
                raise CheckpointError(
                    f"tensor {name} is missing: an LTX-Video autoencoder has it", path=vae.folder
                )
            if len(weights.info(name).shape) != 1:
                raise CheckpointError(
                    f"tensor {name} has shape {list(weights.info(name).shape)}; one value a "
                    "channel is wanted",
                    path=vae.folder,
                )
            found[name] = weights.read(name).float().tolist()
    return replace(vae, config={**vae.config, **found})
