"""Latte behind the seam: videos from texts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from sora_engine.errors import CheckpointError
from sora_engine.models.family import (
    Capabilities,
    Checkpoint,
    ExpertSource,
    Shapes,
    Sizes,
    TextSource,
)
from sora_engine.models.folder import Component, FolderLayout, ModelFolder
from sora_engine.models.latte.checkpoint import (
    LAYOUT,
    TransformerSource,
    companions,
    transformer_in_file,
)
from sora_engine.models.latte.config import LatteConfig
from sora_engine.models.latte.model import TEXT_TOKENS, LatteTransformer, transformer_shape
from sora_engine.request import GenerationDefaults, KnownMode, LatentGrid
from sora_engine.request.ladders import Ladder
from sora_engine.vae.registry import read_vae_config

_MARKS = (
    "pos_embed.proj.weight",
    "temporal_transformer_blocks.0.attn1.to_q.weight",
    "caption_projection.linear_1.weight",
    "adaln_single.linear.weight",
    "proj_out.weight",
)
"""Tensors of every Latte. A file with most of them is one, if a damaged one."""


class LatteFamily:
    """The Latte family (arXiv 2401.03048)."""

    name = "latte"
    layout: FolderLayout = LAYOUT
    ladders: ClassVar[Mapping[str, Ladder]] = {}
    capabilities = Capabilities(
        makes="videos, pictures",
        reads="texts",
        known_modes=(KnownMode.REPLACEMENT,),
        windows=("static", "moving"),
        ranks=("guidance", "window", "data"),
        adapters=("lora",),
        page="latte.md",
    )

    def claims_file(self, shapes: Shapes) -> bool:
        """Whether most of the tensors that every Latte has are there, its blocks along time among
        them."""
        return _MARKS[1] in shapes and sum(mark in shapes for mark in _MARKS) > len(_MARKS) // 2

    def describe_file(self, path: Path) -> str:
        """Its sizes, and what goes with it."""
        config = transformer_in_file(path).config
        return (
            f"{self.name} transformer, t2v: {config.num_layers} layers within frames and as many "
            f"along time, {config.inner_dim} wide, {config.video_length} frames; goes with an "
            "AutoencoderKL and a T5 encoder"
        )

    def own_name(self, module: str) -> str | None:
        """diffusers' names, which are the engine's; with underscores in their place, too."""
        if "." in module:
            return module
        block = re.fullmatch(r"((?:temporal_)?transformer_blocks)_(\d+)_(.+)", module)
        inside = {"ff_net_0_proj": "ff.net.0.proj", "ff_net_2": "ff.net.2"}
        inside |= {
            f"attn{i}_{name}": f"attn{i}.{name.replace('out_0', 'out.0')}"
            for i in (1, 2)
            for name in ("to_q", "to_k", "to_v", "to_out_0")
        }
        if block is None or block[3] not in inside:
            outside = {f"caption_projection_linear_{i}": f"caption_projection.linear_{i}"
                       for i in (1, 2)}  # fmt: skip
            return {**outside, "proj_out": "proj_out"}.get(module)
        return f"{block[1]}.{block[2]}.{inside[block[3]]}"

    def published_name(self, name: str) -> str:
        """diffusers', as the files have them."""
        return name

    def is_further_input(self, name: str) -> bool:
        """All of its transformers take the same."""
        return False

    def describe_adapter(self, sizes: Sizes) -> str | None:
        """Width and layers, where it changes blocks along time."""
        attention = re.compile(r"temporal_transformer_blocks\.(\d+)\.attn1\.to_[qkv]")
        found = [(m, rows) for name, (rows, _) in sizes.items() if (m := attention.fullmatch(name))]
        widths = {rows for _, rows in found}
        if len(widths) != 1:
            return None
        layers = max(int(m[1]) for m, _ in found) + 1
        return f"a {self.name} transformer {widths.pop()} wide of {layers} layers or more"

    def open_folder(self, path: Path, settings: Mapping[str, Any]) -> Checkpoint:
        """A folder that diffusers' `LattePipeline` saved."""
        folder = ModelFolder.open(path, LAYOUT)
        part = folder["transformer"]
        config = LatteConfig.from_dict(part.config, path=part.config_path)
        return _describe(path, TransformerSource(part.weights_path, config), folder.components)

    def open_files(
        self,
        paths: Sequence[Path],
        components: Path | Mapping[str, Path] | None,
        settings: Mapping[str, Any],
    ) -> Checkpoint:
        """A transformer file, with its configuration beside it, and the other parts in folders."""
        if len(paths) != 1:
            raise CheckpointError(f"{len(paths)} files; a Latte is one", path=paths[1])
        parts = companions(paths[0], components)
        return _describe(paths[0], transformer_in_file(paths[0]), parts)


def _describe(path: Path, source: TransformerSource, parts: Mapping[str, Component]) -> Checkpoint:
    """What was found, as the engine sees it."""
    config, vae, text = source.config, parts["vae"], parts["text_encoder"]
    coder = read_vae_config({"_class_name": vae.class_name, **vae.config}, path=vae.config_path)
    if coder.z_dim != config.in_channels:
        raise CheckpointError(
            f"the transformer takes {config.in_channels} channels and the autoencoder's latents "
            f"have {coder.z_dim}",
            path=vae.config_path,
        )
    if text.config.get("d_model", config.caption_channels) != config.caption_channels:
        raise CheckpointError(
            f"the transformer reads texts of {config.caption_channels} channels and the encoder "
            f"gives {text.config['d_model']!r}",
            path=text.config_path,
        )
    grid = LatentGrid(
        channels=config.in_channels,
        vae_spatial=coder.factor_spatial,
        patch=(1, config.patch_size, config.patch_size),
        time=coder.factor_temporal,
    )
    size = config.sample_size * coder.factor_spatial
    tokenizer = parts["tokenizer"]
    encoders = {"text": text, "count": replace(text, class_name="T5TokenCounts")}
    return Checkpoint(
        family=LatteFamily.name,
        variant="t2v",
        path=path,
        experts=(
            ExpertSource(
                path=source.path,
                shape=transformer_shape(config),
                num_parameters=source.num_parameters,
                build=partial(_build, config),
                fill=source.load,
            ),
        ),
        vae=vae,
        scheduler_config=parts["scheduler"].config,
        scheduler_path=parts["scheduler"].config_path,
        grid=grid,
        known_mode=KnownMode.REPLACEMENT,
        defaults=GenerationDefaults(
            height=size,
            width=size,
            num_frames=config.video_length,
            fps=8.0,
            num_inference_steps=50,
            guidance_scale=7.5,
            max_window=config.video_length,
        ),
        text_encoders={
            name: TextSource(encoder=part, tokenizer=tokenizer, max_tokens=TEXT_TOKENS)
            for name, part in encoders.items()
        },
        learned_variance=True,
        shares_tokens=False,
    )


def _build(config: LatteConfig, attention_backend: str) -> LatteTransformer:
    return LatteTransformer(config, attention_backend=attention_backend)
