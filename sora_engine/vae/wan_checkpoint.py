"""Weights of a Wan autoencoder under either of their two sets of names.

diffusers folders carry diffusers' names and a `config.json`. Single files (`Wan2.1_VAE`,
`Wan2.2_VAE` as safetensors, and what ComfyUI ships) carry the names of the original code and no
config: what the layers are is read from the names and shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sora_engine.errors import CheckpointError
from sora_engine.vae.registry import VAEKind
from sora_engine.vae.wan import WanVAE
from sora_engine.vae.wan_config import WAN21_MEAN, WAN21_STD, WAN22_MEAN, WAN22_STD, WanVAEConfig

_RESIDUAL = {
    "norm1.gamma": "residual.0.gamma",
    "conv1": "residual.2",
    "norm2.gamma": "residual.3.gamma",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
# Wrappers under which some tools store a whole VAE.
_PREFIXES = ("", "vae.", "first_stage_model.", "model.")


def original_names(config: WanVAEConfig) -> dict[str, str]:
    """For every parameter of a `WanVAE`, by its diffusers name, the name in Wan's own files."""
    with torch.device("meta"):
        names = list(WanVAE(config).state_dict())
    return {name: _original_name(name, config) for name in names}


def _original_name(name: str, config: WanVAEConfig) -> str:
    side, _, rest = name.partition(".")
    if side in ("quant_conv", "post_quant_conv"):
        return f"{'conv1' if side == 'quant_conv' else 'conv2'}.{rest}"
    part, _, rest = rest.partition(".")
    if part == "conv_in":
        return f"{side}.conv1.{rest}"
    if part == "norm_out":
        return f"{side}.head.0.{rest}"
    if part == "conv_out":
        return f"{side}.head.2.{rest}"
    if part == "mid_block":
        kind, number, rest = rest.split(".", 2)
        if kind == "attentions":
            return f"{side}.middle.1.{rest}"
        return f"{side}.middle.{2 * int(number)}.{_in_residual(rest)}"
    # Stages. The blocks of one are numbered through, the resampling after them.
    stage_text, _, rest = rest.partition(".")
    stage = int(stage_text)
    group = "downsamples" if side == "encoder" else "upsamples"
    if side == "encoder" and not config.is_residual:
        return f"{side}.{group}.{stage}.{_in_residual(rest)}"  # one flat list in both
    kind, _, rest = rest.partition(".")
    blocks = config.num_res_blocks + (side == "decoder")
    if kind == "resnets":
        index, _, rest = rest.partition(".")
    else:  # downsampler, upsampler, upsamplers.0
        index, rest = str(blocks), rest.removeprefix("0.")
    if config.is_residual:
        return f"{side}.{group}.{stage}.{group}.{index}.{_in_residual(rest)}"
    return f"{side}.{group}.{stage * (blocks + 1) + int(index)}.{_in_residual(rest)}"


def _in_residual(rest: str) -> str:
    if rest in _RESIDUAL:
        return _RESIDUAL[rest]
    layer, _, leaf = rest.partition(".")
    return f"{_RESIDUAL[layer]}.{leaf}" if layer in _RESIDUAL else rest


def has_original_names(names: Iterable[str]) -> bool:
    """Whether these are the names of Wan's own files (with a known prefix or none)."""
    return _prefix(names) is not None


def _prefix(names: Iterable[str]) -> str | None:
    present = set(names)
    for prefix in _PREFIXES:
        if f"{prefix}decoder.middle.0.residual.0.gamma" in present:
            return prefix
    return None


def to_diffusers_names(names: Iterable[str], config: WanVAEConfig) -> dict[str, str]:
    """By each name in a file diffusers' name of it; other parts of an all-in-one file are left
    out, and names that no layer has stay as they are."""
    present = list(names)
    prefix = _prefix(present)
    if prefix is None:
        return {name: name for name in present}
    back = {f"{prefix}{original}": name for name, original in original_names(config).items()}
    return {name: back.get(name, name) for name in present if name.startswith(prefix)}


def infer_config(
    shapes: Mapping[str, tuple[int, ...]], *, path: str | Path | None = None
) -> WanVAEConfig:
    """The configuration of a file under Wan's own names, from the shapes of its tensors.

    The statistics of the latents are not in such files: they are the published ones of Wan 2.1 for
    16 latent channels and of Wan 2.2 for 48; another count is a CheckpointError.
    """
    prefix = _prefix(shapes)
    if prefix is None:
        raise CheckpointError(
            "has not the names of Wan's own autoencoder files, such as "
            "decoder.middle.0.residual.0.gamma", path=path,
            tensor="decoder.middle.0.residual.0.gamma",
        )  # fmt: skip
    shapes = {
        name.removeprefix(prefix): tuple(shape)
        for name, shape in shapes.items()
        if name.startswith(prefix)
    }

    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            raise CheckpointError(f"tensor {name} is missing", path=path, tensor=name)
        return shapes[name]

    z_dim = shape("conv2.weight")[0]
    if z_dim not in (16, 48):
        raise CheckpointError(
            f"has {z_dim} latent channels, by its tensor conv2.weight; Wan 2.1 has 16 and Wan 2.2 "
            "has 48, and their statistics are not in the file: use a folder with a config.json",
            path=path,
            tensor="conv2.weight",
        )
    residual = any(name.startswith("decoder.upsamples.0.upsamples.") for name in shapes)
    base, in_channels = shape("encoder.conv1.weight")[:2]
    out_channels, decoder_base = shape("decoder.head.2.weight")[:2]
    stages = _encoder_stages(shapes, residual)
    blocks = {len(outs) for outs, _ in stages}
    if not stages or len(blocks) != 1 or any(outs[-1] % base for outs, _ in stages):
        raise CheckpointError(
            "the encoder's stages are not those of a Wan autoencoder", path=path,
            tensor="encoder.conv1.weight",
        )  # fmt: skip
    # The decoder's last stage is as wide as its base times the first multiplier.
    mult = tuple(outs[-1] // base for outs, _ in stages)
    return WanVAEConfig(
        base_dim=base,
        decoder_base_dim=decoder_base // mult[0],
        z_dim=z_dim,
        dim_mult=mult,
        num_res_blocks=blocks.pop(),
        temperal_downsample=tuple(bool(time) for _, time in stages[:-1]),
        latents_mean=WAN21_MEAN if z_dim == 16 else WAN22_MEAN,
        latents_std=WAN21_STD if z_dim == 16 else WAN22_STD,
        is_residual=residual,
        in_channels=in_channels,
        out_channels=out_channels,
        patch_size=2 if in_channels == 12 else None,
    )


def _encoder_stages(
    shapes: Mapping[str, tuple[int, ...]], residual: bool
) -> list[tuple[list[int], bool]]:
    """For every stage the output channels of its blocks, and whether it halves time."""
    depth = r"(\d+)\.downsamples\.(\d+)" if residual else r"(\d+)"
    layer = re.compile(
        rf"encoder\.downsamples\.{depth}\.(residual\.6|resample\.1|time_conv)\.weight"
    )
    found: dict[tuple[int, ...], dict[str, int]] = {}
    for name, shape in shapes.items():
        match = layer.fullmatch(name)
        if match:
            *place, kind = match.groups()
            found.setdefault(tuple(map(int, place)), {})[kind] = shape[0]
    stages: list[tuple[list[int], bool]] = []
    outs: list[int] = []
    for _, kinds in sorted(found.items()):
        if "residual.6" in kinds:
            outs.append(kinds["residual.6"])
        else:
            stages.append((outs, "time_conv" in kinds))
            outs = []
    return [*stages, (outs, False)] if outs else stages


@dataclass(frozen=True, slots=True)
class WanVAEFiles:
    """How Wan's autoencoders lie in single files; see `vae.registry.ReadsFile`."""

    def claims(self, names: Iterable[str]) -> bool:
        return has_original_names(names)

    def config(
        self, shapes: Mapping[str, tuple[int, ...]], *, path: str | Path | None = None
    ) -> WanVAEConfig:
        return infer_config(shapes, path=path)

    def names(self, names: Iterable[str], config: WanVAEConfig) -> dict[str, str]:
        return to_diffusers_names(names, config)


KIND = VAEKind(config=WanVAEConfig, layers=WanVAE, files=WanVAEFiles())
