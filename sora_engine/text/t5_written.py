"""T5 as LTX-Video's pipelines use it: texts as they are written, padding masked or not.

Texts are encoded at a full length, and transformers read their own tokens alone: a second encoder
counts them. In diffusers the pipeline of 0.9.5 and later masks the padding, and those before let
a text's tokens attend to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from sora_engine.text.t5 import T5Encoder, T5TokenCounts
from sora_engine.text.t5_tokenizer import T5Tokenizer
from sora_kernels.transfer import to_device

WRITTEN, PADDED = "T5WrittenEncoder", "T5PaddedEncoder"
WRITTEN_COUNTS = "T5WrittenTokenCounts"


def _count(tokenizer: T5Tokenizer, prompt: str, most: int, *, whole: bool) -> int:
    return len(tokenizer.ids(prompt, None if whole else most))


class T5WrittenEncoder(T5Encoder):
    """Turns prompts into embeddings of `max_tokens` tokens each."""

    masked: ClassVar[bool] = True

    def count(self, prompt: str, *, whole: bool = False) -> int:
        """Tokens of a prompt, as `encode` cuts it, or of the whole of it; its end mark counts."""
        return _count(self.tokenizer, prompt, self.max_tokens, whole=whole)

    def ids(self, prompt: str) -> tuple[int, ...]:
        """The tokens of a prompt that are encoded, its end mark the last."""
        return tuple(self.tokenizer.ids(prompt, self.max_tokens))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """An embedding `[max_tokens, text_dim]` for each prompt, in the encoder's dtype, on its
        device."""
        done: dict[tuple[int, ...], Tensor] = {}
        each = [self.ids(prompt) for prompt in prompts]
        for ids in each:
            if ids not in done:
                row = torch.full((1, self.max_tokens), self.tokenizer.pad_id)
                row[0, : len(ids)] = torch.tensor(ids)
                seen = len(ids) if self.masked else self.max_tokens
                mask = (torch.arange(self.max_tokens) < seen).long()[None]
                inputs = to_device(row, self.device), to_device(mask, self.device)
                done[ids] = self.model(input_ids=inputs[0], attention_mask=inputs[1])[0]
        return [done[ids] for ids in each]


class T5PaddedEncoder(T5WrittenEncoder):
    """The same, and padding is seen."""

    masked = False


class T5WrittenTokenCounts(T5TokenCounts):
    """How many tokens are a prompt's own: the same tokenizer, and no layers."""

    def count(self, prompt: str, *, whole: bool = False) -> int:
        """Tokens of a prompt, cut or whole."""
        return _count(self.tokenizer, prompt, self.max_tokens, whole=whole)
