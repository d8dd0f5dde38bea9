"""T5, the text encoder of PixArt and its kin, texts padded to a length.

Their transformers read the tokens of a text, and for the unconditional branch as many tokens of the
negative text as the text has, padding among them. So texts are encoded at the full length, and a
second encoder tells how many tokens are a text's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sora_engine.errors import CheckpointError
from sora_engine.io.loading import load_into
from sora_engine.io.safetensors import find_weights
from sora_engine.io.weights.opening import open_weights
from sora_engine.text.settings import read_settings
from sora_engine.text.t5_layers import T5Layers, T5Shape
from sora_engine.text.t5_tokenizer import T5Tokenizer, load_tokenizer
from sora_engine.text.umt5 import UMT5Encoder
from sora_kernels.transfer import to_device

CLASS_NAME = "T5EncoderModel"
COUNTS = "T5TokenCounts"

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
}
_KNOWN = (
    "classifier_dropout", "decoder_start_token_id", "dense_act_fn", "eos_token_id", "is_decoder",
    "is_encoder_decoder", "is_gated_act", "n_positions", "num_decoder_layers", "output_past",
    "pad_token_id", "scale_decoder_outputs", "task_specific_params", "tie_word_embeddings",
    "tokenizer_class", "use_cache",
)  # fmt: skip
"""Of the decoder, or following from the keys above."""


class T5Encoder(UMT5Encoder):
    """Turns prompts into embeddings of `max_tokens` tokens each."""

    masked: ClassVar[bool] = True
    """Whether a text's tokens are kept from its padding."""

    @staticmethod
    def prepared(prompt: str) -> str:
        """A prompt as these pipelines have it: in small letters, without space around it."""
        return prompt.lower().strip()

    @classmethod
    def from_folders(
        cls,
        text_encoder: str | Path,
        tokenizer: str | Path | None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        max_tokens: int = 120,
    ) -> T5Encoder:
        """Load `text_encoder/` and `tokenizer/` of a diffusers folder from the disk alone. Raises
        CheckpointError."""
        words = _tokenizer(tokenizer, text_encoder)
        model = _load(Path(text_encoder), device, dtype)
        if len(words) > model.config.vocab_size:
            raise CheckpointError(
                f"the tokenizer has {len(words)} tokens, the text encoder "
                f"{model.config.vocab_size}",
                path=tokenizer,
            )
        return cls(model, words, max_tokens=max_tokens)

    def count(self, prompt: str, *, whole: bool = False) -> int:
        """Tokens of a prompt, as `encode` cuts it, or of the whole of it; its end mark counts."""
        return len(self.tokenizer.ids(self.prepared(prompt), None if whole else self.max_tokens))

    def ids(self, prompt: str) -> tuple[int, ...]:
        """The tokens of a prompt that are encoded, its end mark the last."""
        return tuple(self.tokenizer.ids(self.prepared(prompt), self.max_tokens))

    def activation_bytes(self, num_tokens: int) -> int:
        """Of a text at its full length, whatever it says."""
        return super().activation_bytes(self.max_tokens)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """An embedding `[max_tokens, text_dim]` for each prompt, in the encoder's dtype, on its
        device: its own tokens, and what padding becomes beside them."""
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


class T5TokenCounts:
    """How many of its tokens are a prompt's own: the same tokenizer, and no layers."""

    encoder: ClassVar[type[T5Encoder]] = T5Encoder
    """Whose tokens are counted."""

    def __init__(self, tokenizer: T5Tokenizer, device: torch.device, max_tokens: int) -> None:
        self.model, self.tokenizer = nn.Identity(), tokenizer
        self.device, self.max_tokens = device, max_tokens

    @classmethod
    def from_folders(
        cls,
        text_encoder: Path,
        tokenizer: Path | None,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_tokens: int,
    ) -> T5TokenCounts:
        """Of the tokenizer's folder; raises CheckpointError."""
        return cls(_tokenizer(tokenizer, text_encoder), device, max_tokens)

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """For each prompt its number of tokens, int64 `[]`, on the host: what decides shapes is
        not waited for."""
        return [torch.tensor(self.count(prompt)) for prompt in prompts]

    def count(self, prompt: str, *, whole: bool = False) -> int:
        """Tokens of a prompt, cut or whole."""
        most = None if whole else self.max_tokens
        return len(self.tokenizer.ids(self.encoder.prepared(prompt), most))

    def activation_bytes(self, num_tokens: int) -> int:
        """Nothing is computed."""
        return 0


def _tokenizer(folder: str | Path | None, encoder: str | Path) -> T5Tokenizer:
    if folder is None:
        raise CheckpointError(
            "a T5 encoder needs a tokenizer, and this one brings none; the tokenizer/ of a "
            "diffusers folder would work",
            path=encoder,
        )
    return load_tokenizer(Path(folder))


def _load(path: Path, device: torch.device | str, dtype: torch.dtype | None) -> T5Layers:
    """The layers with the weights of a folder, in evaluation mode."""
    values = read_settings(
        path / "config.json",
        CLASS_NAME,
        _DEFAULTS,
        choices={"feed_forward_proj": ("gated-gelu", "relu")},
        known=_KNOWN,
    )
    with torch.device("meta"):
        model = T5Layers(T5Shape(**values, bias_in_each_layer=False))
    with open_weights(find_weights(path, "model")) as weights:
        load_into(
            model,
            weights,
            device=device,
            dtype=dtype,
            keep_fp32=("wo",) if dtype == torch.float16 else (),
            tied={"encoder.embed_tokens.weight": "shared.weight"},
        )
    return model.eval()
