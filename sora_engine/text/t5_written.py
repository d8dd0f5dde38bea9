"""T5 as LTX-Video's pipelines use it: texts as they are written, padding masked or not.

Texts are encoded at a full length, and transformers read their own tokens alone: a second encoder
counts them. In diffusers the pipeline of 0.9.5 and later masks the padding, and those before let
a text's tokens attend to it.
"""

from __future__ import annotations

from typing import ClassVar

from sora_engine.text.t5 import T5Encoder, T5TokenCounts

WRITTEN, PADDED = "T5WrittenEncoder", "T5PaddedEncoder"
WRITTEN_COUNTS = "T5WrittenTokenCounts"


class T5WrittenEncoder(T5Encoder):
    """Turns prompts into embeddings of `max_tokens` tokens each."""

    @staticmethod
    def prepared(prompt: str) -> str:
        """A prompt as it is written."""
        return prompt


class T5PaddedEncoder(T5WrittenEncoder):
    """The same, and padding is seen."""

    masked = False


class T5WrittenTokenCounts(T5TokenCounts):
    """How many tokens are a prompt's own: the same tokenizer, and no layers."""

    encoder: ClassVar[type[T5Encoder]] = T5WrittenEncoder
