"""U-ViT behind the seam: pictures from classes or from texts, in files of its authors' names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from sora_engine.denoise.model import TransformerShape
from sora_engine.errors import CheckpointError
from sora_engine.models.authors_names import AuthorsNames, number_of
from sora_engine.models.family import Capabilities, Checkpoint, Shapes, TextSource
from sora_engine.models.folder import Component, FolderLayout
from sora_engine.models.plain_family import DISCRETE_SCHEDULERS, PlainFamily
from sora_engine.models.transformer_files import TransformerSource
from sora_engine.models.uvit.config import UViTConfig
from sora_engine.models.uvit.model import UViT, transformer_shape
from sora_engine.request import KnownMode
from sora_engine.request.labels import Labels

_HEADS = {512: 8, 768: 12, 1024: 16, 1152: 16}
"""Of the published ones, by their width: files do not tell them."""


def _blocks(theirs: str, ours: str) -> dict[str, str | tuple[str, ...]]:
    return {
        f"{theirs}.attn.qkv": tuple(f"{ours}.attn1.to_{name}" for name in "qkv"),
        f"{theirs}.attn.proj": f"{ours}.attn1.to_out.0",
        f"{theirs}.mlp.fc1": f"{ours}.ff.net.0.proj",
        f"{theirs}.mlp.fc2": f"{ours}.ff.net.2",
    }


class UViTFamily(PlainFamily[UViTConfig]):
    """The U-ViT family (arXiv 2209.12152)."""

    name = "uvit"
    config = UViTConfig
    transformer = UViT
    layout = FolderLayout(
        pipelines=(),
        components={
            "transformer": UViTConfig.class_names,
            "vae": ("AutoencoderKL",),
            "text_encoder": ("CLIPTextModel",),
            "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
            "scheduler": DISCRETE_SCHEDULERS,
        },
        optional=("text_encoder", "tokenizer"),
    )
    capabilities = Capabilities(
        makes="pictures",
        reads="a class or texts",
        known_modes=(KnownMode.REPLACEMENT,),
        windows=(),
        ranks=("guidance", "data"),
        adapters=(),
        page="uvit.md",
    )
    marks = (
        "in_blocks.0.attn1.to_q.weight",
        "pos_embed",
        "patch_embed.proj.weight",
        "out_blocks.0.skip_linear.weight",
        "decoder_pred.weight",
    )
    authors = AuthorsNames(
        mark="in_blocks.0.attn.qkv.weight",
        table={
            **_blocks("in_blocks.#", "in_blocks.#"),
            **_blocks("mid_block", "mid_blocks.0"),
            "mid_block.norm1": "mid_blocks.0.norm1",
            "mid_block.norm2": "mid_blocks.0.norm2",
            **_blocks("out_blocks.#", "out_blocks.#"),
        },
    )
    default_scheduler: ClassVar[Mapping[str, Any]] = {
        "_class_name": "DPMSolverMultistepScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    }
    """The noise levels that its authors train and sample by, Stable Diffusion's."""
    layers = ()
    adapted = r"(?!)(\d)"

    def told_by(self, shapes: Shapes) -> UViTConfig | None:
        """By its shapes, all but the heads."""
        patches, places = shapes.get("patch_embed.proj.weight"), shapes.get("pos_embed")
        if patches is None or len(patches) < 4 or places is None or patches[0] not in _HEADS:
            return None
        classes = shapes.get("label_emb.weight")
        texts = shapes.get("context_embed.weight", (0, 768))[1]
        count = 1 if classes else 77
        return UViTConfig(
            img_size=math.isqrt(max(places[1] - 1 - count, 1)) * patches[-1],
            patch_size=patches[-1],
            in_chans=patches[1],
            embed_dim=patches[0],
            depth=2 * number_of(shapes, "in_blocks"),
            num_heads=_HEADS[patches[0]],
            num_classes=classes[0] if classes else -1,
            clip_dim=texts,
            num_clip_token=77,
            conv="final_layer.weight" in shapes,
        )

    def described(self, config: UViTConfig) -> str:
        """Its sizes, and what goes with it."""
        reads = f"{config.num_classes - 1} classes" if config.reads_classes else "texts"
        more = "" if config.reads_classes else " and a CLIP text encoder"
        return (
            f"of {reads}: {config.depth + 1} layers, {config.embed_dim} wide, patches of "
            f"{config.patch_size}; goes with an AutoencoderKL{more}"
        )

    def shape(self, config: UViTConfig) -> TransformerShape:
        """The sizes of its transformer."""
        return transformer_shape(config)

    def assemble(
        self,
        path: Path,
        source: TransformerSource[UViTConfig],
        parts: Mapping[str, Component],
        settings: Mapping[str, Any],
    ) -> Checkpoint:
        """What was found, as the engine sees it."""
        config = source.config
        return self.trained_at_one_size(
            path,
            source,
            parts,
            channels=config.in_chans,
            side=config.img_size,
            patch=config.patch_size,
            defaults={"num_inference_steps": 50, "guidance_scale": 2.0},
            variant="class-conditional" if config.reads_classes else "t2i",
            text_encoders=_encoders(config, source, parts),
            labels=Labels(config.num_classes - 1) if config.reads_classes else None,
            shares_tokens=False,
        )


def _encoders(
    config: UViTConfig, source: TransformerSource[UViTConfig], parts: Mapping[str, Component]
) -> dict[str, TextSource]:
    """Of classes, or of texts. Raises CheckpointError."""
    if config.reads_classes:
        classes = Component("label", "ClassLabels", source.path, {})
        return {"label": TextSource(encoder=classes, tokenizer=None, max_tokens=1)}
    missing = [name for name in ("text_encoder", "tokenizer") if name not in parts]
    if missing:
        raise CheckpointError(
            f"it reads texts, and there is no {' and no '.join(missing)}: CLIP's, as "
            "components={'text_encoder': ..., 'tokenizer': ...}, would work",
            path=source.path,
        )
    text = parts["text_encoder"]
    if text.config.get("hidden_size", config.clip_dim) != config.clip_dim:
        raise CheckpointError(
            f"the transformer reads texts of {config.clip_dim} channels and the encoder gives "
            f"{text.config['hidden_size']!r}",
            path=text.config_path,
        )
    tokens = config.num_clip_token
    return {"text": TextSource(encoder=text, tokenizer=parts["tokenizer"], max_tokens=tokens)}
