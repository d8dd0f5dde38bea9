"""CLIP's image encoder in a single file: under transformers' names or Wan's own.

`clip_vision_h` has transformers' names; Wan's code (`wan/modules/clip.py`) and the files for
WanVideoWrapper have `visual.*`, with queries, keys and values in one matrix. Wan reads ViT-H/14,
and no file has a configuration: shapes tell its sizes.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from sora_engine.errors import CheckpointError
from sora_engine.io.weights.opening import open_weights
from sora_engine.io.weights.selected import Part, SelectedWeights
from sora_engine.io.weights.source import WeightSource

WIDTH, HEAD_DIM = 1280, 80
"""Of ViT-H; what of its heads shapes do not tell."""
_OURS, _THEIRS = "vision_model.", "visual."
_PATCHES = _OURS + "embeddings.patch_embedding.weight"
_POSITIONS = _OURS + "embeddings.position_embedding.weight"

_OUTSIDE = {
    "patch_embedding": "embeddings.patch_embedding",
    "pre_norm": "pre_layrnorm",
    "post_norm": "post_layernorm",
}
_IN_LAYER = {
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}


def is_clip(path: Path) -> bool:
    """Whether a file holds CLIP's image encoder. Raises CheckpointError where it is damaged."""
    with open_weights(path) as weights:
        return _PATCHES in weights or _THEIRS + "cls_embedding" in weights


def open_clip(path: Path) -> WeightSource:
    """The image encoder's weights in a file, under transformers' names; what such files have of
    CLIP's text encoder and projections is left out."""
    weights = open_weights(path)
    names: dict[str, str | Part] = {}
    try:
        for stored in weights:
            if stored.startswith(_OURS):
                names[stored] = stored
            elif stored.startswith(_THEIRS) and stored != _THEIRS + "head":
                names |= _renamed(stored, weights)
    except BaseException:
        weights.close()
        raise
    return SelectedWeights(weights, names)


def settings_of(weights: WeightSource) -> dict[str, Any]:
    """What shapes tell of the configuration. Raises CheckpointError for another CLIP than ViT-H."""

    def shape(name: str, dims: int) -> tuple[int, ...]:
        if name not in weights or len(weights.info(name).shape) != dims:
            raise CheckpointError(
                f"not CLIP's image encoder: no tensor {name!r} of {dims} dimensions",
                path=weights.path,
                tensor=name,
            )
        return weights.info(name).shape

    width, channels, patch, _ = shape(_PATCHES, 4)
    if width != WIDTH:
        raise CheckpointError(
            f"this CLIP is {width} wide; ViT-H is read, {WIDTH} wide: clip_vision_h.safetensors",
            path=weights.path,
            tensor=_PATCHES,
        )
    side = math.isqrt(shape(_POSITIONS, 2)[0] - 1)
    layers = {int(m[1]) for n in weights if (m := re.search(r"encoder\.layers\.(\d{1,3})\.", n))}
    return {
        "hidden_size": width,
        "intermediate_size": shape(_OURS + "encoder.layers.0.mlp.fc1.weight", 2)[0],
        "projection_dim": 1024,
        "num_hidden_layers": len(layers),
        "num_attention_heads": WIDTH // HEAD_DIM,
        "num_channels": channels,
        "image_size": side * patch,
        "patch_size": patch,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
    }


def _renamed(stored: str, weights: WeightSource) -> dict[str, str | Part]:
    """transformers' names of a tensor under Wan's, three where it has queries, keys and values."""
    name = stored.removeprefix(_THEIRS)
    if name == "cls_embedding":
        return {_OURS + "embeddings.class_embedding": Part(stored, squeezed=True)}
    if name == "pos_embedding":
        return {_POSITIONS: Part(stored, squeezed=True)}
    stem, _, leaf = name.rpartition(".")
    layer = re.fullmatch(r"transformer\.(\d+)\.(.+)", stem)
    if layer is None:
        return {f"{_OURS}{_OUTSIDE.get(stem, stem)}.{leaf}": stored}
    place = f"{_OURS}encoder.layers.{layer[1]}"
    if layer[2] != "attn.to_qkv":
        return {f"{place}.{_IN_LAYER.get(layer[2], layer[2])}.{leaf}": stored}
    rows = weights.info(stored).shape[0] if weights.info(stored).shape else 0
    if rows % 3:
        raise CheckpointError(
            f"tensor {stored!r} has {rows} rows; queries, keys and values are three times as many",
            path=weights.path,
            tensor=stored,
        )
    third = rows // 3
    return {
        f"{place}.self_attn.{part}_proj.{leaf}": Part(stored, range(i * third, (i + 1) * third))
        for i, part in enumerate("qkv")
    }
