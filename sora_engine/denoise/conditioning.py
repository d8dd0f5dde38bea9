"""What a request's words and picture became, and what a transformer reads of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from sora_engine.denoise.adapting import Adapters

Embedding: TypeAlias = Mapping[str, Tensor]
"""One prompt, encoded, by the names that its family gives: `"text"` `[n, text_dim]` for the tokens
of a text encoder. Others may stand beside it or in its place: a second encoder's tokens, a pooled
text `[dim]`, a class label (int64 `[]`), the image that a video begins with."""


NEGATIVE = "negative"
"""What marks the embedding of the unconditional branch, for models that read it otherwise."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a request, encoded.

    texts: of the prompt, or of each shot. frame_texts: for each latent frame the index into `texts`
    of what it reads. negative: what the unconditional branch reads, where there is one. image:
    tokens of an image encoder `[n, image_dim]`, where the transformer reads such. cut: a line for
    each text of which the encoder does not read the end. reused: how many of the texts were encoded
    for an earlier request.
    """

    texts: tuple[Embedding, ...]
    frame_texts: tuple[int, ...]
    negative: Embedding | None
    image: Tensor | None = None
    cut: tuple[str, ...] = ()
    reused: int = 0

    @property
    def branches(self) -> tuple[Embedding, ...]:
        """What guidance branches read, each with the image: the texts, and last the negative."""
        texts = self.texts
        if self.negative is not None:
            texts = (*texts, {**self.negative, NEGATIVE: torch.ones(())})
        if self.image is None:
            return texts
        return tuple({**text, "image": self.image} for text in texts)

    @property
    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        held = [tensor for text in self.texts for tensor in text.values()]
        held += [] if self.negative is None else self.negative.values()
        return held if self.image is None else [*held, self.image]


@dataclass(frozen=True, slots=True)
class KeyValues:
    """Keys and values of one conditioning text or image, for every layer.

    keys, values: `[layers, tokens, heads, head_dim]`.
    padding: how many further tokens follow that are all the model's padding token. Their keys are
        identical, so attention weighs one of them by this count instead of computing them all.
    padding_keys, padding_values: that token's, `[layers, heads, head_dim]`.
    """

    keys: Tensor
    values: Tensor
    padding: int = 0
    padding_keys: Tensor | None = None
    padding_values: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """What one guidance branch of one request reads. Computed once a request.

    Compared by identity: segments with the same object share its memory.

    sources: for cross-attention, by name.
    tokens: `[n, dim]` by name, for families whose self-attention joins them to the video's tokens:
        each name becomes a stream of the packed batch.
    pooled: `[dim]`, for families that modulate by a pooled text or a label beside the noise level.
    adapters: with which it was made; the tokens that read it have them too.
    """

    sources: Mapping[str, KeyValues] = field(default_factory=dict)
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    pooled: Tensor | None = None
    adapters: Adapters | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of what cross-attention and self-attention read."""
        both = [tensor for kv in self.sources.values() for tensor in (kv.keys, kv.values)]
        return sum(tensor.nbytes for tensor in (*both, *self.tokens.values()))
