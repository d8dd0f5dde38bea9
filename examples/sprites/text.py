"""The sprites' tokenizer and text encoder: a word-level `T5Tokenizer` and a tiny UMT5.

The encoder is trained first, on captions alone (`train_text.py`), to write what a caption says into
every one of its tokens: a scene's `code`, which sets one place of each group below to 1. So the
transformer need not learn to read while it learns to draw.
"""

from __future__ import annotations

import torch
import world
from encoder import TEXT_DIM, word_tokenizer
from torch import Tensor
from transformers import T5Tokenizer

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
    """Every word that captions use is one token."""
    text = " ".join(way for ways in WORDS.values() for way in ways) + " " + " ".join(GROUNDS)
    words = {*text.replace("{}", "").split(), "a", "an", "and", "the", "is", "that"}
    return word_tokenizer(words | {*world.COLOURS, *world.BACKGROUNDS})


def code(said: list[tuple[str, str, str, str]], background: str) -> Tensor:
    """`[TEXT_DIM]`: a 1 in each group, for one or two sprites' (colour, shape, size, motion)."""
    second = said[1] if len(said) == 2 else ("none",) * 4
    values = (*said[0], *second, background) if said else ("",) * 4 + ("none",) * 4 + ("",)
    out, at = torch.zeros(TEXT_DIM), 0
    for group, value in zip(GROUPS, values, strict=True):
        out[at + group.index(value)] = 1.0
        at += len(group)
    return out
