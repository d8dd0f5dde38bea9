"""Wan behind the seam: 2.1 T2V, I2V and VACE, 2.2 A14B (two experts), 2.2 TI2V-5B, and the
Fun-Control-Camera ones of each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sora_engine.denoise.camera import RAY
from sora_engine.errors import CheckpointError
from sora_engine.models.family import (
    Capabilities,
    Checkpoint,
    ExpertSource,
    ImageSource,
    Shapes,
    Sizes,
    TextSource,
)
from sora_engine.models.folder import FolderLayout
from sora_engine.models.wan.checkpoint import (
    LAYOUT,
    WanCheckpoint,
    open_transformer,
    resolve_model,
    transformer_in_file,
)
from sora_engine.models.wan.config import WanConfig
from sora_engine.models.wan.ladders import WAN_LADDERS
from sora_engine.models.wan.model import TEXT_TOKENS, WanTransformer, transformer_shape
from sora_engine.models.wan.names import (
    is_vace_module,
    own_name,
    to_diffusers_name,
    to_wan_name,
)
from sora_engine.models.wan.vace import describe_module
from sora_engine.request import GenerationDefaults, KnownMode, LatentGrid
from sora_engine.request.ladders import Ladder
from sora_engine.vae.registry import read_vae_config

_MARKS = (
    "patch_embedding.weight",
    "condition_embedder.text_embedder.linear_1.weight",
    "blocks.0.attn2.to_k.weight",
    "proj_out.weight",
)
"""Tensors of every Wan transformer. A file with most of them is one, if a damaged one."""


class WanFamily:
    """The Wan family (arXiv 2503.20314, 2503.07598)."""

    name = "wan"
    layout: FolderLayout = LAYOUT
    ladders: Mapping[str, Ladder] = WAN_LADDERS
    capabilities = Capabilities(
        makes="videos, pictures",
        reads="texts, images, control clips, camera paths",
        known_modes=tuple(KnownMode),
        windows=("static", "moving", "chained", "sparse"),
        ranks=("ulysses", "ring", "guidance", "window", "data"),
        adapters=("lora", "loha", "lokr", "dora", "difference"),
        page="wan.md",
    )

    def claims_file(self, shapes: Shapes) -> bool:
        """Whether most of the tensors that every Wan has are there, under diffusers' names or its
        own; or VACE's alone, which are told what they go with."""
        names = {to_diffusers_name(name) for name in shapes}
        return sum(mark in names for mark in _MARKS) > len(_MARKS) // 2 or is_vace_module(names)

    def describe_file(self, path: Path) -> str:
        """Its variant and sizes, and the usual names of its other parts."""
        with open_transformer(path) as weights:
            module = is_vace_module(weights)
        if module:
            return f"{self.name} {describe_module(path)}"
        config = transformer_in_file(path).config
        five = config.out_channels == 48
        kind = "vace" if config.vace_layers is not None else "t2v"
        if kind == "t2v" and config.in_channels != config.out_channels:
            kind = "i2v"
        if five:
            kind = "ti2v"
        if config.in_dim_control_adapter is not None:
            kind += " with a camera (Control-Camera)"
        needs = ["wan2.2_vae" if five else "wan_2.1_vae", "umt5_xxl"]
        needs += ["clip_vision_h"] if config.image_dim is not None else []
        width = config.num_attention_heads * config.attention_head_dim
        return (
            f"{self.name} transformer, {kind}: {config.num_layers} layers, "
            f"{width} wide, {config.in_channels} channels in; goes with {', '.join(needs)}"
        )

    def own_name(self, module: str) -> str | None:
        """As `names.own_name`."""
        return own_name(module)

    def published_name(self, name: str) -> str:
        """As `names.to_wan_name`."""
        return to_wan_name(name)

    def is_further_input(self, name: str) -> bool:
        """What reads CLIP's tokens of an image (2.1 I2V)."""
        parts = ("image_embedder", "add_k_proj", "add_v_proj", "norm_added_k", "norm_added_q")
        return any(part in parts for part in name.split("."))

    def describe_adapter(self, sizes: Sizes) -> str | None:
        """Width and layers, from the attention and feed-forward weights of its blocks."""
        widths, layers, image = set(), 0, False
        for name, (rows, width) in sizes.items():
            image = image or self.is_further_input(name)
            block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
            if block is None:
                continue
            layers = max(layers, int(block[1]) + 1)
            if re.fullmatch(r"attn[12]\.(to_[qkv]|to_out\.0|add_[kv]_proj)", block[2]):
                widths.add(rows)
            elif block[2] == "ffn.net.0.proj":
                widths.add(width)
        if len(widths) != 1:
            return None
        (width,) = widths
        known = {1536: "1.3B", 3072: "5B", 5120: "14B"}.get(width)
        size = f"{width} wide" if known is None else f"{width} wide ({known})"
        kind = ", with an image encoder" if image else ""
        return f"a {self.name} transformer {size} of {layers} layers or more{kind}"

    def open_folder(self, path: Path, settings: Mapping[str, Any]) -> Checkpoint:
        """A folder in diffusers' layout."""
        return describe(resolve_model(path), settings)

    def open_files(
        self,
        paths: Sequence[Path],
        components: Path | Mapping[str, Path] | None,
        settings: Mapping[str, Any],
    ) -> Checkpoint:
        """One transformer file, or those of two experts, and a folder with the other parts."""
        return describe(resolve_model(paths, components=components), settings)


def describe(found: WanCheckpoint, settings: Mapping[str, Any]) -> Checkpoint:
    """What was found, as the engine sees it.

    settings: `text_tokens` is the length to which texts count as padded.
    """
    text_tokens = int(settings.get("text_tokens", TEXT_TOKENS))
    config = found.transformer.config
    vae = read_vae_config(
        {"_class_name": found.vae.class_name, **found.vae.config}, path=found.vae.config_path
    )
    grid = LatentGrid(
        channels=config.out_channels,
        vae_spatial=vae.factor_spatial,
        patch=config.patch_size,
        time=vae.factor_temporal,
    )
    known_mode = _known_mode(found, grid)
    _check_camera(found, grid)
    sources = [found.transformer]
    if found.transformer_2 is not None:
        sources.append(found.transformer_2)
    image_encoder = None
    if found.image_encoder is not None:
        image_encoder = ImageSource(encoder=found.image_encoder, processor=found.image_processor)
    return Checkpoint(
        family=WanFamily.name,
        variant=_variant(found, known_mode),
        path=found.path,
        experts=tuple(
            ExpertSource(
                path=source.path,
                shape=transformer_shape(source.config, text_tokens),
                num_parameters=source.num_parameters,
                build=partial(_build, source.config, text_tokens),
                fill=source.load,
                also=() if source.vace is None else (source.vace,),
                from_fraction=(found.boundary_ratio or 0.0) if i == 0 else 0.0,
            )
            for i, source in enumerate(sources)
        ),
        vae=found.vae,
        scheduler_config=found.scheduler_config,
        scheduler_path=found.scheduler_path,
        grid=grid,
        known_mode=known_mode,
        defaults=_published_defaults(found, grid),
        text_encoders={
            "text": TextSource(
                encoder=found.text_encoder, tokenizer=found.tokenizer, max_tokens=text_tokens
            )
        },
        image_encoder=image_encoder,
        # Only checkpoints that are shown two pictures, the first and the last frame, learned
        # positions for the pictures' tokens.
        takes_last_image=config.pos_embed_seq_len is not None,
        takes_camera=config.in_dim_control_adapter is not None,
    )


def _build(config: WanConfig, text_tokens: int, attention_backend: str) -> WanTransformer:
    return WanTransformer(config, text_tokens=text_tokens, attention_backend=attention_backend)


def _variant(found: WanCheckpoint, known_mode: KnownMode) -> str:
    modes = {KnownMode.VACE: "vace", KnownMode.REPLACEMENT: "t2v"}
    mode = "ti2v" if found.expand_timesteps else modes.get(known_mode, "i2v")
    if found.transformer.config.in_dim_control_adapter is not None:
        mode += " with a camera"
    return mode if found.transformer_2 is None else f"{mode}, two experts"


def _published_defaults(found: WanCheckpoint, grid: LatentGrid) -> GenerationDefaults:
    """Those of diffusers' pipelines and the model cards."""
    height, width, num_frames, fps = 480, 832, 81, 16.0
    if found.expand_timesteps:  # TI2V-5B
        height, width, num_frames, fps = 704, 1280, 121, 24.0
    two = found.transformer_2 is not None
    steps, scale, scale_2 = (40, 4.0, 3.0) if two else (50, 5.0, None)
    if found.transformer.config.in_dim_control_adapter is not None:  # as VideoX-Fun's examples
        steps, scale, scale_2 = 50, 6.0, None
    # What was published is a number of latent frames, told in frames of Wan's VAEs, of which a
    # latent frame holds 4. With a VAE of another factor the latent frames stay the same.
    latent_frames = (num_frames - 1) // 4 + 1
    return GenerationDefaults(
        height=height,
        width=width,
        num_frames=(latent_frames - 1) * grid.time + 1,
        fps=fps,
        num_inference_steps=steps,
        guidance_scale=scale,
        guidance_scale_2=scale_2,
        max_window=latent_frames,
    )


def _known_mode(found: WanCheckpoint, grid: LatentGrid) -> KnownMode:
    """What the checkpoint was trained to do with known content, from its input channels."""
    config = found.transformer.config
    with_mask = 2 * config.out_channels + grid.time
    if found.expand_timesteps and config.in_channels == with_mask:
        return KnownMode.CHANNELS_AND_LEVEL
    if found.expand_timesteps:
        return KnownMode.NOISE_LEVEL
    if config.vace_layers is not None:
        control = 2 * config.out_channels + grid.vae_spatial**2
        if config.in_channels != config.out_channels or config.vace_in_channels != control:
            raise CheckpointError(
                f"the transformer takes {config.in_channels} channels, makes "
                f"{config.out_channels} and is controlled by {config.vace_in_channels}; "
                f"{config.out_channels}, as many and {control} would work with this VAE",
                path=found.path,
            )
        return KnownMode.VACE
    if config.in_channels == config.out_channels:
        return KnownMode.REPLACEMENT
    if config.in_channels == 2 * config.out_channels:
        return KnownMode.FIRST_FRAME
    if config.in_channels != with_mask:
        raise CheckpointError(
            f"the transformer takes {config.in_channels} channels and makes "
            f"{config.out_channels}; {config.out_channels} (text to video), {with_mask} (with mask "
            f"and known latents) or {2 * config.out_channels} (with the first frame's) would work",
            path=found.path,
        )
    return KnownMode.CHANNELS


def _check_camera(found: WanCheckpoint, grid: LatentGrid) -> None:
    """That a control adapter folds pixels and frames as the autoencoder does. CheckpointError."""
    config = found.transformer.config
    rays, fold = config.in_dim_control_adapter, config.downscale_factor_control_adapter
    if rays is not None and (rays, fold) != (RAY * grid.time, grid.vae_spatial):
        raise CheckpointError(
            f"the control adapter reads {rays} channels of {fold} x {fold} pixels; with this VAE "
            f"{RAY * grid.time} of {grid.vae_spatial} x {grid.vae_spatial} would work",
            path=found.path,
        )
