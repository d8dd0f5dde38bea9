"""PixArt-Sigma behind the seam: pictures from texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from sora_engine.denoise.model import TransformerShape
from sora_engine.models.authors_names import AuthorsNames, number_of
from sora_engine.models.family import Capabilities, Checkpoint, Shapes
from sora_engine.models.folder import Component, FolderLayout
from sora_engine.models.pixart.config import PixArtConfig
from sora_engine.models.pixart.model import TEXT_TOKENS, PixArt, transformer_shape
from sora_engine.models.plain_family import (
    DISCRETE_SCHEDULERS,
    PlainFamily,
    check_texts,
    t5_texts,
)
from sora_engine.models.transformer_files import TransformerSource
from sora_engine.request import KnownMode

_HEAD_DIM = 72
"""Of the published ones, whose files do not tell it."""


class PixArtFamily(PlainFamily[PixArtConfig]):
    """The PixArt family (arXiv 2403.04692)."""

    name = "pixart"
    config = PixArtConfig
    transformer = PixArt
    layout = FolderLayout(
        pipelines=("PixArtSigmaPipeline",),
        components={
            "transformer": PixArtConfig.class_names,
            "vae": ("AutoencoderKL",),
            "text_encoder": ("T5EncoderModel",),
            "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
            "scheduler": DISCRETE_SCHEDULERS,
        },
    )
    capabilities = Capabilities(
        makes="pictures",
        reads="texts",
        known_modes=(KnownMode.REPLACEMENT,),
        windows=(),
        ranks=("ulysses", "ring", "guidance", "data"),
        adapters=("lora",),
        page="pixart.md",
    )
    marks = (
        "pos_embed.proj.weight",
        "transformer_blocks.0.attn2.to_k.weight",
        "transformer_blocks.0.scale_shift_table",
        "adaln_single.linear.weight",
        "caption_projection.linear_1.weight",
    )
    foreign = ("temporal_transformer_blocks.0.attn1.to_q.weight",)
    ignored = ("pos_embed",)
    """Fixed positions, which some files hold: they are made for each picture's size here."""
    keep_fp32 = ("scale_shift_table",)
    authors = AuthorsNames(
        mark="blocks.0.cross_attn.kv_linear.weight",
        table={
            "x_embedder.proj": "pos_embed.proj",
            "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
            "t_block.1": "adaln_single.linear",
            "y_embedder.y_proj.fc1": "caption_projection.linear_1",
            "y_embedder.y_proj.fc2": "caption_projection.linear_2",
            "blocks.#.scale_shift_table": "transformer_blocks.#.scale_shift_table",
            "blocks.#.attn.qkv": tuple(f"transformer_blocks.#.attn1.to_{n}" for n in "qkv"),
            "blocks.#.attn.proj": "transformer_blocks.#.attn1.to_out.0",
            "blocks.#.cross_attn.q_linear": "transformer_blocks.#.attn2.to_q",
            "blocks.#.cross_attn.kv_linear": tuple(
                f"transformer_blocks.#.attn2.to_{n}" for n in "kv"
            ),
            "blocks.#.cross_attn.proj": "transformer_blocks.#.attn2.to_out.0",
            "blocks.#.mlp.fc1": "transformer_blocks.#.ff.net.0.proj",
            "blocks.#.mlp.fc2": "transformer_blocks.#.ff.net.2",
            "final_layer.scale_shift_table": "scale_shift_table",
            "final_layer.linear": "proj_out",
        },
        unread=("y_embedder.y_embedding",),
    )
    layers = (
        *(
            f"transformer_blocks.#.{layer}"
            for layer in (
                *(f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v")),
                "attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2",
            )
        ),
        "caption_projection.linear_1", "caption_projection.linear_2", "proj_out",
    )  # fmt: skip
    adapted = r"transformer_blocks\.(\d+)\.attn[12]\.to_[qkv]"
    adapted_elsewhere = r"^temporal"
    default_scheduler: ClassVar[Mapping[str, Any]] = {
        "_class_name": "DPMSolverMultistepScheduler",
    }
    """Of the published folders, with its own defaults."""

    def told_by(self, shapes: Shapes) -> PixArtConfig | None:
        """By the authors' names, as their files come without a configuration; the trained size is
        that of the fixed positions, or the first model's."""
        names = self.authors.names(shapes)
        if names is None or "x_embedder.proj.weight" not in shapes:
            return None
        dim, channels, patch = shapes["x_embedder.proj.weight"][:3]
        out = shapes.get("final_layer.linear.weight", (patch**2 * 2 * channels,))[0]
        texts = shapes.get("y_embedder.y_proj.fc1.weight", (0, 4096))[1]
        places = shapes.get("pos_embed", (1, (64 // patch) ** 2, dim))[1]
        if dim % _HEAD_DIM:
            return None
        return PixArtConfig(
            num_attention_heads=dim // _HEAD_DIM,
            attention_head_dim=_HEAD_DIM,
            in_channels=channels,
            out_channels=out // patch**2,
            num_layers=number_of(shapes, "blocks"),
            sample_size=math.isqrt(places) * patch,
            patch_size=patch,
            caption_channels=texts,
            use_additional_conditions=False,
        )

    def described(self, config: PixArtConfig) -> str:
        """Its sizes, and what goes with it."""
        return (
            f"t2i: {config.num_layers} layers, {config.inner_dim} wide, patches of "
            f"{config.patch_size}; goes with an AutoencoderKL and a T5 encoder"
        )

    def shape(self, config: PixArtConfig) -> TransformerShape:
        """The sizes of its transformer."""
        return transformer_shape(config)

    def assemble(
        self,
        path: Path,
        source: TransformerSource[PixArtConfig],
        parts: Mapping[str, Component],
        settings: Mapping[str, Any],
    ) -> Checkpoint:
        """What was found, as the engine sees it."""
        config = source.config
        assert config.caption_channels is not None
        check_texts(parts, config.caption_channels)
        return self.trained_at_one_size(
            path,
            source,
            parts,
            channels=config.in_channels,
            side=config.sample_size,
            patch=config.patch_size,
            defaults={"num_inference_steps": 20, "guidance_scale": 4.5},
            variant="t2i",
            text_encoders=t5_texts(parts, TEXT_TOKENS),
            learned_variance=config.learned_variance,
        )
