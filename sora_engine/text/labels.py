"""Classes in the place of texts: what stands for a prompt is a class's number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

CLASS_NAME = "ClassLabels"
NULL = -1
"""What no class at all is, for the unconditional branch: a transformer has a row for it."""


class LabelEncoder:
    """A `TextEncoder` without layers: each text is the number of a class, or nothing."""

    def __init__(self, device: torch.device) -> None:
        self.model, self.max_tokens, self.device = nn.Identity(), 1, device

    @classmethod
    def from_folders(
        cls,
        text_encoder: Path,
        tokenizer: Path | None,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_tokens: int,
    ) -> LabelEncoder:
        """Nothing is read: the transformer has the embedding."""
        return cls(device)

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """For each text its class, int64 `[]`; `NULL` for an empty one."""
        numbers = (int(prompt) if prompt.strip() else NULL for prompt in prompts)
        return [torch.tensor(number, device=self.device) for number in numbers]

    def count(self, prompt: str, *, whole: bool = False) -> int:
        """One token, of any text."""
        return 1

    def activation_bytes(self, num_tokens: int) -> int:
        """A lookup holds nothing."""
        return 0
