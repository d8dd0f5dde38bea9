"""LTX-Video behind the seam: videos from texts, pictures and frames."""

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
from sora_engine.models.ltx.checkpoint import (
    LAYOUT,
    TransformerSource,
    companions,
    transformer_in_file,
    with_statistics,
)
from sora_engine.models.ltx.config import LTXConfig
from sora_engine.models.ltx.ladders import LTX_LADDERS
from sora_engine.models.ltx.model import TEXT_TOKENS, LTXTransformer, transformer_shape
from sora_engine.request import GenerationDefaults, KnownMode, LatentGrid
from sora_engine.request.ladders import Ladder
from sora_engine.text.t5_written import PADDED, WRITTEN, WRITTEN_COUNTS
from sora_engine.vae.registry import read_vae_config

CONDITION = "LTXConditionPipeline"
"""The pipeline of 0.9.5 and later: positions in time are those of frames, and levels are
linear-quadratic."""
CONDITION_TOKENS = 256
"""Where it cuts a text."""
_MARKS = (
    "proj_in.weight",
    "transformer_blocks.0.attn1.norm_q.weight",
    "caption_projection.linear_1.weight",
    "time_embed.linear.weight",
    "scale_shift_table",
)
"""Tensors of every LTX-Video transformer. A file with most of them is one, if a damaged one."""


class LTXFamily:
    """The LTX-Video family (arXiv 2501.00103)."""

    name = "ltx"
    layout: FolderLayout = LAYOUT
    ladders: ClassVar[Mapping[str, Ladder]] = LTX_LADDERS
    capabilities = Capabilities(
        makes="videos, pictures",
        reads="texts, images",
        known_modes=(KnownMode.NOISE_LEVEL,),
        windows=("static", "moving", "chained", "sparse"),
        ranks=("ulysses", "ring", "guidance", "window", "data"),
        adapters=("lora",),
        page="ltx.md",
    )

    def claims_file(self, shapes: Shapes) -> bool:
        """Whether most of the tensors that every LTX-Video transformer has are there, its own
        embedding of noise levels among them."""
        return _MARKS[3] in shapes and sum(mark in shapes for mark in _MARKS) > len(_MARKS) // 2

    def describe_file(self, path: Path) -> str:
        """Its sizes, and what goes with it."""
        config = transformer_in_file(path).config
        return (
            f"{self.name} transformer: {config.num_layers} layers, {config.inner_dim} wide, "
            f"{config.in_channels} latent channels; goes with an AutoencoderKLLTXVideo and a T5 "
            "encoder"
        )

    def own_name(self, module: str) -> str | None:
        """diffusers' names, which are the engine's; the authors'; with underscores, too."""
        if "." in module:
            return _from_authors(module)
        block = re.fullmatch(r"transformer_blocks_(\d+)_(.+)", module)
        inside = {"ff_net_0_proj": "ff.net.0.proj", "ff_net_2": "ff.net.2"}
        inside |= {
            f"attn{i}_{name}": f"attn{i}.{name.replace('out_0', 'out.0')}"
            for i in (1, 2)
            for name in ("to_q", "to_k", "to_v", "to_out_0")
        }
        if block is None or block[2] not in inside:
            outside = {
                f"caption_projection_linear_{i}": f"caption_projection.linear_{i}" for i in (1, 2)
            }
            outside |= {"proj_out": "proj_out", "proj_in": "proj_in", "patchify_proj": "proj_in"}
            return outside.get(module)
        return f"transformer_blocks.{block[1]}.{inside[block[2]]}"

    def published_name(self, name: str) -> str:
        """diffusers', as the folders have them."""
        return name

    def is_further_input(self, name: str) -> bool:
        """All of its transformers take the same."""
        return False

    def describe_adapter(self, sizes: Sizes) -> str | None:
        """Width and layers, where it changes blocks of this kind."""
        attention = re.compile(r"transformer_blocks\.(\d+)\.attn1\.to_[qkv]")
        found = [(m, rows) for name, (rows, _) in sizes.items() if (m := attention.fullmatch(name))]
        widths = {rows for _, rows in found}
        if len(widths) != 1:
            return None
        layers = max(int(m[1]) for m, _ in found) + 1
        return f"an {self.name} transformer {widths.pop()} wide of {layers} layers or more"

    def open_folder(self, path: Path, settings: Mapping[str, Any]) -> Checkpoint:
        """A folder that one of diffusers' LTX-Video pipelines saved."""
        folder = ModelFolder.open(path, LAYOUT)
        part = folder["transformer"]
        config = LTXConfig.from_dict(part.config, path=part.config_path)
        config = replace(config, pixel_times=folder.pipeline == CONDITION)
        source = TransformerSource(part.weights_path, config)
        return _describe(path, source, folder.components, settings)

    def open_files(
        self,
        paths: Sequence[Path],
        components: Path | Mapping[str, Path] | None,
        settings: Mapping[str, Any],
    ) -> Checkpoint:
        """A transformer file, with its configuration beside it, and the other parts in folders."""
        if len(paths) != 1:
            raise CheckpointError(f"{len(paths)} files; an LTX-Video is one", path=paths[1])
        parts = companions(paths[0], components)
        return _describe(paths[0], transformer_in_file(paths[0]), parts, settings)


def _from_authors(module: str) -> str:
    """The authors' files name three things otherwise than diffusers does."""
    module = module.replace("patchify_proj", "proj_in").replace("adaln_single", "time_embed")
    return module.replace(".q_norm", ".norm_q").replace(".k_norm", ".norm_k")


def _describe(
    path: Path,
    source: TransformerSource,
    parts: Mapping[str, Component],
    settings: Mapping[str, Any],
) -> Checkpoint:
    """What was found, as the engine sees it."""
    vae, text = with_statistics(parts["vae"]), parts["text_encoder"]
    coder = read_vae_config({"_class_name": vae.class_name, **vae.config}, path=vae.config_path)
    config = replace(
        source.config, time_factor=coder.factor_temporal, space_factor=coder.factor_spatial
    )
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
    tokens = CONDITION_TOKENS if config.pixel_times else TEXT_TOKENS
    tokens = int(settings.get("text_tokens", tokens))
    tokenizer = parts["tokenizer"]
    encoders = {
        "text": replace(text, class_name=WRITTEN if config.pixel_times else PADDED),
        "count": replace(text, class_name=WRITTEN_COUNTS),
    }
    return Checkpoint(
        family=LTXFamily.name,
        variant="ti2v",
        path=path,
        experts=(
            ExpertSource(
                path=source.path,
                shape=transformer_shape(config, tokens),
                num_parameters=source.num_parameters,
                build=partial(_build, config, tokens),
                fill=source.load,
            ),
        ),
        vae=vae,
        scheduler_config=parts["scheduler"].config,
        scheduler_path=parts["scheduler"].config_path,
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
            name: TextSource(encoder=part, tokenizer=tokenizer, max_tokens=tokens)
            for name, part in encoders.items()
        },
    )


def _build(config: LTXConfig, text_tokens: int, attention_backend: str) -> LTXTransformer:
    return LTXTransformer(config, text_tokens=text_tokens, attention_backend=attention_backend)
