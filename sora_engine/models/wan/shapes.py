"""The configuration of a Wan transformer in a single file, told by the shapes of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from sora_engine.errors import CheckpointError
from sora_engine.models.wan.config import WanConfig
from sora_engine.models.wan.vace import spread

RAYS = 24
"""Channels that a latent frame has of one pixel's rays: six numbers for each of four frames."""


def infer_config(
    shapes: Mapping[str, tuple[int, ...]], *, head_dim: int = 128, path: Path | None = None
) -> WanConfig:
    """The configuration of the transformer whose tensors, under diffusers' names, have `shapes`.

    Every published Wan has heads of 128; that and eps are what shapes do not tell. Raises
    `CheckpointError` if a tensor that tells a size is missing or has another number of dimensions.
    """
    embedder = "condition_embedder."

    def shape(name: str, dims: int) -> tuple[int, ...]:
        if name not in shapes:
            raise CheckpointError(
                f"not a Wan transformer: no tensor {name!r}, under this name or Wan's own",
                path=path,
                tensor=name,
            )
        if len(shapes[name]) != dims or 0 in shapes[name]:
            raise CheckpointError(
                f"tensor {name!r} has shape {list(shapes[name])}; a Wan transformer's has "
                f"{dims} dimensions",
                path=path,
                tensor=name,
            )
        return shapes[name]

    dim, in_channels, *patch = shape("patch_embedding.weight", 5)
    blocks = {int(m[1]) for name in shapes if (m := re.match(r"blocks\.(\d{1,6})\.", name))}
    if blocks != set(range(len(blocks))):
        gap = min(set(range(max(blocks))) - blocks)
        raise CheckpointError(f"no tensors of block {gap} of {max(blocks) + 1}", path=path)
    if dim % head_dim:
        raise CheckpointError(
            f"tokens are {dim} wide, no multiple of attention_head_dim {head_dim}; give its value",
            path=path,
            tensor="patch_embedding.weight",
        )
    volume = patch[0] * patch[1] * patch[2]
    out_features, _ = shape("proj_out.weight", 2)
    if out_features % volume:
        raise CheckpointError(
            f"proj_out has {out_features} outputs, no multiple of a patch of {patch}",
            path=path,
            tensor="proj_out.weight",
        )
    if embedder + "action_embedder.linear_1.weight" in shapes:
        raise CheckpointError(
            "the transformer is driven by actions, and shapes do not tell which coordinates its "
            "rotary embedding reads; a folder with transformer/config.json would work",
            path=path,
            tensor=embedder + "action_embedder.linear_1.weight",
        )
    if "ref_conv.weight" in shapes:
        raise CheckpointError(
            "the transformer reads a reference picture (ref_conv), which is not built; those of "
            "Control-Camera without it would work",
            path=path,
            tensor="ref_conv.weight",
        )
    image = embedder + "image_embedder.norm1.weight" in shapes
    positions = embedder + "image_embedder.pos_embed"
    rays, fold = None, 8
    if "control_adapter.conv.weight" in shapes:
        folded = shape("control_adapter.conv.weight", 4)[1]
        fold = math.isqrt(folded // RAYS)
        if folded != RAYS * fold**2:
            raise CheckpointError(
                f"the control adapter reads {folded} channels; {RAYS} rays of 8 x 8 or 16 x 16 "
                f"pixels, {RAYS * 64} or {RAYS * 256}, would work",
                path=path,
                tensor="control_adapter.conv.weight",
            )
        rays = RAYS
    vace = {int(m[1]) for name in shapes if (m := re.match(r"vace_blocks\.(\d{1,6})\.", name))}
    vace_layers = spread(len(vace), len(blocks)) if vace else None
    try:
        return WanConfig(
            patch_size=(patch[0], patch[1], patch[2]),
            num_attention_heads=dim // head_dim,
            attention_head_dim=head_dim,
            in_channels=in_channels,
            out_channels=out_features // volume,
            text_dim=shape(embedder + "text_embedder.linear_1.weight", 2)[1],
            freq_dim=shape(embedder + "time_embedder.linear_1.weight", 2)[1],
            ffn_dim=shape("blocks.0.ffn.net.0.proj.weight", 2)[0],
            num_layers=len(blocks),
            cross_attn_norm="blocks.0.norm2.weight" in shapes,
            image_dim=shape(embedder + "image_embedder.norm1.weight", 1)[0] if image else None,
            added_kv_proj_dim=shape("blocks.0.attn2.add_k_proj.weight", 2)[1] if image else None,
            pos_embed_seq_len=shape(positions, 3)[1] if positions in shapes else None,
            vace_layers=vace_layers,
            vace_in_channels=shape("vace_patch_embedding.weight", 5)[1] if vace else None,
            in_dim_control_adapter=rays,
            downscale_factor_control_adapter=fold,
        )
    except CheckpointError as error:
        if error.path is not None or path is None:
            raise
        raise CheckpointError(str(error), path=path) from None
