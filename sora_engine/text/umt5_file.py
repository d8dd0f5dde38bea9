"""UMT5 in a single file: under transformers' names, Wan's own or GGUF's, with its tokenizer or not.

ComfyUI's files (`umt5_xxl_fp8_e4m3fn_scaled`) have transformers' names and the whole SentencePiece
model as a tensor, `spiece_model`; those for WanVideoWrapper (`umt5-xxl-enc-bf16`) have the names of
Wan's own code. An all-in-one file has ComfyUI's names under a prefix. GGUF files
(`umt5-xxl-encoder-Q8_0`) have llama.cpp's names and the tokenizer's pieces in their metadata. No
file has a configuration that all have: shapes tell it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from sora_engine.errors import CheckpointError
from sora_engine.io.weights.gguf import GGUFWeights
from sora_engine.io.weights.opening import open_weights
from sora_engine.io.weights.selected import SelectedWeights, under_prefix
from sora_engine.io.weights.source import WeightSource
from sora_engine.text.gguf_tokenizer import pieces_in_metadata
from sora_engine.text.sentencepiece import SentencePieceModel

PREFIXES = ("text_encoders.umt5xxl.transformer.", "text_encoders.umt5xxl.", "text_encoders.")
TOKENIZER = "spiece_model"
_BIAS = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
_TABLES = ("shared.weight", "encoder.embed_tokens.weight")

_OUTSIDE = {
    "token_embedding.weight": "shared.weight",
    "norm.weight": "encoder.final_layer_norm.weight",
    "token_embd.weight": "shared.weight",
    "enc.output_norm.weight": "encoder.final_layer_norm.weight",
}
_IN_BLOCK = {
    "norm1": "layer.0.layer_norm",
    **{f"attn.{part}": f"layer.0.SelfAttention.{part}" for part in "qkvo"},
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
    # llama.cpp's, of its architecture t5encoder.
    "attn_norm": "layer.0.layer_norm",
    **{f"attn_{part}": f"layer.0.SelfAttention.{part}" for part in "qkvo"},
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}


def to_transformers_name(name: str) -> str:
    """transformers' name of a tensor under Wan's own or llama.cpp's; any other comes back as it
    is."""
    block = re.fullmatch(r"(?:blocks|enc\.blk)\.(\d+)\.(.+)\.weight", name)
    if block and block[2] in _IN_BLOCK:
        return f"encoder.block.{block[1]}.{_IN_BLOCK[block[2]]}.weight"
    return _OUTSIDE.get(name, name)


def open_umt5(path: Path) -> WeightSource:
    """The encoder's weights in a file, under transformers' names. Raises CheckpointError for what
    is no UMT5 encoder."""
    opened = open_weights(path)
    try:
        source = under_prefix(opened, PREFIXES)
        names = {to_transformers_name(n): n for n in source if not n.endswith(TOKENIZER)}
        found = SelectedWeights(source, names)
        _check(found)
    except BaseException:
        opened.close()
        raise
    return found


def is_umt5(path: Path) -> bool:
    """Whether a file has a UMT5 encoder in it. Raises CheckpointError for what cannot be opened."""
    with open_weights(path) as opened:
        source = under_prefix(opened, PREFIXES)
        names = {to_transformers_name(name) for name in source}
    return _BIAS.format(0) in names and (_BIAS.format(1) in names or not _has_block(names, 1))


def refuse_t5(path: Path) -> None:
    """Raises CheckpointError for a T5 encoder, which is easily taken for UMT5's."""
    with open_weights(path) as opened:
        source = under_prefix(opened, PREFIXES)
        names = {to_transformers_name(name) for name in source}
    if _is_t5(names):
        open_umt5(path).close()


def settings_of(weights: WeightSource) -> dict[str, Any]:
    """What shapes tell of the configuration; the rest is as every published UMT5 has it."""

    def shape(name: str) -> tuple[int, ...]:
        found = weights.info(name).shape
        if len(found) != 2 or 0 in found:
            raise CheckpointError(
                f"tensor {name!r} has shape {list(found)}; UMT5's is a matrix",
                path=weights.path,
                tensor=name,
            )
        return found

    first = "encoder.block.0.layer."
    vocab, width = shape(next(name for name in _TABLES if name in weights))
    buckets, heads = shape(_BIAS.format(0))
    inner = shape(first + "0.SelfAttention.q.weight")[0]
    if inner % heads:
        raise CheckpointError(
            f"queries are {inner} wide, no multiple of {heads} heads",
            path=weights.path,
            tensor=first + "0.SelfAttention.q.weight",
        )
    gated = first + "1.DenseReluDense.wi_0.weight" in weights
    forward = first + f"1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight"
    numbers = {int(m[1]) for n in weights if (m := re.match(r"encoder\.block\.(\d{1,3})\.", n))}
    return {
        "vocab_size": vocab,
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": shape(forward)[0],
        "num_layers": len(numbers),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
    }


def embedded_tokenizer(path: Path) -> SentencePieceModel | None:
    """The tokenizer's model that a file brings; None where it brings none. Raises
    CheckpointError."""
    with open_weights(path) as weights:
        if isinstance(weights, GGUFWeights):
            return pieces_in_metadata(weights.metadata, path)
        names = [n for n in weights if n == TOKENIZER or n.endswith("." + TOKENIZER)]
        if not names:
            return None
        info = weights.info(names[0])
        if info.dtype not in (torch.uint8, torch.int8) or len(info.shape) != 1:
            raise CheckpointError(
                f"tensor {names[0]!r} is {info.dtype} {list(info.shape)}; a SentencePiece model is "
                "bytes",
                path=path,
                tensor=names[0],
            )
        content = weights.read(names[0]).view(torch.uint8).numpy().tobytes()
    try:
        return SentencePieceModel.parse(content, path)
    except CheckpointError as error:
        raise CheckpointError(
            f"tensor {names[0]!r} is no SentencePiece model", path=path, tensor=names[0]
        ) from error


def _has_block(names: set[str], number: int) -> bool:
    return any(name.startswith(f"encoder.block.{number}.") for name in names)


def _check(weights: SelectedWeights) -> None:
    names = set(weights)
    if not names & set(_TABLES) or _BIAS.format(0) not in names:
        seen = ", ".join(sorted(names)[:4])
        raise CheckpointError(f"not a UMT5 text encoder: it holds {seen}", path=weights.path)
    if _is_t5(names):
        raise CheckpointError(
            "a T5 encoder, whose first block alone has relative positions: no tensor "
            f"{_BIAS.format(1)!r}; UMT5 is read, such as umt5_xxl_fp8_e4m3fn_scaled.safetensors",
            path=weights.path,
            tensor=_BIAS.format(1),
        )


def _is_t5(names: set[str]) -> bool:
    return _BIAS.format(0) in names and _has_block(names, 1) and _BIAS.format(1) not in names
