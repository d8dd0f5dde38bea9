"""DiT behind the seam: class-conditional pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from sora_engine.denoise.model import TransformerShape
from sora_engine.models.authors_names import AuthorsNames, number_of
from sora_engine.models.dit.config import DiTConfig
from sora_engine.models.dit.labels import read_labels
from sora_engine.models.dit.model import DiT
from sora_engine.models.family import Capabilities, Checkpoint, Shapes, TextSource
from sora_engine.models.folder import INDEX, Component, FolderLayout
from sora_engine.models.patch_transformer import patch_shape
from sora_engine.models.plain_family import DISCRETE_SCHEDULERS, PlainFamily
from sora_engine.models.transformer_files import TransformerSource
from sora_engine.request import KnownMode

_EACH = "transformer_blocks.*.norm1.emb"
_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Of DiT-S, -B, -L and -XL, by their width: files do not tell them."""


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
    authors = AuthorsNames(
        mark="y_embedder.embedding_table.weight",
        table={
            "x_embedder.proj": "pos_embed.proj",
            "t_embedder.mlp.0": f"{_EACH}.timestep_embedder.linear_1",
            "t_embedder.mlp.2": f"{_EACH}.timestep_embedder.linear_2",
            "y_embedder.embedding_table": f"{_EACH}.class_embedder.embedding_table",
            "blocks.#.attn.qkv": tuple(f"transformer_blocks.#.attn1.to_{n}" for n in "qkv"),
            "blocks.#.attn.proj": "transformer_blocks.#.attn1.to_out.0",
            "blocks.#.mlp.fc1": "transformer_blocks.#.ff.net.0.proj",
            "blocks.#.mlp.fc2": "transformer_blocks.#.ff.net.2",
            "blocks.#.adaLN_modulation.1": "transformer_blocks.#.norm1.linear",
            "final_layer.adaLN_modulation.1": "proj_out_1",
            "final_layer.linear": "proj_out_2",
        },
    )
    """Each block of diffusers' has embeddings of its own, which are the authors' one again."""
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

    def told_by(self, shapes: Shapes) -> DiTConfig | None:
        """By the authors' names, as their files come without a configuration; the trained size is
        that of the fixed positions, or 256 pixels'."""
        if self.authors.mark not in shapes or "x_embedder.proj.weight" not in shapes:
            return None
        dim, channels, patch = shapes["x_embedder.proj.weight"][:3]
        if dim not in _HEADS:
            return None
        out = shapes.get("final_layer.linear.weight", (patch**2 * 2 * channels,))[0]
        places = shapes.get("pos_embed", (1, (32 // patch) ** 2, dim))[1]
        return DiTConfig(
            num_attention_heads=_HEADS[dim],
            attention_head_dim=dim // _HEADS[dim],
            in_channels=channels,
            out_channels=out // patch**2,
            num_layers=number_of(shapes, "blocks"),
            sample_size=math.isqrt(places) * patch,
            patch_size=patch,
            num_embeds_ada_norm=shapes[self.authors.mark][0] - 1,
        )

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
        # No part of its own: the classes' embedding is the transformer's.
        classes = Component("label", "ClassLabels", source.path, {})
        return self.trained_at_one_size(
            path,
            source,
            parts,
            channels=config.in_channels,
            side=config.sample_size,
            patch=config.patch_size,
            defaults={"num_inference_steps": 50, "guidance_scale": 4.0},
            variant="class-conditional",
            text_encoders={"label": TextSource(encoder=classes, tokenizer=None, max_tokens=1)},
            learned_variance=config.learned_variance,
            labels=read_labels(settings.get("id2label"), config.num_embeds_ada_norm, path / INDEX),
        )
