"""Text encoders: what each kind of them offers, and several of them as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sora_engine.errors import CheckpointError
from sora_engine.text.kept_texts import KeptTexts


class TextEncoder(Protocol):
    """A text encoder with its tokenizer.

    model: its layers. max_tokens: where it cuts a prompt. device: where it computes, which need not
    be where its weights lie.
    """

    model: Any
    max_tokens: int
    device: torch.device

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """An embedding `[tokens, text_dim]` (pooled: `[text_dim]`) for each prompt, on `device`."""
        ...

    def count(self, prompt: str, *, whole: bool = False) -> int:
        """Tokens of a prompt, as `encode` cuts it, or of the whole of it."""
        ...

    def activation_bytes(self, num_tokens: int) -> int:
        """The most that encoding one text of so many tokens holds beside the weights."""
        ...


@runtime_checkable
class ReadsIds(Protocol):
    """A text encoder whose embedding of a text follows from ids alone: those may be kept."""

    def ids(self, prompt: str) -> tuple[int, ...]:
        """What of a prompt is encoded."""
        ...


class TextEncoderKind(Protocol):
    """A class of text encoders."""

    def from_folders(
        self,
        text_encoder: Path,
        tokenizer: Path | None,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_tokens: int,
    ) -> TextEncoder:
        """An encoder from the folders of a checkpoint. Raises CheckpointError."""
        ...


_KINDS: dict[str, TextEncoderKind | str] = {
    "UMT5EncoderModel": "sora_engine.text.umt5:UMT5Encoder",
    "ClassLabels": "sora_engine.text.labels:LabelEncoder",
    "T5EncoderModel": "sora_engine.text.t5:T5Encoder",
    "CLIPTextModel": "sora_engine.text.clip_text:CLIPTextEncoder",
    "T5TokenCounts": "sora_engine.text.t5:T5TokenCounts",
    "T5WrittenEncoder": "sora_engine.text.t5_written:T5WrittenEncoder",
    "T5PaddedEncoder": "sora_engine.text.t5_written:T5PaddedEncoder",
    "T5WrittenTokenCounts": "sora_engine.text.t5_written:T5WrittenTokenCounts",
}
"""By the class that a configuration names the kind, or where it is."""


def register_text_encoder(class_name: str, kind: TextEncoderKind) -> None:
    """Make a kind known by the class that its configurations name. ValueError where another has
    that name."""
    if class_name in _KINDS:
        raise ValueError(f"the class {class_name!r} has its kind already")
    _KINDS[class_name] = kind


def unregister_text_encoder(class_name: str) -> None:
    """Forget a kind that was registered."""
    del _KINDS[class_name]


def load_text_encoder(
    class_name: str,
    text_encoder: Path,
    tokenizer: Path | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_tokens: int,
) -> TextEncoder:
    """The encoder of that class from the folders of a checkpoint. Raises CheckpointError."""
    if class_name not in _KINDS:
        raise CheckpointError(
            f"text encoder {class_name!r}; supported: {', '.join(_KINDS)}", path=text_encoder
        )
    kind = _KINDS[class_name]
    if isinstance(kind, str):
        module, _, name = kind.partition(":")
        found: TextEncoderKind = getattr(import_module(module), name)
    else:
        found = kind
    return found.from_folders(
        text_encoder, tokenizer, device=device, dtype=dtype, max_tokens=max_tokens
    )


class PromptEncoder:
    """All text encoders of a model: a prompt becomes what each of them makes of it, by name."""

    def __init__(self, encoders: Mapping[str, TextEncoder]) -> None:
        self.encoders = dict(encoders)
        self.kept = KeptTexts()
        self.reused = 0
        """Of the prompts that were encoded last, how many were known from before."""

    @property
    def max_tokens(self) -> int:
        """Where the longest of them cuts a prompt."""
        return max((encoder.max_tokens for encoder in self.encoders.values()), default=1)

    @property
    def modules(self) -> list[nn.Module]:
        """Their layers."""
        return [encoder.model for encoder in self.encoders.values()]

    def encode(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """For each prompt its embedding by every encoder's name."""
        embeddings: list[dict[str, Tensor]] = [{} for _ in prompts]
        known = [True] * len(prompts)
        for name, encoder in self.encoders.items():
            keys: list[tuple[object, ...] | None] = [None] * len(prompts)
            if self.kept.capacity and isinstance(encoder, ReadsIds):
                keys = [(name, *encoder.ids(prompt)) for prompt in prompts]
            found = [None if key is None else self.kept.get(key) for key in keys]
            new = dict.fromkeys(p for p, old in zip(prompts, found, strict=True) if old is None)
            made = dict(zip(new, encoder.encode(list(new)), strict=True)) if new else {}
            for i, (prompt, key, old) in enumerate(zip(prompts, keys, found, strict=True)):
                known[i] = known[i] and old is not None
                embeddings[i][name] = made[prompt] if old is None else old
                if key is not None and old is None:
                    self.kept.put(key, made[prompt])
        self.reused = sum(known) if self.encoders else 0
        return embeddings

    def count(self, prompt: str) -> int:
        """Tokens of a prompt, by the encoder that makes the most of them."""
        return max((encoder.count(prompt) for encoder in self.encoders.values()), default=1)

    def cut(self, prompts: Sequence[str]) -> tuple[str, ...]:
        """A line for each prompt of which some encoder does not read the end."""
        lines = []
        for prompt in dict.fromkeys(prompts):
            for name, encoder in self.encoders.items():
                tokens = encoder.count(prompt, whole=True)
                if tokens > encoder.max_tokens:
                    start = f"{prompt[:40]}..." if len(prompt) > 40 else prompt
                    lines.append(
                        f"the prompt {start!r} is cut: it has {tokens} tokens, and the encoder "
                        f"{name!r} reads {encoder.max_tokens}"
                    )
        return tuple(lines)

    def activation_bytes(self, num_tokens: int) -> int:
        """The most that encoding a text holds beside weights: encoders run one after the other."""
        sizes = (encoder.activation_bytes(num_tokens) for encoder in self.encoders.values())
        return max(sizes, default=0)
