"""The sprites' tokenizer and text encoder: a word-level `T5Tokenizer` and a tiny UMT5.

The encoder is trained first, on captions alone (`train_text.py`), to write what a caption says into
every one of its tokens: a scene's `code`, which sets one place of each group below to 1. So the
transformer need not learn to read while it learns to draw.
"""

from __future__ import annotations

import string

import torch
import world
from torch import Tensor
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

TEXT_DIM = 128

# What a caption says of a scene; "" is "left out", and "none" is "no second sprite".
ONE = (("", *world.COLOURS), ("", *world.SHAPES), ("", *world.SIZES), ("", *world.MOTIONS))
GROUPS = (*ONE, *(("none", *values) for values in ONE), ("", *world.BACKGROUNDS))
CODE_DIM = sum(len(group) for group in GROUPS)

# How else a caption may put it. The transformer's training uses the first of each alone.
WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "gray": ("gray", "grey"),
    "circle": ("circle", "ball", "disc", "dot"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "diamond": ("diamond", "rhombus"),
    "star": ("star",),
    "": ("shape", "object", "thing"),
    "left": ("moves left", "moving left", "moves to the left", "goes left", "moves leftward"),
    "right": ("moves right", "moving right", "moves to the right", "goes right", "moves rightward"),
    "up": ("moves up", "moving up", "goes up", "rises", "moves upward"),
    "down": ("moves down", "moving down", "goes down", "falls", "moves downward"),
    "still": ("stays still", "is still", "stands still", "staying still", "does not move"),
    "bounces": ("bounces", "bouncing", "bounces up and down", "jumps"),
    "orbits": ("orbits", "orbiting", "moves in a circle", "goes round"),
    "grows": ("grows", "growing", "grows and shrinks", "pulses"),
}
GROUNDS = (
    "on a {} background", "on {}", "on a {} ground", "against a {} background",
    "in front of a {} background", "with a {} background",
)  # fmt: skip


def new_tokenizer() -> T5Tokenizer:
    """Every word that captions use is one token; other words are spelled letter by letter."""
    text = " ".join(way for ways in WORDS.values() for way in ways) + " " + " ".join(GROUNDS)
    words = {*text.replace("{}", "").split(), "a", "an", "and", "the", "is", "that"}
    words |= {*world.COLOURS, *world.BACKGROUNDS}
    words |= {word.capitalize() for word in words}
    letters = string.ascii_lowercase + string.ascii_uppercase + string.digits + string.punctuation
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -1.0) for word in sorted(words)]
    pieces += [(letter, -8.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def new_text_encoder(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_DIM,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=64,
    )
    torch.manual_seed(1)
    return UMT5EncoderModel(config)


def code(said: list[tuple[str, str, str, str]], background: str) -> Tensor:
    """`[TEXT_DIM]`: a 1 in each group, for one or two sprites' (colour, shape, size, motion)."""
    second = said[1] if len(said) == 2 else ("none",) * 4
    values = (*said[0], *second, background) if said else ("",) * 4 + ("none",) * 4 + ("",)
    out, at = torch.zeros(TEXT_DIM), 0
    for group, value in zip(GROUPS, values, strict=True):
        out[at + group.index(value)] = 1.0
        at += len(group)
    return out


def encode(model: UMT5EncoderModel, tokenizer: T5Tokenizer, captions: list[str]) -> list[Tensor]:
    """Embeddings `[n, TEXT_DIM]`, one for each caption, without padding. Differentiable."""
    unique = sorted(set(captions))
    rows = tokenizer(unique, padding=True, return_tensors="pt").to(model.device)
    states = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask).last_hidden_state
    lengths = rows.attention_mask.sum(dim=1).tolist()
    done = {text: states[i, : lengths[i]] for i, text in enumerate(unique)}
    return [done[text] for text in captions]
