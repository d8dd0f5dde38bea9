"""Which part of a model a file is that is no transformer: told by its tensors' names and shapes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sora_engine.io.weights.adapter_keys import parse_key
from sora_engine.io.weights.gguf import GGUFWeights
from sora_engine.io.weights.opening import open_weights
from sora_engine.text.clip_file import is_clip
from sora_engine.text.gguf_tokenizer import TOKENS
from sora_engine.text.umt5_file import TOKENIZER, is_umt5
from sora_engine.vae.registry import vae_in_file
from sora_engine.vae.tiny_config import infer_tiny, is_tiny

ADAPTER = "adapter"


@dataclass(frozen=True, slots=True)
class PartKind:
    """text: what it is, for people. use: how it is given to an engine, and to the command."""

    text: str
    use: str


def part_kinds(path: Path) -> list[PartKind]:
    """The parts in a file, of an all-in-one several; empty where it holds none. Raises
    CheckpointError."""
    with open_weights(path) as weights:
        shapes = {name: weights.info(name).shape for name in weights}
        pieces = isinstance(weights, GGUFWeights) and TOKENS in weights.metadata
    kinds = []
    config = vae_in_file(shapes, path=path)
    if config is not None:
        what = f"{config.class_name} with {config.z_dim} latent channels"
        kinds.append(PartKind(what, _as("vae")))
    if is_tiny(shapes):
        tiny = infer_tiny(shapes, path=path)
        form = ", super" if tiny.deep else ""
        what = f"tiny autoencoder (TAEHV{form}) for {tiny.z_dim} latent channels"
        kinds.append(PartKind(what, _as("tiny_vae")))
    if is_umt5(path):
        pieces = pieces or any(name.rpartition(".")[2] == TOKENIZER for name in shapes)
        what = f"UMT5 text encoder, {'with' if pieces else 'without'} its tokenizer"
        kinds.append(PartKind(what, _as("text_encoder")))
    if is_clip(path):
        kinds.append(PartKind("CLIP image encoder", _as("image_encoder")))
    if not kinds and any(parse_key(name) is not None for name in shapes):
        kinds.append(PartKind(ADAPTER, "loras=[Lora(...)] (--lora)"))
    return kinds


def _as(component: str) -> str:
    return f"components={{{component!r}: ...}} (--{component.replace('_', '-')})"
