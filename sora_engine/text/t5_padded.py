"""T5 as LTX-Video's pipelines use it: texts as they are written, and padding that is not masked.

The encoder reads a text at a full length, and its own tokens attend to the padding behind them.
Transformers then read the text's own tokens alone, so a second encoder counts them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sora_engine.text.t5 import T5Encoder, T5TokenCounts
from sora_kernels.transfer import to_device

PADDED = "T5PaddedEncoder"
PADDED_COUNTS = "T5PaddedTokenCounts"


class T5PaddedEncoder(T5Encoder):
    """Turns prompts into embeddings of `max_tokens` tokens each, padding seen."""

    def count(self, prompt: str, *, whole: bool = False) -> int:
        """Tokens of a prompt, as `encode` cuts it, or of the whole of it; its end mark counts."""
        own = len(self.tokenizer(prompt, truncation=False, verbose=False).input_ids)
        return own if whole else min(own, self.max_tokens)

    def ids(self, prompt: str) -> tuple[int, ...]:
        """The tokens of a prompt that are encoded, its end mark the last."""
        return tuple(self.tokenizer(prompt, truncation=True, max_length=self.max_tokens).input_ids)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """An embedding `[max_tokens, text_dim]` for each prompt, in the encoder's dtype, on its
        device."""
        done: dict[tuple[int, ...], Tensor] = {}
        each = [self.ids(prompt) for prompt in prompts]
        for ids in each:
            if ids not in done:
                row = torch.full((1, self.max_tokens), int(self.tokenizer.pad_token_id))
                row[0, : len(ids)] = torch.tensor(ids)
                made = self.model(input_ids=to_device(row, self.device))
                done[ids] = made.last_hidden_state[0]
        return [done[ids] for ids in each]


class T5PaddedTokenCounts(T5TokenCounts):
    """How many tokens are a prompt's own: the same tokenizer, and no layers."""

    def count(self, prompt: str, *, whole: bool = False) -> int:
        """Tokens of a prompt, cut or whole."""
        own = len(self.tokenizer(prompt, truncation=False, verbose=False).input_ids)
        return own if whole else min(own, self.max_tokens)
