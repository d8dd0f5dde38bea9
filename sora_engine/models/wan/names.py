"""The names of a Wan transformer's tensors: diffusers', which are the engine's, and Wan's own."""

from __future__ import annotations

import re
from collections.abc import Iterable

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
"""What may stand before every name: ComfyUI saves the transformer as part of a larger module."""

# Wan's own names on the left, diffusers' on the right, each without .weight and .bias.
_OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "vace_patch_embedding": "vace_patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_IN_BLOCK = {
    # Wan numbers its norms self-attention, feed-forward, cross-attention; diffusers in the order
    # in which they run. Only cross-attention's has weights.
    "norm3": "norm2",
    "modulation": "scale_shift_table",
    "before_proj": "proj_in",
    "after_proj": "proj_out",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    **{
        f"{ours}.{part}": f"{theirs}.{name}"
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, name in (
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("o", "to_out.0"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    },
}


VACE = ("vace_blocks.", "vace_patch_embedding.")
"""What the names of VACE's own tensors begin with, in either naming."""


def is_vace_module(names: Iterable[str]) -> bool:
    """Whether a file has VACE's control blocks and nothing else: such a file is laid over a text
    to video transformer."""
    stems = {to_diffusers_name(name) for name in names}
    return bool(stems) and all(name.startswith(VACE) for name in stems)


def to_diffusers_name(name: str) -> str:
    """diffusers' name of a parameter under Wan's own name; a name that is neither's comes back."""
    for prefix in reversed(PREFIXES):
        if name.startswith(prefix):
            name = name[len(prefix) :]
            break
    stem, dot, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        stem, dot, leaf = name, "", ""
    block = re.fullmatch(r"((?:vace_)?blocks\.\d+\.)(.+)", stem)
    if block:
        stem = block[1] + _IN_BLOCK.get(block[2], block[2])
    else:
        stem = _OUTSIDE.get(stem, stem)
    return stem + dot + leaf


def to_wan_name(name: str) -> str:
    """Wan's own name of a parameter under either naming, without a prefix."""
    name = to_diffusers_name(name)
    stem, dot, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        stem, dot, leaf = name, "", ""
    block = re.fullmatch(r"((?:vace_)?blocks\.\d+\.)(.+)", stem)
    if block:
        return block[1] + _TO_WAN_IN_BLOCK.get(block[2], block[2]) + dot + leaf
    return _TO_WAN.get(stem, stem) + dot + leaf


def own_name(module: str) -> str | None:
    """The module or parameter that a name without `.weight` and `.bias` means: Wan's own or
    diffusers', with dots or with underscores in their place (kohya, musubi-tuner, VideoX-Fun). None
    for one that is neither's."""
    if "." in module:
        name = to_diffusers_name(module)
        if name.endswith(".to_out"):  # diffusers' attention processors of 2023 had it so
            name += ".0"
        return name
    block = re.fullmatch(r"((?:vace_)?blocks)_(\d+)_(.+)", module)
    if block is None:
        return _UNDERSCORED_OUTSIDE.get(module)
    inside = _UNDERSCORED.get(block[3])
    return None if inside is None else f"{block[1]}.{block[2]}.{inside}"


def _underscored(names: dict[str, str]) -> dict[str, str]:
    """Both namings with underscores, to diffusers'. Wan's own go first where both have one."""
    theirs = {name.replace(".", "_"): name for name in names.values()}
    return theirs | {own.replace(".", "_"): name for own, name in names.items()}


_TO_WAN = {theirs: own for own, theirs in _OUTSIDE.items()}
_TO_WAN_IN_BLOCK = {theirs: own for own, theirs in _IN_BLOCK.items()}
_UNDERSCORED_OUTSIDE = _underscored(_OUTSIDE)
_UNDERSCORED = _underscored(_IN_BLOCK)
