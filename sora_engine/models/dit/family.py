"""DiT behind the seam: class-conditional pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from sora_engine.denoise.model import TransformerShape
from sora_engine.models.dit.config import DiTConfig
from sora_engine.models.dit.labels import read_labels
from sora_engine.models.dit.model import DiT
from sora_engine.models.family import Capabilities, Checkpoint, TextSource
from sora_engine.models.folder import INDEX, Component, FolderLayout
from sora_engine.models.patch_transformer import patch_shape
from sora_engine.models.plain_family import DISCRETE_SCHEDULERS, PlainFamily, vae_of
from sora_engine.models.transformer_files import TransformerSource
from sora_engine.request import GenerationDefaults, KnownMode, LatentGrid


class DiTFamily(PlainFamily[DiTConfig]):
    """The DiT family (arXiv 2212.09748)."""

    name = "dit"
    config = DiTConfig
    transformer = DiT
    layout = FolderLayout(
        pipelines=("DiTPipeline",),
        components={
            "transformer": DiTConfig.class_names,
            "vae": ("AutoencoderKL",),
            "scheduler": DISCRETE_SCHEDULERS,
        },
        settings=("id2label",),
    )
    capabilities = Capabilities(
        makes="pictures",
        reads="a class",
        known_modes=(KnownMode.REPLACEMENT,),
        windows=(),
        ranks=("ulysses", "ring", "guidance", "data"),
        adapters=("lora",),
        page="dit.md",
    )
    marks = (
        "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",
        "pos_embed.proj.weight",
        "transformer_blocks.0.norm1.linear.weight",
        "proj_out_1.weight",
        "proj_out_2.weight",
    )
    ignored = ("pos_embed",)
    """Fixed positions, which some files hold: they are made for each picture's size here."""
    default_scheduler: ClassVar[Mapping[str, Any]] = {
        "_class_name": "DDIMScheduler",
        "clip_sample": False,
    }
    """Of the published folders."""
    layers = (
        *(
            f"transformer_blocks.#.{layer}"
            for layer in (
                "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj",
                "ff.net.2", "norm1.linear",
            )
        ),
        "proj_out_1", "proj_out_2",
    )  # fmt: skip
    adapted = r"transformer_blocks\.(\d+)\.attn1\.to_[qkv]"
    adapted_elsewhere = r"\.attn2\.|^temporal"

    def described(self, config: DiTConfig) -> str:
        """Its sizes, and what goes with it."""
        return (
            f"class-conditional: {config.num_layers} layers, {config.inner_dim} wide, "
            f"{config.num_embeds_ada_norm} classes, patches of {config.patch_size}; goes with an "
            "AutoencoderKL"
        )

    def shape(self, config: DiTConfig) -> TransformerShape:
        """The sizes of its transformer."""
        return patch_shape(config)

    def assemble(
        self,
        path: Path,
        source: TransformerSource[DiTConfig],
        parts: Mapping[str, Component],
        settings: Mapping[str, Any],
    ) -> Checkpoint:
        """What was found, as the engine sees it."""
        config = source.config
        coder = vae_of(parts, config.in_channels)
        labels = read_labels(settings.get("id2label"), config.num_embeds_ada_norm, path / INDEX)
        size = config.sample_size * coder.factor_spatial
        # No part of its own: the classes' embedding is the transformer's.
        classes = Component("label", "ClassLabels", source.path, {})
        return Checkpoint(
            family=self.name,
            variant="class-conditional",
            path=path,
            experts=(self.expert(source),),
            vae=parts["vae"],
            **self.scheduler(parts),
            grid=LatentGrid(
                channels=config.in_channels,
                vae_spatial=coder.factor_spatial,
                patch=(1, config.patch_size, config.patch_size),
                time=1,
                images=True,
            ),
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
