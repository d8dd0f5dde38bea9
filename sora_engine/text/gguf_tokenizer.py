"""The tokenizer of a T5 in a GGUF file's metadata, as llama.cpp's converter writes it.

`tokenizer.ggml.tokens`, `scores` and `token_type` are SentencePiece's pieces, in the order of their
ids; `precompiled_charsmap` is its compiled normaliser, without which full-width letters and CJK
punctuation would get other ids (github.com/ggml-org/ggml, `docs/gguf.md`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sora_engine.errors import CheckpointError
from sora_engine.text.sentencepiece import UNKNOWN, SentencePieceModel

logger = logging.getLogger(__name__)

_KEY = "tokenizer.ggml."
TOKENS = _KEY + "tokens"
UNUSED = 5
"""A token's type, of those that fill a vocabulary up to the width of the embedding."""


def pieces_in_metadata(metadata: Mapping[str, Any], path: Path) -> SentencePieceModel | None:
    """The tokenizer's model; None where the metadata has none. Raises CheckpointError."""
    kind = metadata.get(_KEY + "model")
    tokens = metadata.get(TOKENS)
    if kind is None and tokens is None:
        return None

    def fail(message: str) -> CheckpointError:
        return CheckpointError(f"its tokenizer cannot be used: {message}", path=path)

    if kind != "t5":
        raise fail(f"{_KEY}model is {kind!r}; UMT5's is 't5'")
    scores, kinds = metadata.get(_KEY + "scores"), metadata.get(_KEY + "token_type")
    texts = isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)
    if not tokens or not texts:
        raise fail(f"{TOKENS} is no list of texts")
    for name, values in (("scores", scores), ("token_type", kinds)):
        if not isinstance(values, list) or len(values) != len(tokens):
            count = len(values) if isinstance(values, list) else "no"
            raise fail(f"{_KEY}{name} has {count} values for {len(tokens)} tokens")
    assert isinstance(scores, list)
    assert isinstance(kinds, list)
    if not all(isinstance(score, float) and math.isfinite(score) for score in scores):
        raise fail(f"{_KEY}scores holds what is no number")
    for name in ("add_space_prefix", "remove_extra_whitespaces"):
        if metadata.get(_KEY + name, True) is not True:
            raise fail(f"{_KEY}{name} is {metadata[_KEY + name]!r}; T5's is True")
    unknown = [i for i, token_kind in enumerate(kinds) if token_kind == UNKNOWN]
    told = metadata.get(_KEY + "unknown_token_id", unknown[0] if unknown else None)
    if len(unknown) != 1 or told != unknown[0]:
        raise fail(f"{len(unknown)} tokens are the unknown one, and unknown_token_id is {told}")
    count = len(tokens)
    while kinds[count - 1] == UNUSED:  # no text may become one of these
        count -= 1
    pieces = list(zip(tokens[:count], scores[:count], strict=True))
    return SentencePieceModel(pieces, unknown[0], _charsmap(metadata, path))


def _charsmap(metadata: Mapping[str, Any], path: Path) -> bytes | None:
    found = metadata.get(_KEY + "precompiled_charsmap")
    if found is None:
        logger.warning(
            "%s: its tokenizer lacks the map of characters (precompiled_charsmap): full-width "
            "letters and some punctuation become other tokens than UMT5's; give the tokenizer/ of "
            "a diffusers folder as components={'tokenizer': ...}",
            path,
        )
        return None
    try:
        return bytes(value & 0xFF for value in found) or None
    except TypeError:
        raise CheckpointError(
            f"its tokenizer cannot be used: {_KEY}precompiled_charsmap is {type(found).__name__}, "
            "not bytes",
            path=path,
        ) from None
