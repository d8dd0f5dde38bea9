"""Latte behind the seam: videos from texts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sora_engine.denoise.model import TransformerShape
from sora_engine.models.family import Capabilities, Checkpoint
from sora_engine.models.folder import Component, FolderLayout
from sora_engine.models.latte.config import LatteConfig
from sora_engine.models.latte.model import TEXT_TOKENS, LatteTransformer, transformer_shape
from sora_engine.models.plain_family import (
    DISCRETE_SCHEDULERS,
    PlainFamily,
    check_texts,
    t5_texts,
)
from sora_engine.models.transformer_files import TransformerSource
from sora_engine.request import KnownMode


class LatteFamily(PlainFamily[LatteConfig]):
    """The Latte family (arXiv 2401.03048)."""

    name = "latte"
    config = LatteConfig
    transformer = LatteTransformer
    layout = FolderLayout(
        pipelines=("LattePipeline",),
        components={
            "transformer": LatteConfig.class_names,
            "vae": ("AutoencoderKL",),
            "text_encoder": ("T5EncoderModel",),
            "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
            "scheduler": DISCRETE_SCHEDULERS,
        },
    )
    capabilities = Capabilities(
        makes="videos, pictures",
        reads="texts",
        known_modes=(KnownMode.REPLACEMENT,),
        windows=("static", "moving"),
        ranks=("guidance", "window", "data"),
        adapters=("lora",),
        page="latte.md",
    )
    marks = (
        "temporal_transformer_blocks.0.attn1.to_q.weight",
        "pos_embed.proj.weight",
        "caption_projection.linear_1.weight",
        "adaln_single.linear.weight",
        "proj_out.weight",
    )
    ignored = ("pos_embed", "temp_pos_embed")
    """Fixed positions, which some files hold: they are made for each video's size here."""
    keep_fp32 = ("scale_shift_table",)
    layers = (
        *(
            f"{blocks}.#.{layer}"
            for blocks in ("transformer_blocks", "temporal_transformer_blocks")
            for layer in (
                *(f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v")),
                "attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2",
            )
        ),
        "caption_projection.linear_1", "caption_projection.linear_2", "proj_out",
    )  # fmt: skip
    adapted = r"temporal_transformer_blocks\.(\d+)\.attn1\.to_[qkv]"

    def described(self, config: LatteConfig) -> str:
        """Its sizes, and what goes with it."""
        return (
            f"t2v: {config.num_layers} layers within frames and as many along time, "
            f"{config.inner_dim} wide, {config.video_length} frames; goes with an AutoencoderKL "
            "and a T5 encoder"
        )

    def shape(self, config: LatteConfig) -> TransformerShape:
        """The sizes of its transformer."""
        return transformer_shape(config)

    def assemble(
        self,
        path: Path,
        source: TransformerSource[LatteConfig],
        parts: Mapping[str, Component],
        settings: Mapping[str, Any],
    ) -> Checkpoint:
        """What was found, as the engine sees it."""
        config = source.config
        check_texts(parts, config.caption_channels)
        return self.trained_at_one_size(
            path,
            source,
            parts,
            channels=config.in_channels,
            side=config.sample_size,
            patch=config.patch_size,
            defaults={
                "num_frames": config.video_length,
                "fps": 8.0,
                "num_inference_steps": 50,
                "guidance_scale": 7.5,
                "max_window": config.video_length,
            },
            variant="t2v",
            text_encoders=t5_texts(parts, TEXT_TOKENS),
            learned_variance=True,
            shares_tokens=False,
        )
