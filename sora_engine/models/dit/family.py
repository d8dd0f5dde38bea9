"""DiT behind the seam: class-conditional pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from sora_engine.errors import CheckpointError
from sora_engine.models.dit.checkpoint import (
    DEFAULT_SCHEDULER,
    LAYOUT,
    TransformerSource,
    companions,
    read_labels,
    transformer_in_file,
)
from sora_engine.models.dit.config import DiTConfig
from sora_engine.models.dit.model import DiT, transformer_shape
from sora_engine.models.family import (
    Capabilities,
    Checkpoint,
    ExpertSource,
    Shapes,
    Sizes,
    TextSource,
)
from sora_engine.models.folder import INDEX, Component, FolderLayout, ModelFolder
from sora_engine.request import GenerationDefaults, KnownMode, LatentGrid
from sora_engine.request.labels import Labels
from sora_engine.request.ladders import Ladder
from sora_engine.vae.registry import read_vae_config

_MARKS = (
    "pos_embed.proj.weight",
    "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",
    "transformer_blocks.0.norm1.linear.weight",
    "proj_out_1.weight",
    "proj_out_2.weight",
)
"""Tensors of every DiT. A file with most of them is one, if a damaged one."""


class DiTFamily:
    """The DiT family (arXiv 2212.09748)."""

    name = "dit"
    layout: FolderLayout = LAYOUT
    ladders: ClassVar[Mapping[str, Ladder]] = {}
    capabilities = Capabilities(
        makes="pictures",
        reads="a class",
        known_modes=(KnownMode.REPLACEMENT,),
        windows=(),
        ranks=("ulysses", "ring", "guidance", "data"),
        adapters=("lora",),
        page="dit.md",
    )

    def claims_file(self, shapes: Shapes) -> bool:
        """Whether most of the tensors that every DiT has are there, its classes among them."""
        return _MARKS[1] in shapes and sum(mark in shapes for mark in _MARKS) > len(_MARKS) // 2

    def describe_file(self, path: Path) -> str:
        """Its sizes, and what goes with it."""
        config = transformer_in_file(path).config
        return (
            f"{self.name} transformer, class-conditional: {config.num_layers} layers, "
            f"{config.inner_dim} wide, {config.num_embeds_ada_norm} classes, patches of "
            f"{config.patch_size}; goes with an AutoencoderKL"
        )

    def own_name(self, module: str) -> str | None:
        """diffusers' names, which are the engine's; with underscores in their place, too."""
        if "." in module:
            return module
        block = re.fullmatch(r"transformer_blocks_(\d+)_(.+)", module)
        inside = {
            "attn1_to_q": "attn1.to_q", "attn1_to_k": "attn1.to_k", "attn1_to_v": "attn1.to_v",
            "attn1_to_out_0": "attn1.to_out.0", "ff_net_0_proj": "ff.net.0.proj",
            "ff_net_2": "ff.net.2", "norm1_linear": "norm1.linear",
        }  # fmt: skip
        if block is None or block[2] not in inside:
            return module if module in ("proj_out_1", "proj_out_2") else None
        return f"transformer_blocks.{block[1]}.{inside[block[2]]}"

    def published_name(self, name: str) -> str:
        """diffusers', as the files have them."""
        return name

    def is_further_input(self, name: str) -> bool:
        """All of its transformers take the same."""
        return False

    def describe_adapter(self, sizes: Sizes) -> str | None:
        """Width and layers, from the attention of blocks that have no other."""
        attention = re.compile(r"transformer_blocks\.(\d+)\.attn1\.to_[qkv]")
        found = [(m, rows) for name, (rows, _) in sizes.items() if (m := attention.fullmatch(name))]
        others = any(".attn2." in name or name.startswith("temporal") for name in sizes)
        widths = {rows for _, rows in found}
        if len(widths) != 1 or others:
            return None
        layers = max(int(m[1]) for m, _ in found) + 1
        return f"a {self.name} transformer {widths.pop()} wide of {layers} layers or more"

    def open_folder(self, path: Path, settings: Mapping[str, Any]) -> Checkpoint:
        """A folder that diffusers' `DiTPipeline` saved."""
        folder = ModelFolder.open(path, LAYOUT)
        part = folder["transformer"]
        config = DiTConfig.from_dict(part.config, path=part.config_path)
        labels = read_labels(
            folder.settings.get("id2label"), config.num_embeds_ada_norm, path / INDEX
        )
        source = TransformerSource(part.weights_path, config)
        return _describe(path, source, labels, folder["vae"], folder["scheduler"])

    def open_files(
        self,
        paths: Sequence[Path],
        components: Path | Mapping[str, Path] | None,
        settings: Mapping[str, Any],
    ) -> Checkpoint:
        """A transformer file, with its configuration beside it, and a VAE."""
        if len(paths) != 1:
            raise CheckpointError(f"{len(paths)} files; a DiT is one", path=paths[1])
        source = transformer_in_file(paths[0])
        labels = Labels(source.config.num_embeds_ada_norm)
        return _describe(paths[0], source, labels, *companions(paths[0], components))


def _describe(
    path: Path,
    source: TransformerSource,
    labels: Labels,
    vae: Component,
    scheduler: Component | None,
) -> Checkpoint:
    """What was found, as the engine sees it."""
    config = source.config
    coder = read_vae_config({"_class_name": vae.class_name, **vae.config}, path=vae.config_path)
    if coder.z_dim != config.in_channels:
        raise CheckpointError(
            f"the transformer takes {config.in_channels} channels and the autoencoder's latents "
            f"have {coder.z_dim}",
            path=vae.config_path,
        )
    grid = LatentGrid(
        channels=config.in_channels,
        vae_spatial=coder.factor_spatial,
        patch=(1, config.patch_size, config.patch_size),
        time=1,
        images=True,
    )
    size = config.sample_size * coder.factor_spatial
    # No part of its own: the classes' embedding is the transformer's.
    classes = Component("label", "ClassLabels", source.path, {})
    return Checkpoint(
        family=DiTFamily.name,
        variant="class-conditional",
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
        scheduler_config=DEFAULT_SCHEDULER if scheduler is None else scheduler.config,
        scheduler_path=None if scheduler is None else scheduler.config_path,
        grid=grid,
        known_mode=KnownMode.REPLACEMENT,
        defaults=GenerationDefaults(
            height=size,
            width=size,
            num_frames=1,
            fps=1.0,
            num_inference_steps=50,
            guidance_scale=4.0,
        ),
        text_encoders={"label": TextSource(encoder=classes, tokenizer=None, max_tokens=1)},
        learned_variance=config.learned_variance,
        labels=labels,
    )


def _build(config: DiTConfig, attention_backend: str) -> DiT:
    return DiT(config, attention_backend=attention_backend)
