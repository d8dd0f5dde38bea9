"""LTX-Video's autoencoder in its authors' files: one list of blocks a side, told by the header.

A file's header has a `config`, whose `vae` lists the blocks in order: of the encoder from the
pixels on, of the decoder in the same order, to be run backwards. Each block is a module of the
file, `encoder.down_blocks.0` and so on, and a stage of diffusers' layout is up to three of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sora_engine.errors import CheckpointError
from sora_engine.io.config_file import parse_json_object
from sora_engine.io.safetensors import SafetensorsFile
from sora_engine.vae.ltx_config import DOWN, DOWN_095, LTXVAEConfig

PREFIXES = ("", "vae.")
MARKS = ("per_channel_statistics.mean-of-means", "decoder.conv_out.conv.weight")
MEAN, STD = "per_channel_statistics.mean-of-means", "per_channel_statistics.std-of-means"
_FOLDS = {
    "compress_all_res": "spatiotemporal", "compress_space_res": "spatial",
    "compress_time_res": "temporal",
}  # fmt: skip
_FIXED: dict[str, tuple[Any, ...]] = {
    "dims": (3,), "norm_layer": ("pixel_norm",), "latent_log_var": ("uniform",),
    "use_quant_conv": (False,), "spatial_padding_mode": ("zeros",), "patch_size_t": (1, None),
}  # fmt: skip
_READ = frozenset({
    "_class_name", "in_channels", "out_channels", "latent_channels", "blocks", "encoder_blocks",
    "decoder_blocks", "encoder_base_channels", "decoder_base_channels", "base_channels",
    "scaling_factor", "patch_size", "causal_decoder", "timestep_conditioning",
})  # fmt: skip


def header_config(path: Path) -> dict[str, Any] | None:
    """What a file's header says of its model; None for none. Raises CheckpointError."""
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    with SafetensorsFile(path) as file:
        text = file.metadata.get("config")
    return None if text is None else parse_json_object(text.encode(), path)


def read_header(values: Mapping[str, Any], *, path: Path | None = None) -> LTXVAEConfig:
    """Read the `vae` of a header's `config`. Raises CheckpointError for what is not carried out."""
    unknown = sorted(set(values) - {*_READ, *_FIXED})
    if unknown:
        raise CheckpointError(f"unknown keys {unknown} of the vae in the header", path=path)
    for key, wanted in _FIXED.items():
        if key in values and values[key] not in wanted:
            raise CheckpointError(
                f"{key} is {values[key]!r}; {wanted[0]!r} is supported", path=path
            )
    try:
        return _Reader(values).config()
    except CheckpointError as error:
        raise CheckpointError(str(error), path=path) from None
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"the header's list of blocks cannot be read ({error!r})", path=path
        ) from None


class _Reader:
    """Walks both lists of blocks."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def config(self) -> LTXVAEConfig:
        values = self.values
        encoder, decoder = self._encoder(), self._decoder()
        same = {
            key: values[key]
            for key in ("in_channels", "out_channels", "latent_channels", "patch_size")
            if key in values
        }
        return LTXVAEConfig(
            **same, **encoder, **decoder,
            scaling_factor=values.get("scaling_factor", 1.0),
            decoder_causal=values.get("causal_decoder", False),
            timestep_conditioning=values.get("timestep_conditioning", False),
        )  # fmt: skip

    def _blocks(self, side: str) -> list[tuple[str, dict[str, Any]]]:
        listed = self.values.get(f"{side}_blocks", self.values.get("blocks"))
        if not isinstance(listed, list) or not listed:
            raise CheckpointError(f"the header lists no blocks of the {side}")
        return [
            (str(name), {"num_layers": given} if isinstance(given, int) else dict(given))
            for name, given in listed
        ]

    def _base(self, side: str) -> int:
        return int(self.values.get(f"{side}_base_channels", self.values.get("base_channels", 128)))

    def _encoder(self) -> dict[str, Any]:
        blocks, width = self._blocks("encoder"), self._base("encoder")
        widths, layers, scaled, kinds = [width], list[int](), list[bool](), list[str]()
        for i, (name, given) in enumerate(blocks):
            if name == "res_x":
                layers.append(int(given["num_layers"]))
                if i < len(blocks) - 1:  # the last one is the middle
                    scaled.append(False)
                    kinds.append("conv")
                    widths.append(width)
            elif name in ("compress_all", *_FOLDS):
                scaled[-1], kinds[-1] = True, _FOLDS.get(name, "conv")
                width *= int(given.get("multiplier", 2)) if name in _FOLDS else 1
                widths[-1] = width
            elif name == "res_x_y":
                width *= int(given.get("multiplier", 2))
                widths[-1] = width
            else:
                raise CheckpointError(f"a block {name!r} of the encoder is not supported")
        newer = "conv" not in kinds
        return {
            # Older layouts name the width that a stage begins with, newer ones that it ends with.
            "block_out_channels": tuple(widths if newer else widths[:-1]),
            "down_block_types": (DOWN_095 if newer else DOWN,) * len(kinds),
            "layers_per_block": tuple(layers), "spatio_temporal_scaling": tuple(scaled),
            "downsample_type": tuple(kinds),
        }  # fmt: skip

    def _decoder(self) -> dict[str, Any]:
        blocks, width = self._blocks("decoder")[::-1], self._base("decoder")
        for name, given in blocks:
            grows = name == "res_x_y"
            width *= int(given.get("multiplier", 2 if grows else 1)) if name != "res_x" else 1
        layers, noisy = list[int](), list[bool]()
        outs, scaled, residual, factors = list[int](), list[bool](), list[bool](), list[int]()
        up, factor, shortcut = False, 1, False
        for i, (name, given) in enumerate(blocks):
            if name == "res_x":
                layers.append(int(given["num_layers"]))
                noisy.append(bool(given.get("inject_noise", False)))
                if i:
                    outs.append(width * factor)
                    scaled.append(up)
                    residual.append(shortcut)
                    factors.append(factor)
                    up, factor, shortcut = False, 1, False
            elif name == "res_x_y":
                width //= int(given.get("multiplier", 2))
            elif name == "compress_all":
                factor = int(given.get("multiplier", 1))
                shortcut = bool(given.get("residual", False))
                width, up = width // factor, True
            else:
                raise CheckpointError(f"a block {name!r} of the decoder is not supported")
        return {
            "decoder_block_out_channels": tuple(outs[::-1]),
            "decoder_layers_per_block": tuple(layers[::-1]),
            "decoder_inject_noise": tuple(noisy[::-1]),
            "decoder_spatio_temporal_scaling": tuple(scaled[::-1]),
            "upsample_residual": tuple(residual[::-1]), "upsample_factor": tuple(factors[::-1]),
        }  # fmt: skip


def blocks_of(config: LTXVAEConfig) -> dict[str, str]:
    """By the prefix of a block's names in the authors' files that of its parameters."""
    down: list[str] = []
    newer, widths = config.down_block_types[-1] == DOWN_095, config.block_out_channels
    for i, scaled in enumerate(config.spatio_temporal_scaling):
        stage = f"encoder.down_blocks.{i}."
        grows = not newer and i + 1 < len(widths) and widths[i + 1] != widths[i]
        down += [stage, *[f"{stage}downsamplers.0."] * scaled, *[f"{stage}conv_out."] * grows]
    up = ["decoder.mid_block."]
    width = config.decoder_block_out_channels[-1]
    for i, scaled in enumerate(config.decoder_spatio_temporal_scaling[::-1]):
        stage, factor = f"decoder.up_blocks.{i}.", config.upsample_factor[::-1][i]
        out = config.decoder_block_out_channels[::-1][i] // factor
        changes = width // factor != out
        up += [*[f"{stage}conv_in."] * changes, *[f"{stage}upsamplers.0."] * scaled, stage]
        width = out
    found = {
        f"encoder.down_blocks.{i}.": own for i, own in enumerate([*down, "encoder.mid_block."])
    }
    return found | {f"decoder.up_blocks.{i}.": own for i, own in enumerate(up)}


def diffusers_names(names: Iterable[str], config: LTXVAEConfig) -> dict[str, str]:
    """By the name in an authors' file diffusers' for it; other parts of it are left out."""
    blocks = blocks_of(config)
    present = list(names)
    prefix = next((p for p in PREFIXES if p + MARKS[0] in present), "")
    found = {}
    for stored in present:
        name = stored.removeprefix(prefix)
        if not stored.startswith(prefix) or not name.startswith(
            ("encoder.", "decoder.", MEAN, STD)
        ):
            continue
        name = {MEAN: "latents_mean", STD: "latents_std"}.get(name, name)
        side, _, rest = name.partition("_blocks.")
        block = f"{side}_blocks.{rest.partition('.')[0]}." if rest else ""
        if block in blocks:
            name = blocks[block] + name[len(block) :]
        for theirs, ours in (
            (".res_blocks.", ".resnets."), (".norm3.norm.", ".norm3."),
            ("decoder.last_time_embedder.", "decoder.time_embedder."),
            ("decoder.last_scale_shift_table", "decoder.scale_shift_table"),
        ):  # fmt: skip
            name = name.replace(theirs, ours)
        found[stored] = name
    return found
