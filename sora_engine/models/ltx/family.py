"""LTX-Video behind the seam: videos from texts, pictures and frames."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sora_engine.denoise.model import TransformerShape
from sora_engine.errors import CheckpointError
from sora_engine.models.family import Capabilities, Checkpoint, Shapes, TextSource
from sora_engine.models.folder import Component, FolderLayout
from sora_engine.models.ltx.config import LTXConfig
from sora_engine.models.ltx.ladders import LTX_LADDERS
from sora_engine.models.ltx.model import LTXTransformer, transformer_shape
from sora_engine.models.plain_family import PlainFamily, check_texts, vae_of
from sora_engine.models.transformer_files import Names, TransformerSource
from sora_engine.request import GenerationDefaults, KnownMode, LatentGrid
from sora_engine.text.t5_written import PADDED, WRITTEN, WRITTEN_COUNTS

CONDITION = "LTXConditionPipeline"
"""The pipeline of 0.9.5 and later: positions in time are those of frames, padding of texts is
masked, and levels are linear-quadratic."""


class LTXFamily(PlainFamily[LTXConfig]):
    """The LTX-Video family (arXiv 2501.00103)."""

    name = "ltx"
    config = LTXConfig
    transformer = LTXTransformer
    ladders = LTX_LADDERS
    layout = FolderLayout(
        pipelines=("LTXPipeline", "LTXImageToVideoPipeline", CONDITION),
        components={
            "transformer": LTXConfig.class_names,
            "vae": ("AutoencoderKLLTXVideo",),
            "text_encoder": ("T5EncoderModel",),
            "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
            "scheduler": ("FlowMatchEulerDiscreteScheduler",),
        },
    )
    capabilities = Capabilities(
        makes="videos, pictures",
        reads="texts, images",
        known_modes=(KnownMode.NOISE_LEVEL,),
        windows=("static", "moving", "chained", "sparse"),
        ranks=("ulysses", "ring", "guidance", "window", "data"),
        adapters=("lora",),
        page="ltx.md",
    )
    marks = (
        "time_embed.linear.weight",
        "proj_in.weight",
        "transformer_blocks.0.attn1.norm_q.weight",
        "caption_projection.linear_1.weight",
        "scale_shift_table",
    )
    keep_fp32 = ("scale_shift_table",)
    layers = (
        *(
            f"transformer_blocks.#.{layer}"
            for layer in (
                *(f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v")),
                "attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2",
            )
        ),
        "caption_projection.linear_1", "caption_projection.linear_2", "proj_in", "proj_out",
    )  # fmt: skip
    adapted = r"transformer_blocks\.(\d+)\.attn1\.to_[qkv]"
    adapted_elsewhere = r"temporal_transformer_blocks|adaln_single"

    def described(self, config: LTXConfig) -> str:
        """Its sizes, and what goes with it."""
        return (
            f"ti2v: {config.num_layers} layers, {config.inner_dim} wide, {config.in_channels} "
            "latent channels; goes with an AutoencoderKLLTXVideo and a T5 encoder"
        )

    def shape(self, config: LTXConfig) -> TransformerShape:
        """The sizes of its transformer."""
        return transformer_shape(config)

    def translate(self, shapes: Shapes) -> Names | None:
        """The authors' files name four things otherwise than diffusers does."""
        names = {_from_authors(name): name for name in shapes if not name.startswith("vae.")}
        return names if any(own != name for own, name in names.items()) else None

    def own_name(self, module: str) -> str | None:
        """diffusers' names, which are the engine's, and the authors'."""
        return super().own_name(_from_authors(module))

    def of_pipeline(self, config: LTXConfig, pipeline: str) -> LTXConfig:
        """Later versions have a pipeline of their own."""
        return replace(config, pixel_times=pipeline == CONDITION)

    def assemble(
        self,
        path: Path,
        source: TransformerSource[LTXConfig],
        parts: Mapping[str, Component],
        settings: Mapping[str, Any],
    ) -> Checkpoint:
        """What was found, as the engine sees it."""
        parts = {**parts, "vae": with_statistics(parts["vae"])}
        coder = vae_of(parts, source.config.in_channels)
        check_texts(parts, source.config.caption_channels)
        config = replace(
            source.config, time_factor=coder.factor_temporal, space_factor=coder.factor_spatial
        )
        text = parts["text_encoder"]
        encoders = {
            "text": replace(text, class_name=WRITTEN if config.pixel_times else PADDED),
            "count": replace(text, class_name=WRITTEN_COUNTS),
        }
        return Checkpoint(
            family=self.name,
            variant="ti2v",
            path=path,
            experts=(self.expert(replace(source, config=config)),),
            vae=parts["vae"],
            **self.scheduler(parts),
            spread="linear-quadratic" if config.pixel_times else "even",
            grid=LatentGrid(
                channels=config.in_channels,
                vae_spatial=coder.factor_spatial,
                patch=(1, 1, 1),
                time=coder.factor_temporal,
            ),
            known_mode=KnownMode.NOISE_LEVEL,
            defaults=GenerationDefaults(
                height=16 * coder.factor_spatial,
                width=22 * coder.factor_spatial,
                num_frames=20 * coder.factor_temporal + 1,
                fps=25.0,
                num_inference_steps=50,
                guidance_scale=3.0,
                max_window=33,
            ),
            text_encoders={
                name: TextSource(
                    encoder=part, tokenizer=parts["tokenizer"], max_tokens=config.text_tokens
                )
                for name, part in encoders.items()
            },
        )


def with_statistics(vae: Component) -> Component:
    """An autoencoder with the statistics of its latents in its configuration. diffusers keeps them
    beside the weights, as `latents_mean` and `latents_std`. Raises CheckpointError."""
    found = {}
    with vae.open_weights() as weights:
        for name in ("latents_mean", "latents_std"):
            if name not in weights:
                raise CheckpointError(
                    f"tensor {name} is missing: an LTX-Video autoencoder has it", path=vae.folder
                )
            if len(weights.info(name).shape) != 1:
                raise CheckpointError(
                    f"tensor {name} has shape {list(weights.info(name).shape)}; one value a "
                    "channel is wanted",
                    path=vae.folder,
                )
            found[name] = weights.read(name).float().tolist()
    return replace(vae, config={**vae.config, **found})


def _from_authors(module: str) -> str:
    module = module.replace("patchify_proj", "proj_in").replace("adaln_single", "time_embed")
    return module.replace(".q_norm", ".norm_q").replace(".k_norm", ".norm_k")
