"""Weights of an image autoencoder under its three sets of names.

diffusers' folders carry diffusers' names and a `config.json`; the older ones name the attention's
projections otherwise. Single files carry the names of latent diffusion's own code
(arXiv 2112.10752) and no configuration: what the layers are is read from the shapes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sora_engine.errors import CheckpointError
from sora_engine.vae.kl import KLVAE
from sora_engine.vae.kl_config import CLASS_NAME, LDM_SCALING, KLConfig
from sora_engine.vae.registry import VAEKind, build_vae

logger = logging.getLogger("sora_engine")

_PREFIXES = ("", "first_stage_model.", "vae.", "model.")
"""Wrappers under which some tools store a whole autoencoder."""
_MARKS = ("decoder.mid.block_1.norm1.weight", "encoder.down.0.block.0.norm1.weight")
CODEBOOK = "quantize.embedding.weight"
"""That tells a VQ-VAE from an autoencoder of continuous latents."""
_LAYERS = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out",
}  # fmt: skip
_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def to_newer_name(name: str) -> str:
    """diffusers' name of today for one of before its version 0.14."""
    older = re.fullmatch(r"(.*\.attentions\.0\.)(query|key|value|proj_attn)(\..*)", name)
    return name if older is None else older[1] + _OLDER[older[2]] + older[3]


def original_names(config: KLConfig) -> dict[str, str]:
    """For every parameter of a `KLVAE`, by its diffusers name, the name in original files."""
    with torch.device("meta"):
        names = list(build_vae(config).state_dict())
    return {name: _original_name(name, len(config.block_out_channels)) for name in names}


def _original_name(name: str, stages: int) -> str:
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
    # The decoder's stages are counted by their size there, and in the order they run here.
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{stages - 1 - int(found[1])}", name)
    name = name.replace(".resnets.", ".block.")
    name = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    for ours, theirs in _LAYERS.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def original_prefix(names: Iterable[str]) -> str | None:
    """Of names of latent diffusion's own code what stands before all; None for others."""
    present = set(names)
    for prefix in _PREFIXES:
        if all(prefix + mark in present for mark in _MARKS):
            return prefix
    return None


def infer_config(
    shapes: Mapping[str, tuple[int, ...]], *, path: str | Path | None = None
) -> KLConfig:
    """The configuration of a file under the original names, from the shapes of its tensors.

    The scale of the latents is not in such files: it is latent diffusion's own for 4 channels, and
    another count is a CheckpointError. A `config.json` beside the file goes before this.
    """
    prefix = original_prefix(shapes)
    if prefix is None:
        raise CheckpointError(
            "has not the names of an image autoencoder", path=path, tensor=_MARKS[0]
        )
    own = {name.removeprefix(prefix): shape for name, shape in shapes.items()}

    def shape(name: str, dims: int = 4) -> tuple[int, ...]:
        if len(own.get(name, ())) != dims:
            what = f"has shape {list(own[name])}" if name in own else "is missing"
            raise CheckpointError(
                f"tensor {name} {what}; a weight of {dims} dimensions is wanted",
                path=path,
                tensor=name,
            )
        return own[name]

    latents = shape("decoder.conv_in.weight")[1]
    if latents != 4:
        raise CheckpointError(
            f"has {latents} latent channels, whose scale is not in the file: use a folder with a "
            "config.json",
            path=path,
            tensor="decoder.conv_in.weight",
        )
    found = [re.match(r"encoder\.down\.(\d{1,3})\.block\.(\d{1,3})\.", name) for name in own]
    blocks = {(int(m[1]), int(m[2])) for m in found if m}
    stages, layers = (max(column) + 1 for column in zip(*blocks, strict=True))
    if len(blocks) != stages * layers:
        raise CheckpointError(
            f"of {stages} stages with {layers} blocks {stages * layers - len(blocks)} are missing",
            path=path,
        )
    widths = tuple(
        shape(f"encoder.down.{i}.block.{layers - 1}.conv2.weight")[0] for i in range(stages)
    )
    logger.info("latents are scaled by %s, as latent diffusion's own; %s", LDM_SCALING, path)
    try:
        return KLConfig(
            in_channels=shape("encoder.conv_in.weight")[1],
            out_channels=shape("decoder.conv_out.weight")[0],
            down_block_types=("DownEncoderBlock2D",) * stages,
            up_block_types=("UpDecoderBlock2D",) * stages,
            block_out_channels=widths,
            layers_per_block=layers,
            latent_channels=latents,
            norm_num_groups=32,
            use_quant_conv="quant_conv.weight" in own,
            use_post_quant_conv="post_quant_conv.weight" in own,
            mid_block_add_attention="decoder.mid.attn_1.q.weight" in own,
        )
    except CheckpointError as error:
        raise CheckpointError(str(error), path=path) from None


@dataclass(frozen=True, slots=True)
class KLFiles:
    """How image autoencoders lie in single files; see `vae.registry.ReadsFile`."""

    def claims(self, names: Iterable[str]) -> bool:
        present = set(names)
        prefix = original_prefix(present)
        return prefix is not None and prefix + CODEBOOK not in present

    def config(
        self, shapes: Mapping[str, tuple[int, ...]], *, path: str | Path | None = None
    ) -> KLConfig:
        return infer_config(shapes, path=path)

    def names(self, names: Iterable[str], config: KLConfig) -> dict[str, str]:
        """Names that no layer has stay as they are; what trained it (`loss.`) is left out."""
        present = list(names)
        prefix = original_prefix(present)
        if prefix is None:
            return {name: to_newer_name(name) for name in present}
        back = {f"{prefix}{original}": name for name, original in original_names(config).items()}
        return {
            name: back.get(name, name)
            for name in present
            if name.startswith(prefix) and not name.startswith((f"{prefix}loss.", "model_ema."))
        }


KIND = VAEKind(config=KLConfig, layers=KLVAE, files=KLFiles(), renames=to_newer_name)

__all__ = ["CLASS_NAME", "KIND", "infer_config", "original_names", "to_newer_name"]
