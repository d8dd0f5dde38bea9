"""Open-Sora's STDiT3 behind the seam: videos from texts, in files of its authors' names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from sora_engine.denoise.model import TransformerShape
from sora_engine.models.authors_names import AuthorsNames, number_of
from sora_engine.models.family import Capabilities, Checkpoint, Shapes
from sora_engine.models.folder import Component, FolderLayout
from sora_engine.models.plain_family import PlainFamily, check_texts, t5_texts
from sora_engine.models.stdit.config import STDiTConfig
from sora_engine.models.stdit.model import FPS, STDiT, transformer_shape
from sora_engine.models.transformer_files import TransformerSource
from sora_engine.request import KnownMode

_HEAD_DIM = 72
"""Of the published one, whose norms of queries have that many channels."""
FRAMES = 16


def _blocks(kind: str) -> dict[str, str | tuple[str, ...]]:
    block = f"{kind}_blocks.#"
    return {
        f"{block}.attn.qkv": tuple(f"{block}.attn1.to_{name}" for name in "qkv"),
        f"{block}.attn.proj": f"{block}.attn1.to_out.0",
        f"{block}.attn.q_norm": f"{block}.norm_q",
        f"{block}.attn.k_norm": f"{block}.norm_k",
        f"{block}.cross_attn.q_linear": f"{block}.attn2.to_q",
        f"{block}.cross_attn.kv_linear": (f"{block}.attn2.to_k", f"{block}.attn2.to_v"),
        f"{block}.cross_attn.proj": f"{block}.attn2.to_out.0",
        f"{block}.mlp.fc1": f"{block}.ff.net.0.proj",
        f"{block}.mlp.fc2": f"{block}.ff.net.2",
    }


class STDiTFamily(PlainFamily[STDiTConfig]):
    """Open-Sora 1.2's family (arXiv 2412.20404)."""

    name = "stdit"
    config = STDiTConfig
    transformer = STDiT
    layout = FolderLayout(
        pipelines=(),
        components={
            "transformer": STDiTConfig.class_names,
            "vae": ("AutoencoderKL",),
            "text_encoder": ("T5EncoderModel",),
            "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"),
        },
    )
    capabilities = Capabilities(
        makes="videos, pictures",
        reads="texts",
        known_modes=(KnownMode.NOISE_LEVEL,),
        windows=("static", "moving", "chained"),
        ranks=("guidance", "window", "data"),
        adapters=("lora",),
        page="stdit.md",
    )
    marks = (
        "temporal_blocks.0.norm_q.weight",
        "spatial_blocks.0.attn1.to_q.weight",
        "pos_embed.proj.weight",
        "fps_embedder.linear_1.weight",
        "adaln_single.linear.weight",
    )
    keep_fp32 = ("scale_shift_table",)
    authors = AuthorsNames(
        mark="temporal_blocks.0.attn.qkv.weight",
        table={
            "x_embedder.proj": "pos_embed.proj",
            "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
            "fps_embedder.mlp.0": "fps_embedder.linear_1",
            "fps_embedder.mlp.2": "fps_embedder.linear_2",
            "t_block.1": "adaln_single.linear",
            "y_embedder.y_proj.fc1": "caption_projection.linear_1",
            "y_embedder.y_proj.fc2": "caption_projection.linear_2",
            "y_embedder.y_embedding": "no_text",
            **_blocks("spatial"),
            **_blocks("temporal"),
            "final_layer.scale_shift_table": "scale_shift_table",
            "final_layer.linear": "proj_out",
        },
        unread=("rope.freqs", "pos_embed.inv_freq"),
    )
    default_scheduler: ClassVar[Mapping[str, Any]] = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "shift": float(FRAMES**0.5),
    }
    """Rectified flow. Its sampler shifts levels by the video's size: this is for 512 x 512 pixels
    of 16 latent frames; see the page."""
    layers = (
        *(
            f"{blocks}.#.{layer}"
            for blocks in ("spatial_blocks", "temporal_blocks")
            for layer in (
                *(f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v")),
                "attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2",
            )
        ),
        "caption_projection.linear_1", "caption_projection.linear_2", "proj_out",
    )  # fmt: skip
    adapted = r"(?:spatial|temporal)_blocks\.(\d+)\.attn1\.to_[qkv]"

    def told_by(self, shapes: Shapes) -> STDiTConfig | None:
        """By the authors' names; the trained size is 512 pixels, as of all published ones."""
        patch, texts = shapes.get("x_embedder.proj.weight"), shapes.get("y_embedder.y_embedding")
        norm = shapes.get("temporal_blocks.0.attn.q_norm.weight")
        if patch is None or len(patch) != 5 or texts is None or norm != (_HEAD_DIM,):
            return None
        out = shapes.get("final_layer.linear.weight", (2 * patch[1] * patch[3] ** 2,))[0]
        return STDiTConfig(
            num_attention_heads=patch[0] // _HEAD_DIM,
            attention_head_dim=_HEAD_DIM,
            in_channels=patch[1],
            out_channels=out // patch[3] ** 2,
            num_layers=number_of(shapes, "spatial_blocks"),
            sample_size=64,
            patch_size=patch[3],
            caption_channels=texts[1],
            text_tokens=texts[0],
        )

    def described(self, config: STDiTConfig) -> str:
        """Its sizes, and what goes with it."""
        return (
            f"t2v: {config.num_layers} layers within frames and as many along time, "
            f"{config.inner_dim} wide, rectified flow; goes with an AutoencoderKL and a T5 encoder"
        )

    def shape(self, config: STDiTConfig) -> TransformerShape:
        """The sizes of its transformer."""
        return transformer_shape(config)

    def assemble(
        self,
        path: Path,
        source: TransformerSource[STDiTConfig],
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
                "num_frames": FRAMES,
                "fps": FPS,
                "num_inference_steps": 30,
                "guidance_scale": 7.0,
            },
            variant="t2v",
            text_encoders=t5_texts(parts, config.text_tokens),
            learned_variance=config.learned_variance,
            shares_tokens=False,
        )
